"""Stage three's shared engine against the reference engine, and its parts against NumPy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import independent
import numpy as np
import paddle
import pytest
from hypothesis import given, settings

from hnas.architecture_file import read_architectures
from hnas.base.errors import UserError
from hnas.base.onednn import OneDNNError, has_bfloat16
from hnas.evaluation import cpu_kernels as cpu_kernels_module
from hnas.evaluation import onednn_steps
from hnas.evaluation.counts import Counts
from hnas.evaluation.cpu_kernels import (
    TRIAL_TOLERANCE,
    CpuKernels,
    cpu_kernels,
    largest_difference,
    over_rows,
)
from hnas.evaluation.hits import count_hits
from hnas.evaluation.kernels import DygraphKernels
from hnas.evaluation.onednn_steps import ConvolutionKernel
from hnas.evaluation.reference import evaluate_network, evaluate_reference
from hnas.evaluation.shared import SharedEvaluator, _Walk
from hnas.evaluation.tree import PrefixTree, naive_macs
from hnas.evaluation.variants import Precision, cpu_variant
from hnas.evaluation.weights import (
    Convolution,
    Form,
    LatestTensors,
    SlicedWeights,
    channels_last,
    new_identity,
)
from hnas.models import onednn
from hnas.models.registry import build_network
from hnas.search_space import RESNET48, RESNET48_MINI, Architecture

ROOT = Path(__file__).parents[1]
OFFICIAL = ROOT.parent / "shared/data/CVPR_2022_NAS_Track1_test.json"


def family(space, seed):
    """Architectures that share prefixes in every way the engine tells apart."""
    rng = np.random.default_rng(seed)
    first = space.sample(rng)
    archs = [first, space.largest(), space.smallest()]
    for _ in range(4):  # the same stages 1 to 3, other stages 4
        other = space.sample(rng)
        archs.append(
            Architecture(
                (*first.depths[:3], other.depths[3]),
                first.stem,
                (*first.widths[:3], other.widths[3]),
            )
        )
    for depth in (2, 3, 4, 5):  # one is the other's prefix
        widths = first.widths[3][:1] * depth
        archs.append(
            Architecture((*first.depths[:3], depth), first.stem, (*first.widths[:3], widths))
        )
    archs += [space.sample(rng) for _ in range(10)]
    return list(dict.fromkeys(archs))


def supernet(space, classes=10, size=32):
    paddle.seed(0)
    name = "resnet48_mini" if space is RESNET48_MINI else "resnet48"
    net = build_network(name, classes)
    net.train()
    with paddle.no_grad():
        for _ in range(10):  # running statistics that keep activations in range
            net(paddle.randn([16, 3, size, size]))
    net.eval()
    return net


def images_for(size, number, classes=10, seed=1):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, 3, size, size), dtype=np.uint8)
    return paddle.to_tensor(images), paddle.to_tensor(rng.integers(0, classes, number))


def independent_tree_macs(codes, base, divisor, size):
    """Sets of (prefix, position): conv1 and projection at their largest, conv2 once a width."""
    stems, first, second, project = {}, {}, {}, {}
    for code in codes:
        stem, blocks = independent.layers(code, base, divisor)
        stems[0] = max(stems.get(0, 0), stem)
        prefix, cin = (stem,), stem
        for stage, block, mid, out, stride in blocks:
            key = (prefix, stage, block)
            first[key] = (cin, max(first.get(key, (0, 0))[1], mid))
            second[key, mid] = (mid, max(second.get((key, mid), (0, 0))[1], out))
            if stride == 2:
                project[key] = (cin, max(project.get(key, (0, 0))[1], out))
            prefix, cin = (*prefix, (stage, block, mid, out)), out

    def area(stage):
        return (size // 4 // 2**stage) ** 2

    total = (size // 2) ** 2 * 147 * stems[0]
    total += sum(9 * area(key[1]) * cin * mid for key, (cin, mid) in first.items())
    total += sum(9 * area(key[0][1]) * mid * out for key, (mid, out) in second.items())
    return total + sum(area(key[1]) * cin * out for key, (cin, out) in project.items())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tree_macs_equal_an_independent_count(seed):
    archs = family(RESNET48, seed)
    tree = PrefixTree(RESNET48, archs)
    codes = [arch.code for arch in archs]
    assert tree.macs(64) == independent_tree_macs(codes, (64, 128, 256, 512), 8, 64)
    assert sorted(tree.order.tolist()) == list(range(len(archs)))
    assert tree.macs(64) < naive_macs(RESNET48, archs, 64)


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="the official list is not here")
@pytest.mark.slow
def test_figures_of_the_official_list():
    archs = list(read_architectures(OFFICIAL).values())
    assert round(naive_macs(RESNET48, archs, 224) / 1e9) == 133_710
    assert PrefixTree(RESNET48, archs).macs(224) / 1e9 < 71_360


def logits_of(evaluator, images, labels, counts, monkeypatch):
    """Run the walk and catch the logits of every architecture."""
    caught = {}

    def catch(self, features):
        logits = original_logits(self, features)
        for (leaves, _), own in zip(current[0], logits, strict=True):
            for position in leaves:
                caught[int(self._tree.order[position])] = own.numpy()
        return logits

    current = [None]
    original_logits, original = _Walk._logits, _Walk._multiply_heads

    def remember(self, channels):
        current[0] = list(self._features[channels])
        original(self, channels)

    monkeypatch.setattr(_Walk, "_logits", catch)
    monkeypatch.setattr(_Walk, "_multiply_heads", remember)
    watched = evaluator.evaluate(images, labels, counts, watch=2)
    np.testing.assert_array_equal(watched.numpy(), caught[2])
    return caught


@pytest.mark.parametrize(("size", "calibration"), [(32, 0), (96, 0), (32, 24), (64, 24)])
def test_shared_engine_equals_reference(size, calibration, monkeypatch):
    net = supernet(RESNET48_MINI, size=size)
    archs = family(RESNET48_MINI, 3)
    images, labels = images_for(size, 12)
    extra = images_for(size, calibration, seed=2)[0] if calibration else None
    evaluator = SharedEvaluator(net, archs, extra)
    counts = Counts.zeros(len(archs))
    logits = logits_of(evaluator, images, labels, counts, monkeypatch)
    assert sorted(logits) == list(range(len(archs)))
    expected = evaluate_reference(net, archs, [(images, labels)], extra)
    assert 0 < expected.top5.sum() < 12 * len(archs)
    for found, wanted, near in (
        (counts.top1, expected.top1, counts.near1),
        (counts.top5, expected.top5, counts.near5),
    ):
        assert np.all(np.abs(found - wanted) <= near)
    assert counts.near1.sum() + counts.near5.sum() < 5
    assert counts.images == expected.images == 12
    # Every sub-network on its own, extracted, and calibrated on its own.
    mean, std = np.float32([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 1, 3, 1, 1)
    for index in (0, 3, len(archs) - 1):
        alone = net.extract(archs[index])
        batch = images if extra is None else paddle.concat([extra, images])
        x = paddle.to_tensor((batch.numpy().astype("float32") / np.float32(255) - mean) / std)
        with paddle.no_grad():
            if extra is not None:
                for layer in alone.sublayers():
                    if isinstance(layer, paddle.nn.BatchNorm2D):
                        layer._momentum = 0.0
                alone.train()
                alone(x[:calibration])
            alone.eval()
            own = alone(x[calibration:]).numpy()
        np.testing.assert_allclose(logits[index], own, atol=1e-4 * np.abs(own).max())


@pytest.mark.slow
def test_full_size_network_equals_reference_twice():
    """Widths that are multiples of 8 coincide between blocks: stale filters would show up."""
    net = supernet(RESNET48, size=64)
    archs = family(RESNET48, 4)
    images, labels = images_for(64, 8)
    expected = evaluate_reference(net, archs, [(images, labels)])
    for _ in range(2):  # with kernels whose shapes come back, and other filters' identities
        counts = Counts.zeros(len(archs))
        evaluator = SharedEvaluator(net, archs)
        evaluator.evaluate(images, labels, counts)
        assert np.all(np.abs(counts.top1 - expected.top1) <= counts.near1)
        assert np.all(np.abs(counts.top5 - expected.top5) <= counts.near5)
        assert evaluator.macs == 8 * evaluator.tree.macs(64)


def test_chunks_add_up():
    net = supernet(RESNET48_MINI)
    archs = family(RESNET48_MINI, 5)
    images, labels = images_for(32, 12)
    evaluator = SharedEvaluator(net, archs)
    whole, parts = Counts.zeros(len(archs)), Counts.zeros(len(archs))
    evaluator.evaluate(images, labels, whole)
    finished = []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        evaluator.evaluate(images[start:stop], labels[start:stop], parts, finished.append)
    assert sum(finished) == 3 * len(archs)
    assert parts.images == 12
    assert np.all(np.abs(whole.top1 - parts.top1) <= whole.near1)
    assert np.all(np.abs(whole.folds - parts.folds).sum(axis=1) <= whole.near1)


# --- kernels

SPARE = 3
"""Channels of a whole convolution's filters that are not in use."""
FINE, COARSE = 1e-5, 3e-2
"""Of rounding to float32 and to bfloat16, relative to the largest value."""
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16")
PRECISIONS = [Precision.FLOAT32, pytest.param(Precision.BFLOAT16, marks=needs_bfloat16)]


