"""What choices of depth and width do to a value of architectures, such as an accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtr

from hnas.ranking.correlations import none_if_nan
from hnas.search_space import RATIOS, Architecture

STAGES = range(4)
LEVEL = 0.05
"""Of the test of an effect, for all choices together."""


def choices(archs: Sequence[Architecture]) -> dict[str, np.ndarray]:
    """What distinguishes ``archs``, by name, each [n] and larger for a larger network.

    For each stage its depth (blocks), its output width and the mean inner width of its blocks
    (both in percent of the full width). The output width is that of the stage's last block; in
    what a supernet can hold, all blocks and, in stage 1, the stem share it.
    """
    percent = [0, *(round(100 * ratio) for ratio in RATIOS)]  # by digit
    read = {
        "depth": lambda arch, s: arch.depths[s],
        "output width": lambda arch, s: percent[arch.widths[s][-1][1]],
        "inner width": lambda arch, s: np.mean([percent[inner] for inner, _ in arch.widths[s]]),
    }
    return {
        f"{kind} {s + 1}": np.array([value(arch, s) for arch in archs], np.float64)
        for kind, value in read.items()
        for s in STAGES
    }


def attribute(chosen: Mapping[str, np.ndarray], values: np.ndarray) -> dict:
    """Least squares of ``values`` [n] on the choices (name -> [n]) that vary.

    With too few architectures or choices that go together, of all best fits the one of the least
    effects is given.

    Returns:
        ``explained``: share of the values' variance that the choices explain together, corrected
        for their number (adjusted R^2; not below 0); and by name of the ``choices``

        - ``effect``: change of the value from the smallest to the largest of the choice, the
          others being equal, and its ``standard_error``,
        - ``p_value``: of an effect of 0, by Student's t, with Holm's correction (Scandinavian
          Journal of Statistics, 1979) for having looked at all the choices.

        None what is not defined, as with too few architectures.
    """
    varying = {name: options for name, options in chosen.items() if np.ptp(options) > 0}
    if not varying:
        return {"explained": None, "choices": {}}
    # From 0 for the smallest to 1 for the largest, so that a coefficient is an effect.
    scaled = np.stack([(v - v.min()) / np.ptp(v) for v in varying.values()], axis=1)
    centred = scaled - scaled.mean(axis=0)
    target = values - values.mean()
    inverse = np.linalg.pinv(centred)
    effects = inverse @ target
    residual = float(((target - centred @ effects) ** 2).sum())
    freedom = len(values) - 1 - int(np.linalg.matrix_rank(centred))
    total = float((target**2).sum())
    explained, deviations = math.nan, np.full(len(varying), math.nan)
    if freedom > 0:
        deviations = np.sqrt((inverse**2).sum(axis=1) * residual / freedom)
        if total:
            explained = max(0.0, 1 - residual / freedom / (total / (len(values) - 1)))
    with np.errstate(invalid="ignore", divide="ignore"):
        p_values = holm(2 * stdtr(max(freedom, 1), -np.abs(effects / deviations)))
    rows = zip(varying, effects.tolist(), deviations, p_values, strict=True)
    return {
        "explained": none_if_nan(explained),
        "choices": {
            name: {
                "effect": effect,
                "standard_error": none_if_nan(deviation),
                "p_value": none_if_nan(p_value),
            }
            for name, effect, deviation, p_value in rows
        },
    }


def largest_effect(attribution: Mapping) -> tuple[str, float, str] | None:
    """The largest effect that is not 0, at ``LEVEL``: ``depth of stage 2``, its size, and the
    percentage that all explain."""
    clear = {
        name: row["effect"]
        for name, row in attribution["choices"].items()
        if row["p_value"] is not None and row["p_value"] < LEVEL
    }
    if not clear:
        return None
    largest = max(clear, key=lambda name: abs(clear[name]))
    kind, stage = largest.rsplit(" ", 1)
    return f"{kind} of stage {stage}", clear[largest], f"{100 * attribution['explained']:.0f}"


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's correction of p-values [n]: below a level only if all smaller ones are, too."""
    order = np.argsort(p_values)
    remaining = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * remaining))
    return adjusted
