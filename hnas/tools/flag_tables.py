"""Write the table of docs/launchers-and-flags.md: all flags, from hnas/programs/options.py.

python -m hnas.tools.flag_tables
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from hnas.base.command_line import OneLineParser
from hnas.base.errors import UserError, run_main
from hnas.base.files import write_text
from hnas.programs.flags import ALL, EXPORT, TRAINING, Stage, default_of, default_text
from hnas.programs.options import Options

ROOT = Path(__file__).parents[2]
PAGE = Path("docs/launchers-and-flags.md")
SETS = {ALL: "all", ALL - EXPORT: "all but export", TRAINING: "training"}
MARKER = "<!-- flags -->\n"


def page(text: str) -> str:
    """The page's text with a new table behind the marker, where one may stand already."""
    head, _, rest = text.partition(MARKER)
    return head + MARKER + _table() + re.sub(r"\A(\|.*\n)*", "", rest)


def _table() -> str:
    """Every flag, group by group."""
    heads = ["flag", "meaning", "unit", "default", "used by"]
    rows, group = [heads, ["---"] * 5], ""
    for option in dataclasses.fields(Options):
        name, about = option.name, option.metadata
        if about["group"] != group:
            group = about["group"]
            rows.append([f"**{group}**", "", "", "", ""])
        own = {stage: default_of(option, stage) for stage in Stage if stage in about["stages"]}
        used = SETS.get(about["stages"]) or ", ".join(map(str, own))
        default = _defaults(option, own)
        rows.append([f"`--{name}`", about["help"], about["unit"], default, used])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _defaults(option: dataclasses.Field, own: Mapping[Stage, object]) -> str:
    """The default of most stages, then those that single stages have instead."""
    texts = {stage: _value(default_text(option, value)) for stage, value in own.items()}
    usual = _value(default_text(option, option.default))
    if len(set(texts.values())) == 1:
        return texts.popitem()[1]
    others = [f"{stage}: {text}" for stage, text in texts.items() if text != usual]
    return "; ".join(([usual] if len(others) < len(texts) else []) + others)


def _value(text: str) -> str:
    return "none" if text == "none" else f"`{text}`"


def main(argv=None) -> None:
    OneLineParser(description=__doc__.splitlines()[0]).parse_args(argv)
    path = ROOT / PAGE
    try:
        text = page(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{error.filename} is missing; run this in the checkout") from error
    write_text(path, text)


if __name__ == "__main__":
    run_main(main)
