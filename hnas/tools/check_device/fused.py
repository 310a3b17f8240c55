"""The fused operator, where Paddle has it: convolution, bias, shortcut and ReLU in one.

Expected values are the twin's, by separate operators in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.evaluation.gpu_kernels import find_fused
from hnas.evaluation.kernels import Operator
from hnas.evaluation.variants import Precision
from hnas.tools.check_device.arithmetic import BFLOAT16, FLOAT16, FLOAT32, LIMITS, precisions
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.results import (
    Result,
    at_most,
    fact,
    guarded,
    not_here,
    relative_error,
)

LAYOUTS = ("NCHW", "NHWC")
PARTS = (
    (3, 16, 7, 2, False, "relu"),
    (24, 40, 3, 1, False, "relu"),
    (24, 40, 3, 1, True, "relu"),
    (24, 40, 3, 2, False, "relu"),
    (24, 48, 1, 2, False, "identity"),
)
"""Channels in and out, kernel, stride, shortcut or not, activation: as in a network."""
IMAGES, MAP = 5, 14


def inputs(part: int, dtype: str) -> list[paddle.Tensor | None]:
    """Activation, filters, bias and shortcut, rounded to a type; NCHW."""
    cin, cout, kernel, stride, shortcut, _ = PARTS[part]
    rng = np.random.default_rng(part)
    shapes = [(IMAGES, cin, MAP, MAP), (cout, cin, kernel, kernel), (cout,)]
    shapes.append((IMAGES, cout, MAP // stride, MAP // stride) if shortcut else None)
    return [
        shape and paddle.to_tensor(rng.normal(size=shape).astype(np.float32)).astype(dtype)
        for shape in shapes
    ]


def expected(machine: Machine) -> dict[str, np.ndarray]:
    """For the twin: all parts in all types."""
    found = {}
    for dtype in (each.dtype for each in (FLOAT32, FLOAT16, BFLOAT16)):
        for part, (*_, kernel, stride, _, activation) in enumerate(PARTS):
            x, filters, bias, shortcut = (
                None if tensor is None else tensor.astype("float64")
                for tensor in inputs(part, dtype)
            )
            y = F.conv2d(x, filters, stride=stride, padding=kernel // 2)
            y = y + bias.reshape([1, -1, 1, 1])
            if shortcut is not None:
                y = y + shortcut
            found[f"{part}|{dtype}"] = (F.relu(y) if activation == "relu" else y).numpy()
    return found


def check(machine: Machine) -> Iterator[Result]:
    """(e) The operator in every precision and layout, if there is one that can be called."""
    if not machine.has_gpu:
        yield not_here("fused convolution", "Paddle has it for GPUs alone")
        return
    right = machine.expected("fused")
    for precision, missing in precisions(machine):
        for layout in LAYOUTS:
            name = f"fused convolution: {precision.value}, {layout}"
            if missing:
                yield not_here(name, missing)
                continue
            operator, reason = find_fused(precision, layout)
            if operator is None:
                yield fact(name, "not used", reason)
            else:
                yield from guarded(name, judge, name, operator, precision, layout, right)


def judge(
    name: str,
    operator: Operator,
    precision: Precision,
    layout: str,
    right: dict[str, np.ndarray],
) -> Iterator[Result]:
    """The worst of all parts."""
    errors = []
    for part, (*_, kernel, stride, _, activation) in enumerate(PARTS):
        x, filters, bias, shortcut = inputs(part, precision.dtype)
        if layout == "NHWC":
            x, filters, shortcut = (
                None if tensor is None else tensor.transpose([0, 2, 3, 1]).contiguous()
                for tensor in (x, filters, shortcut)
            )
        y = operator(x, filters, bias, shortcut, stride, kernel // 2, layout, activation)
        y = y.astype("float32").numpy()
        y = y if layout == "NCHW" else y.transpose(0, 3, 1, 2)
        errors.append(relative_error(y, right[f"{part}|{precision.dtype}"]))
    yield at_most(name, np.max(errors), LIMITS[precision], "of the largest value")
