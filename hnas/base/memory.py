"""Memory of this process and machine, as Linux tells it."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress

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
