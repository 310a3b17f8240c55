"""How a GPU rounds, what it is called and holds: flags, logs, saved states. The card is faked."""

import logging
import sys

import gpu_fakes
import paddle
import pytest

import train_supernet
from hnas.base import device, onednn
from hnas.base.device import Arithmetic, peak_memory, set_tf32
from hnas.base.errors import UserError
from hnas.evaluation import gpu_kernels
from hnas.evaluation.counts import Counts
from hnas.evaluation.engine import wanted_variant
from hnas.evaluation.results import StateError, evaluation_identity, load_state, save_state
from hnas.evaluation.variants import Precision, Variant, cpu_variant
from hnas.utils import runtime
from hnas.utils.flags import Stage
from hnas.utils.options import Options
from hnas.utils.parsing import parse_options
from hnas.utils.training import TrainLogger

V100 = {"name": "Tesla V100-SXM2-32GB", "major": 7, "gib": 32}
CONVOLUTIONS, PRODUCTS = "FLAGS_cudnn_allow_tf32", "FLAGS_cublas_allow_tf32"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)


# --- TF32


@pytest.mark.parametrize(
    ("mode", "flags", "convolutions", "products"),
    [
        ("auto", {}, True, False),
        ("auto", {CONVOLUTIONS: False}, False, False),  # the environment's
        ("on", {}, True, True),
        ("on", {CONVOLUTIONS: False}, True, True),
        ("off", {}, False, False),
        ("off", {PRODUCTS: True}, False, False),
    ],
)
def test_tf32_sets_paddles_flags(mode, flags, convolutions, products, monkeypatch):
    found = gpu_fakes.fake_card(monkeypatch, flags=dict(flags))
    assert set_tf32(mode) == convolutions
    assert found[CONVOLUTIONS] == convolutions
    assert found[PRODUCTS] == products


@pytest.mark.parametrize(
    ("mode", "override", "expected"),
    [("auto", "0", False), ("auto", "1", True), ("on", "1", True), ("off", "0", False)],
)
def test_nvidias_variable_wins(mode, override, expected, monkeypatch):
    flags = {CONVOLUTIONS: override == "0"}
    gpu_fakes.fake_card(monkeypatch, flags=flags)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    assert set_tf32(mode) == expected


REFUSED = {
    "a contradiction": ({}, "on", "0", "--tf32 on, but NVIDIA_TF32_OVERRIDE=0 is set"),
    "another": ({}, "off", "1", "--tf32 off, but NVIDIA_TF32_OVERRIDE=1 is set"),
    "a card without": (V100, "on", None, "V100.*compute capability 7.0.* has no TF32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tf32_that_is_not_to_be_had_is_refused(case, monkeypatch):
    card, mode, override, message = REFUSED[case]
    gpu_fakes.fake_card(monkeypatch, **card)
    if override:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    with pytest.raises(UserError, match=message):
        set_tf32(mode)


def test_a_card_without_tf32_computes_in_float32(monkeypatch):
    gpu_fakes.fake_card(monkeypatch, **V100)
    assert not set_tf32("auto") and not set_tf32("off")


def test_a_paddle_without_the_flags_is_told(monkeypatch, caplog):
    gpu_fakes.fake_card(monkeypatch)

    def unknown(names):
        raise ValueError(f"Flag {names} cannot get its value through this function.")

    monkeypatch.setattr(paddle, "get_flags", unknown)
    monkeypatch.setattr(paddle, "set_flags", unknown)
    for mode in ("on", "off"):
        with pytest.raises(UserError, match=f"--tf32 {mode}, but Paddle .* has no FLAGS_cudnn"):
            set_tf32(mode)
    assert set_tf32("auto")
    assert "taking convolutions for TF32's" in caplog.text
    with pytest.raises(UserError, match="--deterministic True, but Paddle"):
        device.set_deterministic()


def test_on_cpus_tf32_is_refused_and_the_rest_is_float32():
    assert not set_tf32("auto") and not set_tf32("off")
    with pytest.raises(UserError, match="--tf32 on needs a GPU; CPUs compute in float32"):
        set_tf32("on")


def test_the_real_cpu_build_has_no_such_flags():
    """What the fake is a fake of; Paddle's answer where there is no flag."""
    if paddle.is_compiled_with_cuda():
        pytest.skip("this is a GPU build")
    for flag in (CONVOLUTIONS, PRODUCTS, device.DETERMINISTIC):
        with pytest.raises(ValueError):
            paddle.set_flags({flag: True})
        with pytest.raises(ValueError):
            paddle.get_flags([flag])


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


def test_a_state_of_another_arithmetic_is_refused(tmp_path):
    """Each of device, TF32, AMP, cuDNN's algorithms and Paddle's version."""
    checkpoint = tmp_path / "net.pdparams"
    checkpoint.write_bytes(b"weights")
    ran = Arithmetic("NVIDIA H100", True, "O0", False, "3.3.1")
    own = evaluation_identity(checkpoint, "i" * 64, "resnet48_mini", ran, None)
    assert own["setting"] == "resnet48_mini, NVIDIA H100, TF32, amp O0, Paddle 3.3.1"
    counts = Counts.zeros(2)
    counts.images = 1
    path = tmp_path / "eval_state.npz"
    save_state(path, own, 1, counts)
    assert load_state(path, own).counts.images == 1
    others = [
        Arithmetic("NVIDIA A100", True, "O0", False, "3.3.1"),
        Arithmetic("NVIDIA H100", False, "O0", False, "3.3.1"),
        Arithmetic("NVIDIA H100", True, "O1", False, "3.3.1"),
        Arithmetic("NVIDIA H100", True, "O0", True, "3.3.1"),
        Arithmetic("NVIDIA H100", True, "O0", False, "3.4.0"),
    ]
    for other in others:
        setting = evaluation_identity(checkpoint, "i" * 64, "resnet48_mini", other, None)
        with pytest.raises(StateError, match="of other settings: setting") as error:
            load_state(path, setting)
        assert str(other) in str(error.value) and str(ran) in str(error.value)


def test_stage_3_computes_as_the_flags_say(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "ROUTES", (gpu_fakes.fused_operator,))
    gpu_kernels.find_fused.cache_clear()
    plain, tf32 = (Arithmetic("card", on) for on in (False, True))
    half = Arithmetic("card", True, "O1")
    assert wanted_variant(plain, None) is None  # a CPU
    gpu_fakes.fake_card(monkeypatch)
    seen = paddle.zeros([4, 3, 8, 8], "uint8")
    assert wanted_variant(plain, None) == Variant(Precision.FLOAT32, "NCHW", True)
    assert wanted_variant(tf32, None) == Variant(Precision.TF32, "NCHW", True)
    assert wanted_variant(tf32, seen) == Variant(Precision.TF32, "NCHW", False)
    monkeypatch.setattr(gpu_kernels, "ROUTES", ())
    gpu_kernels.find_fused.cache_clear()
    assert wanted_variant(half, None) == Variant(Precision.FLOAT16, "NHWC", False)
    gpu_kernels.find_fused.cache_clear()


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


def test_a_card_that_does_not_say_is_taken_to_be_empty(monkeypatch, caplog):
    gpu_fakes.fake_card(monkeypatch, gib=40, used_gib=15)
    monkeypatch.delattr(paddle.cuda, "mem_get_info")
    assert device.free_bytes() == 39 * 2**30
    assert "what is free of its memory" in caplog.text


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
