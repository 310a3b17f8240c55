"""Image folders and images: what is listed, how a file becomes pixels, and what is refused."""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hnas.dataset import image_folder
from hnas.dataset.image_folder import (
    MAX_ASPECT,
    DataError,
    cache_folder,
    decode_image,
    list_hash,
    scan_images,
)
from hnas.dataset.transforms import EvalTransform

CLASSES = ("cat", "dog")
LONG_AGO = time.time_ns() - 10**12
RAMP = np.linspace(0, 65535, 120).astype(np.uint16).reshape(10, 12)


def write_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def age(path: Path) -> None:
    """Pretend that ``path`` has not changed for a while, as an image folder usually has not."""
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes of four images each."""
    root = tmp_path / "images"
    for label, name in enumerate(CLASSES):
        for index in range(4):
            path = root / "train" / name / f"{index}.png"
            write_image(path, 10 * label + index)
            age(path)
        (root / "train" / name / "notes.txt").write_text("no image")
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:150])


def names(images) -> list[str]:
    return [images.name(path) for path in images.paths]


# --- what is listed

LATIN = b"caf\xe9/\xff.png"
ENDINGS = ["x.jfif", "x.JPE", "x.gif", "x.pgm", "x.apng"]
HIDDEN = ["cat/._1.png", "cat/.hidden.jpg", ".ipynb_checkpoints/1-checkpoint.png", "._dog/1.png"]


def test_images_are_listed_by_class_and_name(root, caplog):
    for name in HIDDEN:
        write_image(root / "train" / name, 0)
    (root / "train/.DS_Store").write_bytes(b"\0")
    images = scan_images(root, "train")
    assert images.classes == CLASSES
    assert names(images) == [f"{name}/{index}.png" for name in CLASSES for index in range(4)]
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    for name in ENDINGS:
        (root / "train/cat" / name).write_bytes((root / "train/cat/0.png").read_bytes())
    (root / "train/dog/deeper").mkdir()
    (root / "train/dog/x.avif").touch()
    assert sorted(names(scan_images(root, "train", verify=True)))[4:9] == sorted(
        f"cat/{name}" for name in ENDINGS
    )
    left_out = "left out of its class folders by their endings: 2 '.txt', 1 'none', 1 '.avif'; read"
    assert caplog.messages[-1].startswith(f"{root / 'train'}: {left_out}")
    for name in ENDINGS:
        (root / "train/cat" / name).unlink()
    (root / "train/dog/0.png").rename(root / "train/dog/x.png")
    assert names(scan_images(root, "train"))[4:] == [f"dog/{name}.png" for name in "123x"]
    assert scan_images(root, "train").digest() != images.digest()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: (root / "none", "train"), "none is not a folder"),
        (lambda root: (root, "val"), r"has no folder val/ \(expected val/CLASS/\*\.jpg\)"),
        (lambda root: ((root / "empty/train").mkdir(parents=True), (root / "empty", "train"))[1],
         "has no class folders"),
        (lambda root: ((root / "train/emu").mkdir(), (root, "train"))[1],
         r"emu has no images \(\.jpeg "),
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
    with pytest.raises(DataError, match=r"cannot read .*/cat/self\.png: "):
        list_hash(images, range(len(images)), 8)
    assert len(scan_images(root, "train", bad_images="skip")) == 8


def test_links_to_class_folders_are_followed(root, tmp_path):
    (root / "train" / "cat").rename(tmp_path / "elsewhere")
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    assert len(scan_images(root, "train")) == 8


def test_names_that_are_not_utf8(tmp_path):
    write_image(tmp_path / "train" / os.fsdecode(LATIN), 0)
    for verify in (False, True, True):
        images = scan_images(tmp_path, "train", verify)
        assert os.fsencode(names(images)[0]) == LATIN and len(images.digest()) == 64
    assert len(list_hash(images, [0], 8)) == 64
    images.paths[0].write_text("no image")
    with pytest.raises(DataError) as caught:
        decode_image(images.paths[0])
    assert LATIN in os.fsencode(str(caught.value))


# --- bad images


def test_verifying_lists_at_most_ten_and_logs_all(root, caplog):
    folder = root / "train" / "dog"
    for index in range(12):
        (folder / f"bad{index:02}.jpg").write_text("no image")
    before = sorted(root.rglob("*"))
    with pytest.raises(DataError) as caught:
        scan_images(root, "train", verify=True)
    listed = ", ".join(str(folder / f"bad{index:02}.jpg") for index in range(10))
    assert f"12 images cannot be decoded: {listed}, ...;" in str(caught.value)
    for index in range(12):
        assert str(folder / f"bad{index:02}.jpg") in caplog.text
    assert sorted(root.rglob("*")) == before  # nothing is written beside the images


def damaged(path: Path) -> None:
    path.write_text(path.read_text().replace("0.png", "9.png"))


@pytest.mark.parametrize("damage", [None, damaged, lambda path: path.write_text("{}"), Path.unlink])
def test_skipping_leaves_out_the_same_images_every_time(root, monkeypatch, damage):
    """From what was found before; when that is not as it was written, by decoding again."""
    bad = [root / "train" / name for name in ("cat/1.png", "dog/3.png")]
    for path in bad:
        truncate(path)
        age(path)
    first = scan_images(root, "train", bad_images="skip")
    assert names(first) == [f"cat/{i}.png" for i in (0, 2, 3)] + [f"dog/{i}.png" for i in range(3)]
    assert first.labels.tolist() == [0, 0, 0, 1, 1, 1]

    decoded = []
    decode = image_folder.decode_image
    monkeypatch.setattr(image_folder, "decode_image", lambda p: decoded.append(p) or decode(p))
    if damage:
        (kept,) = cache_folder().glob("*-decoded.json")
        damage(kept)
    second = scan_images(root, "train", bad_images="skip")
    assert (names(second), second.digest()) == (names(first), first.digest())
    assert len(decoded) == (8 if damage else 0)

    # Written just now, it may change again without a new modification time.
    for seed in (5, 6):
        decoded.clear()
        write_image(bad[0], seed)
        assert "cat/1.png" in names(scan_images(root, "train", bad_images="skip"))
        assert decoded == [bad[0]]


def test_a_cache_that_cannot_be_written_is_no_error(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(scan_images(root, "train", verify=True)) == 8


def test_a_class_without_a_good_image(root):
    for path in (root / "train" / "cat").glob("*.png"):
        truncate(path)
    with pytest.raises(DataError, match="no image of class 'cat' can be decoded"):
        scan_images(root, "train", bad_images="skip")


# --- how a file becomes pixels


def colour_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, written by hand."""
    height, width = pixels.shape[:2]

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


