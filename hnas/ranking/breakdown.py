"""Which choices of depth and width a ranking's errors come from.

Everything is over the *rank error*: predicted less true rank, in percent of the number of
architectures. It is positive where a prediction ranks an architecture too high.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hnas.ranking.correlations import none_if_nan, pearson
from hnas.search_space import RATIOS, Architecture

STAGES = range(4)
PERCENT_OF_DIGIT = tuple(round(100 * ratio) for ratio in RATIOS)
"""Width digits 1 to 7 in percent of the full width."""
DISCRETE = tuple(f"{kind} {stage + 1}" for kind in ("depth", "output width") for stage in STAGES)
"""Choices of few options, each of which many architectures share."""


def choices(archs: Sequence[Architecture]) -> dict[str, np.ndarray]:
    """What distinguishes ``archs``, by name, each [n] and larger for a larger network.

    For each stage its depth (blocks), its output width and the mean inner width of its blocks
    (both in percent of the full width). The output width is that of the stage's last block; in
    what a supernet can hold, all blocks and, in stage 1, the stem share it.
    """
    found = {}
    for s in STAGES:
        found[f"depth {s + 1}"] = [arch.depths[s] for arch in archs]
    for s in STAGES:
        found[f"output width {s + 1}"] = [_percent(arch.widths[s][-1][1]) for arch in archs]
    for s in STAGES:
        found[f"inner width {s + 1}"] = [
            np.mean([_percent(inner) for inner, _ in arch.widths[s]]) for arch in archs
        ]
    return {name: np.array(values, np.float64) for name, values in found.items()}


def _percent(digit: int) -> int:
    return PERCENT_OF_DIGIT[digit - 1]


def by_option(values: np.ndarray, errors: np.ndarray) -> list[dict]:
    """Mean rank error of the architectures that share an option, smallest option first.

    Args:
        values: the choice of each architecture [n].
        errors: rank errors [n], percent.

    Returns:
        For each option ``{"option", "architectures", "mean_error", "standard_error",
        "mean_absolute_error"}``; the standard error of a single architecture is None.
    """
    rows = []
    for option in np.unique(values):
        part = errors[values == option]
        deviation = part.std(ddof=1) / math.sqrt(len(part)) if len(part) > 1 else math.nan
        rows.append(
            {
                "option": float(option),
                "architectures": len(part),
                "mean_error": float(part.mean()),
                "standard_error": none_if_nan(deviation),
                "mean_absolute_error": float(np.abs(part).mean()),
            }
        )
    return rows


@dataclass(frozen=True)
class Attribution:
    """Rank errors as a linear function of the choices.

    Attributes:
        explained: share of the errors' variance that the choices explain together, corrected for
            their number (adjusted R^2; not below 0); NaN with too few architectures.
        correlation: Pearson's correlation of the error with each choice alone.
        effect: change of the error, in percent of the ranks, from the smallest to the largest
            value of a choice, the others being equal; positive: more of it is overrated.
        standard_error: of ``effect``; NaN with too few architectures.
    """

    explained: float
    correlation: dict[str, float]
    effect: dict[str, float]
    standard_error: dict[str, float]


def attribute(chosen: Mapping[str, np.ndarray], errors: np.ndarray) -> Attribution:
    """Least squares of ``errors`` [n] on the choices (name -> [n]) that vary.

    With too few architectures or choices that go together, of all best fits the one of the least
    effects is given.
    """
    varying = {name: values for name, values in chosen.items() if np.ptp(values) > 0}
    count, terms = len(errors), len(varying)
    correlation = {name: pearson(values, errors) for name, values in varying.items()}
    if not varying:
        return Attribution(math.nan, {}, {}, {})
    # From 0 for the smallest to 1 for the largest, so that a coefficient is an effect.
    scaled = np.stack([(v - v.min()) / np.ptp(v) for v in varying.values()], axis=1)
    centred = scaled - scaled.mean(axis=0)
    target = errors - errors.mean()
    inverse = np.linalg.pinv(centred)
    effects = inverse @ target
    residual = float(((target - centred @ effects) ** 2).sum())
    freedom = count - 1 - int(np.linalg.matrix_rank(centred))
    total = float((target**2).sum())
    if freedom > 0:
        deviations = np.sqrt((inverse**2).sum(axis=1) * residual / freedom)
        explained = max(0.0, 1 - residual / freedom / (total / (count - 1))) if total else math.nan
    else:
        deviations, explained = np.full(terms, math.nan), math.nan
    return Attribution(
        explained,
        correlation,
        dict(zip(varying, effects.tolist(), strict=True)),
        dict(zip(varying, deviations.tolist(), strict=True)),
    )
