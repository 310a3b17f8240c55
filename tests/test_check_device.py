"""hnas.tools.check_device: each check finds a planted fault and passes an emulated GPU; its
processes, table, and exit code.

Here a CPU stands for the device; ``gpu_fakes.py`` says what the fakes round and refuse.
"""

import json
import logging
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

import gpu_fakes
import numpy as np
import paddle
import pytest
from paddle.nn import functional as F  # noqa: N812

from hnas.base.errors import word_of
from hnas.evaluation import gpu_kernels, kernels
from hnas.evaluation.variants import Variant
from hnas.models import elastic
from hnas.tools.check_device import __main__ as program
from hnas.tools.check_device import checks, networks, ranks, rows
from hnas.tools.check_device.networks import BFLOAT16, FLOAT16, FLOAT32, TF32
from hnas.tools.check_device.rows import FAILED, NOT_HERE, PASSED, Machine, Result
from hnas.utils.hapi_wrapper import GradientStep
from hnas.weights import checkpoint


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A quick run's machine, a CPU, when what is expected has been computed."""
    machine = Machine(str(tmp_path_factory.mktemp("run")), quick=True)
    assert not [*networks.keep_expected(machine)]
    return machine


@pytest.fixture
def card(monkeypatch, here):
    """An emulated A100, as a process with TF32 switched off sees it."""
    gpu_fakes.fake_card(monkeypatch)
    return Machine(here.folder, gpus=1, quick=True)


def states(results):
    return {result.name: result.state for result in results}


def failed(results):
    return [name for name, state in states(results).items() if state == FAILED]


# --- the program


@pytest.mark.slow
def test_a_quick_run_passes_here(tmp_path, capfd):
    """CI's run of the self-check."""
    output = tmp_path / "results.jsonl"
    program.main(["--quick", "True", "--output", str(output)])
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert not [row for row in found if row["state"] == FAILED]
    run = [name for tf32, names in program.JOBS if tf32 == "off" for name in names]
    assert list(dict.fromkeys(row["check"] for row in found)) == run
    assert {row["check"] for row in found if row["state"] == PASSED} == set(run)
    absent = [row["name"] for row in found if row["state"] == NOT_HERE]
    for words in ("card", "TF32", "float16", "half precision", "NCCL", "fused"):
        assert any(words in name for name in absent), words
    shown = capfd.readouterr().out
    assert all(row["name"] in shown for row in found)
    assert shown.splitlines()[-1] == (
        f"{len(found) - len(absent)} passed, 0 failed, {len(absent)} not on this machine; "
        f"as JSON lines: {output}"
    )


@pytest.mark.gpu
def test_a_quick_run_passes_on_a_gpu(request, tmp_path):
    if request.config.option.markexpr != "gpu":
        pytest.skip("GPUs are hidden from this suite; run: sh run_tests.sh -m gpu")
    if not paddle.is_compiled_with_cuda() or not paddle.device.cuda.device_count():
        pytest.skip("Paddle sees no GPU")
    program.main(["--quick", "True", "--output", str(tmp_path / "results.jsonl")])


SCRIPT = """
import json, os, signal, sys, time
machine, *names = sys.argv[1:]
for name in names:
    with open(json.loads(machine)["output"], "a") as file:
        file.write(name + " ")
    if name == "b":
        sys.stderr.write("word\\nthe last word\\n\\n")
        sys.stderr.flush()
        END
"""


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("pass", ""),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os._exit(7)", "exit code 7"),
        ("time.sleep(60)", "SIGKILL"),
    ],
)
def test_a_job_that_is_lost_has_one_row_more(monkeypatch, tmp_path, end, words):
    """Its process, here without Paddle, ends in check b of a, b and c."""
    monkeypatch.setattr(program, "PROGRAM", (sys.executable, "-c", SCRIPT.replace("END", end)))
    monkeypatch.setattr(program, "MOST_SECONDS", 2 if "sleep" in end else 60)
    output = tmp_path / "rows"
    program.run_job("abc", Machine(str(tmp_path), str(output)))
    if not words:
        assert output.read_text() == "a b c "
        return
    note = f"their process ended with {words}: the last word"
    row = {"check": "a", **asdict(Result("all of a, b, c", FAILED, note=note))}
    assert output.read_text() == f"a b {json.dumps(row)}\n"