class ByHand:
    """The operations of kernels on [N, C, H, W] in float64, and the same on whole filters."""

    def __init__(self, seen):
        self.seen = seen

    def conv_norm(self, x, conv, stride, padding):
        filters = conv.filters[: conv.outputs, : x.shape[1]]
        windows = windows_of(x, filters.shape[2], stride, padding)
        y = np.einsum("nchwij,ocij->nohw", windows, filters, optimize=True)
        if not self.seen:
            return y + conv.rest[0].reshape(-1, 1, 1)
        front = y[: self.seen]
        unit = (y - front.mean((0, 2, 3), keepdims=True)) / np.sqrt(
            front.var((0, 2, 3), keepdims=True) + 1e-5
        )
        scale, shift = (part.reshape(-1, 1, 1) for part in conv.rest)
        return unit * scale + shift

    def stem(self, x, conv):
        return windows_of(np.maximum(self.conv_norm(x, conv, 2, 3), 0), 3, 2, 1).max((4, 5))

    def first(self, x, conv1, stride):
        return np.maximum(self.conv_norm(x, conv1, stride, 1), 0)

    def project(self, x, conv):
        return self.conv_norm(x, conv, 2, 0)

    def last(self, y, shortcut, conv2):
        return np.maximum(self.conv_norm(y, conv2, 1, 1) + shortcut[:, : conv2.outputs], 0)

    def block(self, x, conv1, conv2):
        return self.last(self.first(x, conv1, 1), x, conv2)

    def narrow(self, x, channels):
        return x[:, :channels]

    def pooled(self, x):
        return x[self.seen :].mean((2, 3))

    def classifier(self, weight, bias):
        return lambda features: features @ weight[: features.shape[1]] + bias


