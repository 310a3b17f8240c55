"""The supernet's convolutions as the evaluator uses them: sliced, with BatchNorm folded in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import paddle

from hnas.models.elastic import ElasticResNet

STEM = (-1, 0, "stem")
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Form:
    """How kernels want the tensors of a convolution to lie in memory.

    Attributes:
        arrange: from filters [O, I, K, K] to this form.
        inputs: axis of the input channels in the arranged filters; the outputs' is the first.
        channel_axis: of the activations, and so of bias, scale and shift.
        dtype: of filters and bias. Scale and shift are float32 always.
        sliced: whether filters are narrowed to the channels in use. If not, they are the whole.
    """

    arrange: Callable[[paddle.Tensor], paddle.Tensor] = lambda filters: filters
    inputs: int = 1
    channel_axis: int = 1
    dtype: str = "float32"
    sliced: bool = True


class Convolution(NamedTuple):
    """A convolution of one width.

    Attributes:
        filters: of it, or the whole ones, whose leading part it uses.
        rest: (bias,), or with BatchNorm re-calibration (scale, shift).
        outputs: its output channels.
        identity: a number that no other convolution of this process has.
        macs: multiply-accumulates a position, those with padding included.
    """

    filters: paddle.Tensor
    rest: tuple[paddle.Tensor, ...]
    outputs: int
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
        form: in which they are wanted.
    """

    def __init__(self, network: ElasticResNet, fold: bool, form: Form):
        self._fold = fold
        self._form = form
        self._layers = {STEM: (network.stem.conv.fn, network.stem.bn)}
        for stage in range(len(network.depths)):
            for index, block in enumerate(network.stage_blocks(stage)):
                self._layers[stage, index, "conv1"] = block.conv1.fn, block.bn1
                self._layers[stage, index, "conv2"] = block.conv2.fn, block.bn2
                if block.downsample is not None:
                    conv, norm = block.downsample
                    self._layers[stage, index, "project"] = conv.fn, norm
        self._whole: dict[tuple, tuple] = {}
        self._rest: dict[tuple, tuple] = {}
        self._slices = LatestTensors(CACHE_BYTES)

    def get(self, key: tuple, cin: int, cout: int) -> Convolution:
        """The convolution ``(stage, block, "conv1" | "conv2" | "project")``, or ``STEM``."""
        if key not in self._whole:
            self._whole[key] = self._prepare(key)
        filters, *rest = self._whole[key]
        form = self._form
        if (key, cin, cout) not in self._rest:
            narrow = tuple(leading_channels(part, cout, form.channel_axis) for part in rest)
            self._rest[key, cin, cout] = narrow, cout, new_identity()
        if form.sliced:
            filters = self._narrow(key, filters, cin)[:cout]
        kernel = self._layers[key][0].weight.shape[2]
        return Convolution(filters, *self._rest[key, cin, cout], kernel * kernel * cin * cout)

    def _narrow(self, key: tuple, filters: paddle.Tensor, cin: int) -> paddle.Tensor:
        """Fewer inputs, of which a copy is kept; fewer outputs are a view then."""
        # One axis after the other: Paddle copies a slice of two axes element by element.
        axis = self._form.inputs
        if filters.shape[axis] == cin:
            return filters
        return self._slices.get((key, cin), lambda: leading_channels(filters, cin, axis))

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
        form = self._form
        shape = [1, 1, 1, 1]
        shape[form.channel_axis] = -1
        filters = filters.detach()
        parts = [part.reshape(shape).detach() for part in parts]
        if form.dtype != "float32":
            filters = filters.astype(form.dtype)
            parts = [part.astype(form.dtype) for part in parts] if self._fold else parts
        return form.arrange(filters), *parts


class LatestTensors:
    """Tensors that can be made again: the latest used ones, of at most ``capacity`` bytes."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._used = 0
        self._held: OrderedDict[tuple, paddle.Tensor] = OrderedDict()

    def get(self, key: tuple, make: Callable[[], paddle.Tensor]) -> paddle.Tensor:
        """What ``make`` gives, or gave."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        self._held[key] = tensor = make()
        self._used += tensor.size * tensor.element_size()
        while self._used > self._capacity and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._used -= oldest.size * oldest.element_size()
        return tensor


def leading_channels(x: paddle.Tensor, channels: int, axis: int) -> paddle.Tensor:
    """The first ``channels`` of ``x`` along ``axis``, contiguous; ``x`` itself if that is all."""
    if x.shape[axis] == channels:
        return x
    return x[(slice(None),) * axis + (slice(0, channels),)].contiguous()


def channels_last(filters: paddle.Tensor) -> paddle.Tensor:
    """[O, I, K, K] -> [O, K, K, I]."""
    return filters.transpose([0, 2, 3, 1]).contiguous()
