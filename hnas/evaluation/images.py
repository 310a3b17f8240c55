"""Validation images to score on, decoded once: uint8 in memory, or in a file if they are many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from hnas.dataset.image_folder import ImageList, list_hash
from hnas.dataset.image_store import ImageStore, decoded
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


class ImagesOnDemand:
    """Centre crops of images in a given order, decoded when a batch is asked for, and not kept.

    For one of several processes, which goes once through the images of its own chunks.

    Args:
        images: where they come from.
        order: indices into ``images``.
        size: height and width in px.

    Attributes:
        hash: of which images these are, see :func:`list_hash`.
        labels: int64, in that order.
    """

    def __init__(self, images: ImageList, order: np.ndarray, size: int):
        self.hash = list_hash(images, order, size)
        self.labels = images.labels[order]
        self.size = size
        self._images, self._crop = images.select(order), CentreCrop(size)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, start: int, stop: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Images [N, 3, S, S] uint8 and labels [N] of the positions from ``start`` to ``stop``."""
        pixels = np.ascontiguousarray(self._pixels(start, stop))
        return paddle.to_tensor(pixels), paddle.to_tensor(self.labels[start:stop])

    def _pixels(self, start: int, stop: int) -> np.ndarray:
        chosen = self._images.select(np.arange(start, min(stop, len(self))))
        return np.stack([*decoded(chosen, self._crop, bar=False)]).transpose(0, 3, 1, 2)


class DecodedImages(ImagesOnDemand):
    """As :class:`ImagesOnDemand`, but all are decoded now.

    Args:
        limit_gb: most memory to take, GiB; more images go to a file in ``folder``.
        folder: for that file, which a later run with the same images uses again.

    Attributes:
        pixels: uint8 [N, 3, S, S].
    """

    def __init__(
        self, images: ImageList, order: np.ndarray, size: int, limit_gb: float, folder: Path
    ):
        super().__init__(images, order, size)
        shape = len(order), size, size, 3
        if math.prod(shape) <= limit_gb * 2**30:
            pixels = np.empty(shape, dtype=np.uint8)
            for index, crop in enumerate(decoded(self._images, self._crop)):
                pixels[index] = crop
        else:
            pixels = ImageStore(self._images, self._crop, folder).pixels.reshape(shape)
        self.pixels = pixels.transpose(0, 3, 1, 2)

    def _pixels(self, start: int, stop: int) -> np.ndarray:
        return self.pixels[start:stop]


@dataclass(frozen=True)
class Batches:
    """All images in their order, ``size`` at a time, as often as it is iterated."""

    images: ImagesOnDemand
    size: int

    def __iter__(self) -> Iterator[tuple[paddle.Tensor, paddle.Tensor]]:
        for start in range(0, len(self.images), self.size):
            yield self.images.batch(start, start + self.size)
