"""How well a ranking by the first images agrees with the ranking by all images of the list.

All architectures see the same images, so an image that is hard for all of them moves all
accuracies and no ranks. What ranks depend on shows when the images are halved: both halves rank
the same architectures, and where they disagree images decide.

**What is estimated.** tau-b between the accuracies over the first n images and those over all N
images of the list, of these architectures. It is a property of this list, not of all images that
there might be, so it is exactly 1 when n = N.

**How.** Hits are counted in 16 folds, by an image's position in the list modulo 16. The list's
order is drawn, so the folds are random samples, and so is what will follow. There are 15 ways of
halving the folds such that any two have half of each half in common: the rows of a Hadamard matrix
(balanced half-samples, McCarthy 1969). The differences between the halves are uncorrelated from way
to way, and with the images to come. So there are 15 draws of what the choice of images does to this
ranking. Each of them is corrected for length:

1. tau of the rankings by the two halves gives the correlation of their accuracies,
   r = sin(pi / 2 tau), as for bivariate normal scores.
2. An error model, accuracy over m images = true accuracy + error with variance v / m, gives the
   ratio x = v / (variance of the true accuracies) from r^2 = 1 / ((1 + x / m1) (1 + x / m2)). (With
   m1 = m2, n images would correlate with n others by Spearman's and Brown's 2 r / (1 + r).)
3. The first n images are among the N, so the correlation of both accuracies is
   sqrt((1 + x / N) / (1 + x / n)): 1 at the end, and sqrt(n / N) where images see no difference.
4. Back to tau = 2 / pi asin(correlation).
5. Of the pairs that differ in some fold a share is equal over the first n images, which tau-b
   leaves out: tau-b = tau / sqrt(1 - share).

Near 1 neither normal scores nor equal errors are needed: disagreements are in proportion to the
errors' size and to how many architectures are nearly equal, and the second is the same on both
sides. The tau of step 1 is tau-a over the pairs that differ in some fold: a pair that is equal in a
half agrees and disagrees to equal parts. Half of the images have more such pairs than the whole,
which tau-b would leave out of both numbers. Where equal pairs are many, the estimate is a little
small.

The estimate is the mean over the 15 ways. The interval is for a further draw, which is what the
images to come are: mean +- t sqrt(s^2 (2 + 1 / 15) + (2 / pairs)^2) with the ways' variance s^2 and
Student's t (0.975, 14 degrees of freedom). A draw has up to twice that variance: two halves
disagree about a pair when either is on the wrong side, the list only when the first images are, so
that half as many disagreements scatter more. The last term is one pair, for few architectures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hnas.ranking.correlations import concordance, none_if_nan

FOLDS = 16
"""Folds of the images; a power of two."""
FEWEST_IMAGES = 2 * FOLDS
"""With fewer, nothing is said."""
STUDENT = 2.1448
"""Student's t, two-sided 95 %, 14 degrees of freedom."""


@dataclass(frozen=True)
class Agreement:
    """Expected tau-b with the ranking by all images, and the ends of its 95 % interval.

    Attributes:
        tau: -1 to 1, as are the others.
        low, high: the interval.
    """

    tau: float
    low: float
    high: float


def fold_sizes(images: int) -> np.ndarray:
    """How many of the first ``images`` images are in each fold; int64 [FOLDS]."""
    return np.bincount(np.arange(images) % FOLDS, minlength=FOLDS)


def halvings() -> np.ndarray:
    """Which folds are in the first half, for each way of halving them; bool [FOLDS - 1, FOLDS].

    A Hadamard matrix (Sylvester 1867) without its constant row: fold f is in the first half of
    way w if the numbers w and f have an odd number of bits in common.
    """
    common = np.arange(1, FOLDS)[:, None] & np.arange(FOLDS)
    return np.array([[number.bit_count() % 2 == 1 for number in row] for row in common.tolist()])


def expected_agreement(folds: np.ndarray, images: int, of_images: int) -> Agreement | None:
    """Expected tau-b of the ranking by the first images with that by all images.

    Args:
        folds: hits by fold, int64 [architectures, FOLDS].
        images: how many images have been seen.
        of_images: how many the list has.

    Returns:
        None where it is not defined: with fewer than ``FEWEST_IMAGES`` images, or where all
        accuracies are equal.
    """
    if images == of_images:
        return Agreement(1.0, 1.0, 1.0)
    if images < FEWEST_IMAGES:
        return None
    pairs, unequal = different_pairs(folds), different_pairs(folds.sum(axis=1))
    if not unequal:
        return None
    sizes = fold_sizes(images)
    taus = np.empty(FOLDS - 1)
    for way, first in enumerate(halvings()):
        found = concordance(folds[:, first].sum(axis=1), folds[:, ~first].sum(axis=1))
        halves = int(sizes[first].sum()), int(sizes[~first].sum())
        taus[way] = corrected_for_length(found.excess / pairs, halves, images, of_images)
    taus = np.minimum(1.0, taus * math.sqrt(pairs / unequal))
    tau, variance = taus.mean(), taus.var(ddof=1)
    width = STUDENT * math.sqrt(variance * (2 + 1 / len(taus)) + (2 / pairs) ** 2)
    return Agreement(float(tau), max(-1.0, float(tau - width)), min(1.0, float(tau + width)))


def different_pairs(rows: np.ndarray) -> int:
    """How many pairs of rows of an array are not the same."""
    _, same = np.unique(rows, axis=0, return_counts=True)
    return (len(rows) * (len(rows) - 1) - int((same * (same - 1)).sum())) // 2


def corrected_for_length(tau: float, halves: tuple[int, int], images: int, of_images: int) -> float:
    """tau-b of ``images`` images with the ``of_images`` that they are among.

    Args:
        tau: of the rankings by two halves of the former.
        halves: how many images each of them has.
        images, of_images: as of :func:`expected_agreement`.
    """
    correlation = max(math.sin(math.pi / 2 * tau), 1e-6)
    one, other = halves
    # The positive root of (1 + x / one) (1 + x / other) = 1 / correlation^2.
    square, linear = 1 / (one * other), 1 / one + 1 / other
    excess = 1 / correlation**2 - 1
    ratio = 2 * excess / (linear + math.sqrt(linear**2 + 4 * square * excess))
    shared = math.sqrt((1 + ratio / of_images) / (1 + ratio / images))
    return 2 / math.pi * math.asin(min(1.0, shared))


def agreement_record(agreement: Agreement | None, of_images: int) -> dict:
    """What ``estimates.json`` holds of it; null where it is not defined."""
    numbers = agreement or Agreement(math.nan, math.nan, math.nan)
    ends = {"tau": numbers.tau, "low": numbers.low, "high": numbers.high}
    return {"images": of_images, **{end: none_if_nan(round(v, 6)) for end, v in ends.items()}}
