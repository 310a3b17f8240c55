"""The operations of a walk on CPUs: oneDNN's kernels, with everything fused that they fuse.

Activations lie with channels last, in float32 or bfloat16. A convolution adds its bias and the
shortcut and applies ReLU itself. Filters are re-ordered once for every width and shape, and kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.base.device import available_bytes, keep_freed_memory
from hnas.base.errors import UserError
from hnas.base.onednn import (
    MAX_POOLING,
    MEAN_POOLING,
    Step,
    library,
    refuse_without_bfloat16,
    scratch,
)
from hnas.evaluation.kernels import (
    CACHE_BYTES,
    Convolution,
    Kernels,
    LatestTensors,
    Trial,
    fault_of,
    new_identity,
)
from hnas.evaluation.onednn_steps import convolution_kernel, copying, norm_of, pooling
from hnas.evaluation.variants import Variant
from hnas.parallel.distributed import local_ranks

logger = logging.getLogger(__name__)

PACKED_SHARE = 1 / 8
"""Of the free memory, for filters as oneDNN wants them."""
TRIALS = Trial(3, 9, 14, 4), Trial(3, 2, 14, 4)
TRIAL_CALIBRATION = 4


class CpuKernels(Kernels):
    """oneDNN's, by its C interface, on all threads.

    Args:
        variant: float32, or bfloat16 without re-calibration.
        calibration: as in :class:`Kernels`.

    Raises:
        OneDNNError: the library is not there.
    """

    sliced = False

    def __init__(self, variant: Variant, calibration: int = 0):
        super().__init__(variant, calibration)
        self._dtype = variant.precision.dtype
        self.dtype = "float32"  # of whole filters, of which oneDNN packs the part that is used
        free = available_bytes() / local_ranks()
        self._packed = LatestTensors(max(CACHE_BYTES, int(PACKED_SHARE * free)))
        library()

    def conv_norm(
        self, x, conv: Convolution, stride: int, padding: int, relu: bool = False, shortcut=None
    ):
        if not self.calibration:
            return self._convolve(x, conv, stride, padding, relu, shortcut)
        y = self._convolve(x, conv._replace(rest=()), stride, padding)
        self._normalise(y, conv, relu and shortcut is None)
        return y if shortcut is None else F.relu(y + self.narrow(shortcut, y.shape[3]))

    def max_pool(self, x):
        return self._run_on(x, pooling(tuple(x.shape), self._dtype, MAX_POOLING, 3, 2, 1))

    def narrow(self, x, channels: int):
        if x.shape[3] == channels:
            return x
        return self._copy(x, paddle.empty([*x.shape[:3], channels], self._dtype))

    def pooled(self, x):
        x = x[self.calibration :].astype("float32")
        n, size, _, channels = x.shape
        if size == 1:
            return x.mean([1, 2])
        step = pooling(tuple(x.shape), "float32", MEAN_POOLING, size, size, 0)
        return self._run_on(x, step).reshape([n, channels])

    def classifier(self, weight, bias) -> Callable:
        whole = weight.t().contiguous().reshape([weight.shape[1], -1, 1, 1])
        convolutions: dict[int, Convolution] = {}

        def logits(features):
            rows, channels = features.shape
            if channels not in convolutions:
                convolutions[channels] = Convolution(whole, (bias,), len(whole), new_identity())
            x = features.reshape([rows, 1, 1, channels])
            return self._convolve(x, convolutions[channels], 1, 0).reshape([rows, -1])

        return logits

    def _convolve(self, x, conv: Convolution, stride: int, padding: int, relu=False, shortcut=None):
        """Plus bias, if it has one, plus the shortcut's leading channels, then ReLU."""
        kernel = convolution_kernel(
            tuple(x.shape),
            x.dtype == paddle.bfloat16,
            tuple(conv.filters.shape),
            conv.outputs,
            (stride, padding),
            (bool(conv.rest), shortcut is not None, relu),
        )
        y = paddle.empty(kernel.output, x.dtype)
        if shortcut is not None:
            self._copy(shortcut, y)
        packed = self._packed.get((conv.identity, kernel), lambda: kernel.pack(conv.filters))
        tensors = [x, packed, *conv.rest, y]
        library().run(kernel.step, *(tensor.data_ptr() for tensor in tensors))
        return y

    def _copy(self, x, target):
        """The leading channels of ``x`` as ``target``."""
        step = copying(tuple(x.shape), target.shape[3], self._dtype)
        library().run(step, x.data_ptr(), target.data_ptr())
        return target

    def _run_on(self, x, made: tuple[Step, list[int]]):
        step, shape = made
        y = paddle.empty(shape, x.dtype)
        library().run(step, x.data_ptr(), y.data_ptr())
        return y

    def _normalise(self, y, conv: Convolution, relu: bool) -> None:
        """BatchNorm by the calibration images' statistics, in place."""
        norm = norm_of(tuple(y.shape), self.calibration, relu)
        unused = scratch("normalised", norm.bytes)
        vectors = [paddle.empty([y.shape[3]]) for _ in range(2)] + list(conv.rest)
        addresses = [vector.data_ptr() for vector in vectors]
        library().run(norm.measure, y.data_ptr(), unused, *addresses[:2])
        library().run(norm.apply, y.data_ptr(), y.data_ptr(), *addresses)


def cpu_kernels(variant: Variant, calibration: int) -> Kernels:
    """oneDNN's kernels, or Paddle's where they cannot be trusted, which is logged.

    Raises:
        UserError: bfloat16, and they or the processor cannot.
    """
    keep_freed_memory()
    half = variant.precision.is_half
    if half:
        refuse_without_bfloat16("bfloat16")
    few = min(calibration, TRIAL_CALIBRATION)
    reason = fault_of(lambda: CpuKernels(variant, few), TRIALS)
    if not reason:
        return CpuKernels(variant, calibration)
    if half:
        raise UserError(f"bfloat16 does not work on this CPU: oneDNN {reason}; give --amp O0")
    logger.warning("scoring by Paddle's operators, several times slower: oneDNN %s", reason)
    return Kernels(calibration=calibration)
