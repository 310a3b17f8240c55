"""What choices of depth and width do to a value: a ranking's errors, or accuracies.

A ranking's errors are *rank errors*: predicted less true rank, in percent of the number of
architectures. One is positive where a prediction ranks an architecture too high.
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
LEVEL = 0.05
"""Of the test of an effect, for all choices together."""


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


def by_option(chosen: np.ndarray, values: np.ndarray) -> list[dict]:
    """Mean of the architectures that share an option, smallest option first.

    Args:
        chosen: the choice of each architecture [n].
        values: what is looked at [n], e.g. rank errors in percent.

    Returns:
        For each option ``{"option", "architectures", "mean", "standard_error",
        "mean_absolute"}``; the standard error of a single architecture is None.
    """
    rows = []
    for option in np.unique(chosen):
        part = values[chosen == option]
        deviation = part.std(ddof=1) / math.sqrt(len(part)) if len(part) > 1 else math.nan
        rows.append(
            {
                "option": float(option),
                "architectures": len(part),
                "mean": float(part.mean()),
                "standard_error": none_if_nan(deviation),
                "mean_absolute": float(np.abs(part).mean()),
            }
        )
    return rows


@dataclass(frozen=True)
class Attribution:
    """Values as a linear function of the choices.

    Attributes:
        explained: share of the values' variance that the choices explain together, corrected for
            their number (adjusted R^2; not below 0); NaN with too few architectures.
        correlation: Pearson's correlation of the value with each choice alone.
        effect: change of the value from the smallest to the largest of a choice, the others being
            equal. Of rank errors: positive where more of it is overrated.
        standard_error: of ``effect``; NaN with too few architectures.
        p_value: of an effect of 0, by Student's t, with Holm's correction (Scandinavian Journal of
            Statistics, 1979) for having looked at all the choices; NaN with too few architectures.
    """

    explained: float
    correlation: dict[str, float]
    effect: dict[str, float]
    standard_error: dict[str, float]
    p_value: dict[str, float]

    def clear(self) -> list[str]:
        """Choices whose effect is not 0, at ``LEVEL``, the largest effect first."""
        found = [name for name, p in self.p_value.items() if p < LEVEL]
        return sorted(found, key=lambda name: -abs(self.effect[name]))

    def record(self) -> dict:
        """For JSON: None for what is not defined."""
        return {
            "explained": none_if_nan(self.explained),
            "choices": {
                name: {
                    "correlation": none_if_nan(self.correlation[name]),
                    "effect": effect,
                    "standard_error": none_if_nan(self.standard_error[name]),
                    "p_value": none_if_nan(self.p_value[name]),
                }
                for name, effect in self.effect.items()
            },
        }


def attribute(chosen: Mapping[str, np.ndarray], values: np.ndarray) -> Attribution:
    """Least squares of ``values`` [n] on the choices (name -> [n]) that vary.

    With too few architectures or choices that go together, of all best fits the one of the least
    effects is given.
    """
    varying = {name: options for name, options in chosen.items() if np.ptp(options) > 0}
    count, terms = len(values), len(varying)
    correlation = {name: pearson(options, values) for name, options in varying.items()}
    if not varying:
        return Attribution(math.nan, {}, {}, {}, {})
    # From 0 for the smallest to 1 for the largest, so that a coefficient is an effect.
    scaled = np.stack([(v - v.min()) / np.ptp(v) for v in varying.values()], axis=1)
    centred = scaled - scaled.mean(axis=0)
    target = values - values.mean()
    inverse = np.linalg.pinv(centred)
    effects = inverse @ target
    residual = float(((target - centred @ effects) ** 2).sum())
    freedom = count - 1 - int(np.linalg.matrix_rank(centred))
    total = float((target**2).sum())
    if freedom > 0:
        deviations = np.sqrt((inverse**2).sum(axis=1) * residual / freedom)
        explained = max(0.0, 1 - residual / freedom / (total / (count - 1))) if total else math.nan
        with np.errstate(invalid="ignore", divide="ignore"):
            p_values = holm(student_two_sided(np.abs(effects / deviations), freedom))
    else:
        deviations = p_values = np.full(terms, math.nan)
        explained = math.nan
    return Attribution(
        explained,
        correlation,
        dict(zip(varying, effects.tolist(), strict=True)),
        dict(zip(varying, deviations.tolist(), strict=True)),
        dict(zip(varying, p_values.tolist(), strict=True)),
    )


def student_two_sided(t: np.ndarray, freedom: int) -> np.ndarray:
    """How likely Student's t is at least ``t`` [n], 0 or more, away from 0; NaN stays NaN.

    Exact finite sums (Abramowitz and Stegun, 26.7.3 and 26.7.4), to about 1e-13. With the angle
    whose tangent is t / sqrt(freedom), the probability of less is a sum of powers of its cosine.
    """
    t = np.asarray(t, np.float64)
    angle = np.arctan(t / math.sqrt(freedom))
    odd = freedom % 2
    powers = np.arange(1 + odd, freedom - 2, 2)
    # Each term is the one before times cos^2 k / (k + 1), k = 1, 3, ... or 2, 4, ...
    factors = np.cos(angle)[..., None] ** 2 * (powers / (powers + 1.0))
    total = 1 + np.cumprod(factors, axis=-1).sum(axis=-1) if freedom > 1 else 0.0
    if odd:
        less = 2 / math.pi * (angle + np.sin(angle) * np.cos(angle) * total)
    else:
        less = np.sin(angle) * total
    return np.clip(1 - less, 0, 1)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's correction of p-values [n]: below a level only if all smaller ones are, too."""
    order = np.argsort(p_values)
    remaining = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * remaining))
    return adjusted
