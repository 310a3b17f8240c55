"""Processes that do the jobs of ``hnas.bench.rank``, each as soon as what it needs is finished."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from hnas.base.errors import UserError
from hnas.base.files import remove_leftovers
from hnas.bench.rank.jobs import Bench, Job

logger = logging.getLogger(__name__)


def run_all(bench: Bench, jobs: Sequence[Job], workers: int) -> None:
    """Do the jobs that are not finished, and before them what they need, in this order.

    Raises:
        UserError: a job failed, or a result is of other settings.
    """
    for folder in (bench.folder, bench.folder / "weights"):
        remove_leftovers(folder)
    pending = with_needs(bench, jobs)
    if not pending:
        return
    logger.info("%d jobs to do, %d at a time", len(pending), workers)
    # The number of threads decides the last digits, so it depends on --workers only.
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,)
    )
    try:
        _hand_out(bench, pending, pool, workers)
    except BrokenProcessPool as error:
        raise UserError("a worker was killed; the same command continues") from error
    finally:
        pool.shutdown(cancel_futures=True)


def with_needs(bench: Bench, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are not finished, in their order, before each what it still needs."""
    todo = bench.unfinished(jobs)
    needed = set(bench.unfinished(need for job in todo for need in job.needs))
    ordered = ([need for need in job.needs if need in needed] + [job] for job in todo)
    return list(dict.fromkeys(job for own in ordered for job in own))


def _hand_out(bench: Bench, pending: list[Job], pool: ProcessPoolExecutor, workers: int) -> None:
    total, waiting = len(pending), list(pending)
    running: dict[Future, Job] = {}
    while waiting or running:
        unfinished = {*waiting, *running.values()}
        ready = [job for job in waiting if not unfinished.intersection(job.needs)]
        for job in ready[: workers - len(running)]:
            waiting.remove(job)
            running[pool.submit(_work, bench, job)] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            result = future.result()
            bench.put(job, result)
            done = total - len(waiting) - len(running)
            logger.info("%s: %s s (%d of %d)", job.name, result["seconds"], done, total)


def _begin(threads: int) -> None:
    """A worker's first act, before Paddle is imported: Ctrl-C is the main process's alone."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(bench: Bench, job: Job) -> dict:
    # Takes seconds, which the process that only hands out work need not wait for.
    from hnas.bench.rank.runs import run_job

    return run_job(bench, job)
