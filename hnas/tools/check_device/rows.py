"""What a check is given, the machine, and what it yields: rows with a value and a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

PASSED, FAILED, NOT_HERE = "passed", "failed", "not on this machine"
ROW = b"row: "
"""Before the JSON text of a check's name and a result, where a process writes a line of them."""


@dataclass(frozen=True)
class Machine:
    """The device that is checked and how thoroughly, as processes hand it to each other.

    Attributes:
        folder: for files of this run.
        gpus: how many there are: the first is checked, all exchange. 0: the CPU is checked.
        quick: fewer and smaller of everything, for continuous integration.
        full: larger images and more architectures.
        tf32: of this process: ``off``, ``on``, or Paddle's setting, ``auto``.
    """

    folder: str
    gpus: int = 0
    quick: bool = False
    full: bool = False
    tf32: str = "off"


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        name: what was looked at.
        state: ``passed``, ``failed`` or ``not on this machine``.
        value: what was found: a number, or a text for a fact.
        limit: the largest value that passes; None: there is none.
        note: what the value is, why it failed, or why it cannot be looked at here.
    """

    name: str
    state: str
    value: float | str | None = None
    limit: float | None = None
    note: str = ""


def fact(name: str, value: float | str, note: str = "") -> Result:
    """A property of the machine, which is neither right nor wrong."""
    return Result(name, PASSED, value, note=note)


def at_most(name: str, value: float, limit: float, note: str = "") -> Result:
    """Passes if ``value`` is a number of at most ``limit``; NaN is not."""
    value = float(value)
    return Result(name, PASSED if value <= limit else FAILED, value, limit, note)


def not_here(name: str, why: str) -> Result:
    """What this machine has nothing to look at for."""
    return Result(name, NOT_HERE, note=why)


def guarded(name: str, check: Callable[..., Iterable[Result]], *arguments) -> Iterator[Result]:
    """The rows of a check; an exception is one more, failed, and ends the check only."""
    try:
        yield from check(*arguments)
    except Exception as error:  # whatever a device does wrong is a result
        lines = str(error).strip().splitlines() or ["no word"]
        yield Result(name, FAILED, note=f"{type(error).__name__}: {lines[-1].strip()}")


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value, which must not be 0, in float64.

    Infinite where shapes differ, NaN if there is one anywhere.
    """
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def differing(found: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> int:
    """Elements of arrays that are not the same number; all of one whose shape differs."""
    return sum(
        int((one != other).sum()) if one.shape == other.shape else max(one.size, other.size)
        for one, other in zip(found, expected, strict=True)
    )
