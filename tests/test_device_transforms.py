"""Augmentations on the device against Pillow, SciPy and the workers' ones."""

import dataclasses
import itertools

import numpy as np
import paddle
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from scipy.ndimage import gaussian_filter

import hnas.dataset.device_transforms as device
from hnas.dataset.batch_transforms import BRIGHTNESS, CONTRAST, HUE, SATURATION
from hnas.dataset.image_folder import scan_images
from hnas.dataset.loader import EpochLoader, ImageDataset
from hnas.dataset.pixel_cache import PixelCache
from hnas.dataset.transforms import StrongTransform, TrainTransform, TwoViews
from hnas.dataset.transforms import shift_hue as shift_hue_of_one
from hnas.utils.errors import UserError
from hnas.utils.options import Options, parse_options
from hnas.utils.setup import training_loader

SIZE = 40


def picture(seed, height, width):
    """Smooth colours with some noise on them, so that every level and every hue occurs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + rng.integers(-9, 10, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def as_batch(images):
    """PIL images as floats [N, 3, H, W]."""
    return paddle.to_tensor(np.stack([np.float32(image).transpose(2, 0, 1) for image in images]))


def as_pixels(tensor):
    """A batch as [N, H, W, 3]."""
    return tensor.numpy().transpose(0, 2, 3, 1)


def differences(found, images):
    """Between a batch and PIL images or arrays, in levels."""
    return np.abs(as_pixels(found) - np.stack([np.asarray(i, dtype=np.float64) for i in images]))


# --- each operation


@pytest.mark.parametrize(
    "box", [(3, 5, 23, 30), (0, 0, 50, 60), (7, 2, 8, 4)], ids=["larger", "smaller", "tiny"]
)
def test_crops_are_pillows(box):
    """Enlarged and made smaller with antialiasing, next to the border and not."""
    images = [picture(seed, 60, 50) for seed in range(3)]
    left, top, right, bottom = box
    down, across = [[top, bottom - top, 60]] * 3, [[left, right - left, 50]] * 3
    canvas = np.zeros((3, 3, 64, 64))
    canvas[:, :, :60, :50] = as_batch(images).numpy()
    found = device.resize(
        paddle.to_tensor(canvas, dtype="float32"),
        paddle.to_tensor(down, dtype="float32"),
        paddle.to_tensor(across, dtype="float32"),
        SIZE,
    )
    expected = [image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box) for image in images]
    assert differences(found, expected).max() <= 1


def change(images, step, amounts):
    """Each image with one change."""
    return jittered(images, [[(step, amount)] for amount in amounts])


def jittered(images, draws):
    """Each image with its draws, in their order."""
    rows = paddle.to_tensor(np.float32([device._slots(draw) for draw in draws]))
    return device.jitter(as_batch(images), *rows.split([6, 6, 2], axis=1))


@pytest.mark.parametrize(
    ("step", "enhancer"),
    [
        (BRIGHTNESS, ImageEnhance.Brightness),
        (CONTRAST, ImageEnhance.Contrast),
        (SATURATION, ImageEnhance.Color),
    ],
)
def test_brightness_contrast_and_saturation_are_pillows(step, enhancer):
    images, factors = [picture(seed, 30, 20) for seed in range(4)], (0.6, 0.93, 1.0, 1.4)
    found = change(images, step, factors)
    expected = [enhancer(i).enhance(f) for i, f in zip(images, factors, strict=True)]
    assert differences(found, expected).max() <= 1
    assert differences(found, images).max() > 50


def test_hues_are_pillows():
    images, turns = [picture(seed, 60, 50) for seed in range(4)], (-0.1, -0.004, 0.0, 0.1)
    images[0].paste((90, 90, 90), (0, 0, 9, 9))
    found = change(images, HUE, turns)
    expected = [shift_hue_of_one(i, t) for i, t in zip(images, turns, strict=True)]
    off = differences(found, expected)
    # Where rounding decides between two of the 256 hues, a channel may be 6 levels off.
    assert off.max() <= 6 and (off > 1).mean() < 0.001
    assert differences(found, images).max() > 50


def test_jitter_keeps_each_images_order():
    image, orders = picture(1, 20, 20), list(itertools.permutations(range(4)))
    amounts = {BRIGHTNESS: 1.3, CONTRAST: 0.7, SATURATION: 1.35, HUE: 0.08}
    draws = [[(step, amounts[step]) for step in order] for order in orders]
    found = jittered([image] * len(orders), draws)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    expected = []
    for order in orders:
        changed = image
        for step in order:
            if step == HUE:
                changed = shift_hue_of_one(changed, amounts[HUE])
            else:
                changed = enhancers[step](changed).enhance(amounts[step])
        expected.append(changed)
    assert np.percentile(differences(found, expected), 99, axis=(1, 2, 3)).max() <= 2
    assert np.percentile(differences(found, expected[::-1]), 50) > 2


def test_no_change_changes_nothing():
    images = [picture(seed, 20, 20) for seed in range(2)]
    assert differences(jittered(images, [[], []]), images).max() == 0


def test_greys_are_pillows_exactly():
    image = picture(0, 90, 80)
    found = device.grey_of(as_batch([image]))
    np.testing.assert_array_equal(found.numpy()[0, 0], np.asarray(image.convert("L")))


def test_blur_is_a_gaussian_with_each_images_sigma():
    images, sigmas = [picture(seed, 30, 50) for seed in range(4)], (0.0, 0.3, 1.1, 2.0)
    found = device.blur(as_batch(images), paddle.to_tensor(sigmas, dtype="float32"), 2.0)
    expected = [
        gaussian_filter(np.asarray(image, dtype=np.float64), (sigma, sigma, 0), mode="nearest")
        for image, sigma in zip(images, sigmas, strict=True)
    ]
    off = differences(found, expected)
    assert off.max() <= 0.6  # half a level is rounding
    assert off[0].max() == 0
    pillows = [image.filter(ImageFilter.GaussianBlur(sigmas[2])) for image in images[2:3]]
    assert differences(found[2:3], pillows).mean() < 1


# --- whole batches


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for index in range(12):
        target = root / "train" / f"class{index % 3}"
        target.mkdir(parents=True, exist_ok=True)
        # Also images smaller than a crop, and a panorama.
        height, width = {4: (20, 25), 7: (50, 150)}.get(index, (52 + index, 80 - 3 * index))
        picture(index, height, width).save(target / f"{index}.png")
    return scan_images(root, "train")


VIEWS = TwoViews(StrongTransform(SIZE), TrainTransform(SIZE, 0.3))


@pytest.fixture(scope="module")
def pixels(images, tmp_path_factory):
    return PixelCache(images, 60, tmp_path_factory.mktemp("cache"))


def loader(images, pixels, transform=VIEWS, workers=0):
    dataset = device.CropDataset(images, transform, 5, pixels=pixels)
    return device.DeviceLoader(EpochLoader(dataset, 4, workers))


def collect(batches):
    return [[part.numpy() for part in batch] for batch in batches]


def without_blur(views):
    """Views whose colours and places are compared with Pillow's, pixel by pixel."""

    class Sharp(StrongTransform):
        def draw(self, rng):
            return dataclasses.replace(super().draw(rng), radius=0.0)

    return TwoViews(Sharp(views.first.size), views.second)


