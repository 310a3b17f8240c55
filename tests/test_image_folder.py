"""Image folders: what is listed, what is cached, and what happens to bad images."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hnas.dataset import image_folder, image_index
from hnas.dataset.image_folder import DataError, decode_image, scan_images
from hnas.dataset.loader import EpochLoader, EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform, TrainTransform

CLASSES = ("cat", "dog")
LONG_AGO = time.time_ns() - 10**12


def write_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def age(path: Path) -> None:
    """Pretend that ``path`` has not changed for a while, as an image folder usually has not."""
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pinas"


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes of four images each."""
    root = tmp_path / "images"
    for label, name in enumerate(CLASSES):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for index in range(4):
            write_image(folder / f"{index}.png", 10 * label + index)
            age(folder / f"{index}.png")
        (folder / "notes.txt").write_text("no image")
        age(folder)
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:150])


def names(images) -> list[str]:
    return [str(path.relative_to(images.folder)) for path in images.paths]


def test_images_are_listed_by_class_and_name(root):
    images = scan_images(root, "train")
    assert images.classes == CLASSES
    assert names(images) == [f"{name}/{index}.png" for name in CLASSES for index in range(4)]
    assert images.labels.tolist() == [0] * 4 + [1] * 4


def test_the_second_scan_lists_no_class_folder(root, monkeypatch):
    first = scan_images(root, "train")
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listdir(path))
    second = scan_images(root, "train")
    assert listed == []
    assert second.paths == first.paths
    assert second.digest() == first.digest()


@pytest.mark.parametrize("change", ["add", "remove", "rename", "new class"])
def test_changes_invalidate_the_cache(change, root):
    before = scan_images(root, "train")
    folder = root / "train" / "dog"
    if change == "add":
        write_image(folder / "9.png", 9)
    elif change == "remove":
        (folder / "0.png").unlink()
    elif change == "rename":
        (folder / "0.png").rename(folder / "x.png")
    else:
        (root / "train" / "emu").mkdir()
        write_image(root / "train" / "emu" / "0.png", 9)
    after = scan_images(root, "train")
    expected = sorted(
        f"{path.parent.name}/{path.name}" for path in (root / "train").glob("*/*.png")
    )
    assert names(after) == expected != names(before)
    assert after.digest() != before.digest()


def test_a_folder_that_changed_just_now_is_not_trusted(root):
    """It may change again without a new modification time."""
    folder = root / "train" / "dog"
    os.utime(folder)
    stamp = folder.stat().st_mtime_ns
    scan_images(root, "train")
    write_image(folder / "9.png", 9)
    os.utime(folder, ns=(stamp, stamp))
    assert "dog/9.png" in names(scan_images(root, "train"))


@pytest.mark.parametrize("content", ["", "[", "[1, 2]", '{"cat": 5}', '{"cat": [[1], 2, 3]}'])
def test_a_broken_cache_only_costs_time(content, root, cache):
    expected = names(scan_images(root, "train"))
    (path,) = cache.glob("*-names.json")
    path.write_text(content)
    assert names(scan_images(root, "train")) == expected
    assert set(json.loads(path.read_text())) == set(CLASSES)


