"""How many images each architecture classifies correctly; without Paddle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hnas.ranking.agreement import FOLDS
from hnas.ranking.front import error_of_hits


@dataclass
class Counts:
    """How many images each of several architectures classifies correctly.

    Attributes:
        top1: images whose label has the largest logit; int64 [architectures].
        top5: images whose label is among the five largest logits; int64 [architectures].
        near1: images whose top-1 hit or miss hangs on logits within ``hits.NEAR`` of the label's;
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
        """See :func:`error_of_hits`; float64 [architectures]."""
        return error_of_hits(self.top1, self.images)


def by_fold(hits: np.ndarray, first: int) -> np.ndarray:
    """Hits by fold; int64 [architectures, FOLDS].

    Args:
        hits: whether each architecture is right about each image; bool [architectures, N].
        first: how many images were counted before these.
    """
    architectures, images = hits.shape
    ahead = first % FOLDS
    padded = np.zeros((architectures, -(-(ahead + images) // FOLDS) * FOLDS), dtype=bool)
    padded[:, ahead : ahead + images] = hits
    return padded.reshape(architectures, -1, FOLDS).sum(axis=1)
