"""Reading command lines: wrong ones are a :class:`UserError` of one line."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from hnas.base.errors import UserError


class _WithDefaults(argparse.HelpFormatter):
    """Tells a default where the help has no note of its own, in brackets."""

    def _get_help_string(self, action):
        told = "[" in action.help or action.required or not action.option_strings
        if told or action.default is argparse.SUPPRESS:
            return action.help
        default = "none" if action.default is None else "%(default)s"
        return f"{action.help} [default {default}]"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a :class:`UserError` of one line, and whose help has defaults."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": _WithDefaults, **settings})

    def error(self, message):
        raise UserError(message)


LARGEST = 2**32 - 1
"""Of whole numbers that nothing else bounds: of seeds, too."""
LARGEST_SIDE = 8192
"""Of images, px."""
MOST_ARCHITECTURES = 1_000_000
"""Of a file; each takes a few kilobytes while it is handled."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that Linux allows."""
SHOWN = 60
"""Characters of a value that a message repeats."""


def shown(value: object) -> str:
    """A user's value for a message: quoted if it is text, and shortened if it is long."""
    text = str(value)
    kept = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
    return repr(kept) if isinstance(value, str) else kept


def whole_number(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """An argparse type: an integer from ``low`` to ``high``."""
    return lambda text: _within(read_int(text), low, high)


def real_number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a finite number from ``low`` to ``high``."""
    return lambda text: _within(read_float(text), low, high)


def _within(value, low: float, high: float):
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(
            f"{shown(value)} is out of bounds; allowed: {low} to {high}"
        )
    return value


def path_text(text: str) -> str:
    """The path of a file or folder; an empty one, or one that no system could have, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    check_path(text)
    return text


def read_path(text: str) -> Path:
    """As :func:`path_text`, but a path object."""
    return Path(path_text(text))


def check_path(text: str) -> None:
    """Refuse what is too long for a path, in a name or whole, before some system call does."""
    longest = max(len(os.fsencode(name)) for name in text.split("/"))
    if longest > LONGEST_NAME:
        raise argparse.ArgumentTypeError(
            f"{shown(text)}: a name of {longest} bytes; {LONGEST_NAME} are allowed"
        )
    if len(os.fsencode(text)) >= LONGEST_PATH:
        raise argparse.ArgumentTypeError(f"{shown(text)}: a path of more than {LONGEST_PATH} bytes")


def read_bool(text: str) -> bool:
    """``True``/``False`` in any case, or 1/0."""
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{shown(text)} is neither True nor False")


def read_int(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from None


def read_float(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a finite number")
    return value
