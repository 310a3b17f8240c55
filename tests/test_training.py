"""Stage two's step against gradients of an independent network, and the recipe's schedules."""

import math
from types import SimpleNamespace

import independent
import numpy as np
import paddle
import pytest
from independent import first_place_size, log_softmax, normalized
from paddle.nn import functional as F  # noqa: N812

from hnas.base.errors import UserError
from hnas.evaluation.reference import evaluate_reference
from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI
from hnas.utils.gradient_step import learning_rate, momentum_optimizer, swinging_rate
from hnas.utils.hapi_wrapper import (
    DistillationModel,
    StandaloneModel,
    distillation_loss,
    relative_sizes,
)
from hnas.utils.options import Options
from hnas.utils.SampleMethod import LargestSampler, RandomSampler, SandwichSampler
from hnas.utils.training import prepare

CLASSES, RATE, MOMENTUM, DECAY = 10, 0.05, 0.9, 1e-3


def batch(seed, size=16):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, size)


def test_distillation_loss_is_both_cross_entropies():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 6, CLASSES))
    labels = rng.integers(0, CLASSES, 6)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    q = np.exp(teacher) / np.exp(teacher).sum(1, keepdims=True)
    hard = -log_p[np.arange(6), labels].mean()
    soft = -(q * log_p).sum(1).mean()
    arguments = paddle.to_tensor(logits), paddle.to_tensor(labels)
    assert float(distillation_loss(*arguments, None)) == pytest.approx(hard, rel=1e-6)
    both = distillation_loss(*arguments, paddle.to_tensor(q))
    assert float(both) == pytest.approx(hard + soft, rel=1e-6)


