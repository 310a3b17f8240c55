"""How well supernets rank: trains networks alone and supernets on a small task.

    python -m hnas.bench.rank represent --out output/rank
    python -m hnas.bench.rank truth --out output/rank
    python -m hnas.bench.rank supernets --methods organisers@0.0067 --out output/rank

``represent`` trains thirty networks of published ImageNet accuracies alone, and tells how well the
task's accuracies agree with them; ``truth`` trains drawn architectures alone; ``supernets`` trains
supernets of each method, scores the architectures of a split by each, and tells how many broke and,
once the split's truth is there, how the others rank and which differ. What is finished stands in
OUT/runs.jsonl and is not done again, so the same command continues after any kill. The last line
printed is JSON, and in OUT/summary.json. docs/ranking-bench.md says what is known of the tasks.
"""

from __future__ import annotations

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence

from hnas.base.command_line import (
    OneLineParser,
    read_bool,
    read_path,
    real_number,
    shown,
    whole_number,
)
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_writable, claim_folder, print_text, read_json, write_json
from hnas.bench.rank.jobs import (
    SPLITS,
    TASKS,
    Bench,
    Scale,
    published_jobs,
    second_jobs,
    supernet_jobs,
    truth_jobs,
)
from hnas.bench.rank.methods import METHODS
from hnas.bench.rank.represent import represent
from hnas.bench.rank.verdict import reliability, verdict
from hnas.bench.rank.workers import run_all


def main(argv=None) -> None:
    options = parse(argv)
    check_writable(options.out, "--out")
    claim_folder(options.out, "--out")
    scale = Scale.quick() if options.quick else TASKS[options.task].scale
    bench = Bench(options.out, scale, options.task)
    jobs = {
        "represent": published_jobs(bench),
        "truth": [
            *truth_jobs(bench, "selection"),
            *truth_jobs(bench, "final"),
            *second_jobs(bench),
        ],
        "supernets": supernet_jobs(bench, options.methods or (), options.split),
    }[options.what]
    summary = options.out / "summary.json"
    known = read_json(summary) if summary.exists() else {}
    run_all(bench, jobs, options.workers)
    found = {"task": bench.name, "finished": len(jobs)}
    if options.what == "represent":
        found |= represent(bench)
    if options.what == "truth":
        found["reliability"] = reliability(bench)
    if options.what == "supernets":
        found |= verdict(bench, options.methods, options.split)
    part = options.split if options.what == "supernets" else options.what
    write_json(summary, known | {part: found})
    print_text(json.dumps(found) + "\n")


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = OneLineParser(prog="python -m hnas.bench.rank", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("represent", "truth", "supernets"), help="what is trained")
    parser.add_argument("--out", type=read_path, required=True, help="folder of all results")
    parser.add_argument("--task", choices=TASKS, default="small_digit", help="what is trained on")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=read_method,
        help=f"of the supernets, each with its peak learning rate, NAME@RATE: {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="selection", help="what they are scored on"
    )
    parser.add_argument(
        "--workers", type=whole_number(1, 1024), default=2, help="processes that share the cores"
    )
    parser.add_argument(
        "--quick", type=read_bool, default=False, help="a trial of the machinery in minutes"
    )
    options = parser.parse_args(argv)
    if options.what == "supernets" and not options.methods:
        raise UserError("--methods: give NAME@RATE for each method")
    names = [name for name, _ in options.methods or ()]
    if options.split == "final" and len(set(names)) < len(names):
        raise UserError("--methods of --split final: one learning rate each, chosen before")
    return options


def read_method(text: str) -> tuple[str, float]:
    """A method's name and its learning rate."""
    name, _, rate = text.partition("@")
    if name not in METHODS:
        raise ArgumentTypeError(f"{shown(text)} is not NAME@RATE of {', '.join(METHODS)}")
    return name, real_number(1e-6, 10)(rate)


if __name__ == "__main__":
    run_main(main)
