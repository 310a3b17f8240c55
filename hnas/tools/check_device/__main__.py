"""The command: runs the checks in processes of their own, shows a table, writes JSON lines.

Whatever a check does to the device, or the device to it, other processes' checks are still made.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from hnas.base.command_line import OneLineParser, read_bool, read_path
from hnas.base.device import visible_gpus
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_output
from hnas.tools.check_device.rows import FAILED, NOT_HERE, PASSED, ROW, Machine, Result

DEFAULT_OUTPUT = Path("output/check_device.jsonl")
JOBS = (
    ("off", ("facts", "tf32", "norms", "walk", "steps", "loaders")),
    ("off", ("repeat",)),
    ("off", ("collectives",)),
    ("on", ("tf32", "walk", "steps")),
    ("auto", ("tf32",)),
)
"""``--tf32`` of a process, and the checks in it. Which kernels cuDNN runs for a shape is settled
once in a process, for TF32 or not, deterministic or not. CPUs have no other setting than off."""
MOST_SECONDS = 1800
"""Of a process; one that takes longer hangs, and is killed."""


def all_results(machine: Machine) -> Iterator[tuple[str, Result]]:
    """The rows of all checks, with the check's name."""
    # First what a CPU computes from the same inputs, all of it, where no GPU is seen.
    yield from job(["expected"], replace(machine, gpus=0))
    for tf32, names in JOBS:
        if machine.gpus or tf32 == "off":
            yield from job(names, replace(machine, tf32=tf32))


def job(names: Sequence[str], machine: Machine) -> Iterator[tuple[str, Result]]:
    """The rows of some checks, made in one process; one more, failed, if that is lost."""
    log = Path(machine.folder) / "worker.log"
    with open(log, "wb") as file, start(names, machine, file) as process:
        watchdog = threading.Timer(MOST_SECONDS, process.kill)
        watchdog.start()
        try:
            for line in process.stdout:
                if line.startswith(ROW):  # libraries write to standard output, too
                    check, content = json.loads(line.removeprefix(ROW))
                    yield check, Result(**content)
            process.wait()
        finally:
            watchdog.cancel()
            process.terminate()  # if it has not ended: then it ends what it has started, too
    if code := process.returncode:
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lost = f"their process ended with {end}: {last_line(log)}"
        yield names[0], Result(f"all of {', '.join(names)}", FAILED, note=lost)


def start(names: Sequence[str], machine: Machine, log: IO[bytes]) -> subprocess.Popen:
    """The process of a job, see ``checks.py``; what it says besides goes to ``log``."""
    # On all cores, unless a launcher has said how many; Paddle takes one and sets the variable.
    threads = os.environ.get("PINAS_THREADS") or os.environ.get("OMP_NUM_THREADS")
    environment = {**os.environ, "PINAS_THREADS": threads or str(os.cpu_count() or 1)}
    if not machine.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    command = [sys.executable, "-m", "hnas.tools.check_device.checks"]
    command += [json.dumps(asdict(machine)), *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no word")


def table_line(result: Result) -> str:
    """A row as the table has it."""
    value = f"{result.value:.3g}" if isinstance(result.value, float) else result.value
    parts = ["" if value is None else str(value)]
    if result.limit is not None:
        parts.append(f"(at most {result.limit:.3g})")
    if result.note:
        parts.append(f"- {result.note}" if parts[0] else result.note)
    state = {PASSED: "ok", FAILED: "FAILED", NOT_HERE: "-"}[result.state]
    return f"  {state:6} {result.name:52} {' '.join(parts)}".rstrip()


def report(results: Iterable[tuple[str, Result]], output: Path) -> bool:
    """Show and write each row as it comes; gives whether none failed."""
    states, title = Counter(), ""
    with open(output, "w", encoding="utf-8") as file:
        for check, result in results:
            if check != title:
                title = check
                write(title)
            write(table_line(result))
            content = asdict(result)
            if isinstance(result.value, float) and not math.isfinite(result.value):
                content["value"] = str(result.value)  # JSON knows no NaN
            file.write(json.dumps({"check": check, **content}) + "\n")
            file.flush()
            states[result.state] += 1
    counts = ", ".join(f"{states[state]} {state}" for state in (PASSED, FAILED, NOT_HERE))
    write(f"{counts}; as JSON lines: {output}")
    return not states[FAILED]


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.tools.check_device",
        description="Check that the project computes right on this machine's devices: on the GPUs "
        "that CUDA_VISIBLE_DEVICES leaves, or else on the CPU.",
    )
    parser.add_argument("--full", type=read_bool, default=False, help="at 224 px, too")
    parser.add_argument("--quick", type=read_bool, default=False, help="less of everything, for CI")
    parser.add_argument(
        "--output",
        type=read_path,
        default=DEFAULT_OUTPUT,
        help=f"file for the rows as JSON lines [default {DEFAULT_OUTPUT}]",
    )
    options = parser.parse_args(argv)
    if options.full and options.quick:
        raise UserError("--full and --quick are both True; give one of them")
    check_output(options.output, "--output")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pinas-check-", ignore_cleanup_errors=True) as folder:
        machine = Machine(folder, visible_gpus(), options.quick, options.full)
        passed = report(all_results(machine), options.output)
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
