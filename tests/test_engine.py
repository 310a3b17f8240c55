"""Chunks, estimates, early stopping, memory that is too small, and resuming."""

import json

import gpu_fakes
import numpy as np
import pytest
from independent import Images, supernet

from hnas.base.errors import UserError
from hnas.evaluation import ledger
from hnas.evaluation.engine import ScoringSettings, evaluate_shared
from hnas.evaluation.images import balanced_order
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.results import STATE_FILE, load_state
from hnas.evaluation.shared import SharedEvaluator
from hnas.ranking.agreement import Agreement, read_estimates
from hnas.ranking.costs import Network
from hnas.search_space import RESNET48_MINI

CLASSES = 10
IMAGES = Images(24, CLASSES)
IDENTITY = {"checkpoint": "c" * 64, "image_list": "i" * 64}


@pytest.fixture(scope="module")
def network():
    return supernet(RESNET48_MINI, CLASSES)


@pytest.fixture(scope="module")
def archs():
    rng = np.random.default_rng(1)
    return {f"n{i}": RESNET48_MINI.sample(rng) for i in range(6)}


@pytest.fixture
def score(network, archs):
    """An evaluation of 24 images."""

    def evaluate(folder, archs=archs, **settings):
        settings = ScoringSettings(**settings)
        return evaluate_shared(network, archs, IMAGES, folder, IDENTITY, settings)

    return evaluate


def test_every_prefix_of_the_order_is_balanced():
    labels = np.repeat([0, 1, 2, 3], [5, 9, 7, 9])
    order = balanced_order(labels, seed=3)
    assert sorted(order.tolist()) == list(range(30))
    for number in range(1, 21):  # until the smallest class is used up
        counts = np.bincount(labels[order[:number]], minlength=4)
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(order, balanced_order(labels, seed=4))
    np.testing.assert_array_equal(order, balanced_order(labels, seed=3))


def test_engine_goes_through_all_chunks_and_tells_estimates(network, archs, score, tmp_path):
    whose = Network("resnet48_mini", 32, CLASSES)
    counts = score(tmp_path, chunk=5, network=whose)
    assert counts.images == 24
    expected = evaluate_reference(network, list(archs.values()), [IMAGES.batches])
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
    assert read.network == whose
    np.testing.assert_array_equal(read.folds, counts.folds)
    np.testing.assert_array_equal(read.folds.sum(axis=1), counts.top1)
    assert np.all(np.abs(read.folds - expected.folds).sum(axis=1) <= counts.near1)


def test_engine_stops_when_the_ranking_stands_and_goes_on_without(
    score, tmp_path, monkeypatch, caplog
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
    assert score(tmp_path, chunk=5, target_tau=0.8).images == 15
    told = json.loads((tmp_path / "estimates.json").read_text())
    assert told["agreement"] == {"images": 24, "tau": 0.95, "low": 0.8, "high": 0.97}
    assert "5 images, largest standard error 0.1" in caplog.text and "stopped early" in caplog.text
    for words in ("not known yet", "0.950 (0.700 to 0.970)"):
        assert f"ranking's agreement {words}" in caplog.text
    assert score(tmp_path).images == 24
    assert ", all that there are, " in caplog.text and "1.000 (1.000" not in caplog.text


def test_what_is_slow_or_in_vain_is_told(score, archs, tmp_path, caplog):
    """A target with nowhere to stop; one architecture is not compared with itself."""
    archs = {"n0": archs["n0"]}
    caplog.set_level("INFO")
    macs = RESNET48_MINI.macs(archs["n0"], 32, num_classes=0)
    score(tmp_path, archs, chunk=24, target_tau=0.9)
    assert "nowhere to stop: lower chunk_size" in caplog.text
    (line,) = [text for text in caplog.messages if "1 architectures, 24 images" in text]
    assert line.endswith(f"in chunks of 24: {macs / 1e6:.2f} MMAC an image") and macs < 1e7


@pytest.mark.parametrize("memory", ["", *gpu_fakes.MEMORY])
def test_interrupted_evaluation_continues_to_the_same_file(
    score, tmp_path, monkeypatch, caplog, memory
):
    """Also where memory is too small for walks of more than two images of a chunk's five."""
    uninterrupted = score(tmp_path / "a", chunk=5)
    calls, original = [], SharedEvaluator.evaluate

    def failing(self, pixels, labels, counts, *arguments, **named):
        calls.append(len(labels))
        if len(calls) == (8 if memory else 3):
            raise KeyboardInterrupt
        if memory and len(labels) > 2:
            original(self, pixels[:1], labels[:1], counts, *arguments, **named)
            gpu_fakes.raising(memory)()
        return original(self, pixels, labels, counts, *arguments, **named)

    monkeypatch.setattr(SharedEvaluator, "evaluate", failing)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "b", chunk=5)
    assert load_state(tmp_path / "b" / STATE_FILE, IDENTITY).counts.images == 10
    # Another chunk size asked for: the first run's is kept, so that the chunks are the same.
    resumed = score(tmp_path / "b", chunk=7)
    halved = [5, 2, 2, 1, 2, 2, 1, 2]
    assert calls == (halved + halved + [2] if memory else [5, 5, 5] + [5, 5, 4])
    lines = [text for text in caplog.messages if "2 images a walk, not 5" in text]
    assert len(lines) == (2 if memory else 0)  # of both runs
    for one, other in zip(resumed.columns(), uninterrupted.columns(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(resumed.folds, uninterrupted.folds)
    files = [(tmp_path / run / "estimates.json").read_bytes() for run in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", gpu_fakes.MEMORY)
def test_no_memory_for_a_single_image_is_one_line(score, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(SharedEvaluator, "evaluate", gpu_fakes.raising(kind))
    with pytest.raises(UserError, match="^out of memory with one image a walk: .*--amp O1"):
        score(tmp_path, chunk=5)
