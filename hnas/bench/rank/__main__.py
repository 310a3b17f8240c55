"""How well supernets rank: their accuracies against those of networks trained alone.

    python -m hnas.bench.rank ground_truth --out output/rank
    python -m hnas.bench.rank tune --out output/rank
    python -m hnas.bench.rank final --out output/rank
    python -m hnas.bench.rank changes --out output/rank
    python -m hnas.bench.rank improved --out output/rank
    python -m hnas.bench.rank breaking --out output/rank
    python -m hnas.bench.rank report --out output/rank

Everything is trained on distorted digits (hnas/bench/rank/distorted_digits.py). What is finished
stands in runs.jsonl and is not done again, so any command continues after any kill. ``tune``
chooses each method's learning rate on the selection architectures and writes learning_rates.json,
which the commands after it read. ``changes`` trains the default recipe with one change at a time;
which of them ``improved`` tests, if any, follows from these runs by the announced rule. Only
``final`` and ``improved`` score the final architectures, and only these. ``breaking`` asks whether
clipped gradients keep the default recipe from breaking.
The report writes summary.json, tables and plots to --out and prints a JSON object as its last
line. docs/ranking-bench.md announces the comparison, and tells what came of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence

from hnas.base.command_line import OneLineParser, read_bool, read_path, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_writable, write_json
from hnas.bench.rank.changes import (
    breaking_entries,
    change_entries,
    choose_change,
    compare_changes,
    improved_entry,
)
from hnas.bench.rank.comparison import Entry
from hnas.bench.rank.jobs import DEVELOPMENT_SEEDS, SPLITS, Bench, Job, Scale
from hnas.bench.rank.methods import COMPARED, LEARNING_RATES, REFERENCE, find_method
from hnas.bench.rank.summary import final_entries, headline, summarize
from hnas.bench.rank.tables import write_summary
from hnas.bench.rank.truth import selection_truth, truth_file, truth_jobs
from hnas.bench.rank.tuning import choose, rates_of, read_rates, tuning_jobs
from hnas.bench.rank.workers import run_all, work

logger = logging.getLogger(__name__)

COMMANDS = ("ground_truth", "tune", "final", "changes", "improved", "breaking", "report")
QUICK_METHODS = ("first_place", "organisers_calibrated")


def main(argv=None) -> None:
    options = parse(argv)
    check_writable(options.out, "--out")
    bench = Bench(options.out, Scale.quick() if options.quick else Scale())
    if options.command == "work":
        work(bench, options.answers)
        return
    {
        "ground_truth": ground_truth,
        "tune": tune,
        "final": final,
        "changes": changes,
        "improved": improved,
        "breaking": breaking,
        "report": report,
    }[options.command](bench, options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: it is wrong, a method's name included.
    """
    parser = OneLineParser(prog="python -m hnas.bench.rank", description=__doc__.splitlines()[0])
    parser.add_argument(
        "command",
        choices=(*COMMANDS, "work"),
        metavar="{" + ",".join(COMMANDS) + "}",
        help="what to do, in this order",
    )
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
        default=("selection", "final"),
        help="of the architectures that are trained alone, separated by commas "
        "[default selection,final]",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(1, 100),
        help="how often they are trained alone [default selection 6, final 8, others 3; quick: 2]",
    )
    parser.add_argument(
        "--methods",
        default="",
        help="of hnas/bench/rank/methods.py, separated by commas, for tune and final "
        "[default all that are compared; quick: two of them]",
    )
    parser.add_argument(
        "--learning_rates",
        type=read_path,
        help="file of what tune has chosen [default OUT/learning_rates.json]",
    )
    parser.add_argument(
        "--rate",
        type=float,
        choices=LEARNING_RATES,
        help="learning rate of first place that changes starts from [default what tune has chosen]",
    )
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    default = QUICK_METHODS if options.quick else COMPARED
    names = [name for name in options.methods.split(",") if name] or default
    options.methods = list(dict.fromkeys(names))
    for name in options.methods:
        find_method(name)
    options.learning_rates = options.learning_rates or options.out / "learning_rates.json"
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


def do(bench: Bench, options: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Share the jobs that are not finished among worker processes."""
    arguments = ["--out", str(options.out.resolve()), "--quick", str(options.quick)]
    run_all(bench, jobs, arguments, options.workers)


def ground_truth(bench: Bench, options: argparse.Namespace) -> None:
    """Train architectures alone, and write ground_truth.json."""
    jobs = truth_jobs(bench, options.splits, options.seeds)
    do(bench, options, jobs)
    write_json(options.out / "ground_truth.json", truth_file(bench, jobs))
    logger.info("ground truth: %s", options.out / "ground_truth.json")


def tune(bench: Bench, options: argparse.Namespace) -> None:
    """Train a supernet at every learning rate, and write learning_rates.json.

    The rates of methods that were chosen before stay in it.
    """
    selection_truth(bench)
    do(bench, options, tuning_jobs(options.methods))
    methods = choose(bench, dict.fromkeys([*COMPARED, *options.methods]))
    about = {"command": "python -m hnas.bench.rank tune --out OUT", "split": "selection"}
    write_json(options.learning_rates, {**about, "seed": DEVELOPMENT_SEEDS[0], "methods": methods})
    logger.info("learning rates: %s", options.learning_rates)


def jobs_of(entries: Mapping[str, Entry]) -> list[Job]:
    """The supernets of what is compared, each once, whole seeds one after the other."""
    jobs = dict.fromkeys(job for entry in entries.values() for job in entry.jobs)
    return sorted(jobs, key=lambda job: job.seed)


def reference_rate(options: argparse.Namespace) -> float:
    """The learning rate that was chosen for first place.

    Raises:
        UserError: none was.
    """
    return rates_of(options.learning_rates, [REFERENCE])[REFERENCE]


def final(bench: Bench, options: argparse.Namespace) -> None:
    """Train the supernets that are compared, and score them on the final architectures."""
    rates = rates_of(options.learning_rates, options.methods)
    do(bench, options, jobs_of(final_entries(bench, rates)))


def changes(bench: Bench, options: argparse.Namespace) -> None:
    """Train first place with one change at a time, and score that on the selection."""
    do(bench, options, jobs_of(change_entries(options.rate or reference_rate(options))))


def improved(bench: Bench, options: argparse.Namespace) -> None:
    """Train the change that the announced rule names, if any, and score it on the final ones.

    Raises:
        UserError: the changes are not all trained.
    """
    rate = reference_rate(options)
    compared = compare_changes(bench, rate)
    if "unfinished" in compared:
        raise UserError(
            f"{options.out} has not all runs of changes, by which the improved recipe is chosen; "
            "run changes with the same --out first"
        )
    title = choose_change(bench, rate, compared)["chosen"]
    if title is None:
        logger.info("no change may be tested: none ranks the selection better and did not break")
        return
    logger.info("improved recipe: first place, %s", title)
    do(bench, options, improved_entry(bench, rate, title).jobs)


def breaking(bench: Bench, options: argparse.Namespace) -> None:
    """Train first place with and without clipped gradients, and score both on the selection."""
    do(bench, options, jobs_of(breaking_entries(bench, reference_rate(options))))


def report(bench: Bench, options: argparse.Namespace) -> None:
    """Compare what is finished.

    Raises:
        UserError: there is nothing.
    """
    rates = read_rates(options.learning_rates) if options.learning_rates.exists() else {}
    summary = summarize(bench, rates)
    write_summary(summary, options.out)
    sys.stdout.write(json.dumps(headline(summary)) + "\n")


if __name__ == "__main__":
    run_main(main)