def windows_of(x, kernel, stride, padding):
    """[N, C, H, W] -> [N, C, H', W', K, K], with zeros around."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    whole = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    return whole[:, :, ::stride, ::stride]


def drawn_convolution(rng, seen, outputs, inputs, kernel):
    """Whole filters in NumPy, and what follows them."""
    filters = rng.normal(size=(outputs + SPARE, inputs + SPARE, kernel, kernel))
    rest = tuple(rng.normal(size=outputs) for _ in range(2 if seen else 1))
    scaled = filters / (kernel * inputs**0.5)
    return Convolution(rounded(scaled), tuple(map(rounded, rest)), outputs, new_identity())


def rounded(values):
    """To bfloat16, which is exact in every precision."""
    tensor = paddle.to_tensor(values.astype("float32")).astype("bfloat16")
    return tensor.astype("float32").numpy().astype("float64")


class Handed:
    """Kernels whose operations take what :class:`ByHand`'s take, and give the same."""

    def __init__(self, kernels):
        self.kernels = kernels

    def __getattr__(self, name):
        def run(*arguments):
            with paddle.no_grad():
                found = getattr(self.kernels, name)(*map(self.given, arguments))
            return self.taken(found)

        return run

    def given(self, part):
        if isinstance(part, Convolution):
            return self.convolution(part)
        if not isinstance(part, np.ndarray):
            return part
        tensor = paddle.to_tensor(part.astype("float32"))
        return self.kernels.accept(tensor, DygraphKernels()) if tensor.ndim == 4 else tensor

    def convolution(self, conv):
        form = self.kernels.form()
        filters = paddle.to_tensor(conv.filters.astype("float32"))
        if form.sliced:
            filters = filters[: conv.outputs, : conv.filters.shape[1] - SPARE].contiguous()
        shape = [1, 1, 1, 1]
        shape[form.channel_axis] = -1
        rest = tuple(paddle.to_tensor(part.astype("float32")).reshape(shape) for part in conv.rest)
        return conv._replace(filters=form.arrange(filters), rest=rest)

    def taken(self, found):
        if callable(found):
            return lambda *features: self.taken(found(*map(self.given, features)))
        return taken(self.kernels, found)


