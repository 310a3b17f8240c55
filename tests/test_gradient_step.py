"""Accumulation and clipping against whole batches and numpy."""

import numpy as np
import paddle
import pytest
from paddle import nn

from hnas.base.errors import UserError
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI
from hnas.utils.gradient_step import GradientStep, momentum_optimizer
from hnas.utils.hapi_wrapper import DistillationModel
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.options import Options
from hnas.utils.runtime import start
from hnas.utils.SampleMethod import LargestSampler, RandomSampler
from hnas.utils.training import prepare


def distillation(accumulate):
    paddle.seed(0)
    network = build_network("resnet48_mini", 10)
    teacher = build_network("resnet48_mini", 10, elastic=False)
    model = DistillationModel(network, teacher, RandomSampler(RESNET48_MINI, 1, 2))
    optimizer = momentum_optimizer(network, 0.01, 0.9, 1e-4)
    model.prepare(optimizer, gradients=GradientStep(optimizer, accumulate))
    return model


def contrastive(accumulate):
    paddle.seed(0)
    network = build_network("resnet48pinasv2_mini", 10, queue_size=16)
    model = ContrastiveModel(network, LargestSampler(RESNET48_MINI, 2))
    optimizer = momentum_optimizer(network, 0.01, 0.9, 1e-4)
    model.prepare(optimizer, gradients=GradientStep(optimizer, accumulate))
    return model


@pytest.mark.parametrize("build", [distillation, contrastive])
def test_accumulated_parts_equal_the_whole_batch(build):
    """Without batch statistics, which differ: BatchNorm is kept at its running ones."""
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    second = np.arange(8) if build is distillation else images[::-1].copy()
    logs, states = [], []
    for accumulate in (1, 4):
        model = build(accumulate)
        model.network.train = model.network.eval
        logs.append(model.train_batch([paddle.to_tensor(images), paddle.to_tensor(second)]))
        states.append({n: t.numpy().copy() for n, t in model.network.state_dict().items()})
    for key in ("loss", "top1"):
        assert float(logs[0][key]) == pytest.approx(float(logs[1][key]), rel=1e-5)
    assert logs[0]["arch"] == logs[1]["arch"]
    for (code, whole), (other, parts) in zip(logs[0]["parts"], logs[1]["parts"], strict=True):
        assert code == other and float(whole) == pytest.approx(float(parts), rel=1e-5)
    for name, value in states[0].items():
        np.testing.assert_allclose(states[1][name], value, atol=1e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipped_step_is_that_of_numpy(limit):
    paddle.seed(3)
    layer = nn.Linear(4, 3)
    before = [p.numpy().copy() for p in layer.parameters()]
    update = GradientStep(momentum_optimizer(layer, 0.1, 0.0, 0.0, clip_norm=limit))
    x = paddle.randn([5, 4])
    update.backward((layer(x) ** 2).sum())
    gradients = [p.grad.numpy().copy() for p in layer.parameters()]
    update.step()
    norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in gradients))
    assert 0.5 < norm < 100
    factor = min(1.0, limit / norm)
    for tensor, old, gradient in zip(layer.parameters(), before, gradients, strict=True):
        np.testing.assert_allclose(tensor.numpy(), old - 0.1 * factor * gradient, rtol=1e-5)
        assert tensor.grad is None


def test_batches_that_cannot_be_split_are_refused():
    update = GradientStep(None, accumulate=3)
    with pytest.raises(UserError, match="batch of 8 .* 3"):
        update.parts(paddle.zeros([8, 2]))
    with pytest.raises(UserError, match="--accumulate 3"):
        prepare(distillation(1), Options(batch_size=8, accumulate=3), 10)


def test_training_in_half_precision_only_is_refused():
    with pytest.raises(UserError, match="O1"):
        prepare(distillation(1), Options(batch_size=8, amp="O2"), 10)


def test_mixed_precision_is_refused_on_a_cpu():
    with pytest.raises(UserError, match="--amp O1 needs a GPU"):
        start(Options(device="cpu", amp="O1"))


@pytest.mark.parametrize("build", [distillation, contrastive])
def test_a_step_copies_nothing_to_the_device_but_its_batch(build, monkeypatch):
    """On a GPU each such copy is a wait; counted here by what makes tensors of Python values."""
    model = build(accumulate=1)
    rng = np.random.default_rng(0)
    images = [paddle.to_tensor(rng.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)) for _ in "ab"]
    batch = [images[0], paddle.arange(8)] if build is distillation else [*images, paddle.arange(8)]
    model.train_batch(batch)

    def refuse(*_, **__):
        raise AssertionError("a tensor was made of Python values")

    monkeypatch.setattr(paddle, "to_tensor", refuse)
    for name in ("numpy", "item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(paddle.Tensor, name, refuse)
    model.train_batch(batch)
