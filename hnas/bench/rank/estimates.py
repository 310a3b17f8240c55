"""How well methods rank, with errors that hold for other architectures and other supernets.

What is estimated is the expectation of Kendall's tau-b between the scores of a method's supernet of
a fresh seed and accuracies of networks trained alone, over as many architectures as were compared,
drawn anew. Two things are drawn, architectures, each with the noise of its own training, and
supernet seeds; every supernet scores every architecture. What all trainings of a truth share, their
start and their images, is taken as given. The variance is taken apart:

- over architectures it is that of a mean over pairs (a U-statistic): for a single correlation by
  the jackknife (Tukey, 1958), for differences without what that counts twice (Efron & Stein, Annals
  of Statistics, 1981);
- over seeds it is the spread between supernets, less what of it is the architectures' again: the
  analysis of variance of two crossed random factors.

Intervals are Student's with Satterthwaite's degrees of freedom; those of a single correlation are
symmetric on Fisher's scale. A bootstrap would tie architectures with their copies.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binomtest, t

from hnas.ranking.correlations import FEWEST, LEVEL, none_if_nan


def tau_kernel(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """What each pair of architectures says about the tau-b of two lists [n].

    Tau-b is a ratio: the share of pairs that agree less those that do not, over the root of the
    shares that are untied in each list. It is linearised (delta method), so that it is a mean.

    Returns:
        [n, n] with zeros on the diagonal; the mean over pairs of different architectures is tau-b.
        All NaN where it is not defined.
    """
    x, y = (np.sign(np.subtract.outer(own, own)) for own in map(np.asarray, (scores, truth)))
    agree, in_x, in_y = _over_pairs(x * y), _over_pairs(np.abs(x)), _over_pairs(np.abs(y))
    if not in_x * in_y:
        return np.full(x.shape, math.nan)
    root = math.sqrt(in_x * in_y)
    tau = agree / root
    kernel = x * y / root - tau / 2 * (np.abs(x) / in_x + np.abs(y) / in_y) + tau
    np.fill_diagonal(kernel, 0)
    return kernel


def _over_pairs(kernel: np.ndarray) -> np.ndarray:
    """Means over pairs of different architectures of kernels [..., n, n]."""
    number = kernel.shape[-1]
    return kernel.sum(axis=(-2, -1)) / (number * (number - 1))


def interval(kernels: np.ndarray) -> dict[str, float | None]:
    """A method's tau-b: ``value``, ``low`` and ``high``, None where not defined.

    The mean over its supernets, whose kernels are [seeds, n, n], with the ends of its interval.
    That of a single one holds for that supernet.
    """
    value = float(_over_pairs(kernels).mean())
    found = {"value": none_if_nan(value), "low": None, "high": None}
    if kernels.shape[-1] < FEWEST or not np.isfinite(value) or abs(value) >= 1:
        return found
    deviation, freedom = standard_error(kernels, corrected=False)
    half = t.ppf((1 + LEVEL) / 2, freedom) * deviation / (1 - value**2)
    ends = (math.tanh(math.atanh(value) + sign * half) for sign in (-1, 1))
    return found | dict(zip(("low", "high"), ends, strict=True))


def difference(own: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    """The first tau-b less the other: ``value``, ``low``, ``high``, and ``p`` (two-sided).

    Kernels are [seeds, n, n], of supernets of the same seeds; [1, n, n] for what has no seeds.
    """
    kernels = own - other
    value = float(_over_pairs(kernels).mean()) if len(kernels) else math.nan
    found = {"value": none_if_nan(value), "low": None, "high": None, "p": None}
    if kernels.shape[-1] < FEWEST or not np.isfinite(value):
        return found
    deviation, freedom = standard_error(kernels, corrected=True)
    if not deviation:
        return found | {"low": value, "high": value, "p": 0.0 if value else 1.0}
    half = t.ppf((1 + LEVEL) / 2, freedom) * deviation
    p = 2 * float(t.sf(abs(value) / deviation, freedom))
    # Two correlations cannot be further apart than 2.
    return found | {"low": max(value - half, -2.0), "high": min(value + half, 2.0), "p": p}


def standard_error(kernels: np.ndarray, corrected: bool) -> tuple[float, float]:
    """Of the mean over seeds and pairs of kernels [seeds, n, n]: the error, its degrees of freedom.

    ``corrected`` takes off what the jackknife counts twice. That matters for differences, which
    depend on architectures through pairs of them more than through each by itself.
    """
    seeds, number = kernels.shape[:2]
    mean = kernels.mean(axis=0)
    architectures = over_architectures(mean[None], corrected)[0]
    between = both = 0.0
    if seeds > 1:
        between = _over_pairs(kernels).var(ddof=1) / seeds
        both = over_architectures(kernels - mean, corrected).sum() / (seeds - 1) / seeds
    own = max(0.0, between - both)
    total = architectures + own
    parts = architectures**2 / (number - 1) + (between**2 / (seeds - 1) if own else 0)
    return math.sqrt(total), total**2 / parts if parts else math.inf


def over_architectures(kernels: np.ndarray, corrected: bool) -> np.ndarray:
    """Variances [k] of means over pairs of kernels [k, n, n] that are due to architectures."""
    number = kernels.shape[-1]
    rows = kernels.sum(axis=2)
    total, by_row = rows.sum(axis=1), (rows**2).sum(axis=1)
    mean = total / (number * (number - 1))
    spread = ((rows / (number - 1) - mean[:, None]) ** 2).sum(axis=1)
    jackknife = 4 * (number - 1) / (number * (number - 2) ** 2) * spread
    if not corrected:
        return jackknife
    # The square of the mean less an unbiased estimate of its expectation's square, the mean product
    # of pairs that have no architecture in common.
    disjoint = total**2 - 4 * by_row + 2 * (kernels**2).sum(axis=(1, 2))
    pairs = number * (number - 1) * (number - 2) * (number - 3)
    # Degree two is counted twice, so the truth is between half and all of the jackknife.
    return np.clip(mean**2 - disjoint / pairs, jackknife / 2, jackknife)


def share(number: int, total: int) -> dict[str, float]:
    """``number`` of ``total`` as a share, with the ends of its exact interval (Clopper-Pearson)."""
    ends = binomtest(number, total).proportion_ci(LEVEL, method="exact")
    return {"value": number / total, "low": float(ends.low), "high": float(ends.high)}
