"""The process that checks: it uses the device, and may be lost with it.

    python -m hnas.tools.check_device.worker FOLDER PLAN CHECK...

Prints a line of JSON for each result, and one at each check's end. After a check that left the
device unusable it ends with exit code 3, and another process goes on with the rest.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import paddle
from paddle.base.core import set_num_threads

from hnas.base.device import cpu_threads, set_tf32
from hnas.base.errors import run_main
from hnas.tools.check_device import (
    collectives,
    cpu_kernels,
    facts,
    fused,
    loaders,
    norms,
    operators,
    rates,
    training,
    walk,
)
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.plan import DEVICE_LOST, Plan
from hnas.tools.check_device.results import Result, guarded

FUNCTIONS = {
    "cards": facts.check_cards,
    "facts": facts.check,
    "tf32": facts.check_tf32,
    "operators": operators.check,
    "norms": norms.check,
    "walk": walk.check,
    "kernels": cpu_kernels.check,
    "fused": fused.check,
    "training": training.check,
    "repeat": training.check_repeat,
    "loaders": loaders.check,
    "collectives": collectives.check,
    "rates": rates.check,
}


def main() -> None:
    folder, plan = Path(sys.argv[1]), Plan.from_json(sys.argv[2])
    logging.getLogger().setLevel(logging.ERROR)
    set_num_threads(cpu_threads())
    machine = Machine(plan, folder)
    paddle.set_device(machine.device)
    tell_all(guarded("switching TF32", switch_tf32, plan))
    for name in sys.argv[3:]:
        tell_all(guarded(name, FUNCTIONS[name], machine))
        tell({"done": name})
        if not machine.healthy():
            sys.exit(DEVICE_LOST)


def switch_tf32(plan: Plan) -> Iterator[Result]:
    """As the plan says, where the card has it; yields nothing."""
    missing = plan.tf32 == "on" and not facts.has_tf32()
    set_tf32("auto" if missing else plan.tf32)
    return iter(())


def tell_all(results: Iterable[Result]) -> None:
    for result in results:
        tell(asdict(result))


def tell(content: dict) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
