"""3x3 convolutions of small feature maps by Winograd's minimal filtering, for CPUs.

Two by two outputs take 16 products a pair of channels instead of 36 (Lavin & Gray, CVPR 2016,
https://arxiv.org/abs/1509.09308, F(2x2, 3x3)). Transforming the filters acts on their height and
width only, so it is done once for the supernet and slices of channels stay slices.
"""

from __future__ import annotations

import numpy as np
import paddle

from hnas.evaluation.kernels import DygraphKernels
from hnas.evaluation.weights import Convolution, Form

TILE, POINTS = 2, 4
"""Outputs of a tile in one dimension, and the points where its transform is taken."""
INPUTS_TO_POINTS = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
FILTER_TO_POINTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
POINTS_TO_OUTPUTS = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])


class WinogradKernels(DygraphKernels):
    """Stages whose maps are so small that the transforms cost little beside the products.

    Activations are [H, W, N, C]: a transform is then one matrix product over all images and
    channels, and so are the products of all points. Convolutions of stride 2 are left to other
    kernels.

    Args:
        strided: kernels in NCHW for convolutions of stride 2.
    """

    def __init__(self, strided: DygraphKernels):
        super().__init__(strided.calibration, layout="HWNC")
        self._strided = strided
        self._transforms: dict[tuple, tuple[paddle.Tensor, paddle.Tensor]] = {}

    def form(self, size: int, stride: int) -> Form:
        if stride > 1:
            return self._strided.form(size, stride)
        return Form(filters_to_points, 1, 2, self.channel_axis)

    def convolve(self, x, filters, stride: int, padding: int):
        height, width, batch, channels = x.shape
        if (height, width) not in self._transforms:
            self._transforms[height, width] = tuple(map(paddle.to_tensor, matrices(height, width)))
        into, out = self._transforms[height, width]
        points = paddle.matmul(into, x.reshape([height * width, batch * channels]))
        products = paddle.matmul(points.reshape([POINTS**2, -1, channels]), filters)
        y = paddle.matmul(out, products.reshape([out.shape[1], -1]))
        return y.reshape([height, width, batch, filters.shape[2]])

    def first(self, x, conv1: Convolution, stride: int):
        if stride == 1:
            return super().first(x, conv1, stride)
        return super().accept(self._strided.first(x, conv1, stride), self._strided)

    def project(self, x, conv: Convolution):
        return super().accept(self._strided.project(x, conv), self._strided)

    def accept(self, x, kernels: DygraphKernels, stride: int = 1):
        if stride == 1:
            return super().accept(x, kernels)
        return self._strided.accept(x, kernels, stride)


def filters_to_points(filters: paddle.Tensor) -> paddle.Tensor:
    """Transformed filters: [O, I, 3, 3] -> [16, I, O]."""
    # In float64, so that they are rounded once.
    kernel = np.kron(FILTER_TO_POINTS, FILTER_TO_POINTS)
    outputs, inputs = filters.shape[:2]
    flat = filters.astype("float64").transpose([2, 3, 1, 0]).reshape([9, inputs * outputs])
    points = paddle.matmul(paddle.to_tensor(kernel), flat)
    return points.reshape([POINTS**2, inputs, outputs]).astype("float32")


def matrices(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The transforms of a whole map as matrices, float32.

    Returns:
        From its positions to the points of all tiles, [16 * tiles, height * width], padding of 1
        included, and from the products there to its positions, [height * width, 16 * tiles].
    """
    (into_rows, out_rows), (into_columns, out_columns) = (
        _one_dimension(height),
        _one_dimension(width),
    )
    into = np.einsum("atp,buq->abtupq", into_rows, into_columns)
    out = np.einsum("pat,qbu->pqabtu", out_rows, out_columns)
    positions = height * width
    return (
        into.reshape(-1, positions).astype(np.float32),
        out.reshape(positions, -1).astype(np.float32),
    )


def _one_dimension(size: int) -> tuple[np.ndarray, np.ndarray]:
    """[points, tiles, positions] and [positions, points, tiles]."""
    tiles = -(-size // TILE)
    into, out = np.zeros((POINTS, tiles, size)), np.zeros((size, POINTS, tiles))
    for tile in range(tiles):
        first = tile * TILE
        for tap in range(POINTS):
            position = first - 1 + tap
            if 0 <= position < size:
                into[:, tile, position] = INPUTS_TO_POINTS[:, tap]
        for position in range(first, min(first + TILE, size)):
            out[position, :, tile] = POINTS_TO_OUTPUTS[position - first]
    return into, out