@pytest.mark.parametrize(
    ("expand", "frozen"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_a_step_equals_independent_gradients(expand, frozen):
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
    for network in (net, teacher):
        network.to(dtype="float64")
    sampler = RandomSampler(RESNET48_MINI, seed=1, number=3, tilt=1.0)
    weights = relative_sizes(RESNET48_MINI) if expand else None
    model = DistillationModel(net, teacher, sampler, weights)
    model.prepare(momentum_optimizer(net, RATE, MOMENTUM, DECAY))
    images, labels = batch(5)
    before = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}

    # The step in float64: normalisation gives float32 images.
    model.network.forward = lambda x, run=net.forward: run(x.astype("float64"))
    teacher.forward = lambda x, run=teacher.forward: run(x.astype("float64"))
    model.epoch, model.step = 2, 3
    logs = model.train_batch([paddle.to_tensor(images), paddle.to_tensor(labels)])

    x = paddle.to_tensor(normalized(images)).astype("float64")
    codes = [arch.code for arch in sampler.sample(2, 3)]
    assert logs["arch"] == codes[-1] and len(set(codes)) == 3
    trained = {name for name, p in net.named_parameters() if not p.stop_gradient}
    state = {name: tensor.clone() for name, tensor in before.items()}
    for name in trained:
        state[name].stop_gradient = False
    with paddle.no_grad():
        targets = F.softmax(teacher(x))
    sizes = np.array([first_place_size(code) for code in (*codes, RESNET48_MINI.largest().code)])
    factors = sizes[:3] / sizes[3] if expand else np.ones(3)
    assert not expand or 0.5 < factors.min() < factors.max() < 1
    y = paddle.to_tensor(labels)
    losses = []
    for code, factor in zip(codes, factors, strict=True):
        logits = independent.forward(state, code, x, (20, 32, 64, 128), 1, not frozen)
        log_p = F.log_softmax(logits)
        picked = paddle.take_along_axis(log_p, y.unsqueeze(1), 1)
        loss = -float(factor) * (picked.mean() + (targets * log_p).sum(1).mean())
        loss.backward()
        losses.append(float(loss))
    np.testing.assert_allclose([float(loss) for _, loss in logs["parts"]], losses, rtol=1e-6)
    after = net.state_dict()
    for part in ("_mean", "_variance"):
        name = f"blocks.0.bn.{part}"
        assert np.array_equal(after[name].numpy(), before[name].numpy()) == frozen
    if frozen:
        statistics = [name for name in before if name.endswith(("_mean", "_variance"))]
        assert len(statistics) > 90
        for name in statistics:
            np.testing.assert_array_equal(after[name].numpy(), before[name].numpy(), err_msg=name)
        assert not np.allclose(after["blocks.0.bn.weight"].numpy(), 1, atol=1e-6)
        assert not np.allclose(after["blocks.0.bn.bias"].numpy(), 0, atol=1e-6)
    moved = 0
    for name in trained:
        old, gradient = before[name].numpy(), state[name].grad
        expected = old
        if gradient is not None:  # a block that no sub-network used stays as it is
            expected = old - RATE * (gradient.numpy() + DECAY * old)
            moved += 1
        np.testing.assert_allclose(
            net.state_dict()[name].numpy(), expected, atol=2e-6, rtol=1e-5, err_msg=name
        )
    assert moved > 100


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature_softens_both_sides_and_keeps_the_gradients_size(temperature):
    rng = np.random.default_rng(1)
    logits, teacher = rng.normal(scale=2, size=(2, 6, CLASSES))
    labels = rng.integers(0, CLASSES, 6)

    def softmax(values):
        return np.exp(values) / np.exp(values).sum(1, keepdims=True)

    q, p = softmax(teacher / temperature), softmax(logits / temperature)
    hard = -np.log(softmax(logits)[np.arange(6), labels]).mean()
    soft = -(temperature**2) * (q * np.log(p)).sum(1).mean()
    student = paddle.to_tensor(logits)
    student.stop_gradient = False
    loss = distillation_loss(student, paddle.to_tensor(labels), paddle.to_tensor(q), temperature)
    assert float(loss) == pytest.approx(hard + soft, rel=1e-6)
    loss.backward()
    # By hand: d hard = p1 - onehot, d soft = T (p - q), both over N.
    expected = softmax(logits) - np.eye(CLASSES)[labels] + temperature * (p - q)
    np.testing.assert_allclose(student.grad.numpy(), expected / 6, atol=1e-7)


def test_losses_of_a_softened_step_equal_independent_ones():
    temperature = 3.0
    paddle.seed(9)
    net = build_network("resnet48_mini", CLASSES)
    teacher = build_network("resnet48_mini", CLASSES, elastic=False)
    # In float64, since new networks amplify rounding; normalisation gives float32 images.
    for network in (net, teacher):
        network.to(dtype="float64")
        network.forward = lambda x, run=network.forward: run(x.astype("float64"))
    sampler = SandwichSampler(RESNET48_MINI, seed=2, number=3)
    model = DistillationModel(net, teacher, sampler, temperature=temperature)
    model.prepare(momentum_optimizer(net, RATE, MOMENTUM, DECAY))
    images, labels = batch(11)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = paddle.to_tensor(normalized(images)).astype("float64")
    teacher.eval()
    with paddle.no_grad():
        q = np.exp(log_softmax(teacher(x).numpy() / temperature))
        expected = []
        for arch in sampler.sample(0, 0):
            logits = independent.forward(state, arch.code, x, (20, 32, 64, 128), 1, True).numpy()
            hard = -log_softmax(logits)[np.arange(16), labels].mean()
            soft = -(temperature**2) * (q * log_softmax(logits / temperature)).sum(1).mean()
            expected.append(hard + soft)
    logs = model.train_batch([paddle.to_tensor(images), paddle.to_tensor(labels)])
    codes = [code for code, _ in logs["parts"]]
    assert codes[:2] == [RESNET48_MINI.largest().code, RESNET48_MINI.smallest().code]
    np.testing.assert_allclose([float(loss) for _, loss in logs["parts"]], expected, rtol=1e-5)


def test_teacher_never_changes():
    paddle.seed(6)
    net = build_network("resnet48_mini", CLASSES)
    teacher = build_network("resnet48_mini", CLASSES, elastic=False)
    before = {name: tensor.numpy().copy() for name, tensor in teacher.state_dict().items()}
    model = DistillationModel(net, teacher, RandomSampler(RESNET48_MINI, 0, 2))
    model.prepare(momentum_optimizer(net, RATE, MOMENTUM, DECAY))
    for step in range(2):
        model.step = step
        model.train_batch([paddle.to_tensor(part) for part in batch(step)])
    assert not teacher.training
    for name, tensor in teacher.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])
    assert not any("teacher" in name for name in net.state_dict())


