"""The device that a program computes on: what it is, how it rounds, what memory it has."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import paddle

from hnas.base.errors import UserError
from hnas.base.memory import available_bytes, peak_gib

logger = logging.getLogger(__name__)

CUDNN_TF32, CUBLAS_TF32 = "FLAGS_cudnn_allow_tf32", "FLAGS_cublas_allow_tf32"
"""Paddle 3.3.1's, of GPU builds alone: convolutions, on by default; matrix products, off."""
DETERMINISTIC = "FLAGS_cudnn_deterministic"
OVERRIDE = "NVIDIA_TF32_OVERRIDE"
"""The environment's: 0 forbids TF32 to NVIDIA's libraries, 1 makes them use it."""
FIRST_WITH_TF32 = 8
"""Compute capability of Ampere."""


def on_gpu() -> bool:
    """Whether computations run on a GPU."""
    return paddle.get_device() != "cpu"


def device_name() -> str:
    """The GPU's name as its driver has it, or ``CPU``."""
    return paddle.device.cuda.get_device_name() if on_gpu() else "CPU"


def set_tf32(mode: str) -> bool:
    """Decide whether float32 convolutions round their inputs to TF32; before the first of them.

    Args:
        mode: ``on`` and ``off`` hold for matrix products, too; ``auto`` leaves Paddle's settings:
            convolutions, but not matrix products, in TF32 where the card has it.

    Returns:
        Whether convolutions do.

    Raises:
        UserError: it is not to be had as asked for.
    """
    if not on_gpu():
        if mode == "on":
            raise UserError("--tf32 on needs a GPU; CPUs compute in float32")
        return False
    override = os.environ.get(OVERRIDE)
    if (mode, override) in (("on", "0"), ("off", "1")):
        raise UserError(f"--tf32 {mode}, but {OVERRIDE}={override} is set; unset it")
    properties = paddle.device.cuda.get_device_properties()
    has_it = properties.major >= FIRST_WITH_TF32
    if mode == "on" and not has_it:
        raise UserError(
            f"--tf32 on, but {properties.name} (compute capability {properties.major}."
            f"{properties.minor}) has no TF32; give auto or off"
        )
    try:
        if mode != "auto":
            paddle.set_flags({CUDNN_TF32: mode == "on", CUBLAS_TF32: mode == "on"})
        allowed = paddle.get_flags([CUDNN_TF32])[CUDNN_TF32]
    except ValueError:
        if mode != "auto":
            raise UserError(
                f"--tf32 {mode}, but Paddle {paddle.__version__} has no {CUDNN_TF32}; use "
                "paddlepaddle-gpu==3.3.1"
            ) from None
        logger.warning(
            "Paddle %s has no %s: taking convolutions for TF32's; use paddlepaddle-gpu==3.3.1",
            paddle.__version__,
            CUDNN_TF32,
        )
        allowed = True
    return has_it and override != "0" and (bool(allowed) or override == "1")


@dataclass(frozen=True)
class Arithmetic:
    """What results depend on beside data and settings; as text for logs and saved states.

    Attributes:
        device: the GPU's name, or ``CPU``.
        tf32: whether float32 convolutions round to TF32.
        amp: level of mixed precision, ``O0`` (none), ``O1`` or ``O2``.
        deterministic: whether cuDNN uses deterministic algorithms only.
        paddle: its version.
    """

    device: str
    tf32: bool
    amp: str = "O0"
    deterministic: bool = False
    paddle: str = paddle.__version__

    def __str__(self) -> str:
        rounding = "TF32" if self.tf32 else "float32"
        algorithms = ", deterministic" if self.deterministic else ""
        return f"{self.device}, {rounding}, amp {self.amp}{algorithms}, Paddle {self.paddle}"


def set_deterministic() -> None:
    """Let cuDNN use deterministic algorithms only; CPUs do anyway.

    Raises:
        UserError: this Paddle cannot be told to.
    """
    if not on_gpu():
        return
    try:
        paddle.set_flags({DETERMINISTIC: True})
    except ValueError:
        raise UserError(
            f"--deterministic True, but Paddle {paddle.__version__} has no {DETERMINISTIC}; use "
            "paddlepaddle-gpu==3.3.1"
        ) from None


def free_bytes() -> int:
    """Memory of the device that can still be taken; of a CPU the machine's."""
    if not on_gpu():
        return available_bytes()
    used = paddle.device.cuda.memory_allocated()
    try:
        # Other processes on the card count, too; what Paddle holds, but does not use, is free.
        free, _ = paddle.cuda.mem_get_info()
        return free + paddle.device.cuda.memory_reserved() - used
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        logger.warning("the card does not say what is free of its memory: %s", error)
        return paddle.device.cuda.get_device_properties().total_memory - used


def peak_memory() -> str:
    """The largest memory taken so far, for logs: of the GPU, if there is one, and the process."""
    host = f"{peak_gib():.2f} GiB"
    if not on_gpu():
        return host
    return f"{paddle.device.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU, {host} beside"


def cpu_threads() -> int:
    """``PINAS_THREADS``, which the launchers set, or ``OMP_NUM_THREADS``, or one a core."""
    given = os.environ.get("PINAS_THREADS") or os.environ.get("OMP_NUM_THREADS")
    return int(given or os.cpu_count() or 1)


def processor() -> str:
    """The processor's name; last digits of results differ between processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
