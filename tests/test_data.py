"""Augmentations and loaders: determinism, and what each augmentation does."""

import shutil

import numpy as np
import paddle
import pytest
from paddle.vision.transforms import CenterCrop, Resize, functional_pil
from PIL import Image

from hnas.dataset import transforms
from hnas.dataset.image_folder import DataError, scan_images
from hnas.dataset.loader import EpochLoader, EvalLoader, ImageDataset
from hnas.dataset.transforms import (
    EvalTransform,
    StrongTransform,
    TrainTransform,
    TwoViews,
    normalize,
    shift_hue,
)
from hnas.utils.options import Options
from hnas.utils.runtime import calibration_images


def gradient_image(width=48, height=40):
    """Every pixel differs: red grows to the right, green downward."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 5, y * 6, (x + y) * 2], axis=2).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, number in (("train", 6), ("val", 3)):
        for name in ("a", "b"):
            path = root / split / name
            path.mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"{index}.png")
    return root


def test_normalize_is_imagenets():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    expected = np.empty((2, 3, 4, 5))
    for channel, (mean, std) in enumerate(
        zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ):
        expected[:, channel] = (images[:, channel] / 255 - mean) / std
    np.testing.assert_allclose(normalize(paddle.to_tensor(images)).numpy(), expected, rtol=1e-4)


def test_eval_transform_takes_the_centre():
    # 40 px high at size 35: the shorter side is already 35 * 8 / 7 = 40, so nothing is resized.
    image = gradient_image()
    pixels = np.asarray(image)
    expected = pixels[2:37, 6:41].transpose(2, 0, 1)
    np.testing.assert_array_equal(EvalTransform(35)(image), expected)
    assert EvalTransform(28)(image).shape == (3, 28, 28)
    assert EvalTransform(64)(gradient_image(10, 90)).shape == (3, 64, 64)


def sizes_of_images(number):
    """Widths and heights of all kinds: wide, tall, square, and with a side of 256."""
    rng = np.random.default_rng(7)
    drawn = rng.integers(60, 700, (number, 2))
    drawn[::10, 0] = 256  # the shorter side, or not
    drawn[5::10, 1] = 256
    drawn[3::50] = drawn[3::50, :1]
    return [(int(width), int(height)) for width, height in drawn]


class Recorder:
    """An image without pixels: what a transform does to its size."""

    def __init__(self, size, done=()):
        self.size, self.done = size, done

    def resize(self, size, *_, **__):
        return Recorder(size, (*self.done, ("resize", *size)))

    def crop(self, box):
        left, top, right, bottom = box
        return Recorder((right - left, bottom - top), (*self.done, ("crop", *box)))


def test_evaluation_resizes_and_crops_as_paddle_does(monkeypatch):
    """Resize(256) and CenterCrop(224) on Paddle's Pillow backend, over 300 sizes."""
    monkeypatch.setattr(transforms, "to_array", lambda image: image.done)
    resized = 0
    for size in sizes_of_images(300):
        ours = EvalTransform(224)(Recorder(size))
        theirs = functional_pil.center_crop(functional_pil.resize(Recorder(size), 256), 224)
        assert ours == theirs.done, size
        resized += len(ours) == 2
    # The others have a shorter side of 256, and are left as they are.
    assert 240 < resized < 300


def test_evaluation_gives_paddles_pixels():
    for width, height in sizes_of_images(300)[::8]:
        # Smooth to read, and different everywhere: 7 x 5 random colours, enlarged.
        colours = np.random.default_rng(width).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
        expected = CenterCrop(224)(Resize(256)(image))
        assert expected.size == (224, 224)
        found = EvalTransform(224)(image)
        np.testing.assert_array_equal(found, np.asarray(expected).transpose(2, 0, 1))


def test_whole_crop_without_flip_is_a_resize():
    image = gradient_image(32, 32)
    transform = TrainTransform(32, scale_min=1.0, flip=0.0)
    # A crop of all of the area fits only with aspect 1, else the centre is taken: the same here.
    np.testing.assert_array_equal(
        transform(image, np.random.default_rng(0)), np.asarray(image).transpose(2, 0, 1)
    )
    flipped = TrainTransform(32, scale_min=1.0, flip=1.0)(image, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped, np.asarray(image)[:, ::-1].transpose(2, 0, 1))


