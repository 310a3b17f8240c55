"""How well predicted accuracies rank architectures: correlations, intervals, top-k choices.

Everywhere larger means better, and a statistic that is not defined (fewer than two values, or
all equal) is NaN. What is a tie is said once, by :func:`with_ties`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000
LEVEL = 0.95
"""Of the intervals."""
FEWEST = 8
"""Architectures of which an interval is given: resamples of fewer hardly differ."""
NEAR = 1e-9
"""Accuracies that are nearer, as shares of 1, differ by how they were worked out."""

Statistic = Callable[[np.ndarray, np.ndarray], float]


def with_ties(values: ArrayLike) -> np.ndarray:
    """Values [n], float64, of which those that only rounding tells apart are made equal.

    Neighbours in order are one value, the least of them, where they are nearer than ``NEAR`` times
    their size, or times the largest's where that is below 1. So percents tie as shares do, scores
    of a small scale are told apart, and no two are parted by the border of a step of rounding.
    """
    values = np.asarray(values, np.float64)
    ordered = np.sort(values)
    size = np.maximum(np.abs(ordered), min(1.0, np.abs(ordered).max(initial=0.0)))
    # Halves, since the distance of two extreme numbers overflows.
    gaps, near = np.diff(ordered / 2), NEAR / 2 * np.maximum(size[1:], size[:-1])
    if ((gaps == 0) | (gaps > near)).all():
        return values
    firsts = ordered[np.concatenate([[True], gaps > near])]
    return firsts[np.searchsorted(firsts, values, side="right") - 1]


def kendall_tau_b(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b (Biometrika 1945) of two lists [n]; O(n log n)."""
    # Takes a second to import, and what only counts or chooses does without.
    from scipy.stats import kendalltau

    x, y = map(with_ties, _pair(x, y))
    if _constant(x) or _constant(y):
        return math.nan
    return float(kendalltau(x, y).statistic)


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's linear correlation of two lists [n], with its sign."""
    x, y = _pair(x, y)
    if _constant(x) or _constant(y):
        return math.nan
    # NumPy's: SciPy's also works out a p-value, which takes a bootstrap eight times as long.
    # Scaled before, so that the squares of extreme numbers neither overflow nor vanish.
    x, y = (values / np.abs(values).max() for values in (x, y))
    return float(np.corrcoef(x, y)[0, 1])


CORRELATIONS: dict[str, Statistic] = {"kendall_tau_b": kendall_tau_b, "pearson": pearson}


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"two lists of one length are needed, not shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("values must be finite")
    return x, y


def _constant(values: np.ndarray) -> bool:
    """Whether there are no two values, or rounding alone tells them apart."""
    return len(values) < 2 or values.max() / 2 - values.min() / 2 <= NEAR / 2 * abs(values).max()


def bootstrap_interval(
    statistic: Statistic, x: ArrayLike, y: ArrayLike, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979): architectures are drawn with replacement.

    It tells how much the statistic of ``x`` and ``y`` [n] depends on which architectures were
    compared, not on how noisily each was trained. Resamples in which the statistic is not defined
    are left out; if it is in none, both ends are NaN. The same seed draws the same resamples for
    every statistic.
    """
    x, y = map(with_ties, _pair(x, y))
    rng = np.random.default_rng(seed)
    values = np.empty(resamples)
    for index in range(resamples):
        drawn = rng.integers(0, len(x), len(x))
        values[index] = statistic(x[drawn], y[drawn])
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def right_order(pred: ArrayLike, gt: ArrayLike) -> float:
    """Of the pairs whose true scores [n] differ, the share that is predicted in the right order,
    equal predictions as half: by Somers' d (American Sociological Review, 1962)."""
    pred, gt = map(with_ties, _pair(pred, gt))

    def untied(values: np.ndarray) -> int:
        return len(values) ** 2 - (np.unique(values, return_counts=True)[1] ** 2).sum()

    return (1 + kendall_tau_b(pred, gt) * math.sqrt(untied(pred) / untied(gt))) / 2


def regret(pred: ArrayLike, gt: ArrayLike) -> float:
    """The best true score less that of the predicted best [n], of equal ones the worst."""
    pred, gt = map(with_ties, _pair(pred, gt))
    return float(gt.max() - gt[pred == pred.max()].min())


def rank_errors(pred: ArrayLike, gt: ArrayLike) -> np.ndarray:
    """Predicted less true rank [n]: positive where an architecture is ranked too high.

    Rank 1 is the worst; equal ones share their mean.
    """
    from scipy.stats import rankdata

    pred, gt = map(with_ties, _pair(pred, gt))
    return rankdata(pred) - rankdata(gt)


def correlations(
    pred: ArrayLike, gt: ArrayLike, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[str, float | None]]:
    """``value``, ``low`` and ``high`` of each of ``CORRELATIONS``; None where not defined, as the
    ends are of fewer than ``FEWEST`` architectures."""
    result = {}
    for name, statistic in CORRELATIONS.items():
        low = high = math.nan
        if len(np.asarray(gt)) >= FEWEST:
            low, high = bootstrap_interval(statistic, pred, gt, seed, resamples)
        ends = {"value": statistic(pred, gt), "low": low, "high": high}
        result[name] = {end: none_if_nan(value) for end, value in ends.items()}
    return result


def none_if_nan(value: float) -> float | None:
    """What JSON can hold: a finite number, or null for a statistic that is not defined."""
    return float(value) if math.isfinite(value) else None