def test_evaluating_a_subnetwork_leaves_the_supernet_alone():
    paddle.seed(7)
    net = build_network("resnet48_mini", CLASSES)
    images, labels = batch(8)
    before = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    loader = [(paddle.to_tensor(images), paddle.to_tensor(labels))]
    arch = RESNET48_MINI.smallest()
    plain = evaluate_reference(net, [arch], loader).accuracy()
    calibrated = evaluate_reference(net, [arch], loader, paddle.to_tensor(images)).accuracy()
    alone = net.extract(arch)
    x = paddle.to_tensor(normalized(images))
    for training, accuracy in ((False, plain), (True, calibrated)):
        alone.train() if training else alone.eval()  # the calibration images are the batch
        hits = alone(x).numpy().argmax(1) == labels
        assert accuracy == pytest.approx(hits.mean())
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name], err_msg=name)


def test_learning_rate_warms_up_then_follows_a_cosine():
    schedule = learning_rate(0.0008, total_batch=512, warmup_steps=10, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(schedule())
        schedule.step()
    peak = 0.0016
    np.testing.assert_allclose(rates[:10], [peak * (i + 1) / 10 for i in range(10)])
    cosine = [peak * 0.5 * (1 + math.cos(math.pi * i / 90)) for i in range(90)]
    np.testing.assert_allclose(rates[10:], cosine)


def test_learning_rate_can_be_warm_up_only():
    """Stage two's recipe: five epochs, five of them warm-up."""
    schedule = learning_rate(0.0005, total_batch=256, warmup_steps=4, total_steps=4)
    rates = []
    for _ in range(4):
        rates.append(schedule())
        schedule.step()
    np.testing.assert_allclose(rates, [0.000125, 0.00025, 0.000375, 0.0005])
    with pytest.raises(UserError, match="no steps"):
        learning_rate(0.1, 256, 0, 0)


def rates_of(schedule, number):
    rates = []
    for _ in range(number):
        rates.append(schedule())
        schedule.step()
    return rates


def test_the_swing_is_the_cosine_of_public_code_stepped_per_batch():
    """Paddle's cosine, made for epochs, whose half period is the number of epochs."""
    peak = 0.0008 * 512 / 256
    theirs = rates_of(paddle.optimizer.lr.CosineAnnealingDecay(peak, T_max=10), 65)
    ours = rates_of(swinging_rate(0.0008, total_batch=512, half_period=10), 65)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert ours[0] == ours[20] == peak and ours[10] == pytest.approx(0, abs=1e-12)
    assert np.mean(ours[:20]) == pytest.approx(peak / 2)


@pytest.mark.parametrize("position", [3, 10, 27])
def test_a_resumed_swing_goes_on(position):
    whole = rates_of(swinging_rate(0.1, 256, 10), 50)
    resumed = swinging_rate(0.1, 256, 10)
    resumed.step(position)
    np.testing.assert_array_equal(rates_of(resumed, 50 - position), whole[position:])
    # From a state, as optimizers save it, too.
    before = swinging_rate(0.1, 256, 10)
    rates_of(before, position)
    restored = swinging_rate(0.1, 256, 10)
    restored.set_state_dict(before.state_dict())
    np.testing.assert_array_equal(rates_of(restored, 50 - position), whole[position:])


def test_flags_choose_the_schedule():
    """Of the swing neither warm-up nor the number of steps matters, only epochs."""
    model = SimpleNamespace(network=paddle.nn.Linear(1, 1))
    model.prepare = lambda optimizer, *_: setattr(model, "optimizer", optimizer)
    found = {}
    for name in ("swing", "cosine"):
        options = Options(lr=0.1, batch_size=64, warmup=2, max_epoch=4, lr_schedule=name)
        prepare(model, options, steps_per_epoch=5)
        found[name] = rates_of(model.optimizer._learning_rate, 20)
    peak = 0.1 * 64 / 256
    swing = [peak * math.cos(math.pi * step / 8) ** 2 for step in range(20)]
    np.testing.assert_allclose(found["swing"], swing, atol=1e-12)
    cosine = [peak * math.cos(math.pi * step / 20) ** 2 for step in range(10)]
    np.testing.assert_allclose(found["cosine"][10:], cosine, atol=1e-12)
    np.testing.assert_allclose(found["cosine"][:10], [peak * (i + 1) / 10 for i in range(10)])


# --- what flags add


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_only_the_first_subnetwork_sees_labels_and_it_teaches_the_others(temperature):
    paddle.seed(9)
    net = build_network("resnet48_mini", CLASSES)
    # In float64, since new networks amplify rounding; normalisation gives float32 images.
    net.to(dtype="float64")
    net.forward = lambda x, run=net.forward: run(x.astype("float64"))
    sampler = SandwichSampler(RESNET48_MINI, seed=2, number=3)
    model = DistillationModel(net, None, sampler, temperature=temperature, in_place=True)
    model.prepare(paddle.optimizer.SGD(0.1, parameters=net.parameters()))
    images, labels = batch(11)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = paddle.to_tensor(normalized(images)).astype("float64")
    expected, teacher = [], None
    with paddle.no_grad():
        for arch in sampler.sample(0, 0):
            logits = independent.forward(state, arch.code, x, (20, 32, 64, 128), 1, True).numpy()
            softened = log_softmax(logits / temperature)
            if teacher is None:
                loss = -log_softmax(logits)[np.arange(16), labels].mean()
                teacher = np.exp(softened)
            else:
                loss = -(temperature**2) * (teacher * softened).sum(1).mean()
            expected.append(loss)
    logs = model.train_batch([paddle.to_tensor(images), paddle.to_tensor(labels)])
    codes = [code for code, _ in logs["parts"]]
    assert codes[:2] == [RESNET48_MINI.largest().code, RESNET48_MINI.smallest().code]
    np.testing.assert_allclose([float(loss) for _, loss in logs["parts"]], expected, rtol=1e-5)


def test_a_teacher_in_place_gets_no_gradient_from_its_pupils():
    """With a pupil or without, what only the largest network has gets the same gradient."""
    gradients = []
    for subnetworks in (1, 2):
        paddle.seed(12)
        net = build_network("resnet48_mini", CLASSES)
        sampler = SandwichSampler(RESNET48_MINI, 0, subnetworks)
        model = DistillationModel(net, None, sampler, in_place=True)
        before = {name: p.numpy().copy() for name, p in net.named_parameters()}
        model.prepare(paddle.optimizer.SGD(0.1, parameters=net.parameters()))
        model.train_batch([paddle.to_tensor(part) for part in batch(13)])
        gradients.append({name: p.numpy() - before[name] for name, p in net.named_parameters()})
    # Of a filter [out, in, 3, 3] the smallest network has the first 70 to 90 % each way.
    own, shared = 0, 0
    for name, alone in gradients[0].items():
        if alone.ndim == 4 and name.startswith("blocks.") and alone.shape[0] > 90:
            corner = np.s_[-1, -1]
            np.testing.assert_allclose(gradients[1][name][corner], alone[corner], atol=1e-6)
            own += np.abs(alone[corner]).max() > 1e-6
            shared += np.abs(gradients[1][name][0, 0] - alone[0, 0]).max() > 1e-6
    assert own > 3 and shared > 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_spreads_a_share_over_all_classes(smoothing):
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2, size=(6, CLASSES))
    labels = rng.integers(0, CLASSES, 6)
    target = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
    student = paddle.to_tensor(logits)
    student.stop_gradient = False
    loss = distillation_loss(student, paddle.to_tensor(labels), None, 1.0, smoothing)
    assert float(loss) == pytest.approx(-(target * log_softmax(logits)).sum(1).mean(), rel=1e-6)
    loss.backward()
    gradient = (np.exp(log_softmax(logits)) - target) / 6
    np.testing.assert_allclose(student.grad.numpy(), gradient, atol=1e-7)


