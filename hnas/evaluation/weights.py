"""The supernet's convolutions as the evaluator uses them: sliced, with BatchNorm folded in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import paddle

from hnas.models.elastic import ElasticResNet

Filters = paddle.Tensor | tuple[paddle.Tensor, ...]
"""Filters in the form that some kernels want; several tensors if that form has parts."""

STEM = (-1, 0, "stem")
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Form:
    """How kernels want the tensors of a convolution to lie in memory.

    Attributes:
        arrange: from filters [O, I, K, K] to this form.
        inputs, outputs: axes of the channels in the arranged filters.
        channel_axis: of the activations, and so of bias, scale and shift.
        dtype: of filters and bias. Scale and shift are float32 always.
    """

    arrange: Callable[[paddle.Tensor], Filters] = lambda filters: filters
    inputs: int = 1
    outputs: int = 0
    channel_axis: int = 1
    dtype: str = "float32"


class Convolution(NamedTuple):
    """A convolution of one width.

    Attributes:
        filters: of it.
        rest: (bias,), or with BatchNorm re-calibration (scale, shift).
        identity: a number that no other convolution of this process has.
        macs: multiply-accumulates a position, those with padding included.
    """

    filters: Filters
    rest: tuple[paddle.Tensor, ...]
    identity: int
    macs: int = 0


new_identity = count().__next__


class SlicedWeights:
    """Convolutions of any width out of one supernet.

    Args:
        network: the supernet; its weights must not change while this is in use.
        fold: fold the running statistics of BatchNorm into filters and bias. This is done once
            per output channel, so slices stay valid. False keeps filters, scale and shift apart
            for statistics that are measured later.
        form: of the convolutions of a stage (0 to 3; -1: the stem) and a stride.
    """

    def __init__(self, network: ElasticResNet, fold: bool, form: Callable[[int, int], Form]):
        self._fold = fold
        self._layers = {STEM: (network.stem.conv.fn, network.stem.bn)}
        for stage in range(len(network.depths)):
            for index, block in enumerate(network.stage_blocks(stage)):
                self._layers[stage, index, "conv1"] = block.conv1.fn, block.bn1
                self._layers[stage, index, "conv2"] = block.conv2.fn, block.bn2
                if block.downsample is not None:
                    conv, norm = block.downsample
                    self._layers[stage, index, "project"] = conv.fn, norm
        self._forms = {
            key: form(key[0], conv._stride[0]) for key, (conv, _) in self._layers.items()
        }
        self._whole: dict[tuple, tuple] = {}
        self._rest: dict[tuple, tuple] = {}
        self._slices = _LatestSlices(CACHE_BYTES)

    def get(self, key: tuple, cin: int, cout: int) -> Convolution:
        """The convolution ``(stage, block, "conv1" | "conv2" | "project")``, or ``STEM``."""
        if key not in self._whole:
            self._whole[key] = self._prepare(key)
        filters, *rest = self._whole[key]
        form = self._forms[key]
        if isinstance(filters, tuple):
            sliced = tuple(
                self._slice((key, part), whole, form, cin, cout)
                for part, whole in enumerate(filters)
            )
        else:
            sliced = self._slice((key,), filters, form, cin, cout)
        if (key, cin, cout) not in self._rest:
            narrow = tuple(leading_channels(part, cout, form.channel_axis) for part in rest)
            self._rest[key, cin, cout] = narrow, new_identity()
        kernel = self._layers[key][0].weight.shape[2]
        return Convolution(sliced, *self._rest[key, cin, cout], kernel * kernel * cin * cout)

    def _slice(self, name: tuple, whole: paddle.Tensor, form: Form, cin: int, cout: int):
        """A slice of one tensor; of its leading axis it is a view, else a copy that is kept."""
        # One axis after the other: Paddle copies a slice of two axes element by element.
        narrow = self._slices.get((*name, cin), whole, cin, form.inputs)
        if form.outputs == 0:
            return narrow[:cout] if cout < narrow.shape[0] else narrow
        return self._slices.get((*name, cin, cout), narrow, cout, form.outputs)

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
        form = self._forms[key]
        shape = [1, 1, 1, 1]
        shape[form.channel_axis] = -1
        filters = filters.detach()
        parts = [part.reshape(shape).detach() for part in parts]
        if form.dtype != "float32":
            filters = filters.astype(form.dtype)
            parts = [part.astype(form.dtype) for part in parts] if self._fold else parts
        return form.arrange(filters), *parts


class _LatestSlices:
    """Copies of slices, the latest used ones, of at most ``capacity`` bytes in all."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._used = 0
        self._parts: OrderedDict[tuple, paddle.Tensor] = OrderedDict()

    def get(self, key: tuple, whole: paddle.Tensor, channels: int, axis: int) -> paddle.Tensor:
        """The leading ``channels`` of ``whole``, which is what ``key`` stands for."""
        if whole.shape[axis] == channels:
            return whole
        if key in self._parts:
            self._parts.move_to_end(key)
            return self._parts[key]
        self._parts[key] = part = leading_channels(whole, channels, axis)
        self._used += part.size * part.element_size()
        while self._used > self._capacity and len(self._parts) > 1:
            _, oldest = self._parts.popitem(last=False)
            self._used -= oldest.size * oldest.element_size()
        return part


def leading_channels(x: paddle.Tensor, channels: int, axis: int) -> paddle.Tensor:
    """The first ``channels`` of ``x`` along ``axis``, contiguous; ``x`` itself if that is all."""
    if x.shape[axis] == channels:
        return x
    return x[(slice(None),) * axis + (slice(0, channels),)].contiguous()


def channels_last(filters: paddle.Tensor) -> paddle.Tensor:
    """[O, I, K, K] -> [O, K, K, I]."""
    return filters.transpose([0, 2, 3, 1]).contiguous()
