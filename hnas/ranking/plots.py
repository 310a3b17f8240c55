"""Figures of a ranking report, drawn without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from hnas.ranking.correlations import mean_ranks

DPI = 120
BLUE, ORANGE, GREY, DARK = "#2563a8", "#d9662b", "#8a8f98", "#3c4452"
DENSE = 3000
"""More points than this overlap so much that their density is shown instead."""


def scatter_plot(pred: np.ndarray, gt: np.ndarray, pred_label: str, gt_label: str) -> bytes:
    """Predicted against true accuracy [n], as PNG."""
    figure, axes = _square()
    _points(figure, axes, gt, pred)
    axes.set_xlabel(gt_label)
    axes.set_ylabel(pred_label)
    return _png(figure)


def rank_plot(pred: np.ndarray, gt: np.ndarray, share: float = 0.1) -> bytes:
    """Predicted against true rank of n architectures, 1 for the best, as PNG.

    Two bands mark what is predicted to be, and what truly is, among the best ``share``.
    """
    count = len(pred)
    true, predicted = (count + 1 - mean_ranks(values) for values in (gt, pred))
    figure, axes = _square()
    edge = count * share + 0.5
    bands = (
        (axes.axhspan, axes.axhline, ORANGE, "predicted"),
        (axes.axvspan, axes.axvline, BLUE, "truly"),
    )
    for fill, line, color, what in bands:
        fill(0.5, edge, color=color, alpha=0.12, lw=0, label=f"{what} best {share:.0%}")
        line(edge, color=color, lw=1, zorder=4)
    axes.plot([1, count], [1, count], color=DARK, lw=1, ls="--", zorder=4, label="perfect ranking")
    _points(figure, axes, true, predicted)
    axes.set_xlim(0.5, count + 0.5)
    axes.set_ylim(0.5, count + 0.5)
    axes.set_aspect("equal")
    axes.set_xlabel("true rank (1 is the best)")
    axes.set_ylabel("predicted rank (1 is the best)")
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=3,
        frameon=False,
        fontsize=8,
        columnspacing=1,
    )
    return _png(figure)


def breakdown_plot(rows: Mapping[str, Sequence[Mapping]]) -> bytes:
    """Mean rank error of every option of the choices (see ``by_option``), a panel each, as PNG.

    Bars are twice the standard error.
    """
    columns = 4
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(9, 0.6 + 2.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, (name, options) in zip(panels.flat, rows.items(), strict=False):
        axes.axhline(0, color=GREY, lw=1)
        axes.errorbar(
            [row["option"] for row in options],
            [row["mean_error"] for row in options],
            [2 * (row["standard_error"] or 0) for row in options],
            color=BLUE,
            marker="o",
            ms=4,
            lw=1.2,
            capsize=2,
        )
        axes.set_xticks([row["option"] for row in options])
        kind, stage = name.rsplit(" ", 1)
        axes.set_title(f"stage {stage}: {kind}", fontsize=9)
        axes.set_xlabel("blocks" if kind == "depth" else "% of full width", fontsize=8)
        _style(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel("rank error, %", fontsize=8)
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    return _png(figure)


class Bar(NamedTuple):
    """A way to predict.

    Attributes:
        title: its name.
        value, low, high: its estimate and the ends of the interval, or None.
        seeds: the values of single runs.
        marked: whether it stands out.
    """

    title: str
    value: float | None
    low: float | None
    high: float | None
    seeds: Sequence[float | None]
    marked: bool


def estimates_plot(bars: Sequence[Bar], best: float | None, label: str) -> bytes:
    """Estimates with their intervals and the values of single runs, as PNG.

    Args:
        bars: one a row, from above.
        best: what the truth itself would be expected to reach, drawn as a line.
        label: of the axis.
    """
    figure = Figure(figsize=(7, 1.1 + 0.3 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    for row, bar in enumerate(bars):
        color = ORANGE if bar.marked else BLUE
        seeds = [value for value in bar.seeds if value is not None]
        axes.plot(seeds, [row + 0.25] * len(seeds), "o", color=GREY, ms=3, alpha=0.7)
        if bar.low is not None:
            axes.plot([bar.low, bar.high], [row, row], color=color, lw=2)
        if bar.value is not None:
            axes.plot([bar.value], [row], "D", color=color, ms=5, zorder=3)
    if best is not None:
        axes.axvline(best, color=DARK, ls=":", lw=1)
        axes.annotate(
            "the true order itself\n(expected; the truth is noisy)",
            (best, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
        )
    axes.axvline(0, color=DARK, lw=0.8)
    axes.set_yticks(range(len(bars)), [bar.title for bar in bars])
    axes.invert_yaxis()
    axes.set_xlabel(f"{label}\nestimate, 95 % interval; grey: single supernets", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return _png(figure)


def _square() -> tuple[Figure, object]:
    figure = Figure(figsize=(5.4, 5), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(useOffset=False, style="plain")


def _points(figure: Figure, axes, x: np.ndarray, y: np.ndarray) -> None:
    if len(x) > DENSE:
        cells = axes.hexbin(x, y, gridsize=60, bins="log", mincnt=1, cmap="Blues", linewidths=0.1)
        bar = figure.colorbar(cells, ax=axes, shrink=0.7, format="%d")
        bar.set_label("architectures in a cell", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    else:
        size, alpha = (22, 0.75) if len(x) <= 300 else (8, 0.45)
        axes.scatter(x, y, s=size, alpha=alpha, color=BLUE, linewidths=0, zorder=3)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of the library, so that equal figures are equal files.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
