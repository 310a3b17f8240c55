"""A report as one HTML page that needs nothing else: no scripts, no other files, any width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from hnas.ranking.breakdown import PERCENT_OF_DIGIT
from hnas.ranking.svg import COLOURS, MINUS, PLOTS, Panel

STYLE = f"""{COLOURS}
html {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .8rem;
     border-top: 1px solid var(--line); }}
p {{ overflow-wrap: anywhere; }}
p.lead {{ font-size: 1.05rem; margin: .6rem 0; }}
p.note, figcaption {{ color: var(--muted); font-size: .88rem; }}
p.warning {{ background: var(--warning); border-left: 4px solid var(--orange);
            padding: .5rem .8rem; }}
table {{ border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; color: var(--muted); }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; white-space: nowrap; }}
td {{ white-space: nowrap; }}
.code {{ text-align: left; }}
td.code {{ font-family: ui-monospace, monospace; font-size: .82rem; }}
.row {{ display: grid; gap: 0 2rem;
       grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }}
.many {{ display: grid; gap: .5rem; grid-template-columns: repeat(2, 1fr); }}
@media (min-width: 45rem) {{ .many {{ grid-template-columns: repeat(4, 1fr); }} }}
.tables {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }}
.row > *, .many > * {{ min-width: 0; }}
.wide {{ overflow-x: auto; }}
figure {{ margin: .5rem 0; }}
{PLOTS}"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page; ``parts`` is HTML, the title is not."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def heading(title: str, about: str, report: Mapping) -> list[str]:
    """The title, a line of what it is about, and what a reader must know first."""
    return [
        f"<h1>{escape(title)}</h1>",
        note(about),
        *(f'<p class="lead">{escape(line)}</p>' for line in report["interpretation"]),
        *(f'<p class="warning">{escape(line)}</p>' for line in report["notes"]),
    ]


def signed(value: float | None, digits: int = 1) -> str:
    """A number with its sign; a dash for None."""
    return number(value, digits, "+")


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A number; a dash for None."""
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}".replace("-", MINUS)


def option_label(choice: str, option: float) -> str:
    """An option as people say it: blocks of a depth, percent and digit of a width."""
    if choice.startswith("depth"):
        return f"{option:g} blocks"
    return f"{option:g} % (digit {PERCENT_OF_DIGIT.index(option) + 1})"


def choice_name(name: str) -> str:
    """A choice as people say it, e.g. ``stage 1: depth``."""
    kind, stage = name.rsplit(" ", 1)
    return f"stage {stage}: {kind}"


def effects_table(attribution: Mapping, digits: int) -> str:
    """What each choice does, see ``Attribution.record``; effects with so many decimals."""
    rows = [
        (
            choice_name(name),
            signed(row["correlation"], 2),
            with_error(signed(row["effect"], digits), row["standard_error"], digits),
            "–" if row["p_value"] is None else p_text(row["p_value"]),
        )
        for name, row in attribution["choices"].items()
    ]
    return table(("choice", "correlation", "effect", "p"), rows)


def with_error(value: str, error: float | None, digits: int) -> str:
    """A number with its standard error, if that is known."""
    return value if error is None else f"{value} ± {number(error, digits)}"


def p_text(p_value: float) -> str:
    """A p-value to three decimals."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def options_tables(by_option: Mapping, digits: int, absolute: bool) -> str:
    """A table for each choice: how many architectures, their mean, and absolute mean if asked."""
    tables = []
    for name, rows in by_option.items():
        head = [choice_name(name), "number", "mean", *(["mean absolute"] if absolute else [])]
        cells = [
            [
                option_label(name, row["option"]),
                f"{row['architectures']:,}",
                signed(row["mean"], digits) if absolute else number(row["mean"], digits),
                *([number(row["mean_absolute"], digits)] if absolute else []),
            ]
            for row in rows
        ]
        tables.append(f"<div>{table(head, cells)}</div>")
    return f'<div class="row tables">{"".join(tables)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], code_column: int = -1) -> str:
    """A table; a column of codes is in type of equal widths."""

    def line(tag: str, row: Sequence[str]) -> str:
        cells = (
            f"<{tag}{' class=code' if column == code_column else ''}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line("th", head), *(line("td", row) for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def figure(panels: Sequence[Panel], caption: str) -> str:
    """Panels beside each other as far as there is room, with a caption."""
    drawn = "".join(f"<div>{panel.svg()}</div>" for panel in panels)
    kind = f'<div class="many">{drawn}</div>' if len(panels) > 1 else drawn
    return f"<figure>{kind}<figcaption>{escape(caption)}</figcaption></figure>"
