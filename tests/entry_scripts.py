"""Entry scripts in the tests' own process, on images of noise; inputs of whole runs."""

import sys
from pathlib import Path

import numpy as np
import paddle
from PIL import Image

from hnas.bench.speed_training import calm
from hnas.dataset.image_folder import scan_images
from hnas.dataset.loader import EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform, normalize
from hnas.models.elastic import batch_norms, measure
from hnas.models.pinasv2 import build_network
from hnas.tools.digits_folder import write_digits
from hnas.weights.loading import write_state

ROOT = Path(__file__).resolve().parents[1]
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


def write_inputs(work: Path, images_per_class: int) -> None:
    """Digits, and a network to start from: random weights, but fit to be trained frozen."""
    write_digits(work / "images")
    for folder in (work / "images").glob("*/*"):
        for path in sorted(folder.iterdir())[images_per_class:]:
            path.unlink()
    paddle.seed(0)
    network = build_network("resnet48_mini", num_classes=10, elastic=False)
    calm(network)
    # Training at frozen statistics needs some that fit the weights, as pretrained networks have.
    images = scan_images(work / "images", "train")
    ((pixels, _),) = EvalLoader(ImageDataset(images, EvalTransform(32), seed=0), len(images))
    network.eval()
    measure(network, batch_norms(network), normalize(pixels))
    write_state(work / "pretrained.pdparams", network.state_dict())
