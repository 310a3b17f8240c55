"""Errors that a user can mend: one line, exit code 2."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from hnas.base.signals import end_on_signals, end_with_launcher, is_one_of_several

ERRORS = "PINAS_ERRORS"
"""The environment variable in which hnas.parallel.launcher names its file for users' errors."""
LOG_FORMAT = "[%(asctime)s] %(message)s"


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, where, and what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Run a program's ``main``; end with exit code 2 and one line for a :class:`UserError`.

    SIGTERM and Ctrl-C end it with 143 and 130, see :mod:`hnas.base.signals`.
    """
    end_on_signals()
    end_with_launcher()
    logging.basicConfig(
        level=logging.INFO, format=LOG_FORMAT, datefmt="%Y/%m/%d %H:%M:%S", force=True
    )
    try:
        main()
    except UserError as error:
        # Without line breaks, which a path or a flag may hold.
        line = f"error: {' '.join(str(error).split())}\n"
        if is_one_of_several():
            line = f"rank {os.environ.get('PADDLE_TRAINER_ID', 0)}: {line}"
        sys.stderr.write(line)
        # The launcher shows what is in this file; this process's messages go to a log.
        if ERRORS in os.environ:
            with suppress(OSError), open(os.environ[ERRORS], "ab") as file:
                file.write(line.encode(errors="backslashreplace"))
        sys.exit(2)
