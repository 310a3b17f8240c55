"""hnas.tools.check_device as a program: a whole quick run, lost processes, table, exit code."""

import json
import subprocess
import sys

import gpu_fakes
import paddle
import pytest

from hnas.base.errors import UserError
from hnas.tools.check_device import __main__ as program
from hnas.tools.check_device import facts, processes, rates, worker
from hnas.tools.check_device.machine import Machine, write_expected
from hnas.tools.check_device.plan import CHECKS, SLOW, TWIN_ENDED, WITH_TF32, Plan
from hnas.tools.check_device.processes import results_of
from hnas.tools.check_device.results import (
    FAILED,
    NOT_HERE,
    PASSED,
    Result,
    at_most,
    fact,
    guarded,
    holds,
    not_here,
)

FLAGS = ["--quick", "True", "--output"]


@pytest.mark.slow
def test_a_quick_run_passes_here(tmp_path, capfd):
    """CI's run of the self-check."""
    output = tmp_path / "results.jsonl"
    program.main([*FLAGS, str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert not [row for row in rows if row["state"] == FAILED]
    assert list(dict.fromkeys(row["check"] for row in rows)) == [
        name for name in CHECKS if name not in SLOW
    ]
    passed = {row["check"] for row in rows if row["state"] == PASSED}
    assert passed == set(CHECKS) - {*SLOW, "fused"}
    absent = [row["name"] for row in rows if row["state"] == NOT_HERE]
    for words in ("card", "in TF32", "in float16", "in bfloat16", "NCCL", "fused"):
        assert any(words in name for name in absent), words
    shown = capfd.readouterr().out
    assert all(row["name"] in shown for row in rows)
    assert shown.splitlines()[-1] == (
        f"{len(rows) - len(absent)} passed, 0 failed, {len(absent)} not on this machine; "
        f"as JSON lines: {output}"
    )


# --- processes


def starter(script, log):
    """Starts a process that runs a script with the names of checks; without Paddle."""
    head = "import json, os, signal, sys, time\nnames = sys.argv[1:]\n"
    head += "def tell(**content): print(json.dumps(content), flush=True)\n"
    starts = []

    def start(names):
        starts.append(list(names))
        command = [sys.executable, "-c", head + script, *names]
        with open(log, "wb") as file:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file)

    start.starts = starts
    return start


EACH = """
for name in names:
    tell(name=name, state="passed")
    {}
    tell(done=name)
"""


def run(tmp_path, script, names="abc", silent_s=20):
    log = tmp_path / "log"
    start = starter(script, log)
    found = [*results_of(names, start, log, silent_s)]
    return [(check, result.name, result.state) for check, result in found], found, start.starts


def test_all_checks_run_in_one_process(tmp_path):
    rows, _, starts = run(tmp_path, EACH.format("print('what a library says', [1, 2])"))
    assert rows == [(name, name, PASSED) for name in "abc"] and len(starts) == 1


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV: the last word"),
        ("os.abort()", "ended by SIGABRT: the last word"),
        ("os._exit(7)", "ended with exit code 7: the last word"),
        ("os.close(1); time.sleep(60)", "still there 1 s after its last result: the last word"),
    ],
)
def test_a_lost_process_fails_its_check_and_another_goes_on(tmp_path, monkeypatch, end, words):
    monkeypatch.setattr(processes, "ENDING_SECONDS", 1)
    end = (
        f"if name == 'b': sys.stderr.write('word\\nthe last word\\n\\n'); sys.stderr.flush(); {end}"
    )
    rows, found, starts = run(tmp_path, EACH.format(end))
    assert rows == [
        ("a", "a", PASSED),
        ("b", "b", PASSED),
        ("b", "b", FAILED),
        ("c", "c", PASSED),
    ]
    assert words in found[2][1].note and starts == [["a", "b", "c"], ["c"]]


def test_a_silent_process_is_ended(tmp_path):
    rows, found, starts = run(tmp_path, EACH.format("time.sleep(60 * (name == 'b'))"), silent_s=1)
    assert rows[2] == ("b", "b", FAILED) and starts[1:] == [["c"]]
    assert "no result for 1 s" in found[2][1].note


