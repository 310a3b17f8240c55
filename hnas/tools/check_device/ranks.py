"""Several processes: what they exchange, their gradients, and whether all know of a signal.

On two cards or more over NCCL; else two processes on the CPU over gloo. This file is also the
program of each of them, which hnas.parallel.launcher starts with the machine as its argument.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import paddle

import hnas
from hnas.base.device import set_tf32
from hnas.base.errors import run_main
from hnas.parallel.distributed import (
    GradientExchange,
    StopSignals,
    copy_from_main_process,
    join_processes,
    leave,
    rank,
    world_size,
)
from hnas.tools.check_device import rows
from hnas.tools.check_device.networks import STAGES, run, trainer
from hnas.utils.hapi_wrapper import ResumableModel

ROOT = Path(hnas.__file__).parents[1]
MOST_SECONDS = 300
LIMIT = 1e-4
"""Of gradients in float32, relative to the largest."""
IMAGES = 2
"""Of each rank."""


def check_collectives(machine: rows.Machine) -> Iterator[rows.Result]:
    """A step of both stages on all ranks, against one process that has all their images."""
    over, number, environment = "NCCL", machine.gpus, {**os.environ, "OMP_NUM_THREADS": "1"}
    if number < 2:
        yield rows.not_here("exchanges over NCCL", "they need two cards or more")
        over, number, machine = "gloo", 2, replace(machine, gpus=0)
        environment["CUDA_VISIBLE_DEVICES"] = "-1,-1"  # the launcher hands each process one
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "hnas.parallel.launcher", "--nproc_per_node", str(number)]
    command += ["--log_dir", f"{machine.folder}/ranks", __file__, json.dumps(asdict(machine))]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=MOST_SECONDS
    )
    if done.returncode:
        said = f"{done.stdout}{done.stderr}".strip()  # its last line is shown
        raise RuntimeError(f"exit code {done.returncode} of the launcher\n{said}")
    found = [np.load(f"{machine.folder}/rank{index}.npz") for index in range(number)]
    whole = {stage: stepped(stage, number).gradients.gradient for stage in STAGES}
    yield from judge_ranks(found, whole, over)


def judge_ranks(
    found: Sequence[Mapping[str, np.ndarray]], whole: Mapping[str, np.ndarray], over: str
) -> Iterator[rows.Result]:
    """What each rank found, against one process's gradients of all images, by stages."""
    for stage, right in whole.items():
        error = max(rows.relative_error(each[stage], right) for each in found)
        name = f"{over}: gradients of {stage}"
        yield rows.at_most(name, error, LIMIT, "against one process's")
        others = sum(rows.differing([each[stage]], [found[0][stage]]) for each in found)
        yield rows.at_most(f"{name} are the same on all", others, 0, "numbers that differ")
    deaf = sum(int(each["signal"]) != signal.SIGTERM for each in found)
    yield rows.at_most(f"{over}: ranks that do not know of another's SIGTERM", deaf, 0)


# --- a rank's program


def stepped(
    stage: str, ranks: int, share: slice = slice(None), stop: StopSignals | None = None
) -> ResumableModel:
    """A stage's model after a step on its share of so many ranks' images.

    Args:
        stop: of this rank, which starts at rank 0's weights, and whose gradient is averaged with
            the others'; None: there are no others.
    """
    model = trainer(stage, ranks * IMAGES, onednn=False)
    if stop is not None:
        state = [*model.network.state_dict().values()]
        for tensor in state if rank() else ():
            tensor.set_value(paddle.zeros_like(tensor))
        copy_from_main_process(state)
        trained = [p for p in model.network.parameters() if not p.stop_gradient]
        model.exchange = GradientExchange(trained, stop)
    run(model, range(1), ranks * IMAGES, share)
    return model


def main() -> None:
    machine = rows.Machine(**json.loads(sys.argv[1]))
    paddle.set_device("gpu" if machine.gpus else "cpu")
    set_tf32("off")
    join_processes(cpu=not machine.gpus)
    found, share = {}, slice(rank() * IMAGES, (rank() + 1) * IMAGES)
    with StopSignals() as stop:
        if rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the others are to know of it, too
        for stage in STAGES:
            model = stepped(stage, world_size(), share, stop)
            found[stage] = model.gradients.gradient
            model.exchange.read_notices()
    found["signal"] = np.array(model.exchange.received or 0)
    np.savez(f"{machine.folder}/rank{rank()}.npz", **found)
    leave()


if __name__ == "__main__":
    run_main(main, rows.MEMORY)
