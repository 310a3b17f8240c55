"""Runs that are killed, stopped or go wrong lose nothing: on the CPU, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import pytest
from entry_scripts import ROOT, write_inputs

from hnas.base.safe_pickle import load_pickle
from hnas.models.registry import build_network
from hnas.parallel.distributed import StopSignals
from hnas.search_space import find_backbone
from hnas.utils.gradient_step import momentum_optimizer
from hnas.utils.hapi_wrapper import DistillationModel
from hnas.utils.weights import read_weights

CLASSES, IMAGES, BATCH = 10, 2, 4
STEPS = CLASSES * IMAGES // BATCH
TIMEOUT = 120
SCRIPTS = {1: "train_supernet_pinas_stage1.py", 2: "train_supernet_pinas_stage2_simple.py"}
BACKBONES = {1: "resnet48pinasv2_mini", 2: "resnet48_mini"}


@dataclass
class Runs:
    """Starts the entry scripts on a few digits."""

    work: Path

    def start(self, stage: int, save_dir: str, **flags) -> subprocess.Popen:
        flags = {
            "backbone": BACKBONES[stage],
            "image_dir": self.work / "images",
            "pretrained": self.work / "pretrained.pdparams",
            "save_dir": self.work / save_dir,
            "max_epoch": 2,
            "image_size": 32,
            "batch_size": BATCH,
            "queue_size": 16,
            "dyna_batch_size": 2,
            "lr": 0.03,
            "warmup": 1,
            "eval_freq": 0,
            "log_freq": 1,
            "num_workers": 0,
            "device": "cpu",
            **flags,
        }
        arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "2",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(self.work / "cache"),
        }
        return subprocess.Popen(
            [sys.executable, "-u", str(ROOT / SCRIPTS[stage]), "run", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def run(self, stage: int, save_dir: str, code: int = 0, **flags) -> str:
        """Run to the end; gives what was printed."""
        process = self.start(stage, save_dir, **flags)
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code, output
        return output

    def run_until(self, stage: int, save_dir: str, line: str, number: int, **flags):
        """Run until a line with that text is printed, then signal the process group.

        Returns:
            The exit code and what was printed.
        """
        process = self.start(stage, save_dir, **flags)
        output = ""
        for printed in process.stdout:
            output += printed
            if line in printed:
                os.killpg(process.pid, number)
                break
        output += process.communicate(timeout=TIMEOUT)[0]
        return process.returncode, output

    def weights(self, save_dir: str, name: str = "final") -> dict[str, np.ndarray]:
        return read_weights(self.work / save_dir / f"{name}.pdparams")

    def losses(self, save_dir: str) -> list[float]:
        return json.loads((self.work / save_dir / "history.json").read_text())["epoch_losses"]

    def assert_same(self, one: str, other: str) -> None:
        for name in ("0", "final"):
            left, right = self.weights(one, name), self.weights(other, name)
            assert left.keys() == right.keys()
            for key in left:
                assert left[key].tobytes() == right[key].tobytes(), (name, key)
        assert self.losses(one) == self.losses(other)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    work = tmp_path_factory.mktemp("runs")
    write_inputs(work, IMAGES)
    return Runs(work)


@pytest.fixture(scope="module")
def undisturbed(runs) -> dict[int, str]:
    """The save folder of an uninterrupted run, by stage."""
    for stage in (1, 2):
        runs.run(stage, f"undisturbed{stage}")
    return {1: "undisturbed1", 2: "undisturbed2"}


def test_the_same_run_twice_is_the_same(runs, undisturbed):
    """Without this no claim about resuming could hold."""
    runs.run(1, "twice")
    runs.assert_same("twice", undisturbed[1])


def test_training_changes_weights_and_files_are_complete(runs, undisturbed):
    for stage, folder in undisturbed.items():
        first, final = runs.weights(folder, "0"), runs.weights(folder)
        assert any(first[key].tobytes() != final[key].tobytes() for key in first)
        assert len(runs.losses(folder)) == 2
        names = {f"{epoch}{suffix}" for epoch in (0, 1) for suffix in
                 (".pdparams", ".pdopt", ".pdstates")} | {"final.pdparams"}  # fmt: skip
        found = {path.name for path in (runs.work / folder).iterdir()}
        others = {"history.json", "run_id.json"}
        assert found == names | {f"{name}.sha256" for name in names} | others, stage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number", "code", "workers"),
    [(1, signal.SIGTERM, 143, 2), (2, signal.SIGINT, 130, 2), (2, signal.SIGTERM, 143, 0)],
)
def test_signals_save_and_end_with_their_code(stage, number, code, workers, runs, undisturbed):
    folder = f"signal{stage}{number}{workers}"
    returned, output = runs.run_until(
        stage, folder, "epoch 1/2 step 2/", number, num_workers=workers
    )
    assert returned == code, output
    assert f"stopped by {signal.Signals(number).name} after epoch 1 step " in output
    assert "Traceback" not in output
    resumed = runs.run(stage, folder, resume="auto", num_workers=workers)
    assert "training from epoch 1 step " in resumed
    assert "training from epoch 1 step 1\n" not in resumed
    runs.assert_same(folder, undisturbed[stage])


@pytest.fixture
def heeds_interrupts():
    """What is started in a shell's background ignores SIGINT."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


def test_the_second_signal_acts_at_once(heeds_interrupts):
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
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


def test_resuming_elsewhere_goes_on_from_the_named_folder(runs, undisturbed):
    returned, output = runs.run_until(
        2, "here", "saved", signal.SIGKILL, save_steps=3, num_workers=0
    )
    assert returned == -signal.SIGKILL, output
    output = runs.run(2, "there", resume=runs.work / "here")
    assert "training from epoch 1 step 4" in output
    runs.assert_same("there", undisturbed[2])