def taken(kernels, found):
    """NumPy's, with activations as [N, C, H, W]."""
    found = DygraphKernels().accept(found, kernels) if found.ndim == 4 else found
    return found.astype("float32").numpy()


def results_of(kernels, seen, images, size, channels):
    """Each operation's result by kernels that take and give NumPy's arrays."""
    rng = np.random.default_rng(size)
    cin, mid, cout = channels

    def draw(*shape):
        return rounded(rng.normal(size=shape))

    stem, conv1, project, conv2 = (
        drawn_convolution(rng, seen, *shape)
        for shape in ((mid, 3, 7), (mid, cin, 3), (cout, cin, 1), (cout, mid, 3))
    )
    x, y = draw(seen + images, cin, size, size), draw(seen + images, mid, size, size)
    return {
        "stem": kernels.stem(draw(seen + images, 3, 4 * size, 4 * size + 2), stem),
        "first": kernels.first(x, conv1, 1),
        "first, stride 2": kernels.first(x, conv1, 2),
        "project": kernels.project(x, project),
        "last, with a wider shortcut": kernels.last(y, x, conv2),
        "block": kernels.block(x, conv1, conv2),
        "narrow": kernels.narrow(x, cout),
        "pooled": kernels.pooled(x),
        "pooled, not square": kernels.pooled(draw(seen + images, cin, size, size + 1)),
        "classifier": kernels.classifier(draw(cin + SPARE, 7), draw(7))(draw(images, cin)),
    }


# Size of the map, calibration images, others, and channels: of a block's input, conv1 and conv2.
SHAPES = [
    (1, 0, 5, (20, 17, 6)),
    (1, 24, 1, (17, 6, 17)),
    (2, 16, 3, (20, 17, 6)),
    (3, 0, 2, (17, 20, 5)),
    (4, 6, 3, (18, 17, 17)),
    (5, 7, 1, (6, 17, 3)),
    (7, 0, 3, (33, 16, 20)),
    (7, 5, 3, (33, 20, 17)),
    (8, 2, 3, (17, 48, 16)),
    (9, 0, 1, (17, 6, 17)),
    (9, 4, 2, (20, 17, 6)),
    (11, 0, 3, (50, 57, 48)),
]


def onednns(precision=Precision.FLOAT32):
    return lambda seen: CpuKernels(cpu_variant(precision), seen)


KINDS = [
    pytest.param(DygraphKernels, False, FINE, id="Paddle, NCHW"),
    pytest.param(lambda seen: DygraphKernels(seen, "NHWC"), False, FINE, id="Paddle, NHWC"),
    pytest.param(onednns(), False, FINE, id="oneDNN, float32"),
    pytest.param(onednns(), True, FINE, id="Winograd, float32"),
    pytest.param(
        onednns(Precision.BFLOAT16), True, COARSE, marks=needs_bfloat16, id="oneDNN, bfloat16"
    ),
]


