"""SIGTERM, Ctrl-C and deaths: how programs end, and what is saved before."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from entry_scripts import ROOT, TIMEOUT
from independent import counts_of

from hnas.base.errors import Stopped
from hnas.dataset import image_folder
from hnas.evaluation.ledger import Ledger
from hnas.parallel import launcher
from hnas.search_space import RESNET48_MINI

BEGIN = """
import logging, os, sys, time
from pathlib import Path
from hnas.base import errors
from hnas.base.errors import Stopped, UserError, run_main

def here():
    print("here", flush=True)

def wait():
    here()
    time.sleep(600)

"""
ENDS = {
    "computing": "    here()\n    while True: pass",
    "lost": "    try: wait()\n    except Stopped: time.sleep(600)",
    "with Paddle": "    wait()",
}


def start(code: str, *arguments: str) -> subprocess.Popen:
    # As the launchers have it: of more threads Paddle warns when it is imported.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **told)


def wait_for(process: subprocess.Popen) -> None:
    """Until a program says "here"."""
    assert any("here" in printed for printed in process.stdout)


def program(main: str, paddle: bool = False) -> str:
    """A program that says "here" and goes on with ``main``; Paddle brings handlers of its own."""
    first = "import paddle\n" if paddle else ""
    return f"{BEGIN}{first}errors.ENDING_SECONDS = 1\ndef main():\n{main}\nrun_main(main)\n"


CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), CODES)
@pytest.mark.parametrize("kind", ENDS)
def test_the_first_signal_ends_a_program_with_its_code(kind, number, code):
    process = start(program(ENDS[kind], paddle=kind == "with Paddle"))
    wait_for(process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, output) == (code, f"stopped by {signal.Signals(number).name}\n")


@pytest.mark.slow
def test_a_signal_while_paddle_is_imported_waits():
    """Paddle's own handler would report a fatal error, or wait for ever for a lock of malloc."""
    process = start("", "train_supernet.py", "run", "--device", "cpu")
    maps = Path(f"/proc/{process.pid}/maps")
    while "libpaddle" not in maps.read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, output) == (143, "stopped by SIGTERM\n")


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [("", ["tensors"]), ("always", ["No ccache found", "tensors"]), ("ignore", [])],
)
def test_only_remarks_of_libraries_are_silenced_and_users_come_first(wanted, shown, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", wanted)
    code = "import warnings\nfrom hnas.base.errors import hold_signals\nhold_signals()\n"
    process = start(f"{code}for text in 'No ccache found. Please', 'tensors': warnings.warn(text)")
    output, _ = process.communicate(timeout=TIMEOUT)
    assert re.findall("UserWarning: (No ccache found|.*)", output) == shown


def test_the_second_signal_kills():
    code = program("    try: wait()\n    except Stopped: wait()")
    process = start(code.replace("SECONDS = 1", "SECONDS = 600"))
    for _ in range(2):
        wait_for(process)
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGTERM  # 143 in a shell


TIMES = 30
STEPS = f"""
TIMES = {TIMES}
import random, signal
from contextlib import nullcontext
errors.hold_signals()
import paddle
from hnas.models.convolution import onednn_conv2d
from hnas.parallel.distributed import StopSignals

def main():
    image, filters = paddle.ones([2, 3, 8, 8]), paddle.ones([8, 3, 3, 3])
    filters.stop_gradient = False
    with StopSignals() if noted else nullcontext():
        os.write(begun[1], b".")
        while True:
            onednn_conv2d(image, filters, 8, 1, 1).sum().backward()

noted, numbers = len(sys.argv) > 2, [int(number) for number in sys.argv[1:]]
begun, errors, codes = os.pipe(), os.pipe(), []
os.dup2(errors[1], 2)
said = os.fdopen(errors[0])
for _ in range(TIMES):
    child = os.fork()
    if not child:
        try:
            run_main(main)
        except SystemExit as end:
            os._exit(end.code)
    os.read(begun[0], 1)
    for number in numbers:
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, number)
        print(said.readline(), end="")
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(*codes)
"""


NOTED = "the program ends when it has saved what is under way; again: at once"


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGHUP] * 2, [signal.SIGINT] * 2])
def test_signals_at_random_moments_of_training_are_a_line_each(numbers):
    """Also where Paddle, which turns exceptions into its own, calls Python: in backward passes."""
    process = start(BEGIN + STEPS, *map(str, map(int, numbers)))
    output, _ = process.communicate(timeout=TIMEOUT)
    *printed, codes = output.splitlines()
    name, noted = numbers[0].name, len(numbers) > 1
    at_once = [f"{name}: {NOTED}", f"stopped by {name} at once, without saving"]
    assert printed == (at_once if noted else [f"stopped by {name}"]) * TIMES
    assert codes.split() == [str(128 + numbers[0])] * TIMES


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_scoring_stops_when_the_chunk_is_saved(number, tmp_path):
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(0), 3)
    whose = {"checkpoint": "a"}

    def ledger() -> Ledger:
        found = Ledger(tmp_path, whose, archs, images=10)
        found.begin(4)
        return found

    first, seen = ledger(), []
    with pytest.raises(Stopped) as stopped:
        for chunk in first.chunks():
            seen.append(chunk)
            if len(seen) == 2:
                os.kill(os.getpid(), number)
            first.add(chunk.start, counts_of(np.ones((3, len(chunk)))))
    assert seen == [range(4), range(4, 8)]
    assert stopped.value.code == 128 + number
    second = ledger()
    assert second.counts.images == 8
    assert list(second.chunks()) == [range(8, 10)]


