"""ImageNet-style folders: ``ROOT/train/CLASS/*`` and ``ROOT/val/CLASS/*``."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from hnas.base.errors import UserError, word_of
from hnas.base.files import check_regular

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

LISTED = 10
ENDINGS = ".jpeg .jpg .jpe .jfif .png .apng .bmp .webp .gif .tif .tiff .ppm .pgm .pbm .pnm"
IMAGE_SUFFIXES = frozenset(ENDINGS.split())
# Pillow would open far more than images, e.g. EPS by running Ghostscript. Many an image of the web
# has another format than its suffix says.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
HEADERS = 10_000
"""Most images that are opened at the start, to say how many have transparency."""
MAX_ASPECT = 100
"""Longer side over shorter side. Resizing makes the shorter side some 256 px, whatever it was."""
AHEAD_PER_CORE = 8
"""Images that wait, decoded, for their turn."""


class DataError(UserError):
    """An image folder or image that cannot be used; the message names the path."""


@dataclass(frozen=True)
class ImageList:
    """The images of one split.

    Attributes:
        folder: the split's folder.
        classes: class names, sorted; a label is an index into them.
        paths: files, by class and then by name.
        labels: int64 [number of images].
    """

    folder: Path
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: list[int] | np.ndarray) -> ImageList:
        """The images at ``indices``, in that order."""
        paths = tuple(self.paths[index] for index in indices)
        return ImageList(self.folder, self.classes, paths, self.labels[indices])

    def name(self, path: Path) -> str:
        """``CLASS/FILE`` of an image."""
        return str(path)[len(str(self.folder)) + 1 :]

    def digest(self) -> str:
        """SHA-256 of the images' names: which image has which index."""
        return hashlib.sha256(os.fsencode("\0".join(map(self.name, self.paths)))).hexdigest()


def scan_images(
    root: str | Path, split: str, verify: bool = False, bad_images: str = "fatal"
) -> ImageList:
    """List the images of ``root/split``.

    Hidden files and folders, whose names begin with a dot, are ignored: macOS and Jupyter leave
    such beside images. Links to folders are followed once, not into deeper folders, so a loop of
    links ends.

    Args:
        verify: decode every image now, rather than when it is needed.
        bad_images: ``fatal``, or ``skip`` to verify and leave out those that cannot be decoded.

    Raises:
        DataError: the folder is missing, or holds no class, or a class has no image, or images
            cannot be decoded (at most ten are listed, the log has all).
    """
    root = Path(root)
    folder = root / split
    if not root.is_dir():
        raise DataError(f"image_dir {root} is not a folder")
    if not folder.is_dir():
        whole = root / "train" if (root / "train").is_dir() else root
        raise DataError(
            f"image_dir {root} has no folder {split}/ (expected {split}/CLASS/*.jpg); python -m "
            f"hnas.tools.split_folder --images {whole} --output DIR makes both of {whole}/CLASS/*"
        )
    try:
        images = _list_images(folder)
        if logger.isEnabledFor(logging.INFO):  # of several processes one tells
            _tell_transparent(images)
        if verify or bad_images == "skip":
            images = _leave_out_bad(images, bad_images)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename or folder}: {error.strerror or error}"
        ) from error
    return images


