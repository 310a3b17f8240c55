"""What the machine is: the device, its libraries, its memory, and what a convolution rounds to."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.base.device import cpu_threads
from hnas.base.memory import available_bytes, gib, shared_bytes
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.results import Result, at_most, fact, not_here

DRIVER = Path("/proc/driver/nvidia/version")
PROCESSOR = Path("/proc/cpuinfo")
ROUNDED = 1e-4
"""An error of a convolution, over its largest value, that float32 does not make: it is TF32's."""


def check_cards(machine: Machine) -> Iterator[Result]:
    """How many GPUs this Paddle sees."""
    number = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    yield fact("cards that Paddle sees", number)


def check(machine: Machine) -> Iterator[Result]:
    """(a) Facts; of their versions Paddle says what it was built with."""
    yield fact("Paddle", f"{paddle.version.full_version} ({paddle.version.commit[:10]})")
    yield fact("Python", platform.python_version())
    if machine.has_gpu:
        yield from facts_of_gpu(machine)
    else:
        yield not_here("card, capability, driver, CUDA, cuDNN, NCCL", "Paddle sees no GPU")
    yield fact("processor", f"{processor()}, {os.cpu_count()} cores, {cpu_threads()} threads used")
    yield fact("free memory", gib(available_bytes()))
    shared = shared_bytes()
    yield fact("/dev/shm, free", "unknown" if shared is None else gib(shared))


def facts_of_gpu(machine: Machine) -> Iterator[Result]:
    """The current card, and the libraries that Paddle uses on it."""
    properties = paddle.device.cuda.get_device_properties()
    yield fact("card", f"{properties.name}, {properties.multi_processor_count} multiprocessors")
    yield from check_cards(machine)
    yield fact("compute capability", f"{properties.major}.{properties.minor}")
    yield fact("memory of the card", gib(properties.total_memory))
    yield fact("driver", driver())
    yield fact("CUDA", str(paddle.version.cuda()), "Paddle's")
    yield fact("cuDNN", f"{paddle.version.cudnn()}, loaded {paddle.device.get_cudnn_version()}")
    yield fact("NCCL", str(paddle.version.nccl()), "Paddle's")
    yield fact("bfloat16", "yes" if paddle.amp.is_bfloat16_supported() else "no")


def driver() -> str:
    """The version of NVIDIA's driver, as its kernel module says."""
    with suppress(OSError):
        words = DRIVER.read_text(encoding="ascii", errors="replace").split()
        return next((word for word in words if word[0].isdigit()), "unknown")
    return "unknown"


def processor() -> str:
    """The processor's name, as Linux has it."""
    with suppress(OSError):
        for line in PROCESSOR.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def check_tf32(machine: Machine) -> Iterator[Result]:
    """(a) Whether a convolution and a product are TF32's: measured, not asked."""
    setting = machine.plan.tf32
    for name, error in (("convolutions", convolution_error()), ("products", product_error())):
        row = f"{name} with --tf32 {setting}"
        if setting == "off":
            yield at_most(row, error, ROUNDED, "error of float32, over the largest value")
        else:
            yield judge_tf32(row, error, must=setting == "on" and has_tf32())


def judge_tf32(row: str, error: float, must: bool) -> Result:
    """What an error says; where TF32 is asked for and the card has it, it must be seen."""
    kind = "TF32" if error > ROUNDED else "float32"
    note = f"error {error:.1e} of the largest value"
    if must and kind != "TF32":
        return Result(row, "failed", kind, note=f"{note}: TF32 was switched on")
    return fact(row, kind, note)


def has_tf32() -> bool:
    """Whether the current device is a card with TF32."""
    return paddle.device.cuda.get_device_capability() >= (8, 0)


def convolution_error() -> float:
    """Of a 3x3 convolution in float32, against the sum written out in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 64, 14, 14)).astype(np.float32)
    w = rng.normal(size=(64, 64, 3, 3)).astype(np.float32)
    found = F.conv2d(paddle.to_tensor(x), paddle.to_tensor(w)).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), axis=(2, 3))
    right = np.einsum("nchwij,ocij->nohw", windows, w.astype(np.float64), optimize=True)
    return float(np.abs(found - right).max() / np.abs(right).max())


def product_error() -> float:
    """Of a matrix product in float32, against float64."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(256, 256)).astype(np.float32) for _ in range(2))
    found = paddle.matmul(paddle.to_tensor(x), paddle.to_tensor(y)).numpy()
    right = x.astype(np.float64) @ y.astype(np.float64)
    return float(np.abs(found - right).max() / np.abs(right).max())