@pytest.mark.slow
def test_an_epoch_that_was_saved_at_its_last_step_is_ended(runs):
    """save_freq 2 leaves out epoch 1, so only the set within it, after its last step, is there."""
    runs.run(2, "three", max_epoch=3)
    flags = {"max_epoch": 3, "save_freq": 2, "save_steps": STEPS}
    code, output = runs.run_until(2, "last", f"1-{STEPS}.pdparams", signal.SIGKILL, **flags)
    assert code == -signal.SIGKILL, output
    output = runs.run(2, "last", resume="auto", **flags)
    assert f"training from epoch 2 step {STEPS + 1}" in output
    runs.assert_same("last", "three")


def test_a_finished_run_resumes_to_nothing(runs, undisturbed):
    shutil.copytree(runs.work / undisturbed[2], runs.work / "finished")
    # As if the kill had come right after the last epoch's checkpoint.
    (runs.work / "finished" / "final.pdparams").unlink()
    history = runs.work / "finished" / "history.json"
    history.write_text(json.dumps({"epoch_losses": runs.losses("finished")[:1]}))
    runs.run(2, "finished", resume="auto")
    runs.assert_same("finished", undisturbed[2])


def test_nothing_to_resume(runs):
    output = runs.run(2, "nothing", code=2, resume=runs.work / "images")
    assert output.splitlines()[-1].startswith("error: --resume ")


@pytest.mark.slow
def test_other_images_within_an_epoch_are_refused(runs, undisturbed):
    runs.run_until(2, "other", "saved", signal.SIGKILL, save_steps=2)
    output = runs.run(2, "other", code=2, resume="auto", batch_size=5)
    assert (
        "is in the middle of an epoch, and batch_size, total_batch differ now"
        in output.splitlines()[-1]
    )
    output = runs.run(2, "other", resume="auto", lr=0.02)
    assert "resumed with other values than before: lr" in output


def test_a_loss_that_is_not_finite_stops_the_run(runs):
    runs.run(2, "diverged", max_epoch=1)
    good = {path.name: path.read_bytes() for path in (runs.work / "diverged").iterdir()}
    output = runs.run(
        2, "diverged", code=2, resume="auto", max_epoch=3, lr=1e30, save_steps=1, log_freq=50
    )
    error = output.splitlines()[-1]
    assert error.startswith("error: ")
    assert " at epoch 2 step " in error
    assert ", learning rate " in error
    assert ", sub-network 1" in error
    left = {path.name: path.read_bytes() for path in (runs.work / "diverged").iterdir()}
    assert {name: left[name] for name in good} == good
    for path in (runs.work / "diverged").glob("*.pdparams"):
        assert all(
            np.isfinite(value).all() for value in runs.weights("diverged", path.stem).values()
        )


@pytest.mark.slow
def test_keep_leaves_the_first_and_the_newest_epochs(runs):
    runs.run(2, "kept", max_epoch=4, keep=1, save_steps=2)
    names = {path.name for path in (runs.work / "kept").glob("*.pdparams")}
    assert names == {"0.pdparams", "3.pdparams", "final.pdparams"}
    # A new run in the same folder: epoch 3 is not its own.
    runs.run(2, "kept", max_epoch=3, keep=1)
    names = {path.name for path in (runs.work / "kept").glob("*.pdparams")}
    assert names == {"0.pdparams", "2.pdparams", "3.pdparams", "final.pdparams"}


def test_states_hold_what_resuming_needs(runs, undisturbed):
    state = load_pickle(runs.work / undisturbed[1] / "0.pdstates")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert set(state["generators"]) == {"python", "numpy", "paddle"}
    assert state["losses"]["best_epoch"] == 0
    assert state["run"]["sample_method"] == "random"
    optimizer = load_pickle(runs.work / undisturbed[1] / "0.pdopt")
    # The learning rate follows from the position, not from a counter.
    assert all("@_velocity_" in key for key in optimizer if not key.endswith("@@"))
    weights = runs.weights(undisturbed[1], "0")
    assert weights["queue"].shape == (128, 16)
    assert weights["queue_pointer"].tolist() == [STEPS * BATCH % 16]


class LargestThenSmallest:
    """A sampler that needs no more of the network than it says."""

    def __init__(self, space):
        self.space = space

    def sample(self, epoch, step):
        return [self.space.smallest() if step else self.space.largest()]


def test_blocks_that_a_step_does_not_run_are_left_alone():
    """Else a step would depend on which blocks ran before, which no checkpoint tells."""
    paddle.seed(0)
    space = find_backbone("resnet48_mini").space
    network = build_network("resnet48_mini", num_classes=10)
    model = DistillationModel(network, None, LargestThenSmallest(space))
    model.prepare(momentum_optimizer(network, 0.1, momentum=0.9, weight_decay=0.1))
    batch = [paddle.randint(0, 256, [4, 3, 32, 32]).astype("uint8"), paddle.arange(4)]
    model.train_batch(batch)
    before = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    model.step = 1
    model.train_batch(batch)
    active = {id(p) for block in network.active_blocks() for p in block.parameters()}
    inactive = set()
    for stage in range(4):
        for block in network.stage_blocks(stage):
            inactive |= {id(p) for p in block.parameters()} - active
    assert inactive
    for name, tensor in network.named_parameters():
        same = np.array_equal(tensor.numpy(), before[name])
        assert same == (id(tensor) in inactive), name


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
