"""How a GPU rounds, what it is called and holds, and when the host waits for it. The card is faked:
computations and copies are a CPU's."""

import contextlib
import dataclasses
import logging
import sys
from types import SimpleNamespace

import gpu_fakes
import numpy as np
import paddle
import pytest
from paddle import nn

import train_supernet
from hnas.base import device, onednn
from hnas.base.device import Arithmetic, peak_memory, set_tf32
from hnas.base.errors import UserError
from hnas.evaluation import gpu_kernels
from hnas.evaluation.engine import wanted_variant
from hnas.evaluation.results import evaluation_identity
from hnas.evaluation.variants import Precision, Variant, cpu_variant
from hnas.parallel import distributed
from hnas.parallel.distributed import GradientExchange, StopSignals
from hnas.programs import runtime
from hnas.programs.flags import Stage
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.search_space import RESNET48_MINI
from hnas.utils.hapi_wrapper import GradientStep, StandaloneModel, momentum_optimizer
from hnas.utils.training import TrainLogger

V100 = {"name": "Tesla V100-SXM2-32GB", "major": 7, "gib": 32}
CONVOLUTIONS, PRODUCTS = "FLAGS_cudnn_allow_tf32", "FLAGS_cublas_allow_tf32"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)


# --- TF32


@pytest.mark.parametrize(
    ("mode", "flags", "override", "expected", "convolutions", "products"),
    [
        ("auto", {}, None, True, True, False),
        ("auto", {CONVOLUTIONS: False}, None, False, False, False),  # the environment's
        ("on", {CONVOLUTIONS: False}, None, True, True, True),
        ("off", {PRODUCTS: True}, None, False, False, False),
        # NVIDIA's variable wins.
        ("auto", {}, "0", False, True, False),
        ("auto", {CONVOLUTIONS: False}, "1", True, False, False),
        ("on", {}, "1", True, True, True),
        ("off", {}, "0", False, False, False),
    ],
)
def test_tf32_sets_paddles_flags(
    mode, flags, override, expected, convolutions, products, monkeypatch
):
    found = gpu_fakes.fake_card(monkeypatch, flags=dict(flags))
    if override:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    assert set_tf32(mode) == expected and device.has_tf32()
    assert (found[CONVOLUTIONS], found[PRODUCTS]) == (convolutions, products)


@pytest.mark.parametrize(
    ("card", "mode", "override", "message"),
    [
        ({}, "on", "0", "--tf32 on, but NVIDIA_TF32_OVERRIDE=0 is set"),
        ({}, "off", "1", "--tf32 off, but NVIDIA_TF32_OVERRIDE=1 is set"),
        (V100, "on", None, "V100.*compute capability 7.0.* has no TF32"),
    ],
)
def test_tf32_that_is_not_to_be_had_is_refused(card, mode, override, message, monkeypatch):
    gpu_fakes.fake_card(monkeypatch, **card)
    if override:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    with pytest.raises(UserError, match=message):
        set_tf32(mode)


def test_cpus_and_cards_without_tf32_compute_in_float32(monkeypatch):
    assert not set_tf32("auto") and not set_tf32("off")
    gpu_fakes.fake_card(monkeypatch, **V100)
    assert not set_tf32("auto") and not set_tf32("off") and not device.has_tf32()


@pytest.mark.parametrize("stage", list(Stage), ids=str)
def test_every_program_takes_the_flags_and_refuses_tf32_on_cpus(stage, tmp_path):
    given = ["--save_dir", str(tmp_path), "--device", "cpu"]
    with pytest.raises(UserError, match="--tf32 fast; allowed: auto, on, off|--tf32 'fast'"):
        parse_options(stage, [*given, "--tf32", "fast"])
    options = parse_options(stage, [*given, "--tf32", "on", "--deterministic", "True"])
    with pytest.raises(UserError, match="--tf32 on needs a GPU"):
        runtime.start(options)
    options = parse_options(stage, [*given, "--tf32", "off", "--deterministic", "True"])
    assert runtime.start(options).deterministic


# --- what ran is known


