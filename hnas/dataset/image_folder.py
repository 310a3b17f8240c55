"""ImageNet-style folders: ``ROOT/train/CLASS/*`` and ``ROOT/val/CLASS/*``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hnas.utils.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


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

    def select(self, indices: np.ndarray) -> ImageList:
        """The images at ``indices``, in that order."""
        paths = tuple(self.paths[index] for index in indices)
        return ImageList(self.folder, self.classes, paths, self.labels[indices])


def scan_images(root: str | Path, split: str) -> ImageList:
    """List the images of ``root/split``.

    Raises:
        DataError: the folder is missing, or holds no class, or a class has no image.
    """
    root = Path(root)
    folder = root / split
    if not root.is_dir():
        raise DataError(f"image_dir {root} is not a folder")
    if not folder.is_dir():
        raise DataError(f"image_dir {root} has no folder {split}/ (expected {split}/CLASS/*.jpg)")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f"{folder} has no class folders (expected {split}/CLASS/*.jpg)")
    paths, labels = [], []
    for label, name in enumerate(classes):
        images = sorted(
            path for path in (folder / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
        )
        if not images:
            raise DataError(f"class folder {folder / name} has no images; fill or remove it")
        paths += images
        labels += [label] * len(images)
    return ImageList(folder, tuple(classes), tuple(paths), np.asarray(labels, dtype=np.int64))


def check_same_classes(train: ImageList, val: ImageList) -> None:
    """Labels of both splits must mean the same classes.

    Raises:
        DataError: naming the first class that only one of them has.
    """
    for here, there in ((train, val), (val, train)):
        only = sorted(set(here.classes) - set(there.classes))
        if only:
            raise DataError(f"class {only[0]!r} is in {here.folder} but not in {there.folder}")


def decode_image(path: Path) -> Image.Image:
    """Read an image as RGB.

    Raises:
        DataError: unreadable, truncated, or larger than Pillow's limit against bombs.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot decode image {path}: {reason}; replace or remove it") from error
