"""Convolutions of tiny feature maps as matrix products, for CPUs."""

from __future__ import annotations

from functools import partial

import numpy as np
import paddle

from hnas.evaluation.kernels import DygraphKernels
from hnas.evaluation.weights import Form, channels_last


class MatmulKernels(DygraphKernels):
    """Convolutions as one matrix product over the batch, for tiny feature maps on CPUs.

    With 2x2 positions an image, Paddle's own convolution multiplies 4 columns at a time, and
    oneDNN spends more on re-ordering filters than on using them. Here the columns of all images
    are gathered (NHWC, so that a gathered piece is all channels of a position) and multiplied
    with the filters as they lie.
    """

    def __init__(self, calibration: int = 0):
        super().__init__(calibration, layout="NHWC")
        self._indices: dict[tuple, paddle.Tensor] = {}

    def form(self, size: int, stride: int) -> Form:
        if size <= 2 and stride == 1:
            return Form(partial(corner_windows, size=size), 3, 0, self.channel_axis)
        return Form(channels_last, 3, 0, self.channel_axis)

    def convolve(self, x, filters, stride: int, padding: int):
        if isinstance(filters, tuple):
            return self._convolve_corners(x, filters)
        batch, height, width, channels = x.shape
        outputs, kernel = filters.shape[:2]
        key = (height, width, kernel, stride, padding)
        if key not in self._indices:
            self._indices[key] = paddle.to_tensor(window_indices(*key))
        positions = x.reshape([batch, height * width, channels])
        if padding:
            outside = paddle.zeros([batch, 1, channels], dtype=x.dtype)
            positions = paddle.concat([positions, outside], axis=1)
        columns = paddle.index_select(positions, self._indices[key], axis=1)
        columns = columns.reshape([-1, kernel * kernel * channels])
        y = paddle.matmul(columns, filters.reshape([outputs, -1]), transpose_y=True)
        shape = [(size + 2 * padding - kernel) // stride + 1 for size in (height, width)]
        return y.reshape([batch, *shape, outputs])

    def _convolve_corners(self, x, windows):
        """3x3 convolution of a tiny map: each output by the taps that do not see padding."""
        batch, height, width, channels = x.shape
        x = x.reshape([batch, height * width * channels])
        outputs = [
            paddle.matmul(x, window.reshape([window.shape[0], -1]), transpose_y=True)
            for window in windows
        ]
        return paddle.stack(outputs, axis=1).reshape([batch, height, width, -1])


def window_indices(height: int, width: int, kernel: int, stride: int, padding: int) -> np.ndarray:
    """Input position of every tap of every output position, in row-major order, flat.

    A tap outside the map gets the index ``height * width``.
    """
    padded = np.full((height + 2 * padding, width + 2 * padding), height * width, dtype=np.int64)
    inside = slice(padding, padding + height), slice(padding, padding + width)
    padded[inside] = np.arange(height * width).reshape(height, width)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel))
    return windows[::stride, ::stride].reshape(-1)


def corner_windows(filters: paddle.Tensor, size: int) -> tuple[paddle.Tensor, ...]:
    """The parts of 3x3 filters [O, I, 3, 3] that the outputs of a tiny map use.

    Args:
        filters: with stride 1 and padding 1.
        size: height and width of the map, 1 or 2.

    Returns:
        For each output [O, size, size, I]; its other taps only see padding.
    """
    filters = channels_last(filters)
    return tuple(
        filters[:, 1 - row : 1 - row + size, 1 - column : 1 - column + size].contiguous()
        for row in range(size)
        for column in range(size)
    )
