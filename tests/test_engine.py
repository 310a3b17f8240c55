"""Chunks, estimates, early stopping, and resuming after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pytest
from entry_scripts import noise_images
from independent import Images, supernet

from hnas.architecture_file import submission
from hnas.base.files import write_json
from hnas.evaluation import ledger
from hnas.evaluation.engine import ScoringSettings, evaluate_shared
from hnas.evaluation.images import balanced_order
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.results import STATE_FILE, load_state
from hnas.evaluation.shared import SharedEvaluator
from hnas.ranking.agreement import Agreement, read_estimates
from hnas.ranking.costs import Network
from hnas.search_space import RESNET48_MINI

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 10
IDENTITY = {"checkpoint": "c" * 64, "image_list": "i" * 64}


@pytest.fixture(scope="module")
def network():
    return supernet(RESNET48_MINI, CLASSES)


@pytest.fixture(scope="module")
def archs():
    rng = np.random.default_rng(1)
    return {f"n{i}": RESNET48_MINI.sample(rng) for i in range(6)}


def test_every_prefix_of_the_order_is_balanced():
    labels = np.repeat([0, 1, 2, 3], [5, 9, 7, 9])
    order = balanced_order(labels, seed=3)
    assert sorted(order.tolist()) == list(range(30))
    for number in range(1, 21):  # until the smallest class is used up
        counts = np.bincount(labels[order[:number]], minlength=4)
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(order, balanced_order(labels, seed=4))
    np.testing.assert_array_equal(order, balanced_order(labels, seed=3))


def test_engine_goes_through_all_chunks_and_tells_estimates(network, archs, tmp_path):
    images = Images(24, CLASSES)
    settings = ScoringSettings(chunk=5, network=Network("resnet48_mini", 32, CLASSES))
    counts = evaluate_shared(network, archs, images, tmp_path, IDENTITY, settings)
    assert counts.images == 24
    batches = [images.batch(0, 24)]
    expected = evaluate_reference(network, list(archs.values()), batches)
    assert np.all(np.abs(counts.top1 - expected.top1) <= counts.near1)
    told = json.loads((tmp_path / "estimates.json").read_text())
    assert told["images"] == 24
    for (name, arch), hits in zip(archs.items(), counts.top1, strict=True):
        entry = told["architectures"][name]
        rate = (hits + 1) / 26
        assert entry["arch"] == arch.code and entry["acc"] == hits / 24
        assert entry["se"] == pytest.approx((rate * (1 - rate) / 24) ** 0.5, abs=1e-6)
    assert told["agreement"] == {"images": 24, "tau": 1.0, "low": 1.0, "high": 1.0}
    read = read_estimates(tmp_path / "estimates.json")
    assert read.network == settings.network
    np.testing.assert_array_equal(read.folds, counts.folds)
    np.testing.assert_array_equal(read.folds.sum(axis=1), counts.top1)
    assert np.all(np.abs(read.folds - expected.folds).sum(axis=1) <= counts.near1)


def test_engine_stops_when_the_ranking_stands_and_goes_on_without(
    network, archs, tmp_path, monkeypatch, caplog
):
    """By an estimate that stands in for the real one, which needs more images than are here."""
    low = {5: None, 10: 0.7, 15: 0.8, 20: 0.9}

    def estimate(folds, images, of_images):
        assert (folds.sum(axis=1) <= images).all() and of_images == 24
        if images == 24:
            return Agreement(1, 1, 1)
        return None if low[images] is None else Agreement(0.95, low[images], 0.97)

    monkeypatch.setattr(ledger, "expected_agreement", estimate)
    caplog.set_level("INFO")
    settings = ScoringSettings(chunk=5, target_tau=0.8)
    images = Images(24, CLASSES)
    counts = evaluate_shared(network, archs, images, tmp_path, IDENTITY, settings)
    assert counts.images == 15
    told = json.loads((tmp_path / "estimates.json").read_text())
    assert told["agreement"] == {"images": 24, "tau": 0.95, "low": 0.8, "high": 0.97}
    for words in (
        "5 images, largest standard error 0.1",
        "ranking's agreement not known yet",
        "ranking's agreement 0.950 (0.700 to 0.970)",
        "stopped early",
    ):
        assert words in caplog.text
    whole = evaluate_shared(network, archs, images, tmp_path, IDENTITY, ScoringSettings())
    assert whole.images == 24
    assert ", all that there are, " in caplog.text and "1.000 (1.000" not in caplog.text


def test_what_is_slow_or_in_vain_is_told(network, archs, tmp_path, caplog):
    """A target with nowhere to stop; one architecture is not compared with itself."""
    images, archs = Images(24, CLASSES), {"n0": archs["n0"]}
    caplog.set_level("INFO")
    macs = RESNET48_MINI.macs(archs["n0"], 32, num_classes=0)
    for name, tau in (("with", 0.9), ("without", 0.0)):
        settings = ScoringSettings(chunk=24, target_tau=tau)
        evaluate_shared(network, archs, images, tmp_path / name, IDENTITY, settings)
        assert ("nowhere to stop: lower chunk_size" in caplog.text) == (name == "with")
        (line,) = [text for text in caplog.messages if "1 architectures, 24 images" in text]
        assert line.endswith(f"in chunks of 24: {macs / 1e6:.2f} MMAC an image") and macs < 1e7
        caplog.clear()


def test_interrupted_evaluation_continues_to_the_same_file(network, archs, tmp_path, monkeypatch):
    images = Images(24, CLASSES)
    uninterrupted = evaluate_shared(
        network, archs, images, tmp_path / "a", IDENTITY, ScoringSettings(chunk=5)
    )
    calls = []
    original = SharedEvaluator.evaluate

    def failing(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments, **named)

    monkeypatch.setattr(SharedEvaluator, "evaluate", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate_shared(network, archs, images, tmp_path / "b", IDENTITY, ScoringSettings(chunk=5))
    partial = load_state(tmp_path / "b" / STATE_FILE, IDENTITY)
    assert partial.counts.images == 10
    # Another chunk size asked for: the first run's is kept, so that the chunks are the same.
    resumed = evaluate_shared(
        network, archs, images, tmp_path / "b", IDENTITY, ScoringSettings(chunk=7)
    )
    assert len(calls) == 3 + 3
    for one, other in zip(resumed.columns(), uninterrupted.columns(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(resumed.folds, uninterrupted.folds)


def command(folder, tmp_path, name):
    return [
        *(sys.executable, "-u", str(ROOT / "train_supernet.py"), "run"),
        *("--backbone", "resnet48_mini", "--image_size", "32", "--image_dir", str(folder)),
        *("--ckpt_dir", str(tmp_path / "net"), "--modelarch_file", str(tmp_path / "archs.json")),
        *("--save_dir", str(tmp_path / name), "--num_workers", "0", "--chunk_size", "2"),
        *("--bn_calibration_images", "0"),
    ]


@pytest.mark.slow
def test_killed_evaluations_end_in_the_same_file(network, tmp_path):
    folder = noise_images(tmp_path / "images")
    paddle.save(network.state_dict(), str(tmp_path / "net.pdparams"))
    rng = np.random.default_rng(2)
    archs = {f"n{i}": RESNET48_MINI.sample(rng) for i in range(40)}
    write_json(tmp_path / "archs.json", submission(archs, [0.0] * 40))
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}

    def run(name, seconds=None):
        process = subprocess.Popen(
            command(folder, tmp_path, name), env=environment, stderr=subprocess.PIPE
        )
        if seconds is not None:
            state = tmp_path / name / STATE_FILE
            deadline = time.monotonic() + 60
            while not state.is_file() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        return process.returncode, errors.decode()

    code, errors = run("whole")
    assert code == 0, errors[-2000:]
    random.seed(5)
    killed = sum(run("parts", random.uniform(0, 1.5))[0] == -signal.SIGKILL for _ in range(3))
    assert killed >= 1
    code, errors = run("parts")
    assert code == 0, errors[-2000:]
    assert "continuing after" in errors
    whole = (tmp_path / "whole/submission.json").read_bytes()
    assert (tmp_path / "parts/submission.json").read_bytes() == whole
