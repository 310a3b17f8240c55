"""Which networks are worth choosing: the Pareto front, and who cannot be told from the best."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from scipy.special import ndtr, stdtrit

from hnas.ranking.agreement import FEWEST_IMAGES, FOLDS, fold_sizes

CONFIDENCE = 0.95
NODES = 4001
"""Of the integral over the normal distribution, from -9 to 9."""
MOST_ERRORS = 40.0
"""Upper end of the search for a critical value; no number of networks comes near it."""


def pareto_front(accuracy: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the networks [n] of which none is cheaper and as good, or as cheap and better.

    By rising cost, so by rising accuracy too; of networks that are equal in both the first stands
    for all.
    """
    order = np.lexsort((-accuracy, cost))
    best_before = np.maximum.accumulate(accuracy[order])[:-1]
    rises = np.concatenate([[True], accuracy[order][1:] > best_before])
    return order[rises]


def difference_errors(folds: np.ndarray, images: int, index: int) -> np.ndarray:
    """Standard errors of accuracies less that of one architecture; float64 [architectures].

    As estimates for more such images, like the ``se`` of ``estimates.json``. The images of the
    folds are a random sample each, so the variance of the difference in hits is 16 / 15 times the
    sum of squares of the folds' deviations. One hit is added to it, so that few images on which two
    architectures never differ do not make their difference certain.

    Args:
        folds: hits by fold, int64 [architectures, FOLDS].
        images: how many were scored.
        index: the one; its own error is 0.

    Returns:
        Infinite with fewer than ``FEWEST_IMAGES`` images.
    """
    if images < FEWEST_IMAGES:
        errors = np.full(len(folds), math.inf)
    else:
        more = folds - folds[index]
        deviations = more - np.outer(more.sum(axis=1) / images, fold_sizes(images))
        variance = FOLDS / (FOLDS - 1) * (deviations**2).sum(axis=1)
        errors = np.sqrt(variance + 1) / images
    errors[index] = 0.0
    return errors


def as_good_as_best(accuracy: np.ndarray, folds: np.ndarray, images: int) -> np.ndarray:
    """Which networks [n] cannot be told from the best by the images they were scored on; bool [n].

    Gupta's subset selection (Technometrics 7, 1965, pp. 225-245): a network stays if it is below
    the best by at most d standard errors of their difference, where d is such that the truly best
    of all n stays with probability ``CONFIDENCE``, however close the others are. So d grows with
    n: the best of many is always partly lucky.

    ``folds`` and ``images`` are as in :func:`difference_errors`.
    """
    below, value = accuracy.max() - accuracy, student_value(len(accuracy))
    group = np.full(len(accuracy), True)
    # Where several are the best, worse than none of them: the file's order is of no matter.
    for best in np.flatnonzero(below == 0):
        # The best's own error is 0 and others' may be infinite: nothing is known of them.
        group &= (below <= 0) | (below <= value * difference_errors(folds, images, best))
    return group


def student_value(networks: int) -> float:
    """The d of :func:`as_good_as_best`: what Student's t exceeds as rarely as a normal variable the
    :func:`critical_value`, since errors are known from ``FOLDS`` folds."""
    return float(-stdtrit(FOLDS - 1, ndtr(-critical_value(networks))))


@cache
def critical_value(networks: int) -> float:
    """The d where errors are known exactly: Gupta's constant over the square root of 2.

    Solves P(max of n - 1 standard normal variables - another one <= d sqrt 2) = CONFIDENCE.
    """
    if networks < 2:
        return 0.0
    z = np.linspace(-9.0, 9.0, NODES)
    weight = np.exp(-0.5 * z * z)
    weight /= weight.sum()
    low, high = 0.0, MOST_ERRORS
    while high - low > 1e-9:
        middle = (low + high) / 2
        # That the best of equally good networks stays.
        kept = weight @ ndtr(z + middle * math.sqrt(2)) ** (networks - 1)
        low, high = (middle, high) if kept < CONFIDENCE else (low, middle)
    return high
