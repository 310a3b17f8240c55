"""The operations of a walk on CPUs: oneDNN's kernels, with everything fused that they fuse.

Activations lie with channels last, in float32 or bfloat16. A convolution adds its bias and the
shortcut and applies ReLU itself. Filters are re-ordered once for every width and kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import paddle

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
from hnas.evaluation.onednn_steps import (
    MOST_ROWS,
    adding,
    convolution_kernel,
    copying,
    norm_of,
    pooling,
)
from hnas.evaluation.variants import Variant
from hnas.evaluation.winograd import filters_to_points, winograd, worth_it
from hnas.parallel.distributed import local_ranks

logger = logging.getLogger(__name__)

PACKED_SHARE = 1 / 8
"""Of the free memory, for filters as oneDNN wants them."""
TRIALS = (Trial(3, 9, 14, 4), Trial(3, 2, 14, 4), Trial(64, 8, 50, 4))
"""The last is computed by Winograd's transforms."""
TRIAL_CALIBRATION = 4


class CpuKernels(Kernels):
    """oneDNN's, by its C interface, on all threads.

    Args:
        variant: float32 or bfloat16.
        calibration: as in :class:`Kernels`.

    Raises:
        OneDNNError: the library is not there.
    """

    sliced = False

    def __init__(self, variant: Variant, calibration: int = 0):
        super().__init__(variant, calibration)
        self._dtype = variant.precision.dtype
        self.dtype = "float32"  # of whole filters, of which oneDNN packs the part that is used
        self._rest: dict[int, np.ndarray] = {}
        # With the filters themselves, so that their addresses stay theirs.
        self._points: dict[int, tuple[paddle.Tensor, paddle.Tensor]] = {}
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
        return y if shortcut is None else self._add(y, shortcut)

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
            return self.direct(x, convolutions[channels], 1, 0).reshape([rows, -1])

        return logits

    def _convolve(self, x, conv: Convolution, stride: int, padding: int, relu=False, shortcut=None):
        """Plus bias, if it has one, plus the shortcut's leading channels, then ReLU."""
        if stride == 1 and padding == 1 and self._dtype == "float32":
            images, size, width, inputs = x.shape
            if size == width and worth_it(images, size, inputs, conv.outputs):
                y = self._empty([images, size, size, conv.outputs], x.dtype)
                bias = self._numbers(conv)[0, 0] if conv.rest else None
                winograd(x, self._at_points(conv), conv.outputs, bias, shortcut, relu, y)
                return y
        return self.direct(x, conv, stride, padding, relu, shortcut)

    def direct(self, x, conv: Convolution, stride: int, padding: int, relu=False, shortcut=None):
        """The same by oneDNN's own convolution."""
        kernel = convolution_kernel(
            tuple(x.shape),
            x.dtype == paddle.bfloat16,
            tuple(conv.filters.shape),
            conv.outputs,
            (stride, padding),
            (bool(conv.rest), shortcut is not None, relu),
        )
        y = self._empty(kernel.output, x.dtype)
        if shortcut is not None:
            self._copy(shortcut, y)
        packed = self._packed.get((conv.identity, kernel.format), lambda: kernel.pack(conv.filters))
        tensors = [x, packed, *conv.rest, y]
        library().run(kernel.step, *(tensor.data_ptr() for tensor in tensors))
        return y

    def _empty(self, shape: list[int], dtype) -> paddle.Tensor:
        """Room for an output, and behind it for what :func:`norm_of` takes to be there."""
        images, height, width, _ = shape
        if not self.calibration or images * height * width % MOST_ROWS == 0:
            return paddle.empty(shape, dtype)
        return paddle.empty([images + MOST_ROWS, *shape[1:]], dtype)[:images]

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
        norm = norm_of(tuple(y.shape), self.calibration, self._dtype, relu)
        unused = scratch("normalised", norm.bytes)
        vectors = np.empty((4, norm.rows, y.shape[3]), np.float32)
        first, step = vectors.ctypes.data, vectors[0].nbytes
        addresses = [first + place * step for place in range(4)]
        library().run(norm.measure, y.data_ptr(), unused, *addresses[:2])
        if norm.rows > 1:
            vectors[:2] = over_rows(vectors[:2])
        vectors[2:] = self._numbers(conv)
        library().run(norm.apply, y.data_ptr(), y.data_ptr(), *addresses)

    def _numbers(self, conv: Convolution) -> np.ndarray:
        """Bias, or scale and shift, [1 or 2, 1, C]."""
        if conv.identity not in self._rest:
            rows = [part.numpy().ravel() for part in conv.rest]
            self._rest[conv.identity] = np.stack(rows)[:, None]
        return self._rest[conv.identity]

    def _at_points(self, conv: Convolution) -> paddle.Tensor:
        """The whole filters, transformed once for all widths."""
        key = conv.filters.data_ptr()
        if key not in self._points:
            self._points[key] = conv.filters, filters_to_points(conv.filters)
        return self._points[key][1]

    def _add(self, y, shortcut):
        """Plus the shortcut, then ReLU, in place."""
        shortcut = self.narrow(shortcut, y.shape[3])
        step = adding(tuple(y.shape), self._dtype)
        library().run(step, y.data_ptr(), shortcut.data_ptr(), y.data_ptr())
        return y


def over_rows(found: np.ndarray) -> np.ndarray:
    """Means and biased variances [2, rows, C] of equally many values: those of all, [2, 1, C]."""
    rows = found.shape[1]
    both = np.add.reduce(found, axis=1, keepdims=True) / rows
    apart = found[0] - both[0]
    both[1] += np.add.reduce(apart * apart, axis=0, keepdims=True) / rows
    return both


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