def saved(pixels: np.ndarray, kind: str) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def long_png(width: int, height: int) -> bytes:
    return saved(np.zeros((height, width), np.uint8), "png")


COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
PNG = colour_png(COLOUR)


def test_colours_of_sixteen_bits_are_scaled_to_eight(tmp_path):
    (tmp_path / "colour.png").write_bytes(PNG)
    pixels = np.asarray(decode_image(tmp_path / "colour.png")).astype(float)
    # Cut or rounded, it is the next whole number.
    assert np.abs(pixels - COLOUR / 65535 * 255).max() <= 1


def test_eight_bits_stay_as_they_are(tmp_path):
    values = (RAMP >> 8).astype(np.uint8)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / name))[..., 1], values)


# Four colours and where they are; of each how much of it shows.
COLOURS = np.array([(200, 60, 20), (10, 20, 30), (90, 90, 90), (255, 0, 0)], dtype=np.uint8)
WHERE = np.arange(120).reshape(10, 12) % 4
TRANSPARENT = [
    *[("RGBA", kind, (0, 255, 128, 7)) for kind in ("png", "tiff", "webp")],
    ("LA", "png", (0, 255, 128, 7)),
    ("P", "png", (0, 255, 128, 7)),
    *[(mode, "png", (0, 255, 255, 255)) for mode in ("P", "RGB", "L")],
    ("P", "gif", (0, 255, 255, 255)),
]