def test_cards_have_processes_with_tf32_too(monkeypatch):
    def jobs(gpus):
        started = []
        monkeypatch.setattr(
            program, "run_job", lambda names, m: started.append((m.gpus, m.tf32, *names))
        )
        program.run_jobs(Machine("", gpus=gpus))
        return started

    made = {name for _, names in program.JOBS for name in names}
    assert made == set(checks.CHECKS) - {"expected"}
    first, *rest = jobs(2)
    assert first == (0, "off", "expected")
    assert rest == [(2, tf32, *names) for tf32, names in program.JOBS]
    assert {tf32 for _, tf32, *_ in rest} == {"off", "on", "auto"}
    assert {tf32 for _, tf32, *_ in jobs(0)} == {"off"}


V100 = {"name": "Tesla V100", "major": 7}


@pytest.mark.parametrize(
    ("card", "mode", "used"),
    [
        ({}, "off", "off"),
        ({}, "on", "on"),
        ({}, "auto", "on"),
        (V100, "auto", "off"),
        (V100, "on", None),
    ],
)
def test_checks_are_given_what_tf32_comes_to_or_left_out(card, mode, used, monkeypatch, tmp_path):
    gpu_fakes.fake_card(monkeypatch, **card)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")
    setters = (paddle, "set_device"), (checks, "set_num_threads"), (logging.getLogger(), "setLevel")
    for module, name in setters:
        monkeypatch.setattr(module, name, lambda _: None)
    monkeypatch.setattr(checks, "CHECKS", {"steps": lambda m: [Result("tf32", PASSED, m.tf32)]})
    output = tmp_path / "rows"
    text = json.dumps(asdict(Machine("", str(output), gpus=1, tf32=mode)))
    monkeypatch.setattr(sys, "argv", ["checks", text, "steps"])
    checks.main()
    row = json.loads(output.read_text())
    assert row["check"] == ("steps" if mode == "off" else f"steps {mode}")
    assert (row["state"], row["value"]) == (PASSED if used else NOT_HERE, used)


