"""Decoded images in a file: decoded once, read without a copy.

Other images, and what else is made of them, get another file. It is mapped into memory, which all
loader processes share, and is checked by its SHA-256 whenever it is opened.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hnas.base.files import file_digest, is_whole, remove_leftovers, replacing, write_digest
from hnas.dataset.image_folder import ImageList, decode_image, list_hash, on_all_cores

logger = logging.getLogger(__name__)

STORED = ".pixels"
"""Suffix of the files."""
SAMPLED = 16
"""Images whose pixels tell a list from another one of the same names, sizes and times."""
Make = Callable[[Image.Image], Image.Image]
"""What becomes of an image before it is kept; its ``repr`` says all of it."""


def decoded(images: ImageList, make: Make, bar: bool = True) -> Iterator[np.ndarray]:
    """What ``make`` makes of each image, uint8 [H, W, 3], in their order, on all cores.

    Raises:
        DataError: an image cannot be decoded.
    """
    title = f"decoding {images.folder}" if bar else ""
    return on_all_cores(lambda path: np.asarray(make(decode_image(path))), images.paths, title)


def sample_digest(images: ImageList) -> str:
    """SHA-256 of the pixels of some of the images, evenly spread over the list.

    Raises:
        DataError: one of them cannot be decoded.
    """
    digest = hashlib.sha256()
    for index in np.linspace(0, len(images) - 1, min(SAMPLED, len(images)), dtype=int):
        image = decode_image(images.paths[index])
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


class ImageStore:
    """What ``make`` makes of the images of a list, uint8 [H, W, 3], by index.

    Attributes:
        path: of the file: the pixels of all images, then height and width of each as int64.
        pixels: uint8, those of all images one after the other.

    Raises:
        DataError: an image cannot be decoded.
        UserError: the file cannot be written.
    """

    def __init__(self, images: ImageList, make: Make, folder: Path):
        remove_leftovers(folder)
        # Before they are decoded, so that one that changes meanwhile is another to later runs.
        about = f"{make} {str(images.folder.resolve())!r} {sample_digest(images)}"
        key = list_hash(images, range(len(images)), about)
        self.path = folder / f"{key[:32]}{STORED}"
        if not is_whole(self.path):
            if self.path.exists():
                logger.warning("%s is damaged: decoding the images again", self.path)
            self._build(images, make)
        content = np.memmap(self.path, dtype=np.uint8, mode="r")
        self.pixels, tail = np.split(content, [-16 * len(images)])
        self._sizes = np.frombuffer(tail.tobytes(), np.int64).reshape(-1, 2)
        self._ends = np.cumsum(3 * self._sizes.prod(axis=1))
        logger.info("decoded images: %s, %.2f GiB", self.path, len(content) / 2**30)

    def __getitem__(self, index: int) -> np.ndarray:
        height, width = self._sizes[index].tolist()
        end = int(self._ends[index])
        return self.pixels[end - 3 * height * width : end].reshape(height, width, 3)

    def _build(self, images: ImageList, make: Make) -> None:
        sizes = []
        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            for pixels in decoded(images, make):
                file.write(pixels.tobytes())
                sizes.append(pixels.shape[:2])
            file.write(np.array(sizes, dtype=np.int64).tobytes())
            file.flush()
            digest = file_digest(temporary)
        write_digest(self.path, digest)
