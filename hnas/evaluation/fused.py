"""Convolution, bias, shortcut and ReLU as one operator of Paddle, for GPUs.

Everything after a convolution is memory traffic: as operators of their own bias, shortcut and
ReLU read and write every activation again. Paddle has ``fused_conv2d_add_act`` for its inference
engine. Nothing promises that it can be called from Python, so it is tried before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.evaluation.variants import Precision

Operator = Callable[..., paddle.Tensor]
"""``(x, filters, bias, shortcut, stride, padding, layout, activation)``: ``relu`` or ``identity``
of the convolution plus bias [C] plus shortcut, an activation or None. Filters are [O, I, K, K] in
NCHW, [O, K, K, I] in NHWC."""

WORKSPACE_MB = 512
TRIALS = ((3, 16, 7, 2, False), (16, 24, 3, 1, True), (24, 16, 3, 2, False), (16, 40, 1, 2, False))
"""Channels in and out, kernel, stride, and whether there is a shortcut, as in a network."""
ROUNDING = {Precision.FLOAT32: 5e-5, Precision.TF32: 5e-3}
"""Largest difference in a trial, over the largest value; float32's is below what TF32 changes."""
HALF_ROUNDING = 2e-2


def _by_c_ops(x, filters, bias, shortcut, stride, padding, layout, activation):
    # 3.3.1 has it for static graphs alone.
    return paddle._C_ops.fused_conv2d_add_act(
        *(x, filters, bias, shortcut, [stride] * 2, [padding] * 2, "EXPLICIT", [1, 1], 1),
        *(layout, activation, [], False, WORKSPACE_MB, 0.0),
    )[0]


def _by_legacy_ops(x, filters, bias, shortcut, stride, padding, layout, activation):
    attributes = {
        "strides": (stride, stride),
        "paddings": (padding, padding),
        "padding_algorithm": "EXPLICIT",
        "dilations": (1, 1),
        "groups": 1,
        "data_format": layout,
        "activation": activation,
        "workspace_size_MB": WORKSPACE_MB,
    }
    flat = [part for pair in attributes.items() for part in pair]
    found = paddle._legacy_C_ops.fused_conv2d_add_act(x, filters, bias, shortcut, *flat)
    return found[0] if isinstance(found, (list, tuple)) else found


ROUTES: tuple[Operator, ...] = (_by_c_ops, _by_legacy_ops)


@lru_cache
def find_fused(precision: Precision, layout: str) -> tuple[Operator | None, str]:
    """The operator, if one of the routes to it works here, and why the last of them does not."""
    reason = ""
    for operator in ROUTES:
        reason = trial(operator, precision, layout)
        if not reason:
            return operator, ""
    return None, reason


@paddle.no_grad()
def trial(operator: Operator, precision: Precision, layout: str) -> str:
    """What is wrong with an operator, or nothing: it is compared with Paddle's separate ones."""
    allowed = ROUNDING.get(precision, HALF_ROUNDING)
    rng = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        values = (scale * rng.normal(size=shape)).astype("float32")
        return paddle.to_tensor(values).astype(precision.dtype)

    for cin, cout, kernel, stride, has_shortcut in TRIALS:
        x, filters, bias = draw(4, cin, 14, 14), draw(cout, cin, kernel, kernel), draw(cout)
        size = 14 // stride
        # Of the size of the sum, or a lost one would not show.
        shortcut = draw(4, cout, size, size, scale=cin) if has_shortcut else None
        activation = "identity" if kernel == 1 else "relu"
        given = [x, filters, shortcut]
        if layout == "NHWC":
            given = [None if t is None else t.transpose([0, 2, 3, 1]).contiguous() for t in given]
        own, arranged, own_shortcut = given
        try:
            found = operator(
                own, arranged, bias, own_shortcut, stride, kernel // 2, layout, activation
            )
            found = found.astype("float32").numpy()
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            return f"fused_conv2d_add_act fails: {_first_line(error)}"
        expected = _separate(x, filters, bias, shortcut, stride, kernel // 2, activation)
        if layout == "NHWC":
            expected = expected.transpose(0, 2, 3, 1)
        if found.shape != expected.shape:
            return f"fused_conv2d_add_act gives {found.shape} instead of {expected.shape}"
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        if not difference <= allowed:
            return f"fused_conv2d_add_act differs by {difference:.1g} of the largest value"
    return ""


def _separate(x, filters, bias, shortcut, stride, padding, activation) -> np.ndarray:
    """The same by operators in float32, NCHW."""
    x, filters, bias = (tensor.astype("float32") for tensor in (x, filters, bias))
    y = F.conv2d(x, filters, stride=stride, padding=padding) + bias.reshape([1, -1, 1, 1])
    if shortcut is not None:
        y = y + shortcut.astype("float32")
    return (F.relu(y) if activation == "relu" else y).numpy()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
