"""The kernels of a walk on GPUs: convolution, bias, shortcut and ReLU as one operator, if it works.

Everything after a convolution is memory traffic: as operators of their own bias, shortcut and
ReLU read and write every activation again. Paddle has ``fused_conv2d_add_act`` for its inference
engine. Nothing promises that it can be called from Python, so it is tried before it is trusted.
"""

from __future__ import annotations

import math
from functools import lru_cache

import paddle

from hnas.base.errors import PADDLE_ERRORS, word_of
from hnas.evaluation.kernels import Convolution, Kernels
from hnas.evaluation.variants import Precision, Variant
from hnas.models.convolution import ramp

TRIALS = (
    (24, 3, 7, 2, True, False),  # the stem
    (24, 32, 3, 1, True, False),  # conv1
    (24, 32, 3, 2, True, False),
    (32, 32, 1, 2, False, False),  # a projection
    (16, 24, 3, 1, True, True),  # conv2
)
"""Outputs and inputs, multiples of 8 as in the released space; kernel, stride; ReLU, shortcut."""
TOLERANCE = {Precision.FLOAT32: 5e-5, Precision.TF32: 5e-3, Precision.FLOAT16: 2e-2}
"""Of a trial, over the largest value; float32's is below what TF32 changes."""


def fused_convolution(x, filters, bias, shortcut, stride, padding, layout, activation):
    """Paddle's operator: activation (``relu`` or ``identity``) of a convolution plus bias [O] plus
    shortcut, which may be None. Filters are [O, I, K, K] in NCHW, [O, K, K, I] in NHWC."""
    attributes = {
        "strides": (stride, stride),
        "paddings": (padding, padding),
        "padding_algorithm": "EXPLICIT",
        "dilations": (1, 1),
        "groups": 1,
        "data_format": layout,
        "activation": activation,
    }
    flat = [part for pair in attributes.items() for part in pair]
    found = paddle._legacy_C_ops.fused_conv2d_add_act(x, filters, bias, shortcut, *flat)
    return found[0] if isinstance(found, (list, tuple)) else found


@lru_cache
def fused_fault(precision: Precision, layout: str) -> str:
    """Why the operator is of no use here; empty: it works."""
    try:
        worst = max(largest_difference(precision, layout, *trial) for trial in TRIALS)
    except (AttributeError, *PADDLE_ERRORS) as error:
        return f"fused_conv2d_add_act fails: {word_of(error)}"
    if worst < TOLERANCE[precision]:
        return ""
    return f"fused_conv2d_add_act differs by {worst:.2g} of the largest value"


@paddle.no_grad()
def largest_difference(
    precision: Precision, layout: str, outputs, inputs, size, stride, relu, adds
) -> float:
    """From Paddle's operators one by one in float32, over the largest value; NaN is infinite."""
    filters = ramp([outputs, inputs, size, size]) / (size * inputs**0.5)
    x, bias, wider = ramp([4, inputs, 7, 7]), ramp([outputs]), ramp([4, outputs + 8, 7, 7])
    results = []
    for kernels in (Kernels(), Kernels(Variant(precision, layout), fused=fused_convolution)):
        vectors = (kernels.vector(bias, is_bias=True),)
        conv = Convolution(kernels.arranged(filters), vectors, outputs)
        shortcut = kernels.accept(wider) if adds else None
        y = kernels.conv_norm(kernels.accept(x), conv, stride, relu, shortcut)
        results.append(Kernels().accept(y, kernels.layout).astype("float32"))
    right, found = results
    if found.shape != right.shape:
        return math.inf
    difference = float((right - found).abs().max() / right.abs().max())
    return math.inf if math.isnan(difference) else difference


def may_be_refusal(variant: Variant, error: Exception) -> bool:
    """Whether an error of a walk may be the fused operator's, so that one without it may work."""
    return variant.fused and not getattr(error, "errno", None)
