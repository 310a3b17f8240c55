"""Images decoded once and kept in a file."""

import numpy as np
import pytest
from PIL import Image

from hnas.dataset.image_folder import DataError, scan_images
from hnas.dataset.loader import EpochLoader, ImageDataset
from hnas.dataset.pixel_cache import PixelCache
from hnas.dataset.transforms import StrongTransform


def random_image(rng, height, width, smooth):
    if smooth:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        return coarse.resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(12):
        target = tmp_path / "train" / f"class{index % 3}"
        target.mkdir(parents=True, exist_ok=True)
        size = (20, 30) if index == 5 else (60 + index, 50 + 3 * index)
        random_image(rng, *size, index % 2).save(target / f"{index}.png")
    return tmp_path


def test_cached_images_are_the_decoded_ones_made_smaller(folder, tmp_path):
    images = scan_images(folder, "train")
    cache = PixelCache(images, 40, tmp_path / "cache")
    assert len(cache) == len(images) == 12
    for index, path in enumerate(images.paths):
        image = Image.open(path).convert("RGB")
        scale = 40 / min(image.size)
        if scale < 1:
            size = [round(side * scale) for side in image.size]
            assert min(size) == 40
            image = image.resize(size, Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(cache[index], np.asarray(image))


def test_the_file_is_used_again_until_something_changes(folder, tmp_path, caplog):
    images = scan_images(folder, "train")
    first = PixelCache(images, 40, tmp_path / "cache")
    written = first.path.stat().st_mtime_ns
    assert PixelCache(images, 40, tmp_path / "cache").path.stat().st_mtime_ns == written
    assert PixelCache(images, 41, tmp_path / "cache").path != first.path
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(images.paths[0])
    again = PixelCache(images, 40, tmp_path / "cache")
    assert again.path != first.path and not again[0].any()


@pytest.mark.parametrize("what", ["flipped", "cut", "table"])
def test_a_damaged_file_is_made_anew(folder, tmp_path, caplog, what):
    images = scan_images(folder, "train")
    cache = PixelCache(images, 40, tmp_path / "cache")
    expected = [cache[index].copy() for index in range(len(cache))]
    damaged = cache.path.with_suffix(".npz") if what == "table" else cache.path
    content = bytearray(damaged.read_bytes())
    if what == "flipped":
        content[1000] ^= 1
    damaged.write_bytes(content if what == "flipped" else content[: len(content) // 2])
    again = PixelCache(images, 40, tmp_path / "cache")
    assert "damaged" in caplog.text or "cannot be used" in caplog.text
    for index, pixels in enumerate(expected):
        np.testing.assert_array_equal(again[index], pixels)


def test_an_image_that_cannot_be_decoded_leaves_no_file(folder, tmp_path):
    images = scan_images(folder, "train")
    images.paths[4].write_bytes(b"no image")
    with pytest.raises(DataError, match=str(images.paths[4])):
        PixelCache(images, 40, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_small_images_do_not_depend_on_the_cache(folder, tmp_path, workers):
    """Nothing is made smaller here, so the pixels are the same."""
    images = scan_images(folder, "train")
    cache = PixelCache(images, 1000, tmp_path / "cache")
    view = StrongTransform(32)
    plain, cached = (
        EpochLoader(ImageDataset(images, view, 3), 5),
        EpochLoader(ImageDataset(images, view, 3, pixels=cache), 5, workers),
    )
    for epoch in (0, 1):
        batches = zip(plain.epoch(epoch), cached.epoch(epoch), strict=True)
        for (x, label), (y, other) in batches:
            np.testing.assert_array_equal(x.numpy(), y.numpy())
            np.testing.assert_array_equal(label.numpy(), other.numpy())
