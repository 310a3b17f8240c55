"""The command: runs the checks, shows a table, writes JSON lines."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from hnas.base.command_line import OneLineParser, path_text, read_bool, shown
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_output
from hnas.tools.check_device.plan import ALONE, CHECKS, SLOW, WITH_TF32, Plan
from hnas.tools.check_device.processes import WORKER_LOG, results_of, starter, twin
from hnas.tools.check_device.results import FAILED, NOT_HERE, PASSED, Result

DEFAULT_OUTPUT = "output/check_device.jsonl"
WIDTH = 52


def card_numbers(text: str) -> tuple[int, ...]:
    """An argparse type: ``0,1``."""
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() and len(number) < 4 for number in numbers):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a list of numbers as 0,1")
    cards = tuple(map(int, numbers))
    if len(set(cards)) < len(cards):
        raise argparse.ArgumentTypeError(f"{shown(text)} names a card twice")
    return cards


def chosen_cards(asked: tuple[int, ...] | None, folder: Path) -> tuple[int, ...]:
    """The cards to check, of those that Paddle sees: the ones asked for; None: all.

    Raises:
        UserError: it does not see them.
    """
    (_, found), *_ = results_of(["cards"], starter(folder, Plan()), folder / WORKER_LOG)
    if found.state == FAILED:
        raise UserError(f"Paddle cannot be asked for cards: {found.note}")
    seen = range(int(found.value))
    if missing := sorted(set(asked or ()) - set(seen)):
        raise UserError(f"--gpus names card {missing[0]}, but Paddle sees {len(seen)}; see README")
    return tuple(seen) if asked is None else asked


def all_results(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Result]]:
    """What every check yields, in as many processes as it takes."""
    plan = Plan((), options.quick, options.full)
    with twin(folder, plan) as at_work:
        plan = replace(plan, gpus=chosen_cards(options.gpus, folder))
        names = [name for name in CHECKS if not (plan.quick and name in SLOW)]
        for own, tf32 in processes(plan, names):
            start = starter(folder, replace(plan, tf32=tf32))
            yield from results_of(own, start, folder / WORKER_LOG, excused=at_work)


def processes(plan: Plan, names: list[str]) -> list[tuple[list[str], str]]:
    """Which checks have a process of their own, and ``--tf32`` in it."""
    if not plan.gpus:
        return [(names, "off")]
    # Which kernels run is settled once in a process, for TF32 or not, deterministic or not.
    return [
        ([name for name in names if name not in ALONE], "off"),
        *(([name], "off") for name in names if name in ALONE),
        ([name for name in names if name in WITH_TF32], "on"),
        (["tf32"], "auto"),
    ]


def row(result: Result) -> str:
    """A line of the table."""
    value = result.value
    if isinstance(value, float):
        value = f"{value:.3g}"
    parts = ["" if value is None else str(value)]
    if result.limit is not None:
        parts.append(f"(at most {result.limit:.3g})")
    if result.note:
        parts.append(f"- {result.note}" if parts[0] else result.note)
    state = {PASSED: "ok", FAILED: "FAILED", NOT_HERE: "-"}[result.state]
    return f"  {state:6} {result.name:{WIDTH}} {' '.join(parts)}".rstrip()


def report(results: Iterator[tuple[str, Result]], output: Path) -> bool:
    """Show and write each result as it comes; gives whether none failed."""
    states, failed, title = Counter(), [], ""
    with open(output, "w", encoding="utf-8") as file:
        for check, result in results:
            if check != title:
                title = check
                write(title)
            write(row(result))
            file.write(json.dumps({"check": check, **strict(result)}) + "\n")
            file.flush()
            states[result.state] += 1
            if result.state == FAILED:
                failed.append(result)
    counts = ", ".join(f"{states[state]} {state}" for state in (PASSED, FAILED, NOT_HERE))
    write(f"{counts}; as JSON lines: {output}")
    for result in failed:
        write(row(result))
    return not failed


def strict(result: Result) -> dict:
    """A result as JSON has it, which knows no NaN."""
    content = asdict(result)
    if isinstance(result.value, float) and not math.isfinite(result.value):
        content["value"] = str(result.value)
    return content


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.tools.check_device",
        description="Check that the project computes right on this machine's devices.",
    )
    parser.add_argument(
        "--gpus", type=card_numbers, help="of the visible ones, as 0,1 [default: all there are]"
    )
    parser.add_argument(
        "--full", type=read_bool, default=False, help="224 px and more architectures"
    )
    parser.add_argument("--quick", type=read_bool, default=False, help="less of everything, for CI")
    parser.add_argument(
        "--output",
        type=path_text,
        default=DEFAULT_OUTPUT,
        help=f"file for the results as JSON lines [default {DEFAULT_OUTPUT}]",
    )
    options = parser.parse_args(argv)
    if options.full and options.quick:
        raise UserError("--full and --quick are both True; give one of them")
    output = Path(options.output)
    check_output(output, "--output")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pinas-check-"))
    try:
        passed = report(all_results(options, folder), output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
