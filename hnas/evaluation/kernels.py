"""The operations that the shared evaluation is made of, in plain Paddle.

Each takes activations and convolutions as tensors, so that one piece of code serves every block and
width. ``evaluation/cpu_kernels.py`` has faster ways of running them on CPUs,
``evaluation/gpu_kernels.py`` those of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.evaluation.weights import Convolution, Form, leading_channels
from hnas.models.elastic import batch_statistics

EPSILON = 1e-5


class DygraphKernels:
    """Paddle's operators one by one in float32: what the kernels for CPUs must agree with.

    Args:
        calibration: BatchNorm takes the statistics of this many images at the front of every
            batch; with 0 it is folded into the convolutions.
        layout: of activations, ``NCHW`` or ``NHWC``.

    Convolutions are as :class:`SlicedWeights` gives them; activations are [N, C, H, W] below,
    whatever the layout.
    """

    def __init__(self, calibration: int = 0, layout: str = "NCHW"):
        self.calibration = calibration
        self.layout = layout
        self.channel_axis = layout.index("C")
        self._batch_axis = layout.index("N")
        self._spatial = [layout.index("H"), layout.index("W")]

    def form(self) -> Form:
        """How a convolution's tensors must lie."""
        return Form(channel_axis=self.channel_axis)

    def convolve(self, x, filters, stride: int, padding: int):
        """A convolution without bias."""
        return F.conv2d(x, filters, stride=stride, padding=padding, data_format=self.layout)

    def conv_norm(self, x, convolution: Convolution, stride: int, padding: int):
        """A convolution and its BatchNorm, folded or by the calibration images' statistics."""
        y = self.convolve(x, convolution.filters, stride, padding)
        if not self.calibration:
            return self._add_bias(y, convolution.rest[0])
        scale, shift = convolution.rest
        seen = leading_channels(y, self.calibration, self._batch_axis)
        mean, variance = batch_statistics(seen, self._mean_of_calibration)
        factor = scale * paddle.rsqrt(variance + EPSILON)
        return y * factor + (shift - mean * factor)

    def _add_bias(self, y, bias):
        if self.channel_axis < 3:
            return y + bias
        # As a matrix: Paddle adds a row several times as fast as it broadcasts over four axes.
        return (y.reshape([-1, y.shape[3]]) + bias.reshape([-1])).reshape(y.shape)

    def _mean_of_calibration(self, x):
        """Mean over images and positions, [1, C, 1, 1]."""
        return x.mean([self._batch_axis, *self._spatial], keepdim=True)

    def stem(self, x, conv: Convolution):
        """7x7/2 convolution, ReLU, 3x3/2 max pooling: [N, 3, H, W] -> [N, C, H/4, W/4]."""
        y = F.relu(self.conv_norm(x, conv, stride=2, padding=3))
        return F.max_pool2d(y, 3, 2, 1, data_format=self.layout)

    def first(self, x, conv1: Convolution, stride: int):
        """A block's conv1 and ReLU."""
        return F.relu(self.conv_norm(x, conv1, stride=stride, padding=1))

    def project(self, x, conv: Convolution):
        """A block's projection shortcut."""
        return self.conv_norm(x, conv, stride=2, padding=0)

    def last(self, y, shortcut, conv2: Convolution):
        """A block's conv2, the shortcut, of which it may have fewer channels, and ReLU."""
        shortcut = self.narrow(shortcut, conv2.outputs)
        return F.relu(self.conv_norm(y, conv2, stride=1, padding=1) + shortcut)

    def block(self, x, conv1: Convolution, conv2: Convolution):
        """A whole block with identity shortcut."""
        return self.last(self.first(x, conv1, stride=1), x, conv2)

    def narrow(self, x, channels: int):
        """The first channels of an activation."""
        return leading_channels(x, channels, self.channel_axis)

    def accept(self, x, kernels: DygraphKernels):
        """An activation of other kernels in the layout of these."""
        if kernels.layout == self.layout:
            return x
        return x.transpose([kernels.layout.index(axis) for axis in self.layout]).contiguous()

    def pooled(self, x):
        """Global average of the images behind the calibration's: float32 [N, C]."""
        scored = x[(slice(None),) * self._batch_axis + (slice(self.calibration, None),)]
        return scored.astype("float32").mean(self._spatial)

    def map_size(self, x) -> int:
        """Positions of a feature map, H times W."""
        return x.shape[self._spatial[0]] * x.shape[self._spatial[1]]

    def classifier(self, weight, bias) -> Callable[[paddle.Tensor], paddle.Tensor]:
        """From pooled features [N, C] to logits [N, classes], both float32.

        Args:
            weight: [most channels, classes], of which the first C rows are used.
            bias: [classes].
        """
        return lambda features: features @ weight[: features.shape[1]] + bias
