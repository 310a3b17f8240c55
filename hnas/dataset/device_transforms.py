"""Augmentations of whole batches on the training device, as Paddle operations.

Loader processes only draw each image's parameters, from its own generator and in the order of the
transforms of :mod:`hnas.dataset.transforms`, and cut the crops out of the decoded images. Crops
differ in size, so they are pasted into canvases as large as the batch's largest crop: what a crop
leaves out is not sent to the device, and two views of an image get a canvas each, since one for
whole images would have to be as large as the longest panorama of the batch.

Resizing and blurring are products with one matrix per image and direction. Resizing has Pillow's
weights, with its antialiasing where it shrinks, so its pixels are Pillow's but for a level of
rounding; colours round as Pillow does between the steps. Blurring is a true Gaussian, of which
Pillow's is an approximation by three box filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.dataset.batch_transforms import CONTRAST, HUE, SATURATION, Draws
from hnas.dataset.loader import EpochLoader, ImageDataset
from hnas.dataset.transforms import MAX_RADIUS, StrongTransform, TwoViews, draw_crop

# Canvases grow by steps, so that batches have few different shapes.
CANVAS_STEP = 32
# An image's parameters: crop's start, length and canvas's valid length, down and across; up to
# three blends before the hue's turn and three after it, and how much of each; whether the hue
# turns, and how far; greyscale, blur's sigma and flip.
SPLIT = (3, 3, 6, 6, 2, 3)
NO_CHANGE = -1


def _views(transform) -> tuple:
    return (transform.first, transform.second) if isinstance(transform, TwoViews) else (transform,)


class CropDataset(ImageDataset):
    """Crops and parameters instead of augmented images.

    An item is a pair for every view of the transform, followed by the label: a canvas, uint8
    [H, W, 3], with the crop in its upper left corner, and the parameters, float32 [23].
    """

    def load(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The items at ``indices``, each of their parts stacked."""
        images = [self._pixels[index] for index in indices]
        rngs = [self.generator(index) for index in indices]
        parts = []
        for view in _views(self.transform):
            crops, rows = [], []
            for image, rng in zip(images, rngs, strict=True):
                box = draw_crop(image.shape[1], image.shape[0], rng, view.scale_min)
                down = _cut(box[1], box[3], image.shape[0], view.size)
                across = _cut(box[0], box[2], image.shape[1], view.size)
                crops.append(image[down[0] : down[1], across[0] : across[1]])
                rows.append([*_lengths(box[1::2], down), *_lengths(box[::2], across)])
                rows[-1] += _parameters(view.draw(rng))
            parts += [_paste(crops), np.float32(rows)]
        return [*parts, self.images.labels[indices]]


def _cut(low: int, high: int, length: int, size: int) -> tuple[int, int]:
    """What of a side is read to resize ``low`` to ``high`` to ``size``: some more, as in Pillow."""
    margin = math.ceil(max(1.0, (high - low) / size))
    return max(0, low - margin), min(length, high + margin)


def _lengths(box: tuple[int, int], cut: tuple[int, int]) -> list[int]:
    return [box[0] - cut[0], box[1] - box[0], cut[1] - cut[0]]


def _parameters(draws: Draws) -> list[float]:
    return [*_slots(draws.jitter), draws.grey, draws.radius, draws.flip]


def _slots(jitter: Sequence[tuple[int, float]]) -> list[float]:
    """Jitter in any order as blends, the hue's turn and blends again: one turn for a batch."""
    slots, turns = [(NO_CHANGE, 1.0)] * 6, [False, 0]
    for place, (step, amount) in enumerate(jitter):
        if step == HUE:
            turns = [True, round(amount * 255)]
        else:
            slots[place + 2 if turns[0] else place] = (step, amount)
    steps, amounts = zip(*slots, strict=True)
    return [*steps, *amounts, *turns]