def test_models_smooth_labels_and_leave_the_teacher_alone():
    """The loss that a step logs, against NumPy on the network's own logits."""
    paddle.seed(5)
    net = build_network("resnet48_mini", CLASSES)
    teacher = build_network("resnet48_mini", CLASSES, elastic=False)
    plain = net.extract(RESNET48_MINI.largest())
    images, labels = batch(4)
    tensors = [paddle.to_tensor(images), paddle.to_tensor(labels)]
    x = paddle.to_tensor(normalized(images))
    target = 0.8 * np.eye(CLASSES)[labels] + 0.2 / CLASSES
    log_p = log_softmax(plain(x).numpy().astype(float))
    hard = -(target * log_p).sum(1).mean()

    def loss_of(model):
        model.prepare(paddle.optimizer.SGD(0.0, parameters=model.network.parameters()))
        return float(model.train_batch(tensors)["loss"])

    alone = StandaloneModel(plain, "code", label_smoothing=0.2)
    assert loss_of(alone) == pytest.approx(hard, rel=1e-4)
    teacher.eval()
    soft = -(np.exp(log_softmax(teacher(x).numpy())) * log_p).sum(1).mean()
    taught = DistillationModel(net, teacher, LargestSampler(RESNET48_MINI), label_smoothing=0.2)
    assert loss_of(taught) == pytest.approx(hard + soft, rel=1e-4)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("spared", [False, True])
