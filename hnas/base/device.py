"""The device and machine that a program computes on: what they are, how they round, memory."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass

import paddle
from paddle.base import core

from hnas.base.command_line import shown
from hnas.base.errors import PADDLE_ERRORS, UserError, word_of

CUDNN_TF32, CUBLAS_TF32 = "FLAGS_cudnn_allow_tf32", "FLAGS_cublas_allow_tf32"
"""Paddle 3.3.1's, of GPU builds alone: convolutions, on by default; matrix products, off."""
OVERRIDE = "NVIDIA_TF32_OVERRIDE"
"""The environment's: 0 forbids TF32 to NVIDIA's libraries, 1 makes them use it."""
SHARED = "/dev/shm"


def visible_gpus() -> int:
    """How many GPUs this Paddle sees."""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def choose_device(wanted: str) -> None:
    """Compute on ``cpu``, on ``gpu``, or, for ``auto``, on a GPU if there is one.

    Raises:
        UserError: ``gpu``, and Paddle sees none, or one that cannot be used.
    """
    has_gpu = visible_gpus() > 0
    if wanted == "gpu" and not has_gpu:
        raise UserError("--device gpu, but this Paddle sees no GPU; use --device cpu or see README")
    try:
        paddle.set_device("cpu" if wanted == "cpu" or not has_gpu else "gpu")
    except PADDLE_ERRORS as error:
        raise UserError(f"the GPU cannot be used: {word_of(error)}; see nvidia-smi") from error


def on_gpu() -> bool:
    """Whether computations run on a GPU."""
    return paddle.get_device() != "cpu"


def device_name() -> str:
    """The GPU's name as its driver has it, or ``CPU``."""
    return paddle.device.cuda.get_device_name() if on_gpu() else "CPU"


def has_tf32() -> bool:
    """Whether computations run on a GPU with TF32: Ampere's or a later one."""
    return on_gpu() and paddle.device.cuda.get_device_properties().major >= 8


def set_tf32(mode: str) -> bool:
    """Decide whether float32 convolutions round their inputs to TF32; before the first of them.

    NVIDIA's libraries read their variable when they are loaded, so ``off`` sets it, too.

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
    if mode == "on" and not has_tf32():
        card = paddle.device.cuda.get_device_properties()
        kind = f"{card.name} (compute capability {card.major}.{card.minor})"
        raise UserError(f"--tf32 on, but {kind} has no TF32; give auto or off")
    if mode != "auto":
        paddle.set_flags({CUDNN_TF32: mode == "on", CUBLAS_TF32: mode == "on"})
        # Of older convolutions and the fused operator, and of products, which read no flags.
        core.set_cudnn_switch(mode == "on")
        core.set_cublas_switch(mode == "on")
    if mode == "off":
        os.environ[OVERRIDE] = "0"
    allowed = paddle.get_flags([CUDNN_TF32])[CUDNN_TF32]
    return has_tf32() and override != "0" and (bool(allowed) or override == "1")


def set_deterministic() -> None:
    """Let cuDNN use deterministic algorithms only; CPUs do anyway."""
    if on_gpu():
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})


@dataclass(frozen=True)
class Arithmetic:
    """What results depend on beside data and settings; as text for logs and saved states."""

    device: str
    tf32: bool
    amp: str = "O0"
    deterministic: bool = False
    paddle: str = paddle.__version__

    def __str__(self) -> str:
        rounding = "TF32" if self.tf32 else "float32"
        algorithms = ", deterministic" if self.deterministic else ""
        return f"{self.device}, {rounding}, amp {self.amp}{algorithms}, Paddle {self.paddle}"


def _field(path: str, name: str) -> str:
    """What stands behind ``name:`` in a file; empty where there is no such line."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""


def _bytes(path: str, name: str) -> int:
    told = _field(path, name)
    return int(told.split()[0]) * 1024 if told else 0


def available_bytes() -> int:
    """Memory that can be taken without swapping; 4 GiB where the system does not say."""
    return _bytes("/proc/meminfo", "MemAvailable:") or 4 * 2**30


def shared_bytes() -> int | None:
    """What is free of the memory that processes share, /dev/shm; None: there is none such."""
    with suppress(OSError):
        found = os.statvfs(SHARED)
        return found.f_bavail * found.f_frsize
    return None


def gib(size: int) -> str:
    """Bytes as a text, in GiB."""
    return f"{size / 2**30:.2f} GiB"


def free_bytes() -> int:
    """Memory of the device that can still be taken; of a CPU the machine's."""
    if not on_gpu():
        return available_bytes()
    # Other processes on the card count, too; what Paddle holds, but does not use, is free.
    free, _ = paddle.cuda.mem_get_info()
    held, used = paddle.device.cuda.memory_reserved(), paddle.device.cuda.memory_allocated()
    return free + held - used


def peak_memory() -> str:
    """The largest memory taken so far, for logs: of the GPU, if there is one, and the process."""
    host = gib(_bytes("/proc/self/status", "VmHWM:"))
    if not on_gpu():
        return host
    return f"{gib(paddle.device.cuda.max_memory_allocated())} on the GPU, {host} beside"


def cpu_threads() -> int:
    """``PINAS_THREADS``, which the launchers set, or ``OMP_NUM_THREADS``, or one a core."""
    given = os.environ.get("PINAS_THREADS") or os.environ.get("OMP_NUM_THREADS")
    first = (given or str(os.cpu_count() or 1)).partition(",")[0]  # OpenMP: of each nested level
    if not re.fullmatch("[1-9][0-9]{0,3}", first):
        raise UserError(f"PINAS_THREADS or OMP_NUM_THREADS is {shown(given)}, no number of threads")
    return int(first)


def processor() -> str:
    """The processor's name; last digits of results differ between processors."""
    return _field("/proc/cpuinfo", "model name") or platform.machine()
