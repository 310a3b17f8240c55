"""2-D convolutions and their gradients by oneDNN, in float32, for training on CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import paddle

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
    channels_last,
    dense,
    dimensions,
    library,
)

# Sub-networks of the released space need some 250 combinations of shapes.
KEPT_CONVOLUTIONS = 1024


@dataclass(frozen=True)
class Shape:
    """What a convolution's kernels depend on.

    Attributes:
        x: shape of the input, [N, C, H, W].
        weight: of the whole weight, [max Cout, max Cin, K, K], of which the first C input channels
            and ``channels`` output channels are used.
        channels: Cout.
        stride, padding: in px, the same in both directions.
    """

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    channels: int
    stride: int
    padding: int

    @property
    def y(self) -> tuple[int, int, int, int]:
        """Shape of the output."""
        kernel = self.weight[2]
        h, w = ((size + 2 * self.padding - kernel) // self.stride + 1 for size in self.x[2:])
        return (self.x[0], self.channels, h, w)


class Convolution:
    """A convolution of one :class:`Shape`, without bias, and its two gradients.

    Pointers are addresses of float32 arrays: images [N, C, H, W] and whole weights, both dense.
    ``last`` stands for a buffer of the input with channels last, which :meth:`forward` fills and
    :meth:`backward_weight` reads.
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        lib = self._lib = library()
        kernel = shape.weight[2]
        part = (shape.channels, shape.x[1], kernel, kernel)
        x, y = (lib.description(s, channels_last(s)) for s in (shape.x, shape.y))
        x_plain, y_plain = (lib.description(s, dense(s)) for s in (shape.x, shape.y))
        # A slice of the whole weight: its strides are the whole's.
        w_plain = lib.description(part, dense(shape.weight))
        w_any = lib.description(part)
        window = (
            dimensions([shape.stride] * 2),
            dimensions([0, 0]),
            dimensions([shape.padding] * 2),
            dimensions([shape.padding] * 2),
        )
        forward = lib.make(
            "dnnl_convolution_forward_primitive_desc_create",
            *(lib.engine, FORWARD_TRAINING, DIRECT_CONVOLUTION, x, w_any, None, y, *window, None),
        )
        to_input = lib.make(
            "dnnl_convolution_backward_data_primitive_desc_create",
            *(lib.engine, DIRECT_CONVOLUTION, x, w_any, y, *window, forward, None),
        )
        to_weight = lib.make(
            "dnnl_convolution_backward_weights_primitive_desc_create",
            *(lib.engine, DIRECT_CONVOLUTION, x, w_any, None, y, *window, forward, None),
        )
        w_forward = lib.chosen(forward, QUERY_WEIGHTS)
        w_input = lib.chosen(to_input, QUERY_WEIGHTS)
        w_gradient = lib.chosen(to_weight, QUERY_DIFF_WEIGHTS)
        self._x_last, self._x_first = lib.reorder(x_plain, x), lib.reorder(x, x_plain)
        self._y_last, self._y_first = lib.reorder(y_plain, y), lib.reorder(y, y_plain)
        self._pack_forward = lib.reorder(w_plain, w_forward)
        self._pack_input = lib.reorder(w_plain, w_input)
        self._unpack = lib.reorder(w_gradient, w_plain)
        self._forward = lib.step(forward, (SRC, x), (WEIGHTS, w_forward), (DST, y))
        self._to_input = lib.step(to_input, (DIFF_DST, y), (WEIGHTS, w_input), (DIFF_SRC, x))
        self._to_weight = lib.step(to_weight, (SRC, x), (DIFF_DST, y), (DIFF_WEIGHTS, w_gradient))
        self._packed = [lib.size(d) for d in (w_forward, w_input, w_gradient)]
        self._x_bytes, self._y_bytes = lib.size(x), lib.size(y)

    def forward(self, x: int, weight: int, last: int, y: int) -> None:
        """Write the output to ``y``, and ``x`` with channels last to ``last``."""
        run = self._lib.run
        packed = scratch("weight", self._packed[0])
        output = scratch("output", self._y_bytes)
        run(self._x_last, x, last)
        run(self._pack_forward, weight, packed)
        run(self._forward, last, packed, output)
        run(self._y_first, output, y)

    def put_last(self, dy: int) -> int:
        """The output's gradient with channels last; where it lies until the next call."""
        last = scratch("output", self._y_bytes)
        self._lib.run(self._y_last, dy, last)
        return last

    def backward_input(self, dy_last: int, weight: int, dx: int) -> None:
        """Write the input's gradient to ``dx``."""
        run = self._lib.run
        packed = scratch("weight", self._packed[1])
        output = scratch("input", self._x_bytes)
        run(self._pack_input, weight, packed)
        run(self._to_input, dy_last, packed, output)
        run(self._x_first, output, dx)

    def backward_weight(self, last: int, dy_last: int, dw: int) -> None:
        """Write the weight's gradient to its part of ``dw``, the rest of which is left alone."""
        packed = scratch("weight", self._packed[2])
        self._lib.run(self._to_weight, last, dy_last, packed)
        self._lib.run(self._unpack, packed, dw)


_buffers: dict[str, paddle.Tensor] = {}


@lru_cache(maxsize=KEPT_CONVOLUTIONS)
def convolution_of(shape: Shape) -> Convolution:
    """The convolution of a shape, made at first use; the ones used last are kept."""
    return Convolution(shape)


def scratch(name: str, size: int) -> int:
    """The address of a buffer of at least ``size`` bytes that all convolutions share."""
    held = _buffers.get(name)
    if held is None or held.shape[0] * 4 < size:
        held = _buffers[name] = paddle.empty([-(-size // 4)], "float32")
    return held.data_ptr()