def start_on(monkeypatch, caplog, tmp_path, **options):
    """What ``start`` says on the faked card; the device itself is not changed."""
    monkeypatch.setattr(paddle, "set_device", lambda name: name)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(runtime, "seed_generators", lambda seed: None)
    caplog.set_level(logging.INFO)
    return runtime.start(Options(save_dir=str(tmp_path), **options))


def test_device_and_rounding_are_logged(monkeypatch, caplog, tmp_path):
    flags = gpu_fakes.fake_card(monkeypatch)
    found = start_on(monkeypatch, caplog, tmp_path, amp="O1", deterministic=True)
    assert found == Arithmetic("NVIDIA A100-SXM4-80GB", True, "O1", True, paddle.__version__)
    line = f"NVIDIA A100-SXM4-80GB, TF32, amp O1, deterministic, Paddle {paddle.__version__}"
    assert line in caplog.text
    assert flags["FLAGS_cudnn_deterministic"]
    off = start_on(monkeypatch, caplog, tmp_path, tf32="off")
    assert str(off) == f"NVIDIA A100-SXM4-80GB, float32, amp O0, Paddle {paddle.__version__}"


def test_all_of_the_arithmetic_is_in_the_setting_of_a_state(tmp_path):
    checkpoint = tmp_path / "net.pdparams"
    checkpoint.write_bytes(b"weights")
    ran = Arithmetic("NVIDIA H100", True, "O0", False, "3.3.1")
    changes = {"device": "NVIDIA A100", "tf32": False, "amp": "O1", "deterministic": True}
    changes["paddle"] = "3.4.0"
    others = [dataclasses.replace(ran, **{name: value}) for name, value in changes.items()]
    settings = [
        evaluation_identity(checkpoint, "i" * 64, "resnet48_mini", each, None)["setting"]
        for each in (ran, *others)
    ]
    assert settings[0] == "resnet48_mini, NVIDIA H100, TF32, amp O0, Paddle 3.3.1"
    assert len(set(settings)) == 6


def test_stage_3_computes_as_the_flags_say(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "fused_convolution", gpu_fakes.fused_operator)
    gpu_kernels.fused_fault.cache_clear()
    plain, tf32 = (Arithmetic("card", on) for on in (False, True))
    half = Arithmetic("card", True, "O1")
    assert wanted_variant(plain, None) is None  # a CPU
    gpu_fakes.fake_card(monkeypatch)
    seen = paddle.zeros([4, 3, 8, 8], "uint8")
    assert wanted_variant(plain, None) == Variant(Precision.FLOAT32, "NCHW", True)
    assert wanted_variant(tf32, None) == Variant(Precision.TF32, "NCHW", True)
    assert wanted_variant(tf32, seen) == Variant(Precision.TF32, "NCHW", False)
    monkeypatch.setattr(gpu_kernels, "fused_fault", lambda *_: "no kernel")
    assert wanted_variant(half, None) == Variant(Precision.FLOAT16, "NHWC", False)


def test_the_reference_engine_does_not_pass_for_half_precision(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "run", "--amp", "O1", "--eval_engine", "reference"])
    monkeypatch.setattr(train_supernet, "start", lambda *_, **__: Arithmetic("card", True, "O1"))
    with pytest.raises(UserError, match="--eval_engine reference computes in float32; --amp O1"):
        train_supernet.main()


# --- memory


