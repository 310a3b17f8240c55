"""How well supernets rank: their accuracies against those of networks trained alone.

    python -m hnas.bench.rank --out output/rank_quick --quick True
    python -m hnas.bench.rank --out output/rank --parts truth tune
    python -m hnas.bench.rank --out output/rank

Parts: ``truth`` trains architectures alone; ``tune`` a supernet of each method at every learning
rate, of which the one that ranks the selection architectures best is taken; ``final`` those that
are compared, the only ones that the final architectures are scored by. What is finished stands in
OUT/runs.jsonl and is not done again, so the same command continues after any kill. The comparison
goes to OUT/summary.json, and is the last line printed. Everything is trained on distorted digits
(hnas/bench/rank/distorted_digits.py); docs/ranking-bench.md says what is known of that task.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence

from hnas.base.command_line import OneLineParser, read_bool, read_path, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_writable, claim_folder, print_text, write_json
from hnas.bench.rank.jobs import SPLITS, Bench, Scale
from hnas.bench.rank.methods import METHODS
from hnas.bench.rank.verdict import choose_rates, compare, final_jobs, truth_jobs, tuning_jobs
from hnas.bench.rank.workers import run_all

PARTS = ("truth", "tune", "final")


def main(argv=None) -> None:
    options = parse(argv)
    check_writable(options.out, "--out")
    claim_folder(options.out, "--out")
    bench = Bench(options.out, Scale.quick() if options.quick else Scale())
    if "truth" in options.parts:
        run_all(bench, truth_jobs(bench, SPLITS), options.workers)
    if "tune" in options.parts:
        run_all(bench, tuning_jobs(options.methods), options.workers)
    rates = choose_rates(bench, options.methods)
    if "final" in options.parts:
        missing = [name for name in options.methods if name not in rates]
        if missing:
            raise UserError(
                f"{missing[0]} has no learning rate; do the parts truth and tune first, or, if it "
                "broke at all of them, leave it out of --methods"
            )
        run_all(bench, final_jobs(bench, rates), options.workers)
    found = {"rates": rates, "final": compare(bench, rates)}
    write_json(options.out / "summary.json", found)
    print_text(json.dumps(found) + "\n")


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = OneLineParser(prog="python -m hnas.bench.rank", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=read_path, required=True, help="folder of all results")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what to train")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is compared"
    )
    parser.add_argument(
        "--workers", type=whole_number(1, 1024), default=2, help="processes that share the cores"
    )
    parser.add_argument(
        "--quick", type=read_bool, default=False, help="a trial of the machinery in minutes"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
