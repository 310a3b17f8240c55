"""How programs end: errors that a user can mend, signals, the launcher's death."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from errno import EDQUOT, ENOSPC

ERRORS = "PINAS_ERRORS"
"""The environment variable in which hnas.parallel.launcher names its file for users' errors."""
HANG_UP = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else ()
"""What a terminal or ssh sends that is gone; none where ``nohup`` has it ignored."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, *HANG_UP)
ENDING_SECONDS = 20
"""Cluster managers kill what has not ended after 30."""
LONGEST_LINE = 1500
FULL = (ENOSPC, EDQUOT)
LAUNCHER = "PINAS_LAUNCHER"
"""The environment variable in which hnas.parallel.launcher hands its process id on."""


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, where, and what to do."""


PADDLE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, OSError, MemoryError, SystemError)
"""What Paddle raises, by its own table of kinds: External, an error of CUDA, cuDNN or NCCL, is
``OSError`` without an ``errno``, ResourceExhausted ``MemoryError``, Fatal ``SystemError``."""
NO_MEMORY = re.compile(r"No valid plan|out of memory|ALLOC_FAILED|Cannot allocate memory")
"""In an error's text: of cuDNN's frontend, which tries its plans until memory allows one, of CUDA,
of its libraries, and of the system."""
_KINDS = "InvalidArgument|NotFound|OutOfRange|AlreadyExists|ResourceExhausted|PreconditionNotMet"
_KINDS += "|PermissionDenied|ExecutionTimeout|Unimplemented|Unavailable|Fatal|External|InvalidType"
_SUMMARY = re.compile(rf"Error Message Summary:[\s-]*|(?=\((?:{_KINDS})\)\s)")
_REST = re.compile(r"\s(?:\[Hint|\(at /|\[operator|Please )")
LONGEST_WORD = 300
AFTER_FAILURE = (
    "run again to go on with what is saved; python -m hnas.tools.check_device tells what works here"
)


def word_of(error: BaseException) -> str:
    """What an error says, in one line: of Paddle's without stack and hints, else its last line."""
    text = str(error).strip()
    start = _SUMMARY.search(text)
    text = _REST.split(text[start.end() :])[0] if start else text.rpartition("\n")[2]
    return " ".join(text.split()).rstrip(".")[:LONGEST_WORD] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the machine, whoever says so."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, PADDLE_ERRORS) and bool(NO_MEMORY.search(str(error)))


class Stopped(SystemExit):  # noqa: N818 (an exit that was asked for is no error)
    """Ends the program with the exit code that shells give to a signal: 130, 143 or 129."""

    def __init__(self, number: int):
        super().__init__(128 + number)


def shortened(line: str) -> str:
    """A line for users: a name in it may have megabytes, and what is said stands at its ends."""
    half = LONGEST_LINE // 2
    cut = f"{line[:half]} [... {len(line):,} characters ...] {line[-half:]}"
    return line if len(line) <= LONGEST_LINE else cut


class _ShortLines(logging.Formatter):
    def formatMessage(self, record):  # noqa: N802 (logging's name)
        return shortened(super().formatMessage(record))


LINES = _ShortLines("[%(asctime)s] %(message)s", "%Y/%m/%d %H:%M:%S")
SAID = {"said": True}
"""As ``extra`` of a log line: the terminal has it already, and log files alone take it."""

REMARKS = "No ccache found|Setuptools is replacing distutils|pkg_resources is deprecated as an API"
REMARKS += "|no variable in your model|Tensor do not have 'contiguous'|When training, we now always"
"""What Paddle and its packages warn of whenever they are imported, of BatchNorm in training, and of
stage 3's operations, which have no weights."""


def hold_signals() -> None:
    """Let signals wait for :func:`end_on_signals`: for programs that import Paddle.

    Paddle sets handlers when it is imported, and imports take seconds. Its ``REMARKS`` are left
    out; what users have said of warnings comes first.
    """
    refuse_left_overs()  # Paddle may fail on them then
    warnings.filterwarnings("ignore", REMARKS, UserWarning, append=True)
    os.environ.setdefault("GLOG_minloglevel", "2")  # and its C++ code says errors only
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
    # Paddle's launcher sends SIGTERM several times within a second.
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


def refuse_left_overs() -> None:
    """End with one line where a part is set of what a launcher says to one of several processes.

    It is another run's: Paddle would fail, wait for processes that are not there, or write nothing.
    """
    names = "PADDLE_TRAINERS_NUM", "PADDLE_TRAINER_ID", "PADDLE_LOCAL_SIZE"
    left = [n for n, one in zip(names, "101", strict=True) if os.environ.get(n, one) != one]
    if left and not {*names, "PADDLE_MASTER"} <= set(os.environ):
        line = f"error: {left[0]}={os.environ[left[0]]} is left in the environment; unset it"
        sys.stderr.write(f"{line}: processes, gpus and nnodes say how many\n")
        sys.exit(2)


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


def run_main(
    main: Callable[[], None], memory: str = "give it less, or a machine with more memory"
) -> None:
    """Run a program's ``main``; end with exit code 2 and one line for a :class:`UserError`.

    So it does where memory runs out, with ``memory``, what to do then, and where a GPU or one of
    its libraries fails. SIGTERM, Ctrl-C and SIGHUP end it with 143, 130 and 129.
    """
    end_on_signals()
    end_with_launcher()
    log = logging.StreamHandler()
    log.setFormatter(LINES)
    log.addFilter(lambda record: not hasattr(record, "said"))
    logging.basicConfig(level=logging.INFO, handlers=[log], force=True)
    try:
        main()
    except Stopped as end:
        logging.error("stopped by %s", signal.Signals(end.code - 128).name, extra=SAID)
        raise
    except Exception as error:
        if _stopped_by is not None:
            # Paddle turns an exception in what it calls, as Stopped, into one of its own.
            raise Stopped(_stopped_by) from None
        if isinstance(error, UserError):
            told = str(error)
        elif is_out_of_memory(error):
            told = f"out of memory: {word_of(error)}; {memory}"
        elif isinstance(error, SystemError) or "(External)" in str(error):
            told = f"the device or a library failed: {word_of(error)}; {AFTER_FAILURE}"
        else:
            logging.error("%s", word_of(error), exc_info=True, extra=SAID)
            if not isinstance(error, OSError) or not (error.filename or error.errno in FULL):
                raise
            where = error.filename or "a file, maybe in $TMPDIR, /tmp where that is not set"
            told = f"cannot use {where}: {error.strerror}; mend that, or name another place"
        # Without line breaks, which a path or a flag may hold.
        line = f"error: {shortened(' '.join(told.split()))}\n"
        if is_one_of_several():
            line = f"rank {os.environ.get('PADDLE_TRAINER_ID', 0)}: {line}"
        sys.stderr.write(line)
        logging.error("%s", line.strip(), extra=SAID)
        # The launcher shows what is in this file; this process's messages go to a log.
        if ERRORS in os.environ:
            with suppress(OSError), open(os.environ[ERRORS], "ab") as file:
                file.write(line.encode(errors="backslashreplace"))
        sys.exit(2)
