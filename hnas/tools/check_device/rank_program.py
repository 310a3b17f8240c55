"""What each of several processes does for ``collectives.py``; started by hnas.parallel.launcher.

    rank_program.py FOLDER PLAN

Writes what it has exchanged to FOLDER, and goes on exchanging until it is told to stop.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist

from hnas.base.device import set_tf32
from hnas.base.errors import run_main
from hnas.base.signals import Stopped
from hnas.parallel.distributed import (
    GradientExchange,
    copy_from_main_process,
    gather,
    join_processes,
    leave,
    rank,
    sum_over_ranks,
    world_size,
)
from hnas.parallel.stopping import StopSignals
from hnas.tools.check_device.machine import Machine, write_expected
from hnas.tools.check_device.plan import Plan
from hnas.tools.check_device.subjects import images, labels
from hnas.tools.check_device.training import SIZE, prepared, stage2

GATHERED = ("uint8", "int64", "float32", "float16", "bfloat16")
"""Images, positions, keys, and keys in mixed precision."""
IMAGES = 2
"""Of each rank."""
STEP_SECONDS, MOST_SECONDS = 0.05, 300


def values(of_rank: int) -> np.ndarray:
    """Small whole numbers [3, 4], which every type holds exactly."""
    return np.random.default_rng(of_rank).integers(0, 50, (3, 4))


def exchanged() -> dict[str, np.ndarray]:
    """What comes of each kind of exchange that training and scoring use."""
    halves = dist.get_backend() == "NCCL"  # gloo has none; CPUs compute in float32

    def own(dtype: str) -> paddle.Tensor:
        return paddle.to_tensor(values(rank())).astype("float32").astype(dtype)

    found = {
        f"gather {dtype}": gather(own(dtype)).astype("float32").numpy()
        for dtype in GATHERED
        if halves or not dtype.endswith("16")
    }
    for dtype in ("int64", "float32"):
        found[f"sum {dtype}"] = sum_over_ranks(own(dtype)).numpy()
        copy = own(dtype)
        copy_from_main_process([copy])
        found[f"broadcast {dtype}"] = copy.numpy()
    return found


def gradient(ranks: int, own: int | None = None) -> np.ndarray:
    """Of a step of stage two on a batch for so many ranks.

    Args:
        ranks: that share the batch.
        own: the one whose share is computed, its gradient then being averaged with the others';
            None: all of it, in one process.
    """
    model = prepared(stage2(), onednn=False)
    share = slice(None)
    if own is not None:
        share = slice(own * IMAGES, (own + 1) * IMAGES)
        trained = [p for p in model.network.parameters() if not p.stop_gradient]
        model.exchange = GradientExchange(trained, StopSignals())
    batch = images(ranks * IMAGES, SIZE)[share], labels(ranks * IMAGES)[share]
    model.train_batch([paddle.to_tensor(part) for part in batch])
    return model.gradients.gradient


def exchange_until_stopped(folder: Path) -> None:
    """Steps of one all-reduce, as training has, until all ranks know of a signal.

    Or for some minutes, in case that nobody is left who would tell them.
    """
    deadline = time.monotonic() + MOST_SECONDS
    weight = paddle.create_parameter([8], "float32")
    with StopSignals(patient=True) as stop:
        exchange = GradientExchange([weight], stop)
        (folder / f"rank{rank()}.pid").write_text(str(os.getpid()), encoding="ascii")
        while exchange.received is None and time.monotonic() < deadline:
            weight.sum().backward()
            exchange.run()
            weight.clear_gradient(set_to_zero=False)
            time.sleep(STEP_SECONDS)
    leave()
    if exchange.received is not None:
        raise Stopped(exchange.received)


def main() -> None:
    folder, plan = Path(sys.argv[1]), Plan.from_json(sys.argv[2])
    machine = Machine(plan, folder)
    paddle.set_device("gpu" if machine.has_gpu else "cpu")
    set_tf32("off")
    join_processes(cpu=not machine.has_gpu)
    found = {"gradient": gradient(world_size(), rank()), **exchanged()}
    write_expected(folder, f"rank{rank()}", found)
    exchange_until_stopped(folder)


if __name__ == "__main__":
    run_main(main)
