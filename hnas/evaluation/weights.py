"""The supernet's convolutions as the evaluator uses them: sliced, with BatchNorm folded in."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import NamedTuple

import paddle

from hnas.models.elastic import ElasticResNet

Filters = paddle.Tensor | tuple[paddle.Tensor, ...]
"""[O, I, K, K] or [O, K, K, I]; or the windows of :func:`corner_windows`."""


class Convolution(NamedTuple):
    """A convolution of one width.

    Attributes:
        filters: of it.
        rest: (bias,), or with BatchNorm re-calibration (scale, shift).
        identity: a number that no other convolution of this process has.
    """

    filters: Filters
    rest: tuple[paddle.Tensor, ...]
    identity: int


new_identity = count().__next__


class SlicedWeights:
    """Convolutions of any width out of one supernet.

    A slice of input channels is copied once and kept, which takes at most one copy per width of
    the search space; a slice of output channels is a view.

    Args:
        network: the supernet; must not be trained while this is in use.
        fold: fold the running statistics of BatchNorm into filters and bias. This is done once
            per output channel, so slices stay valid. False keeps filters, scale and shift apart
            for statistics that are measured later.
        filters: layout of the filters, ``OIHW`` or ``OHWI``.
        channel_axis: of the activations, 1 (NCHW) or 3 (NHWC): where bias, scale, shift go.
        corners: size 1 or 2 of the feature maps of stages whose 3x3 filters of stride 1 are
            wanted as corner windows, by stage.
    """

    def __init__(
        self,
        network: ElasticResNet,
        fold: bool,
        filters: str = "OIHW",
        channel_axis: int = 1,
        corners: Mapping[int, int] | None = None,
    ):
        self._fold = fold
        self._order = ["OIHW".index(axis) for axis in filters]
        self._input_axis = filters.index("I")
        self._channel_axis = channel_axis
        self._corners = corners or {}
        self._layers = {("stem",): (network.stem.conv.fn, network.stem.bn)}
        for stage in range(len(network.depths)):
            for index, block in enumerate(network.stage_blocks(stage)):
                self._layers[stage, index, "conv1"] = block.conv1.fn, block.bn1
                self._layers[stage, index, "conv2"] = block.conv2.fn, block.bn2
                if block.downsample is not None:
                    conv, norm = block.downsample
                    self._layers[stage, index, "project"] = conv.fn, norm
        self._whole: dict[tuple, tuple] = {}
        self._narrow: dict[tuple, paddle.Tensor] = {}
        self._given: dict[tuple, Convolution] = {}

    def get(self, key: tuple, cin: int, cout: int) -> Convolution:
        """The convolution ``(stage, block, "conv1" | "conv2" | "project")`` or ``("stem",)``."""
        if (key, cin, cout) in self._given:
            return self._given[key, cin, cout]
        if key not in self._whole:
            self._whole[key] = self._prepare(key)
        filters, *rest = self._whole[key]
        if isinstance(filters, tuple):
            sliced = tuple(self._slice((key, i), f, cin, cout) for i, f in enumerate(filters))
        else:
            sliced = self._slice(key, filters, cin, cout)
        axis = self._channel_axis
        given = Convolution(
            sliced, tuple(leading_channels(part, cout, axis) for part in rest), new_identity()
        )
        self._given[key, cin, cout] = given
        return given

    def _slice(self, key: tuple, filters: paddle.Tensor, cin: int, cout: int) -> paddle.Tensor:
        if cin < filters.shape[self._input_axis]:
            if (key, cin) not in self._narrow:
                self._narrow[key, cin] = leading_channels(filters, cin, self._input_axis)
            filters = self._narrow[key, cin]
        return filters[:cout] if cout < filters.shape[0] else filters

    @paddle.no_grad()
    def _prepare(self, key: tuple) -> tuple:
        conv, norm = self._layers[key]
        filters, parts = conv.weight, (norm.weight, norm.bias)
        if self._fold:
            # In float64, so that the factor and the bias are rounded once.
            scale, shift, mean, variance = (
                part.astype("float64")
                for part in (norm.weight, norm.bias, norm._mean, norm._variance)
            )
            factor = scale / paddle.sqrt(variance + norm._epsilon)
            filters = filters * factor.astype("float32").reshape([-1, 1, 1, 1])
            parts = ((shift - mean * factor).astype("float32"),)
        shape = [1, 1, 1, 1]
        shape[self._channel_axis] = -1
        filters = filters.transpose(self._order).contiguous().detach()
        stride_1 = key[2:] == ("conv2",) or (key[2:] == ("conv1",) and key[1] > 0)
        if key[0] in self._corners and stride_1:
            filters = corner_windows(filters, self._corners[key[0]])
        return (filters, *(part.reshape(shape).detach() for part in parts))


def corner_windows(filters: paddle.Tensor, size: int) -> tuple[paddle.Tensor, ...]:
    """The parts of 3x3 filters [O, 3, 3, I] that the outputs of a tiny map use.

    Args:
        filters: with stride 1 and padding 1.
        size: height and width of the map, 1 or 2.

    Returns:
        For each output [O, size, size, I]; its other taps only see padding.
    """
    return tuple(
        filters[:, 1 - row : 1 - row + size, 1 - column : 1 - column + size].contiguous()
        for row in range(size)
        for column in range(size)
    )


def filter_size(filters: Filters) -> int:
    """Multiply-accumulates of a convolution for each position, padding included."""
    if isinstance(filters, tuple):
        return filters[0].size * 9 // len(filters)
    return filters.size


def leading_channels(x: paddle.Tensor, channels: int, axis: int) -> paddle.Tensor:
    """The first ``channels`` of ``x`` along ``axis``, contiguous; ``x`` itself if that is all."""
    if x.shape[axis] == channels:
        return x
    return x[(slice(None),) * axis + (slice(0, channels),)].contiguous()
