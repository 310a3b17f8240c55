"""Figures of the ranking bench, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

DPI = 120
BLUE, ORANGE, GREY, DARK = "#2563a8", "#d9662b", "#8a8f98", "#3c4452"


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


def curves_plot(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    best: float | None,
    across: str,
    label: str,
) -> bytes:
    """The values of single runs over what was varied, with lines through their means, as PNG.

    Args:
        curves: by title, by the place on a logarithmic axis, the values.
        best: what the truth itself would be expected to reach, drawn as a line.
        across: label of the horizontal axis.
        label: of the vertical axis.
    """
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for color, (title, curve) in zip((ORANGE, BLUE, GREY), curves.items(), strict=False):
        places = sorted(curve)
        means = [float(np.mean(curve[place])) for place in places]
        axes.plot(places, means, "-", color=color, lw=1.5, label=title)
        for place in places:
            axes.plot([place] * len(curve[place]), curve[place], "o", color=color, ms=4)
    if best is not None:
        axes.axhline(best, color=DARK, ls=":", lw=1, label="the true order itself")
    axes.set_xscale("log", base=2)
    shown = sorted({place for curve in curves.values() for place in curve})
    axes.set_xticks(shown, [f"{place:g}" for place in shown])
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of the library, so that equal figures are equal files.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
