"""Reading command lines: wrong ones are a :class:`UserError` of one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from hnas.base.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a :class:`UserError` of one line."""

    def error(self, message):
        raise UserError(message)


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer from ``low`` to ``high``."""

    def read(text: str) -> int:
        value = read_int(text)
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of bounds; allowed: {allowed}")
        return value

    return read


def read_bool(text: str) -> bool:
    """``True``/``False`` in any case, or 1/0."""
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def read_int(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def read_float(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value
