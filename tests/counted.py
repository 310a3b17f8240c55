"""Counts of architectures that are right about given images."""

import numpy as np

from hnas.evaluation.counts import Counts
from hnas.ranking.agreement import FOLDS


def counts_of(right, top5=None, near1=None, near5=None) -> Counts:
    """Of which images [architectures, N] each is right about; near ties are none unless given."""
    right = np.asarray(right, dtype=bool)
    images = right.shape[1]
    top1 = right.sum(axis=1)
    folds = np.stack([right[:, fold::FOLDS].sum(axis=1) for fold in range(FOLDS)], axis=1)
    none = np.zeros_like(top1)
    columns = (top1, top1 if top5 is None else top5, near1, near5)
    return Counts(*(np.array(none if c is None else c) for c in columns), images, folds)


def first_ones(numbers, images: int) -> np.ndarray:
    """Right about the first so many images; bool [architectures, images]."""
    return np.arange(images) < np.reshape(numbers, [-1, 1])