def test_device_and_workers_augment_alike(images, pixels):
    """The same crops, colours, greys and mirrors of every image, in the same order."""
    sharp = without_blur(VIEWS)
    whole_batches = ImageDataset(images, sharp, 5, pixels=pixels)
    found = loader(images, pixels, sharp)
    workers = EpochLoader(whole_batches, 4)
    assert (len(found), found.total_batch, found.batch_size) == (3, 4, 4)
    for epoch in range(3):
        for ours, theirs in zip(found.epoch(epoch), workers.epoch(epoch), strict=True):
            for view, expected in zip(ours[:2], theirs[:2], strict=True):
                assert view.dtype == paddle.uint8 and view.shape == [4, 3, SIZE, SIZE]
                off = np.abs(view.numpy().astype(int) - expected.numpy())
                # A level lost in the crop may become some in a hue.
                assert np.percentile(off, 98, axis=(1, 2, 3)).max() <= 6
                assert off.mean(axis=(1, 2, 3)).max() < 1
            off = np.abs(ours[1].numpy().astype(int) - theirs[1].numpy())
            # Each of the crop's two passes may round the other way.
            assert off.max() <= 2 and (off > 1).mean() < 0.001
            np.testing.assert_array_equal(ours[2].numpy(), theirs[2].numpy())


