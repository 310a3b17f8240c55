"""Memory of this process and machine, as Linux tells it."""

from __future__ import annotations

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