def test_who_waits_for_the_twin_is_excused(tmp_path):
    log = tmp_path / "log"
    start = starter(EACH.format("time.sleep(0.5)"), log)
    excuses = []
    found = [*results_of("a", start, log, 0.1, lambda: not excuses.append(1))]
    assert [result.state for _, result in found] == [PASSED] and len(excuses) > 1


def test_a_lost_device_costs_no_check(tmp_path):
    script = EACH.format("") + "    sys.exit(3)"
    rows, _, starts = run(tmp_path, script)
    assert [state for *_, state in rows] == [PASSED] * 3
    assert starts == [["a", "b", "c"], ["b", "c"], ["c"]]


def test_a_users_error_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="^no such card$"):
        run(tmp_path, "sys.stderr.write('error: no such card\\n'); sys.exit(2)")


def test_an_exception_is_a_failed_check_with_its_last_line():
    def check():
        yield fact("first", "a")
        raise RuntimeError("a stack\n  of C++\nCUDA error(700), an illegal address  \n")

    first, second = guarded("walk", check)
    assert first.state == PASSED
    assert second == Result(
        "walk", FAILED, note="RuntimeError: CUDA error(700), an illegal address"
    )


def test_every_check_has_a_function():
    assert set(worker.FUNCTIONS) == {*CHECKS, "cards"} and set(WITH_TF32) <= set(CHECKS)


# --- the twin


def test_what_the_twin_computed_or_why_not(tmp_path):
    machine = Machine(Plan(), tmp_path)
    write_expected(tmp_path, "there", {"x": paddle.ones([2]).numpy()})
    (tmp_path / "failed.failed").write_text("MemoryError: of 8 GiB")
    (tmp_path / TWIN_ENDED).touch()
    assert machine.expected("there")["x"].tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="on the CPU: MemoryError: of 8 GiB"):
        machine.expected("failed")
    with pytest.raises(RuntimeError, match="has ended"):
        machine.expected("never")


# --- table and command line


def report(tmp_path, capsys, *results):
    output = tmp_path / "out.jsonl"
    passed = program.report((("check", result) for result in results), output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return passed, rows, capsys.readouterr().out.splitlines()


def test_a_failure_is_told_twice_and_by_the_exit_code(tmp_path, capsys, monkeypatch):
    results = [
        fact("card", "H100"),
        at_most("error", float("nan"), 1e-4, "of it"),
        not_here("NCCL", "one card"),
    ]
    passed, rows, shown = report(tmp_path, capsys, *results)
    assert not passed and shown[0] == "check"
    assert [line.split()[0] for line in shown[1:4]] == ["ok", "FAILED", "-"]
    assert shown[4].startswith("1 passed, 1 failed, 1 not on this machine")
    assert shown[5] == shown[2] and "nan (at most 0.0001) - of it" in shown[2]
    assert rows[1] == {
        "check": "check",
        "name": "error",
        "state": FAILED,
        "value": "nan",
        "limit": 1e-4,
        "note": "of it",
    }
    monkeypatch.setattr(program, "all_results", lambda *_: iter([("check", results[1])]))
    with pytest.raises(SystemExit) as end:
        program.main(["--output", str(tmp_path / "out.jsonl")])
    assert end.value.code == 1
    monkeypatch.setattr(program, "all_results", lambda *_: iter([("check", results[0])]))
    program.main(["--output", str(tmp_path / "out.jsonl")])


def test_limits():
    assert at_most("", 1, 1).state == PASSED
    for value in (1.0001, float("nan"), float("inf")):
        assert at_most("", value, 1).state == FAILED
    assert holds("", True).state == PASSED and holds("", False).state == FAILED


@pytest.mark.parametrize("text", ["", "0,", ",1", "a", "0,0", "-1", "0 1", "٣", "1e2", "1000"])
def test_lists_of_cards_that_are_none(text):
    with pytest.raises(UserError, match="--gpus"):
        program.main(["--gpus", text])


def test_flags_that_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="--full and --quick"):
        program.main(["--full", "True", *FLAGS, str(tmp_path / "x")])


