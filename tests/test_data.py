"""Augmentations, loaders and decoded images: what each gives, and that it gives it again."""

import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from entry_scripts import ROOT, noise_images
from PIL import Image

from hnas.base.errors import UserError
from hnas.base.files import digest_path
from hnas.dataset import image_store
from hnas.dataset.image_folder import DataError, scan_images
from hnas.dataset.image_store import ImageStore
from hnas.dataset.loader import EpochLoader, EvalLoader, ImageDataset
from hnas.dataset.transforms import (
    EvalTransform,
    Shrink,
    StrongTransform,
    TrainTransform,
    TwoViews,
    shift_hue,
)
from hnas.evaluation.images import Batches, ScoredImages
from hnas.programs.flags import AUTO
from hnas.programs.options import Options
from hnas.programs.runtime import calibration_images


def gradient_image(width=48, height=40):
    """Every pixel differs: red grows to the right, green downward."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 5, y * 6, (x + y) * 2], axis=2).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("images"), 6, classes="ab")


def test_whole_crop_without_flip_is_a_resize_and_the_same_view_one_crop():
    image = gradient_image(32, 32)
    transform = TrainTransform(32, scale_min=1.0, flip=0.0)
    # A crop of all of the area fits only with aspect 1, else the centre is taken: the same here.
    np.testing.assert_array_equal(
        transform(image, np.random.default_rng(0)), np.asarray(image).transpose(2, 0, 1)
    )
    flipped = TrainTransform(32, scale_min=1.0, flip=1.0)(image, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped, np.asarray(image)[:, ::-1].transpose(2, 0, 1))
    view = TrainTransform(20)(image, np.random.default_rng(1))
    for twin in TwoViews(TrainTransform(20))(image, np.random.default_rng(1)):
        np.testing.assert_array_equal(twin, view)


def test_weak_view_keeps_colours_and_strong_view_changes_them():
    image = Image.new("RGB", (40, 40), (200, 60, 20))
    weak = [TrainTransform(32)(image, np.random.default_rng(seed)) for seed in range(40)]
    assert all(np.all(view == np.reshape((200, 60, 20), (3, 1, 1))) for view in weak)
    strong = [StrongTransform(32, 0.2)(image, np.random.default_rng(seed)) for seed in range(400)]
    means = np.array([view.mean((1, 2)) for view in strong])
    # Jitter has probability 0.8, greyscale 0.2: 0.8 * 0.2 + ... leave 16 % of views unchanged.
    unchanged = np.all(np.abs(means - (200, 60, 20)) < 1, axis=1).mean()
    assert unchanged == pytest.approx(0.2 * 0.8, abs=0.06)
    grey = (np.ptp(means, axis=1) < 1).mean()
    assert grey == pytest.approx(0.2, abs=0.06)
    pixel = np.asarray(shift_hue(Image.new("RGB", (1, 1), (255, 0, 0)), 1 / 3))[0, 0]
    assert np.abs(pixel.astype(int) - (0, 255, 0)).max() <= 6  # red to green


def loaders(folder, workers=0, seed=3, pixels=None):
    images = scan_images(folder, "train")
    train = ImageDataset(images, TrainTransform(32), seed, pixels)
    val = ImageDataset(images, EvalTransform(32), seed)
    return EpochLoader(train, 4, workers), EvalLoader(val, 5, workers)


def collect(batches):
    return [[part.numpy() for part in batch] for batch in batches]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_batches_depend_on_seed_and_epoch_only(folder, tmp_path):
    train, val = loaders(folder)
    reference = collect(train.epoch(1))
    assert len(reference) == len(train) == 3
    assert sorted(np.concatenate(train.batches(1)).tolist()) == list(range(12))
    # Nothing is made smaller in the store, so the pixels are the same.
    store = ImageStore(scan_images(folder, "train"), Shrink(1000), tmp_path)
    for workers in (0, 2):
        there, val_there = loaders(folder, workers)
        assert_same(collect(val_there), collect(val))
        for start in (0, 1) if workers else (0, 1, 3):
            assert_same(collect(there.epoch(1, start)), reference[start:])
        assert_same(collect(loaders(folder, workers, pixels=store)[0].epoch(1)), reference)
    # Ranks have the batches of one process, in parts.
    for shuffle, whole in ((True, train.batches(1)), (False, np.arange(12).reshape(3, 4))):
        shares = [EpochLoader(train.dataset, 2, 0, rank, 2, shuffle=shuffle) for rank in range(2)]
        joined = zip(*(loader.batches(1) for loader in shares), strict=True)
        np.testing.assert_array_equal([np.concatenate(parts) for parts in joined], whole)
    for other in (train.epoch(2), loaders(folder, seed=4)[0].epoch(1)):
        assert not np.array_equal(reference[0][0], next(iter(other))[0].numpy())


def test_eval_loader_keeps_order_and_labels(folder):
    _, val = loaders(folder)
    batches = collect(val)
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert np.concatenate([b[1] for b in batches]).tolist() == [0] * 6 + [1] * 6
    second = np.asarray(Image.open(folder / "train/a/1.png").convert("RGB"))
    resized = np.asarray(Image.fromarray(second).resize((37, 37), Image.Resampling.BILINEAR))
    expected = resized[2:34, 2:34].transpose(2, 0, 1)
    np.testing.assert_array_equal(batches[0][0][1], expected)
    with pytest.raises(DataError, match="fewer than one batch"):
        EpochLoader(val.dataset, batch_size=13)


@pytest.fixture
def bad(folder, tmp_path):
    """A copy of the images, one of which is broken and has a name that is not UTF-8."""
    root = tmp_path / "bad"
    shutil.copytree(folder, root)
    path = root / "train/a" / os.fsdecode(b"\xff.png")
    path.write_bytes(b"\x89PNG")
    return root, path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_loading_with_its_path(workers, bad):
    root, path = bad
    train, val = loaders(root, workers)
    for batches in (train.epoch(0), val):
        with pytest.raises(DataError) as caught:
            list(batches)
        assert str(caught.value).startswith(f"cannot decode image {path}: ")


@pytest.mark.parametrize("died", ["was killed by SIGKILL", "ended with 7"])
def test_a_loader_process_that_dies_is_one_line_at_the_next_batch(died, folder, tmp_path):
    """Not an error of Paddle's in the middle of a step; the other process ends, too."""
    dataset = loaders(folder)[0].dataset
    whole, end = dataset.transform, tmp_path / "end"
    dataset.transform = lambda *own: os._exit(7) if end.exists() else whole(*own)
    batches = EpochLoader(dataset, 1, 2).epoch(0)
    next(batches)
    workers = multiprocessing.active_children()
    workers[0].kill() if "KILL" in died else end.touch()
    time.sleep(1)
    with pytest.raises(UserError, match=f"a loader process {died}; where"):
        list(batches)
    workers[1].join(10)
    assert multiprocessing.active_children() == []


