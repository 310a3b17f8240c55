"""A small task on which rankings can be measured: pairs of handwritten digits, distorted anew.

Two of scikit-learn's digits (real scans, UCI) side by side, each under a random rotation, scale
and shift, grey on black with noise; the class is the two-digit number. Hard enough that networks
differ by several points and size helps, small enough that hundreds of trainings fit into hours on
two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import paddle

CLASSES = 100
SCAN_SIZE = 8
# Where the two digits are; they may overlap.
LEFT, RIGHT = (-1.0, -0.25), (0.25, 1.0)


@dataclass(frozen=True)
class Distortion:
    """How strongly the scans are distorted.

    Attributes:
        size: height and width of the images, px.
        rotation: largest angle either way, radians.
        shrink: bounds of the factor by which a scan is smaller than the image.
        noise: standard deviation of the Gaussian noise; white is 1.
    """

    size: int = 48
    rotation: float = 0.6
    shrink: tuple[float, float] = (1.6, 2.4)
    noise: float = 0.2

    def place(
        self,
        scans: np.ndarray,
        rng: np.random.Generator,
        columns: tuple[float, float] = (-1, 1),
    ) -> np.ndarray:
        """Scans [N, 8, 8] of values 0 to 1, each somewhere in an image: float32 [N, size, size].

        Args:
            scans: what to place.
            rng: of the distortions.
            columns: bounds of the horizontal place; -1 and 1 touch the image's edges.
        """
        number = len(scans)
        angle = rng.uniform(-self.rotation, self.rotation, number).astype(np.float32)
        shrink = rng.uniform(*self.shrink, number).astype(np.float32)
        # But for its rotated corners the scan stays within the image: half of the rest on a side.
        room = 1 - 1 / shrink
        down = (rng.uniform(-1, 1, number) * room).astype(np.float32)
        right = (rng.uniform(*columns, number) * room).astype(np.float32)
        axis = ((np.arange(self.size, dtype=np.float32) + 0.5) / self.size) * 2 - 1
        y, x = axis[:, None] - down[:, None, None], axis[None, :] - right[:, None, None]
        cos, sin = (shrink[:, None, None] * f(angle)[:, None, None] for f in (np.cos, np.sin))
        y, x = cos * y - sin * x, sin * y + cos * x
        return sample_bilinear(scans, (y + 1) * (SCAN_SIZE / 2), (x + 1) * (SCAN_SIZE / 2))

    def expose(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Pixels [N, H, W] of values 0 to 1 with noise, as images: uint8 [N, 3, H, W]."""
        noise = rng.standard_normal(pixels.shape, np.float32) * np.float32(self.noise)
        grey = (np.clip(pixels + noise, 0, 1) * 255).astype(np.uint8)
        return np.repeat(grey[:, None], 3, axis=1)


STRONG = Distortion(shrink=(1.3, 3.2), noise=0.4)
"""Another kind of view: more different sizes and twice the noise."""


def sample_bilinear(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values of ``images`` [N, H, W] at positions [N, h, w] in pixels (0: the upper left edge).

    Black outside.
    """
    padded = np.pad(images.astype(np.float32), ((0, 0), (2, 2), (2, 2)))
    height, width = padded.shape[1:]
    rows = np.clip(rows + 1.5, 0, height - 1.001).astype(np.float32)
    columns = np.clip(columns + 1.5, 0, width - 1.001).astype(np.float32)
    top, left = rows.astype(np.int32), columns.astype(np.int32)
    down, right = rows - top.astype(np.float32), columns - left.astype(np.float32)
    flat = padded.reshape(-1)
    corner = np.arange(len(images))[:, None, None] * (height * width) + top * width + left
    above = flat[corner] * (1 - right) + flat[corner + 1] * right
    below = flat[corner + width] * (1 - right) + flat[corner + width + 1] * right
    return above * (1 - down) + below * down


@dataclass(frozen=True)
class DigitsTask:
    """Training and validation images of the task.

    Attributes:
        train_scans: scans to train on; validation images are distorted from the others.
        validation_images: how many of them, the same in every run.
    """

    distortion: Distortion = Distortion()
    train_scans: int = 1200
    validation_images: int = 4000

    @cached_property
    def _scans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All scans [N, 8, 8], their labels [N], and an order fixed once and for all."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64), order

    def _draw(
        self,
        which: np.ndarray,
        size: int,
        kinds: Sequence[Distortion],
        rng: np.random.Generator,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Views [size, 3, H, W] of random pairs of the scans ``which``, and labels [size]."""
        scans, labels, _ = self._scans
        left, right = which[rng.integers(0, len(which), (2, size))]
        images = []
        for kind in kinds:
            halves = (kind.place(scans[left], rng, LEFT), kind.place(scans[right], rng, RIGHT))
            images.append(kind.expose(np.maximum(*halves), rng))
        return images, labels[left] * 10 + labels[right]

    @cached_property
    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images [N, 3, H, W] and labels [N]."""
        # Numbers that no training batch has, also if NumPy pads theirs with zeros, as it does.
        rng = np.random.default_rng((0, 0, 0, 1))
        which = self._scans[2][self.train_scans :]
        (images,), labels = self._draw(which, self.validation_images, [self.distortion], rng)
        return images, labels

    def training_batch(
        self, size: int, seed: tuple[int, ...], more: Sequence[Distortion] = ()
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Views of ``size`` random pairs of training scans, and labels [size].

        One view is distorted as validation images are; before it stand those of ``more`` kinds.
        """
        which = self._scans[2][: self.train_scans]
        kinds = [*more, self.distortion]
        return self._draw(which, size, kinds, np.random.default_rng(seed))


class DigitsLoader:
    """Batches of a :class:`DigitsTask`, as :class:`hnas.dataset.loader.EpochLoader` gives them.

    Args:
        task: what to draw from.
        batch_size: images a batch.
        steps: batches an epoch.
        seed: of the draws; a batch depends on (seed, epoch, step) only.
        more: kinds of views of each image before the usual one.
    """

    def __init__(
        self,
        task: DigitsTask,
        batch_size: int,
        steps: int,
        seed: int,
        more: Sequence[Distortion] = (),
    ):
        self.task = task
        self.batch_size = self.total_batch = batch_size
        self.steps = steps
        self.seed = seed
        self.more = more

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[paddle.Tensor]]:
        """The batches of ``epoch`` from ``start_step`` on: views [N, 3, H, W], labels [N]."""
        # Takes seconds, which commands that only hand out work need not wait for.
        import paddle

        for step in range(start_step, self.steps):
            seed = (self.seed, epoch, step)
            views, labels = self.task.training_batch(self.batch_size, seed, self.more)
            yield [paddle.to_tensor(part) for part in (*views, labels)]