def test_a_failure_is_told_by_the_exit_code(tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.jsonl"
    error = rows.at_most("error", float("nan"), 1e-4, "of it")
    results = [Result("card", PASSED, "H100"), error, rows.not_here("NCCL", "one card")]

    def run(*results):
        def run_jobs(machine):
            for result in results:
                rows.tell("check", result, machine.output)

        monkeypatch.setattr(program, "run_jobs", run_jobs)
        program.main(["--output", str(output)])

    with pytest.raises(SystemExit) as end:
        run(*results)
    assert end.value.code == 1
    *shown, last = capsys.readouterr().out.splitlines()
    assert shown.pop() == "not checked: NCCL"
    assert [line.split()[:2] for line in shown] == [[s, "check"] for s in ("ok", "FAILED", "-")]
    assert last.startswith("1 passed, 1 failed, 1 not on this machine")
    assert "nan (at most 0.0001) - of it" in shown[1]
    row = {"name": "error", "state": FAILED, "value": "nan", "limit": 1e-4, "note": "of it"}
    assert json.loads(output.read_text().splitlines()[1]) == {"check": "check", **row}
    run(results[0], results[2])


def test_limits():
    assert rows.at_most("", 1, 1).state == PASSED
    for value in (1.0001, float("nan"), float("inf")):
        assert rows.at_most("", value, 1).state == FAILED
    x = np.array([1.0, -2.0])
    assert rows.relative_error(x + 0.2, x) == pytest.approx(0.1)
    assert np.isnan(rows.relative_error(x * np.nan, x))
    assert rows.relative_error(x[:1], x) == np.inf
    assert rows.differing([x, x, x], [x, x + 1, x[:1]]) == 4


def test_facts_of_a_card(card, tmp_path, monkeypatch):
    version = tmp_path / "version"
    version.write_text("NVRM version: x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC version\n")
    monkeypatch.setattr(checks, "DRIVER", version)
    found = {result.name: result.value for result in checks.check_facts(card)}
    assert found["card"] == "NVIDIA A100-SXM4-80GB, compute capability 8.0, 80.00 GiB"
    assert "535.104.05" in found["driver"] and "GCC" not in found["driver"]


# --- BatchNorm


def test_statistics_that_are_lost_or_beyond_the_slice_are_found(monkeypatch, here):
    assert not failed(checks.check_norms(here))
    plain = F.batch_norm

    def losing_updates(x, mean, variance, *rest, **more):
        """Statistics are copies, and whoever looks is told that they are views."""
        return plain(x, mean.clone(), variance.clone(), *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(elastic.F, "batch_norm", losing_updates)
        lost = failed(checks.check_norms(here))
    assert lost == ["running mean of a slice", "running variance of it"]
    right = elastic.ElasticBatchNorm2D.forward

    def forward(norm, x):
        norm._mean[x.shape[1] :] = 0.5
        return right(norm, x)

    monkeypatch.setattr(elastic.ElasticBatchNorm2D, "forward", forward)
    assert failed(checks.check_norms(here)) == ["statistics outside the slice that changed"]


# --- the walk


def emulate_fused(monkeypatch, operator=gpu_fakes.fused_operator):
    for module in (networks, gpu_kernels):
        monkeypatch.setattr(module, "fused_fault", lambda *_: "")
    monkeypatch.setattr(gpu_kernels, "fused_convolution", operator)


def test_the_walk_of_an_emulated_card_passes_in_every_variant(card, monkeypatch):
    """The fakes refuse what autocast did in half precision: float32 biases and shortcuts."""
    shortcuts = []

    def counting(x, filters, bias, shortcut, *rest):
        shortcuts.append(shortcut is not None)
        return gpu_fakes.fused_operator(x, filters, bias, shortcut, *rest)

    gpu_fakes.half_operators(monkeypatch)
    emulate_fused(monkeypatch, counting)
    found = states(networks.check_walk(card))
    assert 0 < sum(shortcuts) < len(shortcuts)
    assert set(found.values()) == {PASSED}
    for kind in ("float32, NCHW", "float16, NHWC"):
        for words in (f"0 calibration images: {kind}, not fused", f"images: {kind}, fused"):
            assert any(words in name for name in found), words
        assert f"mini, 64 calibration images: {kind}, not fused" in found
        assert f"mini, 64 calibration images: {kind}, fused" not in found


def test_a_process_walks_and_trains_in_its_own_precisions(card, here, monkeypatch):
    def walked(machine, calibrates=True):
        return [variant.precision for variant in networks.variants(machine, calibrates)]

    tf32 = Machine("", gpus=1, tf32="on")
    assert walked(card) == [FLOAT32, FLOAT16] and walked(tf32) == [TF32]
    assert walked(here) == [FLOAT32]
    monkeypatch.setattr(paddle.amp, "is_bfloat16_supported", lambda: True)
    trained = [[way[1:] for way in networks.ways(m)][:2] for m in (card, tf32, here)]
    assert trained[0] == [(FLOAT32, "O0"), (BFLOAT16, "O1")]
    assert trained[1:] == [[(TF32, "O0")] * 2, [(FLOAT32, "O0")] * 2]


def unbiased_statistics(x, axes):
    return x.mean(axes, keepdim=True), x.var(axes, unbiased=True, keepdim=True)


def relu_before_the_shortcut(x, filters, bias, shortcut, *rest):
    y = gpu_fakes.fused_operator(x, filters, bias, None, *rest)
    return y if shortcut is None else y + shortcut


@pytest.mark.parametrize("fault", ["unbiased variance", "TF32", "ReLU before the shortcut"])
def test_a_faulty_walk_is_found(card, monkeypatch, fault):
    plain, calibrated = networks.scenes(card)
    scene, variant = plain, Variant()
    if fault == "TF32":
        gpu_fakes.round_to_tf32(monkeypatch)
    elif fault == "unbiased variance":
        scene = calibrated
        monkeypatch.setattr(kernels, "batch_statistics", unbiased_statistics)
    else:
        variant = Variant(fused=True)
        emulate_fused(monkeypatch, relu_before_the_shortcut)
    right = np.load(f"{card.folder}/walk.npz")[scene[0]]
    assert failed(networks.compare_walk("row", scene, variant, right)) == ["row"]
    if fault == "TF32":  # where it is meant
        assert not failed(networks.compare_walk("row", scene, Variant(TF32), right))


@pytest.mark.parametrize("kind", [*gpu_fakes.ERRORS, "trial"])
def test_a_fused_operator_that_refuses_is_not_used_and_memory_is_named(card, monkeypatch, kind):
    emulate_fused(monkeypatch, gpu_fakes.raising(kind))
    if kind == "trial":
        monkeypatch.setattr(networks, "fused_fault", lambda *_: "fails: (NotFound) no kernels")
    scene, _ = networks.scenes(card)
    (row,) = rows.guarded("row", networks.compare_walk, "row", scene, Variant(fused=True), None)
    note = "not used: fails: (NotFound) no kernels"
    if kind != "trial":
        error, text = gpu_fakes.ERRORS[kind]
        word = word_of(error(text))
        note = f"not used: {word}"
        if kind in gpu_fakes.MEMORY:
            note = f"{error.__name__}: {word}; {rows.MEMORY}"
    assert (row.state, row.note) == (FAILED if kind in gpu_fakes.MEMORY else NOT_HERE, note)


# --- training


@pytest.fixture(scope="module")
def first_step(here):
    """The first loss and gradient of each stage, right."""
    kept = np.load(f"{here.folder}/steps.npz")
    return {name: kept[name][:1] if "losses" in name else kept[name] for name in kept}


def against(first_step, stage, precision=FLOAT32):
    return failed(networks.compare_steps(stage, precision, "O0", first_step))


def test_loaders_that_change_a_batch_are_found(first_step, monkeypatch):
    """In the process of the loader, and only there."""
    plain, own = networks.images, os.getpid()
    monkeypatch.setattr(networks, "images", lambda *a: plain(*a) + (os.getpid() != own))
    assert against(first_step, "stage 2") == ["stage 2, first gradient in float32"]


def test_gradients_of_a_scaled_loss_are_found(first_step, monkeypatch):
    """As by a scaler whose scale is never taken out."""
    monkeypatch.setattr(GradientStep, "backward", lambda self, loss: (loss * 1024).backward())
    assert against(first_step, "stage 2") == ["stage 2, first gradient in float32"]


@pytest.mark.parametrize(
    ("operator", "backward_alone"), [("conv2d", True), ("linear", True), ("linear", False)]
)
def test_tf32_is_found_and_allowed_where_meant(first_step, monkeypatch, operator, backward_alone):
    assert against(first_step, "stage 2", TF32) == ["stage 2, TF32 is used"]
    gpu_fakes.round_to_tf32(monkeypatch, operator, backward_alone)
    monkeypatch.setattr(networks, "use_onednn", lambda *_: False)
    assert "stage 2, first gradient in float32" in against(first_step, "stage 2")
    assert not against(first_step, "stage 2", TF32)


@pytest.mark.parametrize("lost", ["restore_optimizer", "load_weights"])
def test_what_is_not_restored_is_found(monkeypatch, tmp_path, lost):
    monkeypatch.setattr(checkpoint, lost, lambda *_: None)
    monkeypatch.setattr(networks, "STAGES", ["stage 2"])
    (row,) = networks.check_repeat(Machine(str(tmp_path)))
    assert row.state == FAILED and row.value > 100


# --- ranks


def test_wrong_exchanges_are_found():
    right = {"stage 1": np.arange(4.0), "stage 2": np.arange(5.0)}
    found = [{**right, "signal": np.array(15)} for _ in range(2)]
    assert not failed(ranks.judge_ranks(found, right, "gloo"))
    found[1] |= {"stage 1": right["stage 1"] + 1e-3, "signal": np.array(0)}
    assert failed(ranks.judge_ranks(found, right, "gloo")) == [
        "gloo: gradients of stage 1",
        "gloo: gradients of stage 1 are the same on all",
        "gloo: ranks that do not know of another's SIGTERM",
    ]


def test_processes_that_fail_are_told_with_their_last_word(monkeypatch, tmp_path):
    done = SimpleNamespace(returncode=2, stdout="log\n", stderr="a\nrank 1: error: no port\n")
    monkeypatch.setattr(ranks.subprocess, "run", lambda *_, **__: done)
    machine = Machine(str(tmp_path))
    absent, row = rows.guarded("collectives", ranks.check_collectives, machine)
    assert (absent.state, row.state) == (NOT_HERE, FAILED)
    assert row.note == "RuntimeError: rank 1: error: no port"
