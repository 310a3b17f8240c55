"""oneDNN's C interface, on CPUs: of the library that Paddle ships, for training and scoring.

Paddle's own operators multiply image by image: on small feature maps those products are so narrow
that most of the time is lost, and more cores do not help. Paddle ships oneDNN, but training
reaches it neither in dygraph nor, at any gain, in static graphs, and scoring by Paddle Inference
only, which re-orders filters anew whenever they change (docs/speed.md). So both call the shipped
library: channels last, over the whole batch at once, on all threads.

Nothing here holds weights: what a call gets is what it uses.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import Structure, byref, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import paddle

# Values of the C interface's enumerations, oneDNN 3.
CPU, ANY_FORMAT, IN_ORDER = 1, 1, 1
FLOAT32, FORWARD_TRAINING, DIRECT_CONVOLUTION = 3, 64, 1
QUERY_WEIGHTS, QUERY_DIFF_WEIGHTS = 131, 132
OUT_OF_MEMORY = 1
SRC, DST, WEIGHTS = 1, 17, 33
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS = 129, 145, 161
MAX_DIMENSIONS = 12
LIBRARY = "libdnnl.so.3"
"""Named by its major version, whose documented C interface is all that is used."""


class _Argument(Structure):
    _fields_ = [("which", c_int), ("memory", c_void_p)]


class Library:
    """The library that Paddle ships, with an engine and a stream."""

    def __init__(self):
        path = Path(paddle.__file__).parent / "libs" / LIBRARY
        try:
            self._functions = ctypes.CDLL(str(path))
            query = self._functions.dnnl_primitive_desc_query_md
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"cannot use {path.name}: {error}") from None
        query.restype, query.argtypes = c_void_p, (c_void_p, c_int, c_int)
        self._query = query
        self._size = self._functions.dnnl_memory_desc_get_size
        self._size.restype, self._size.argtypes = c_size_t, (c_void_p,)
        self._functions.dnnl_primitive_execute.argtypes = (c_void_p, c_void_p, c_int, c_void_p)
        self._functions.dnnl_memory_set_data_handle.argtypes = (c_void_p, c_void_p)
        self.engine = self.make("dnnl_engine_create", CPU, c_size_t(0))
        self.stream = self.make("dnnl_stream_create", self.engine, IN_ORDER)

    def make(self, function: str, *arguments) -> c_void_p:
        """Call a function whose first parameter is where the new object's handle goes."""
        handle = c_void_p()
        self.call(function, byref(handle), *arguments)
        return handle

    def call(self, function: str, *arguments) -> None:
        """Call a function; :class:`RuntimeError` if it refuses."""
        status = getattr(self._functions, function)(*arguments)
        if status:
            why = " (out of memory)" if status == OUT_OF_MEMORY else ""
            raise RuntimeError(f"{function} returned {status}{why}")

    def description(self, shape, strides=None) -> c_void_p:
        """A memory descriptor; without ``strides`` the primitive chooses the format."""
        arguments = len(shape), dimensions(shape), FLOAT32
        if strides is None:
            return self.make("dnnl_memory_desc_create_with_tag", *arguments, ANY_FORMAT)
        return self.make("dnnl_memory_desc_create_with_strides", *arguments, dimensions(strides))

    def size(self, description) -> int:
        """Bytes that a memory descriptor needs."""
        return self._size(description)

    def chosen(self, primitive_description, query: int) -> c_void_p:
        """The memory descriptor that a primitive has chosen."""
        return c_void_p(self._query(primitive_description, query, 0))

    def run(self, step: Step, *pointers: int) -> None:
        """Execute a primitive on the addresses of its arguments, in their order."""
        for memory, pointer in zip(step.memories, pointers, strict=True):
            self.call("dnnl_memory_set_data_handle", memory, pointer)
        memories = len(step.memories)
        self.call("dnnl_primitive_execute", step.primitive, self.stream, memories, step.arguments)

    def step(self, primitive_description, *arguments: tuple[int, c_void_p]) -> Step:
        """A primitive with its arguments: pairs of which one and its memory descriptor."""
        primitive = self.make("dnnl_primitive_create", primitive_description)
        memories = [
            self.make("dnnl_memory_create", description, self.engine, c_void_p(None))
            for _, description in arguments
        ]
        pairs = [_Argument(which, m) for (which, _), m in zip(arguments, memories, strict=True)]
        return Step(primitive, memories, (_Argument * len(pairs))(*pairs))

    def reorder(self, source, target) -> Step:
        """A copy from one memory format to another."""
        description = self.make(
            "dnnl_reorder_primitive_desc_create", source, self.engine, target, self.engine, None
        )
        return self.step(description, (SRC, source), (DST, target))


@dataclass(frozen=True)
class Step:
    """A primitive with the memory objects of its arguments, which :meth:`Library.run` points."""

    primitive: c_void_p
    memories: list
    arguments: ctypes.Array


def dimensions(values) -> ctypes.Array:
    """Numbers as the interface takes them."""
    return (c_int64 * MAX_DIMENSIONS)(*values)


def dense(shape) -> tuple[int, ...]:
    """Strides of a dense array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def channels_last(shape) -> tuple[int, ...]:
    """Strides of [N, C, H, W] that lies as [N, H, W, C]."""
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c)


@lru_cache(maxsize=1)
def library() -> Library:
    """The library, loaded at the first call; :class:`RuntimeError` if Paddle does not ship it."""
    return Library()


_buffers: dict[str, paddle.Tensor] = {}


def scratch(name: str, size: int) -> int:
    """The address of a buffer of at least ``size`` bytes that all who name it share."""
    held = _buffers.get(name)
    if held is None or held.shape[0] * 4 < size:
        held = _buffers[name] = paddle.empty([-(-size // 4)], "float32")
    return held.data_ptr()
