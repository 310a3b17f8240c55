"""Validation images, decoded once: uint8 in memory, or in a file when they are too many."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import paddle
from tqdm import tqdm

from hnas.base.errors import UserError
from hnas.base.files import is_whole, replacing, write_digest
from hnas.dataset.image_folder import DataError, ImageList
from hnas.dataset.image_index import stamp_of
from hnas.dataset.loader import EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform

logger = logging.getLogger(__name__)

DECODE_BATCH = 64


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


def list_hash(images: ImageList, order: np.ndarray, size: int, times: bool = True) -> str:
    """Hash of which images are evaluated at which size, in which order.

    An image is its name, its size and its modification time: one that was replaced is another.
    Without ``times``, copies of the images on several machines are the same.

    Raises:
        DataError: an image is gone, or a link to nothing.
    """
    digest = hashlib.sha256(f"{size}\n".encode())
    for index in order:
        path = images.paths[index]
        try:
            stamp = stamp_of(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        digest.update(os.fsencode(f"{images.name(path)}\0{stamp if times else stamp[1]}\n"))
    return digest.hexdigest()


class DecodedImages:
    """Centre crops of images in a given order.

    Args:
        images: where they come from.
        order: indices into ``images``.
        size: height and width in px.
        limit_gb: most memory to take, GiB; more images go to a file in ``folder``.
        folder: for that file, which a later run with the same images uses again if its SHA-256
            is right.
        num_workers: decoding processes.
    """

    def __init__(
        self,
        images: ImageList,
        order: np.ndarray,
        size: int,
        limit_gb: float,
        folder: Path,
        num_workers: int = 0,
    ):
        self.hash = list_hash(images, order, size)
        self.labels = images.labels[order]
        self.size = size
        shape = (len(order), 3, size, size)
        if np.prod(shape, dtype=np.int64) <= limit_gb * 2**30:
            self.pixels = np.empty(shape, dtype=np.uint8)
            self._decode(images, order, size, num_workers)
            return
        path = folder / f"images-{self.hash[:16]}.u8"
        # The size first: the digest takes reading all of it.
        fits = path.is_file() and path.stat().st_size == np.prod(shape, dtype=np.int64)
        if not (fits and is_whole(path)):
            self._decode_to_file(path, shape, images, order, size, num_workers)
            write_digest(path)
        self.pixels = np.memmap(path, dtype=np.uint8, mode="r", shape=shape)
        logger.info("images of more than %g GiB: kept in %s", limit_gb, path)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, start: int, stop: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Images [N, 3, S, S] uint8 and labels [N] of the positions from ``start`` to ``stop``."""
        pixels = np.ascontiguousarray(self.pixels[start:stop])
        return paddle.to_tensor(pixels), paddle.to_tensor(self.labels[start:stop])

    def _decode(self, images, order, size, num_workers):
        dataset = ImageDataset(images.select(order), EvalTransform(size), seed=0)
        start = 0
        with tqdm(total=len(order), desc="decoding", unit="image") as progress:
            for pixels, _ in EvalLoader(dataset, DECODE_BATCH, num_workers):
                self.pixels[start : start + len(pixels)] = pixels.numpy()
                start += len(pixels)
                progress.update(len(pixels))

    def _decode_to_file(self, path, shape, images, order, size, num_workers):
        with replacing(path) as temporary:
            _reserve(temporary, int(np.prod(shape, dtype=np.int64)))
            self.pixels = np.memmap(temporary, dtype=np.uint8, mode="r+", shape=shape)
            self._decode(images, order, size, num_workers)
            self.pixels.flush()


def _reserve(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes that are there: writing to a mapping of others may be SIGBUS.

    Raises:
        UserError: the disk has not as many.
    """
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise UserError(
            f"cannot reserve {size / 2**30:.3g} GiB for decoded images in {path.parent}: "
            f"{error.strerror}; free them, raise cache_gb, or choose another save_dir"
        ) from None


class ImagesOnDemand:
    """As :class:`DecodedImages`, but decoded when a batch is asked for, and not kept.

    For one of several processes, which goes once through the images of its own chunks.
    """

    def __init__(self, images: ImageList, order: np.ndarray, size: int, num_workers: int = 0):
        self.hash = list_hash(images, order, size)
        self.labels = images.labels[order]
        self.size = size
        self._images = images.select(order)
        self._num_workers = num_workers

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, start: int, stop: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Images [N, 3, S, S] uint8 and labels [N] of the positions from ``start`` to ``stop``."""
        chosen = self._images.select(np.arange(start, stop))
        dataset = ImageDataset(chosen, EvalTransform(self.size), seed=0)
        parts = [pixels for pixels, _ in EvalLoader(dataset, DECODE_BATCH, self._num_workers)]
        return paddle.concat(parts), paddle.to_tensor(self.labels[start:stop])