def test_a_cache_that_cannot_be_written_is_no_error(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(scan_images(root, "train", verify=True)) == 8


def test_nothing_is_written_beside_the_images(root):
    before = sorted(root.rglob("*"))
    scan_images(root, "train", verify=True)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: (root / "none", "train"), "none is not a folder"),
        (lambda root: (root, "val"), r"has no folder val/ \(expected val/CLASS/\*\.jpg\)"),
        (lambda root: ((root / "empty/train").mkdir(parents=True), (root / "empty", "train"))[1],
         "has no class folders"),
        (lambda root: ((root / "train/emu").mkdir(), (root, "train"))[1], "emu has no images"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used(make, reason, root):
    with pytest.raises(DataError, match=reason):
        scan_images(*make(root))


def test_link_loops_are_survived(root, caplog):
    train = root / "train"
    (train / "loop").symlink_to("loop")
    (train / "gone").symlink_to("/nowhere")
    (train / "cat" / "up").symlink_to(train)
    (train / "cat" / "self.png").symlink_to("self.png")
    images = scan_images(root, "train")
    assert images.classes == CLASSES
    for name in ("loop", "gone"):
        assert f"left out {train / name}: a symbolic link" in caplog.text
    with pytest.raises(DataError, match=r"1 images cannot be decoded: .*cat/self\.png"):
        scan_images(root, "train", verify=True)
    skipped = scan_images(root, "train", bad_images="skip")
    assert len(skipped) == 8


def test_links_to_class_folders_are_followed(root, tmp_path):
    (root / "train" / "cat").rename(tmp_path / "elsewhere")
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    assert len(scan_images(root, "train")) == 8


BAD = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "broken in the middle": lambda path: path.write_bytes(
        path.read_bytes()[:60] + bytes(40) + path.read_bytes()[100:]
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_when_it_is_decoded(kind, root):
    path = root / "train" / "cat" / "1.png"
    BAD[kind](path)
    with pytest.raises(DataError) as caught:
        decode_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pixels_of_limit", [1.5, 3])
def test_decompression_bombs_are_refused(pixels_of_limit, root, monkeypatch):
    """Pillow warns beyond its limit and refuses from twice that on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(120 / pixels_of_limit))
    with pytest.raises(DataError, match=r"cannot decode image .*1\.png"):
        decode_image(root / "train" / "cat" / "1.png")


def test_the_limit_is_pillows_own():
    limit = Image.MAX_IMAGE_PIXELS
    assert limit == pytest.approx(1024**3 / 4 / 3, abs=1)


def test_verifying_lists_at_most_ten_and_logs_all(root, caplog):
    folder = root / "train" / "dog"
    for index in range(12):
        (folder / f"bad{index:02}.jpg").write_text("no image")
    with pytest.raises(DataError) as caught:
        scan_images(root, "train", verify=True)
    listed = ", ".join(str(folder / f"bad{index:02}.jpg") for index in range(10))
    assert f"12 images cannot be decoded: {listed}, ...;" in str(caught.value)
    for index in range(12):
        assert str(folder / f"bad{index:02}.jpg") in caplog.text


def test_skipping_leaves_out_the_same_images_every_time(root, monkeypatch):
    truncate(root / "train" / "cat" / "1.png")
    truncate(root / "train" / "dog" / "3.png")
    for name in ("cat/1.png", "dog/3.png"):
        age(root / "train" / name)
    first = scan_images(root, "train", bad_images="skip")
    assert names(first) == [f"cat/{i}.png" for i in (0, 2, 3)] + [f"dog/{i}.png" for i in range(3)]
    assert first.labels.tolist() == [0, 0, 0, 1, 1, 1]

    decoded = []
    decode = image_folder.decode_image
    monkeypatch.setattr(image_folder, "decode_image", lambda p: decoded.append(p) or decode(p))
    second = scan_images(root, "train", bad_images="skip")
    assert (names(second), second.digest()) == (names(first), first.digest())
    assert decoded == []

    write_image(root / "train" / "cat" / "1.png", 5)
    assert "cat/1.png" in names(scan_images(root, "train", bad_images="skip"))
    assert decoded == [root / "train" / "cat" / "1.png"]


def test_a_class_without_a_good_image(root):
    for path in (root / "train" / "cat").glob("*.png"):
        truncate(path)
    with pytest.raises(DataError, match="no image of class 'cat' can be decoded"):
        scan_images(root, "train", bad_images="skip")


def test_stamps_follow_content(tmp_path):
    (tmp_path / "a").write_text("1")
    age(tmp_path / "a")
    before = image_index.stamp_of(tmp_path / "a")
    (tmp_path / "a").write_text("12")
    age(tmp_path / "a")
    assert image_index.stamp_of(tmp_path / "a") != before


def loaders(images, workers: int):
    train = ImageDataset(images, TrainTransform(8), seed=3)
    val = ImageDataset(images, EvalTransform(8), seed=3)
    return EpochLoader(train, 2, workers), EvalLoader(val, 3, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_loading_with_its_path(workers, root):
    bad = root / "train" / "cat" / "2.png"
    truncate(bad)
    train, val = loaders(scan_images(root, "train"), workers)
    for batches in (train.epoch(0), iter(val)):
        with pytest.raises(DataError, match=f"^cannot decode image {bad}: "):
            list(batches)


def as_arrays(batches) -> list[list[np.ndarray]]:
    return [[tensor.numpy() for tensor in batch] for batch in batches]


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_workers_load_what_this_process_loads(root):
    images = scan_images(root, "train")
    for here, there in zip(loaders(images, 0), loaders(images, 2), strict=True):
        one = as_arrays(here.epoch(1) if hasattr(here, "epoch") else here)
        other = as_arrays(there.epoch(1) if hasattr(there, "epoch") else there)
        assert_same_batches(one, other)


def test_evaluation_sees_every_image_once_in_order(root):
    images = scan_images(root, "train")
    _, val = loaders(images, 0)
    batches = as_arrays(val)
    assert len(val) == len(batches) == 3
    assert [len(labels) for _, labels in batches] == [3, 3, 2]
    assert np.concatenate([labels for _, labels in batches]).tolist() == images.labels.tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_an_epoch_can_start_at_any_step(workers, start, root):
    train, _ = loaders(scan_images(root, "train"), workers)
    assert_same_batches(as_arrays(train.epoch(2, start)), as_arrays(train.epoch(2))[start:])


def test_closing_early_ends_the_workers(root):
    train, _ = loaders(scan_images(root, "train"), 2)
    batches = train.epoch(0)
    next(batches)
    began = time.perf_counter()
    batches.close()
    assert time.perf_counter() - began < 10
    assert multiprocessing.active_children() == []
