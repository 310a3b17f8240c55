"""Counting correct predictions, the same way in every engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle

NEAR = 1e-4
"""Logits closer than this may swap under another order of summation."""


@dataclass
class Counts:
    """Per architecture, int64 [architectures]; ``images`` is how many each has seen.

    ``near1`` and ``near5`` count the images whose top-1 or top-5 hit hangs on logits that differ
    by less than ``NEAR``: only there may engines disagree.
    """

    top1: np.ndarray
    top5: np.ndarray
    near1: np.ndarray
    near5: np.ndarray
    images: int = 0

    @classmethod
    def zeros(cls, architectures: int) -> Counts:
        return cls(*np.zeros((4, architectures), dtype=np.int64))

    def add(self, more: Counts) -> None:
        """Take in the counts over other images."""
        for own, others in zip(self.columns(), more.columns(), strict=True):
            own += others
        self.images += more.images

    def columns(self) -> tuple[np.ndarray, ...]:
        return self.top1, self.top5, self.near1, self.near5

    def accuracy(self) -> np.ndarray:
        """Top-1 accuracies, float64."""
        return self.top1 / max(1, self.images)

    def standard_error(self) -> np.ndarray:
        """Of the accuracies, as estimates for all images of the kind.

        Binomial, at the accuracy (hits + 1) / (images + 2), so that a perfect or hopeless start
        does not pass for certainty.
        """
        rate = (self.top1 + 1) / (self.images + 2)
        return np.sqrt(rate * (1 - rate) / max(1, self.images))


def count_hits(logits: paddle.Tensor, labels: paddle.Tensor) -> np.ndarray:
    """Hits of several networks on the same images.

    Args:
        logits: float32 [networks, N, classes].
        labels: int64 [N].

    Returns:
        int64 [networks, 4]: top-1 hits, top-5 hits, near ties of each.

    A label ranks behind every class of a larger logit, and behind those of an equal logit and a
    smaller index.
    """
    networks, images, _ = logits.shape
    index = labels.reshape([1, images, 1]).expand([networks, images, 1])
    own = paddle.take_along_axis(logits, index, axis=2)
    best = _count(logits > own + NEAR)
    worst = _count(logits > own - NEAR) - 1  # without the label itself
    near = [(best < k) != (worst < k) for k in (1, 5)]
    rank = best.copy()
    for network, image in np.argwhere(near[0] | near[1]):
        label = int(labels[image])
        values = logits[network, image].numpy()
        ahead = (values > values[label]).sum() + (values[:label] == values[label]).sum()
        rank[network, image] = ahead
    columns = [rank < 1, rank < 5, *near]
    return np.stack([column.sum(axis=1) for column in columns], axis=1).astype(np.int64)


def _count(condition: paddle.Tensor) -> np.ndarray:
    # In float32, exact up to 2**24: Paddle's sums of integers take five times as long.
    return condition.astype("float32").sum(axis=2).numpy().astype(np.int64)
