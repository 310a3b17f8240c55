"""The two pages of ``hnas.tools.rank_report``: predictions against a truth, and scores alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from hnas.ranking.page import (
    document,
    effects_table,
    figure,
    heading,
    note,
    number,
    options_tables,
    table,
    with_error,
)
from hnas.ranking.svg import Panel

NAMES = {"kendall_tau_b": "Kendall's tau-b", "spearman": "Spearman", "abs_pearson": "|Pearson|"}
EFFECT = (
    "effect of going from its smallest to its largest value, the others being equal (least "
    "squares; ± the standard error). p: how likely such an effect would be by chance, corrected "
    "for having looked at all choices (Holm)."
)


def ranking_page(report: Mapping, panels: Mapping[str, Sequence[Panel]]) -> str:
    """How well predictions rank, as HTML.

    Args:
        report: see ``report.json``.
        panels: by figure: scatter, ranks, breakdown.
    """
    title = f"Ranking report: {report['pred']}"
    about = f"against {report['gt']}, {report['architectures']:,} architectures"
    parts = [
        *heading(title, about, report),
        "<h2>Agreement with the truth</h2>",
        f'<div class="row"><div>{_correlations(report)}</div><div>{_top_k(report)}</div></div>',
        '<div class="row">',
        figure(panels["scatter"], "Predicted against true accuracy; darker: more architectures."),
        figure(
            panels["ranks"],
            "Predicted against true rank; dashed: the perfect ranking. Orange band: predicted to "
            "be among the best 10 %; blue band: truly among them.",
        ),
        "</div>",
        "<h2>Which depth or width the errors come from</h2>",
        note(
            "The rank error of an architecture is its predicted less its true rank, in percent of "
            "the number of architectures: positive where it is ranked too high. A prediction that "
            "follows a choice too little shows a falling line, one that follows it too much a "
            "rising one."
        ),
        figure(
            panels["breakdown"],
            "Mean rank error by option, in percent; bars are two standard errors, a hollow dot is "
            "a single architecture.",
        ),
        effects_table(report["attribution"], 1),
        note(
            "Correlation of the rank error with each choice alone; " + EFFECT + " Positive: "
            "overrated. " + _explained(report["attribution"]["explained"], "the errors'")
        ),
        "<h2>Rank error by option</h2>",
        options_tables(report["by_option"], 1, absolute=True),
        note("Rank errors in percent."),
        "<h2>Matching</h2>",
        _matching(report),
    ]
    return document(title, parts)


def scores_page(report: Mapping, panels: Mapping[str, Sequence[Panel]]) -> str:
    """What scores say without a truth, as HTML.

    Args:
        report: see ``report.json``.
        panels: by figure: distribution, front, influence.
    """
    title = f"Scores: {report['pred']}"
    about = (
        f"{report['architectures']:,} architectures; MACs and parameters of {report['backbone']} "
        f"at {report['image_size']} px with {report['num_classes']:,} classes. How well the scores "
        "rank needs a ground truth (--gt)."
    )
    parts = [
        *heading(title, about, report),
        "<h2>Scores and cost</h2>",
        '<div class="row">',
        figure(panels["distribution"], "How many architectures score what."),
        *(
            figure(
                [panel],
                "Orange: the Pareto front, the best score up to each cost; darker: more "
                "architectures.",
            )
            for panel in panels["front"]
        ),
        "</div>",
        "<h2>The best within a budget</h2>",
        _budgets(report),
        "<h2>What depths and widths do</h2>",
        figure(
            panels["influence"],
            "Mean score by option, in percent; bars are two standard errors, a hollow dot is a "
            "single architecture.",
        ),
        effects_table(report["attribution"], 2),
        note(
            "Correlation of the score with each choice alone; in percentage points the "
            + EFFECT
            + " "
            + _explained(report["attribution"]["explained"], "the scores'")
        ),
        "<h2>The best scores</h2>",
        table(COLUMNS, [_row(row) for row in report["best"]], code_column=4),
        note("The best of many is always partly lucky: look at the standard errors."),
    ]
    return document(title, parts)


COLUMNS = ("name", "score, %", "MACs, million", "parameters, million", "code")


def _row(row: Mapping) -> tuple[str, ...]:
    return (
        row["name"],
        with_error(number(row["accuracy"], 2), row["standard_error"], 2),
        _millions(row["macs"]),
        _millions(row["params"]),
        row["arch"],
    )


def _millions(value: float) -> str:
    """At least three significant digits, without a unit."""
    millions = value / 1e6
    return number(millions, 0 if millions >= 100 else 1 if millions >= 10 else 2)


def _budgets(report: Mapping) -> str:
    rows = [(_millions(budget["macs"]), *_row(budget["best"])) for budget in report["budgets"]]
    return table(("MACs up to, million", *COLUMNS), rows, code_column=5)


def _explained(share: float | None, whose: str) -> str:
    if share is None:
        return f"There are too few architectures to say which share of {whose} variance that is."
    return f"Together the choices explain {100 * share:.0f} % of {whose} variance (adjusted R²)."


def _correlations(report: Mapping) -> str:
    rows = [
        (NAMES[name], number(found["value"]), _interval(found))
        for name, found in report["correlations"].items()
    ]
    text = (
        f"95 % interval: percentile bootstrap over architectures, {report['resamples']:,} "
        f"resamples, seed {report['seed']}."
    )
    return table(("correlation", "value", "95 % interval"), rows) + note(text)


def _interval(found: Mapping) -> str:
    if found["low"] is None:
        return "–"
    return f"{number(found['low'])} to {number(found['high'])}"


def _top_k(report: Mapping) -> str:
    rows = [
        (f"{row['k']:,}", f"{number(row['regret'], 2)}", f"{100 * row['precision']:.1f} %")
        for row in report["top_k"]
    ]
    text = (
        "Regret: the best true accuracy less the best among the k predicted best, in percentage "
        "points. Precision: share of these k that are truly among the best k."
    )
    return table(("k", "regret", "precision"), rows) + note(text)


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
    return f"<p>{escape(text)}</p>" + table(("", "number", "first codes"), rows, code_column=2)