def _paste(crops: Sequence[np.ndarray]) -> np.ndarray:
    """Crops [H, W, 3] in the upper left corners of uint8 [N, highest, widest, 3], else zero."""
    largest = np.max([crop.shape[:2] for crop in crops], axis=0)
    height, width = -(-largest // CANVAS_STEP) * CANVAS_STEP
    canvas = np.zeros((len(crops), height, width, 3), dtype=np.uint8)
    for place, crop in zip(canvas, crops, strict=True):
        place[: crop.shape[0], : crop.shape[1]] = crop
    return canvas


class DeviceLoader:
    """Batches of a loader of :class:`CropDataset`, augmented on the current device.

    Has what :class:`EpochLoader` has for training, and gives the same parts: each view as uint8
    [N, 3, size, size], then the labels.
    """

    def __init__(self, loader: EpochLoader):
        self.loader = loader
        self.dataset = loader.dataset
        self.total_batch = loader.total_batch
        self.batch_size = loader.batch_size
        views = _views(loader.dataset.transform)
        self._settings = [(view.size, isinstance(view, StrongTransform)) for view in views]

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self.loader)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[paddle.Tensor]]:
        """The batches of ``epoch`` from ``start_step`` on."""
        with closing(self.loader.epoch(epoch, start_step)) as batches:
            for *parts, labels in batches:
                views = zip(parts[::2], parts[1::2], self._settings, strict=True)
                yield [*(augment(*arrays, *how) for *arrays, how in views), labels]


@paddle.no_grad()
def augment(
    canvas: paddle.Tensor, parameters: paddle.Tensor, size: int, colours: bool = True
) -> paddle.Tensor:
    """Resize, jitter, grey, blur and mirror.

    Args:
        canvas: uint8 [N, H, W, 3]; see :class:`CropDataset`.
        parameters: float32 [N, 23].
        colours: False where no image has anything but a crop and a flip.
        size: height and width of the result.

    Returns:
        uint8 [N, 3, size, size].
    """
    down, across, steps, amounts, turns, rest = parameters.split(SPLIT, axis=1)
    images = resize(canvas.transpose([0, 3, 1, 2]).astype("float32"), down, across, size)
    grey, sigma, flip = (column.reshape([-1, 1, 1, 1]) for column in rest.unbind(1))
    if colours:
        images = jitter(images, steps, amounts, turns)
        images = paddle.where(grey > 0, grey_of(images), images)
        images = blur(images, sigma.flatten(), MAX_RADIUS * size / 224)
    return paddle.where(flip > 0, images.flip(3), images).astype("uint8")


def _to_levels(images: paddle.Tensor) -> paddle.Tensor:
    """Rounded as in Pillow: halves upward."""
    return (images + 0.5).floor().clip(0, 255)


def _weighted(images, rows, columns, between=lambda images: images) -> paddle.Tensor:
    """Images [N, 3, H, W] times weights [N, R, H] down and [N, C, W] across: [N, 3, R, C].

    ``between`` is done when only the width has changed. No product is broadcast over the colours,
    which Paddle would do by a call for each image and colour.
    """
    n, _, height, width = images.shape
    wide = images.transpose([0, 2, 1, 3]).reshape([n, -1, width])
    narrow = between(paddle.matmul(wide, columns, transpose_y=True)).reshape([n, height, -1])
    return (rows @ narrow).reshape([n, rows.shape[1], 3, -1]).transpose([0, 2, 1, 3])


def resize(images, down: paddle.Tensor, across: paddle.Tensor, size: int) -> paddle.Tensor:
    """Boxes of float images [N, 3, H, W] of whole levels -> the same [N, 3, size, size].

    ``down`` and ``across`` [N, 3] hold each box's start and length and how far images are valid.
    """
    rows = _resize_weights(down, images.shape[2], size)
    columns = _resize_weights(across, images.shape[3], size)
    return _to_levels(_weighted(images, rows, columns, _to_levels))


def _resize_weights(geometry: paddle.Tensor, length: int, size: int) -> paddle.Tensor:
    """Weights [N, size, length] of a canvas's pixels in each of the resized ones.

    Triangles of a pixel's width, or of the box's pixels to one of the result where it shrinks.
    """
    start, box, valid = geometry.reshape([-1, 3, 1, 1]).unbind(1)
    scale = box / size
    centres = start + (paddle.arange(size, dtype="float32").unsqueeze(1) + 0.5) * scale
    pixels = paddle.arange(length, dtype="float32")
    weights = F.relu(1 - (pixels + 0.5 - centres).abs() / scale.clip(min=1.0))
    weights = weights * (pixels < valid).astype("float32")
    return weights / weights.sum(axis=-1, keepdim=True)


