"""Convolutions on CPUs: oneDNN's, for training and for stage three's walk; Paddle's elsewhere.

A network computes with Paddle's until :func:`use_onednn` is called on it.
"""

from __future__ import annotations

import logging
from functools import cached_property, lru_cache

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer
from paddle.nn import functional as F  # noqa: N812

from hnas.base.errors import PADDLE_ERRORS, word_of
from hnas.base.onednn import (
    DIFF_DST,
    DIFF_SRC,
    DIFF_WEIGHTS,
    DIRECT_CONVOLUTION,
    DST,
    FORWARD_TRAINING,
    QUERY_DIFF_WEIGHTS,
    QUERY_WEIGHTS,
    SRC,
    WEIGHTS,
    Step,
    channels_last,
    dense,
    dimensions,
    library,
    scratch,
)

logger = logging.getLogger(__name__)

# Of a trial: relative to the largest value. Summing in another order differs by about 1e-6.
TOLERANCE = 1e-4
# A walk over the released space needs some 1,500 combinations of shapes, training 250.
KEPT_CONVOLUTIONS = 4096


def convolve(conv: nn.Layer, x: paddle.Tensor, onednn: bool) -> paddle.Tensor:
    """``conv(x)``, by oneDNN if that is wanted, and ``conv`` is a plain one, without bias.

    Were it a class of its own, tools that look for ``nn.Conv2D`` itself would pass it over.
    """
    if onednn and isinstance(conv, nn.Conv2D) and onednn_takes(x):
        return onednn_conv2d(x, conv.weight, conv._out_channels, conv._stride[0], conv._padding)
    return conv(x)


def onednn_takes(x: paddle.Tensor) -> bool:
    """Whether ``x`` is what :func:`onednn_conv2d` takes."""
    return paddle.in_dynamic_mode() and x.dtype == paddle.float32 and x.place.is_cpu_place()


def use_onednn(*networks: nn.Layer) -> bool:
    """Let networks compute their convolutions by oneDNN; whether that works here.

    If it does not, the log says why, and the networks stay as they are.
    """
    if paddle.get_device() != "cpu":
        return False
    if fault := onednn_fault():
        logger.warning("convolutions run on Paddle's slower operators: %s", fault)
        return False
    for network in networks:
        for layer in network.sublayers(include_self=True):
            if hasattr(layer, "onednn"):
                layer.onednn = True
    return True


def onednn_fault() -> str:
    """What is wrong with oneDNN here; empty: nothing.

    It is of the library that Paddle ships, so it is tried before it is trusted.
    """
    try:
        difference = _largest_difference()
    except PADDLE_ERRORS as error:
        return word_of(error)
    return "" if difference < TOLERANCE else f"oneDNN's differ by {difference:g}"


