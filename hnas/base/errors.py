"""Errors that a user can mend: one line, exit code 2."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

LOG_FORMAT = "[%(asctime)s] %(message)s"


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, where, and what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Run a program's ``main``; end with exit code 2 and one line for a :class:`UserError`."""
    logging.basicConfig(
        level=logging.INFO, format=LOG_FORMAT, datefmt="%Y/%m/%d %H:%M:%S", force=True
    )
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"{_who()}error: {one_line(error)}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _who() -> str:
    """Which of several processes speaks, in the launcher's variables."""
    several = os.environ.get("PADDLE_TRAINERS_NUM", "1") != "1"
    return f"rank {os.environ.get('PADDLE_TRAINER_ID', 0)}: " if several else ""


def one_line(error: UserError) -> str:
    """The message without line breaks, which a path or a flag may hold."""
    return " ".join(str(error).split())
