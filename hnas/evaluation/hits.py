"""Counting correct predictions, the same way in every engine."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import paddle

from hnas.base.errors import UserError
from hnas.evaluation.counts import Counts, by_fold

NEAR = 1e-4
"""Two logits this close may swap places in an engine that adds in another order; in float32.

For the record only: how far engines may differ is measured, see ``spot_check.py``.
"""


class LogitsError(UserError):
    """A network gives logits that are NaN or infinite, so it has no accuracy.

    Args:
        who: the network, e.g. ``architecture 1552...``.
        bad: images with such logits.
        images: how many were looked at.
    """

    def __init__(self, who: str, bad: int, images: int):
        super().__init__(
            f"{who} gives logits that are not finite for {bad} of {images} images, so it has no "
            "accuracy; use other weights or, where --amp overflows, --amp O0"
        )


class Hits(NamedTuple):
    """What :func:`count_hits` finds in several networks.

    Attributes:
        columns: ``top1``, ``top5``, ``near1``, ``near5`` of :class:`Counts`; int64 [networks, 4].
        folds: ``folds`` of :class:`Counts`; int64 [networks, FOLDS].
        bad: images that have a logit that is NaN or infinite, which callers refuse by
            :class:`LogitsError`; int64 [networks].
    """

    columns: np.ndarray
    folds: np.ndarray
    bad: np.ndarray

    def counts(self, images: int) -> Counts:
        """As counts over ``images`` images."""
        return Counts(*self.columns.T.copy(), images, self.folds)


def count_hits(logits: paddle.Tensor, labels: paddle.Tensor, first: int = 0) -> Hits:
    """Hits of several networks on the same images.

    An image is a top-k hit if fewer than k classes are ahead of its label. Ahead are the classes
    of larger logits and, of those with the same logit as the label, the ones of smaller index.
    An image with a logit that is NaN or infinite is no hit, whichever logit it is.

    Args:
        logits: float32 [networks, N, classes].
        labels: int64 [N].
        first: how many images were counted before these, which decides on their folds.
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
    columns = [column.sum(axis=1) for column in (top1, (ahead < 5) & ~bad, *near)]
    return Hits(np.stack(columns, axis=1), by_fold(top1, first), bad.sum(axis=1))


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
