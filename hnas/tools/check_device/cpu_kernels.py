"""What only CPUs use: oneDNN's convolutions in training, and its kernels in stage 3.

Expected values are Paddle's own operators' in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.evaluation.cpu_kernels import CpuKernels
from hnas.evaluation.kernels import Convolution, Kernels, new_identity
from hnas.evaluation.variants import Precision, cpu_variant
from hnas.models.convolution import onednn_conv2d
from hnas.tools.check_device.arithmetic import BFLOAT16, FLOAT32, LIMITS, scoring_precisions
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.results import Result, at_most, guarded, not_here, relative_error

LIMIT = 1e-5
"""Of a convolution's error in float32, relative to the largest value."""
BLOCK_LIMITS = {FLOAT32: 1e-4, BFLOAT16: LIMITS[BFLOAT16]}
CHANNELS, IMAGES, CALIBRATION = 24, 6, 2
CONVOLUTIONS = ((3, 1, 9), (3, 2, 9), (1, 2, 8), (7, 2, 16))
"""Kernel, stride and size of the map."""
WIDTHS = {CHANNELS: IMAGES, 112: 20}
"""Channels of the blocks, and images: few, and enough for Winograd's transforms."""
MAP = 12
"""Height and width of the blocks' inputs, px."""


def check(machine: Machine) -> Iterator[Result]:
    """The CPU's own kernels."""
    if machine.has_gpu:
        yield not_here("oneDNN's kernels", "only CPUs compute by them")
        return
    for kernel, stride, size in CONVOLUTIONS:
        name = f"oneDNN convolution {kernel}x{kernel}/{stride}"
        yield from guarded(name, check_convolution, name, onednn_conv2d, kernel, stride, size)
    for precision, missing in scoring_precisions(machine):
        if precision not in BLOCK_LIMITS:
            continue
        name = f"stage 3's kernels in {precision.value}"
        if missing:
            yield not_here(name, missing)
            continue
        for calibration in (0, CALIBRATION):
            yield from guarded(name, check_kernels, precision, calibration)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def check_convolution(
    name: str, function: Callable, kernel: int, stride: int, size: int
) -> Iterator[Result]:
    """Output and both gradients of ``function(x, weight, channels, stride, padding)``."""
    x, w = draw(0, 3, 10, size, size), draw(1, CHANNELS, 12, kernel, kernel)
    padding = kernel // 2

    def plain(x, w, channels, stride, padding):
        return F.conv2d(x, w[:channels, : x.shape[1]], stride=stride, padding=padding)

    results = []
    for convolve, dtype in ((plain, "float64"), (function, "float32")):
        tensors = [paddle.to_tensor(part.astype(np.float32)).astype(dtype) for part in (x, w)]
        for tensor in tensors:
            tensor.stop_gradient = False
        y = convolve(*tensors, CHANNELS - 4, stride, padding)
        upstream = paddle.to_tensor(draw(2, *y.shape).astype(np.float32)).astype(dtype)
        results.append([part.numpy() for part in (y, *paddle.grad(y, tensors, upstream))])
    error = max(relative_error(one, other) for other, one in zip(*results, strict=True))
    yield at_most(name, error, LIMIT, "output and gradients")


def check_kernels(precision: Precision, calibration: int) -> Iterator[Result]:
    """Blocks by the kernels of stage 3."""
    how = f"{precision.value}{', re-calibrated' if calibration else ''}"
    for channels in WIDTHS:
        kernels = CpuKernels(cpu_variant(precision), calibration)
        right = blocks(Kernels(calibration=calibration), "float64", channels)
        for name, found in blocks(kernels, "float32", channels).items():
            row = f"{name}, {channels} channels, {how}"
            error = relative_error(found, right[name])
            yield at_most(row, error, BLOCK_LIMITS[precision], "of the largest value")


@paddle.no_grad()
def blocks(kernels: Kernels, dtype: str, channels: int) -> dict[str, np.ndarray]:
    """Outputs [N, C, H, W] of a block and of a stage's first block, of tensors in ``dtype``."""
    plain = Kernels(calibration=kernels.calibration)

    def tensor(seed: int, *dimensions: int) -> paddle.Tensor:
        return paddle.to_tensor(draw(seed, *dimensions).astype(np.float32)).astype(dtype)

    def convolution(seed: int, outputs: int, inputs: int, kernel: int) -> Convolution:
        filters = tensor(seed, channels + 4, channels + 3, kernel, kernel)
        if kernels.sliced:
            filters = filters[:outputs, :inputs].contiguous()
        parts = 2 if kernels.calibration else 1
        rest = (kernels.vector(tensor(seed + 1 + n, outputs), parts == 1) for n in range(parts))
        return Convolution(kernels.arranged(filters), tuple(rest), outputs, new_identity())

    x = kernels.accept(tensor(0, WIDTHS[channels], channels, MAP, MAP))
    middle, narrow = channels - 6, channels - 1
    conv1, conv2 = convolution(10, middle, channels, 3), convolution(20, narrow, middle, 3)
    first = kernels.last(
        kernels.first(x, convolution(30, middle, channels, 3), stride=2),
        kernels.project(x, convolution(40, channels, channels, 1)),
        convolution(50, narrow, middle, 3),
    )
    found = {"block": kernels.last(kernels.first(x, conv1, 1), x, conv2), "first block": first}
    return {
        name: plain.accept(y, kernels.layout).astype(dtype).numpy() for name, y in found.items()
    }
