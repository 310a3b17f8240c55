"""Processes that do the jobs of ``hnas.bench.rank``, each as soon as what it needs is finished."""

from __future__ import annotations

import logging
import os
import selectors
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hnas.base.errors import UserError
from hnas.base.files import remove_leftovers
from hnas.bench.rank.jobs import Bench, Job

logger = logging.getLogger(__name__)

DONE = b"+"


def with_needs(bench: Bench, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are not finished, in their order, before each what it still needs."""
    pending: dict[Job, None] = {}
    for job in jobs:
        if bench.result(job) is None:
            needed = [need for need in job.needs if bench.result(need) is None]
            pending.update(dict.fromkeys([*needed, job]))
    return list(pending)


@dataclass
class Worker:
    """A process that reads names of jobs, and answers when each is done.

    Attributes:
        process: it stops at the end of its input, so also when this process is gone.
        answers: where it writes :data:`DONE`.
        job: what it is doing; None: it waits.
    """

    process: subprocess.Popen
    answers: int
    job: Job | None = None

    @classmethod
    def start(cls, arguments: Sequence[str], workers: int) -> Worker:
        """With its share of the cores.

        The share depends on ``--workers`` only: the number of threads decides the last digits.
        """
        threads = str(max(1, len(os.sched_getaffinity(0)) // workers))
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "hnas.bench.rank", "work", *arguments]
            + ["--answers", str(writing)],
            stdin=subprocess.PIPE,
            # Libraries print; the program's own output is its last line.
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            cwd=Path(__file__).resolve().parents[3],
            pass_fds=[writing],
        )
        os.close(writing)
        return cls(process, reading)

    def give(self, job: Job) -> None:
        """Let it do a job."""
        self.job = job
        try:
            self.process.stdin.write(f"{job.name}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            # It is gone, which the end of its answers tells.
            return

    def finish(self) -> None:
        """Whatever it is doing, end it; what it has written stays."""
        self.process.terminate()
        self.process.wait()
        self.process.stdin.close()
        os.close(self.answers)


def run_all(bench: Bench, jobs: Sequence[Job], arguments: Sequence[str], workers: int) -> None:
    """Do the jobs that are not finished, and before them what they need, in this order.

    Args:
        bench: of the jobs.
        jobs: what is wanted, most urgent first.
        arguments: that a worker's command has besides.
        workers: how many share the cores.

    Raises:
        UserError: a worker failed, or a result is of other settings.
    """
    for folder in (bench.folder, bench.folder / "weights"):
        remove_leftovers(folder)
    pending = with_needs(bench, jobs)
    if not pending:
        return
    number = min(workers, len(pending))
    logger.info("%d jobs to do, %d at a time", len(pending), number)
    team: list[Worker] = []
    try:
        with selectors.DefaultSelector() as selector:
            for _ in range(number):
                team.append(Worker.start(arguments, workers))
                selector.register(team[-1].answers, selectors.EVENT_READ, team[-1])
            _hand_out(bench, pending, team, selector)
    finally:
        for worker in team:
            worker.finish()


def _hand_out(bench: Bench, pending: list[Job], team: list[Worker], selector) -> None:
    total, finished, waiting = len(pending), 0, list(pending)
    while finished < total:
        unfinished = {*waiting, *(worker.job for worker in team)}
        for worker in team:
            ready = [job for job in waiting if not unfinished.intersection(job.needs)]
            if worker.job is None and ready:
                waiting.remove(ready[0])
                worker.give(ready[0])
        for key, _ in selector.select():
            worker = key.data
            if os.read(worker.answers, 1) != DONE:
                raise UserError(
                    f"the worker of {worker.job.name if worker.job else 'no job'} failed (exit "
                    f"code {worker.process.wait()}), see above; the same command continues"
                )
            finished += 1
            seconds = bench.seconds(worker.job)
            logger.info("%s: %s s (%d of %d)", worker.job.name, seconds, finished, total)
            worker.job = None


def work(bench: Bench, answers: int) -> None:
    """A worker's part: jobs by the names on its input, one after the other, until that ends."""
    # Takes seconds, which commands that only hand out work need not wait for.
    from hnas.bench.rank.runs import run_job

    for line in sys.stdin:
        run_job(bench, Job.from_name(line.strip()))
        try:
            os.write(answers, DONE)
        except BrokenPipeError:
            logger.info("the main process is gone: stopping")
            return
