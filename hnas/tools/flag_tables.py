"""Write the tables of docs/launchers-and-flags.md: all flags, and the launchers' variables.

    python -m hnas.tools.flag_tables [--check]

They come from Options (hnas/utils/options.py) and from the launchers themselves. With --check
nothing is written, and the exit code is 1 if the page is not what would be written.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hnas.base.command_line import OneLineParser, read_bool
from hnas.base.errors import UserError, run_main
from hnas.base.files import replacing
from hnas.utils.flags import ALL, EXPORT, TRAINING, Stage, default_of, default_text
from hnas.utils.options import Options
from hnas.utils.parsing import parse_options

ROOT = Path(__file__).parents[2]
PAGE = Path("docs/launchers-and-flags.md")
LAUNCHERS = {
    Stage.CONTRAST: "local_train_pinas1_wholenet.sh",
    Stage.DISTILL: "local_train_pinas2_simple_wholenet_nof.sh",
    Stage.SCORE: "local_eval.sh",
}
SHARED = "hnas/tools/launch.sh"
SETS = {ALL: "all", ALL - EXPORT: "all but export", TRAINING: "training"}


class Variable(NamedTuple):
    """A line ``name=${name:-default}  # comment`` of a launcher."""

    default: str
    comment: str


def launcher_variables(text: str) -> dict[str, Variable]:
    """The variables that a launcher's text takes from the environment, by name."""
    lines = re.findall(r"^(\w+)=\$\{\1:-(.*)\}(?: +# (.*))?$", text, re.M)
    return {name: Variable(default, comment) for name, default, comment in lines}


def page(text: str) -> str:
    """The page's text with new tables: what follows their comments up to the first other line.

    Raises:
        UserError: the launchers are not there, since this is not the project's checkout.
    """
    try:
        launchers = {stage: (ROOT / name).read_text() for stage, name in LAUNCHERS.items()}
        shared = launcher_variables((ROOT / SHARED).read_text())
    except OSError as error:
        raise UserError(f"{error.filename} is missing; run this in the checkout") from error
    processes = [[f"`{name}`", _value(default), text] for name, (default, text) in shared.items()]
    tables = {
        "flags": _flags({s: launcher_variables(text) for s, text in launchers.items()}),
        "processes": _table(["variable", "default", "meaning"], processes),
    }
    for name, table in tables.items():
        marker = f"<!-- {name} -->\n"
        head, _, rest = text.partition(marker)
        text = head + marker + table + re.sub(r"\A(\|.*\n)*", "", rest)
    return text


def _flags(launchers: Mapping[Stage, Mapping[str, Variable]]) -> str:
    """Every flag, group by group."""
    given = {
        stage: parse_options(stage, [f"--{name}={own.default}" for name, own in variables.items()])
        for stage, variables in launchers.items()
    }
    rows, group = [], ""
    for option in dataclasses.fields(Options):
        name, about = option.name, option.metadata
        if about["group"] != group:
            group = about["group"]
            rows.append([f"**{group}**", "", "", "", "", ""])
        own = {stage: default_of(option, stage) for stage in Stage if stage in about["stages"]}
        told = {
            str(stage): "" if value == own.get(stage) else default_text(option, value)
            for stage, value in (
                (s, getattr(given[s], name)) for s in given if name in launchers[s]
            )
        }
        used = SETS.get(about["stages"]) or ", ".join(map(str, own))
        default = _defaults(option, own)
        rows.append([f"`--{name}`", about["help"], about["unit"], default, used, _by_stage(told)])
    return _table(["flag", "meaning", "unit", "default", "used by", "variable of"], rows)


def _defaults(option: dataclasses.Field, own: Mapping[Stage, object]) -> str:
    """The default of most stages, then those that single stages have instead."""
    if len(set(own.values())) == 1:
        return _value(default_text(option, next(iter(own.values()))))
    others = {
        str(s): default_text(option, value) for s, value in own.items() if value != option.default
    }
    usual = [] if len(others) == len(own) else [_value(default_text(option, option.default))]
    return "; ".join([*usual, _by_stage(others)])


def _by_stage(texts: Mapping[str, str]) -> str:
    """As ``stage 1, stage 2: `value```, or without one."""
    stages: dict[str, list[str]] = {}
    for stage, text in texts.items():
        stages.setdefault(text, []).append(stage)
    return "; ".join(
        ", ".join(names) + (f": {_value(text)}" if text else "") for text, names in stages.items()
    )


def _value(text: str) -> str:
    return "none" if text in ("", "none") else f"`{text}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join([*lines, ""])


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=read_bool, default=False, nargs="?", const=True)
    check, path = parser.parse_args(argv).check, ROOT / PAGE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; run this in the checkout"
        ) from error
    if check and text != page(text):
        sys.stderr.write(f"{PAGE} is not current; run python -m hnas.tools.flag_tables\n")
        sys.exit(1)
    if not check:
        with replacing(path) as temporary:
            temporary.write_text(page(text), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