@pytest.mark.parametrize(("size", "seen", "images", "channels"), SHAPES)
@pytest.mark.parametrize(("make", "winograd", "rounding"), KINDS)
def test_kernels_compute_what_is_written_out(
    make, winograd, rounding, size, seen, images, channels, monkeypatch
):
    """Transformed wherever that is possible, or nowhere."""
    monkeypatch.setattr(cpu_kernels_module, "worth_it", lambda *_: winograd)
    kernels = make(seen)
    expected, found = (
        results_of(each, seen, images, size, channels) for each in (ByHand(seen), Handed(kernels))
    )
    for name, right in expected.items():
        # Pooled features and logits are float32 always.
        own = FINE if name.startswith(("pooled", "classifier")) else rounding
        near = own * np.abs(right).max()
        np.testing.assert_allclose(found[name], right, rtol=0, atol=near, err_msg=name)


@settings(max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    far=st.floats(-50, 50),
    seed=st.integers(0, 99),
)
def test_statistics_of_rows_are_those_of_all_their_values(shape, far, seed):
    values = np.random.default_rng(seed).normal(far, 3, shape)
    each = np.stack([values.mean(0), values.var(0)]).astype(np.float32)
    found = over_rows(each)
    assert found.shape == (2, 1, shape[2])
    expected = values.mean((0, 1)), values.var((0, 1))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("winograd", "capacity", "most"),
    [(False, 0, 10), (False, 50_000, 10), (False, 1 << 30, 6), (True, 0, 0)],
)
def test_filters_are_those_that_are_given(winograd, capacity, most, monkeypatch):
    """Of equal shapes in turns, whatever is kept of them, which is not packed again."""
    monkeypatch.setattr(cpu_kernels_module, "worth_it", lambda *_: winograd)
    packed = []
    pack = ConvolutionKernel.pack
    monkeypatch.setattr(
        ConvolutionKernel, "pack", lambda *given: packed.append(given) or pack(*given)
    )
    kernels = CpuKernels(cpu_variant())
    kernels._packed = LatestTensors(capacity)
    handed, hand = Handed(kernels), ByHand(0)
    rng = np.random.default_rng(0)
    plain = [drawn_convolution(rng, 0, 17, 20, 3) for _ in range(3)]
    own = [handed.convolution(conv) for conv in plain]
    for size, order in ((8, (0, 1, 2, 0, 0, 1)), (1, (2, 1, 2)), (8, (1, 0))):
        for which in order:
            x = rounded(rng.normal(size=(2, 20, size, size)))
            right = hand.first(x, plain[which], 1)
            found = taken(kernels, kernels.first(handed.given(x), own[which], 1))
            np.testing.assert_allclose(found, right, rtol=0, atol=FINE * np.abs(right).max())
    # Twice at most, if oneDNN wants other formats for other shapes.
    assert len(packed) <= most


def test_pooled_features_of_another_width_have_weights_of_their_own():
    weight, bias = paddle.randn([20, 7]), paddle.randn([7])
    logits = CpuKernels(cpu_variant()).classifier(weight, bias)
    for width in (17, 20, 6, 17):
        features = paddle.randn([5, width])
        right = features.numpy() @ weight.numpy()[:width] + bias.numpy()
        np.testing.assert_allclose(logits(features).numpy(), right, atol=1e-5)


class WithACanary:
    """Paddle, whose new tensors have a few numbers behind them that nobody may touch."""

    NUMBERS, VALUE = 64, 7.0

    def __init__(self):
        self.kept = []

    def __getattr__(self, name):
        return getattr(paddle, name)

    def empty(self, shape, dtype="float32"):
        size = int(np.prod(shape))
        held = paddle.full([size + self.NUMBERS], self.VALUE, dtype)
        self.kept.append(held[size:])
        return held[:size].reshape(shape)

    def sings(self):
        return all(bool((behind == self.VALUE).all()) for behind in self.kept)


