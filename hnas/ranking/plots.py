"""Figures of the ranking bench, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

DPI = 120
BLUE, ORANGE, GREY, DARK = "#2563a8", "#d9662b", "#8a8f98", "#3c4452"


def methods_plot(
    methods: Mapping[str, Mapping[str, Sequence[float | None]]],
    baselines: Mapping[str, float | None],
    ceiling: float | None,
    where: str,
) -> bytes:
    """Kendall's tau of ways to predict, as PNG: bars of the means, a point for each seed.

    Args:
        methods: for each method and kind of scoring (at most two kinds) the seeds' taus.
        baselines: a single tau each.
        ceiling: drawn as a line.
        where: which architectures, for the axis.
    """
    names = [*methods, *baselines]
    figure = Figure(figsize=(7, 1 + 0.42 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(next(iter(methods.values()), {}))
    height = 0.8 / max(1, len(kinds))
    for kind, (label, color) in enumerate(zip(kinds, (GREY, BLUE), strict=False)):
        rows = np.arange(len(methods)) + (kind + 0.5) * height - 0.4
        seeds = [[tau for tau in own[label] if tau is not None] for own in methods.values()]
        means = [np.mean(taus) if taus else 0 for taus in seeds]
        axes.barh(rows, means, 0.92 * height, color=color, alpha=0.6, label=label)
        for row, taus in zip(rows, seeds, strict=True):
            axes.plot(taus, [row] * len(taus), "o", color=DARK, ms=3.5, zorder=3)
    rows = np.arange(len(methods), len(names))
    axes.barh(rows, [tau or 0 for tau in baselines.values()], 0.5, color=ORANGE, alpha=0.6)
    if ceiling is not None:
        axes.axvline(ceiling, color=DARK, ls="--", lw=1, label="ceiling")
    axes.axvline(0, color=DARK, lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"tau-b with stand-alone accuracies, {where} architectures", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
    return _png(figure)


def front_plot(
    cost: np.ndarray,
    accuracy: np.ndarray,
    chosen: Sequence[Mapping],
    kind: str,
    unit: str,
    budget: float | None,
) -> bytes:
    """All networks [n], those within a budget, their Pareto front and the best's equals, as PNG.

    Bars are a standard error.

    Args:
        accuracy: of all, in percent.
        chosen: those within the budget, as rows with ``acc``, ``se``, ``front``, ``group`` and
            the cost under the name ``kind``.
        unit: of the cost, for the axis.
        budget: drawn as a line; None: no limit.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    scale, million = (1e6, "million ") if cost.max() >= 1e6 else (1, "")
    axes.scatter(cost / scale, accuracy, s=8, color=GREY, alpha=0.4, linewidths=0, label="scored")

    def part(mark: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = sorted((row for row in chosen if row[mark]), key=lambda row: row[kind])
        return tuple(
            factor * np.array([row[name] for row in rows])
            for name, factor in ((kind, 1 / scale), ("acc", 100), ("se", 100))
        )

    x, y, _ = part("group")
    axes.scatter(x, y, s=22, color=ORANGE, linewidths=0, zorder=3, label="not worse than the best")
    x, y, bars = part("front")
    style = {"color": BLUE, "marker": "o", "ms": 3.5, "lw": 1.2, "capsize": 2, "zorder": 4}
    axes.errorbar(x, y, bars, drawstyle="steps-post", label="Pareto front", **style)
    if budget is not None:
        axes.axvline(budget / scale, color=DARK, ls="--", lw=1, label="budget")
    axes.set_xlabel(f"{million}{unit}")
    axes.set_ylabel("top-1 accuracy, %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=8)
    return _png(figure)


def _style(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(useOffset=False, style="plain")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of the library, so that equal figures are equal files.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
