"""How a GPU rounds, what it is called and holds, and when the host waits for it. The card is faked:
computations and copies are a CPU's."""

import contextlib
import dataclasses
import errno
import logging
import os
import re
import runpy
import sys
from types import SimpleNamespace

import gpu_fakes
import paddle
import pytest
from entry_scripts import ROOT
from gpu_fakes import ERRORS, raising
from paddle import nn

from hnas.base import device, errors
from hnas.base.command_line import OneLineParser
from hnas.base.device import Arithmetic, peak_memory, set_tf32
from hnas.base.errors import UserError
from hnas.base.files import replacing
from hnas.dataset.loader import EpochLoader, ImageDataset
from hnas.evaluation import gpu_kernels
from hnas.evaluation.engine import wanted_variant
from hnas.evaluation.results import evaluation_identity
from hnas.evaluation.variants import Precision, Variant
from hnas.parallel import distributed
from hnas.parallel.distributed import GradientExchange, StopSignals
from hnas.programs import parsing, runtime
from hnas.programs.flags import Stage
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.tools.check_device import rows
from hnas.utils.hapi_wrapper import ResumableModel, momentum_optimizer
from hnas.utils.training import TrainLogger

V100 = {"name": "Tesla V100-SXM2-32GB", "major": 7, "gib": 32}
CONVOLUTIONS, PRODUCTS = "FLAGS_cudnn_allow_tf32", "FLAGS_cublas_allow_tf32"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    gpu_kernels.fused_fault.cache_clear()
    yield
    gpu_kernels.fused_fault.cache_clear()


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
    found = gpu_fakes.fake_card(monkeypatch, flags=flags)
    if override:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    assert set_tf32(mode) == expected and device.has_tf32()
    assert (found[CONVOLUTIONS], found[PRODUCTS]) == (convolutions, products)
    # Older convolutions and the fused operator read no flags; NVIDIA's libraries a variable.
    switches = [found.get(f"set_{name}_switch") for name in ("cudnn", "cublas")]
    assert switches == ([None] * 2 if mode == "auto" else [convolutions, products])
    assert os.environ.get("NVIDIA_TF32_OVERRIDE") == ("0" if mode == "off" else override)


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


@pytest.mark.parametrize("stage", list(Stage), ids=str)
def test_every_program_takes_the_flags_and_refuses_tf32_and_halves_on_cpus(stage, tmp_path):
    given = ["--save_dir", str(tmp_path), "--device", "cpu"]
    wrong = {"--tf32=on": "--tf32 on needs a GPU"}
    if stage is not Stage.EXPORT:  # which has no use for it
        wrong["--amp=O1"] = "--amp O1 needs a GPU; CPUs compute in float32"
    for flag, words in wrong.items():
        with pytest.raises(UserError, match=words):
            runtime.start(parse_options(stage, [*given, flag]))
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


def test_all_of_the_arithmetic_is_in_the_setting_of_a_state():
    images = SimpleNamespace(hash="1" * 64, copies="2" * 64, sample="3" * 64)
    ran = Arithmetic("NVIDIA H100", True, "O0", False, "3.3.1")
    changes = {"device": "NVIDIA A100", "tf32": False, "amp": "O1", "deterministic": True}
    changes["paddle"] = "3.4.0"
    others = [dataclasses.replace(ran, **{name: value}) for name, value in changes.items()]
    settings = [
        evaluation_identity("c" * 64, images, "resnet48_mini", each, None)["setting"]
        for each in (ran, *others)
    ]
    assert settings[0] == "resnet48_mini, NVIDIA H100, TF32, amp O0, Paddle 3.3.1"
    assert len(set(settings)) == 6


