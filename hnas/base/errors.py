"""How programs end: errors that a user can mend, signals, the launcher's death."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

ERRORS = "PINAS_ERRORS"
"""The environment variable in which hnas.parallel.launcher names its file for users' errors."""
LOG_FORMAT = "[%(asctime)s] %(message)s"
HANG_UP = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ()
"""What a terminal or ssh sends that is gone; none where ``nohup`` has it ignored."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, *HANG_UP)
ENDING_SECONDS = 20
"""Launchers and cluster managers kill what has not ended after 30."""
LAUNCHER = "PINAS_LAUNCHER"
"""The environment variable in which hnas.parallel.launcher hands its process id on."""


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, where, and what to do."""


class Stopped(SystemExit):  # noqa: N818 (an exit that was asked for is no error)
    """Ends the program with the exit code that shells give to a signal: 130, 143 or 129."""

    def __init__(self, number: int):
        super().__init__(128 + number)


def hold_signals() -> None:
    """Let signals wait for :func:`end_on_signals`: for programs that import Paddle.

    Paddle sets handlers when it is imported, and imports take seconds.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def end_on_signals() -> None:
    """From now on the first of ``SIGNALS`` raises :class:`Stopped` in the main thread.

    The next one kills at once; so does the end of 20 seconds, whatever the program still does.
    Paddle's own handlers, which are replaced, format a report inside the handler: it may wait for
    ever for a lock of malloc that the interrupted code holds.
    """
    for number in SIGNALS:
        signal.signal(number, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


_stopped_by: int | None = None


def _stop(number: int, frame) -> None:
    global _stopped_by
    _stopped_by = number
    # Paddle's launcher sends SIGTERM several times within a second, and SIGKILL after 30.
    next_one = signal.SIG_IGN if is_one_of_several() else signal.SIG_DFL
    for each in SIGNALS:
        signal.signal(each, next_one)
    # The exception may be lost in a destructor, or wait for a thread: exit in any case.
    timer = threading.Timer(ENDING_SECONDS, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
    say(f"stopped by {signal.Signals(number).name}")
    raise Stopped(number)


def say(line: str) -> None:
    """Write a line for the user; by a signal's handler, which may have interrupted a print."""
    with suppress(OSError):  # of a terminal that is gone
        os.write(2, f"{line}\n".encode())


def is_one_of_several() -> bool:
    """Whether a launcher has started several processes of this run."""
    return os.environ.get("PADDLE_TRAINERS_NUM", "1") != "1"


def end_with_launcher() -> None:
    """Watch the launcher, if there is one: what it has started ends within a minute of its death.

    First as on SIGTERM, so that the step under way is saved.
    """
    if is_one_of_several():
        launcher = int(os.environ.get(LAUNCHER) or os.getppid())
        threading.Thread(target=_watch_launcher, args=(launcher,), daemon=True).start()


def _watch_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(2)
    say("the launcher is gone, so this process ends too")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ENDING_SECONDS)
    os._exit(128 + signal.SIGTERM)


def run_main(main: Callable[[], None]) -> None:
    """Run a program's ``main``; end with exit code 2 and one line for a :class:`UserError`.

    SIGTERM, Ctrl-C and SIGHUP end it with 143, 130 and 129.
    """
    end_on_signals()
    end_with_launcher()
    logging.basicConfig(
        level=logging.INFO, format=LOG_FORMAT, datefmt="%Y/%m/%d %H:%M:%S", force=True
    )
    try:
        main()
    except Exception as error:
        if _stopped_by is not None:
            # Paddle turns an exception in what it calls, as Stopped, into one of its own.
            raise Stopped(_stopped_by) from None
        if not isinstance(error, UserError):
            raise
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
