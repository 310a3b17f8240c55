"""The plain network, the supernet's slicing, and PaddleSlim's BatchNorm mended."""

from collections import Counter

import independent
import numpy as np
import paddle
import pytest
from entry_scripts import noise_images, run
from paddle import nn
from paddle.quantization import PTQ, QuantConfig
from paddle.quantization.observers import AbsmaxObserver
from paddleslim.nas.ofa.layers import SuperBatchNorm2D

import train_supernet_pinas_stage1 as stage1
import train_supernet_pinas_stage2_simple as stage2
from hnas.base.errors import UserError
from hnas.models.elastic import ElasticBatchNorm2D, ElasticResNet
from hnas.models.pinasv2 import build_network
from hnas.models.resnet import ResNet
from hnas.programs.flags import AUTO
from hnas.programs.options import Options
from hnas.programs.runtime import calibration_number
from hnas.search_space import RESNET48, RESNET48_MINI, Architecture, search_space
from hnas.utils import validation
from hnas.weights.loading import write_state

CLASSES = 10


def randomized(network, seed=0):
    """Give BatchNorms scales, shifts and statistics that a wrong slice would show up in."""
    rng = np.random.default_rng(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith(("_variance", "bn.weight", "bn1.weight", "bn2.weight", "sample.1.weight")):
            tensor.set_value(rng.uniform(0.5, 1.5, tensor.shape).astype("float32"))
        elif tensor.ndim == 1:
            tensor.set_value(rng.normal(0, 0.1, tensor.shape).astype("float32"))
    return network


@pytest.fixture(scope="module")
def mini():
    paddle.seed(1)
    return randomized(ElasticResNet(RESNET48_MINI, CLASSES))


@pytest.fixture(scope="module")
def mini_double(mini):
    """The same supernet in float64, where rounding cannot hide or feign a wrong slice."""
    net = ElasticResNet(RESNET48_MINI, CLASSES)
    net.to(dtype="float64")
    net.set_state_dict({name: t.astype("float64") for name, t in mini.state_dict().items()})
    return net


@pytest.fixture(scope="module")
def images():
    paddle.seed(2)
    return paddle.randn([16, 3, 32, 32])


def largest_difference(logits, expected):
    """Relative to the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def sampled_codes(number, digits, seed):
    rng = np.random.default_rng(seed)
    space = search_space("resnet48_mini", digits)
    return [space.largest().code, space.smallest().code] + [
        space.sample(rng).code for _ in range(number)
    ]


MINI_CODES = sampled_codes(6, "full", 3) + sampled_codes(6, "released", 4)


def state_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("code", MINI_CODES)
@pytest.mark.parametrize("training", [False, True])
def test_subnetworks_active_or_extracted_equal_independent_ones(
    mini, mini_double, images, code, training
):
    arch = Architecture.from_code(code)
    states = {network: state_of(network) for network in (mini, mini_double)}
    for network in states:
        network.train() if training else network.eval()
        network.activate(arch)
    alone = mini.extract(arch)
    assert alone.training is training
    double = images.astype("float64")
    with paddle.no_grad():
        expected = independent.forward(
            states[mini_double], code, double, (20, 32, 64, 128), 1, training
        )
        assert largest_difference(mini_double(double), expected) < 1e-10
        assert largest_difference(alone(images), mini(images)) < 1e-5
    # The training forward moved the statistics of both alike.
    after = mini.sliced_state(arch, alone)
    for name, tensor in alone.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), after[name].numpy(), atol=1e-6, err_msg=name)
    for network, state in states.items():
        network.set_state_dict(state)


@pytest.mark.parametrize("code", MINI_CODES[1:3])
def test_extracted_networks_are_made_of_what_paddles_tools_look_for(mini, code):
    """By exact type, so all are quantized."""
    network = mini.extract(Architecture.from_code(code))
    _, blocks = independent.layers(code, (20, 32, 64, 128), 1)
    projections = sum(stride == 2 for *_, stride in blocks)
    found = Counter(type(layer) for layer in network.sublayers())
    convolutions = 1 + 2 * len(blocks) + projections
    expected = {nn.Conv2D: convolutions, nn.BatchNorm2D: convolutions, nn.Linear: 1}
    assert {kind: found[kind] for kind in expected} == expected
    network.eval()
    observers = dict.fromkeys(("activation", "weight"), AbsmaxObserver())
    quantized = PTQ(QuantConfig(**observers)).quantize(network)
    found = Counter(type(layer).__name__ for layer in quantized.sublayers())
    assert (found["QuantedConv2D"], found["QuantedLinear"]) == (convolutions, 1)


@pytest.mark.slow
def test_full_size_subnetworks_equal_independent_networks():
    paddle.seed(5)
    net = randomized(ElasticResNet(RESNET48, CLASSES))
    net.eval()
    images = paddle.randn([2, 3, 64, 64])
    state = state_of(net)
    for code in sampled_codes(4, "full", 6):
        with paddle.no_grad():
            expected = independent.forward(state, code, images, (64, 128, 256, 512), 8, False)
            net.activate(Architecture.from_code(code))
            assert largest_difference(net(images), expected) < 1e-5
            assert largest_difference(net.extract(net.architecture)(images), expected) < 1e-5


def test_batch_norm_trains_the_active_statistics_also_after_an_evaluation(mini):
    x = paddle.to_tensor(np.random.default_rng(0).normal(2, 3, (8, 4, 5, 5)).astype("float32"))
    norms = SuperBatchNorm2D(6), ElasticBatchNorm2D(6)
    for norm in norms:
        norm.eval()
        norm(x)
        norm.train()
        norm(x)
    own = [layer for layer in mini.sublayers() if isinstance(layer, paddle.nn.BatchNorm2D)]
    assert [type(norm) for norm in own] == [ElasticBatchNorm2D] * (1 + 2 * 23 + 3)
    # PaddleSlim's own layer keeps the statistics that it was evaluated with: the defect.
    assert np.all(norms[0]._mean.numpy() == 0)
    mean, variance = norms[1]._mean.numpy(), norms[1]._variance.numpy()
    data = x.numpy()
    np.testing.assert_allclose(mean[:4], 0.1 * data.mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(variance[:4], 0.9 + 0.1 * data.var((0, 2, 3)), rtol=1e-4)
    assert mean[4:].tolist() == [0, 0] and variance[4:].tolist() == [1, 1]


def test_reorder_keeps_the_function_and_sorts_by_importance():
    paddle.seed(7)
    net = randomized(ResNet(RESNET48_MINI.plan(RESNET48_MINI.largest()), CLASSES))
    images = paddle.randn([4, 3, 32, 32])
    for mode in (net.eval, net.train):
        mode()
        state = state_of(net)
        before = net(images).numpy()
        net.set_state_dict(state)
        net.reorder()
        np.testing.assert_allclose(net(images).numpy(), before, atol=2e-5 * np.abs(before).max())
    for block in net.active_blocks():
        importance = np.abs(block.conv2.weight.numpy()).sum((0, 2, 3))
        assert np.all(np.diff(importance) <= 1e-4)


def test_networks_that_start_as_shortcuts_do_not_depend_on_their_blocks():
    paddle.seed(4)
    network = ResNet(RESNET48_MINI.plan(RESNET48_MINI.smallest()), CLASSES)
    network.start_as_shortcuts()
    images, logits = paddle.randn([2, 3, 32, 32]), []
    for scale in (1, 100):
        for block in network.active_blocks():
            block.conv1.weight.set_value(block.conv1.weight * scale)
            block.conv2.weight.set_value(paddle.randn(block.conv2.weight.shape))
        logits.append(network(images).numpy())
    np.testing.assert_array_equal(*logits)
    assert logits[0].std() > 0.01


def test_networks_by_name_have_the_official_parameters():
    assert isinstance(build_network("resnet48_mini", 7), ElasticResNet)
    plain = build_network("resnet48_mini", 7, elastic=False)
    assert type(plain) is ResNet and plain.head.fc.weight.shape == [128, 7]
    names = set(plain.state_dict())
    # Stage 2 starts with block 6, and the head is block 24.
    assert {"blocks.0.conv.weight", "blocks.0.bn._mean", "blocks.1.conv1.weight"} <= names
    assert {"blocks.6.downsample.0.weight", "blocks.24.fc.bias"} <= names
    assert not any(name.startswith("blocks.1.downsample") for name in names)
    with pytest.raises(
        UserError, match="unknown backbone .*; there are resnet48, resnet48pinasv2, "
    ):
        build_network("resnet84")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plain():
    paddle.seed(1)
    return build_network("resnet48_mini", CLASSES, elastic=False).state_dict()


@pytest.mark.parametrize(
    ("asked", "frozen", "number", "level", "told"),
    [
        (AUTO, True, 0, "INFO", "bn_calibration_images 0: the weights are known to be trained wi"),
        (AUTO, False, 64, "INFO", "bn_calibration_images 64: the weights are not known to be trai"),
        (8, True, 8, "WARNING", "8, but the weights were trained with freeze_bn: the ranking suf"),
        (0, False, 0, "WARNING", "0, but the weights are not known to be trained with freeze_bn"),
        (0, True, 0, None, None),
        (8, False, 8, None, None),
    ],
)
def test_calibration_follows_the_checkpoint(asked, frozen, number, level, told, caplog):
    with caplog.at_level("INFO"):
        assert calibration_number(Options(bn_calibration_images=asked), frozen) == number
    assert [record.levelname for record in caplog.records] == ([] if told is None else [level])
    assert told is None or told in caplog.text


@pytest.mark.parametrize(
    ("train", "freeze_bn", "about", "warns"),
    [
        (False, True, None, True),
        (False, False, {"freeze_bn": False}, True),
        (False, False, {"freeze_bn": True}, False),
        (True, True, None, False),
        (True, False, {"freeze_bn": True}, True),
    ],
)
def test_stage_two_evaluates_as_it_trains_or_as_the_checkpoint_was_trained(
    train, freeze_bn, about, warns, plain, folder, tmp_path, monkeypatch, caplog
):
    write_state(tmp_path / "start.pdparams", plain, about)
    seen, first = [], []

    def extremes(network, loader, calibration, at_first):
        seen.append(network)
        return {"top1": 0.5}

    monkeypatch.setattr(validation, "extremes", extremes)
    monkeypatch.setattr(validation, "try_pretrained", lambda _, network, *__: first.append(network))
    monkeypatch.setattr(stage2, "fit", lambda model, *_, **__: seen.append(model.network))
    weights = tmp_path / "start.pdparams"
    flags = {"pretrained": weights, "ckpt_dir": weights, "use_ckpt": True}
    flags |= {"backbone": "resnet48_mini", "bn_calibration_images": 0}
    flags |= {"train_flag": train, "freeze_bn": freeze_bn}
    run(stage2, monkeypatch, folder, tmp_path / "out", **flags)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    told = "known to be trained with freeze_bn: their running"
    assert len(warnings) == warns and all(told in warning for warning in warnings)
    frozen = freeze_bn if train else bool((about or {}).get("freeze_bn"))
    assert seen and all(network.stem.bn.frozen is frozen for network in seen)
    # It is measured against the plain network that --pretrained names.
    assert [type(network) for network in first] == [ResNet]


@pytest.mark.parametrize(
    ("freeze_bn", "queue", "told"),
    [
        (True, 20, []),
        (False, 20, []),
        (True, 30, ["--queue_size 30, but 20 training images: "]),
    ],
)
def test_stage_one_freezes_both_encoders_and_warns_of_a_queue_beyond_the_images(
    freeze_bn, queue, told, plain, folder, tmp_path, monkeypatch, caplog
):
    write_state(tmp_path / "start.pdparams", plain)
    models = []
    monkeypatch.setattr(stage1, "fit", lambda model, *_: models.append(model))
    monkeypatch.setattr(stage1, "measurement_of_largest", lambda *_: None)
    flags = {"pretrained": tmp_path / "start.pdparams", "backbone": "resnet48pinasv2_mini"}
    flags |= {"queue_size": queue, "freeze_bn": freeze_bn}
    run(stage1, monkeypatch, folder, tmp_path / "out", **flags)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [found[: len(said)] for found, said in zip(warnings, told, strict=True)] == told
    (model,) = models
    for encoder in (model.network.backbone, model.network.key_backbone):
        assert encoder.stem.bn.frozen is freeze_bn