def test_the_devices_peak_memory_is_logged(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert "GPU" not in peak_memory()
    gpu_fakes.fake_card(monkeypatch)
    assert peak_memory().startswith("3.00 GiB on the GPU, ")
    log = TrainLogger(1, epochs=1, steps=1, batch=1)
    log._losses = [1.0]
    log.begin_epoch(0)
    log.end_epoch()
    assert "epoch 1: peak memory 3.00 GiB on the GPU, " in caplog.text


def test_free_memory_is_the_cards_and_what_paddle_holds_unused(monkeypatch):
    gpu_fakes.fake_card(monkeypatch, gib=40, used_gib=15)
    assert device.free_bytes() == 26 * 2**30


def test_cpus_score_in_bfloat16_if_they_have_it_and_train_in_float32(monkeypatch, tmp_path):
    options = Options(device="cpu", amp="O1", save_dir=str(tmp_path))
    with pytest.raises(UserError, match="--amp O1 needs a GPU; CPUs train in float32"):
        runtime.start(options)
    monkeypatch.setattr(onednn, "has_bfloat16", lambda: False)
    with pytest.raises(UserError, match="--amp O1 on a CPU needs a processor with AVX512_BF16"):
        runtime.start(options, scores=True)
    monkeypatch.setattr(onednn, "has_bfloat16", lambda: True)
    arithmetic = runtime.start(options, scores=True)
    assert str(arithmetic).startswith("CPU, float32, amp O1")
    assert wanted_variant(arithmetic, None) == cpu_variant(Precision.BFLOAT16)
    with pytest.raises(UserError, match="re-calibration magnifies; give --amp O0"):
        wanted_variant(arithmetic, paddle.zeros([4, 3, 8, 8], "uint8"))
    assert wanted_variant(Arithmetic("CPU", False), None) is None


# --- what the host copies to and from the device in a step, for which it would have to wait


READS = ("numpy", "tolist", "item", "__float__", "__int__", "__bool__", "__array__")


@pytest.fixture
def events(monkeypatch):
    """Copies and passes, in their order."""
    seen, under_way = [], set()

    def noting(function, name):
        def run(*arguments, **named):
            if name in under_way:  # one calls another
                return function(*arguments, **named)
            seen.append(name)
            under_way.add(name)
            try:
                return function(*arguments, **named)
            finally:
                under_way.remove(name)

        return run

    for name in READS:
        monkeypatch.setattr(paddle.Tensor, name, noting(getattr(paddle.Tensor, name), "read"))
    monkeypatch.setattr(paddle, "to_tensor", noting(paddle.to_tensor, "write"))
    backward = noting(paddle.Tensor.backward, "backward")
    monkeypatch.setattr(paddle.Tensor, "backward", backward)
    return seen


@pytest.fixture
def exchange(monkeypatch):
    """Two ranks of which the other is told to stop in step ``told``."""
    other = SimpleNamespace(told=None, steps=0)

    def all_reduce(flat):
        if other.steps == other.told:
            flat[0] = flat[0] + 1  # the first of TOLD, in front of the gradients
        other.steps += 1

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_collective", contextlib.nullcontext)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    return other


def trained(events):
    """Train an epoch of four steps; whether the ranks know of a signal when each has ended."""
    rng = np.random.default_rng(0)
    images = paddle.to_tensor(rng.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    labels = paddle.to_tensor(np.arange(4) % 3)

    class Loader(list):
        def epoch(self, epoch, first):
            for batch in self:
                events.append("step")
                yield batch

    network = nn.Sequential(
        nn.Conv2D(3, 4, 3), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, 3)
    )
    network.register_forward_pre_hook(lambda *_: events.append("forward"))
    model = StandaloneModel(network, RESNET48_MINI.largest().code)
    optimizer = momentum_optimizer(network, 0.05, 0.9, 1e-4)
    model.prepare(optimizer, GradientStep(optimizer))
    model.exchange = GradientExchange(network.parameters(), StopSignals())
    return [model.exchange.received for _ in model.train_epoch(Loader([(images, labels)] * 4), 0)]


def test_notices_are_read_before_the_forward_pass_and_nothing_else(events, exchange):
    assert trained(events) == [None] * 4
    first = events.index("step")
    steps = " ".join(events[first:]).split("step ")[1:]
    # Of the first step there was none before, and normalising makes its constants once.
    assert steps[0].replace("write ", "").split() == ["forward", "backward"]
    for later in steps[1:]:
        assert later.split() == ["read", "forward", "backward"]


def test_ranks_know_of_a_signal_when_the_step_after_it_ends(events, exchange):
    exchange.told = 1
    known = trained(events)
    assert known[:2] == [None, None]
    assert known[2] == known[3] == distributed.TOLD[0]