def _list_images(folder: Path) -> ImageList:
    classes, paths, labels = [], [], []
    left_out: Counter[str] = Counter()
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_symlink() and not os.path.exists(path):
            logger.warning("left out %s: a symbolic link in a loop or to nothing", path)
        elif path.is_dir():
            shown = sorted(file for file in os.listdir(path) if not file.startswith("."))
            images = [file for file in shown if _ending(file) in IMAGE_SUFFIXES]
            if not images:
                raise DataError(f"class folder {path} has no images ({ENDINGS}); fill or remove it")
            left_out.update(end for end in map(_ending, shown) if end not in IMAGE_SUFFIXES)
            paths += [path / image for image in images]
            labels += [len(classes)] * len(images)
            classes.append(name)
    if not classes:
        raise DataError(f"{folder} has no class folders (expected {folder.name}/CLASS/*.jpg)")
    if left_out:
        kinds = [f"{number} {end[:10] or 'none'!r}" for end, number in left_out.most_common(LISTED)]
        told = f"left out of its class folders by their endings: {', '.join(kinds)}"
        logger.warning("%s: %s; read are %s", folder, told, ENDINGS)
    return ImageList(folder, tuple(classes), tuple(paths), np.asarray(labels, dtype=np.int64))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _tell_transparent(images: ImageList) -> None:
    """Log how many images have transparency, as their headers say; of very many, of a part."""
    paths = [path for path in images.paths if not str(path).lower().endswith((".jpeg", ".jpg"))]
    paths = paths[:: 1 + len(paths) // HEADERS]
    if number := sum(on_all_cores(_has_transparency, paths)):
        told = "%s: %d of %d images that are no JPEG have transparency, behind which is white"
        logger.info(told, images.folder, number, len(paths))


def _has_transparency(path: Path) -> bool:
    try:
        check_regular(path)
        with Image.open(path, formats=FORMATS) as image:
            return image.has_transparency_data
    except Exception:
        return False  # what is wrong with it is said when it is decoded


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/pinas`` or ``~/.cache/pinas``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pinas"


def on_all_cores(
    work: Callable[[Path], Result], paths: Sequence[Path], title: str = ""
) -> Iterator[Result]:
    """``work`` of each path, in order, by as many threads as there are cores; few are ahead.

    Pillow decodes outside of Python's lock. ``title`` is a progress bar's; empty: none.
    """
    cores = os.cpu_count() or 1
    step = AHEAD_PER_CORE * cores
    bar = tqdm(desc=title, total=len(paths), unit="image", disable=not title)
    with ThreadPoolExecutor(cores) as pool, bar:
        try:
            for first in range(0, len(paths), step):
                for result in pool.map(work, paths[first : first + step]):
                    bar.update()
                    yield result
        except BaseException:
            # A signal: leaving the pool would wait for what is queued.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fault(path: Path) -> str:
    """Why an image cannot be decoded; empty: it can."""
    try:
        decode_image(path)
    except DataError as error:
        return str(error)
    return ""


def _leave_out_bad(images: ImageList, bad_images: str) -> ImageList:
    faults = [*on_all_cores(_fault, images.paths, f"verifying {images.folder}")]
    bad = [path for path, fault in zip(images.paths, faults, strict=True) if fault]
    if not bad:
        return images
    listed = ", ".join(map(str, bad[:LISTED])) + (", ..." if len(bad) > LISTED else "")
    if bad_images == "fatal":
        for fault in filter(None, faults):
            logger.warning("%s", fault)
        told = f"{len(bad)} images cannot be decoded: {listed}"
        raise DataError(f"{told}; replace or remove them, or pass --bad_images skip")
    told = "left out %d of %d images, which cannot be decoded: %s; --bad_images fatal says why"
    logger.warning(told, len(bad), len(images), listed)
    left = images.select([index for index, fault in enumerate(faults) if not fault])
    for label in set(range(len(images.classes))) - set(left.labels.tolist()):
        raise DataError(f"no image of class {images.classes[label]!r} can be decoded")
    return left


def check_class_names(
    train: Sequence[str], train_folder: Path, val: Sequence[str], val_folder: Path
) -> None:
    """Labels of both splits must mean the same classes.

    Raises:
        DataError: naming the first class that only one of them has.
    """
    pairs = (train, train_folder), (val, val_folder)
    for (here, folder), (there, other) in (pairs, pairs[::-1]):
        only = sorted(set(here) - set(there))
        if only:
            raise DataError(f"class {only[0]!r} is in {folder} but not in {other}")


def list_hash(
    images: ImageList, order: Sequence[int] | np.ndarray, about: object, times: bool = True
) -> str:
    """Hash of which images are taken, in which order; ``about``, e.g. their size, is part of it.

    An image is its name, its size and its modification time: one that was replaced is another.
    Without ``times``, copies of the images on several machines are the same.

    Raises:
        DataError: an image is gone, or a link to nothing.
    """
    digest = hashlib.sha256(f"{about}\n".encode())
    for index in order:
        path = images.paths[index]
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        size = status.st_size
        stamp = [status.st_mtime_ns, size] if times else size
        digest.update(os.fsencode(f"{images.name(path)}\0{stamp}\n"))
    return digest.hexdigest()


def decode_image(path: Path) -> Image.Image:
    """Read an image as RGB, 8 bits a channel; of colours with 16 bits the upper 8.

    Transparency shows white. An orientation in its EXIF data is ignored, as by ``paddle.vision``.

    Raises:
        DataError: unreadable, truncated, larger than Pillow's limit against bombs, more than 100
            times as long as wide, or grey with more than 8 bits.
    """
    try:
        check_regular(path)
        with Image.open(path, formats=FORMATS) as image:
            _check_size(*image.size)
            if image.mode.startswith(("I", "F")):
                # Pillow would cut at 255 whatever range the numbers have.
                raise DataError(f"grey of more than 8 bits (mode {image.mode}); convert it")
            if image.has_transparency_data:
                # Exact where it is opaque, and where nothing is left of it.
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Exception as error:
        # A broken image can make its decoder fail in any way.
        reason = getattr(error, "strerror", None) or word_of(error)
        told = f"cannot decode image {path}: {reason}; replace or remove it"
        raise DataError(f"{told} (--bad_images skip leaves such out)") from None


def _check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    # Pillow itself only warns up to twice the limit.
    if limit and width * height > limit:
        raise DataError(f"{width} x {height} px, more than {limit} in all")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{width} x {height} px, one side more than {MAX_ASPECT} times the other")
