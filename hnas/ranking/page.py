"""A ranking report as one HTML page that needs nothing else: no scripts, no other files."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from hnas.ranking.breakdown import PERCENT_OF_DIGIT

NAMES = {"kendall_tau_b": "Kendall's tau-b", "spearman": "Spearman", "abs_pearson": "|Pearson|"}
MINUS = "\N{MINUS SIGN}"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2330; background: #fff;
       max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .8rem;
     border-top: 1px solid #dde1e7; }
p.lead { font-size: 1.05rem; margin: .6rem 0; }
p.note, figcaption, small { color: #5a6270; font-size: .88rem; }
p.warning { background: #fff4e5; border-left: 4px solid #d9662b; padding: .5rem .8rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e6e9ee; }
th { font-weight: 600; color: #3c4452; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.code { font-family: ui-monospace, monospace; font-size: .82rem; text-align: left; }
.row { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.row > div { flex: 1 1 18rem; }
.wide { overflow-x: auto; }
figure { margin: .5rem 0; flex: 1 1 26rem; }
img { max-width: 100%; height: auto; }
"""


def page(report: Mapping, plots: Mapping[str, bytes]) -> str:
    """The report of ``hnas.tools.rank_report`` as HTML.

    Args:
        report: see ``report.json``.
        plots: PNG files by name: scatter, ranks, breakdown.
    """
    title = f"Ranking report: {report['pred']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">against {escape(report["gt"])}, {report["architectures"]:,} '
        "architectures</p>",
        *(f'<p class="lead">{escape(line)}</p>' for line in report["interpretation"]),
        *(f'<p class="warning">{escape(line)}</p>' for line in report["notes"]),
        "<h2>Agreement with the truth</h2>",
        '<div class="row"><div>' + _correlations(report) + "</div><div>" + _top_k(report),
        "</div></div>",
        '<div class="row">',
        _figure(plots["scatter"], "Predicted against true accuracy."),
        _figure(plots["ranks"], "Predicted against true rank. Points in both bands are found."),
        "</div>",
        "<h2>Which depth or width the errors come from</h2>",
        '<p class="note">The rank error of an architecture is its predicted less its true rank, in '
        "percent of the number of architectures: positive where it is ranked too high. A "
        "prediction that follows a choice too little shows a falling line, one that follows it "
        "too much a rising one.</p>",
        _figure(plots["breakdown"], "Mean rank error by option; bars are two standard errors."),
        _effects(report),
        "<h2>Rank error by option</h2>",
        _options(report),
        "<h2>Matching</h2>",
        _matching(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def signed(value: float | None, digits: int = 1) -> str:
    """A number with its sign; a dash for None."""
    return number(value, digits, "+")


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A number; a dash for None."""
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", MINUS)


def option_label(choice: str, option: float) -> str:
    """An option as people say it: blocks of a depth, percent and digit of a width."""
    if choice.startswith("depth"):
        return f"{option:g} blocks"
    return f"{option:g} % (digit {PERCENT_OF_DIGIT.index(option) + 1})"


def _correlations(report: Mapping) -> str:
    rows = [
        (NAMES[name], number(found["value"]), _interval(found))
        for name, found in report["correlations"].items()
    ]
    note = (
        f"95 % interval: percentile bootstrap over architectures, {report['resamples']:,} "
        f"resamples, seed {report['seed']}."
    )
    return _table(("correlation", "value", "95 % interval"), rows) + _note(note)


def _interval(found: Mapping) -> str:
    if found["low"] is None:
        return "–"
    return f"{number(found['low'])} to {number(found['high'])}"


def _top_k(report: Mapping) -> str:
    rows = [
        (f"{row['k']:,}", f"{number(row['regret'], 2)}", f"{100 * row['precision']:.1f} %")
        for row in report["top_k"]
    ]
    note = (
        "Regret: the best true accuracy less the best among the k predicted best, in percentage "
        "points. Precision: share of these k that are truly among the best k."
    )
    return _table(("k", "regret", "precision"), rows) + _note(note)


def _effects(report: Mapping) -> str:
    attribution = report["attribution"]
    rows = [
        (
            _choice_name(name),
            number(row["correlation"], 2, "+"),
            signed(row["effect"]),
            "–" if row["standard_error"] is None else f"± {number(row['standard_error'], 1)}",
        )
        for name, row in attribution["choices"].items()
    ]
    explained = attribution["explained"]
    share = (
        "There are too few architectures to say which share of the errors that explains."
        if explained is None
        else f"Together the choices explain {100 * explained:.0f} % of the errors' variance "
        "(adjusted R²)."
    )
    note = (
        "Correlation of the rank error with each choice alone; effect on the rank error, in "
        "percent of the ranks, of going from its smallest to its largest value, the others "
        f"being equal (least squares, with standard errors). Positive: overrated. {share}"
    )
    return _table(("choice", "correlation", "effect", "standard error"), rows) + _note(note)


def _choice_name(name: str) -> str:
    kind, stage = name.rsplit(" ", 1)
    return f"stage {stage}: {kind}"


def _options(report: Mapping) -> str:
    tables = []
    for name, rows in report["by_option"].items():
        cells = [
            (
                option_label(name, row["option"]),
                f"{row['architectures']:,}",
                signed(row["mean_error"]),
                number(row["mean_absolute_error"], 1),
            )
            for row in rows
        ]
        head = (_choice_name(name), "number", "mean", "mean absolute")
        tables.append(f"<div>{_table(head, cells)}</div>")
    return f'<div class="row">{"".join(tables)}</div>' + _note("Rank errors in percent.")


def _matching(report: Mapping) -> str:
    text = (
        f"{report['architectures']:,} architectures are in both files; codes of 51 and 52 digits "
        "are the same where they differ in the image size digit only."
    )
    rows = [
        (f"only in {source}", f"{found['count']:,}", code)
        for source, found in report["unmatched"].items()
        for code in (found["codes"] or ["–"])
    ]
    return f"<p>{escape(text)}</p>" + _table(("", "number", "first codes"), rows, code_column=2)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], code_column: int = -1) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        cells = "".join(
            f"<td{' class=code' if column == code_column else ''}>{escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
