"""What only CPUs use: oneDNN in training; Paddle Inference, Winograd and products in scoring.

Expected values are Paddle's own operators' in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.evaluation.cpu.inference import InferenceKernels, cpu_threads, filters_are_fresh
from hnas.evaluation.cpu.matmul import MatmulKernels
from hnas.evaluation.cpu.winograd import WinogradKernels
from hnas.evaluation.kernels import DygraphKernels
from hnas.evaluation.weights import Convolution, new_identity
from hnas.models.convolution import onednn_conv2d
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.results import (
    Result,
    at_most,
    guarded,
    holds,
    not_here,
    relative_error,
)

LIMIT = 1e-5
"""Relative to the largest value, in float32."""
CHANNELS, IMAGES, CALIBRATION = 24, 6, 2
CONVOLUTIONS = ((3, 1, 9), (3, 2, 9), (1, 2, 8), (7, 2, 16))
"""Kernel, stride and size of the map."""


def check(machine: Machine) -> Iterator[Result]:
    """The CPU's own kernels."""
    if machine.has_gpu:
        yield not_here("oneDNN, Paddle Inference, Winograd", "only CPUs compute by them")
        return
    for kernel, stride, size in CONVOLUTIONS:
        name = f"oneDNN convolution {kernel}x{kernel}/{stride}"
        yield from guarded(name, check_convolution, name, onednn_conv2d, kernel, stride, size)
    for calibration in (0, CALIBRATION):
        yield from guarded("kernels of stage 3", check_kernels, calibration)


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


def check_kernels(calibration: int) -> Iterator[Result]:
    """A block by each kind of kernels."""
    statistics = f", {calibration} calibration images" if calibration else ""
    inference = InferenceKernels(cpu_threads(), calibration)
    yield holds(f"Paddle Inference takes new filters{statistics}", filters_are_fresh(inference))
    for name, kernels, size in (
        ("Paddle Inference", inference, 12),
        ("Winograd", WinogradKernels(inference), 6),
        ("products of tiny maps", MatmulKernels(calibration), 2),
    ):
        error = relative_error(*(block(each, calibration, size) for each in (kernels, None)))
        yield at_most(f"a block by {name}{statistics}", error, 10 * LIMIT)


def block(kernels: DygraphKernels | None, calibration: int, size: int) -> np.ndarray:
    """The output [N, C, H, W] of a block; None: by Paddle's operators in float64."""
    plain = DygraphKernels(calibration)
    dtype = "float32" if kernels else "float64"
    kernels = kernels or plain
    form = kernels.form(size, 1)
    shape = [1, 1, 1, 1]
    shape[form.channel_axis] = -1

    def tensor(seed: int, *dimensions: int) -> paddle.Tensor:
        return paddle.to_tensor(draw(seed, *dimensions).astype(np.float32)).astype(dtype)

    convolutions = [
        Convolution(
            form.arrange(tensor(seed, CHANNELS, CHANNELS, 3, 3)),
            tuple(
                tensor(seed + 1 + part, CHANNELS).reshape(shape)
                for part in range(2 if calibration else 1)
            ),
            new_identity(),
        )
        for seed in (10, 20)
    ]
    x = kernels.accept(tensor(0, IMAGES, CHANNELS, size, size), plain)
    return plain.accept(kernels.block(x, *convolutions, 0), kernels).numpy()
