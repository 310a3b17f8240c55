"""Decoded training images in a file: decoded and made smaller once, read without a copy.

The file lies in a cache folder under a name that stands for the images (names, sizes, modification
times) and the storage size, so other images get another file. It is mapped into memory, which all
loader processes share, and may be larger than memory. A table beside it holds where each image
lies and a SHA-256 of both, which is checked whenever it is opened; a damaged file is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from hnas.base.files import (
    ArraysError,
    check_writable,
    file_digest,
    read_arrays,
    remove_leftovers,
    replacing,
)
from hnas.dataset.image_folder import DataError, ImageList, decode_image
from hnas.dataset.image_index import cache_folder, stamp_of

logger = logging.getLogger(__name__)

# Images that wait, decoded, for their turn to be written.
AHEAD_PER_CORE = 8
# What a table of no image may take, and the longest side of an image that is not refused.
MOST_BYTES, MOST_SIDE = 2**16, 2**27


def has_pixels(folder: str | Path) -> bool:
    """Whether a cache folder holds decoded images, so that it may never be written."""
    return any(Path(folder).glob("*.pixels"))


def _digest(pixels: str, table: np.ndarray) -> str:
    return hashlib.sha256(pixels.encode() + table.tobytes()).hexdigest()


class PixelCache:
    """The images of a list, uint8 [H, W, 3], by index.

    Args:
        images: what to keep.
        storage_size: longest shorter side, in px; larger images are made smaller to it, keeping
            their aspect, others stay as they are.
        folder: where the file goes; None: the user's cache folder.

    Raises:
        DataError: an image cannot be read.
        UserError: the file cannot be written.
    """

    def __init__(self, images: ImageList, storage_size: int, folder: Path | None = None):
        self.images = images
        self.storage_size = storage_size
        remove_leftovers(folder or cache_folder())
        self.path = (folder or cache_folder()) / f"{self._key()}.pixels"
        self._table = self._read_table()
        if self._table is None:
            self._table = self._build()
        self._pixels = np.memmap(self.path, dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        start, height, width = self._table[index].tolist()
        return self._pixels[start : start + height * width * 3].reshape(height, width, 3)

    @property
    def _table_path(self) -> Path:
        return self.path.with_suffix(".npz")

    def _key(self) -> str:
        digest = hashlib.sha256(f"{self.storage_size}".encode())
        for path in self.images.paths:
            try:
                stamp = stamp_of(path)
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}") from None
            digest.update(os.fsencode(f"\0{self.images.name(path)}\0{stamp}"))
        return digest.hexdigest()[:32]

    def _read_table(self) -> np.ndarray | None:
        """Where the images lie, if file and table are there and whole."""
        try:
            content = read_arrays(self._table_path, MOST_BYTES + 24 * len(self.images))
            table, digest = content["table"], str(content["sha256"])
            if self._fits(table) and _digest(file_digest(self.path), table) == digest:
                logger.info("decoded images: %s", self.path)
                return table
            logger.warning("%s is damaged: decoding the images again", self.path)
        except FileNotFoundError:
            pass
        except (OSError, KeyError, ArraysError) as error:
            logger.warning("%s cannot be used (%s): decoding again", self._table_path, error)
        return None

    def _fits(self, table: np.ndarray) -> bool:
        """Whether a table is of as many images that fill the file one after the other."""
        if table.dtype != np.int64 or table.shape != (len(self.images), 3):
            return False
        starts, heights, widths = table.T
        sides = table[:, 1:]
        if (sides < 1).any() or (sides > MOST_SIDE).any():
            return False
        ends = np.cumsum(heights * widths * 3)
        is_dense = np.array_equal(starts, np.concatenate([[0], ends[:-1]]))
        return is_dense and self.path.is_file() and self.path.stat().st_size == ends[-1]

    def _build(self) -> np.ndarray:
        """Decode all images, on all cores, and write them in their order."""
        check_writable(self.path.parent, "--cache_dir")
        table, end = np.zeros((len(self.images), 3), dtype=np.int64), 0
        cores = os.cpu_count() or 1
        bar = tqdm(desc=f"decoding {self.images.folder}", total=len(self.images), unit="image")
        with replacing(self.path) as temporary:
            with open(temporary, "wb") as file, ThreadPoolExecutor(cores) as pool, bar:
                paths = self.images.paths
                step = AHEAD_PER_CORE * cores
                for first in range(0, len(paths), step):
                    chunk = pool.map(self._shrunk, paths[first : first + step])
                    for index, pixels in enumerate(chunk, first):
                        table[index] = end, *pixels.shape[:2]
                        file.write(pixels.tobytes())
                        end += pixels.size
                        bar.update()
            digest = _digest(file_digest(temporary), table)
        with replacing(self._table_path) as temporary, open(temporary, "wb") as file:
            np.savez(file, table=table, sha256=np.array(digest))
        logger.info("decoded images: %s, %.2f GiB", self.path, end / 2**30)
        return table

    def _shrunk(self, path: Path) -> np.ndarray:
        image = decode_image(path)
        scale = self.storage_size / min(image.size)
        if scale < 1:
            size = [max(1, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BILINEAR)
        return np.asarray(image)
