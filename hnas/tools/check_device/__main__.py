"""The command: runs the checks in processes of their own, and counts what they found.

Whatever a check does to the device, or the device to it, other processes' checks are still made.
"""

from __future__ import annotations

from hnas.base.errors import hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from hnas.base.command_line import OneLineParser, read_bool, read_path
from hnas.base.device import cpu_threads, visible_gpus
from hnas.base.files import check_output, print_text, write_text
from hnas.tools.check_device.rows import FAILED, NOT_HERE, PASSED, Machine, Result, tell

DEFAULT_OUTPUT = Path("output/check_device.jsonl")
JOBS = (
    ("off", ("facts", "norms", "walk", "steps")),
    ("off", ("repeat",)),
    ("off", ("collectives",)),
    ("on", ("walk", "steps")),
    ("auto", ("steps",)),
)
"""``--tf32`` of a process, and the checks in it. Which kernels cuDNN runs for a shape is settled
once in a process, for TF32 or not, deterministic or not. CPUs have no other setting than off."""
PROGRAM = (sys.executable, "-m", "hnas.tools.check_device.checks")
MOST_SECONDS = 1800
"""Of a process; one that takes longer hangs, and is killed."""


def run_jobs(machine: Machine) -> None:
    """All checks; their rows are shown and added to the file as they come."""
    # First what a CPU computes from the same inputs, all of it, where no GPU is seen.
    run_job(["expected"], replace(machine, gpus=0))
    for tf32, names in JOBS:
        if machine.gpus or tf32 == "off":
            run_job(names, replace(machine, tf32=tf32))


def run_job(names: Sequence[str], machine: Machine) -> None:
    """Some checks in one process; one more row, failed, if that is lost."""
    # Found here, since Paddle takes one thread and sets the other variable.
    environment = {**os.environ, "PINAS_THREADS": str(cpu_threads())}
    if not machine.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    command = [*PROGRAM, json.dumps(asdict(machine)), *names]
    log = Path(machine.folder) / "worker.log"
    try:
        with open(log, "wb") as file:
            done = subprocess.run(command, stderr=file, env=environment, timeout=MOST_SECONDS)
        code = done.returncode
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
    if code:
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = log.read_text(encoding="utf-8", errors="replace").split("\n")
        word = next((line.strip() for line in reversed(said) if line.strip()), "no word")
        note = f"their process ended with {end}: {word}"
        row = Result(f"all of {', '.join(names)}", FAILED, note=note)
        tell(names[0], row, machine.output)


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.tools.check_device",
        description="Check that the project computes right on this machine's devices: on the GPUs "
        "that CUDA_VISIBLE_DEVICES leaves, or else on the CPU.",
    )
    parser.add_argument("--quick", type=read_bool, default=False, help="less of everything, for CI")
    parser.add_argument("--output", type=read_path, default=DEFAULT_OUTPUT, help="file of the rows")
    options = parser.parse_args(argv)
    check_output(options.output, "--output")
    write_text(options.output, "")
    with tempfile.TemporaryDirectory(prefix="pinas-check-", ignore_cleanup_errors=True) as folder:
        run_jobs(Machine(folder, str(options.output), visible_gpus(), options.quick))
    found = map(json.loads, options.output.read_text(encoding="utf-8").splitlines())
    named = defaultdict(list)
    for row in found:
        named[row["state"]].append(row["name"])
    if named[NOT_HERE]:
        print_text(f"not checked: {'; '.join(named[NOT_HERE])}\n")
    counts = ", ".join(f"{len(named[state])} {state}" for state in (PASSED, FAILED, NOT_HERE))
    print_text(f"{counts}; as JSON lines: {options.output}\n")
    if named[FAILED]:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
