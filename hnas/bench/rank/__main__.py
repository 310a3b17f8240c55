"""How well supernets rank: their accuracies against those of networks trained alone.

    python -m hnas.bench.rank ground_truth --out output/rank
    python -m hnas.bench.rank supernets --out output/rank
    python -m hnas.bench.rank report --out output/rank

Everything is trained on distorted digits (hnas/bench/rank/distorted_digits.py). What is finished
stands in runs.jsonl and is not done again, so any command continues after any kill. With --splits
selection,seen,sealed all three go on to the sealed architectures, on which only the finalists are
compared. The report writes summary.json, tables and plots to --out and prints a JSON object as its
last line. docs/ranking-bench.md tells what came of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hnas.base.command_line import OneLineParser, read_bool, read_path, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_writable, remove_leftovers, write_json
from hnas.bench.rank.jobs import OPEN_SPLITS, SPLITS, Bench, Job, Scale
from hnas.bench.rank.methods import DEFAULTS, FINALISTS, find_method
from hnas.bench.rank.runs import run_job
from hnas.bench.rank.summary import headline, summarize
from hnas.bench.rank.tables import write_summary
from hnas.bench.rank.truth import Truth, truth_file

logger = logging.getLogger(__name__)

COMMANDS = ("ground_truth", "supernets", "report")
QUICK_METHODS = ("uniform_distill", "sandwich_inplace", "seed_recipe")


def main(argv=None) -> None:
    options = parse(argv)
    check_writable(options.out, "--out")
    bench = Bench(options.out, Scale.quick() if options.quick else Scale())
    if options.jobs:
        work(bench, [Job.from_name(name) for name in options.jobs.split(",")])
        return
    {"ground_truth": ground_truth, "supernets": supernets, "report": report}[options.command](
        bench, options
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: it is wrong, a method's name included.
    """
    parser = OneLineParser(prog="python -m hnas.bench.rank", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS, help="what to do, in this order")
    parser.add_argument("--out", type=read_path, required=True, help="folder of all results")
    parser.add_argument(
        "--workers",
        type=whole_number(1, 1024),
        default=2,
        help="processes that share the cores [default %(default)s]",
    )
    parser.add_argument(
        "--quick",
        type=read_bool,
        default=False,
        help="a trial of the machinery in a minute [default %(default)s]",
    )
    parser.add_argument(
        "--splits",
        type=read_splits,
        default=OPEN_SPLITS,
        help="of the architectures, separated by commas; with sealed, finalists have more seeds "
        f"[default {','.join(OPEN_SPLITS)}]",
    )
    parser.add_argument(
        "--methods",
        default="",
        help="of hnas/bench/rank/methods.py, separated by commas "
        "[default its baselines and ablations; quick: three of them]",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(1),
        help="how many [default 3, with sealed 8 of the finalists' supernets; quick: 1]",
    )
    parser.add_argument(
        "--ground_truth",
        default="",
        help="file that the report compares with [default OUT/ground_truth.json]",
    )
    parser.add_argument("--jobs", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    default = QUICK_METHODS if options.quick else DEFAULTS
    names = [name for name in options.methods.split(",") if name] or default
    options.methods = list(dict.fromkeys(names))
    for name in options.methods:
        find_method(name)
    return options


def read_splits(text: str) -> tuple[str, ...]:
    """``argparse`` type: some of the splits, separated by commas, in their own order."""
    names = text.split(",")
    unknown = [name for name in names if name not in SPLITS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no split is called {unknown[0]!r}; there are {', '.join(SPLITS)}"
        )
    return tuple(split for split in SPLITS if split in names)


def ground_truth(bench: Bench, options: argparse.Namespace) -> None:
    """Train architectures alone, and write ground_truth.json."""
    seeds = range(options.seeds or bench.scale.seeds)
    archs = bench.of_splits(options.splits)
    # Whole seeds one after the other: a bench that is stopped has some of use.
    jobs = [Job("truth", name, seed) for seed in seeds for name in archs]
    run_phase(bench, options, jobs)
    write_json(options.out / "ground_truth.json", truth_file(bench, archs, seeds))
    about = {"command": command_line(options, len(seeds)), "scale": asdict(bench.scale)}
    write_json(options.out / "ground_truth_settings.json", about)
    logger.info("ground truth: %s", options.out / "ground_truth.json")


def command_line(options: argparse.Namespace, seeds: int) -> str:
    """What regenerates the ground truth; the folder does not matter."""
    flags = f"--splits {','.join(options.splits)} --seeds {seeds}"
    flags += " --quick True" if options.quick else ""
    return f"python -m hnas.bench.rank ground_truth --out OUT {flags}"


def supernets(bench: Bench, options: argparse.Namespace) -> None:
    """Train the supernets of all methods, and what they start from."""
    methods = {name: find_method(name) for name in options.methods}
    for method in methods.values():
        bench.scale.steps(method)
    # Whole seeds one after the other here too. What finished supernets started from is not needed.
    todo = [
        job
        for name, seeds in seeds_of(bench, options).items()
        for job in (Job("supernet", name, seed) for seed in seeds)
        if bench.result(job) is None
    ]
    todo.sort(key=lambda job: job.seed)
    stage1 = {(job.seed, methods[job.what].stage1) for job in todo}
    for jobs in (
        [Job("pretrain", "", seed) for seed in dict.fromkeys(job.seed for job in todo)],
        [Job("stage1", kind, seed) for seed, kind in sorted(stage1) if kind != "none"],
        todo,
    ):
        run_phase(bench, options, jobs)


def seeds_of(bench: Bench, options: argparse.Namespace) -> dict[str, range]:
    """The seeds of each chosen method."""
    scale, sealed = bench.scale, "sealed" in options.splits
    return {
        name: range(
            options.seeds or (scale.finalist_seeds if sealed and name in FINALISTS else scale.seeds)
        )
        for name in options.methods
    }


def report(bench: Bench, options: argparse.Namespace) -> None:
    """Compare what is finished.

    Raises:
        UserError: there is nothing, or no ground truth of a split.
    """
    path = options.ground_truth or options.out / "ground_truth.json"
    truth = Truth.read(path).of_splits(options.splits)
    for split in options.splits:
        if split not in truth.splits:
            raise UserError(
                f"{path} has no architectures of the split {split!r}; run ground_truth with "
                f"--splits {','.join(options.splits)}, or give the report other ones"
            )
    summary = summarize(bench, truth, seeds_of(bench, options))
    write_summary(summary, options.out)
    sys.stdout.write(json.dumps(headline(summary)) + "\n")


def run_phase(bench: Bench, options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Run the jobs that are not finished, shared among worker processes.

    Raises:
        UserError: a worker failed, or a result is of other settings.
    """
    for folder in (bench.folder, bench.folder / "weights"):
        remove_leftovers(folder)
    pending = [job.name for job in jobs if bench.result(job) is None]
    if not pending:
        return
    number = min(options.workers, len(pending))
    logger.info("%d of %d jobs to do, %d at a time", len(pending), len(jobs), number)
    workers = [start_worker(options, pending[index::number]) for index in range(number)]
    try:
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
    if any(codes):
        raise UserError(
            f"{sum(map(bool, codes))} of {number} workers failed (exit codes "
            f"{', '.join(map(str, codes))}), see above; the same command continues"
        )


def start_worker(options: argparse.Namespace, names: Sequence[str]) -> subprocess.Popen:
    """A process for some jobs, with its share of the cores.

    The share depends on ``--workers`` only: the number of threads decides the last digits.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // options.workers))
    return subprocess.Popen(
        [sys.executable, "-m", "hnas.bench.rank", options.command]
        + ["--out", str(options.out.resolve()), "--quick", str(options.quick)]
        + ["--jobs", ",".join(names)],
        # Libraries print; the program's own output is its last line.
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        cwd=Path(__file__).resolve().parents[3],
    )


def work(bench: Bench, jobs: Sequence[Job]) -> None:
    """A worker's part: its jobs, one after the other, as long as its parent lives."""
    parent = os.getppid()
    for number, job in enumerate(jobs, 1):
        if os.getppid() != parent:
            logger.info("the main process is gone: stopping")
            return
        run_job(bench, job)
        logger.info(
            "%s: %s s (%d of %d of this worker)",
            job.name,
            bench.seconds(job),
            number,
            len(jobs),
        )


if __name__ == "__main__":
    run_main(main)
