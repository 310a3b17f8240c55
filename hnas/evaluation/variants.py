"""The ways in which a walk can compute: how it rounds, how activations lie, what is fused.

One value, shared by the engine and by ``hnas.tools.check_device``, which tries them all.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Precision(enum.Enum):
    """How numbers are rounded; the value is its name in logs.

    TF32 is float32 outside of convolutions: their inputs lose all but 10 bits of the mantissa.
    """

    FLOAT32 = "float32"
    TF32 = "TF32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> str:
        """Of activations and filters, as Paddle calls it."""
        return "float32" if self is Precision.TF32 else self.value

    @property
    def is_half(self) -> bool:
        """Whether a number takes two bytes."""
        return self in (Precision.FLOAT16, Precision.BFLOAT16)

    @property
    def bytes(self) -> int:
        """Of a number."""
        return 2 if self.is_half else 4

    @property
    def tolerance(self) -> float:
        """Largest difference of a walk's logits from the reference engine's that rounding explains.

        In standard deviations of the logits. The reference computes in float32, or in TF32 where
        that is on.
        """
        return {Precision.FLOAT32: 1e-3, Precision.TF32: 3e-2}.get(self, 1e-1)


@dataclass(frozen=True)
class Variant:
    """A way to compute a walk.

    Attributes:
        precision: of convolutions and activations. Pooled features and the classifier are float32.
        layout: of activations, ``NCHW`` or ``NHWC``.
        fused: convolution, bias, shortcut and ReLU are one operator, see ``gpu_kernels.py``.
            Not with BatchNorm re-calibration, which needs the convolution's output by itself.
        onednn: convolutions by oneDNN, on CPUs, in float32 and NHWC.
    """

    precision: Precision = Precision.FLOAT32
    layout: str = "NCHW"
    fused: bool = False
    onednn: bool = False

    def __str__(self) -> str:
        if self.onednn:
            return f"{self.precision.value} by oneDNN"
        return f"{self.precision.value}, {self.layout}, {'' if self.fused else 'not '}fused"


def usual_variant(precision: Precision, fused: bool = False) -> Variant:
    """The layout that cuDNN computes a precision in without transposing.

    Paddle transposes NHWC to NCHW and back around every float32 convolution, while tensor cores
    take half precision with channels last.
    """
    return Variant(precision, "NHWC" if precision.is_half else "NCHW", fused)


CPU_VARIANT = Variant(layout="NHWC", onednn=True)
"""How CPUs compute, where oneDNN can be trusted."""