def test_stage_3_computes_as_the_flags_say(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(gpu_kernels, "fused_convolution", gpu_fakes.fused_operator)
    plain, tf32 = (Arithmetic("card", on) for on in (False, True))
    half = Arithmetic("card", True, "O1")
    assert wanted_variant(plain, None) is None  # a CPU
    gpu_fakes.fake_card(monkeypatch)
    seen = paddle.zeros([4, 3, 8, 8], "uint8")
    assert wanted_variant(plain, None) == Variant(Precision.FLOAT32, "NCHW", True)
    assert wanted_variant(tf32, None) == Variant(Precision.TF32, "NCHW", True)
    assert wanted_variant(tf32, seen) == Variant(Precision.TF32, "NCHW", False)
    assert wanted_variant(tf32, None, fuses=False) == Variant(Precision.TF32, "NCHW", False)
    assert ", not fused: --fused off" in caplog.text and "TF32, NCHW, fused" in caplog.text
    monkeypatch.setattr(gpu_kernels, "fused_convolution", raising("cuDNN"))
    assert wanted_variant(half, None) == Variant(Precision.FLOAT16, "NHWC", False)


# --- memory


def test_the_devices_peak_memory_is_logged(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert "GPU" not in peak_memory()
    gpu_fakes.fake_card(monkeypatch)
    assert peak_memory().startswith("3.00 GiB on the GPU, ")
    log = TrainLogger(1, epochs=1, steps=1, batch=1)
    log.begin_epoch(0)
    log.tell_progress()
    assert "peak memory 3.00 GiB on the GPU, " in caplog.text


# --- errors


TRAINING = "halve --batch_size, .*--accumulate 2 .*--amp O1"
SCORING = "--chunk_size 128 .*--cache_gb 1 .*--amp O1"
PROGRAMS = {  # and what they say of memory
    "train_supernet_pinas_stage1": TRAINING,
    "train_supernet_pinas_stage2_simple": TRAINING,
    "hnas/tools/pretrain": TRAINING,
    "hnas/tools/train_standalone": TRAINING,
    "train_supernet": SCORING,
    "hnas/tools/search": SCORING,
    "hnas/tools/export": "lower --batch_size",
    "hnas/tools/latency": "lower --batch_size",
    "hnas/tools/check_device/checks": "--quick True",
    "hnas/tools/check_device/ranks": "--quick True",
}
CASES = [(name, "memory") for name in PROGRAMS] + [("train_supernet", kind) for kind in ERRORS]


@pytest.mark.parametrize(("program", "kind"), CASES)
def test_a_device_that_fails_is_one_line_in_every_program(program, kind, monkeypatch, capsys):
    for module, name in ((errors, "hold_signals"), (errors, "end_on_signals")):
        monkeypatch.setattr(module, name, lambda: None)
    for module, name in ((parsing, "parse_options"), (OneLineParser, "parse_args")):
        monkeypatch.setattr(module, name, raising(kind))
    monkeypatch.setattr(rows, "Machine", raising(kind))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["program", "{}"])
    # Other kinds may be mistakes of the program.
    with pytest.raises(IndexError if kind == "kind" else SystemExit) as end:
        runpy.run_path(str(ROOT / f"{program}.py"), run_name="__main__")
    if kind != "kind":
        words = f"out of memory: .*{PROGRAMS[program]}"
        if kind not in gpu_fakes.MEMORY:
            words = "the device or a library failed: .*check_device tells"
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and re.match(f"error: {words}", line), line
        assert not re.search("Hint|Please|/paddle", line)


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_an_exchanges_or_a_disks_where_they_may_be(kind, monkeypatch, tmp_path):
    error, text = ERRORS[kind]
    word, is_memory = re.escape(errors.word_of(error(text))), kind in gpu_fakes.MEMORY
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "init_parallel_env", raising(kind))
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "NCCL")
    monkeypatch.setattr(distributed.dist, "all_reduce", raising(kind))
    with pytest.raises(UserError, match=f"rank 0 cannot join the others: {word}$"):
        distributed.join_processes(cpu=False)
    lost = "" if is_memory else rf"lost another process \({word}\); see"
    with pytest.raises(error if is_memory else UserError, match=lost):
        distributed.sum_over_ranks(paddle.ones([2]))
    with pytest.raises(error), replacing(tmp_path / "file"):
        raising(kind)()
    with pytest.raises(UserError, match="cannot write .*: No space"), replacing(tmp_path / "file"):
        raising(OSError(errno.ENOSPC, "No space left on device"))()
    monkeypatch.setattr(device, "visible_gpus", lambda: 1)
    monkeypatch.setattr(paddle, "set_device", raising(kind))
    with pytest.raises(UserError, match=f"the GPU cannot be used: {word}; see nvidia-smi"):
        device.choose_device("auto")


# --- what ranks exchange


@pytest.mark.parametrize("told", [None, 1], ids=str)
def test_ranks_read_notices_before_a_step_and_nothing_within_it(told, monkeypatch):
    """Of two the other may be told to stop in a step; all know when the next one has ended.

    What a step of one process copies is looked at in test_training.py.
    """

    class Model(ResumableModel):
        def train_batch(self, inputs):
            with pytest.MonkeyPatch.context() as patch:
                for name in ("numpy", "tolist", "item", "__float__", "__int__", "__bool__"):
                    patch.setattr(paddle.Tensor, name, raising(AssertionError("a wait")))
                patch.setattr(paddle, "to_tensor", raising(AssertionError("a wait")))
                self.network(inputs).sum().backward()
                self.update()
            return {}

    def all_reduce(flat):
        flat[0] = flat[0] + (model.step == told)  # the first of TOLD, before the gradients

    model = Model(nn.Linear(2, 2))
    model.prepare(momentum_optimizer(model.network, 0.05, 0.9, 1e-4))
    model.exchange = GradientExchange(model.network.parameters(), StopSignals())
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_collective", contextlib.nullcontext)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    loader = EpochLoader(ImageDataset(range(4), None, 0), 1)
    loader.epoch = lambda *_: (paddle.ones([1, 2]) for _ in range(4))
    known = [model.exchange.received for _ in model.train_epoch(loader, 0)]
    assert known == [None, None] + [told and distributed.TOLD[0]] * 2
