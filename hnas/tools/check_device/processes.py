"""Running the checks in processes of their own, so that whatever one does to the device, or the
device to it, the others are still made."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hnas.base.errors import UserError
from hnas.tools.check_device.plan import DEVICE_LOST, TWIN_ENDED, Plan
from hnas.tools.check_device.results import FAILED, Result

PACKAGE = "hnas.tools.check_device"
WORKER_LOG = "worker.log"
"""What a process that checks says besides its results."""
SILENT_SECONDS = 600
"""Of a process that gives no result for so long nothing more is expected."""
ENDING_SECONDS = 60
"""Within which a process that has written all it had must end."""
GRACE_SECONDS = 20
"""Between SIGTERM and SIGKILL."""
USER_ERROR = 2

Start = Callable[[Sequence[str]], subprocess.Popen]
"""Starts a process that makes the named checks and writes to a pipe."""


def environment() -> dict[str, str]:
    """Of a process that computes: on all cores, where no launcher has said how many.

    Paddle takes one, and says so in the environment when it is imported.
    """
    given = os.environ.get("PINAS_THREADS") or os.environ.get("OMP_NUM_THREADS")
    return {**os.environ, "PINAS_THREADS": given or str(os.cpu_count() or 1)}


def starter(folder: Path, plan: Plan) -> Start:
    """Starts ``worker.py``; what it says besides results goes to a log in ``folder``."""

    def start(names: Sequence[str]) -> subprocess.Popen:
        command = [sys.executable, "-m", f"{PACKAGE}.worker", str(folder), plan.to_json(), *names]
        with open(folder / WORKER_LOG, "wb") as log:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment())

    return start


@contextmanager
def twin(folder: Path, plan: Plan) -> Iterator[Callable[[], bool]]:
    """Within the context the twin computes on the CPU; gives whether it still does."""
    command = [sys.executable, "-m", f"{PACKAGE}.twin", str(folder), plan.to_json()]
    hidden = {**environment(), "CUDA_VISIBLE_DEVICES": "-1"}
    with open(folder / "twin.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=hidden)

    def note_end() -> None:
        process.wait()
        (folder / TWIN_ENDED).touch()

    watcher = threading.Thread(target=note_end)
    watcher.start()
    try:
        yield watcher.is_alive
    finally:
        process.kill()
        watcher.join()


def results_of(
    names: Sequence[str],
    start: Start,
    log: Path,
    silent_s: float = SILENT_SECONDS,
    excused: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, Result]]:
    """Each result of the named checks, with the check's name, as it comes.

    Args:
        names: the checks.
        start: starts a process that makes them; another goes on with the rest where one is lost.
        log: what it writes besides.
        silent_s: seconds without a result after which it is killed.
        excused: whether it may just be waiting for the twin.

    Raises:
        UserError: a process says so.
    """
    left = list(names)
    while left:
        process, why = start(left), ""
        try:
            for content in _contents(process, silent_s, excused):
                if "done" in content:
                    left.remove(content["done"])
                else:
                    yield left[0], Result(**content)
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            why = f"still there {ENDING_SECONDS} s after its last result"
        except TimeoutError as error:
            why = str(error)
        finally:
            _end(process)
            process.stdout.close()
        code = process.returncode
        if code == USER_ERROR:
            raise UserError(_last_line(log).removeprefix("error: "))
        if left and code != DEVICE_LOST:
            why = why or _how_it_ended(code)
            yield left[0], Result(left.pop(0), FAILED, note=f"{why}: {_last_line(log)}")


def _contents(
    process: subprocess.Popen, silent_s: float, excused: Callable[[], bool]
) -> Iterator[dict]:
    """The JSON objects that a process writes, a line each, until it writes no more.

    Raises:
        TimeoutError: it has been silent for too long.
    """
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=silent_s)
        except queue.Empty:
            if excused():
                continue
            raise TimeoutError(f"no result for {silent_s:g} s") from None
        if not line:
            return
        try:
            content = json.loads(line)
        except ValueError:
            continue  # libraries write to standard output, too
        if isinstance(content, dict):
            yield content


def _read(file: IO[bytes], lines: queue.Queue[bytes]) -> None:
    try:
        for line in file:
            lines.put(line)
    except ValueError:
        pass  # closed: nobody waits any more
    lines.put(b"")


def _end(process: subprocess.Popen) -> None:
    """If it has not ended: first such that it ends what it has started itself."""
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no word")
