"""Write docs/launchers-and-flags.md: all flags and the launchers' variables, with their defaults.

    python -m hnas.tools.flag_tables [--check]

The tables come from Options (hnas/utils/options.py) and from the launchers themselves. With
--check nothing is written, and the exit code is 1 if the page is not what would be written.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hnas.base.command_line import OneLineParser, read_bool
from hnas.base.errors import UserError, run_main
from hnas.base.files import replacing
from hnas.utils.flags import ALL, EXPORT, TRAINING, Stage, default_of
from hnas.utils.options import Options

ROOT = Path(__file__).parents[2]
PAGE = Path("docs/launchers-and-flags.md")
LAUNCHERS = {
    Stage.CONTRAST: "local_train_pinas1_wholenet.sh",
    Stage.DISTILL: "local_train_pinas2_simple_wholenet_nof.sh",
    Stage.SCORE: "local_eval.sh",
}
SHARED = "hnas/tools/launch.sh"
NONE, ABSENT = "none", "–"

INTRODUCTION = """\
# Launchers and flags

Three launchers run the three stages with the recipe's settings:

| stage | launcher | program |
|---|---|---|
| 1 | `local_train_pinas1_wholenet.sh` | `train_supernet_pinas_stage1.py` |
| 2 | `local_train_pinas2_simple_wholenet_nof.sh` | `train_supernet_pinas_stage2_simple.py` |
| 3 | `local_eval.sh` | `train_supernet.py` |

A launcher's settings are variables, which are taken from the environment where it has them:

```sh
image_dir=/data/ILSVRC2012 batch_size=128 sh local_train_pinas1_wholenet.sh
```

What follows the launcher's name goes to its program as it is, and wins over the variables. A
program has more flags than its launcher has variables, and `--help` prints them all:

```sh
image_dir=/data/ILSVRC2012 sh local_train_pinas2_simple_wholenet_nof.sh --verify_images True
sh local_eval.sh --help
```

- **Yes or no** is written `True` or `False` (in any case; or `1`, `0`), never as a flag alone.
- **No path** is written `None`, or left empty.
- **A misspelt flag** ends the program before it does anything, with the nearest that there is:
  `error: unknown flag --imgae_dir; did you mean --image_dir?` A misspelt *variable* is not noticed:
  the launcher never looks at it.
- **Any program takes any flag** of the second table, so that command lines can be shared. One that
  has no effect in a stage is named in the log.
- Wrong input of any kind ends with one line and exit code 2.

`python -m hnas.tools.flag_tables` wrote this page from the programs; do not edit it.
"""

VARIABLES = """\
## Variables of the launchers

Their defaults; – where a launcher has no such variable. Each is handed on as the flag of its name,
of which the last table tells the unit.
"""

PROCESSES = """\
## Variables of all launchers: processes

Not flags: they decide which processes a launcher starts, and where.
"""

FLAGS = """\
## Flags of the programs

`pretrain`, `train_standalone`, `export` and `search` are `python -m hnas.tools.pretrain` and so
on, and *training* is all but stage 3, export and search. Other tools have flags of their own, and
`--help`.
"""


class Variable(NamedTuple):
    """A line ``name=${name:-default}  # comment`` of a launcher."""

    default: str
    comment: str


def launcher_variables(text: str) -> dict[str, Variable]:
    """The variables that a launcher's text takes from the environment, by name."""
    lines = re.findall(r"^(\w+)=\$\{\1:-(.*)\}(?: +# (.*))?$", text, re.M)
    return {name: Variable(default, comment) for name, default, comment in lines}


def page() -> str:
    """The whole page.

    Raises:
        UserError: the launchers are not there, since this is not the project's checkout.
    """
    try:
        own = {
            stage: launcher_variables((ROOT / name).read_text(encoding="utf-8"))
            for stage, name in LAUNCHERS.items()
        }
        shared = launcher_variables((ROOT / SHARED).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{error.filename} is missing; run this in the checkout") from error
    tables = (_variables(own), _processes(shared), _flags())
    parts = [INTRODUCTION]
    for head, table in zip((VARIABLES, PROCESSES, FLAGS), tables, strict=True):
        parts += [head, table]
    return "\n".join(parts)


def _variables(own: dict[Stage, dict[str, Variable]]) -> str:
    options = {option.name: option for option in dataclasses.fields(Options)}
    rows = []
    for name in dict.fromkeys(name for variables in own.values() for name in variables):
        found = [variables.get(name) for variables in own.values()]
        cells = [ABSENT if variable is None else _value(variable.default) for variable in found]
        rows.append([f"`{name}`", *cells, options[name].metadata["help"]])
    return _table(["variable", *map(str, own), "meaning"], rows)


def _processes(shared: dict[str, Variable]) -> str:
    rows = [[f"`{name}`", _value(default), comment] for name, (default, comment) in shared.items()]
    return _table(["variable", "default", "meaning"], rows)


def _flags() -> str:
    rows = [
        [
            f"`--{option.name}`",
            option.metadata["help"],
            option.metadata["unit"],
            _defaults(option),
            _stages(option.metadata["stages"]),
        ]
        for option in dataclasses.fields(Options)
    ]
    return _table(["flag", "meaning", "unit", "default", "used by"], rows)


def _defaults(option: dataclasses.Field) -> str:
    """The default of most stages, then those that single stages have instead."""
    stages: dict[object, list[str]] = {}
    for stage in Stage:
        if stage in option.metadata["stages"]:
            stages.setdefault(default_of(option, stage), []).append(str(stage))
    if len(stages) < 2:
        return _value(next(iter(stages), option.default))
    usual = [_value(option.default)] if stages.pop(option.default, None) else []
    others = [f"{', '.join(names)}: {_value(value)}" for value, names in stages.items()]
    return "; ".join([*usual, *others])


def _stages(stages: frozenset[Stage]) -> str:
    groups = {ALL: "all", ALL - EXPORT: "all but export", TRAINING: "training"}
    if stages in groups:
        return groups[stages]
    return ", ".join(str(stage) for stage in Stage if stage in stages) or NONE


def _value(value: object) -> str:
    return NONE if str(value) in ("", "None") else f"`{value}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join([*lines, ""])


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=read_bool, default=False, nargs="?", const=True)
    options = parser.parse_args(argv)
    path, wanted = ROOT / PAGE, page()
    if not options.check:
        with replacing(path) as temporary:
            temporary.write_text(wanted, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != wanted:
        sys.stderr.write(f"{PAGE} is not current; run python -m hnas.tools.flag_tables\n")
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