def test_weak_view_keeps_colours_and_strong_view_changes_them():
    image = Image.new("RGB", (40, 40), (200, 60, 20))
    weak = [TrainTransform(32)(image, np.random.default_rng(seed)) for seed in range(40)]
    assert all(np.all(view == np.reshape((200, 60, 20), (3, 1, 1))) for view in weak)
    strong = [StrongTransform(32)(image, np.random.default_rng(seed)) for seed in range(400)]
    means = np.array([view.mean((1, 2)) for view in strong])
    # Jitter has probability 0.8, greyscale 0.2: 0.8 * 0.2 + ... leave 16 % of views unchanged.
    unchanged = np.all(np.abs(means - (200, 60, 20)) < 1, axis=1).mean()
    assert unchanged == pytest.approx(0.2 * 0.8, abs=0.06)
    grey = (np.ptp(means, axis=1) < 1).mean()
    assert grey == pytest.approx(0.2, abs=0.06)


def test_hue_turns_red_to_green():
    pixel = np.asarray(shift_hue(Image.new("RGB", (1, 1), (255, 0, 0)), 1 / 3))[0, 0]
    assert np.abs(pixel.astype(int) - (0, 255, 0)).max() <= 6


def test_two_views_differ_but_repeat():
    image, views = gradient_image(), TwoViews(StrongTransform(32), TrainTransform(32))
    first, second = views(image, np.random.default_rng(1))
    assert not np.array_equal(first, second)
    again = views(image, np.random.default_rng(1))
    np.testing.assert_array_equal(first, again[0])
    np.testing.assert_array_equal(second, again[1])


def loader(folder, workers=0, in_memory=False, seed=3):
    images = scan_images(folder, "train")
    dataset = ImageDataset(images, TrainTransform(32), seed, in_memory)
    return EpochLoader(dataset, batch_size=4, num_workers=workers)


def collect(batches):
    return [[part.numpy() for part in batch] for batch in batches]


@pytest.mark.parametrize("options", [{"workers": 2}, {"in_memory": True}])
def test_batches_depend_on_seed_and_epoch_only(folder, options):
    reference = collect(loader(folder).epoch(1))
    assert len(reference) == 3
    for left, right in zip(reference, collect(loader(folder, **options).epoch(1)), strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b)
    for other in (loader(folder).epoch(2), loader(folder, seed=4).epoch(1)):
        assert not np.array_equal(reference[0][0], next(iter(other))[0].numpy())


def test_an_epoch_can_start_in_the_middle(folder):
    whole = collect(loader(folder).epoch(0))
    rest = collect(loader(folder).epoch(0, start_step=2))
    assert len(rest) == 1
    np.testing.assert_array_equal(whole[2][0], rest[0][0])


def test_an_epoch_shows_every_image_once(folder):
    batches = loader(folder).batches(0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(12))


def test_eval_loader_keeps_order_and_labels(folder):
    images = scan_images(folder, "val")
    batches = collect(EvalLoader(ImageDataset(images, EvalTransform(32), 0), 4))
    np.testing.assert_array_equal(np.concatenate([b[1] for b in batches]), [0, 0, 0, 1, 1, 1])
    second = np.asarray(Image.open(folder / "val/a/1.png").convert("RGB"))
    resized = np.asarray(Image.fromarray(second).resize((41, 37), Image.Resampling.BILINEAR))
    expected = resized[2:34, 4:36].transpose(2, 0, 1)
    np.testing.assert_array_equal(batches[0][0][1], expected)


def test_too_few_images_for_a_batch(folder):
    dataset = ImageDataset(scan_images(folder, "train"), TrainTransform(32), 0)
    with pytest.raises(DataError, match="fewer than one batch"):
        EpochLoader(dataset, batch_size=13)


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
