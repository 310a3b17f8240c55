"""Runs that are killed, stopped or go wrong lose nothing: on the CPU, bit for bit."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import tempfile
import time

import pytest
from entry_scripts import TIMEOUT, Runs, write_inputs

from hnas.utils.starting import NEUTRAL_FLAGS
from hnas.weights.loading import write_state

CLASSES, IMAGES, BATCH = 10, 2, 4
STEPS = CLASSES * IMAGES // BATCH


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    work = tmp_path_factory.mktemp("runs")
    write_inputs(work, IMAGES)
    return Runs(work, {"max_epoch": 2, "queue_size": 16})


@pytest.fixture(scope="module")
def undisturbed(runs) -> dict[int, str]:
    """The save folder of an uninterrupted run, by stage."""
    for stage in (1, 2):
        runs.run(stage, f"undisturbed{stage}")
    return {1: "undisturbed1", 2: "undisturbed2"}


def test_training_changes_weights_and_leaves_what_resuming_needs(runs, undisturbed):
    sets = {f"{epoch}{end}" for epoch in (0, 1) for end in (".pdparams", ".pdopt", ".pdstates")}
    names = sets | {"final.pdparams"}
    expected = names | {f"{name}.sha256" for name in names} | {"history.json", "run_id.json"}
    expected |= {"settings.json", "log.txt"}
    for folder in undisturbed.values():
        first, final = runs.weights(folder, "0"), runs.weights(folder)
        assert any(first[key].tobytes() != final[key].tobytes() for key in first)
        assert len(runs.losses(folder)) == 2
        assert {path.name for path in (runs.work / folder).iterdir()} == expected
    assert runs.weights(undisturbed[1], "0")["queue_pointer"].tolist() == [STEPS * BATCH % 16]


NEUTRAL = {"save_freq": 2, "save_steps": 1, "keep": 1, "log_freq": 7, "eval_freq": 1}
NEUTRAL |= {"num_workers": 1, "bn_calibration_images": 3, "device": "auto"}
NEUTRAL |= {"verify_images": True, "bad_images": "skip", "cache_dir": "C", "modelarch_file": "M"}
NEUTRAL |= {"image_dir": "./images", "pretrained": "./pretrained", "ckpt_dir": "./none"}
# What test_validation tries, or what has to be as it is here.
ELSEWHERE = {"rank_gt", "save_dir", "save_dir_new", "resume", "train_flag", "visualdl_dir"}


@pytest.mark.parametrize(
    ("stage", "changes", "told", "code"),
    [
        (1, NEUTRAL, "resumed from", 0),
        (2, NEUTRAL, "resumed from", 0),
        (1, {"pretrained": "./other"}, "other weights to start from than before: no matter", 0),
        (2, {"use_ckpt": True, "ckpt_dir": "./other"}, "other values than before: use_ckpt", 0),
        (2, {"pretrained": "./other"}, "is of another teacher than --pretrained .*other; give", 2),
    ],
)
def test_what_differs_on_resume_is_neutral_named_or_refused(
    stage, changes, told, code, runs, undisturbed
):
    assert {*NEUTRAL} | ELSEWHERE == NEUTRAL_FLAGS
    weights = runs.weights(".", "pretrained")
    write_state(runs.work / "other.pdparams", {k: 2 * value for k, value in weights.items()})
    before, after = runs.work / undisturbed[stage], tempfile.mkdtemp(dir=runs.work)
    for path in (*before.glob("0.*"), before / "run_id.json"):
        shutil.copy(path, after)
    changes = {k: str(v).replace("./", f"{runs.work}/./") for k, v in changes.items()}
    output = runs.run(stage, after, code=code, resume="auto", **changes)
    assert re.search(told, output) and ("other values" in told) == ("other values" in output)
    if code == 0 and "use_ckpt" not in changes:
        runs.assert_same(after, undisturbed[stage])


def wait_for_step(process) -> None:
    assert any("epoch 1/2 step 2/" in printed for printed in process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number", "code", "workers"),
    [(1, signal.SIGTERM, 143, 2), (2, signal.SIGINT, 130, 2), (2, signal.SIGTERM, 143, 0)],
)
def test_signals_save_and_end_with_their_code(stage, number, code, workers, runs, undisturbed):
    folder = f"signal{stage}{number}{workers}"
    process = runs.start(stage, folder, num_workers=workers)
    wait_for_step(process)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, output
    assert f"stopped by {signal.Signals(number).name} after epoch 1 step " in output
    assert "Traceback" not in output
    resumed = runs.run(stage, folder, resume="auto", num_workers=workers)
    assert "training from epoch 1 step " in resumed
    assert "training from epoch 1 step 1\n" not in resumed
    runs.assert_same(folder, undisturbed[stage])


@pytest.mark.slow
def test_loader_processes_do_not_outlive_a_killed_run(runs):
    process = runs.start(2, "orphans", num_workers=2)
    wait_for_step(process)
    process.kill()
    process.wait()
    process.stdout.close()
    os.killpg(process.pid, 0)
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.2)


def position(line: str) -> int | None:
    """Steps from the first epoch's start that a line of the log names."""
    found = re.search(r"epoch (\d+)(?:/\d+)? step (\d+)", line)
    return (int(found[1]) - 1) * STEPS + int(found[2]) if found else None


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_kills_at_random_moments_change_nothing(stage, runs, undisturbed):
    """Killed twice, some steps after it began or while it saves, and resumed each time."""
    rng, folder, done, killed = random.Random(stage), f"killed{stage}", 0, 0
    returned = -signal.SIGKILL
    while returned == -signal.SIGKILL:
        process = runs.start(stage, folder, resume="auto", save_steps=2)
        left, moment = rng.randint(1, 3), rng.uniform(0, 0.1)
        for printed in process.stdout:
            if "training from" in printed:
                # A step may have been logged whose checkpoint was being written.
                assert done - (position(printed) - 1) <= 2
            elif step := position(printed):
                done, left = step, left - 1
                if not left and killed < 2:
                    time.sleep(moment)
                    process.kill()
                    killed += 1
        returned = process.wait(TIMEOUT)
    assert returned == 0 and killed
    runs.assert_same(folder, undisturbed[stage])
