"""The walk in the variants of GPUs, emulated: see ``gpu_fakes.py`` for what each fake does."""

import logging
from types import SimpleNamespace

import gpu_fakes
import numpy as np
import paddle
import pytest
from gpu_fakes import DEVICE, raising
from independent import Images, supernet

from hnas.base.device import Arithmetic
from hnas.base.errors import UserError
from hnas.evaluation import engine, gpu_kernels, spot_check
from hnas.evaluation.engine import ScoringSettings, default_chunk, evaluate_shared
from hnas.evaluation.gpu_kernels import fused_fault
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.results import STATE_FILE
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.spot_check import compare, margins
from hnas.evaluation.variants import Precision, Variant, usual_variant
from hnas.search_space import RESNET48, RESNET48_MINI

CLASSES = 7
IDENTITY = {"checkpoint": "c" * 64}
PLAIN = Arithmetic("card", tf32=False)


@pytest.fixture(scope="module")
def network():
    return supernet(RESNET48_MINI, CLASSES)


@pytest.fixture(scope="module")
def archs():
    rng = np.random.default_rng(1)
    drawn = [RESNET48_MINI.sample(rng) for _ in range(2)]
    return {f"n{i}": arch for i, arch in enumerate([*drawn, RESNET48_MINI.smallest()])}


@pytest.fixture
def fuse(monkeypatch):
    """Set what the fused operator does."""

    def use(operator):
        monkeypatch.setattr(gpu_kernels, "fused_convolution", operator)
        monkeypatch.setattr(engine, "on_gpu", lambda: True)
        fused_fault.cache_clear()

    yield use
    fused_fault.cache_clear()


def changed(**wrong):
    """The fake operator with one argument replaced by what a broken one would make of it."""
    names = ("x", "filters", "bias", "shortcut", "stride", "padding", "layout", "activation")

    def operator(*arguments):
        given = dict(zip(names, arguments, strict=True))
        return gpu_fakes.fused_operator(
            *(wrong[name](value) if name in wrong else value for name, value in given.items())
        )

    return operator


def rounding_operator(*arguments):
    to_tf32 = gpu_fakes.rounded_to_tf32
    rounded = (to_tf32(part) if isinstance(part, paddle.Tensor) else part for part in arguments)
    return to_tf32(gpu_fakes.fused_operator(*rounded))


