"""oneDNN's primitives that a walk on CPUs is made of, each made once for a shape and kept.

Shapes are those of activations as they lie, [N, H, W, C].
"""

from __future__ import annotations

from ctypes import c_float, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import paddle

from hnas.base import onednn
from hnas.base.onednn import Step, channels_last, dense, dimensions, library
from hnas.evaluation.kernels import EPSILON

DTYPES = {"float32": onednn.FLOAT32, "bfloat16": onednn.BFLOAT16}
KEPT_STEPS = 8192
"""Steps of different shapes that are kept. The released space needs 1,500 at a chunk's size."""


@dataclass(frozen=True, eq=False)
class ConvolutionKernel:
    """A convolution of one shape; equal to itself alone.

    Attributes:
        step: of activations, packed filters, bias if it has one, output.
        packing: of the whole filters into the packed ones.
        packed: shape of a float32 tensor that holds these.
        output: shape [N, H, W, C].
    """

    step: Step
    packing: Step
    packed: list[int]
    output: list[int]

    def pack(self, filters: paddle.Tensor) -> paddle.Tensor:
        held = paddle.empty(self.packed)
        library().run(self.packing, filters.data_ptr(), held.data_ptr())
        return held


@lru_cache(maxsize=KEPT_STEPS)
def convolution_kernel(
    x: tuple[int, ...],
    half: bool,
    filters: tuple[int, ...],
    outputs: int,
    window: tuple[int, int],
    then: tuple[bool, bool, bool],
) -> ConvolutionKernel:
    """For activations ``x`` [N, H, W, C] and the leading part of ``filters`` [O, I, K, K].

    Args:
        half: bfloat16 activations, and so filters.
        window: stride and padding.
        then: whether it adds a bias, adds what its output holds, and applies ReLU.
    """
    lib, dtype = library(), onednn.BFLOAT16 if half else onednn.FLOAT32
    (n, height, width, inputs), (_, _, kernel, _) = x, filters
    (stride, padding), (with_bias, add, relu) = window, then
    size = [(side + 2 * padding - kernel) // stride + 1 for side in (height, width)]
    source = activation(x, dtype)
    target = activation((n, *size, outputs), dtype)
    part = (outputs, inputs, kernel, kernel)
    bias = lib.description((outputs,), (1,)) if with_bias else None
    primitive = lib.make(
        "dnnl_convolution_forward_primitive_desc_create",
        *(lib.engine, onednn.FORWARD_INFERENCE, onednn.DIRECT_CONVOLUTION, source),
        *(lib.description(part, dtype=dtype), bias, target),
        *(dimensions([number] * 2) for number in (stride, 0, padding, padding)),
        lib.attributes(add, relu),
    )
    packed = lib.chosen(primitive, onednn.QUERY_WEIGHTS)
    arguments = [(onednn.SRC, source), (onednn.WEIGHTS, packed), (onednn.DST, target)]
    if with_bias:
        arguments.insert(2, (onednn.BIAS, bias))
    return ConvolutionKernel(
        lib.step(primitive, *arguments),
        # A slice of the whole filters: its strides are the whole's.
        lib.reorder(lib.description(part, dense(filters)), packed),
        [-(-lib.size(packed) // 4)],
        [n, *size, outputs],
    )


@lru_cache(maxsize=KEPT_STEPS)
def copying(x: tuple[int, ...], channels: int, dtype: str) -> Step:
    """Of leading channels into a tensor of their own."""
    lib = library()
    part = (*x[:3], channels)
    return lib.reorder(activation(part, DTYPES[dtype], x[3]), activation(part, DTYPES[dtype]))


@lru_cache(maxsize=KEPT_STEPS)
def pooling(
    x: tuple[int, ...], dtype: str, kind: int, window: int, stride: int, padding: int
) -> tuple[Step, list[int]]:
    """And the shape [N, H, W, C] of its result."""
    lib = library()
    n, height, width, channels = x
    size = [(side + 2 * padding - window) // stride + 1 for side in (height, width)]
    source = activation(x, DTYPES[dtype])
    target = activation((n, *size, channels), DTYPES[dtype])
    primitive = lib.make(
        "dnnl_pooling_forward_primitive_desc_create",
        *(lib.engine, onednn.FORWARD_INFERENCE, kind, source, target),
        *(dimensions([number] * 2) for number in (stride, window, 0, padding, padding)),
        None,
    )
    return lib.step(primitive, (onednn.SRC, source), (onednn.DST, target)), [n, *size, channels]


@dataclass(frozen=True)
class Norm:
    """BatchNorm by the statistics of the first images.

    Attributes:
        measure: of those, somewhere to write to, mean and variance.
        apply: of all images, the result, mean, variance, scale and shift.
        bytes: of what measuring writes.
    """

    measure: Step
    apply: Step
    bytes: int


@lru_cache(maxsize=KEPT_STEPS)
def norm_of(x: tuple[int, ...], seen: int, relu: bool) -> Norm:
    """For float32 activations ``x``, of which the first ``seen`` images are measured."""
    lib = library()
    images, *size = x
    vector = lib.description(x[3:], (1,))
    whole, front = (activation((number, *size)) for number in (images, seen))
    create = "dnnl_batch_normalization_forward_primitive_desc_create"
    epsilon = c_float(EPSILON)
    measure = lib.make(create, lib.engine, onednn.FORWARD_TRAINING, front, front, epsilon, 0, None)
    flags = onednn.GIVEN_STATISTICS | onednn.WITH_SCALE | onednn.WITH_SHIFT
    flags |= onednn.THEN_RELU if relu else 0
    how = onednn.FORWARD_INFERENCE
    apply = lib.make(create, lib.engine, how, whole, whole, epsilon, flags, None)
    statistics = [(onednn.MEAN, vector), (onednn.VARIANCE, vector)]
    parameters = [(onednn.SCALE, vector), (onednn.SHIFT, vector)]
    return Norm(
        lib.step(measure, (onednn.SRC, front), (onednn.DST, front), *statistics),
        lib.step(apply, (onednn.SRC, whole), (onednn.DST, whole), *statistics, *parameters),
        lib.size(front),
    )


def activation(x: tuple[int, ...], dtype: int = onednn.FLOAT32, channels: int = 0) -> c_void_p:
    """The description of [N, H, W, C], or of the first C of ``channels``."""
    n, height, width, own = x
    shape = (n, own, height, width)
    return library().description(shape, channels_last(shape, channels), dtype)
