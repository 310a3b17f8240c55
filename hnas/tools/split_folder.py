"""Split a folder of class folders into training and validation images.

    python -m hnas.tools.split_folder --images FOLDER --output DIR --val_share 0.2 --mode link

FOLDER/CLASS/* becomes DIR/train/CLASS/* and DIR/val/CLASS/*, as links or copies; every class has
images in both. DIR appears when it is complete, and the same seed makes the same split.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from hnas.base.command_line import OneLineParser, read_path, real_number, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_regular, check_writable, print_text
from hnas.dataset.image_folder import LISTED, ImageList, scan_images


def split_of(images: ImageList, share: float, seed: int) -> list[str]:
    """``train`` or ``val`` of each image; both get some of every class, ``val`` about ``share``.

    Raises:
        UserError: a class has one image only.
    """
    rng, split = np.random.default_rng(seed), ["train"] * len(images)
    numbers = np.bincount(images.labels)
    single = [images.classes[label] for label in np.flatnonzero(numbers == 1)]
    if single:
        names = ", ".join(single[:LISTED]) + (", ..." if len(single) > LISTED else "")
        told = f"{len(single)} classes of {images.folder} have one image, and both parts need one"
        raise UserError(f"{told}: {names}; add images, or move these classes away")
    for label, number in enumerate(numbers):
        own = rng.permutation(np.flatnonzero(images.labels == label))
        for place in own[: min(max(round(share * number), 1), number - 1)]:
            split[place] = "val"
    return split


def write_split(images: ImageList, split: list[str], output: Path, mode: str) -> None:
    """Link or copy the images to ``output/train`` and ``output/val``; all of them, or none.

    Raises:
        UserError: ``output`` is a file or a folder with content, or cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as made:
            for path, part in zip(images.paths, split, strict=True):
                target = Path(made, "all", part, images.name(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                if mode == "link":
                    target.symlink_to(os.path.abspath(path))
                else:
                    check_regular(path)
                    shutil.copy2(path, target)
            os.rename(Path(made, "all"), output)
    except OSError as error:
        told = error.strerror or error
        if error.filename in map(str, images.paths):
            raise UserError(f"cannot copy {error.filename}: {told}; remove it") from error
        raise UserError(f"cannot write --output {output}: {told}; choose a new folder") from error


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=read_path, required=True, help="folder of class folders")
    parser.add_argument("--output", type=read_path, required=True, help="new folder to write")
    share = real_number(0, 1)
    parser.add_argument("--val_share", type=share, default=0.2, help="of the images, for val/")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the draw")
    parser.add_argument("--mode", choices=("link", "copy"), default="link", help="of the images")
    options = parser.parse_args(argv)
    folder, output = options.images.resolve(), Path(os.path.abspath(options.output))
    if not folder.is_dir() or (folder / "train").is_dir():
        raise UserError(f"--images {folder} is not a folder of class folders, without train/")
    if folder in output.resolve().parents:
        raise UserError(f"--output {output} is in --images {folder}; choose another place")
    check_writable(output.parent, "--output")
    images = scan_images(folder.parent, folder.name)
    split = split_of(images, options.val_share, options.seed)
    write_split(images, split, output, options.mode)
    parts = f"{split.count('train')} training and {split.count('val')} validation images"
    print_text(f"{output}: {parts} of {len(images.classes)} classes\n")


if __name__ == "__main__":
    run_main(main)
