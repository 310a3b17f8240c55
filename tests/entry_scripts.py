"""Entry scripts in the tests' own process, on images of noise."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = list("0123456789")


def noise_images(root: Path, number: int = 2) -> Path:
    """So many training and validation images in each of ten classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def run(script, monkeypatch, images, save_dir, **flags) -> None:
    """What ``python3 SCRIPT run --flag value ...`` does."""
    common = {"image_dir": images, "save_dir": save_dir, "image_size": 32, "num_workers": 0}
    flags = {**common, "device": "cpu", "batch_size": 10, **flags}
    line = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["script", "run", *line])
    script.main()
