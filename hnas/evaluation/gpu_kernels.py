"""The kernels of a walk on GPUs: convolution, bias, shortcut and ReLU as one operator, if it works.

Everything after a convolution is memory traffic: as operators of their own bias, shortcut and
ReLU read and write every activation again. Paddle has ``fused_conv2d_add_act`` for its inference
engine. Nothing promises that it can be called from Python, so it is tried before it is trusted.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import paddle

from hnas.base.errors import UserError
from hnas.evaluation.kernels import Kernels, Operator, Trial, fault_of
from hnas.evaluation.variants import Precision, Variant, usual_variant

logger = logging.getLogger(__name__)

WORKSPACE_MB = 512
TRIALS = (Trial(images=4, size=7, width=16, step=8),)
"""Of the released space's widths, which are multiples of 8."""


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


def trial(operator: Operator, precision: Precision, layout: str) -> str:
    """What is wrong with an operator; empty: nothing."""
    variant = Variant(precision, layout, fused=True)
    reason = fault_of(lambda: Kernels(variant, fused=operator), TRIALS)
    return f"fused_conv2d_add_act {reason}" if reason else ""


def gpu_kernels(variant: Variant, calibration: int) -> Kernels:
    """Paddle's operators in a variant; of a GPU, or one by one of a CPU.

    Args:
        variant: which.
        calibration: as in :class:`Kernels`.

    Raises:
        UserError: a fused variant where the operator does not work, or with re-calibration.
    """
    if not variant.fused:
        return Kernels(variant, calibration)
    if calibration:
        raise UserError(f"{variant}: BatchNorm re-calibration cannot be fused")
    operator, reason = find_fused(variant.precision, variant.layout)
    if operator is None:
        raise UserError(f"{variant}: {reason}")
    return Kernels(variant, fused=operator)


def choose_variant(precision: Precision, calibration: int) -> Variant:
    """The fastest variant of a precision that works on this GPU; the log says which, and why.

    Args:
        precision: to compute in.
        calibration: images that BatchNorm is re-calibrated with.
    """
    if calibration:
        chosen, reason = usual_variant(precision), "re-calibration needs each operator's output"
    else:
        chosen = usual_variant(precision, fused=True)
        operator, reason = find_fused(precision, chosen.layout)
        if operator is None:
            chosen = usual_variant(precision)
    logger.info("the walk computes in %s%s", chosen, f": {reason}" if reason else "")
    return chosen
