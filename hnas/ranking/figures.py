"""The figures of the report pages, each a few small panels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hnas.ranking.correlations import mean_ranks
from hnas.ranking.svg import Axis, Panel, round_ticks

SMALL = (200, 165)
"""Size of a panel of which a figure has many."""
WIDE = (420, 320)
"""Size of a panel that is a file by itself."""


def scatter_panel(pred: np.ndarray, gt: np.ndarray, pred_label: str, gt_label: str) -> Panel:
    """Predicted against true accuracy [n]."""
    panel = Panel(Axis.around(gt, gt_label), Axis.around(pred, pred_label))
    panel.points(gt, pred)
    return panel


def rank_panel(pred: np.ndarray, gt: np.ndarray, share: float = 0.1) -> Panel:
    """Predicted against true rank of n architectures, 1 for the best.

    Two bands mark what is predicted to be, and what truly is, among the best ``share``.
    """
    count = len(pred)
    true, predicted = (count + 1 - mean_ranks(values) for values in (gt, pred))
    places = [1.0, *(place for place, _ in round_ticks(1, count) if place > 1)]
    ticks = [(place, f"{place:,.0f}") for place in places if place.is_integer()]
    room = max(0.5, 0.03 * count)
    x, y = (
        Axis(1 - room, count + room, ticks, f"{which} rank (1 is the best)")
        for which in ("true", "predicted")
    )
    panel = Panel(x, y)
    edge = count * share + 0.5
    panel.area(x.low, edge, y.low, y.high, "area band")
    panel.area(x.low, x.high, y.low, edge, "area second band")
    panel.points(true, predicted)
    panel.line([1, count], [1, count], "guide")
    return panel


def option_panels(rows: Mapping[str, Sequence[Mapping]], label: str) -> list[Panel]:
    """The mean of something for every option of each choice; see ``by_option``.

    Bars are twice the standard error. An option that a single architecture has is a hollow dot:
    nothing is known of its error.

    Args:
        rows: by the choice's name, see ``DISCRETE``.
        label: of the vertical axis.
    """
    ends = []
    for row in (row for options in rows.values() for row in options):
        bar = 2 * (row["standard_error"] or 0)
        ends += [row["mean"] - bar, row["mean"] + bar]
    # Errors of rounding are none of the values'.
    y = Axis.around(np.round(ends, 9), label, most=4)
    panels = []
    for name, options in rows.items():
        kind, stage = name.rsplit(" ", 1)
        title = "blocks" if kind == "depth" else "% of full width"
        x = Axis.of_options([row["option"] for row in options], title)
        panel = Panel(x, y, f"stage {stage}: {kind}", SMALL)
        if y.low < 0 < y.high:
            panel.line([x.low, x.high], [0, 0], "guide")
        panel.line([row["option"] for row in options], [row["mean"] for row in options])
        for row in options:
            place, mean, error = row["option"], row["mean"], row["standard_error"]
            if error is None:
                panel.ring(place, mean)
            else:
                panel.error(place, mean - 2 * error, mean + 2 * error)
                panel.points([place], [mean])
        panels.append(panel)
    return panels


def distribution_panel(values: np.ndarray, label: str) -> Panel:
    """How many of n values lie where."""
    counts, edges = np.histogram(values, bin_edges(values))
    top = Axis.around(np.array([0, 1.04 * counts.max()]), "architectures", pad=0)
    panel = Panel(Axis.around(edges, label), top)
    panel.area(edges[:-1], edges[1:], np.zeros(len(counts)), counts)
    return panel


def bin_edges(values: np.ndarray) -> np.ndarray:
    """Ends of the bins of a histogram of n values, by the rule of Freedman and Diaconis (1981).

    Accuracies are whole numbers of hits: bins that hold now one, now two of them would show waves
    that are not there. So each holds equally many.
    """
    width = 2 * np.ptp(np.percentile(values, [25, 75])) / len(values) ** (1 / 3)
    width = max(width or np.ptp(values) / 10, np.ptp(values) / 60, 1e-9)
    step = np.diff(np.unique(values)).min(initial=np.inf)
    if step > width / 20:
        width = math.ceil(width / step - 1e-9) * step if np.isfinite(step) else 1.0
        first = values.min() - (step if np.isfinite(step) else 1.0) / 2
    else:
        first = values.min()
    bins = max(1, math.ceil((values.max() - first) / width + 1e-9))
    return first + width * np.arange(bins + 1)


def front_panel(
    cost: np.ndarray, accuracy: np.ndarray, front: np.ndarray, labels: tuple[str, str]
) -> Panel:
    """Accuracy against cost [n], and the best accuracy up to each cost.

    Args:
        cost, accuracy: of all architectures.
        front: indices of those that none beats at no more cost, by rising cost.
        labels: of the axes, horizontal and vertical.
    """
    panel = Panel(Axis.around(cost, labels[0]), Axis.around(accuracy, labels[1]))
    panel.points(cost, accuracy)
    panel.steps(cost[front], accuracy[front], "second")
    panel.points(cost[front], accuracy[front], "marks second")
    return panel


def choice_panel(
    cost: np.ndarray,
    accuracy: np.ndarray,
    chosen: Sequence[Mapping],
    kind: str,
    label: str,
    budget: float | None,
) -> Panel:
    """All networks [n]; of those within a budget the best's equals and the Pareto front.

    Args:
        accuracy: of all, in percent.
        chosen: those within the budget, as rows with ``acc``, ``se``, ``front``, ``group`` and
            the cost under the name ``kind``.
        label: of the cost's axis.
        budget: drawn as a line; None: no limit.
    """
    scale, million = (1e6, "million ") if cost.max() >= 1e6 else (1, "")
    by_cost = sorted(chosen, key=lambda row: row[kind])

    def part(mark: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = [row for row in by_cost if row[mark]]
        factors = ((kind, 1 / scale), ("acc", 100), ("se", 100))
        return tuple(factor * np.array([row[name] for row in rows]) for name, factor in factors)

    x, y, bars = part("front")
    heights = np.concatenate([accuracy, y - bars, y + bars])
    ends = cost if budget is None else np.append(cost, budget)
    panel = Panel(
        Axis.around(ends / scale, f"{million}{label}"),
        Axis.around(heights, "top-1 accuracy, %"),
        "orange: not worse than the best; line: Pareto front",
        WIDE,
    )
    panel.points(cost / scale, accuracy)
    group_x, group_y, _ = part("group")
    panel.points(group_x, group_y, "dots second")
    panel.steps(x, y)
    panel.points(x, y, "marks")
    for place, middle, bar in zip(x, y, bars, strict=True):
        panel.error(place, middle - bar, middle + bar)
    if budget is not None:
        panel.line([budget / scale] * 2, [panel.y.low, panel.y.high], "guide")
    return panel