def see_through(mode: str, kind: str, shows: np.ndarray) -> bytes:
    """The four colours, of which so much shows, where only the first may be hidden by its name."""
    pixels, options = COLOURS[WHERE], {}
    if mode in ("L", "LA"):
        pixels = pixels[..., :1]
    if mode in ("RGBA", "LA"):
        pixels = np.dstack([pixels, shows[WHERE]])
    elif shows.min() < 255:
        first = {"P": 0, "L": int(COLOURS[0, 0]), "RGB": tuple(COLOURS[0].tolist())}[mode]
        options["transparency"] = bytes(shows) if 128 in shows else first
    if mode == "P":
        image = Image.fromarray(WHERE.astype(np.uint8))
        image.putpalette(COLOURS.tobytes())
    else:
        image = Image.fromarray(pixels.squeeze())
    assert image.mode == mode
    file = BytesIO()
    image.save(
        file, kind, **options, **({"lossless": True, "exact": True} if kind == "webp" else {})
    )
    return file.getvalue()


@pytest.mark.parametrize(("mode", "kind", "shows"), TRANSPARENT)
def test_white_is_seen_through_what_is_transparent(mode, kind, shows, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for name, parts in (("part", shows), ("all", (255,) * 4)):
        path = tmp_path / "train" / "a" / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(see_through(mode, kind, np.array(parts, np.uint8)))
        colours = COLOURS[:, [0, 0, 0]] if "L" in mode else COLOURS
        weights = np.array(parts)[:, None] / 255
        expected = (colours * weights + 255 * (1 - weights))[WHERE]
        found = np.asarray(decode_image(path))
        assert np.abs(found - expected).max() < (1 if name == "part" else 1e-9)
        with Image.open(path) as image:
            assert name == "part" or np.array_equal(found, np.asarray(image.convert("RGB")))
    scan_images(tmp_path, "train")
    number = 2 if mode in ("RGBA", "LA") and kind != "webp" else 1
    assert f"{number} of 2 images that are no JPEG have transparency" in caplog.messages[-1]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
REFUSED_IMAGES = {
    "grey.png": (saved(RAMP, "png"), "grey of more than 8 bits"),
    "grey.tif": (saved(RAMP, "tiff"), "grey of more than 8 bits"),
    "float.tif": (saved(RAMP.astype(np.float32), "tiff"), "grey of more than 8 bits"),
    "grey.ppm": (b"P5 12 10 65535\n" + RAMP.astype(">u2").tobytes(), "grey of more than 8 bits"),
    "thin.png": (long_png(1, 2_000_000), "1 x 2000000 px, one side more than 100 times"),
    "flat.png": (long_png(MAX_ASPECT * 2 + 1, 2), "201 x 2 px, one side more than 100 times"),
    "eps.jpg": (EPS, "cannot identify image file"),
    "truncated.png": (PNG[:100], ""),
    "empty.png": (b"", "cannot identify image file"),
    "text.png": (b"hello", "cannot identify image file"),
    "middle.png": (PNG[:60] + bytes(40) + PNG[100:], ""),
}


@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_images_that_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is started to read an image
    content, words = REFUSED_IMAGES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        decode_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_the_longest_image_that_is_taken(tmp_path):
    (tmp_path / "long.png").write_bytes(long_png(MAX_ASPECT * 2, 2))
    assert EvalTransform(8)(decode_image(tmp_path / "long.png")).shape == (3, 8, 8)


@pytest.mark.parametrize("pixels_of_limit", [1.5, 3])
def test_decompression_bombs_are_refused(pixels_of_limit, root, monkeypatch):
    """Pillow warns beyond its limit and refuses from twice that on."""
    assert pytest.approx(1024**3 / 4 / 3, abs=1) == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(120 / pixels_of_limit))
    with pytest.raises(DataError, match=r"cannot decode image .*1\.png"):
        decode_image(root / "train" / "cat" / "1.png")
