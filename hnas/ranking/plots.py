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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of the library, so that equal figures are equal files.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
