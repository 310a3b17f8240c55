"""Write scikit-learn's handwritten digits as an ImageNet-style folder of colour images.

    python -m hnas.tools.digits_folder --output DIR

1,797 real scans of 8x8 px (UCI optical recognition of handwritten digits), enlarged to 32 px on
a dark border of 4 px, in a light tint of their own. One in five goes to val/.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hnas.base.command_line import OneLineParser, read_path
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_writable

DIGIT_SIZE, BORDER = 32, 4
VAL_EVERY = 5


def digit_image(pixels: np.ndarray, tint: np.ndarray) -> Image.Image:
    """An RGB image of 40 px of a scan [8, 8] with values 0 to 16."""
    grey = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
    grey = grey.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC)
    framed = np.pad(np.asarray(grey), BORDER)[..., None] * tint
    return Image.fromarray(framed.astype(np.uint8))


def write_digits(output: Path) -> None:
    """Write ``output/train/0..9/*.png`` and ``output/val/0..9/*.png``.

    Raises:
        UserError: the folder cannot be written.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(0)
    seen = np.zeros(10, dtype=int)
    try:
        for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            seen[label] += 1
            split = "val" if seen[label] % VAL_EVERY == 0 else "train"
            folder = output / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            tint = rng.uniform(0.7, 1.0, size=3)
            digit_image(pixels, tint).save(folder / f"{index:04d}.png")
    except OSError as error:
        raise UserError(f"cannot write images to {output}: {error.strerror or error}") from error


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=read_path, required=True, help="folder to write")
    options = parser.parse_args(argv)
    check_writable(options.output, "--output")
    write_digits(options.output)


if __name__ == "__main__":
    run_main(main)
