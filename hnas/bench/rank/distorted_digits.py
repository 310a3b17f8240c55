"""Small tasks on which rankings can be measured: handwritten digits, distorted anew.

One of scikit-learn's digits (real scans, UCI) under a random rotation, scale and shift, grey on
black with noise; the class is the digit. Small enough that hundreds of trainings fit into hours on
two CPU cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.ndimage import map_coordinates

SCAN_SIZE = 8
CLASSES = 10

VALIDATION = {"all": slice(None), "truth": slice(0, None, 2), "scores": slice(1, None, 2)}
"""Of the scans that are not trained on: what networks trained alone are measured on, and what
supernets are, so that luck of images is not taken for quality."""


@dataclass(frozen=True)
class DigitsTask:
    """Training and validation images of the task.

    Attributes:
        size: height and width of the images, px.
        rotation: largest angle either way, radians.
        shrink: bounds of the factor by which a scan is smaller than the image.
        noise: standard deviation of the Gaussian noise; white is 1.
        train_scans: scans to train on; validation images are distorted from the others.
        validation_images: how many of them, the same in every run.
    """

    size: int
    rotation: float
    shrink: tuple[float, float]
    noise: float
    train_scans: int = 1200
    validation_images: int = 2000

    def place(self, scans: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Scans [N, 8, 8] of values 0 to 1, each somewhere in an image: float32 [N, size, size]."""
        number = len(scans)
        angle = rng.uniform(-self.rotation, self.rotation, number).astype(np.float32)
        shrink = rng.uniform(*self.shrink, number).astype(np.float32)
        # But for its rotated corners the scan stays within the image: half of the rest on a side.
        room = 1 - 1 / shrink
        down = (rng.uniform(-1, 1, number) * room).astype(np.float32)
        right = (rng.uniform(-1, 1, number) * room).astype(np.float32)
        axis = ((np.arange(self.size, dtype=np.float32) + 0.5) / self.size) * 2 - 1
        y, x = axis[:, None] - down[:, None, None], axis[None, :] - right[:, None, None]
        cos, sin = (shrink[:, None, None] * f(angle)[:, None, None] for f in (np.cos, np.sin))
        y, x = cos * y - sin * x, sin * y + cos * x
        # From -1 and 1 at the scan's edges to its pixels' centres; black outside.
        y, x = ((place + 1) * (SCAN_SIZE / 2) - 0.5 for place in (y, x))
        places = zip(scans, np.stack([y, x], axis=1), strict=True)
        return np.stack([map_coordinates(*own, np.float32, 1, "grid-constant") for own in places])

    def expose(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Pixels [N, H, W] of values 0 to 1 with noise, as images: uint8 [N, 3, H, W]."""
        noise = rng.standard_normal(pixels.shape, np.float32) * np.float32(self.noise)
        grey = (np.clip(pixels + noise, 0, 1) * 255).astype(np.uint8)
        return np.repeat(grey[:, None], 3, axis=1)

    @cached_property
    def _scans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All scans [N, 8, 8], their labels [N], and an order fixed once and for all."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64), order

    def _draw(
        self, which: np.ndarray, size: int, views: int, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Views [size, 3, H, W] of random scans of ``which``, and labels [size]."""
        scans, labels, _ = self._scans
        drawn = which[rng.integers(0, len(which), size)]
        images = [self.expose(self.place(scans[drawn], rng), rng) for _ in range(views)]
        return images, labels[drawn]

    def validation(self, scans: str) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images [N, 3, H, W] and labels [N] of those scans of ``VALIDATION``."""
        # Numbers that no training batch has, also if NumPy pads theirs with zeros, as it does.
        rng = np.random.default_rng((0, 0, 0, 1 + [*VALIDATION].index(scans)))
        which = self._scans[2][self.train_scans :][VALIDATION[scans]]
        (images,), labels = self._draw(which, self.validation_images, 1, rng)
        return images, labels

    def training_batch(
        self, size: int, seed: tuple[int, ...], views: int = 1
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Views of ``size`` random images of training scans, and labels [size]."""
        which = self._scans[2][: self.train_scans]
        return self._draw(which, size, views, np.random.default_rng(seed))