@pytest.mark.parametrize("seen", [0, 1, 5, 24])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_is_written_behind_an_output(precision, seen, monkeypatch):
    canary = WithACanary()
    for module in (cpu_kernels_module, onednn_steps, onednn):
        monkeypatch.setattr(module, "paddle", canary)
    monkeypatch.setattr(onednn, "_buffers", {})
    monkeypatch.setattr(cpu_kernels_module, "worth_it", lambda *_: precision is Precision.FLOAT32)
    net, archs = supernet(RESNET48_MINI, size=40), family(RESNET48_MINI, 3)[:6]
    extra = images_for(40, seen, seed=2)[0] if seen else None
    for number in (1, 5, 16):
        evaluator = SharedEvaluator(net, archs, extra, cpu_variant(precision))
        evaluator.evaluate(*images_for(40, number), Counts.zeros(len(archs)))
    assert len(canary.kept) > 100 and canary.sings()


# --- when oneDNN's kernels are not trusted


@pytest.mark.parametrize("seen", [0, 3, 16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_onednn_is_trusted_here(precision, seen, caplog):
    kernels = cpu_kernels(cpu_variant(precision), seen)
    assert type(kernels) is CpuKernels and not caplog.text
    near = COARSE if precision.is_half else FINE
    assert 0 < largest_difference(kernels) < near <= TRIAL_TOLERANCE[precision]


def missing():
    raise OneDNNError("cannot use libdnnl.so.3: gone")


REASONS = {
    "gone": ("library", missing),
    "differ by 0.5": ("largest_difference", lambda _: 0.5),
    "differ by nan": ("largest_difference", lambda _: float("nan")),
}


@pytest.mark.parametrize("reason", REASONS)
def test_without_onednn_paddle_scores_in_float32(reason, monkeypatch, caplog):
    net = supernet(RESNET48_MINI)
    archs = family(RESNET48_MINI, 8)[:5]
    batch = images_for(32, 9)
    right = evaluate_reference(net, archs, [batch])
    monkeypatch.setattr(cpu_kernels_module, *REASONS[reason])
    evaluator = SharedEvaluator(net, archs)
    assert type(evaluator.kernels) is DygraphKernels
    assert "several times slower" in caplog.text and reason in caplog.text
    counts = Counts.zeros(len(archs))
    evaluator.evaluate(*batch, counts)
    assert np.all(np.abs(counts.top1 - right.top1) <= counts.near1)
    # Of bfloat16 Paddle's operators have none.
    with pytest.raises(UserError, match="give --amp O0"):
        cpu_kernels(cpu_variant(Precision.BFLOAT16), 0)


def test_a_processor_without_bfloat16_is_refused():
    program = (
        "from hnas.evaluation.cpu_kernels import cpu_kernels\n"
        "from hnas.evaluation.variants import Precision, cpu_variant\n"
        "cpu_kernels(cpu_variant(), 2)\n"
        "cpu_kernels(cpu_variant(Precision.BFLOAT16), 2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "UserError: " in last and "AVX512_BF16" in last and "--amp O0" in last


def without(method, instead):
    """Plant a fault in one of the kernels' methods, which gets the right one first."""

    def plant(patch):
        right = getattr(CpuKernels, method)
        patch.setattr(CpuKernels, method, lambda self, *given: instead(right, self, *given))

    return plant


def plant_pack(change):
    right = ConvolutionKernel.pack
    return lambda patch: patch.setattr(
        ConvolutionKernel, "pack", lambda self, filters: right(self, change(filters))
    )


def plant_rows(wrong):
    return lambda patch: patch.setattr(cpu_kernels_module, "over_rows", wrong)


# Calibration images, and what is wrong.
FAULTS = {
    "filters of other outputs": (0, plant_pack(lambda filters: filters.roll(1, 0))),
    "filters of other inputs": (0, plant_pack(lambda filters: filters.roll(1, 1))),
    "filters upside down": (3, plant_pack(lambda filters: filters.flip([2]))),
    "NaN": (0, plant_pack(lambda filters: filters * float("nan"))),
    "a lost shortcut": (0, without("_copy", lambda right, self, x, y: y.zero_())),
    "a shortcut that is not added": (3, without("_add", lambda right, self, y, shortcut: y)),
    "no statistics": (3, without("_normalise", lambda *_: None)),
    "statistics of some positions": (16, plant_rows(lambda found: found[:, :1])),
    "variances within rows alone": (
        16,
        plant_rows(lambda found: found.mean(1, keepdims=True) * [[[1]], [[0.9]]]),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch, caplog):
    seen, plant = FAULTS[fault]
    plant(monkeypatch)
    assert not largest_difference(CpuKernels(cpu_variant(), seen)) < 1e-2
    assert type(cpu_kernels(cpu_variant(), seen)) is DygraphKernels
    assert "its results differ" in caplog.text


# --- filters


def test_slices_are_the_same_with_little_memory(monkeypatch):
    """Whether copies are kept or made again does not show."""
    net = supernet(RESNET48_MINI)
    forms = (
        Form(),
        Form(channels_last, inputs=3, channel_axis=3),
        CpuKernels(cpu_variant()).form(),
    )
    for capacity in (0, 20_000):
        monkeypatch.setattr("hnas.evaluation.weights.CACHE_BYTES", capacity)
        for form in forms:
            weights = SlicedWeights(net, False, form)
            for cin, cout in [(60, 64), (64, 60), (50, 51), (60, 64)]:
                given = weights.get((2, 1, "conv1"), cin, cout)
                whole = net.stage_blocks(2)[1].conv1.fn.weight
                used = whole[:cout, :cin] if form.sliced else whole
                np.testing.assert_array_equal(given.filters.numpy(), form.arrange(used).numpy())
                assert given.macs == 9 * cin * cout and given.outputs == cout
                assert [part.shape[form.channel_axis] for part in given.rest] == [cout] * 2
            again = weights.get((2, 1, "conv1"), 60, 64)
            assert again.identity == weights.get((2, 1, "conv1"), 60, 64).identity
            assert again.identity != given.identity or given.outputs == 64
            assert weights._slices._used <= max(capacity, 64 * 60 * 9 * 4)


def test_hits_and_near_ties():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 40, 12)).astype("float32")
    labels = rng.integers(0, 12, 40)
    logits[0, 0] = 1.0  # a tie of all: the smaller index first
    labels[0] = 2
    logits[1, 1, labels[1]] = np.sort(logits[1, 1])[-1] + 5e-5  # wins by a hair
    found = count_hits(paddle.to_tensor(logits), paddle.to_tensor(labels))
    assert not found.bad.any()
    for network in range(3):
        order = np.argsort(-logits[network], axis=1, kind="stable")
        rank = (order == labels[:, None]).argmax(1)
        assert found.columns[network, :2].tolist() == [(rank < 1).sum(), (rank < 5).sum()]
        expected = [(rank[fold::16] < 1).sum() for fold in range(16)]
        assert found.folds[network].tolist() == expected
        later = count_hits(paddle.to_tensor(logits), paddle.to_tensor(labels), first=19)
        assert later.folds[network].tolist() == np.roll(expected, 3).tolist()
    assert found.columns[0, 2] >= 1 and found.columns[0, 3] >= 1 and found.columns[1, 2] >= 1


def as_imagenet(images):
    """uint8 images [N, 3, H, W] less ImageNet's mean, over its deviation; float64."""
    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(
        2, 1, 3, 1, 1
    )
    return (images.numpy() / 255 - mean) / deviation


def hits_by_sorting(logits, labels):
    """Top-1 and top-5 hits of logits [N, classes] without ties."""
    found = np.argsort(-logits, axis=1) == labels.numpy()[:, None]
    return [int(found[:, :k].sum()) for k in (1, 5)]


class NormAndLinear(paddle.nn.Layer):
    """The smallest network with a BatchNorm: of a few pixels, [N, 3, 8, 8] -> [N, 7]."""

    def __init__(self):
        super().__init__()
        self.norm = paddle.nn.BatchNorm2D(3)
        self.linear = paddle.nn.Linear(12, 7)

    def forward(self, x):
        assert not paddle.is_grad_enabled()
        return self.linear(self.norm(x)[:, :, ::7, ::7].flatten(1))


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_networks_hits_are_numpys(calibrate):
    paddle.seed(0)
    network = NormAndLinear()
    mean, variance = np.float32([0.3, -0.2, 0.5]), np.float32([0.5, 2.0, 1.5])
    network.norm._mean.set_value(mean)
    network.norm._variance.set_value(variance)
    images, labels = images_for(8, 40, classes=7)
    extra = images_for(8, 16, seed=2)[0] // 2
    network.train()
    parts = [(images[:25], labels[:25]), (images[25:26], labels[25:26]), (images[26:], labels[26:])]
    found = evaluate_network(network, parts, extra if calibrate else None)
    # Evaluating leaves no trace but the mode.
    assert not network.training and not network.norm.training
    np.testing.assert_array_equal(network.norm._mean.numpy(), mean)
    np.testing.assert_array_equal(network.norm._variance.numpy(), variance)

    if calibrate:
        seen = as_imagenet(extra)
        mean, variance = seen.mean((0, 2, 3)), seen.var((0, 2, 3))
    normed = as_imagenet(images) - mean.reshape(1, 3, 1, 1)
    normed /= np.sqrt(variance.reshape(1, 3, 1, 1) + 1e-5)
    weight, bias = network.linear.weight.numpy(), network.linear.bias.numpy()
    logits = normed[:, :, ::7, ::7].reshape(40, 12) @ weight + bias
    top1, top5 = hits_by_sorting(logits, labels)
    assert 0 < top1 < top5 < 40
    assert (found.top1.tolist(), found.top5.tolist(), found.images) == ([top1], [top5], 40)
    assert found.near1.tolist() == found.near5.tolist() == [0]


def test_a_supernets_active_sub_network_is_evaluated():
    net = supernet(RESNET48_MINI)
    archs = family(RESNET48_MINI, 7)[:3]
    images, labels = images_for(32, 30)
    together = evaluate_reference(net, archs, [(images, labels)])
    x = paddle.to_tensor(as_imagenet(images).astype("float32"))
    base, divisor = RESNET48_MINI.base_channels, RESNET48_MINI.divisor
    for index, arch in enumerate(archs):
        net.activate(arch)
        found = evaluate_network(net, [(images[:11], labels[:11]), (images[11:], labels[11:])])
        logits = independent.forward(net.state_dict(), arch.code, x, base, divisor, training=False)
        top1, top5 = hits_by_sorting(logits.numpy(), labels)
        assert (found.top1.tolist(), found.top5.tolist(), found.images) == ([top1], [top5], 30)
        for column, (value,) in zip(together.columns(), found.columns(), strict=True):
            assert column[index] == value


def test_standard_error_is_binomial_and_never_certain():
    counts = Counts.zeros(3)
    counts.top1[:] = (0, 50, 100)
    counts.images = 100
    rates = np.array([1, 51, 101]) / 102
    np.testing.assert_allclose(counts.standard_error(), np.sqrt(rates * (1 - rates) / 100))
    np.testing.assert_allclose(counts.accuracy(), [0, 0.5, 1])


def test_submission_json_is_exact(tmp_path):
    from hnas.evaluation.results import write_results

    archs = {f"n{i}": arch for i, arch in enumerate(family(RESNET48_MINI, 6))}
    counts = Counts.zeros(len(archs))
    counts.images = 7
    counts.top1[:] = np.arange(len(archs)) % 8
    write_results(tmp_path, archs, counts)
    content = json.loads((tmp_path / "submission.json").read_text())
    for index, (name, arch) in enumerate(archs.items()):
        assert content[name] == {"acc": index % 8 / 7, "arch": arch.code}
