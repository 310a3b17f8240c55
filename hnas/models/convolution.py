"""The convolutions of a network in training: oneDNN's on CPUs, Paddle's elsewhere.

A network computes with Paddle's until :func:`use_onednn` is called on it.
"""

from __future__ import annotations

import logging

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer
from paddle.nn import functional as F  # noqa: N812

from hnas.base.onednn import OneDNNError
from hnas.models.onednn import Shape, convolution_of

logger = logging.getLogger(__name__)

# Of a trial: relative to the largest value. Summing in another order differs by about 1e-6.
TOLERANCE = 1e-4


class PlainConv2D(nn.Conv2D):
    """A convolution without bias that can run on oneDNN."""

    onednn = False

    def forward(self, x):
        if self.onednn and onednn_takes(x):
            return onednn_conv2d(x, self.weight, self._out_channels, self._stride[0], self._padding)
        return super().forward(x)


def onednn_takes(x: paddle.Tensor) -> bool:
    """Whether ``x`` is what :func:`onednn_conv2d` takes."""
    return paddle.in_dynamic_mode() and x.dtype == paddle.float32 and x.place.is_cpu_place()


def use_onednn(*networks: nn.Layer) -> bool:
    """Let networks compute their convolutions by oneDNN, if that works here.

    It relies on the library that Paddle ships, so it is tried before it is trusted.

    Returns:
        Whether it does; if not, the log says why, and the networks stay as they are.
    """
    if paddle.get_device() != "cpu":
        return False
    try:
        difference = _largest_difference()
    except OneDNNError as error:
        logger.warning("convolutions run on Paddle's slower operators: %s", error)
        return False
    if not difference < TOLERANCE:
        logger.warning(
            "convolutions run on Paddle's slower operators: oneDNN's differ by %g", difference
        )
        return False
    for network in networks:
        for layer in network.sublayers(include_self=True):
            if hasattr(layer, "onednn"):
                layer.onednn = True
    return True


def _largest_difference() -> float:
    """Between both kinds of convolution, forward and backward, over the largest value."""
    worst = 0.0
    for kernel, stride, size in ((3, 1, 6), (3, 2, 5), (1, 2, 6), (7, 2, 9)):
        tensors = [ramp([3, 5, size, size]), ramp([9, 6, kernel, kernel])]
        padding = kernel // 2
        results = []
        for function in (
            lambda x, w, s=stride, p=padding: F.conv2d(x, w[:8, :5], stride=s, padding=p),
            lambda x, w, s=stride, p=padding: onednn_conv2d(x, w, 8, s, p),
        ):
            for tensor in tensors:
                tensor.stop_gradient = False
            y = function(*tensors)
            results.append([y, *paddle.grad(y, tensors, ramp(y.shape))])
        for expected, found in zip(*results, strict=True):
            difference = (expected - found).abs().max() / expected.abs().max()
            worst = max(worst, float(difference))
    return worst


def ramp(shape) -> paddle.Tensor:
    """Values in [-1, 1) that repeat nowhere near, without touching a random generator."""
    number = int(np.prod(shape))
    return paddle.to_tensor((np.arange(number) * 0.618034 % 2 - 1).astype("float32")).reshape(shape)


class _OneDNNConvolution(PyLayer):
    """What Paddle's autograd sees: one operator of the input and the whole weight."""

    @staticmethod
    def forward(ctx, x, weight, channels, stride, padding):
        shape = Shape(tuple(x.shape), tuple(weight.shape), channels, stride, padding)
        y, last = _run(x, weight, shape)
        ctx.save_for_backward(last, weight)
        ctx.shape, ctx.wants_input = shape, not x.stop_gradient
        return y

    @staticmethod
    def backward(ctx, dy):
        last, weight = ctx.saved_tensor()
        shape = ctx.shape
        convolution = convolution_of(shape)
        dy_last = convolution.put_last(dy.contiguous().data_ptr())
        whole = shape.channels == weight.shape[0] and shape.x[1] == weight.shape[1]
        dw = paddle.empty_like(weight) if whole else paddle.zeros_like(weight)
        convolution.backward_weight(last.data_ptr(), dy_last, dw.data_ptr())
        dx = None
        if ctx.wants_input:
            dx = paddle.empty(shape.x, "float32")
            convolution.backward_input(dy_last, weight.data_ptr(), dx.data_ptr())
        return dx, dw


def _run(x, weight, shape: Shape):
    """The output, and the input with channels last."""
    last, y = paddle.empty(shape.x, "float32"), paddle.empty(shape.y, "float32")
    convolution_of(shape).forward(
        x.contiguous().data_ptr(), weight.data_ptr(), last.data_ptr(), y.data_ptr()
    )
    return y, last


def onednn_conv2d(x, weight, channels: int, stride: int, padding: int) -> paddle.Tensor:
    """A convolution with a leading slice of ``weight``, without copying it.

    Args:
        x: [N, C, H, W], float32 on the CPU.
        weight: [max Cout, max Cin, K, K], dense; its first C input channels are used.
        channels: Cout, its first output channels that are used.
        stride, padding: in px, the same in both directions.

    Returns:
        [N, Cout, H', W'].
    """
    if paddle.is_grad_enabled():
        return _OneDNNConvolution.apply(x, weight, channels, stride, padding)
    shape = Shape(tuple(x.shape), tuple(weight.shape), channels, stride, padding)
    return _run(x, weight, shape)[0]
