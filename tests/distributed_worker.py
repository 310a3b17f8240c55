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
from independent import calm

from hnas.models.elastic import ElasticBatchNorm2D, freeze_statistics
from hnas.models.pinasv2 import PiNASv2, build_network
from hnas.parallel.distributed import (
    GradientExchange,
    StopSignals,
    agree,
    join_processes,
    leave,
    rank,
    world_size,
)
from hnas.search_space import RESNET48_MINI
from hnas.utils.hapi_wrapper import DistillationModel, GradientStep, momentum_optimizer
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import RandomSampler

TOTAL, CLASSES = 8, 10
# At the recipe's temperature new networks, whose keys lie close together, have small gradients.
CONTRAST = {"dim": 16, "queue_size": 32, "key_momentum": 0.9, "temperature": 0.2}


def batch(step: int) -> list[paddle.Tensor]:
    """This rank's share of a step's images, twice, and labels."""
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (2, TOTAL, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, TOTAL)
    share = slice(rank() * TOTAL // world_size(), (rank() + 1) * TOTAL // world_size())
    return [paddle.to_tensor(part[share]) for part in (*images, labels)]


def contrastive(accumulate: int = 1, frozen: bool = False) -> ContrastiveModel:
    """Stage one's; ``frozen`` as it is run by default: statistics never move, nor do keys."""
    paddle.seed(1)
    network = PiNASv2(RESNET48_MINI, CLASSES, **CONTRAST)
    for encoder in (network.backbone, network.key_backbone):
        calm(encoder)
    if frozen:
        freeze_statistics(network)
    sampler = RandomSampler(RESNET48_MINI, 1, 2)
    return trained(ContrastiveModel(network, sampler), accumulate)


def distilled() -> DistillationModel:
    paddle.seed(2)
    network = build_network("resnet48_mini", CLASSES)
    teacher = build_network("resnet48_mini", CLASSES, elastic=False)
    return trained(DistillationModel(network, teacher, RandomSampler(RESNET48_MINI, 3, 3)))


def trained(model, accumulate: int = 1):
    optimizer = momentum_optimizer(model.network, 0.05, 0.9, 1e-4)
    model.prepare(optimizer, gradients=GradientStep(optimizer, accumulate))
    parameters = [p for p in model.network.parameters() if not p.stop_gradient]
    if world_size() > 1:
        model.exchange = GradientExchange(parameters, StopSignals())
    return model


def train(model, epoch: int, step: int) -> None:
    model.epoch, model.step = epoch, step
    parts = batch(step)
    model.train_batch(parts if isinstance(model, ContrastiveModel) else parts[1:])


def gradients_of_one_step(model, step: int) -> dict[str, np.ndarray]:
    """Gradients as the optimizer sees them, and which parameters have none.

    At statistics that do not depend on the batch, so that shares add up exactly.
    """
    norms = [layer for layer in model.network.sublayers() if isinstance(layer, ElasticBatchNorm2D)]
    if not all(norm.frozen for norm in norms):
        for norm in norms:
            norm.train = norm.eval
            norm.eval()
        model.network.train = lambda: None
    seen = {}

    def look():
        for name, parameter in model.network.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.numpy()

    model.optimizer.step = look
    train(model, 1, step)
    return seen


def counted(model, steps: int) -> list[int]:
    """Train; gives the all-reduces of each step."""
    calls = []
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        for step in range(steps):
            all_reduce.reset_mock()
            train(model, 0, step)
            calls.append(all_reduce.call_count)
    return calls


def main(folder: Path) -> None:
    paddle.set_device("cpu")
    join_processes(cpu=True)
    agree([], "no weights, as in pretraining")
    found = {}
    for name, build, steps in (
        ("stage1", contrastive, 12),
        ("accumulated", lambda: contrastive(accumulate=2), 4),
        ("frozen", lambda: contrastive(frozen=True), 3),
        ("stage2", distilled, 12),
    ):
        for key, value in gradients_of_one_step(build(), 3).items():
            found[f"{name} gradient {key}"] = value
        model = build()
        initial = {key: value.numpy() for key, value in model.network.state_dict().items()}
        found[f"{name} calls"] = np.array(counted(model, steps))
        for key, value in model.network.state_dict().items():
            found[f"{name} state {key}"] = value.numpy()
            found[f"{name} moved {key}"] = np.array(not np.array_equal(initial[key], value.numpy()))
    np.savez(folder / f"{rank()}of{world_size()}.npz", **found)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