BROKEN = {
    "no such operator": (raising(AttributeError("no attribute")), "fails: no attribute"),
    "a static one": (raising(TypeError("\nmust be Value, but got Tensor")), "must be Value"),
    "no memory": (raising("memory"), "fails: (ResourceExhausted) Out of memory error on GPU 0. C"),
    **{kind: (raising(kind), f"fails: {gpu_fakes.ERRORS[kind][1][:30]}") for kind in DEVICE},
    "loses the shortcut": (changed(shortcut=lambda _: None), "differs by"),
    "loses the bias": (changed(bias=lambda b: b * 0), "differs by"),
    "ReLU always": (changed(activation=lambda _: "relu"), "differs by"),
    "stride 1": (changed(stride=lambda _: 1), "differs by inf"),
    "TF32 where float32 was said": (rounding_operator, "differs by"),
    "NaN": (lambda *a: gpu_fakes.fused_operator(*a) * float("nan"), "differs by inf"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_broken_operator_is_not_used_and_the_log_says_why(case, fuse, caplog):
    operator, reason = BROKEN[case]
    fuse(operator)
    caplog.set_level(logging.INFO)
    assert engine.wanted_variant(PLAIN, None) == Variant()
    assert reason in caplog.text and "not fused" in caplog.text


@pytest.mark.parametrize("kind", DEVICE)
def test_an_operator_that_fails_later_is_given_up_from_that_chunk_on(
    network, archs, kind, fuse, tmp_path, monkeypatch, caplog
):
    """It passes its trial and the first chunk; the spot check looks at every chunk."""
    fuse(gpu_fakes.fused_operator)
    fused, walked, checked = engine.wanted_variant(PLAIN, None), [], []
    walk, check = SharedEvaluator.evaluate, engine.spot_check

    def evaluate(self, *arguments, **named):
        walked.append(self.variant)
        if len(walked) == 2:
            monkeypatch.setattr(self.kernels, "_fused", raising(kind))
        return walk(self, *arguments, **named)

    monkeypatch.setattr(SharedEvaluator, "evaluate", evaluate)
    monkeypatch.setattr(engine, "spot_check", lambda *a: checked.append(a) or check(*a))
    assert evaluated(network, archs, tmp_path, 5, fused).images == 12
    assert fused.fused and walked == [fused] * 2 + [Variant()] * 2 and len(checked) == 3
    word = gpu_fakes.ERRORS[kind][1].splitlines()[0].rstrip(". ")
    assert f"from here on the walk computes in float32, NCHW, not fused: {word}" in caplog.messages
    monkeypatch.setattr(SharedEvaluator, "evaluate", raising(kind))
    with pytest.raises(gpu_fakes.ERRORS[kind][0]):  # of the plain one it is no refusal
        evaluated(network, archs, tmp_path / "plain", 5, Variant())


def test_this_paddle_is_asked_for_the_operator_as_it_is_called():
    """The CPU build parses the call, and only then lacks a kernel."""
    fused_fault.cache_clear()
    assert "no kernels which are registered" in fused_fault(Precision.FLOAT32, "NCHW")


def evaluated(network, archs, folder, chunk, variant, calibration=None):
    settings = ScoringSettings(calibration, chunk, variant=variant)
    return evaluate_shared(network, archs, Images(12, CLASSES), folder, IDENTITY, settings)


@pytest.mark.parametrize("precision", [Precision.TF32, Precision.FLOAT16])
def test_a_run_with_coarse_rounding_ends_well(network, archs, precision, tmp_path, monkeypatch):
    """Whatever hits differ by: near the boundary any rounding may turn an image."""
    fake = gpu_fakes.half_operators if precision.is_half else gpu_fakes.round_to_tf32
    fake(monkeypatch)
    counts = evaluated(network, archs, tmp_path, 5, usual_variant(precision))
    assert counts.images == 12
    batch = Images(12, CLASSES).batch(0, 12)
    expected = evaluate_reference(network, list(archs.values()), [batch])
    assert np.abs(counts.top1 - expected.top1).max() <= 2


@pytest.mark.parametrize("fake", ["half", "tf32", "float32"])
def test_a_stale_filter_is_found_in_every_precision(network, archs, fake, tmp_path, monkeypatch):
    """A fault of the walk, not of rounding: one block's filters are another's."""
    precision = {"half": Precision.FLOAT16, "tf32": Precision.TF32}.get(fake, Precision.FLOAT32)
    if precision.is_half:
        gpu_fakes.half_operators(monkeypatch)
    original = SharedEvaluator.evaluate

    def stale(self, *arguments, **named):
        filters, *rest = self.weights._prepare((2, 1, "conv1"))
        self.weights._whole[2, 1, "conv1"] = (paddle.concat([filters[8:], filters[:8]]), *rest)
        return original(self, *arguments, **named)

    monkeypatch.setattr(SharedEvaluator, "evaluate", stale)
    with pytest.raises(UserError, match="architecture n0.*logits differ by up to"):
        evaluated(network, archs, tmp_path, 12, usual_variant(precision))
    assert not (tmp_path / STATE_FILE).exists()


def test_a_wrong_count_is_found_though_logits_agree():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 9)).astype("float32"), rng.integers(0, 9, 40)
    order = np.argsort(-logits, axis=1)
    top1, top5 = ((order[:, :k] == labels[:, None]).any(1).sum() for k in (1, 5))
    arguments = paddle.to_tensor(logits), paddle.to_tensor(logits), paddle.to_tensor(labels)
    assert compare(*arguments, (top1, top5), Precision.FLOAT32) == (0, "")
    _, wrong = compare(*arguments, (top1 + 1, top5), Precision.FLOAT32)
    assert wrong.startswith(f"{top1 + 1} top1 hits instead of {top1}")
    assert "top5 hits" in compare(*arguments, (top1, top5 - 1), Precision.FLOAT32)[1]