def test_blurred_views_are_close_to_the_workers_too(images, pixels):
    expected = EpochLoader(ImageDataset(images, VIEWS, 5, pixels=pixels), 4)
    for epoch in range(3):
        pairs = zip(loader(images, pixels).epoch(epoch), expected.epoch(epoch), strict=True)
        for ours, theirs in pairs:
            off = np.abs(ours[0].numpy().astype(int) - theirs[0].numpy())
            assert off.mean(axis=(1, 2, 3)).max() < 2


def test_an_image_does_not_depend_on_its_batch(images, pixels):
    dataset = device.CropDataset(images, VIEWS, 5, pixels=pixels)
    together, alone = dataset.load(range(12)), [dataset.load([index]) for index in range(12)]
    for view in (0, 2):
        batch = device.augment(*map(paddle.to_tensor, together[view : view + 2]), SIZE)
        for index, single in enumerate(alone):
            one = device.augment(*map(paddle.to_tensor, single[view : view + 2]), SIZE)
            off = np.abs(one.numpy()[0].astype(int) - batch.numpy()[index])
            # Canvases of other sizes may add up in another order, which a rounding may show.
            assert (off > 0).mean() < 0.001 and off.max() <= 6


def test_mirrors_are_exact(images, pixels):
    plain, mirrored = (
        collect(loader(images, pixels, TrainTransform(SIZE, flip=flip)).epoch(0))
        for flip in (0.0, 1.0)
    )
    for left, right in zip(plain, mirrored, strict=True):
        np.testing.assert_array_equal(left[0], right[0][..., ::-1])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_in_the_middle(images, pixels, workers):
    whole = collect(loader(images, pixels).epoch(1))
    rest = collect(loader(images, pixels, workers=workers).epoch(1, start_step=1))
    assert len(whole) == 3 and len(rest) == 2
    for left, right in zip(whole[1:], rest, strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a, b)
    other = next(iter(loader(images, pixels).epoch(2)))[0].numpy()
    assert not np.array_equal(whole[0][0], other)


# --- the flag


def test_the_flag_needs_decoded_images():
    with pytest.raises(UserError, match=r"--augment_on device needs .*--use_tensor_dataset True$"):
        parse_options(1, {}, ["run", "--augment_on", "device"])
    with pytest.raises(UserError, match="allowed: workers, device"):
        parse_options(2, {}, ["run", "--augment_on", "gpu"])
    both = ["run", "--augment_on", "device", "--use_tensor_dataset", "True"]
    assert parse_options(2, {}, both).augment_on == "device"


def test_the_flag_chooses_the_loader(images, tmp_path):
    options = Options(
        image_size=SIZE, batch_size=4, num_workers=0, use_tensor_dataset=True, storage_size=60
    )
    options.cache_dir, options.seed = str(tmp_path), 5
    crop = TrainTransform(SIZE)
    assert isinstance(training_loader(options, images, crop), EpochLoader)
    options.augment_on = "device"
    chosen = training_loader(options, images, crop)
    assert isinstance(chosen, device.DeviceLoader)
    assert [part.shape for part in next(iter(chosen.epoch(0)))] == [[4, 3, SIZE, SIZE], [4]]
