"""Which networks are worth choosing: the Pareto front, and who cannot be told from the best."""

from __future__ import annotations

import math

import numpy as np

CONFIDENCE = 0.95
NODES = 4001
"""Of the integral over the normal distribution, from -9 to 9."""
MOST_ERRORS = 40.0
"""Upper end of the search for a critical value; no number of networks comes near it."""


def pareto_front(accuracy: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the networks of which none is both cheaper and as good, or as cheap and better.

    Of networks that are equal in both the first stands for all.

    Args:
        accuracy: the more the better [n].
        cost: the less the better [n].

    Returns:
        int64, by rising cost, so by rising accuracy too.
    """
    accuracy, cost = np.asarray(accuracy), np.asarray(cost)
    order = np.lexsort((-accuracy, cost))
    if not len(order):
        return order
    best_before = np.maximum.accumulate(accuracy[order])[:-1]
    rises = np.concatenate([[True], accuracy[order][1:] > best_before])
    return order[rises]


def binomial_error(accuracy: np.ndarray, images: np.ndarray | int) -> np.ndarray:
    """Standard errors of accuracies (shares of 1) that were counted on so many images."""
    return error_of_hits(np.asarray(accuracy) * images, images)


def error_of_hits(hits: np.ndarray, images: np.ndarray | int) -> np.ndarray:
    """Standard errors of accuracies as estimates for more such images; as accuracies.

    Those of a binomial proportion, sqrt(p * (1 - p) / images), at Laplace's estimate
    p = (hits + 1) / (images + 2): with the observed p, a few images that are all hits, or all
    misses, would give an error of 0.
    """
    rate = (hits + 1) / (np.asarray(images) + 2)
    return np.sqrt(rate * (1 - rate) / np.maximum(1, images))


def not_worse(
    accuracy: np.ndarray,
    difference_error: np.ndarray,
    confidence: float = CONFIDENCE,
    freedom: int | None = None,
) -> np.ndarray:
    """Which networks cannot be told from the best by the images that they were scored on.

    Gupta's subset selection (Technometrics 7, 1965, pp. 225-245): a network stays if it is below
    the best by at most d standard errors of their difference, where d is such that the truly best
    of all n stays with probability ``confidence``, however close the others are. So d grows with
    n: the best of many is always partly lucky.

    Args:
        accuracy: of all that compete [n].
        difference_error: standard error of each one's distance to the best [n]; see
            :func:`independent_difference` and :func:`hnas.ranking.paired.difference_errors`.
        freedom: degrees of freedom that these errors are estimated with; None: very many.

    Returns:
        bool [n]; the best is always in.
    """
    accuracy = np.asarray(accuracy)
    below = accuracy.max() - accuracy
    errors = critical_value(len(accuracy), confidence)
    if freedom is not None:
        errors = student(errors, freedom)
    # The best's own error is 0 and others' may be infinite: nothing is known of them.
    return (below <= 0) | (below <= errors * np.asarray(difference_error))


def student(z: float, freedom: int) -> float:
    """The value that Student's t exceeds as rarely as a standard normal variable exceeds ``z``.

    By the first terms of its expansion (Abramowitz & Stegun, 26.7.5); within 1 % for z up to 5 and
    15 degrees of freedom.
    """
    terms = (
        z**3 + z,
        5 * z**5 + 16 * z**3 + 3 * z,
        3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z,
        79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z,
    )
    scales = (4, 96, 384, 92160)
    parts = zip(terms, scales, strict=True)
    return z + sum(term / (scale * freedom**power) for power, (term, scale) in enumerate(parts, 1))


def independent_difference(accuracy: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Standard errors of the distances to the best, as of independent accuracies [n].

    Networks that are scored on the same images err on the same ones, so that their distance
    varies less than this: a group that is chosen by it is rather too large than too small.
    """
    return np.hypot(error, np.asarray(error)[int(np.argmax(accuracy))])


def critical_value(networks: int, confidence: float = CONFIDENCE) -> float:
    """The d of :func:`not_worse`: Gupta's constant over the square root of 2.

    Solves P(max of n - 1 standard normal variables - another one <= d sqrt 2) = confidence, for
    a confidence above a half.
    """
    if networks < 2:
        return 0.0
    z = np.linspace(-9.0, 9.0, NODES)
    weight = np.exp(-0.5 * z * z)
    weight /= weight.sum()
    low, high = 0.0, MOST_ERRORS
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _kept(z, weight, middle, networks) < confidence:
            low = middle
        else:
            high = middle
    return high


def _kept(z: np.ndarray, weight: np.ndarray, d: float, networks: int) -> float:
    """Probability that the best of equally good networks stays, at distance ``d``."""
    tail = np.array([math.erfc(-(value + d * math.sqrt(2)) / math.sqrt(2)) for value in z]) / 2
    return float(weight @ tail ** (networks - 1))
