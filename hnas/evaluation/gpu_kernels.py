"""The kernels of a walk on GPUs: convolution, bias, shortcut and ReLU as one operator, if it works.

Everything after a convolution is memory traffic: as operators of their own bias, shortcut and
ReLU read and write every activation again. Paddle has ``fused_conv2d_add_act`` for its inference
engine. Nothing promises that it can be called from Python, so it is tried before it is trusted.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import paddle

from hnas.evaluation.kernels import Kernels, Trial, fault_of
from hnas.evaluation.variants import Precision, Variant, usual_variant

logger = logging.getLogger(__name__)

TRIALS = (Trial(images=4, size=7, width=16, step=8),)
"""Of the released space's widths, which are multiples of 8."""


def fused_convolution(x, filters, bias, shortcut, stride, padding, layout, activation):
    """Paddle's operator, as :data:`hnas.evaluation.kernels.Operator` is called."""
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
    variant = Variant(precision, layout, fused=True)
    reason = fault_of(lambda: Kernels(variant, fused=fused_convolution), TRIALS)
    return f"fused_conv2d_add_act {reason}" if reason else ""


def may_be_refusal(variant: Variant, error: Exception) -> bool:
    """Whether an error of a walk may be the fused operator's, so that one without it may work."""
    return variant.fused and not getattr(error, "errno", None)


def kernels_of(variant: Variant, calibration: int) -> Kernels:
    """What computes in a variant."""
    return Kernels(variant, calibration, fused_convolution if variant.fused else None)


def choose_variant(precision: Precision, calibration: int, fuses: bool = True) -> Variant:
    """The fastest variant of a precision that works on this GPU; the log says which, and why.

    Args:
        precision: to compute in.
        calibration: images that BatchNorm is re-calibrated with.
        fuses: whether the fused operator may be used, if it works.
    """
    chosen = usual_variant(precision)
    if calibration:
        reason = "re-calibration needs each operator's output"
    else:
        reason = fused_fault(precision, chosen.layout) if fuses else "--fused off"
        chosen = chosen if reason else usual_variant(precision, fused=True)
    logger.info("the walk computes in %s%s", chosen, f": {reason}" if reason else "")
    return chosen
