"""The convolutions of a walk: sliced out of the supernet, and computed.

By Paddle's operators; on CPUs the convolutions alone by oneDNN. ``gpu_kernels.py`` has a faster way
on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.base.errors import UserError
from hnas.evaluation.variants import Variant
from hnas.models.convolution import channels_last_conv2d
from hnas.models.elastic import ElasticResNet, batch_statistics

STEM = (-1, 0, "stem")
EPSILON = 1e-5
PLAIN = Variant()


# --- convolutions of any width


class Convolution(NamedTuple):
    """A convolution of one width.

    Attributes:
        filters: of it, or the whole ones, whose leading part it uses.
        rest: (bias,), or with BatchNorm re-calibration (scale, shift).
        outputs: its output channels.
    """

    filters: paddle.Tensor
    rest: tuple[paddle.Tensor, ...]
    outputs: int

    @property
    def padding(self) -> int:
        """In px: half of the kernel, as all of the network's have it."""
        return self.filters.shape[2] // 2


class SlicedWeights:
    """Convolutions of any width out of one supernet.

    Args:
        network: the supernet; its weights must not change while this is in use.
        kernels: what they are for. Without re-calibration the running statistics of BatchNorm are
            folded into filters and bias, once per output channel, so slices stay valid. With it
            filters, scale and shift stay apart.
    """

    def __init__(self, network: ElasticResNet, kernels: Kernels):
        self._kernels = kernels
        self._layers = {STEM: (network.stem.conv.fn, network.stem.bn)}
        for stage in range(len(network.depths)):
            for index, block in enumerate(network.stage_blocks(stage)):
                self._layers[stage, index, "conv1"] = block.conv1.fn, block.bn1
                self._layers[stage, index, "conv2"] = block.conv2.fn, block.bn2
                if block.downsample is not None:
                    conv, norm = block.downsample
                    self._layers[stage, index, "project"] = conv.fn, norm
        self._names = {layer: name for name, layer in network.named_sublayers()}
        self._whole: dict[tuple, tuple] = {}
        # All widths of the full space take 0.6 GiB.
        self._slices: dict[tuple, paddle.Tensor] = {}

    def get(self, key: tuple, cin: int, cout: int) -> Convolution:
        """The convolution ``(stage, block, "conv1" | "conv2" | "project")``, or ``STEM``."""
        if key not in self._whole:
            self._whole[key] = self._prepare(key)
        filters, *rest = self._whole[key]
        if self._kernels.sliced:
            # One axis after the other: Paddle copies a slice of two axes element by element. Fewer
            # outputs are a view then.
            axis = 3 if self._kernels.filters_last else 1
            filters = self._slice((key, 0), filters, cin, axis)[:cout]
        axis = self._kernels.layout.index("C")
        parts = (self._slice((key, n), part, cout, axis) for n, part in enumerate(rest, 1))
        return Convolution(filters, tuple(parts), cout)

    def _slice(self, key: tuple, whole: paddle.Tensor, channels: int, axis: int) -> paddle.Tensor:
        """The leading channels of one of a convolution's tensors; they are kept."""
        if (key, channels) not in self._slices:
            self._slices[key, channels] = leading_channels(whole, channels, axis)
        return self._slices[key, channels]

    @paddle.no_grad()
    def _prepare(self, key: tuple) -> tuple:
        conv, norm = self._layers[key]
        filters, parts = conv.weight, (norm.weight, norm.bias)
        fold = not self._kernels.calibration
        if fold:
            # In float64, so that the factor and the bias are rounded once.
            scale, shift, mean, variance = (
                part.astype("float64")
                for part in (norm.weight, norm.bias, norm._mean, norm._variance)
            )
            factor = scale / paddle.sqrt(variance + norm._epsilon)
            filters = filters * factor.astype("float32").reshape([-1, 1, 1, 1])
            parts = ((shift - mean * factor).astype("float32"),)
        vectors = (self._kernels.vector(part.detach(), is_bias=fold) for part in parts)
        prepared = self._kernels.arranged(filters.detach()), *vectors
        if not all(bool(paddle.isfinite(part.astype("float32")).all()) for part in prepared):
            raise UserError(
                f"{self._names[norm]} and its convolution together are not finite in "
                f"{self._kernels.dtype}; use other weights or, where --amp overflows, --amp O0"
            )
        return prepared


def leading_channels(x: paddle.Tensor, channels: int, axis: int) -> paddle.Tensor:
    """The first ``channels`` of ``x`` along ``axis``, contiguous; ``x`` itself if that is all."""
    if x.shape[axis] == channels:
        return x
    return x[(slice(None),) * axis + (slice(0, channels),)].contiguous()


# --- what is computed of them


