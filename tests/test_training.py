"""Steps of training: stage two's against an independent network's, the optimizer's, schedules."""

import math
from types import SimpleNamespace

import independent
import numpy as np
import paddle
import pytest
from independent import first_place_size, normalized
from paddle.nn import functional as F  # noqa: N812

from hnas.base.errors import UserError
from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import build_network
from hnas.programs.flags import AUTO
from hnas.programs.options import Options
from hnas.search_space import RESNET48_MINI
from hnas.utils.hapi_wrapper import (
    DistillationModel,
    GradientStep,
    momentum_optimizer,
    relative_sizes,
)
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FixedSampler, RandomSampler, SandwichSampler
from hnas.utils.training import TrainLogger, prepare

CLASSES, RATE, MOMENTUM, DECAY = 10, 0.05, 0.9, 1e-3


def batch(seed, size=16):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, size)


def tensors(arrays):
    return [paddle.to_tensor(array) for array in arrays]


@pytest.mark.parametrize(
    ("expand", "frozen", "in_place"),
    [(False, False, False), (True, True, False), (False, False, True)],
)
def test_a_step_equals_independent_gradients(expand, frozen, in_place):
    """In place the first sub-network alone sees labels, and gets no gradient from its pupils."""
    paddle.seed(4)
    net = build_network("resnet48_mini", CLASSES)
    teacher = build_network("resnet48_mini", CLASSES, elastic=False)
    if frozen:
        rng = np.random.default_rng(8)
        for name, tensor in net.state_dict().items():
            if name.endswith("_mean"):
                tensor.set_value(rng.normal(0, 0.3, tensor.shape).astype("float32"))
            elif name.endswith("_variance"):
                tensor.set_value(rng.uniform(0.5, 1.5, tensor.shape).astype("float32"))
            elif name.endswith("bn2.weight"):  # else nothing keeps the blocks from growing
                tensor.set_value(rng.uniform(0.05, 0.2, tensor.shape).astype("float32"))
        freeze_statistics(net)
    for each in (net, teacher):  # new networks amplify rounding
        each.to(dtype="float64")
        each.forward = lambda x, run=each.forward: run(x.astype("float64"))
    sampler = (SandwichSampler if in_place else RandomSampler)(RESNET48_MINI, seed=1, number=3)
    weights = relative_sizes(RESNET48_MINI) if expand else None
    model = DistillationModel(net, None if in_place else teacher, sampler, weights, in_place)
    model.prepare(momentum_optimizer(net, RATE, MOMENTUM, DECAY))
    images, labels = batch(5)
    before = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    taught_by = {name: tensor.numpy().copy() for name, tensor in teacher.state_dict().items()}
    model.epoch, model.step = 2, 3
    logs = model.train_batch(tensors([images, labels]))
    assert teacher.training == in_place and not any("teacher" in name for name in net.state_dict())
    for name, tensor in teacher.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), taught_by[name])

    x = paddle.to_tensor(normalized(images)).astype("float64")
    codes = [arch.code for arch in sampler.sample(2, 3)]
    assert logs["arch"] == codes[-1] and len(set(codes)) == 3
    trained = {name for name, p in net.named_parameters() if not p.stop_gradient}
    state = {name: tensor.clone() for name, tensor in before.items()}
    for name in trained:
        state[name].stop_gradient = False
    with paddle.no_grad():
        targets = None if in_place else F.softmax(teacher(x))
    sizes = np.array([first_place_size(code) for code in (*codes, RESNET48_MINI.largest().code)])
    factors = sizes[:3] / sizes[3] if expand else np.ones(3)
    assert not expand or 0.4 < factors.min() < factors.max() < 1
    y = paddle.to_tensor(labels)
    losses = []
    for code, factor in zip(codes, factors, strict=True):
        logits = independent.forward(state, code, x, (20, 32, 64, 128), 1, not frozen)
        log_p = F.log_softmax(logits)
        picked = paddle.take_along_axis(log_p, y.unsqueeze(1), 1)
        parts = [] if in_place and losses else [picked.mean()]
        parts += [] if targets is None else [(targets * log_p).sum(1).mean()]
        loss = -float(factor) * sum(parts)
        loss.backward()
        targets = F.softmax(logits.detach()) if targets is None else targets
        losses.append(float(loss))
    np.testing.assert_allclose([float(loss) for _, loss in logs["parts"]], losses, rtol=1e-6)
    after = net.state_dict()
    statistics = [name for name in before if name.endswith(("_mean", "_variance"))]
    assert len(statistics) > 90
    same = [np.array_equal(after[name].numpy(), before[name].numpy()) for name in statistics]
    assert all(same) if frozen else not any(same[:2])
    moved, squares = 0, 0.0
    for name in trained:
        old, gradient = before[name].numpy(), state[name].grad
        expected = old
        if gradient is not None:  # a block that no sub-network used stays as it is
            squares += float((gradient.numpy() ** 2).sum())
            expected = old - RATE * (gradient.numpy() + DECAY * old)
            moved += 1
        np.testing.assert_allclose(
            after[name].numpy(), expected, atol=2e-6, rtol=1e-5, err_msg=name
        )
    assert moved > 100
    assert float(logs["norm"]) == pytest.approx(squares**0.5, rel=1e-6)


