"""The ranking bench's images: what they depend on, and how they are sampled."""

import itertools

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

from hnas.dataset.distorted_digits import (
    DigitsLoader,
    DigitsTask,
    Distortion,
    sample_bilinear,
)


def batches(loader, epoch=0, start=0):
    return [[part.numpy() for part in batch] for batch in loader.epoch(epoch, start)]


def test_bilinear_sampling_equals_scipys():
    rng = np.random.default_rng(0)
    images = rng.random((3, 8, 8)).astype("float32")
    rows, columns = rng.uniform(-3, 11, (2, 3, 6, 7))
    rows[0, 0, :3], columns[0, 0, :3] = [0.5, 7.5, 3.0], [0.5, 0.5, 4.0]
    found = sample_bilinear(images, rows, columns)
    # Positions count from the first pixel's upper left edge; scipy's from its centre.
    expected = [
        map_coordinates(np.pad(image, 4), [r + 3.5, c + 3.5], order=1, mode="constant")
        for image, r, c in zip(images, rows, columns, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0, 0, 0] == images[0, 0, 0] and found[0, 0, 1] == images[0, 7, 0]
    assert found[0, 0, 2] == pytest.approx(images[0, 2:4, 3:5].mean())


def test_without_rotation_and_shift_a_scan_is_enlarged():
    scans = np.random.default_rng(1).random((2, 8, 8)).astype("float32")
    plain = Distortion(size=8, rotation=0, shrink=(1, 1), noise=0)
    found = plain.apply(scans, np.random.default_rng(0))
    assert found.shape == (2, 3, 8, 8) and found.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_allclose(found[:, channel], scans * 255, atol=1.01)


def test_distortions_stay_within_their_bounds():
    """A scan of all white: its area tells the factor, its centre the shift."""
    scans = np.ones((200, 8, 8), "float32")
    images = (
        Distortion(size=64, rotation=0, noise=0).apply(scans, np.random.default_rng(3))[:, 0] / 255
    )
    shrink = np.sqrt(64**2 / images.sum(axis=(1, 2)))
    # The edge fades within a pixel of the scan, half of it outside.
    assert 1.1 < shrink.min() < 1.3 and 2.0 < shrink.max() < 2.3
    centres = np.array([np.argwhere(image > 0.5).mean(axis=0) for image in images]) / 32 - 1
    assert (np.abs(centres) < 1 - 1 / shrink[:, None] + 0.1).all()
    assert centres.min() < -0.2 and centres.max() > 0.2
    # A bar through the middle of half the scan's length: its direction tells the rotation.
    bars = np.zeros((100, 8, 8), "float32")
    bars[:, 3:5, 1:7] = 1
    turned = Distortion(size=64, noise=0).apply(bars, np.random.default_rng(4))[:, 0]
    angles = []
    for image in turned:
        spread = np.cov(np.argwhere(image > 128).T)
        angles.append(np.arctan2(2 * spread[0, 1], spread[1, 1] - spread[0, 0]) / 2)
    assert -0.63 < min(angles) < -0.5 and 0.5 < max(angles) < 0.63
    noisy = Distortion(noise=0.3).apply(
        np.full((50, 8, 8), 0.5, "float32"), np.random.default_rng(5)
    )
    middle = noisy[:, 0, 14:18, 14:18] / 255
    inside = middle[(middle > 0) & (middle < 1)]
    assert 0.15 < inside.std() < 0.3


def test_a_batch_depends_on_seed_epoch_and_step_only():
    task = DigitsTask(validation_images=10)
    places = list(itertools.product(range(2), range(2), range(2)))
    seen = {}
    for seed, epoch, step in places:
        loader = DigitsLoader(task, 6, 2, seed)
        seen[seed, epoch, step] = batches(loader, epoch)[step]
    images = {place: batch[0].tobytes() for place, batch in seen.items()}
    assert len(set(images.values())) == len(places)
    for seed, epoch in itertools.product(range(2), range(2)):
        np.random.seed(0)
        # Another task, and started in the middle of the epoch.
        (again,) = batches(DigitsLoader(DigitsTask(), 6, 2, seed), epoch, 1)
        for part, expected in zip(again, seen[seed, epoch, 1], strict=True):
            np.testing.assert_array_equal(part, expected)
    assert len(DigitsLoader(task, 6, 2, 0)) == 2


def test_views_show_the_same_scans_distorted_independently():
    task = DigitsTask(distortion=Distortion(noise=0))
    loader = DigitsLoader(task, 64, 1, seed=2, views=2)
    ((one, two, labels),) = batches(loader)
    assert one.shape == two.shape == (64, 3, 32, 32) and labels.shape == (64,)
    assert one.dtype == np.uint8 and labels.dtype == np.int64
    same = [(a == b).all() for a, b in zip(one, two, strict=True)]
    assert not any(same)
    # How much a view shrinks does not tell how much the other does, but for the scan's own ink.
    ink = np.array([view[:, 0].sum(axis=(1, 2)) for view in (one, two)], float)
    assert abs(np.corrcoef(ink)[0, 1]) < 0.5
    # The first view is the one that a loader of a single view gives.
    ((single, _),) = batches(DigitsLoader(task, 64, 1, seed=2))
    np.testing.assert_array_equal(single, one)


def test_training_and_validation_show_different_scans():
    """With a distortion that does nothing images are scans, which the data set can name."""
    digits = load_digits()
    nothing = Distortion(size=8, rotation=0, shrink=(1, 1), noise=0)
    task = DigitsTask(distortion=nothing, validation_images=700)
    known = {image.tobytes(): index for index, image in enumerate(digits.images.astype(int))}
    assert len(known) == len(digits.images)

    def indices(images, labels):
        # Scans have the levels 0 to 16, 16 of ours apart.
        levels = np.rint(images[:, 0] / 255 * 16).astype(int)
        found = [known[level.tobytes()] for level in levels]
        np.testing.assert_array_equal(digits.target[found], labels)
        return set(found)

    validation = indices(*task.validation)
    training = set()
    for batch in range(12):
        (images,), labels = task.training_batch(500, 1, (0, 0, batch))
        training |= indices(images, labels)
    assert len(validation) == 597 and 1150 < len(training) <= 1200
    assert not validation & training


def test_validation_is_fixed_and_balanced():
    one, other = DigitsTask(validation_images=900), DigitsTask(validation_images=900)
    for part, again in zip(one.validation, other.validation, strict=True):
        np.testing.assert_array_equal(part, again)
    images, labels = one.validation
    assert images.shape == (900, 3, 32, 32)
    assert np.bincount(labels, minlength=10).min() > 60
