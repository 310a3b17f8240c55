"""The loops that speed_training compares are the same computation; its figures add up."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from hnas.bench import speed_training
from hnas.bench.speed_training_worker import calm, settle
from hnas.bench.straightforward import (
    StraightforwardContrast,
    StraightforwardDistillation,
    with_paddleslim_norms,
)
from hnas.models.elastic import ElasticBatchNorm2D, freeze_statistics
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI
from hnas.utils.gradient_step import momentum_optimizer
from hnas.utils.hapi_wrapper import DistillationModel
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FirstPlaceSampler, LargestSampler

ROOT = Path(__file__).resolve().parents[1]


def trained(kind, stage, frozen):
    """State after two steps on 16 images."""
    paddle.seed(0)
    if stage == 2:
        network = build_network("resnet48_mini", 10)
        teacher = build_network("resnet48_mini", 10, elastic=False)
        calm(network)
        settle(network, 32)
        model = kind(network, teacher, FirstPlaceSampler(RESNET48_MINI, 1, 3, candidates=20))
    else:
        network = build_network("resnet48pinasv2_mini", 10, queue_size=32)
        calm(network.backbone)
        settle(network.backbone, 32)
        network.reset_key_encoder()
        model = kind(network, LargestSampler(RESNET48_MINI, 2))
    if frozen:
        freeze_statistics(network)
    if kind in (StraightforwardContrast, StraightforwardDistillation):
        with_paddleslim_norms(network)
        assert not any(isinstance(layer, ElasticBatchNorm2D) for layer in network.sublayers())
    model.prepare(momentum_optimizer(network, 0.01, 0.9, 1e-4))
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (2, 16, 3, 32, 32), dtype=np.uint8)
    second = rng.integers(0, 10, 16) if stage == 2 else images[1]
    losses = []
    for model.step in range(2):
        logs = model.train_batch([paddle.to_tensor(images[0]), paddle.to_tensor(second)])
        losses.append(float(logs["loss"]))
    return losses, {name: tensor.numpy() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("stage", "ours", "straightforward"),
    [
        (1, ContrastiveModel, StraightforwardContrast),
        (2, DistillationModel, StraightforwardDistillation),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_the_straightforward_loop_is_the_same_computation(stage, ours, straightforward, frozen):
    losses, state = trained(ours, stage, frozen)
    other_losses, other = trained(straightforward, stage, frozen)
    np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
    assert state.keys() == other.keys()
    for name, value in state.items():
        np.testing.assert_allclose(value, other[name], atol=1e-4, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_the_bench_prints_a_line_a_stage():
    flags = {
        "--batch_size": 8,
        "--rounds": 1,
        "--steps": 1,
        "--curve_steps": 2,
        "--num_workers": 0,
        "--control": True,
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hnas.bench.speed_training",
            *(str(x) for f in flags.items() for x in f),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["stage"] for line in lines] == [1, 2]
    for line in lines:
        assert line["largest_relative_loss_difference"] < 1e-3
        assert line["largest_relative_loss_difference_of_control"] < 1e-3
        speeds = [line[f"{kind}_sample_forwards_per_s"] for kind in ("ours", "straightforward")]
        assert line["ratio"] == pytest.approx(speeds[0] / speeds[1], abs=0.05)
        assert sum(line["ours_shares"].values()) == pytest.approx(1, abs=0.01)


def test_loaders_can_be_timed_alone(capsys):
    small = ["--batch_size", "4", "--rounds", "1", "--steps", "1", "--num_workers", "0"]
    speed_training.main([*small, "--stages", "1", "--loader_only", "True"])
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "ratio" not in line
    assert line["ours_loader_images_per_s"] > 0 < line["straightforward_loader_images_per_s"]
