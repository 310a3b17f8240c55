"""Reading command lines: wrong ones are a :class:`UserError` of one line."""

from __future__ import annotations

import argparse
import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hnas.base.errors import UserError
from hnas.base.files import print_text


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

    def print_help(self, file=None):
        print_text(self.format_help())


LARGEST = 2**32 - 1  # of whole numbers that nothing else bounds: of seeds, too
LARGEST_SIDE = 8192  # of images, px
MOST_ARCHITECTURES = 500_000  # of a file: ten times the competition's; each takes kilobytes
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes that Linux allows
SHOWN = 60  # characters of a value that a message repeats


def shown(value: object) -> str:
    """A user's value for a message: quoted if it is text, and shortened if it is long."""
    text = str(value)
    kept = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
    return repr(kept) if isinstance(value, str) else kept


def whole_number(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """An argparse type: an integer from ``low`` to ``high``."""
    return _number(int, "a whole number", low, high)


def real_number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a finite number from ``low`` to ``high``."""
    return _number(float, "a finite number", low, high)


def _number(kind: type, what: str, low: float, high: float) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        value = math.nan
        # Python takes 1_0 and the digits of other scripts, too.
        if text.isascii() and "_" not in text:
            with suppress(ValueError):
                value = kind(text)
        if not abs(value) < math.inf:
            raise ArgumentTypeError(f"{shown(text)} is not {what}")
        if not low <= value <= high:
            raise ArgumentTypeError(f"{shown(value)} is out of bounds; allowed: {low} to {high}")
        return value

    return read


def path_text(text: str) -> str:
    """The path of a file or folder, see :func:`expand_path`; an empty one is refused."""
    if not text:
        raise ArgumentTypeError("the path is empty")
    return expand_path(text)


def read_path(text: str) -> Path:
    """As :func:`path_text`, but a path object."""
    return Path(path_text(text))


def expand_path(text: str) -> str:
    """A path with the home folder for ``~``, which shells leave as it is in ``--flag=~/x``.

    Refuses a home that nobody has and, before a system call does, what is too long.
    """
    text, given = os.path.expanduser(text), text
    if text == given and text.startswith("~"):
        raise ArgumentTypeError(f"{shown(text)}: nobody's home; write ./~ for such a name")
    longest = max(len(os.fsencode(name)) for name in text.split("/"))
    if longest > LONGEST_NAME:
        told = f"{shown(text)}: a name of {longest} bytes; {LONGEST_NAME} are allowed"
        raise ArgumentTypeError(told)
    if len(os.fsencode(text)) >= LONGEST_PATH:
        raise ArgumentTypeError(f"{shown(text)}: a path of more than {LONGEST_PATH} bytes")
    return text


def read_bool(text: str) -> bool:
    """``True``/``False`` in any case, or 1/0."""
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise ArgumentTypeError(f"{shown(text)} is neither True nor False")