def test_closing_early_ends_the_workers(folder):
    train, _ = loaders(folder, 2)
    batches = train.epoch(0)
    next(batches)
    began = time.perf_counter()
    batches.close()
    assert time.perf_counter() - began < 10
    assert multiprocessing.active_children() == []


HELD_UP = """
import gc, multiprocessing.queues, os, time
import numpy as np
from hnas.dataset import loader
from hnas.dataset.image_folder import ImageList

gc.disable()
put, main = multiprocessing.queues.Queue.put, os.getpid()

def put_and_pause(self, *what):
    put(self, *what)
    time.sleep(0.1 if os.getpid() == main else 0)

def leave_garbage():
    own = [iter(batches)]
    next(own[0])
    own.append(own)

def transform(pixels, rng):
    gc.collect()
    time.sleep(0.3 if np.asarray(pixels)[0, 0, 0] % 2 else 0)  # the second worker is quicker
    return np.asarray(pixels)

images = ImageList("here", ["a"], ["x"] * 8, np.arange(8))
pixels = [np.full((1, 1, 3), index + 1, np.uint8) for index in range(8)]
batches = loader.EvalLoader(loader.ImageDataset(images, transform, 0, pixels), 1, 2)
leave_garbage()
multiprocessing.queues.Queue.put = put_and_pause
print(*(int(label) for _, label in batches))
"""


