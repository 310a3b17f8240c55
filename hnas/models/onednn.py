"""2-D convolutions and their gradients by oneDNN's C interface, on CPUs in float32.

Paddle's own operators multiply image by image: on small feature maps those products are so narrow
that most of the time is lost, and more cores do not help. Paddle ships oneDNN, but training
reaches it neither in dygraph nor, at any gain, in static graphs (docs/speed.md), so
this module calls the shipped library: channels last, over the whole batch at once, on all threads.

Only the documented C interface of version 3 is used. Nothing here holds weights: what a call gets
is what it uses.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import paddle

# Values of the C interface's enumerations, oneDNN 3.
CPU, FLOAT32, ANY_FORMAT, IN_ORDER = 1, 3, 1, 1
FORWARD_TRAINING, DIRECT_CONVOLUTION = 64, 1
QUERY_WEIGHTS, QUERY_DIFF_WEIGHTS = 131, 132
SRC, DST, WEIGHTS = 1, 17, 33
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 129, 145, 161
MAX_DIMENSIONS = 12
MAJOR_VERSION = 3

# Sub-networks of the released space need some 250 combinations of shapes.
KEPT_CONVOLUTIONS = 1024


class OneDNNError(RuntimeError):
    """A call that the library refused, or a library that is not there."""


class _Version(Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int)]


class _Argument(Structure):
    _fields_ = [("which", c_int), ("memory", c_void_p)]


class Library:
    """The library that Paddle ships, with an engine and a stream."""

    def __init__(self):
        path = Path(paddle.__file__).parent / "libs" / f"libdnnl.so.{MAJOR_VERSION}"
        try:
            self._functions = ctypes.CDLL(str(path))
            version = self._functions.dnnl_version
            query = self._functions.dnnl_primitive_desc_query_md
        except (OSError, AttributeError) as error:
            raise OneDNNError(f"cannot use {path.name}: {error}") from None
        version.restype = POINTER(_Version)
        if version().contents.major != MAJOR_VERSION:
            raise OneDNNError(f"{path.name} is version {version().contents.major}")
        query.restype, query.argtypes = c_void_p, (c_void_p, c_int, c_int)
        self._query = query
        self._execute = self._functions.dnnl_primitive_execute
        self._execute.argtypes = (c_void_p, c_void_p, c_int, c_void_p)
        self._set_handle = self._functions.dnnl_memory_set_data_handle
        self._set_handle.argtypes = (c_void_p, c_void_p)
        self.engine = self.make("dnnl_engine_create", CPU, c_size_t(0))
        self.stream = self.make("dnnl_stream_create", self.engine, IN_ORDER)

    def make(self, function: str, *arguments) -> c_void_p:
        """Call a function whose first parameter is where the new object's handle goes."""
        handle = c_void_p()
        self._check(function, getattr(self._functions, function)(byref(handle), *arguments))
        return handle

    def _check(self, function: str, status: int) -> None:
        if status:
            raise OneDNNError(f"{function} returned {status}")

    def description(self, shape, strides=None) -> c_void_p:
        """A float32 memory descriptor; without ``strides`` the primitive chooses the format."""
        arguments = len(shape), _dimensions(shape), FLOAT32
        if strides is None:
            return self.make("dnnl_memory_desc_create_with_tag", *arguments, ANY_FORMAT)
        return self.make("dnnl_memory_desc_create_with_strides", *arguments, _dimensions(strides))

    def size(self, description) -> int:
        """Bytes that a memory descriptor needs."""
        function = self._functions.dnnl_memory_desc_get_size
        function.restype, function.argtypes = c_size_t, (c_void_p,)
        return function(description)

    def chosen(self, primitive_description, query: int) -> c_void_p:
        """The memory descriptor that a primitive has chosen."""
        return c_void_p(self._query(primitive_description, query, 0))

    def run(self, step: _Step, *pointers: int) -> None:
        """Execute a primitive on the addresses of its arguments, in their order."""
        for memory, pointer in zip(step.memories, pointers, strict=True):
            self._set_handle(memory, pointer)
        status = self._execute(step.primitive, self.stream, len(step.memories), step.arguments)
        self._check("dnnl_primitive_execute", status)

    def step(self, primitive_description, *arguments: tuple[int, c_void_p]) -> _Step:
        """A primitive with its arguments: pairs of which one and its memory descriptor."""
        primitive = self.make("dnnl_primitive_create", primitive_description)
        memories = [
            self.make("dnnl_memory_create", description, self.engine, c_void_p(None))
            for _, description in arguments
        ]
        pairs = [_Argument(which, m) for (which, _), m in zip(arguments, memories, strict=True)]
        return _Step(primitive, memories, (_Argument * len(pairs))(*pairs))

    def reorder(self, source, target) -> _Step:
        """A copy from one memory format to another."""
        description = self.make(
            "dnnl_reorder_primitive_desc_create", source, self.engine, target, self.engine, None
        )
        return self.step(description, (SRC, source), (DST, target))


@dataclass(frozen=True)
class _Step:
    primitive: c_void_p
    memories: list
    arguments: ctypes.Array


def _dimensions(values) -> ctypes.Array:
    return (c_int64 * MAX_DIMENSIONS)(*values)


@lru_cache(maxsize=1)
def library() -> Library:
    """The library, loaded at the first call.

    Raises:
        OneDNNError: Paddle does not ship it, or another version.
    """
    return Library()


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
        x, y = (lib.description(s, _channels_last(s)) for s in (shape.x, shape.y))
        x_plain, y_plain = (lib.description(s, _dense(s)) for s in (shape.x, shape.y))
        # A slice of the whole weight: its strides are the whole's.
        w_plain = lib.description(part, _dense(shape.weight))
        w_any = lib.description(part)
        window = (
            _dimensions([shape.stride] * 2),
            _dimensions([0, 0]),
            _dimensions([shape.padding] * 2),
            _dimensions([shape.padding] * 2),
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


def _dense(shape) -> tuple[int, ...]:
    n, c, h, w = shape
    return (c * h * w, h * w, w, 1)


def _channels_last(shape) -> tuple[int, ...]:
    n, c, h, w = shape
    return (c * h * w, 1, w * c, c)


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
