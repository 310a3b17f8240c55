"""The process that checks: it uses the device, and may be lost with it.

python -m hnas.tools.check_device.checks MACHINE CHECK...
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.base.core import set_num_threads

from hnas.base.device import (
    available_bytes,
    cpu_threads,
    gib,
    has_tf32,
    processor,
    set_tf32,
    shared_bytes,
)
from hnas.base.errors import run_main
from hnas.models.elastic import ElasticBatchNorm2D
from hnas.tools.check_device import networks, ranks, rows

DRIVER = Path("/proc/driver/nvidia/version")
MOST_OFF = 1e-4
"""Of BatchNorm, relative to the largest value."""
WIDE, NARROW = 12, 8
"""Channels of the shared BatchNorm and of the slice."""


def check_facts(machine: rows.Machine) -> Iterator[rows.Result]:
    """What the machine is; of CUDA's versions Paddle says what it was built with."""
    shared = shared_bytes()
    facts = {
        "Paddle": f"{paddle.version.full_version} ({paddle.version.commit[:10]})",
        "Python": platform.python_version(),
        "processor": f"{processor()}, {os.cpu_count()} cores, {cpu_threads()} threads used",
        "free memory": gib(available_bytes()),
        "/dev/shm, free": "unknown" if shared is None else gib(shared),
    }
    if machine.gpus:
        card = paddle.device.cuda.get_device_properties()
        facts |= {
            "cards that Paddle sees": machine.gpus,
            "card": f"{card.name}, compute capability {card.major}.{card.minor}, "
            f"{gib(card.total_memory)}",
            "driver": DRIVER.read_text().splitlines()[0] if DRIVER.exists() else "unknown",
            "Paddle's CUDA and NCCL": f"{paddle.version.cuda()}, {paddle.version.nccl()}",
            "cuDNN": f"{paddle.version.cudnn()}, loaded {paddle.device.get_cudnn_version()}",
        }
    else:
        yield rows.not_here("card, driver, CUDA, cuDNN, NCCL", "Paddle sees no GPU")
    for name, value in facts.items():
        yield rows.Result(name, rows.PASSED, value)


def check_norms(machine: rows.Machine) -> Iterator[rows.Result]:
    """A training step of a BatchNorm over a slice of shared statistics, against one of its own."""
    shared, own = ElasticBatchNorm2D(WIDE), nn.BatchNorm2D(NARROW)
    ramp = np.arange(1, WIDE + 1, dtype=np.float32) / 4
    for norm in (shared, own):
        for tensor in norm.state_dict().values():
            tensor.set_value(ramp[: tensor.size])
        norm.train()
    x = np.random.default_rng(0).normal(1, 2, (8, NARROW, 3, 3)).astype(np.float32)
    found, right = (
        [part.numpy() for part in (norm(paddle.to_tensor(x)), norm._mean, norm._variance)]
        for norm in (shared, own)
    )
    names = "BatchNorm's output in training", "running mean of a slice", "running variance of it"
    for name, one, other in zip(names, found, right, strict=True):
        error = rows.relative_error(one if one.ndim == 4 else one[:NARROW], other)
        yield rows.at_most(name, error, MOST_OFF)
    beyond = rows.differing((part[NARROW:] for part in found[1:]), [ramp[NARROW:]] * 2)
    yield rows.at_most("statistics outside the slice that changed", beyond, 0)


CHECKS = {
    "expected": networks.keep_expected,
    "facts": check_facts,
    "norms": check_norms,
    "walk": networks.check_walk,
    "steps": networks.check_steps,
    "repeat": networks.check_repeat,
    "collectives": ranks.check_collectives,
}


def main() -> None:
    machine, names = rows.Machine(**json.loads(sys.argv[1])), sys.argv[2:]
    logging.getLogger().setLevel(logging.ERROR)
    set_num_threads(cpu_threads())
    paddle.set_device("gpu:0" if machine.gpus else "cpu")
    mode, able = machine.tf32, machine.tf32 != "on" or has_tf32()
    if able:
        machine = replace(machine, tf32="on" if set_tf32(mode) else "off")
    for name in names:
        absent = [rows.not_here(f"{name} in TF32", "needs compute capability 8.0")]
        for result in rows.guarded(name, CHECKS[name], machine) if able else absent:
            rows.tell(name if mode == "off" else f"{name} {mode}", result, machine.output)


if __name__ == "__main__":
    run_main(main, rows.MEMORY)
