"""A report as one HTML page that needs nothing else: no scripts, no other files, any width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from hnas.ranking.figures import COLOURS, MINUS, Panel
from hnas.ranking.findings import COUNTED

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
.wide {{ overflow-x: auto; max-width: 100%; scrollbar-width: thin; }}
.wide:focus-visible {{ outline: 2px solid var(--blue); }}
pre {{ margin: .6rem 0; font-size: .82rem; }}
figure {{ margin: .5rem 0; }}
.plot {{ display: block; width: 100%; max-width: 27rem; height: auto; }}"""


NAMES = {"kendall_tau_b": "Kendall's tau-b", "pearson": "Pearson"}


def ranking_page(report: Mapping, scatter: Panel) -> str:
    """How well predictions rank, as HTML; ``report`` as in ``report.json``."""
    return _document(
        f"{report['run']}: ranking against {report['gt']}",
        f"{report['pred']}, {report['architectures']:,} architectures",
        report,
        [
            "<h2>Agreement with the truth</h2>",
            _correlations(report),
            _figure(scatter, "Predicted against true score; darker: more architectures."),
            "<h2>Which depth or width the errors come from</h2>",
            _note(
                "The rank error of an architecture is its predicted less its true rank, in percent "
                "of the number of architectures: positive where it is ranked too high. A positive "
                "effect: a larger choice is overrated."
            ),
            _effects(report["attribution"], "rank error", 1),
        ],
    )


def scores_page(report: Mapping, front: Panel) -> str:
    """What scores say without a truth, as HTML; ``report`` as in ``report.json``."""
    columns = ("name", "score, %", "as good", "MACs, million", "parameters, million", "code")
    return _document(
        f"{report['run']}: scores",
        f"{report['pred']}; MACs and parameters of {report['backbone']} "
        f"at {report['image_size']} px with {report['num_classes']:,} classes. How well the scores "
        "rank needs a ground truth (--gt).",
        report,
        [
            "<h2>Scores and cost</h2>",
            _figure(front, "Orange: the Pareto front, the best up to each cost; darker: more."),
            "<h2>The best within a budget</h2>",
            _table(columns, map(_scored, report["budgets"])),
            _note("Each is the best of all that have no more MACs. =: as good as the best of all."),
            "<h2>What depths and widths do</h2>",
            _effects(report["attribution"], "score", 2),
            "<h2>The best scores</h2>",
            _table(columns, map(_scored, report["best"])),
            _note("The best of many is always partly lucky: look at the standard errors."),
            "<h2>Next</h2>",
            _note("Choose, export, train alone; SUPERNET and IMAGES stand for files of yours."),
            _wide(f"<pre>{escape(chr(10).join(report['next']))}</pre>"),
        ],
    )


def _scored(row: Mapping) -> tuple[str, ...]:
    """An architecture's cells in a table."""
    score = _with_error(_number(row["accuracy"], 2), row["standard_error"], 2)
    costs = (_number(row[kind] / 1e6, 2) for kind in ("macs", "params"))
    return row["name"], score, "=" if row["group"] else "", *costs, row["arch"]


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
        clear = row["p_value"] is not None and row["p_value"] < 0.001
        p_value = "< 0.001" if clear else _number(row["p_value"])
        rows.append((f"stage {stage}: {kind}", effect, p_value))
    share = attribution["explained"]
    told = (
        "too few architectures to tell" if share is None else f"{100 * share:.0f} % (adjusted R²)"
    )
    return _table(("choice", "effect", "p"), rows) + _note(
        f"Effect on the {what}, in percentage points, of going from a choice's smallest to its "
        "largest value, the others being equal (least squares; ± the standard error). p: how "
        "likely such an effect would be by chance, corrected for having looked at all choices "
        f"(Holm). Share of the variance that all choices explain: {told}."
    )


def _correlations(report: Mapping) -> str:
    rows = []
    for name, found in report["correlations"].items():
        known = found["low"] is not None
        interval = f"{_number(found['low'])} to {_number(found['high'])}" if known else "–"
        rows.append((NAMES[name], _number(found["value"]), interval))
    for name, tau in report["tau_of_counts"].items():
        rows.append((f"tau-b of {COUNTED[name]}, untrained", _number(tau), ""))
    return _table(("correlation", "value", "95 % interval"), rows) + _note(
        f"95 % interval: percentile bootstrap over architectures, {report['resamples']:,} "
        f"resamples, seed {report['seed']}."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""

    def line(tag: str, row: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"

    lines = [line("th", head), *(line("td", row) for row in rows)]
    kind = ' class="codes"' if head[-1] == "code" else ""
    return _wide(f"<table{kind}>{''.join(lines)}</table>")


def _wide(content: str) -> str:
    """What may be wider than a phone: it scrolls in a box of its own, by keys as well."""
    return f'<div class="wide" role="group" tabindex="0">{content}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _figure(panel: Panel, caption: str) -> str:
    return f"<figure>{panel.svg()}<figcaption>{escape(caption)}</figcaption></figure>"