def test_a_main_process_that_is_held_up_or_leaves_garbage_gets_all_batches():
    """Paddle waited for ever; so did workers that collected an earlier loader, for its batches."""
    command = [sys.executable, "-c", HELD_UP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert done.stdout.split() == [*"01234567"], done.stderr


def test_stored_images_are_the_decoded_ones_made_smaller(tmp_path):
    """Of many sizes; one is smaller than what is stored."""
    rng = np.random.default_rng(0)
    (tmp_path / "train/a").mkdir(parents=True)
    for index in range(12):
        size = (20, 30) if index == 5 else (60 + index, 50 + 3 * index)
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"train/a/{index}.png")
    images = scan_images(tmp_path, "train")
    store = ImageStore(images, Shrink(40), tmp_path / "cache")
    for index, path in enumerate(images.paths):
        image = Image.open(path).convert("RGB")
        scale = 40 / min(image.size)
        if scale < 1:
            size = [round(side * scale) for side in image.size]
            assert min(size) == 40
            image = image.resize(size, Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(store[index], np.asarray(image))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": flipped,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "gone": lambda path: path.unlink(),
    "no digest": lambda path: digest_path(path).unlink(),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_made_anew_any_other_taken(case, folder, tmp_path, caplog, monkeypatch):
    images, cache = scan_images(folder, "train"), tmp_path / "cache"
    store = ImageStore(images, Shrink(32), cache)
    expected, content = store.pixels.copy(), store.path.read_bytes()
    DAMAGES[case](store.path)
    left = cache / f".{'0' * 32}.pixels.99-{'a' * 16}.tmp"  # of a build that was killed
    left.touch()
    again = ImageStore(images, Shrink(32), cache)
    assert not left.exists() and again.path.read_bytes() == content
    np.testing.assert_array_equal(again.pixels, expected)
    assert ("damaged" in caplog.text) == (case != "gone")
    assert ImageStore(images, Shrink(33), cache).path != store.path
    monkeypatch.setattr(image_store, "decoded", None)
    np.testing.assert_array_equal(ImageStore(images, Shrink(32), cache).pixels, expected)


def test_a_common_cache_knows_whose_images_it_holds(tmp_path, monkeypatch):
    """Names, sizes and times are equal; as in containers the path, too, or the sampled pixels."""
    for seed, sample, name in ((0, 16, "moved"), (1, 16, "one"), (2, 0, "two"), (3, 0, "three")):
        place = noise_images(tmp_path / f"data{max(seed, 1)}", seed=seed, suffix=".bmp")
        monkeypatch.setattr(image_store, "SAMPLED", sample)
        images = scan_images(place, "train")
        store = ImageStore(images, Shrink(64), tmp_path / "cache")
        np.testing.assert_array_equal(store[3], np.asarray(Image.open(images.paths[3])))
        place.rename(tmp_path / name)


def test_what_cannot_be_decoded_or_written_leaves_no_file(bad, folder, tmp_path):
    root, path = bad
    with pytest.raises(DataError, match=re.escape(str(path))):
        ImageStore(scan_images(root, "train"), Shrink(32), tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a full disk
    try:
        with pytest.raises(UserError, match="cannot write .*pixels: File too large"):
            ImageStore(scan_images(folder, "train"), Shrink(32), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache").iterdir()) == []


def test_images_to_score_on_are_the_same_in_memory_in_a_file_and_on_demand(folder, tmp_path):
    images, order = scan_images(folder, "train"), np.array([7, 0, 11, 3, 4])
    ways = [
        ScoredImages(images, order, 32, tmp_path / "memory", 1.0),
        ScoredImages(images, order, 32, tmp_path / "file", 0.0),
        ScoredImages(images, order, 32),
    ]
    expected = np.stack([EvalTransform(32)(Image.open(images.paths[i])) for i in order])
    for way in ways:
        assert len(way) == 5 and way.hash == ways[0].hash
        batches = collect(Batches(way, 2))
        assert [len(labels) for _, labels in batches] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate([pixels for pixels, _ in batches]), expected)
        labels = np.concatenate([labels for _, labels in batches])
        np.testing.assert_array_equal(labels, images.labels[order])
    assert not (tmp_path / "memory").exists() and len([*(tmp_path / "file").glob("*.pixels")]) == 1
    assert ScoredImages(images, order[::-1], 32).hash != ways[0].hash


def calibration(root, number, **flags):
    options = Options(image_dir=str(root), image_size=32, bn_calibration_images=number, **flags)
    images = calibration_images(options, freeze_bn=False)
    return sorted(image.tobytes() for image in images.numpy())


def test_calibration_images_are_drawn_and_only_they_are_decoded(folder, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    crop = EvalTransform(32)
    every = {
        crop(Image.open(path).convert("RGB")).tobytes() for path in (root / "train").glob("*/*.png")
    }
    assert set(calibration(root, 12)) == every
    assert calibration_images(Options(bn_calibration_images=AUTO), freeze_bn=True) is None
    with pytest.raises(DataError, match="--bn_calibration_images 64, but .* has 12"):
        calibration(root, AUTO)
    some = [calibration(root, 3, seed=seed) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    assert set(some[0]) < every and len(set(some[0])) == 3

    for path in (root / "train/a").glob("*.png"):
        path.write_bytes(b"broken")
    # The images of class b are the last six.
    lucky = next(s for s in range(99) if min(np.random.default_rng(s).permutation(12)[:3]) >= 6)
    assert len(calibration(root, 3, seed=lucky, verify_images=True)) == 3
    with pytest.raises(DataError, match=r"cannot decode image .*/train/a/\d\.png"):
        calibration(root, 12)
    assert len(set(calibration(root, 6, bad_images="skip"))) == 6
    with pytest.raises(DataError, match="only 6 images of .*train can be decoded; lower it"):
        calibration(root, 7, bad_images="skip")
