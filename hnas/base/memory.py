"""Memory of this process and machine, as Linux tells it."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

SHARED = "/dev/shm"


def _field(path: str, name: str) -> int | None:
    """Bytes of a ``Name:   123 kB`` line, or None."""
    with suppress(OSError, ValueError), open(path, encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def available_bytes() -> int:
    """Memory that can be taken without swapping; 4 GiB where the system does not say."""
    return _field("/proc/meminfo", "MemAvailable") or 4 * 2**30


def shared_bytes() -> int | None:
    """What is free of the memory that processes share, /dev/shm; None: there is none such."""
    with suppress(OSError):
        found = os.statvfs(SHARED)
        return found.f_bavail * found.f_frsize
    return None


def gib(size: int) -> str:
    """Bytes as a text, in GiB."""
    return f"{size / 2**30:.2f} GiB"


def peak_gib() -> float:
    """Largest resident size of this process since the start, GiB."""
    return (_field("/proc/self/status", "VmHWM") or 0) / 2**30


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