@pytest.mark.parametrize(
    ("asked", "seen", "found"),
    [
        (None, 0, ()),
        (None, 2, (0, 1)),
        ((1,), 2, (1,)),
        ((0, 2), 2, UserError),
        ((0,), 0, UserError),
    ],
)
def test_cards_are_those_that_paddle_sees(tmp_path, monkeypatch, asked, seen, found):
    monkeypatch.setattr(
        program, "results_of", lambda *_: iter([("cards", fact("cards that Paddle sees", seen))])
    )
    if found is UserError:
        with pytest.raises(UserError, match=f"--gpus names card .* Paddle sees {seen}"):
            program.chosen_cards(asked, tmp_path)
    else:
        assert program.chosen_cards(asked, tmp_path) == found


def test_on_cards_tf32_and_repeating_have_processes_of_their_own():
    names = [*CHECKS]
    assert program.processes(Plan(), names) == [(names, "off")]
    several = [name for name in names if name != "repeat"]
    assert program.processes(Plan((0,)), names) == [
        (several, "off"),
        (["repeat"], "off"),
        ([*WITH_TF32], "on"),
        (["tf32"], "auto"),
    ]
    quick = program.processes(Plan((0,)), [name for name in names if name != "rates"])
    assert quick[2] == ([name for name in WITH_TF32 if name != "rates"], "on")


# --- facts and rates of an emulated card


@pytest.fixture
def card(monkeypatch, tmp_path):
    gpu_fakes.fake_card(monkeypatch)
    properties = paddle.device.cuda.get_device_properties()
    properties.multi_processor_count = 108
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    return Machine(Plan((0,)), tmp_path)


def test_facts_of_a_card(card, tmp_path, monkeypatch):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    monkeypatch.setattr(facts, "DRIVER", version)
    found = {result.name: result.value for result in facts.check(card)}
    assert found["card"] == "NVIDIA A100-SXM4-80GB, 108 multiprocessors"
    assert found["compute capability"] == "8.0" and found["memory of the card"] == "80.00 GiB"
    assert found["cards that Paddle sees"] == 2 and found["driver"] == "535.104.05"
    monkeypatch.setattr(facts, "DRIVER", tmp_path / "none")
    assert facts.driver() == "unknown"


def test_rates_of_an_emulated_card(card, monkeypatch):
    gpu_fakes.half_operators(monkeypatch)
    small = {
        "SHAPES": ((8, 6),) * 4,
        "BATCH": 2,
        "WARM_UP": 1,
        "SECONDS": 1e-9,
        "WALK_ON_GPU": ("resnet48_mini", 32, 2, 2),
        "TRAINED_ON_GPU": ("_mini", 32, 2),
        "find_fused": lambda *_: (gpu_fakes.fused_operator, ""),
    }
    for name, value in small.items():
        monkeypatch.setattr(rates, name, value)
    monkeypatch.setattr("hnas.evaluation.gpu_kernels.find_fused", small["find_fused"])
    monkeypatch.setattr("hnas.tools.check_device.walk.find_fused", small["find_fused"])
    monkeypatch.setattr(rates, "training_rate", lambda *arguments: [fact(arguments[1], "")])
    found = {result.name: result for result in rates.check(card)}
    assert not [result for result in found.values() if result.state != PASSED]
    for words in ("float16, NHWC, fused", "float32, NCHW, not fused", "bfloat16, NCHW, fused"):
        assert f"block of stage 3: {words}" in found
    assert found["walk at 32 px: float16, NHWC, fused"].value.startswith("plan --gmacs_per_s")
    assert "training stage 2, --amp O1 --tf32 off" in found


def test_training_rates_here(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "SECONDS", 1e-9)
    monkeypatch.setattr(rates, "WARM_UP", 1)
    monkeypatch.setattr(rates, "TRAINED_ON_CPU", ("_mini", 32, 2))
    for stage in (1, 2):
        (row,) = rates.training_rate(Machine(Plan(), tmp_path), "row", stage, "O0")
        assert row.value.endswith("images/s") and float(row.value.split()[0]) > 0
