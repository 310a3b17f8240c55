"""How well methods rank, with errors that hold for other architectures and other supernets.

What is estimated is the expectation of a correlation between the scores of a method's supernet of
a fresh seed and accuracies of networks trained alone, averaged over as many seeds as the truth has,
over as many architectures as were compared, drawn anew from the space's distribution.

Two things are drawn, architectures and supernet seeds, and every supernet scores every
architecture. The noise of an architecture's accuracy is drawn with the architecture, since it is
trained independently of the others. So drawing truth seeds besides would count that noise twice,
and a bootstrap, which draws architectures twice, ties them with their copies. Here the variance is
taken apart instead:

- over architectures, from the statistic without one and without two of them: the jackknife
  (Tukey, 1958), for differences of Kendall's tau without what it counts twice (Efron & Stein,
  Annals of Statistics, 1981), which can be told exactly of U-statistics of degree two;
- over seeds, from the spread between supernets, less what of it is the architectures' again: the
  analysis of variance of two crossed random factors.

Intervals are Student's with Satterthwaite's degrees of freedom; those of a single correlation are
symmetric on Fisher's scale. ``hnas.bench.rank.coverage`` measures how often they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from hnas.ranking.correlations import none_if_nan

LEVEL = 0.95
FEWEST = 8
"""Architectures, of which an interval can be given."""


def subsets(number: int) -> np.ndarray:
    """Masks of all of ``number`` architectures, without each one, and without each two.

    Returns:
        0 and 1 [1 + n + n (n - 1) / 2, n]; pairs in the order of ``numpy.triu_indices``.
    """
    first, second = np.triu_indices(number, 1)
    masks = np.ones((1 + number + len(first), number))
    masks[1 + np.arange(number), np.arange(number)] = 0
    pairs = 1 + number + np.arange(len(first))
    masks[pairs, first] = masks[pairs, second] = 0
    return masks


def tau_b(masks: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of x and y [n] within each subset [m, n]; NaN where not defined."""

    def over_pairs(values: np.ndarray) -> np.ndarray:
        return ((masks @ values) * masks).sum(axis=1)

    x, y = (np.sign(values[:, None] - values[None, :]) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return over_pairs(x * y) / np.sqrt(over_pairs(np.abs(x)) * over_pairs(np.abs(y)))


def pearson(masks: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of x and y, [n] or within each subset [m, n], in each subset [m, n]."""
    x, y = (values - _mean(masks, values)[:, None] for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance, *variances = ((masks * a * b).sum(axis=1) for a, b in ((x, y), (x, x), (y, y)))
        return covariance / np.sqrt(variances[0] * variances[1])


def spearman(masks: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho of x and y [n] within each subset [m, n], equal values sharing their rank."""
    below = [(v[:, None] < v[None, :]) + 0.5 * (v[:, None] == v[None, :]) for v in (x, y)]
    return pearson(masks, *(masks @ own for own in below))


def _mean(masks: np.ndarray, values: np.ndarray) -> np.ndarray:
    return (masks * values).sum(axis=1) / masks.sum(axis=1)


@dataclass(frozen=True)
class Statistic:
    """A correlation.

    Attributes:
        within: of two lists within subsets.
        of_pairs: it is a mean over pairs of architectures.
        to_pearson, from_pearson: what it would be as Pearson's for normal values, and back
            (Kendall, Rank Correlation Methods): so it can be corrected for reliability.
    """

    within: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    of_pairs: bool
    to_pearson: Callable[[np.ndarray], np.ndarray]
    from_pearson: Callable[[np.ndarray], np.ndarray]


STATISTICS = {
    "kendall_tau_b": Statistic(
        tau_b, True, lambda t: np.sin(np.pi * t / 2), lambda r: 2 / np.pi * np.arcsin(r)
    ),
    "pearson": Statistic(pearson, False, lambda t: t, lambda r: r),
    "spearman": Statistic(
        spearman, False, lambda t: 2 * np.sin(np.pi * t / 6), lambda r: 6 / np.pi * np.arcsin(r / 2)
    ),
}


def reliability(masks: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """Share of the variance of means over seeds, between architectures, that is not noise.

    From an analysis of variance: noise is what seeds differ by beyond their own means.

    Args:
        masks: subsets [m, n].
        acc: accuracies [seeds, n].

    Returns:
        [m]; NaN for one seed or one architecture.
    """
    seeds, number = len(acc), masks.sum(axis=1)
    means = acc.mean(axis=0)
    centred = acc - means
    # Of a subset, what a seed's accuracies have in common is taken off.
    common = (masks @ centred.T) / number[:, None]
    left = masks @ (centred**2).T - number[:, None] * common**2  # [m, seeds]
    others = np.where(number > 1, number - 1, np.nan)
    between = _mean(masks, (means - _mean(masks, means)[:, None]) ** 2) * number / others
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - left.sum(axis=1) / ((number - 1) * (seeds - 1) * seeds) / between


@dataclass(frozen=True)
class Variance:
    """Of a mean over seeds of a statistic.

    Attributes:
        architectures, seeds: its parts.
        freedom: degrees of freedom of their sum.
    """

    architectures: float
    seeds: float
    freedom: float

    @property
    def deviation(self) -> float:
        """Standard error."""
        return math.sqrt(self.architectures + self.seeds)


def variance(values: np.ndarray, number: int, corrected: bool) -> Variance:
    """Of the mean over seeds of a statistic.

    Args:
        values: [seeds, subsets] in the order of :func:`subsets`.
        number: of architectures.
        corrected: take off what the jackknife counts twice. It matters for differences, which
            depend on architectures through pairs of them more than through each by itself, and is
            exact for means over pairs.
    """
    seeds = len(values)
    mean = values.mean(axis=0)
    architectures = _over_architectures(mean[None], number, corrected)[0]
    between = values[:, 0].var(ddof=1) / seeds if seeds > 1 else 0.0
    both = 0.0
    if seeds > 1:
        both = _over_architectures(values - mean, number, corrected).sum() / (seeds - 1) / seeds
    own = max(0.0, between - both)
    total = architectures + own
    parts = architectures**2 / (number - 1) + (between**2 / (seeds - 1) if own else 0)
    return Variance(architectures, own, total**2 / parts if parts else math.inf)


def _over_architectures(values: np.ndarray, number: int, corrected: bool) -> np.ndarray:
    """Jackknife variances [k] of k statistics within subsets [k, subsets]."""
    without = values[:, 1 : 1 + number]
    jackknife = (number - 1) / number * ((without - without.mean(1, keepdims=True)) ** 2).sum(1)
    if not corrected:
        return jackknife
    # Degree two is counted twice, so the truth is between half and all of it.
    return np.clip(_unbiased(_kernel(values, number)), jackknife / 2, jackknife)


def _kernel(values: np.ndarray, number: int) -> np.ndarray:
    """Of pairs [k, n, n], the kernel of U-statistics of degree two with these values."""

    def pairs(of: int) -> float:
        return of * (of - 1) / 2

    first, second = np.triu_indices(number, 1)
    every, one, two = values[:, :1], values[:, 1 : 1 + number], values[:, 1 + number :]
    kernel = np.zeros((len(values), number, number))
    kernel[:, first, second] = (
        pairs(number) * every
        - pairs(number - 1) * (one[:, first] + one[:, second])
        + pairs(number - 2) * two
    )
    return kernel + kernel.transpose(0, 2, 1)


def _unbiased(kernel: np.ndarray) -> np.ndarray:
    """Unbiased variances [k] of U-statistics of degree two, whose kernels are [k, n, n].

    The square of the mean less an unbiased estimate of its expectation's square, the mean product
    of pairs that have no architecture in common.
    """
    number = kernel.shape[-1]
    rows = kernel.sum(axis=2)
    total, by_row, squares = rows.sum(axis=1), (rows**2).sum(axis=1), (kernel**2).sum(axis=(1, 2))
    disjoint = total**2 - 4 * by_row + 2 * squares
    count = number * (number - 1)
    return (total / count) ** 2 - disjoint / (count * (number - 2) * (number - 3))


def _half_width(variance: Variance) -> float:
    return float(stdtrit(variance.freedom, (1 + LEVEL) / 2)) * variance.deviation


def within(statistic: Statistic, scores: Sequence, truth: np.ndarray) -> np.ndarray:
    """A correlation of each seed's scores [seeds, n] with the truth [n], in :func:`subsets`."""
    masks = subsets(len(truth))
    return np.array([statistic.within(masks, np.asarray(own), truth) for own in scores])


def interval(values: np.ndarray, number: int) -> dict[str, float | None]:
    """A method's correlation, mean over seeds, with the ends of its interval.

    Args:
        values: as :func:`within` gives them.
        number: of architectures.

    Returns:
        ``value``, ``low``, ``high``, and the parts of the standard error that are of
        ``architectures`` and of ``seeds``. Without several seeds (``seeds`` is None) it holds for
        this one supernet. What is not defined is None.
    """
    value = float(values[:, 0].mean())
    found = {"value": none_if_nan(value), "low": None, "high": None}
    found |= {"architectures": None, "seeds": None}
    if number < FEWEST or not np.isfinite(values).all() or abs(value) >= 1:
        return found
    error = variance(values, number, corrected=False)
    half = _half_width(error) / (1 - value**2)
    return found | {
        "low": math.tanh(math.atanh(value) - half),
        "high": math.tanh(math.atanh(value) + half),
        "architectures": math.sqrt(error.architectures),
        "seeds": math.sqrt(error.seeds) if len(values) > 1 else None,
    }


def corrected_interval(
    statistic: Statistic, values: np.ndarray, share: np.ndarray, number: int
) -> dict[str, float | None]:
    """As :func:`interval`, of the correlation with a truth without noise; at most 1.

    Args:
        statistic, values, number: the correlation with the truth as it is.
        share: the truth's reliability in :func:`subsets`.
    """
    found = dict.fromkeys(("value", "low", "high"))
    if not (share > 0).all() or not np.isfinite(values).all():
        return found
    root = math.sqrt(share[0])

    def back(correlation: float) -> float:
        return float(statistic.from_pearson(np.clip(correlation / root, -1, 1)))

    mean = values.mean(axis=0)
    # On this scale the correction of the whole set does not change it.
    scaled = statistic.to_pearson(mean) * root / np.sqrt(share)
    found["value"] = back(scaled[0])
    if number < FEWEST or abs(scaled[0]) >= 1:
        return found
    step = 1e-6
    slope = (statistic.to_pearson(mean[0] + step) - statistic.to_pearson(mean[0])) / step
    error = variance(scaled + slope * (values - mean), number, corrected=False)
    half = _half_width(error) / (1 - scaled[0] ** 2)
    ends = (math.tanh(math.atanh(scaled[0]) + sign * half) for sign in (-1, 1))
    return found | dict(zip(("low", "high"), map(back, ends), strict=True))


def difference(
    statistic: Statistic, own: np.ndarray, other: np.ndarray, number: int
) -> dict[str, float | None]:
    """Of the first method's correlation less the other's, over the seeds that both have.

    Args:
        statistic: which correlation.
        own, other: as :func:`within` gives them; what has no seeds is the same in each.
        number: of architectures.

    Returns:
        ``value``, ``low``, ``high``, and ``p`` of no difference (two-sided).
    """
    seeds = min(len(own), len(other))
    values = own[:seeds] - other[:seeds]
    value = float(values[:, 0].mean())
    found = {"value": none_if_nan(value), "low": None, "high": None, "p": None}
    if number < FEWEST or not np.isfinite(values).all():
        return found
    error = variance(values, number, corrected=statistic.of_pairs)
    half = _half_width(error)
    ratio = abs(value) / error.deviation if error.deviation else math.inf if value else 0.0
    p = 2 * float(stdtr(error.freedom, -ratio))
    # Two correlations cannot be further apart than 2.
    return found | {"low": max(value - half, -2.0), "high": min(value + half, 2.0), "p": p}


def holm(p: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics, 1979); None stays None."""
    known = sorted((value, name) for name, value in p.items() if value is not None)
    adjusted, largest = dict.fromkeys(p), 0.0
    for rank, (value, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        adjusted[name] = largest
    return adjusted
