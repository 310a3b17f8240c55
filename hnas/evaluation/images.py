"""Validation images to score on, decoded once: uint8 in memory, or in a file if they are many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from hnas.dataset.image_folder import ImageList, list_hash
from hnas.dataset.image_store import ImageStore, decoded, sample_digest
from hnas.dataset.transforms import CentreCrop


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random order of all images of which every prefix holds the classes in equal shares.

    One image of each class, in random order, then the next of each: the first N images are a
    class-balanced sample, so that an evaluation may stop anywhere.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        own = shuffled[labels[shuffled] == label]
        turn[own] = np.arange(len(own))
    position = np.empty(len(labels), dtype=np.int64)
    position[rng.permutation(len(labels))] = np.arange(len(labels))
    return np.lexsort((position, turn))


class ScoredImages:
    """Centre crops of images in a given order.

    They are decoded now; or, without a ``folder``, when a batch is asked for, and not kept: for one
    of several processes, which goes once through the images of its own chunks.

    Args:
        images: where they come from.
        order: indices into ``images``.
        size: height and width in px.
        folder: for a file, which a later run with the same images uses again.
        limit_gb: most memory to take, GiB; more images go to that file.

    Attributes:
        hash: of which images these are, see :func:`list_hash`.
        copies: the same without times, which copies of the images have as well.
        sample: of the pixels of some, see :func:`sample_digest`.
        labels: int64, in that order.

    Raises:
        DataError: an image cannot be decoded.
    """

    def __init__(
        self,
        images: ImageList,
        order: np.ndarray,
        size: int,
        folder: Path | None = None,
        limit_gb: float = 0.0,
    ):
        self._images, self._crop = images.select(order), CentreCrop(size)
        # Before they are decoded, so that one that changes meanwhile is another to later runs.
        self.hash = list_hash(images, order, size)
        self.copies = list_hash(images, order, size, times=False)
        self.sample = sample_digest(self._images)
        self.labels = images.labels[order]
        self.size = size
        self._kept = None if folder is None else self._all(folder, limit_gb)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, start: int, stop: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Images [N, 3, S, S] uint8 and labels [N] of the positions from ``start`` to ``stop``."""
        if self._kept is None:
            chosen = self._images.select(np.arange(start, min(stop, len(self))))
            pixels = np.stack([*decoded(chosen, self._crop, bar=False)])
        else:
            pixels = self._kept[start:stop]
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return paddle.to_tensor(pixels), paddle.to_tensor(self.labels[start:stop])

    def _all(self, folder: Path, limit_gb: float) -> np.ndarray:
        """The crops, uint8 [N, S, S, 3]."""
        shape = len(self), self.size, self.size, 3
        if math.prod(shape) > limit_gb * 2**30:
            return ImageStore(self._images, self._crop, folder).pixels.reshape(shape)
        pixels = np.empty(shape, dtype=np.uint8)
        for index, crop in enumerate(decoded(self._images, self._crop)):
            pixels[index] = crop
        return pixels


@dataclass(frozen=True)
class Batches:
    """All images in their order, ``size`` at a time, as often as it is iterated."""

    images: ScoredImages
    size: int

    def __iter__(self) -> Iterator[tuple[paddle.Tensor, paddle.Tensor]]:
        for start in range(0, len(self.images), self.size):
            yield self.images.batch(start, start + self.size)
