"""What the processes of test_distributed.py run: writes one .npz a rank.

    python -m paddle.distributed.launch --nproc_per_node N distributed_worker.py FOLDER

With plain Python it is the one process that the others are compared with.
"""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist

from hnas.models.elastic import ElasticBatchNorm2D
from hnas.parallel.distributed import (
    GradientExchange,
    StopSignals,
    agree,
    join_processes,
    leave,
    rank,
    world_size,
)
from hnas.tools.check_device.networks import run, trainer
from hnas.utils.hapi_wrapper import ResumableModel

TOTAL = 8
RUNS = {  # the stage, into how many parts each of several ranks splits its share, steps
    "stage 1": ("stage 1", 1, 3),
    "accumulated": ("stage 1", 2, 3),
    "statistics": ("stage 1", 1, 4),  # of each batch, not frozen ones
    "stage 2": ("stage 2", 1, 4),
}


def build(name: str) -> ResumableModel:
    """The model of a run, the same on all ranks."""
    stage, parts, _ = RUNS[name]
    model = trainer(stage, TOTAL, onednn=False)
    for layer in model.network.sublayers():
        if name == "statistics" and isinstance(layer, ElasticBatchNorm2D):
            layer.frozen = False
    if world_size() > 1:
        model.gradients.accumulate = parts
        trained = [p for p in model.network.parameters() if not p.stop_gradient]
        model.exchange = GradientExchange(trained, StopSignals())
    return model


def counted(model: ResumableModel, steps: int) -> list[int]:
    """Train; gives the all-reduces of each step."""
    calls, share = [], TOTAL // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        for step in range(steps):
            all_reduce.reset_mock()
            run(model, range(step, step + 1), TOTAL, own)
            calls.append(all_reduce.call_count)
    return calls


def main(folder: Path) -> None:
    paddle.set_device("cpu")
    join_processes(cpu=True)
    agree([], "no weights, as in pretraining")
    found = {}
    for name, (*_, steps) in RUNS.items():
        model = build(name)
        initial = {key: value.numpy() for key, value in model.network.state_dict().items()}
        found[f"{name} calls"] = np.array(counted(model, steps))
        found[f"{name} gradient"] = model.gradients.gradient
        for key, value in model.network.state_dict().items():
            found[f"{name} state {key}"] = value.numpy()
            found[f"{name} moved {key}"] = np.array(not np.array_equal(initial[key], value.numpy()))
    np.savez(folder / f"{rank()}of{world_size()}.npz", **found)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
