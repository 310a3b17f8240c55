"""Runs that are killed, stopped or go wrong lose nothing: on the CPU, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import paddle
import pytest
from entry_scripts import TIMEOUT, Runs, write_inputs
from PIL import Image

import train_supernet_pinas_stage1
import train_supernet_pinas_stage2_simple
from hnas.architecture_file import submission
from hnas.base.errors import UserError
from hnas.parallel.distributed import StopSignals
from hnas.search_space import RESNET48_MINI
from hnas.utils.starting import NEUTRAL_FLAGS
from hnas.weights.loading import read_weights, write_state

CLASSES, IMAGES, BATCH = 10, 2, 4
STEPS = CLASSES * IMAGES // BATCH
SCRIPTS = {1: train_supernet_pinas_stage1, 2: train_supernet_pinas_stage2_simple}


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
    for folder in undisturbed.values():
        first, final = runs.weights(folder, "0"), runs.weights(folder)
        assert any(first[key].tobytes() != final[key].tobytes() for key in first)
        assert len(runs.losses(folder)) == 2
        assert {path.name for path in (runs.work / folder).iterdir()} == expected
    assert runs.weights(undisturbed[1], "0")["queue_pointer"].tolist() == [STEPS * BATCH % 16]


# --- flags, and files that enter training


@pytest.fixture
def train(runs, monkeypatch):
    """Train a stage in this process; gives the final weights, by name, as bytes."""

    def train(stage, folder, **flags):
        flags = runs.given(stage, folder, **flags)
        line = [f"--{name}={value}" for name, value in flags.items()]
        monkeypatch.setattr(sys, "argv", ["script", *line])
        with paddle.utils.unique_name.guard():
            SCRIPTS[stage].main()
        return {name: value.tobytes() for name, value in read_weights(folder / "final").items()}

    return train


NEUTRAL = {
    "save_freq": 2,
    "save_steps": 1,
    "keep": 1,
    "log_freq": 7,
    "eval_freq": 1,
    "num_workers": 1,
    "bn_calibration_images": 3,
    "device": "auto",
    "verify_images": True,
    "bad_images": "skip",
    "cache_dir": "C",
    "modelarch_file": "M",
    "init": "I",
    "ckpt_dir": "D",
}
GIVEN = {"save_dir", "save_dir_new", "resume", "image_dir", "pretrained", "rank_gt"}
NOT_TRIED = {"train_flag", "visualdl_dir"}


def first_epoch_of(folder):
    """As if a run had been killed after its first epoch."""
    for path in folder.glob("1.*"):
        path.unlink()


@pytest.mark.parametrize("stage", [1, 2])
def test_neutral_flags_change_no_bit(stage, runs, train, tmp_path, caplog):
    assert {*NEUTRAL} | GIVEN | NOT_TRIED == NEUTRAL_FLAGS
    shutil.copytree(runs.work / "images", tmp_path / "images")
    shutil.copy(runs.work / "pretrained.pdparams", tmp_path)
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(0), 3)
    (tmp_path / "gt.json").write_text(json.dumps(submission(archs, [0.1, 0.2, 0.3])))
    flags = {**NEUTRAL, "image_dir": tmp_path / "images", "rank_gt": tmp_path / "gt.json"}
    flags |= {"pretrained": tmp_path / "pretrained", "save_dir_new": tmp_path / "after"}
    expected = train(stage, tmp_path / "before", keep=1)
    first_epoch_of(tmp_path / "before")
    assert train(stage, tmp_path / "after", resume=tmp_path / "before", **flags) == expected
    assert "other values" not in caplog.text


@pytest.mark.parametrize(
    ("stage", "changes", "told", "same"),
    [
        (2, {"pretrained": "OTHER"}, "0 is of another teacher than .*other; give the same", None),
        (1, {"pretrained": "OTHER"}, "other weights to start from than before: no matter", True),
        (2, {"use_ckpt": True, "ckpt_dir": "OTHER"}, "than before: use_ckpt\n", False),
        (2, {"image_dir": "TWIN"}, "than before: image_pixels\n", False),
    ],
)
def test_other_files_are_refused_or_named(
    stage, changes, told, same, runs, train, tmp_path, caplog
):
    twin, other = shutil.copytree(runs.work / "images", tmp_path / "twin"), tmp_path / "other"
    first = min((twin / "train").glob("*/*"))
    Image.open(first).rotate(180).save(first)
    weights = runs.weights(".", "pretrained")
    weights["blocks.0.conv.weight"] *= 2
    write_state(f"{other}.pdparams", weights)
    places = {"OTHER": other, "TWIN": twin}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    caplog.set_level("INFO")
    expected = train(stage, tmp_path / "out")
    first_epoch_of(tmp_path / "out")
    try:
        found = train(stage, tmp_path / "out", resume="auto", **changes)
    except UserError as error:
        assert same is None and re.search(told, str(error))
    else:
        assert (found == expected) is same and re.search(told, caplog.text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number", "code", "workers"),
    [(1, signal.SIGTERM, 143, 2), (2, signal.SIGINT, 130, 2), (2, signal.SIGTERM, 143, 0)],
)
def test_signals_save_and_end_with_their_code(stage, number, code, workers, runs, undisturbed):
    folder = f"signal{stage}{number}{workers}"
    process = runs.start(stage, folder, num_workers=workers)
    for printed in process.stdout:
        if "epoch 1/2 step 2/" in printed:
            os.killpg(process.pid, number)
            break
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, output
    assert f"stopped by {signal.Signals(number).name} after epoch 1 step " in output
    assert "Traceback" not in output
    resumed = runs.run(stage, folder, resume="auto", num_workers=workers)
    assert "training from epoch 1 step " in resumed
    assert "training from epoch 1 step 1\n" not in resumed
    runs.assert_same(folder, undisturbed[stage])


def test_the_second_signal_acts_at_once():
    # What is started in a shell's background ignores SIGINT.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.signal(signal.SIGINT, kept) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_loader_processes_do_not_outlive_a_killed_run(runs):
    process = runs.start(2, "orphans", num_workers=2)
    for printed in process.stdout:
        if "epoch 1/2 step 2/" in printed:
            break
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
