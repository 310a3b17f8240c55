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
from hnas.base.files import check_writable, print_text
from hnas.dataset.image_folder import LISTED, ImageList, scan_images


def validation_places(images: ImageList, share: float, seed: int) -> set[int]:
    """Which of the images are for validation: of each class about ``share``, one at least.

    Raises:
        UserError: a class has one image only, or the share leaves none to train on.
    """
    rng, places, single = np.random.default_rng(seed), set(), []
    for label, name in enumerate(images.classes):
        own = rng.permutation(np.flatnonzero(images.labels == label))
        places |= set(own[: min(max(round(share * len(own)), 1), len(own) - 1)].tolist())
        single += [name] if len(own) == 1 else []
    if single:
        more = ", ..." if len(single) > LISTED else ""
        raise UserError(
            f"{len(single)} classes of {images.folder} have one image, and training and validation "
            f"need one each: {', '.join(single[:LISTED])}{more}; add images, or move them away"
        )
    return places


def write_split(images: ImageList, places: set[int], output: Path, mode: str) -> None:
    """Link or copy the images to ``output/val`` and ``output/train``; all of them, or nothing.

    Raises:
        UserError: ``output`` is there and not empty, or lies within the images, or fails.
    """
    output = Path(os.path.abspath(output))
    if Path(os.path.realpath(images.folder)) in Path(os.path.realpath(output)).parents:
        raise UserError(f"--output {output} is in --images {images.folder}; choose another place")
    check_writable(output.parent, "--output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as made:
            for place, path in enumerate(images.paths):
                split = "val" if place in places else "train"
                target = Path(made, "all", split, images.name(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                if mode == "link":
                    target.symlink_to(os.path.abspath(path))
                else:
                    shutil.copy2(path, target)
            os.rename(Path(made, "all"), output)  # fails where a file or a filled folder is
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename2 or error.filename}"
        raise UserError(f"cannot write --output {output}: {reason}; choose a new folder") from error


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=read_path, required=True, help="folder of class folders")
    parser.add_argument("--output", type=read_path, required=True, help="new folder to write")
    share = real_number(0, 1)
    parser.add_argument("--val_share", type=share, default=0.2, help="of the images, for val/")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the draw")
    parser.add_argument("--mode", choices=("link", "copy"), default="link", help="of the images")
    options = parser.parse_args(argv)
    if not options.images.is_dir() or (options.images / "train").is_dir():
        what = "is split already" if options.images.is_dir() else "is not a folder"
        raise UserError(f"--images {options.images} {what}; give a folder that holds class folders")
    images = scan_images(options.images.parent, options.images.name)
    places = validation_places(images, options.val_share, options.seed)
    write_split(images, places, options.output, options.mode)
    parts = f"{len(images) - len(places)} training and {len(places)} validation images"
    print_text(f"{options.output}: {parts} of {len(images.classes)} classes\n")


if __name__ == "__main__":
    run_main(main)
