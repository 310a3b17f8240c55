"""Augmentations of whole batches: the same pixels as one image at a time gives, in less time.

Each image has its own generator, and draws from it what the single image's transform draws, in
that order. Resizing and blurring are single calls of Pillow per image anyway; colours are changed
for all images of the batch together, with Pillow's own rounding. That pays for small images only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass
class Draws:
    """What one image's colours and mirror get; see ``StrongTransform``.

    Attributes:
        jitter: pairs of what to change and by how much, in order; empty: nothing.
        grey: drop the colours.
        radius: of the blur, in px; 0: none.
        flip: mirror left to right.
    """

    jitter: list[tuple[int, float]]
    grey: bool
    radius: float
    flip: bool


def jitter_batch(crops: np.ndarray, draws: Sequence[Draws]) -> None:
    """Change the colours of uint8 images [N, H, W, 3] in place."""
    for position in range(4):
        for what in range(4):
            chosen = [
                (index, draw.jitter[position][1])
                for index, draw in enumerate(draws)
                if draw.jitter and draw.jitter[position][0] == what
            ]
            if chosen:
                indices, amounts = map(list, zip(*chosen, strict=True))
                crops[indices] = _CHANGES[what](crops[indices], np.float32(amounts))


def grey_of(images: np.ndarray) -> np.ndarray:
    """Luma [N, H, W, 1] of uint8 images [N, H, W, 3], with Pillow's weights and rounding."""
    weighted = images.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]


def blend(base: np.ndarray, images: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """``base`` plus factor times the difference to ``images``: Pillow's, which truncates."""
    base = base.astype(np.float32)
    mixed = base + factors[:, None, None, None] * (images.astype(np.float32) - base)
    return mixed.clip(0, 255).astype(np.uint8)


def _brightness(images, factors):
    return blend(np.zeros((1, 1, 1, 1)), images, factors)


def _contrast(images, factors):
    means = grey_of(images).mean(axis=(1, 2, 3), dtype=np.float64)
    return blend(np.floor(means + 0.5)[:, None, None, None], images, factors)


def _saturation(images, factors):
    return blend(grey_of(images), images, factors)


def _hue(images, turns):
    """Pillow's conversions take all images as one tall one."""
    n, h, w, _ = images.shape
    hsv = np.array(Image.fromarray(images.reshape(n * h, w, 3)).convert("HSV"))
    shift = np.round(turns.astype(np.float64) * 255).astype(np.int16)
    hue = hsv[..., 0].reshape(n, h, w).astype(np.int16) + shift[:, None, None]
    hsv[..., 0] = (hue % 256).astype(np.uint8).reshape(n * h, w)
    rgb = Image.frombytes("HSV", (w, n * h), hsv.tobytes()).convert("RGB")
    return np.asarray(rgb).reshape(n, h, w, 3)


_CHANGES = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}


def finish_batch(crops: np.ndarray, draws: Sequence[Draws]) -> np.ndarray:
    """Jitter, grey, blur and mirror uint8 crops [N, H, W, 3] -> [N, 3, H, W]."""
    jitter_batch(crops, draws)
    grey = [index for index, draw in enumerate(draws) if draw.grey]
    if grey:
        crops[grey] = grey_of(crops[grey])
    for index, draw in enumerate(draws):
        if draw.radius:
            image = Image.fromarray(crops[index]).filter(ImageFilter.GaussianBlur(draw.radius))
            crops[index] = np.asarray(image)
    flip = [index for index, draw in enumerate(draws) if draw.flip]
    crops[flip] = crops[flip][:, :, ::-1]
    return np.ascontiguousarray(crops.transpose(0, 3, 1, 2))