def test_verifying_images_does_not_go_on_after_a_signal(tmp_path, monkeypatch):
    """A pool of threads would decode all that is queued before it lets the exception pass."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "train/cat").mkdir(parents=True)
    for index in range(200):
        (tmp_path / f"train/cat/{index}.png").touch()
    decoded = []

    def slowly(path):
        decoded.append(path)
        time.sleep(0.05)

    def stop(bar, *_):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(image_folder, "decode_image", slowly)
    monkeypatch.setattr(image_folder.tqdm, "update", stop)
    with pytest.raises(Stopped):
        image_folder.scan_images(tmp_path, "train", verify=True)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPool"):
            thread.join()
    assert len(decoded) < 100


RANK = """
def main():
    rank = os.environ["PADDLE_TRAINER_ID"]
    folder = Path(sys.argv[1])
    (folder / f"here{rank}").write_text(str(os.getpid()))
    if sys.argv[2] == rank:
        raise UserError("a wrong\\nimage")
    try:
        while True:
            time.sleep(0.1)
    except Stopped:
        (folder / f"saved{rank}").touch()
        raise
run_main(main)
"""


def launch(folder: Path, wrong: str) -> subprocess.Popen:
    """Two ranks, of which the one with the number ``wrong`` finds a user's error."""
    (folder / "rank.py").write_text(BEGIN + RANK)
    flags = ["--nproc_per_node", "2", "--log_dir", str(folder / "log"), "--log_level", "WARNING"]
    script = [str(folder / "rank.py"), str(folder), wrong]
    return start("", "-m", "hnas.parallel.launcher", *flags, *script)


def test_after_a_first_signal_the_launcher_waits_for_what_is_saved(monkeypatch, capfd):
    """Emulated: Paddle's own 30 seconds are less than a chunk of stage 3 takes on a GPU."""
    waits = []
    monkeypatch.setattr(launcher.Pod, "stop", lambda self, number, timeout: waits.append(timeout))
    controller = SimpleNamespace(ctx=mock.MagicMock(), watcher=mock.Mock(), master=mock.Mock())
    controller.pod = launcher.NotingPod()
    launcher.controllers.controller.ControllerBase.stop(controller)
    controller.pod.stop(timeout=10)  # on a second one
    assert waits == [launcher.PATIENCE, 10] and launcher.PATIENCE > 3600
    assert capfd.readouterr().err.count("a second signal kills in 10 seconds") == 1


@pytest.mark.slow
def test_a_users_error_is_shown_with_the_rank_that_found_it(tmp_path):
    process = launch(tmp_path, "1")
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, output
    assert output.splitlines()[-1] == "rank 1: error: a wrong image"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "rank"),
    [
        *((*one, None) for one in (*CODES, (signal.SIGKILL, -9))),
        *((signal.SIGTERM, 143, 1), (signal.SIGKILL, 1, 1)),
    ],
)
def test_ranks_save_and_end_with_their_launcher_or_each_other(number, code, rank, tmp_path):
    process = launch(tmp_path, "none")
    here = [tmp_path / f"here{rank}" for rank in range(2)]
    began = time.monotonic()
    while not all(path.exists() and path.read_text() for path in here):
        assert time.monotonic() - began < TIMEOUT
        time.sleep(0.05)
    pids = [int(path.read_text()) for path in here]
    began = time.monotonic()
    os.kill(process.pid if rank is None else pids[rank], number)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code
    for pid in pids:
        while os.path.exists(f"/proc/{pid}/exe"):  # one that ended but is not waited for has none
            assert time.monotonic() - began < 60
            time.sleep(0.1)
    saved = {path.name for path in tmp_path.glob("saved*")}
    assert saved == {"saved0", "saved1"} - ({"saved1"} if code == 1 else set())
    killed = "rank 1 was killed by SIGKILL; what is saved can be resumed"
    assert (output.splitlines()[-1:] == [killed]) == (code == 1)
