"""Loader processes that start after the device did: forking under a GPU's driver is delicate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
from PIL import Image

from hnas.dataset.image_folder import scan_images
from hnas.dataset.loader import EpochLoader, ImageDataset
from hnas.dataset.transforms import StrongTransform, TrainTransform, TwoViews
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.results import Result, at_most, differing, holds
from hnas.tools.check_device.subjects import images

WORKERS, QUICK_WORKERS = 8, 2
NUMBER, BATCH, SIZE = 64, 8, 64


def check(machine: Machine) -> Iterator[Result]:
    """(g) Two epochs of two views by several processes, against the same in this one."""
    workers = QUICK_WORKERS if machine.plan.quick else WORKERS
    folder = machine.folder / "images"
    write_images(folder)
    paddle.ones([4]).sum().item()  # the device has started
    found, right = (batches(folder, number) for number in (workers, 0))
    yield holds(f"{workers} loader processes give all batches", len(found) == len(right))
    different = sum(
        differing(part, other)
        for batch, expected in zip(found, right, strict=False)
        for part, other in zip(batch, expected, strict=True)
    )
    yield at_most(f"{workers} loader processes against none", different, 0, "numbers that differ")


def write_images(folder: Path) -> None:
    """A training split of two classes."""
    for index, image in enumerate(images(NUMBER, SIZE)):
        path = folder / "train" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)


def batches(folder: Path, workers: int) -> list[list[np.ndarray]]:
    """All batches of two epochs: two views and labels each."""
    transform = TwoViews(StrongTransform(SIZE), TrainTransform(SIZE))
    dataset = ImageDataset(scan_images(folder, "train"), transform, seed=0)
    loader = EpochLoader(dataset, BATCH, workers)
    return [[part.numpy() for part in batch] for epoch in range(2) for batch in loader.epoch(epoch)]