def test_hits_may_differ_where_a_margin_is_below_twice_the_difference():
    rng = np.random.default_rng(3)
    expected = rng.normal(size=(60, 9)).astype("float32")
    found = expected + rng.uniform(-0.02, 0.02, expected.shape).astype("float32")
    labels = rng.integers(0, 9, 60)
    tensors = paddle.to_tensor(found), paddle.to_tensor(expected), paddle.to_tensor(labels)

    def hits(logits, k):
        return (np.argsort(-logits, axis=1)[:, :k] == labels[:, None]).any(1)

    def fault(*counted):
        return compare(*tensors, counted, Precision.BFLOAT16)[1]

    largest, right = np.abs(found - expected).max(), [hits(expected, k).sum() for k in (1, 5)]
    relative, told = compare(*tensors, [hits(found, k).sum() for k in (1, 5)], Precision.BFLOAT16)
    assert told == "" and relative == pytest.approx(largest / expected.astype(float).std())
    for k, more in ((1, np.array([1, 0])), (5, np.array([0, 1]))):
        own = expected[np.arange(60), labels]
        others = [
            sorted(np.delete(row, label))[-k] for row, label in zip(expected, labels, strict=True)
        ]
        near = np.abs(own - others) <= 2 * largest
        np.testing.assert_allclose(margins(expected, labels, k), np.abs(own - others))
        assert not fault(*right + near.sum() * more)
        assert f"explain {near.sum()}" in fault(*right + (near.sum() + 1) * more)
        assert not (hits(found, k) != hits(expected, k))[~near].any()
    # Five classes have no top-5 misses.
    assert np.isinf(margins(np.zeros((3, 5)), np.array([0, 1, 4]), 5)).all()


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        (Precision.FLOAT32, "prints; --eval_engine"),
        (Precision.TF32, "--tf32 off rounds less"),
        (Precision.FLOAT16, "--amp O0 rounds less"),
    ],
)
def test_on_a_gpu_the_error_says_what_rounds_less(network, archs, precision, advice, monkeypatch):
    gpu_fakes.fake_card(monkeypatch)
    monkeypatch.setattr(spot_check, "network_logits", lambda *_: paddle.ones([3, 4]).cumsum(1))
    with pytest.raises(UserError) as error:
        batch, logits = ([], paddle.zeros([3], "int64")), paddle.zeros([3, 4])
        arch = "n0", archs["n0"]
        spot_check.spot_check(network, arch, batch, None, logits, (0, 3), precision)
    message = str(error.value)
    assert advice in message and "hnas.tools.check_device" in message
    assert "differ by up to 4, 3.6 of their standard deviation" in message


def test_statistics_of_few_values_are_named_as_the_cause(network, archs, tmp_path):
    """Two images of one position a channel in the last stage: nothing but rounding is left."""
    few = Images(12, CLASSES).batch(0, 2)[0] // 64
    with pytest.raises(UserError, match="re-calibration by 2 images .* raise --bn_calibration"):
        evaluated(network, archs, tmp_path, 12, None, few)


def test_a_walk_takes_60_percent_of_a_cards_free_memory_and_a_quarter_of_a_machines(monkeypatch):
    images = type("Many", (), {"size": 224, "__len__": lambda self: 50_000})()

    def chunk(precision=Precision.FLOAT32, calibration=0):
        about = {"variant": SimpleNamespace(precision=precision), "calibration_images": calibration}
        return default_chunk(RESNET48, images, SimpleNamespace(**about))

    blocks = zip((5, 5, 8, 5), (56, 28, 14, 7), (64, 128, 256, 512), strict=True)
    numbers = 2 * 112**2 * 64 + 3 * sum(n * size**2 * width for n, size, width in blocks)
    monkeypatch.setattr("hnas.base.device.available_bytes", lambda: 8 * 2**30)
    assert chunk() == int(2 * 2**30 / (4 * numbers)) == chunk(calibration=3) + 3
    assert chunk(calibration=10**6) == 1
    gpu_fakes.fake_card(monkeypatch, gib=16, used_gib=5)
    # 11 GiB free, and 1 GiB that Paddle holds unused.
    assert chunk(Precision.TF32) == int(0.6 * 12 * 2**30 / (4 * numbers))
    assert chunk(Precision.FLOAT16) == int(0.6 * 12 * 2**30 / (2 * numbers))
    gpu_fakes.fake_card(monkeypatch, gib=80)
    assert chunk(Precision.FLOAT16) == 1024