def jitter(images, steps, amounts, turns) -> paddle.Tensor:
    """Change the colours of float images [N, 3, H, W] of whole levels, each in its own order.

    Args:
        steps: float [N, 6], what each image gets, three before the hue's turn and three after it:
            constants of :mod:`hnas.dataset.batch_transforms` or ``NO_CHANGE``.
        amounts: factors [N, 6], 1 where nothing changes.
        turns: float [N, 2]: 1 where the hue turns, and by how many 1/255 of a whole turn.
    """
    turned, shift = (column.reshape([-1, 1, 1, 1]) for column in turns.unbind(1))
    for place, (step, amount) in enumerate(zip(steps.unbind(1), amounts.unbind(1), strict=True)):
        if place == 3:
            images = paddle.where(turned > 0, shift_hue(images, shift), images)
        images = _blend(images, step.reshape([-1, 1, 1, 1]), amount.reshape([-1, 1, 1, 1]))
    return images


def _blend(images: paddle.Tensor, step: paddle.Tensor, factor: paddle.Tensor) -> paddle.Tensor:
    """Black, the mean grey or the greys plus factor times the difference: Pillow's, truncated."""
    grey = grey_of(images)
    mean = (grey.mean(axis=[2, 3], keepdim=True) + 0.5).floor()
    base = paddle.where(step == CONTRAST, mean, paddle.zeros([1]))
    base = paddle.where(step == SATURATION, grey, base)
    return (base + factor * (images - base)).clip(0, 255).floor()


def grey_of(images: paddle.Tensor) -> paddle.Tensor:
    """Luma [N, 1, H, W] of float images [N, 3, H, W] of whole levels, Pillow's to the level.

    The sums are whole and below 2^24, so float32 holds them exactly.
    """
    red, green, blue = images.split(3, axis=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) / 65536).floor()


def shift_hue(images: paddle.Tensor, shift: paddle.Tensor) -> paddle.Tensor:
    """Turn the hue of float images [N, 3, H, W] by ``shift`` [N, 1, 1, 1] in 1/255 turns.

    By way of hue, saturation and value of 256 levels each, as in Pillow.
    """
    value, low = images.max(axis=1, keepdim=True), images.min(axis=1, keepdim=True)
    spread = value - low
    red, green, blue = ((value - images) / spread.clip(min=1.0)).split(3, axis=1)
    hue = paddle.where(images[:, 1:2] == value, 2 + red - blue, 4 + green - red)
    hue = paddle.where(images[:, :1] == value, blue - green, hue)
    hue = (paddle.where(hue < 0, hue + 6, hue) / 6 * 255).floor()
    saturation = (spread / value.clip(min=1.0) * 255).floor() / 255
    hue = paddle.where(spread == 0, paddle.zeros([1]), hue) + shift
    sector = (hue - (hue / 256).floor() * 256) * (6 / 255)
    whole = sector.floor()
    part = sector - whole
    p = _to_levels(value * (1 - saturation))
    q = _to_levels(value * (1 - saturation * part))
    t = _to_levels(value * (1 - saturation * (1 - part)))
    channels = ((value, q, p, p, t, value), (t, value, value, q, p, p), (p, p, t, value, value, q))
    return paddle.concat([_choose(whole, channel) for channel in channels], axis=1)


def _choose(sector: paddle.Tensor, values: Sequence[paddle.Tensor]) -> paddle.Tensor:
    """Of six values the one of the sector, 0 to 6; 6 is 0."""
    chosen = values[0]
    for number, value in enumerate(values[1:], 1):
        chosen = paddle.where(sector == number, value, chosen)
    return chosen


def blur(images: paddle.Tensor, sigma: paddle.Tensor, largest: float) -> paddle.Tensor:
    """Gaussian blur of float images [N, 3, H, W] of whole levels by ``sigma`` [N], in px.

    Borders are repeated. ``largest`` bounds the sigmas: pixels further than four times that are
    left out. A sigma of 0 changes nothing.
    """
    reach = math.ceil(4 * largest)
    padded = F.pad(images, [reach] * 4, mode="replicate")
    rows, columns = (_blur_weights(sigma, length, reach) for length in images.shape[2:])
    return _to_levels(_weighted(padded, rows, columns))


def _blur_weights(sigma: paddle.Tensor, length: int, reach: int) -> paddle.Tensor:
    """Weights [N, length, length + 2 * reach]."""
    near = sigma.clip(min=0.01).reshape([-1, 1, 1])
    pixels = paddle.arange(length + 2 * reach, dtype="float32")
    distance = pixels - reach - paddle.arange(length, dtype="float32").unsqueeze(1)
    inside = (distance.abs() <= reach).astype("float32")
    weights = (-0.5 * (distance / near) ** 2).exp() * inside
    return weights / weights.sum(axis=-1, keepdim=True)