class Kernels:
    """The operations of a walk by Paddle's operators, in any variant.

    There is no autocast: filters and bias come in half precision, and so every operator stays in
    it. Autocast would turn back to float32 at the first float32 bias.

    Args:
        variant: how numbers are rounded and activations lie.
        calibration: BatchNorm takes the statistics of this many images at the front of every
            batch; with 0 it is folded into the convolutions.
        fused: whole convolutions, as ``gpu_kernels.py`` has them, without re-calibration; None: one
            operator each.

    Convolutions are as :class:`SlicedWeights` gives them; activations are [N, C, H, W] below,
    whatever the layout.

    Attributes:
        layout: of activations, ``NCHW`` or ``NHWC``.
        filters_last: whether filters are [O, K, K, I] instead of [O, I, K, K].
        dtype: of filters and biases; scales and shifts are float32.
        sliced: whether filters are narrowed to the channels in use; oneDNN takes a part itself.
    """

    def __init__(
        self, variant: Variant = PLAIN, calibration: int = 0, fused: Callable | None = None
    ):
        self.variant = variant
        self.calibration = calibration
        self.layout, self.sliced = variant.layout, not variant.onednn
        self.filters_last = fused is not None and self.layout == "NHWC"
        self.dtype = variant.precision.dtype
        self._spatial = [self.layout.index("H"), self.layout.index("W")]
        self._fused = fused

    def arranged(self, filters):
        """Filters [O, I, K, K], float32, as these kernels want them."""
        filters = filters if self.dtype == "float32" else filters.astype(self.dtype)
        return filters.transpose([0, 2, 3, 1]).contiguous() if self.filters_last else filters

    def vector(self, values, is_bias: bool):
        """[C], float32, such that it can be added to an activation."""
        shape = [1, 1, 1, 1]
        shape[self.layout.index("C")] = -1
        values = values.reshape(shape)
        return values.astype(self.dtype) if is_bias and self.dtype != "float32" else values

    def accept(self, x, layout: str = "NCHW"):
        """An activation that lies as ``layout`` says, as these kernels want it."""
        if layout != self.layout:
            x = x.transpose([layout.index(axis) for axis in self.layout]).contiguous()
        return x.astype(self.variant.precision.dtype) if self.variant.precision.is_half else x

    def conv_norm(self, x, conv: Convolution, stride: int = 1, relu: bool = True, shortcut=None):
        """A convolution and its BatchNorm, folded or by the calibration images' statistics.

        Then the leading channels of a shortcut are added, and ReLU is applied.
        """
        if shortcut is not None:
            shortcut = self.narrow(shortcut, conv.outputs)
        if self._fused is not None:
            how = stride, conv.padding, self.layout, "relu" if relu else "identity"
            return self._fused(x, conv.filters, conv.rest[0].flatten(), shortcut, *how)
        y = self.convolve(x, conv, stride)
        y = self._normalised(y, conv) if self.calibration else self._add_bias(y, conv.rest[0])
        if shortcut is not None:
            y = y + shortcut
        return F.relu(y) if relu else y

    def convolve(self, x, conv: Convolution, stride: int):
        """A convolution without bias."""
        if self.variant.onednn:
            return channels_last_conv2d(x, conv.filters, conv.outputs, stride, conv.padding)
        window = {"stride": stride, "padding": conv.padding, "data_format": self.layout}
        return F.conv2d(x, conv.filters, **window)

    def _add_bias(self, y, bias):
        if self.layout == "NCHW":
            return y + bias
        # As a matrix: Paddle adds a row several times as fast as it broadcasts over four axes.
        return (y.reshape([-1, y.shape[3]]) + bias.reshape([-1])).reshape(y.shape)

    def _normalised(self, y, conv: Convolution):
        """BatchNorm by the calibration images' statistics."""
        seen = y[: self.calibration]
        # Statistics in float32: a half-precision mean would be as coarse as the values.
        seen = seen.astype("float32") if self.variant.precision.is_half else seen
        statistics = batch_statistics(seen, [0, *self._spatial])
        # One operator, which computes in float32 and rounds its result only.
        flat = [part.flatten() for part in (*statistics, *conv.rest)]
        return F.batch_norm(y, *flat, epsilon=EPSILON, data_format=self.layout)

    def max_pool(self, x):
        """3x3, stride 2."""
        return F.max_pool2d(x, 3, 2, 1, data_format=self.layout)

    def narrow(self, x, channels: int):
        """The first channels of an activation."""
        return leading_channels(x, channels, self.layout.index("C"))

    def pooled(self, x):
        """Global average of the images behind the calibration's: float32 [N, C]."""
        return x[self.calibration :].astype("float32").mean(self._spatial)
