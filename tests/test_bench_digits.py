"""The ranking bench's images: what they depend on, and how they are distorted."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hnas.bench.rank.distorted_digits import DigitsTask
from hnas.bench.rank.runs import DigitsLoader


def a_task(**changes):
    return DigitsTask(**{"size": 48, "rotation": 0.6, "shrink": (1.6, 2.4), "noise": 0.2} | changes)


def batches(loader, epoch=0, start=0):
    return [[part.numpy() for part in batch] for batch in loader.epoch(epoch, start)]


def test_without_rotation_and_shift_a_scan_is_enlarged():
    scans = np.random.default_rng(1).random((2, 8, 8)).astype("float32")
    plain = a_task(size=8, rotation=0, shrink=(1, 1), noise=0)
    rng = np.random.default_rng(0)
    found = plain.expose(plain.place(scans, rng), rng)
    assert found.shape == (2, 3, 8, 8) and found.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_allclose(found[:, channel], scans * 255, atol=1.01)


def centre(images):
    """Rows and columns of the middle of what is white in images [N, H, H], from -1 to 1."""
    found = [np.argwhere(image > 0.5).mean(axis=0) + 0.5 for image in images]
    return np.array(found) / images.shape[1] * 2 - 1


def test_distortions_stay_within_their_bounds():
    """A scan of all white: its area tells the factor, its centre the shift."""
    scans = np.ones((200, 8, 8), "float32")
    upright = a_task(size=64, rotation=0)
    images = upright.place(scans, np.random.default_rng(3))
    assert images.dtype == np.float32 and images.shape == (200, 64, 64)
    shrink = np.sqrt(64**2 / images.sum(axis=(1, 2)))
    # The edge fades within a pixel of the scan, half of it outside.
    assert 1.4 < shrink.min() < 1.7 and 2.2 < shrink.max() < 2.5
    centres, places = centre(images), centre(images) / (1 - 1 / shrink[:, None])
    assert (np.abs(centres) < 1 - 1 / shrink[:, None] + 0.1).all()
    assert (places.min(axis=0) < -0.9).all() and (places.max(axis=0) > 0.9).all()
    # A bar through the middle of half the scan's length: its direction tells the rotation.
    bars = np.zeros((100, 8, 8), "float32")
    bars[:, 3:5, 1:7] = 1
    angles = []
    for image in a_task(size=64).place(bars, np.random.default_rng(4)):
        spread = np.cov(np.argwhere(image > 0.5).T)
        angles.append(np.arctan2(2 * spread[0, 1], spread[1, 1] - spread[0, 0]) / 2)
    assert -0.63 < min(angles) < -0.5 and 0.5 < max(angles) < 0.63
    noisy = a_task(noise=0.1).expose(np.full((50, 16, 16), 0.5), np.random.default_rng(5))
    assert noisy.shape == (50, 3, 16, 16) and (noisy[:, 0] == noisy[:, 2]).all()
    assert noisy[:, 0].std() / 255 == pytest.approx(0.1, rel=0.05)


def test_a_batch_depends_on_seed_epoch_and_step_only():
    task = a_task(validation_images=10)
    places = list(itertools.product(range(2), range(2), range(2)))
    seen = {}
    for seed, epoch, step in places:
        seen[seed, epoch, step] = batches(DigitsLoader(task, 6, 2, seed), epoch)[step]
    assert len({batch[0].tobytes() for batch in seen.values()}) == len(places)
    for seed, epoch in itertools.product(range(2), range(2)):
        np.random.seed(0)
        # Another task, and started in the middle of the epoch.
        (again,) = batches(DigitsLoader(a_task(), 6, 2, seed), epoch, 1)
        for part, expected in zip(again, seen[seed, epoch, 1], strict=True):
            np.testing.assert_array_equal(part, expected)


def test_views_show_the_same_scans_distorted_independently():
    loader = DigitsLoader(a_task(noise=0), 64, 1, seed=2, views=2)
    ((one, two, labels),) = batches(loader)
    assert one.shape == two.shape == (64, 3, 48, 48) and labels.shape == (64,)
    assert one.dtype == np.uint8 and labels.dtype == np.int64
    assert not any((a == b).all() for a, b in zip(one, two, strict=True))
    ((one, two, _),) = batches(replace(loader, views=1, copies=2))
    assert (one == two).all()


def test_training_the_truth_and_scoring_show_different_scans():
    digits = load_digits()
    known = {(image / 16).astype("float32").tobytes(): i for i, image in enumerate(digits.images)}
    assert len(known) == len(digits.target)
    placed = []

    class Recorder(DigitsTask):
        def place(self, scans, rng):
            placed.append([known[scan.tobytes()] for scan in scans])
            return super().place(scans, rng)

    def seen(labels):
        np.testing.assert_array_equal(digits.target[placed[-1]], labels)
        return set(placed[-1])

    task = Recorder(size=8, rotation=0, shrink=(1, 1), noise=0, validation_images=2000)
    every, truth, scores = (seen(task.validation(name)[1]) for name in ("all", "truth", "scores"))
    training = set()
    for batch in range(12):
        training |= seen(task.training_batch(1000, (0, 0, batch))[1])
    assert 550 < len(every) <= 597 and 290 < len(truth) <= 299 and 290 < len(scores) <= 298
    assert 1180 < len(training) <= 1200
    assert not truth & scores and not (every | truth | scores) & training


def test_validation_is_fixed_and_balanced():
    for scans in ("all", "truth", "scores"):
        (images, labels), again = (a_task(validation_images=900).validation(scans) for _ in "ab")
        assert (images == again[0]).all() and (labels == again[1]).all()
        assert images.shape == (900, 3, 48, 48)
        assert len(np.unique(labels)) == 10 and np.bincount(labels).min() > 60
