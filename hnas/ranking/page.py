"""A report as one HTML page that needs nothing else: no scripts, no other files, any width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from hnas.ranking.figures import COLOURS, MINUS, Panel

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
.codes th:last-child, .codes td:last-child {{ text-align: left; }}
.codes td:last-child {{ font-family: ui-monospace, monospace; font-size: .82rem; }}
.row {{ display: grid; gap: 0 2rem;
       grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }}
.many {{ display: grid; gap: .5rem; grid-template-columns: repeat(2, 1fr); }}
@media (min-width: 45rem) {{ .many {{ grid-template-columns: repeat(4, 1fr); }} }}
.row > *, .many > * {{ min-width: 0; }}
.wide {{ overflow-x: auto; }}
figure {{ margin: .5rem 0; }}
.plot {{ display: block; width: 100%; max-width: 27rem; height: auto; }}"""


NAMES = {"kendall_tau_b": "Kendall's tau-b", "spearman": "Spearman"}
NAMES |= {"pearson": "Pearson", "abs_pearson": "|Pearson|, without its sign"}
FRONT = "Orange: the Pareto front, the best score up to each cost; darker: more architectures."
BARS = "bars are two standard errors, a hollow dot is a single architecture."


def ranking_page(report: Mapping, scatter: Panel, breakdown: Sequence[Panel]) -> str:
    """How well predictions rank, as HTML; ``report`` as in ``report.json``."""
    return _document(
        f"Ranking report: {report['pred']}",
        f"against {report['gt']}, {report['architectures']:,} architectures",
        report,
        [
            "<h2>Agreement with the truth</h2>",
            f'<div class="row"><div>{_correlations(report)}</div><div>{_top_k(report)}</div></div>',
            _figure([scatter], "Predicted against true accuracy; darker: more architectures."),
            "<h2>Which depth or width the errors come from</h2>",
            _note(
                "The rank error of an architecture is its predicted less its true rank, in percent "
                "of the number of architectures: positive where it is ranked too high. A "
                "prediction that follows a choice too little shows a falling line, one that "
                "follows it too much a rising one."
            ),
            _figure(breakdown, f"Mean rank error by option, in percent; {BARS}"),
            _effects(report["attribution"], "rank error", 1),
            _note("Positive: overrated."),
        ],
    )


def scores_page(report: Mapping, fronts: Sequence[Panel], influence: Sequence[Panel]) -> str:
    """What scores say without a truth, as HTML; ``report`` as in ``report.json``."""
    columns = ("name", "score, %", "MACs, million", "parameters, million", "code")
    best = [_scored(row) for row in report["best"]]
    within = [(_number(row["macs"] / 1e6, 2), *_scored(row["best"])) for row in report["budgets"]]
    return _document(
        f"Scores: {report['pred']}",
        f"{report['architectures']:,} architectures; MACs and parameters of {report['backbone']} "
        f"at {report['image_size']} px with {report['num_classes']:,} classes. How well the scores "
        "rank needs a ground truth (--gt).",
        report,
        [
            "<h2>Scores and cost</h2>",
            f'<div class="row">{"".join(_figure([panel], FRONT) for panel in fronts)}</div>',
            "<h2>The best within a budget</h2>",
            _table(("MACs up to, million", *columns), within),
            "<h2>What depths and widths do</h2>",
            _figure(influence, f"Mean score by option, in percent; {BARS}"),
            _effects(report["attribution"], "score", 2),
            "<h2>The best scores</h2>",
            _table(columns, best),
            _note("The best of many is always partly lucky: look at the standard errors."),
        ],
    )


def _scored(row: Mapping) -> tuple[str, ...]:
    """An architecture's cells in a table."""
    score = _with_error(_number(row["accuracy"], 2), row["standard_error"], 2)
    costs = (_number(row[kind] / 1e6, 2) for kind in ("macs", "params"))
    return row["name"], score, *costs, row["arch"]


def _document(title: str, about: str, report: Mapping, parts: Iterable[str]) -> str:
    """A whole page: ``about`` what it is, what it says, what to know first, and HTML parts."""
    told = [
        f"<h1>{escape(title)}</h1>",
        _note(about),
        *(f'<p class="lead">{escape(line)}</p>' for line in report["interpretation"]),
        *(f'<p class="warning">{escape(line)}</p>' for line in report["notes"]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join([*told, *parts])
        + "\n</body>\n</html>\n"
    )


def _number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A number; a dash for None."""
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}".replace("-", MINUS)


def _with_error(value: str, error: float | None, digits: int) -> str:
    """A number with its standard error, if that is known."""
    return value if error is None else f"{value} ± {_number(error, digits)}"


def _effects(attribution: Mapping, what: str, digits: int) -> str:
    """What each choice does to ``what``, see ``attribute``; effects with so many decimals."""
    rows = []
    for name, row in attribution["choices"].items():
        kind, stage = name.rsplit(" ", 1)
        effect = _with_error(_number(row["effect"], digits, "+"), row["standard_error"], digits)
        p_value = row["p_value"]
        clear = p_value is not None and p_value < 0.001
        rows.append(
            (
                f"stage {stage}: {kind}",
                _number(row["correlation"], 2, "+"),
                effect,
                "< 0.001" if clear else _number(p_value),
            )
        )
    share = attribution["explained"]
    together = (
        "There are too few architectures to say which share of the variance that is."
        if share is None
        else f"Together the choices explain {100 * share:.0f} % of the variance (adjusted R²)."
    )
    return _table(("choice", "correlation", "effect", "p"), rows) + _note(
        f"Correlation of the {what} with each choice alone; effect, in percentage points, of going "
        "from its smallest to its largest value, the others being equal (least squares; ± the "
        "standard error). p: how likely such an effect would be by chance, corrected for having "
        f"looked at all choices (Holm). {together}"
    )


def _correlations(report: Mapping) -> str:
    rows = []
    for name, found in report["correlations"].items():
        known = found["low"] is not None
        interval = f"{_number(found['low'])} to {_number(found['high'])}" if known else "–"
        rows.append((NAMES[name], _number(found["value"]), interval))
    return _table(("correlation", "value", "95 % interval"), rows) + _note(
        f"95 % interval: percentile bootstrap over architectures, {report['resamples']:,} "
        f"resamples, seed {report['seed']}."
    )


def _top_k(report: Mapping) -> str:
    rows = [
        (f"{row['k']:,}", _number(row["regret"], 2), f"{100 * row['precision']:.1f} %")
        for row in report["top_k"]
    ]
    return _table(("k", "regret", "precision"), rows) + _note(
        "Regret: the best true accuracy less the best among the k predicted best, in percentage "
        "points. Precision: share of these k that are truly among the best k."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""

    def line(tag: str, row: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"

    lines = [line("th", head), *(line("td", row) for row in rows)]
    kind = ' class="codes"' if head[-1] == "code" else ""
    return f'<div class="wide"><table{kind}>{"".join(lines)}</table></div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _figure(panels: Sequence[Panel], caption: str) -> str:
    drawn = "".join(f"<div>{panel.svg()}</div>" for panel in panels)
    kind = f'<div class="many">{drawn}</div>' if len(panels) > 1 else drawn
    return f"<figure>{kind}<figcaption>{escape(caption)}</figcaption></figure>"