@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_steps_of_the_optimizer_are_those_of_numpy(nesterov, spared, limit):
    """Penalties on vectors or not, Nesterov or not, with all gradients clipped together or not."""
    paddle.seed(3)
    layers = paddle.nn.Sequential(paddle.nn.Conv2D(3, 4, 2), paddle.nn.BatchNorm2D(4))
    layers[1].weight.set_value(paddle.to_tensor([1.5, 0.5, 2.0, 1.0]))
    trained = [p for p in layers.parameters() if not p.stop_gradient]
    assert sorted(p.ndim for p in trained) == [1, 1, 1, 4]
    values = [p.numpy().astype(float) for p in trained]
    velocities = [np.zeros_like(value) for value in values]
    optimizer = momentum_optimizer(layers, RATE, MOMENTUM, 0.1, limit, nesterov, spared)
    for step in range(3):
        x = paddle.to_tensor(np.random.default_rng(step).normal(size=(5, 3, 3, 3)), "float32")
        (layers(x) ** 2).sum().backward()
        gradients = [p.grad.numpy().astype(float) for p in trained]
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        factor = min(1.0, limit / norm) if limit else 1.0
        assert not limit or factor < 1
        for i, gradient in enumerate(gradients):
            decay = 0.0 if spared and values[i].ndim == 1 else 0.1
            total = factor * gradient + decay * values[i]
            velocities[i] = MOMENTUM * velocities[i] + total
            values[i] -= RATE * (total + MOMENTUM * velocities[i] if nesterov else velocities[i])
        optimizer.step()
        optimizer.clear_grad()
        for parameter, value in zip(trained, values, strict=True):
            np.testing.assert_allclose(parameter.numpy(), value, rtol=1e-4, atol=1e-5)


def test_flags_reach_the_optimizer():
    """With no gradient only the penalty moves a weight; it moves no vector if they say so."""
    for spared in (False, True):
        paddle.seed(1)
        layer = paddle.nn.Linear(2, 2)
        layer.bias.set_value(paddle.ones([2]))
        model = SimpleNamespace(network=layer)
        model.prepare = lambda optimizer, *_, model=model: setattr(model, "optimizer", optimizer)
        options = Options(lr=1.0, batch_size=256, warmup=0, no_norm_decay=spared, nesterov=True)
        options.weight_decay = 0.5
        prepare(model, options, steps_per_epoch=5)
        before = layer.weight.numpy()
        (0 * layer(paddle.ones([1, 2]))).sum().backward()
        model.optimizer.step()
        # Nesterov's first step is (1 + momentum) times as long.
        np.testing.assert_allclose(layer.weight.numpy(), before * (1 - 1.9 * 0.5), rtol=1e-5)
        np.testing.assert_allclose(layer.bias.numpy(), 1.0 if spared else 0.05, rtol=1e-5)
