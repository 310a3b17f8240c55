"""The supernet's convolutions as the evaluator uses them: sliced, with BatchNorm folded in."""

from __future__ import annotations

import paddle

from hnas.models.elastic import ElasticResNet

Convolution = tuple[paddle.Tensor, ...]
"""(filters, bias), or with BatchNorm re-calibration (filters, scale, shift)."""


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
    """

    def __init__(
        self, network: ElasticResNet, fold: bool, filters: str = "OIHW", channel_axis: int = 1
    ):
        self._fold = fold
        self._order = ["OIHW".index(axis) for axis in filters]
        self._input_axis = filters.index("I")
        self._channel_axis = channel_axis
        self._layers = {("stem",): (network.stem.conv.fn, network.stem.bn)}
        for stage in range(len(network.depths)):
            for index, block in enumerate(network.stage_blocks(stage)):
                self._layers[stage, index, "conv1"] = block.conv1.fn, block.bn1
                self._layers[stage, index, "conv2"] = block.conv2.fn, block.bn2
                if block.downsample is not None:
                    conv, norm = block.downsample
                    self._layers[stage, index, "project"] = conv.fn, norm
        self._whole: dict[tuple, Convolution] = {}
        self._narrow: dict[tuple, paddle.Tensor] = {}

    def get(self, key: tuple, cin: int, cout: int) -> Convolution:
        """The convolution ``(stage, block, "conv1" | "conv2" | "project")`` or ``("stem",)``."""
        if key not in self._whole:
            self._whole[key] = self._prepare(key)
        filters, *rest = self._whole[key]
        if cin < filters.shape[self._input_axis]:
            if (key, cin) not in self._narrow:
                self._narrow[key, cin] = leading_channels(filters, cin, self._input_axis)
            filters = self._narrow[key, cin]
        if cout == filters.shape[0]:
            return (filters, *rest)
        axis = self._channel_axis
        return (filters[:cout], *(leading_channels(part, cout, axis) for part in rest))

    @paddle.no_grad()
    def _prepare(self, key: tuple) -> Convolution:
        conv, norm = self._layers[key]
        filters, parts = conv.weight, (norm.weight, norm.bias)
        if self._fold:
            # In float64, so that the folded network rounds no more than the unfolded one.
            scale, shift, mean, variance = (
                part.astype("float64")
                for part in (norm.weight, norm.bias, norm._mean, norm._variance)
            )
            factor = scale / paddle.sqrt(variance + norm._epsilon)
            filters = (filters.astype("float64") * factor.reshape([-1, 1, 1, 1])).astype("float32")
            parts = ((shift - mean * factor).astype("float32"),)
        shape = [1, 1, 1, 1]
        shape[self._channel_axis] = -1
        filters = filters.transpose(self._order).contiguous()
        return (filters.detach(), *(part.reshape(shape).detach() for part in parts))


def leading_channels(x: paddle.Tensor, channels: int, axis: int) -> paddle.Tensor:
    """The first ``channels`` of ``x`` along ``axis``, contiguous; ``x`` itself if that is all."""
    if x.shape[axis] == channels:
        return x
    return x[(slice(None),) * axis + (slice(0, channels),)].contiguous()
