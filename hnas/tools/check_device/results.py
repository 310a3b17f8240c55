"""What a check yields: named results with a value, a limit and whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

PASSED, FAILED, NOT_HERE = "passed", "failed", "not on this machine"


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


def holds(name: str, found: bool, note: str = "") -> Result:
    """Passes if ``found``; ``note`` says what that means."""
    return Result(name, PASSED if found else FAILED, "yes" if found else "no", note=note)


def not_here(name: str, why: str) -> Result:
    """What this machine has nothing to look at for."""
    return Result(name, NOT_HERE, note=why)


def failure(name: str, error: BaseException) -> Result:
    """A check that an exception ended: the last line of what it says."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
    return Result(name, FAILED, note=said)


def guarded(name: str, check: Callable[..., Iterable[Result]], *arguments) -> Iterator[Result]:
    """The results of a check; an exception is one more, failed, and ends the check only."""
    try:
        yield from check(*arguments)
    except Exception as error:  # whatever a device does wrong is a result
        yield failure(name, error)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value; infinite where shapes differ.

    Both in float64. Whole numbers and booleans are compared alike, so one that differs counts.
    """
    if found.shape != expected.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    largest = np.abs(expected).max()
    # A NaN anywhere is NaN here, and passes no limit.
    return float(np.abs(found - expected).max() / (largest if largest else 1.0))


def differing(found: np.ndarray, expected: np.ndarray) -> int:
    """Elements that are not the same number; all of them where shapes differ."""
    if found.shape != expected.shape:
        return max(found.size, expected.size, 1)
    return int((found != expected).sum())
