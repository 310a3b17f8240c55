"""What a check is given, the machine, and what it yields: rows with a value and a limit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from hnas.base.errors import is_out_of_memory, word_of
from hnas.base.files import print_text

PASSED, FAILED, NOT_HERE = "passed", "failed", "not on this machine"
MEMORY = "end what else takes memory of the device, or give --quick True"
"""What to do where it runs out."""
SHOWN = {PASSED: "ok", FAILED: "FAILED", NOT_HERE: "-"}


@dataclass(frozen=True)
class Machine:
    """The device that is checked and how thoroughly, as processes hand it to each other."""

    folder: str  # for files of this run
    output: str = ""  # the file of its rows
    gpus: int = 0  # the first is checked, all exchange; 0: the CPU is checked
    quick: bool = False  # fewer and smaller of everything, for continuous integration
    tf32: str = "off"  # of this process: ``off``, ``on``, or Paddle's setting, ``auto``


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    name: str  # what was looked at
    state: str  # ``PASSED``, ``FAILED`` or ``NOT_HERE``
    value: float | str | None = None  # a number that was found, or a fact
    limit: float | None = None  # the largest value that passes; None: there is none
    note: str = ""  # what the value is, why it failed, or why it cannot be looked at here


def tell(check: str, result: Result, output: str) -> None:
    """Show a check's row, and add it to the file ``output`` as a line of JSON."""
    content = {"check": check, **asdict(result)}
    if isinstance(result.value, float) and not math.isfinite(result.value):
        content["value"] = str(result.value)  # JSON knows no NaN
    with open(output, "a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
    value = f"{result.value:.3g}" if isinstance(result.value, float) else result.value
    parts = ["" if value is None else str(value)]
    if result.limit is not None:
        parts.append(f"(at most {result.limit:.3g})")
    if result.note:
        parts.append(f"- {result.note}" if parts[0] else result.note)
    line = f"{SHOWN[result.state]:6} {check:11} {result.name:52} {' '.join(parts)}"
    print_text(f"{line.rstrip()}\n")


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
        note = f"{type(error).__name__}: {word_of(error)}"
        yield Result(name, FAILED, note=f"{note}; {MEMORY}" if is_out_of_memory(error) else note)


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