def test_blocks_that_a_step_does_not_run_are_left_alone():
    """Else a step would depend on which blocks ran before, which no checkpoint tells."""
    paddle.seed(0)
    net = build_network("resnet48_mini", CLASSES)
    model = DistillationModel(net, None, FixedSampler(RESNET48_MINI.largest()))
    model.prepare(momentum_optimizer(net, RATE, MOMENTUM, weight_decay=0.1))
    model.train_batch(tensors(batch(1, 4)))
    before = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    model.sampler = SimpleNamespace(sample=lambda epoch, step: [RESNET48_MINI.smallest()])
    model.train_batch(tensors(batch(1, 4)))
    active = {id(p) for block in net.active_blocks() for p in block.parameters()}
    blocks = [block for stage in range(4) for block in net.stage_blocks(stage)]
    inactive = {id(p) for block in blocks for p in block.parameters()} - active
    assert inactive
    for name, tensor in net.named_parameters():
        same = np.array_equal(tensor.numpy(), before[name])
        assert same == (id(tensor) in inactive), name


def distillation(accumulate):
    network = build_network("resnet48_mini", CLASSES)
    teacher = build_network("resnet48_mini", CLASSES, elastic=False)
    model = DistillationModel(network, teacher, RandomSampler(RESNET48_MINI, 1, 2))
    return prepared(model, accumulate)


def contrastive(accumulate):
    network = build_network("resnet48pinasv2_mini", CLASSES, queue_size=16)
    return prepared(ContrastiveModel(network, FixedSampler(RESNET48_MINI.largest(), 2)), accumulate)


def prepared(model, accumulate):
    optimizer = momentum_optimizer(model.network, 0.01, MOMENTUM, 1e-4)
    model.prepare(optimizer, GradientStep(optimizer, accumulate))
    return model


@pytest.mark.parametrize("build", [distillation, contrastive])
def test_accumulated_parts_equal_the_whole_batch(build):
    """Without batch statistics, which differ: BatchNorm is kept at its running ones."""
    images, _ = batch(2, 8)
    second = np.arange(8) if build is distillation else images[::-1].copy()
    logs, states = [], []
    for accumulate in (1, 4):
        paddle.seed(0)
        model = build(accumulate)
        model.network.train = model.network.eval
        logs.append(model.train_batch(tensors([images, second])))
        states.append({n: t.numpy().copy() for n, t in model.network.state_dict().items()})
    for key in ("loss", "top1"):
        assert float(logs[0][key]) == pytest.approx(float(logs[1][key]), rel=1e-5)
    assert logs[0]["arch"] == logs[1]["arch"]
    for (code, whole), (other, parts) in zip(logs[0]["parts"], logs[1]["parts"], strict=True):
        assert code == other and float(whole) == pytest.approx(float(parts), rel=1e-5)
    for name, value in states[0].items():
        np.testing.assert_allclose(states[1][name], value, atol=1e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("build", [distillation, contrastive])
def test_a_step_copies_nothing_to_the_device_but_its_batch(build, monkeypatch):
    """On a GPU each such copy is a wait; counted here by what makes tensors of Python values."""
    model = build(accumulate=1)
    images = tensors(batch(seed, 8)[0] for seed in (0, 1))
    parts = [images[0], paddle.arange(8)] if build is distillation else images
    model.train_batch(parts)

    def refuse(*_, **__):
        raise AssertionError("a tensor was made of Python values")

    monkeypatch.setattr(paddle, "to_tensor", refuse)
    for name in ("numpy", "item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(paddle.Tensor, name, refuse)
    model.train_batch(parts)


def test_what_cannot_be_prepared_is_refused():
    for flags, message in (({"accumulate": 3}, "--accumulate 3"), ({"amp": "O2"}, "O1")):
        with pytest.raises(UserError, match=message):
            prepare(SimpleNamespace(), Options(batch_size=8, **flags), 10)


@pytest.mark.parametrize("limit", [0.0, 0.5, AUTO])
def test_steps_of_the_optimizer_that_flags_describe_are_those_of_numpy(limit):
    """Penalties on everything, with all gradients clipped together or not."""
    paddle.seed(3)
    layers = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 2), paddle.nn.BatchNorm2D(4))
    layers[1].weight.set_value(paddle.to_tensor([1.5, 0.5, 2.0, 1.0]))
    trained = [p for p in layers.parameters() if not p.stop_gradient]
    assert sorted(p.ndim for p in trained) == [1, 1, 1, 4]
    values = [p.numpy().astype(float) for p in trained]
    velocities = [np.zeros_like(value) for value in values]
    model = SimpleNamespace(network=layers)
    model.prepare = lambda optimizer, gradients: setattr(model, "gradients", gradients)
    options = Options(lr=RATE, batch_size=256, warmup=0, lr_schedule="swing", max_epoch=10**6)
    options.momentum, options.weight_decay, options.clip_norm = MOMENTUM, 0.1, limit
    prepare(model, options, steps_per_epoch=5)
    if limit == AUTO:  # a step moves weights by a thousandth at most
        limit = 1e-3 * np.sqrt(sum((value**2).sum() for value in values)) / RATE
    for step in range(3):
        x = paddle.to_tensor(np.random.default_rng(step).normal(size=(5, 3, 3, 3)), "float32")
        model.gradients.backward((layers(x) ** 2).sum())
        gradients = [p.grad.numpy().astype(float) for p in trained]
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        assert float(model.gradients.norm()) == pytest.approx(norm, rel=1e-5)
        factor = min(1.0, limit / norm) if limit else 1.0
        assert not limit or factor < 1
        for i, gradient in enumerate(gradients):
            velocities[i] = MOMENTUM * velocities[i] + factor * gradient + 0.1 * values[i]
            values[i] -= RATE * velocities[i]
        model.gradients.step()
        for parameter, value in zip(trained, values, strict=True):
            np.testing.assert_allclose(parameter.numpy(), value, rtol=1e-4, atol=1e-5)
            assert parameter.grad is None


