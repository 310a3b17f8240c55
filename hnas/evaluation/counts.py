"""How many images networks classify correctly: counted the same way in every engine, and summed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle

from hnas.base.errors import UserError
from hnas.ranking.agreement import FOLDS

NEAR = 1e-4
"""Logits this close may swap places where sums are in another order; for the record only."""


class LogitsError(UserError):
    """``who``, a network, gives logits that are NaN or infinite, or would by rights, for ``bad`` of
    the ``images`` that were looked at; it has no accuracy. ``what`` says in words what it gives."""

    def __init__(self, who: str, bad: int, images: int, what: str = "logits that are not finite"):
        super().__init__(
            f"{who} gives {what} for {bad} of {images} images, so it has no accuracy; use other "
            "weights or, where --amp overflows, --amp O0"
        )


@dataclass
class Counts:
    """How many images each of several architectures classifies correctly.

    Attributes:
        top1: images whose label has the largest logit; int64 [architectures].
        top5: images whose label is among the five largest logits; int64 [architectures].
        near1: images whose top-1 hit or miss hangs on logits within :data:`NEAR` of the label's;
            int64 [architectures]. In float32 engines differ by few more hits, if any.
        near5: the same for ``top5``.
        images: how many images each architecture has classified.
        folds: ``top1`` by fold; int64 [architectures, FOLDS]. Of the images counted here the i-th
            (from 0) is in fold i modulo FOLDS.
    """

    top1: np.ndarray
    top5: np.ndarray
    near1: np.ndarray
    near5: np.ndarray
    images: int
    folds: np.ndarray

    @classmethod
    def zeros(cls, architectures: int) -> Counts:
        """Before the first image."""
        columns = np.zeros((4, architectures), dtype=np.int64)
        return cls(*columns, 0, np.zeros((architectures, FOLDS), dtype=np.int64))

    def add(self, more: Counts) -> None:
        """Add the same architectures' counts over the images that follow."""
        for own, others in zip(self.columns(), more.columns(), strict=True):
            own += others
        self.folds += np.roll(more.folds, self.images % FOLDS, axis=1)
        self.images += more.images

    def first(self, number: int) -> Counts:
        """Those of the first architectures alone."""
        columns = (column[:number] for column in self.columns())
        return Counts(*columns, self.images, self.folds[:number])

    def columns(self) -> tuple[np.ndarray, ...]:
        """``top1``, ``top5``, ``near1`` and ``near5``."""
        return self.top1, self.top5, self.near1, self.near5

    def accuracy(self) -> np.ndarray:
        """Top-1 accuracies, 0 to 1; float64 [architectures]."""
        return self.top1 / max(1, self.images)

    def top5_accuracy(self) -> np.ndarray:
        """Top-5 accuracies, float64."""
        return self.top5 / max(1, self.images)

    def standard_error(self) -> np.ndarray:
        """Standard errors of accuracies as estimates for more such images; float64 [architectures].

        Those of a binomial proportion, sqrt(p * (1 - p) / images), at Laplace's estimate
        p = (hits + 1) / (images + 2): with the observed p, a few images that are all hits, or all
        misses, would give an error of 0.
        """
        rate = (self.top1 + 1) / (self.images + 2)
        return np.sqrt(rate * (1 - rate) / max(1, self.images))


def count_hits(
    logits: paddle.Tensor, labels: paddle.Tensor, first: int = 0
) -> tuple[Counts, np.ndarray]:
    """Hits of several networks on the same images.

    An image is a top-k hit if fewer than k classes are ahead of its label. Ahead are the classes
    of larger logits and, of those with the same logit as the label, the ones of smaller index.
    An image with a logit that is NaN or infinite is no hit, whichever logit it is.

    Args:
        logits: float32 [networks, N, classes].
        labels: int64 [N].
        first: how many images were counted before these, which decides on their folds.

    Returns:
        :class:`Counts` of the networks; and of each the images that have a logit that is NaN or
        infinite, which callers refuse by :class:`LogitsError`: int64 [networks].
    """
    networks, images, _ = logits.shape
    bad = _not_finite(logits)
    index = labels.reshape([1, images, 1]).expand([networks, images, 1])
    own = paddle.take_along_axis(logits, index, axis=2)
    fewest_ahead = _count(logits > own + NEAR)
    # Without the label itself; not smaller, since of large logits NEAR is less than a rounding.
    most_ahead = _count(logits >= own - NEAR) - 1
    near = [((fewest_ahead < k) != (most_ahead < k)) & ~bad for k in (1, 5)]
    # The exact number matters only where a hit depends on it, which is rare.
    ahead = fewest_ahead.copy()
    for network, image in np.argwhere(near[0] | near[1]):
        label = int(labels[image])
        values = logits[network, image].numpy()
        ties = (values[:label] == values[label]).sum()
        ahead[network, image] = (values > values[label]).sum() + ties
    top1 = (ahead < 1) & ~bad
    columns = (column.sum(axis=1) for column in (top1, (ahead < 5) & ~bad, *near))
    return Counts(*columns, images, by_fold(top1, first)), bad.sum(axis=1)


def by_fold(hits: np.ndarray, first: int) -> np.ndarray:
    """Hits, bool [architectures, N], by fold: int64 [architectures, FOLDS].

    ``first`` is how many images were counted before these.
    """
    architectures, images = hits.shape
    ahead = first % FOLDS
    padded = np.zeros((architectures, -(-(ahead + images) // FOLDS) * FOLDS), dtype=bool)
    padded[:, ahead : ahead + images] = hits
    return padded.reshape(architectures, -1, FOLDS).sum(axis=1)


def _not_finite(logits: paddle.Tensor) -> np.ndarray:
    """Which images [networks, N] have a logit that is NaN or infinite."""
    # Neither vanishes from a sum, so one cheap pass finds them.
    suspects = ~np.isfinite(_sum(logits).numpy())
    if not suspects.any():
        return suspects
    # Large finite logits may add up to infinity, too.
    return ~paddle.isfinite(logits).all(axis=2).numpy()


def _count(condition: paddle.Tensor) -> np.ndarray:
    return _sum(condition.astype("float32")).numpy().astype(np.int64)


def _sum(x: paddle.Tensor) -> paddle.Tensor:
    # As a product, which MKL does several times as fast as Paddle sums; of numbers 0 and 1 it is
    # exact up to 2**24.
    return x @ paddle.ones([x.shape[2]])
