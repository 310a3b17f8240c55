"""What a CPU computes for the same inputs, in a process of its own beside the one that checks.

    python -m hnas.tools.check_device.twin FOLDER PLAN

Writes one file after the other to FOLDER, in the order in which they are asked for. Only Paddle's
plain operators and the reference engine are used here: no oneDNN, no GPU.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import paddle
from paddle.base.core import set_num_threads

from hnas.base.device import cpu_threads
from hnas.base.errors import run_main
from hnas.tools.check_device import fused, operators, training, walk
from hnas.tools.check_device.machine import Machine, write_expected
from hnas.tools.check_device.plan import Plan
from hnas.tools.check_device.results import failure

EXPECTED = {
    "operators": operators.expected,
    "walk": walk.expected,
    "fused": fused.expected,
    "training": training.expected,
}


def main() -> None:
    folder, plan = Path(sys.argv[1]), Plan.from_json(sys.argv[2])
    logging.getLogger().setLevel(logging.ERROR)
    set_num_threads(cpu_threads())
    paddle.set_device("cpu")
    machine = Machine(plan, folder)
    for name, compute in EXPECTED.items():
        try:
            write_expected(folder, name, compute(machine))
        except Exception as error:
            (folder / f"{name}.failed").write_text(failure(name, error).note, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