@pytest.mark.parametrize("accumulate", [1, 4])
def test_norms_of_scaled_losses_are_those_of_the_gradients(accumulate):
    paddle.seed(3)
    layer = paddle.nn.Linear(3, 2)
    step = GradientStep(paddle.optimizer.SGD(RATE, parameters=layer.parameters()), accumulate)
    step.scaler = SimpleNamespace(scale=lambda loss: 1024 * loss)  # a GPU's, for half precision
    (x,) = tensors([np.random.default_rng(1).normal(size=(8, 3)).astype("float32")])
    for (part,) in step.parts(x):
        step.backward(layer(part).square().mean())
    slope = 2 * layer(x).numpy() / 16
    gradients = (x.numpy().T @ slope, slope.sum(0))
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    assert float(step.norm()) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "guess", "warnings"),
    [
        ([(5.1, 101), (4.0, 180), (5.5, 60), (9.0, 900)], 0.0, 0),
        ([(0.01, 0.001), (0.3, 0.5)], 0.0, 0),
        ([(5.1, 101), (68, 900), (70, 950)], 0.0, 1),
        ([(5.1, 101), (5.1, 1100)], 0.0, 1),
        ([(5.1, 101), (5.1, math.inf)], 0.0, 1),
        # steps that float16 skipped
        ([(5.1, math.nan), (5.1, 101), (5.1, math.nan), (5.1, 180)], 0.0, 0),
        ([(5.1, math.nan), (5.1, 101), (5.1, math.nan), (5.1, 1100)], 0.0, 1),
        # stage 1, whose queue is random at first, of 512 keys
        ([(0.3, 4.4), (4.3, 14)], math.log(513), 0),
        ([(0.3, 4.4), (6.3, 14)], math.log(513), 1),
    ],
)
def test_a_run_that_breaks_is_told_once_within_its_epoch(rows, guess, warnings, caplog):
    log = TrainLogger(1, epochs=2, steps=9, batch=1)
    log.guess_loss, log.advice = guess, lambda: "start anew"
    log.begin_epoch(0)
    for step, (loss, norm) in enumerate(rows):
        figures = {"loss": loss, "top1": 0.5, "norm": norm, "lr": 0.1, "waited": 0.0}
        log.end_step(step, {**figures, "arch": "code", "parts": [("code", loss)]})
    told = [message for message in caplog.messages if "training is breaking" in message]
    rising = "training is breaking: loss 68 and gradient norm 900 after 5.1 and 101 at the first"
    assert len(told) == warnings and (rows[1][0] != 68 or told[0].startswith(rising))
    assert all(message.endswith("at the first step; start anew") for message in told)
