"""Memory of this process and machine, as Linux tells it."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress

from hnas.base.errors import UserError

SHARED = "/dev/shm"
UNKNOWN = 4 * 2**30
"""Bytes that are taken for free where the system does not say."""


def _field(path: str, name: str) -> int | None:
    """Bytes of a ``Name:   123 kB`` line, or None."""
    with suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    return _field("/proc/meminfo", "MemAvailable") or UNKNOWN


def shared_bytes() -> int | None:
    """What is free of the memory that processes share, /dev/shm; None: there is none such."""
    with suppress(OSError):
        found = os.statvfs(SHARED)
        return found.f_bavail * found.f_frsize
    return None


def refuse_too_much(need: int, free: int, what: str, instead: str) -> None:
    """Say that memory will not do before it is asked for.

    Args:
        need, free: bytes; ``need`` is the least that will do.
        what: needs it, as the start of a sentence.
        instead: what to do.

    Raises:
        UserError: it is more than there is.
    """
    if need > free:
        raise UserError(f"{what} needs {gib(need)} at least, and {gib(free)} are free; {instead}")


def gib(size: int) -> str:
    """Bytes as a text, in GiB."""
    return f"{size / 2**30:.2f} GiB"


def reset_peak() -> None:
    """Let :func:`peak_gib` count from now on, where the system allows it."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_gib() -> float:
    """Largest resident size of this process since the start or the last reset, GiB."""
    peak = _field("/proc/self/status", "VmHWM")
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak / 2**30


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the system.

    A walk frees and takes buffers of megabytes thousands of times, and every page that comes
    from the system anew has to be cleared. Other C libraries are left alone.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