def _largest_difference() -> float:
    """Between both kinds of convolution, forward and backward, over the largest value, or NaN."""
    found = []
    for kernel, stride, size in ((3, 1, 6), (3, 2, 5), (1, 2, 6), (7, 2, 9)):
        x, weight = tensors = [ramp([3, 5, size, size]), ramp([9, 6, kernel, kernel])]
        for tensor in tensors:
            tensor.stop_gradient = False
        window = {"stride": stride, "padding": kernel // 2}
        plain = F.conv2d(x, weight[:8, :5], **window)
        own = onednn_conv2d(x, weight, 8, **window)
        last = channels_last_conv2d(x.detach().transpose([0, 2, 3, 1]), weight, 8, **window)
        gradients = (paddle.grad(y, tensors, ramp(y.shape)) for y in (plain, own))
        pairs = (plain, own), (plain, last.transpose([0, 3, 1, 2])), *zip(*gradients, strict=True)
        found += [(right - each).abs().max() / right.abs().max() for right, each in pairs]
    return float(paddle.stack(found).max())


def ramp(shape) -> paddle.Tensor:
    """Values in [-1, 1) that repeat nowhere near, without touching a random generator."""
    number = int(np.prod(shape))
    return paddle.to_tensor((np.arange(number) * 0.618034 % 2 - 1).astype("float32")).reshape(shape)


def onednn_conv2d(x, weight, channels: int, stride: int, padding: int) -> paddle.Tensor:
    """A convolution with a leading slice of ``weight``, without copying it.

    From ``x`` [N, C, H, W], float32 on the CPU, to [N, ``channels``, H', W'], by the first channels
    of a dense [max Cout, max Cin, K, K]; stride and padding in px.
    """
    convolution = convolution_of(tuple(x.shape), tuple(weight.shape), channels, stride, padding)
    if paddle.is_grad_enabled():
        return _OneDNNConvolution.apply(x, weight, convolution)
    return convolution.forward(x, weight)[0]


def channels_last_conv2d(x, weight, channels: int, stride: int, padding: int) -> paddle.Tensor:
    """As :func:`onednn_conv2d`, of [N, H, W, C] to [N, H', W', ``channels``]; no gradient."""
    n, height, width, inputs = x.shape
    shapes = (n, inputs, height, width), tuple(weight.shape)
    return convolution_of(*shapes, channels, stride, padding).forward_last(x, weight)


class _OneDNNConvolution(PyLayer):
    """What Paddle's autograd sees: one operator of the input and the whole weight."""

    @staticmethod
    def forward(ctx, x, weight, convolution):
        y, last = convolution.forward(x, weight)
        ctx.save_for_backward(last, weight)
        ctx.convolution, ctx.wants_input = convolution, not x.stop_gradient
        return y

    @staticmethod
    def backward(ctx, dy):
        return ctx.convolution.backward(*ctx.saved_tensor(), dy, ctx.wants_input)


class Convolution:
    """A convolution of one combination of shapes, and its two gradients, by oneDNN.

    Args: those of :func:`onednn_conv2d`, with shapes for tensors.
    """

    def __init__(self, x_shape, weight_shape, channels: int, stride: int, padding: int):
        lib = self._lib = library()
        images, inputs, *sides = x_shape
        kernel = weight_shape[2]
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        y_shape = (images, channels, *sides)
        self.x_shape, self.y_shape = x_shape, y_shape
        self._uses_whole = weight_shape[:2] == (channels, inputs)
        x, y = (lib.description(s, channels_last(s)) for s in (x_shape, y_shape))
        x_plain, y_plain = (lib.description(s, dense(s)) for s in (x_shape, y_shape))
        # A slice of the whole weight: its strides are the whole's.
        part = (channels, inputs, kernel, kernel)
        w_plain, w_any = lib.description(part, dense(weight_shape)), lib.description(part)
        window = [dimensions([number] * 2) for number in (stride, 0, padding, padding)]
        self._gradients_of = lib, x, w_plain, w_any, y, window
        self._made = lib.make(
            "dnnl_convolution_forward_primitive_desc_create",
            *(lib.engine, FORWARD_TRAINING, DIRECT_CONVOLUTION, x, w_any, None, y, *window, None),
        )
        w_forward = lib.chosen(self._made, QUERY_WEIGHTS)
        self._x_last, self._x_first = lib.reorder(x_plain, x), lib.reorder(x, x_plain)
        self._y_last, self._y_first = lib.reorder(y_plain, y), lib.reorder(y, y_plain)
        self._pack = lib.reorder(w_plain, w_forward)
        self._forward = lib.step(self._made, (SRC, x), (WEIGHTS, w_forward), (DST, y))
        self._packed_bytes = lib.size(w_forward)
        self._x_bytes, self._y_bytes = lib.size(x), lib.size(y)

    @cached_property
    def _gradients(self) -> tuple[int, tuple[Step, Step], tuple[Step, Step]]:
        """Bytes of a packed weight; packing and computing for the input's gradient; computing and
        unpacking for the weight's. A walk needs none of them."""
        lib, x, w_plain, w_any, y, window = self._gradients_of
        to_input = lib.make(
            "dnnl_convolution_backward_data_primitive_desc_create",
            *(lib.engine, DIRECT_CONVOLUTION, x, w_any, y, *window, self._made, None),
        )
        to_weight = lib.make(
            "dnnl_convolution_backward_weights_primitive_desc_create",
            *(lib.engine, DIRECT_CONVOLUTION, x, w_any, None, y, *window, self._made, None),
        )
        w_input = lib.chosen(to_input, QUERY_WEIGHTS)
        w_gradient = lib.chosen(to_weight, QUERY_DIFF_WEIGHTS)
        input_step = lib.step(to_input, (DIFF_DST, y), (WEIGHTS, w_input), (DIFF_SRC, x))
        weight_step = lib.step(to_weight, (SRC, x), (DIFF_DST, y), (DIFF_WEIGHTS, w_gradient))
        return (
            max(lib.size(each) for each in (w_input, w_gradient)),
            (lib.reorder(w_plain, w_input), input_step),
            (weight_step, lib.reorder(w_gradient, w_plain)),
        )

    def forward(self, x, weight) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The output, and what the input's values are with channels last."""
        run, pack = self._lib.run, scratch("weight", self._packed_bytes)
        y, last = paddle.empty(self.y_shape, "float32"), paddle.empty(self.x_shape, "float32")
        y_last = scratch("output", self._y_bytes)
        run(self._x_last, x.contiguous().data_ptr(), last.data_ptr())
        run(self._pack, weight.data_ptr(), pack)
        run(self._forward, last.data_ptr(), pack, y_last)
        run(self._y_first, y_last, y.data_ptr())
        return y, last

    def forward_last(self, x, weight) -> paddle.Tensor:
        """The output [N, H', W', C'] of an input [N, H, W, C]: of what lies so already."""
        run, pack = self._lib.run, scratch("weight", self._packed_bytes)
        n, channels, height, width = self.y_shape
        y = paddle.empty([n, height, width, channels], "float32")
        run(self._pack, weight.data_ptr(), pack)
        run(self._forward, x.contiguous().data_ptr(), pack, y.data_ptr())
        return y

    def backward(self, last, weight, dy, wants_input: bool):
        """Gradients of the input, if wanted, and of the whole weight, from the output's.

        ``last`` is what :meth:`forward` gave with the output.
        """
        packed_bytes, (pack_input, to_input), (to_weight, unpack) = self._gradients
        run, pack = self._lib.run, scratch("weight", packed_bytes)
        dy_last, dx = scratch("output", self._y_bytes), None
        dw = paddle.empty_like(weight) if self._uses_whole else paddle.zeros_like(weight)
        run(self._y_last, dy.contiguous().data_ptr(), dy_last)
        run(to_weight, last.data_ptr(), dy_last, pack)
        run(unpack, pack, dw.data_ptr())
        if wants_input:
            dx, dx_last = paddle.empty(self.x_shape, "float32"), scratch("input", self._x_bytes)
            run(pack_input, weight.data_ptr(), pack)
            run(to_input, dy_last, pack, dx_last)
            run(self._x_first, dx_last, dx.data_ptr())
        return dx, dw


@lru_cache(maxsize=KEPT_CONVOLUTIONS)
def convolution_of(*shapes_and_window) -> Convolution:
    """The convolution of these shapes, made at first use; the ones used last are kept."""
    return Convolution(*shapes_and_window)
