"""The operations of a walk on GPUs: in any :class:`Variant`, fused where that works."""

from __future__ import annotations

import logging

import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.base.errors import UserError
from hnas.evaluation.fused import find_fused
from hnas.evaluation.kernels import EPSILON, DygraphKernels
from hnas.evaluation.variants import Precision, Variant, usual_variant
from hnas.evaluation.weights import Convolution, Form, channels_last, leading_channels
from hnas.models.elastic import batch_statistics

logger = logging.getLogger(__name__)


class GpuKernels(DygraphKernels):
    """Paddle's operators in a variant.

    There is no autocast: filters and bias come in half precision, and so every operator stays in
    it. Autocast would turn back to float32 at the first float32 bias.

    Args:
        variant: which.
        calibration: as in :class:`DygraphKernels`.

    Raises:
        UserError: a fused variant where the operator does not work, or with re-calibration.
    """

    def __init__(self, variant: Variant, calibration: int = 0):
        super().__init__(calibration, variant.layout)
        self.variant = variant
        self._dtype = getattr(paddle, variant.precision.dtype)
        self._fused = None
        if variant.fused:
            if calibration:
                raise UserError(f"{variant}: BatchNorm re-calibration cannot be fused")
            self._fused, reason = find_fused(variant.precision, variant.layout)
            if self._fused is None:
                raise UserError(f"{variant}: {reason}")

    def form(self) -> Form:
        dtype = self.variant.precision.dtype
        if self._fused is not None and self.layout == "NHWC":
            return Form(channels_last, 3, self.channel_axis, dtype)
        return Form(channel_axis=self.channel_axis, dtype=dtype)

    def accept(self, x, kernels: DygraphKernels):
        x = super().accept(x, kernels)
        return x if x.dtype == self._dtype else x.astype(self._dtype)

    def conv_norm(self, x, convolution: Convolution, stride: int, padding: int):
        if not self.calibration:
            return super().conv_norm(x, convolution, stride, padding)
        y = self.convolve(x, convolution.filters, stride, padding)
        seen = leading_channels(y, self.calibration, axis=0)
        # Statistics in float32: a half-precision mean would be as coarse as the values.
        seen = seen.astype("float32") if self.variant.precision.is_half else seen
        statistics = batch_statistics(seen, self._mean_of_calibration)
        # One operator, which computes in float32 and rounds its result only.
        flat = [part.flatten() for part in (*statistics, *convolution.rest)]
        return F.batch_norm(y, *flat, epsilon=EPSILON, data_format=self.layout)

    def stem(self, x, conv: Convolution):
        if self._fused is None:
            return super().stem(x, conv)
        y = self._run(x, conv, None, stride=2, padding=3)
        return F.max_pool2d(y, 3, 2, 1, data_format=self.layout)

    def first(self, x, conv1: Convolution, stride: int):
        if self._fused is None:
            return super().first(x, conv1, stride)
        return self._run(x, conv1, None, stride, padding=1)

    def project(self, x, conv: Convolution):
        if self._fused is None:
            return super().project(x, conv)
        return self._run(x, conv, None, stride=2, padding=0, activation="identity")

    def last(self, y, shortcut, conv2: Convolution):
        if self._fused is None:
            return super().last(y, shortcut, conv2)
        return self._run(y, conv2, self.narrow(shortcut, conv2.outputs), stride=1, padding=1)

    def _run(self, x, conv, shortcut, stride: int, padding: int, activation: str = "relu"):
        bias = conv.rest[0].flatten()
        return self._fused(
            x, conv.filters, bias, shortcut, stride, padding, self.layout, activation
        )


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
