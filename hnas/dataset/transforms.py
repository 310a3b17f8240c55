"""Augmentations: each takes a PIL image and a generator and gives uint8 [3, H, W].

What is done to an image depends on the generator's seed only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import paddle
from paddle.vision.transforms import center_crop, resize
from PIL import Image, ImageEnhance, ImageFilter

# Least and most blur of the strong view, in px: MoCo's, for images of 224 px.
MIN_RADIUS, MAX_RADIUS = 0.1, 2.0
LOG_ASPECTS = math.log(3 / 4), math.log(4 / 3)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@lru_cache(maxsize=8)
def _constants(device: str, size: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """ImageNet's mean and deviation at each of ``size`` pixels of each channel: [3 * size].

    On a device once and not in every step. So long because Paddle's CPU kernel subtracts a vector
    from every row several times as fast as a value per channel, [1, 3, 1, 1].
    """
    return tuple(
        paddle.to_tensor(np.repeat(np.float32(values), size))
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )


def normalize(images: paddle.Tensor) -> paddle.Tensor:
    """uint8 images [N, 3, H, W] -> float32, minus ImageNet's mean, over its deviation."""
    mean, std = _constants(paddle.get_device(), images.shape[2] * images.shape[3])
    rows = images.astype("float32").flatten(1) / 255.0
    return ((rows - mean) / std).reshape(images.shape)


def to_array(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 [3, H, W]."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def random_resized_crop(image, rng, size: int, scale_min: float):
    """Crop a random area (``scale_min`` to 1 of the image) and aspect, resized to ``size``."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(scale_min, 1.0)
        aspect = math.exp(rng.uniform(*LOG_ASPECTS))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            top = int(rng.integers(0, height - h + 1))
            break
    else:
        w = h = min(width, height)
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def random_flip(image, rng, probability: float):
    """Mirror left to right."""
    if rng.random() < probability:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def shift_hue(image, turns: float):
    """Rotate the hue by a share of a full turn."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue, dtype=np.int16) + round(turns * 255)) % 256
    hue = Image.fromarray(shifted.astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def color_jitter(image, rng, strength: float = 0.4, hue: float = 0.1):
    """Brightness, contrast, saturation by 1 +- ``strength``, hue by +- ``hue``, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for step in rng.permutation(4):
        if step < 3:
            image = enhancers[step](image).enhance(rng.uniform(1 - strength, 1 + strength))
        else:
            image = shift_hue(image, rng.uniform(-hue, hue))
    return image


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop and flip: stage two's input, and stage one's weaker view."""

    size: int
    scale_min: float = 0.08
    flip: float = 0.5

    def __call__(self, image, rng) -> np.ndarray:
        image = random_resized_crop(image, rng, self.size, self.scale_min)
        return to_array(random_flip(image, rng, self.flip))


@dataclass(frozen=True)
class StrongTransform(TrainTransform):
    """MoCo v2's augmentation: crop, colour jitter, greyscale, blur, flip."""

    def __call__(self, image, rng) -> np.ndarray:
        image = random_resized_crop(image, rng, self.size, self.scale_min)
        if rng.random() < 0.8:
            image = color_jitter(image, rng)
        if rng.random() < 0.2:
            image = image.convert("L").convert("RGB")
        if rng.random() < 0.5:
            radius = rng.uniform(MIN_RADIUS, MAX_RADIUS) * self.size / 224
            image = image.filter(ImageFilter.GaussianBlur(radius))
        return to_array(random_flip(image, rng, self.flip))


def shorter_side(size: int) -> int:
    """To how many px an image's shorter side is resized for a centre of ``size``: 8/7 of it."""
    return round(size * 256 / 224)


@dataclass(frozen=True)
class Shrink:
    """Shorter side to ``shorter`` px where it is longer, keeping the aspect."""

    shorter: int

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = self.shorter / min(image.size)
        if scale >= 1:
            return image
        size = [max(1, round(side * scale)) for side in image.size]
        return image.resize(size, Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class CentreCrop:
    """Shorter side to 8/7 of ``size``, then the centre of ``size``; nothing random.

    The longer side is cut to whole pixels, offsets are rounded.
    """

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        return center_crop(resize(image, shorter_side(self.size)), self.size)


class EvalTransform(CentreCrop):
    """As :class:`CentreCrop`, but an array."""

    def __call__(self, image, rng=None) -> np.ndarray:
        return to_array(super().__call__(image))


@dataclass(frozen=True)
class TwoViews:
    """Two augmentations of one image, drawn one after the other.

    Without a second one, the first is given twice: most likely what the first place's stage 1 saw.
    """

    first: TrainTransform
    second: TrainTransform | None = None

    def __call__(self, image, rng) -> tuple[np.ndarray, np.ndarray]:
        view = self.first(image, rng)
        return view, view if self.second is None else self.second(image, rng)
