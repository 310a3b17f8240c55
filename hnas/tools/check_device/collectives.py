"""Several processes: what they exchange, their gradients, and how they end.

On two cards or more over NCCL; else two processes on the CPU over gloo.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

import hnas
from hnas.base.files import read_arrays
from hnas.tools.check_device import rank_program
from hnas.tools.check_device.machine import LARGEST_RESULT, Machine
from hnas.tools.check_device.plan import Plan
from hnas.tools.check_device.rank_program import gradient, values
from hnas.tools.check_device.results import (
    Result,
    at_most,
    differing,
    holds,
    not_here,
    relative_error,
)

ROOT = Path(hnas.__file__).parents[1]
START_SECONDS, END_SECONDS = 300, 90
GRADIENT = 1e-4
"""Relative to the largest of them, in float32."""


class Ranks:
    """Processes under the project's launcher, ended with the context.

    Args:
        folder: for their results and logs.
        plan: of the run; without GPUs they are two, on the CPU.
    """

    def __init__(self, folder: Path, plan: Plan):
        self.folder = folder
        self.number = len(plan.gpus) or 2
        folder.mkdir()
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": visible_cards(plan.gpus),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }
        launcher = ["-m", "hnas.parallel.launcher", "--nproc_per_node", str(self.number)]
        program = [rank_program.__file__, str(folder), plan.to_json()]
        with open(folder / "launcher.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "--log_dir", str(folder / "log"), *program],
                env=environment,
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def pids(self) -> list[int]:
        """Process numbers, by rank, when all have exchanged what they should.

        Raises:
            RuntimeError: they do not get that far; with the last line of a log.
        """
        files = [self.folder / f"rank{rank}.pid" for rank in range(self.number)]
        deadline = time.monotonic() + START_SECONDS
        while not all(file.exists() and file.read_text() for file in files):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the processes did not get through: {self.last_words()}")
            time.sleep(0.05)
        return [int(file.read_text()) for file in files]

    def last_words(self) -> str:
        """The last line that any of them wrote."""
        logs = [self.folder / "launcher.log", *sorted(self.folder.glob("log/workerlog.*"))]
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
        return next((line.strip() for line in reversed(lines) if line.strip()), "no word")

    def found(self) -> list[dict[str, np.ndarray]]:
        """What each rank wrote."""
        paths = [self.folder / f"rank{rank}.npz" for rank in range(self.number)]
        return [read_arrays(path, LARGEST_RESULT) for path in paths]

    def exit_code(self) -> int | None:
        """Of the launcher; None: it does not end."""
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return None


def visible_cards(gpus: tuple[int, ...]) -> str:
    """``CUDA_VISIBLE_DEVICES`` of the launcher: those of the cards, or none for each process."""
    if not gpus:
        return "-1,-1"
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(card) for card in range(max(gpus) + 1)]
    return ",".join(names[card] for card in gpus)


def check(machine: Machine) -> Iterator[Result]:
    """(h) Exchanges, gradients, SIGTERM, and the death of a process."""
    plan = machine.plan
    over = "NCCL"
    if len(plan.gpus) < 2:
        yield not_here("exchanges over NCCL", "they need two cards or more")
        plan, over = replace(plan, gpus=()), "gloo"
    with Ranks(machine.folder / "ranks", plan) as ranks:
        ranks.pids()
        yield from judge(ranks.found(), gradient(ranks.number), over)
        ranks.process.send_signal(signal.SIGTERM)
        code = ranks.exit_code()
        yield holds(f"{over}: all end on SIGTERM", code == 143, f"exit code {code}; 143 is right")
    if not machine.plan.quick:
        yield dead_rank(machine.folder / "dead", plan, over)


def judge(found: list[dict[str, np.ndarray]], whole: np.ndarray, over: str) -> Iterator[Result]:
    """What the ranks found, against NumPy and against one process's gradient of all images."""
    own = [values(rank) for rank in range(len(found))]
    right = {"gather": np.concatenate(own), "sum": np.sum(own, axis=0), "broadcast": own[0]}
    for name in sorted(found[0].keys() - {"gradient"}):
        wrong = sum(differing(each[name], right[name.split()[0]]) for each in found)
        yield at_most(f"{over}: {name}", wrong, 0, "numbers that differ")
    error = max(relative_error(each["gradient"], whole) for each in found)
    yield at_most(f"{over}: gradients of the ranks", error, GRADIENT, "against one process's")
    others = sum(differing(each["gradient"], found[0]["gradient"]) for each in found[1:])
    yield at_most(f"{over}: gradients are the same on all", others, 0, "numbers that differ")


def dead_rank(folder: Path, plan: Plan, over: str) -> Result:
    """All processes end soon after one was killed."""
    with Ranks(folder, plan) as ranks:
        os.kill(ranks.pids()[-1], signal.SIGKILL)
        began = time.monotonic()
        code = ranks.exit_code()
        name = f"{over}: all end when one is killed"
        note = f"exit code {code} after {time.monotonic() - began:.0f} s"
        return holds(name, code not in (0, None), note)
