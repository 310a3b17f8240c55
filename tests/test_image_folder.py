"""Image folders and images: what is listed, how a file becomes pixels, and what is refused."""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hnas.base.errors import UserError
from hnas.dataset.image_folder import MAX_ASPECT, DataError, decode_image, list_hash, scan_images
from hnas.dataset.transforms import EvalTransform
from hnas.tools import split_folder

CLASSES = ("cat", "dog")
RAMP = np.linspace(0, 65535, 120).astype(np.uint16).reshape(10, 12)


def write_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes of four images each."""
    root = tmp_path / "images"
    for label, name in enumerate(CLASSES):
        for index in range(4):
            write_image(root / "train" / name / f"{index}.png", 10 * label + index)
        (root / "train" / name / "notes.txt").write_text("no image")
    return root


def names(images) -> list[str]:
    return [images.name(path) for path in images.paths]


# --- what is listed

LATIN = b"caf\xe9/\xff.png"
ENDINGS = ["z.JPE", "z.apng", "z.gif", "z.jfif", "z.pgm"]
HIDDEN = ["cat/._1.png", "cat/.hidden.jpg", ".ipynb_checkpoints/1-checkpoint.png", "._dog/1.png"]


def test_images_are_listed_by_class_and_name(root, caplog):
    for name in HIDDEN:
        write_image(root / "train" / name, 0)
    (root / "train/.DS_Store").write_bytes(b"\0")
    images = scan_images(root, "train")
    assert images.classes == CLASSES
    assert names(images) == [f"{name}/{index}.png" for name in CLASSES for index in range(4)]
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    (root / "train/dog/0.png").rename(root / "train/dog/x.png")
    assert names(scan_images(root, "train"))[4:] == [f"dog/{name}.png" for name in "123x"]
    assert scan_images(root, "train").digest() != images.digest()
    for name in ENDINGS:
        (root / "train/dog" / name).write_bytes((root / "train/cat/0.png").read_bytes())
    (root / "train/dog/deeper").mkdir()
    (root / "train/dog/x.avif").touch()
    assert names(scan_images(root, "train", verify=True))[8:] == [f"dog/{name}" for name in ENDINGS]
    left_out = "left out of its class folders by their endings: 2 '.txt', 1 'none', 1 '.avif'; read"
    assert caplog.messages[-1].startswith(f"{root / 'train'}: {left_out}")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: (root / "none", "train"), "none is not a folder"),
        (lambda root: (root, "val"), r"has no folder val/ \(expected val/CLASS/\*\.jpg\); python "
         r"-m hnas\.tools\.split_folder --images .*/images/train --output DIR makes both of"),
        (lambda root: (root / "train", "train"), "--images .*/train --output DIR makes both of"),
        (lambda root: ((root / "empty/train").mkdir(parents=True), (root / "empty", "train"))[1],
         "has no class folders"),
        (lambda root: ((root / "train/emu").mkdir(), (root, "train"))[1],
         r"emu has no images \(\.jpeg "),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used(make, reason, root):
    with pytest.raises(DataError, match=reason):
        scan_images(*make(root))


@pytest.mark.parametrize("mode", ["link", "copy"])
def test_a_folder_of_classes_is_split_by_class_and_seed(mode, root, tmp_path, capsys):
    odd = os.fsdecode(b"emu/\xff.png")
    for name in (odd, "emu/2.png", *(f"dog/{n}.png" for n in range(4, 20))):
        write_image(root / "train" / name, 1)
    found = []
    for number, seed in enumerate((0, 0, 1)):
        output = tmp_path / str(number)
        line = f"--output {output} --mode {mode} --val_share 0.25 --seed {seed} --images"
        split_folder.main([*line.split(), str(root / "train")])
        assert "19 training and 7 validation images of 3 classes" in capsys.readouterr().out
        parts = [scan_images(output, split, verify=True) for split in ("train", "val")]
        assert [np.bincount(part.labels).tolist() for part in parts] == [[3, 15, 1], [1, 5, 1]]
        assert {path.is_symlink() for part in parts for path in part.paths} == {mode == "link"}
        found.append([names(part) for part in parts])
        assert sorted(sum(found[-1], [])) == sorted(names(scan_images(root, "train")))
    assert found[0] == found[1] != found[2]


def test_folders_that_are_not_split(root, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    write_image(root / "single/cow/1.png", 0)
    write_image(root / "odd/cow/1.png", 0)
    (root / "odd/cow/x.jpg").mkdir()
    before = set(tmp_path.rglob("*"))
    for images, output, words in (
        ("", "new", "is not a folder of class folders"),
        ("none", "new", "is not a folder of class folders"),
        ("train/cat", "new", "has no class folders"),
        ("train", "taken", "cannot write --output .*: Directory not empty; choose a new folder"),
        ("train", "taken/file", "cannot write --output .*: Not a directory"),
        ("train", "images/train/cat/new", "is in --images"),
        ("single", "new", "1 classes of .* and both parts need one: cow; add images"),
        ("odd", "new", "cannot copy .*odd/cow/x.jpg: Is a directory; remove it"),
    ):
        line = f"--images {root / images} --output {tmp_path / output} --mode copy"
        with pytest.raises(UserError, match=words):
            split_folder.main(line.split())
    assert set(tmp_path.rglob("*")) == before


def test_links_are_followed_and_loops_of_them_survived(root, tmp_path, caplog):
    train = root / "train"
    (train / "cat").rename(tmp_path / "elsewhere")
    (train / "cat").symlink_to(tmp_path / "elsewhere")
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


def test_names_that_are_not_utf8(tmp_path):
    write_image(tmp_path / "train" / os.fsdecode(LATIN), 0)
    for verify in (False, True):
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
    caplog.clear()
    found = scan_images(root, "train", bad_images="skip")
    told = f"left out 12 of {12 + len(found)} images, which cannot be decoded: {listed}, ...; "
    assert caplog.messages[1:] == [f"{told}--bad_images fatal says why"]


def test_skipping_leaves_out_what_cannot_be_decoded_now(root):
    """Whatever was found before: a bad image that was replaced, at the same time and size."""
    bad = [root / "train" / name for name in ("cat/1.png", "dog/3.png")]
    good = bad[0].read_bytes()
    for path in bad:
        path.write_bytes(good[:100] + bytes(len(good) - 100))
        os.utime(path, (1_600_000_000, 1_600_000_000))
    found = scan_images(root, "train", bad_images="skip")
    assert names(found) == [f"cat/{i}.png" for i in (0, 2, 3)] + [f"dog/{i}.png" for i in range(3)]
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    bad[0].write_bytes(good)
    os.utime(bad[0], (1_600_000_000, 1_600_000_000))
    assert "cat/1.png" in names(scan_images(root, "train", bad_images="skip"))
    for path in (root / "train" / "cat").glob("*.png"):
        path.write_bytes(good[:150])
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
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + data


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


# Four greys and where they are; of each how much shows, and how that is told without an alpha.
SHADES = np.array([200, 10, 90, 255], dtype=np.uint8)
WHERE = (np.arange(120) % 4).astype(np.uint8).reshape(10, 12)
PART, KEY, ALL = np.array([(0, 255, 128, 7), (0, 255, 255, 255), [255] * 4], dtype=np.uint8)
SEE_THROUGH = [
    *(("RGBA", kind, PART, None) for kind in ("png", "tiff", "webp")),
    *(("LA", kind, PART, None) for kind in ("png", "tiff")),
    *(("P", "png", PART, bytes(PART)), ("P", "gif", KEY, 0)),
    *(("RGB", "png", KEY, (200, 200, 200)), ("L", "png", KEY, 200)),
]


@pytest.mark.parametrize(("mode", "kind", "shows", "key"), SEE_THROUGH)
def test_white_is_seen_through_what_is_transparent(mode, kind, shows, key, tmp_path, caplog):
    """Opaque pixels stay as they are."""
    caplog.set_level(logging.INFO)
    (tmp_path / "train/a").mkdir(parents=True)
    for name, weights, option in (("part", shows, key), ("all", ALL, None)):
        path = tmp_path / f"train/a/{name}.{kind}"
        image = Image.fromarray(SHADES[WHERE]).convert(mode)
        if mode == "P":
            image = Image.fromarray(WHERE)
            image.putpalette(SHADES.repeat(3).tobytes())
        elif mode.endswith("A"):
            image.putalpha(Image.fromarray(weights[WHERE]))
        image.save(path, lossless=True, **({"transparency": option} if option is not None else {}))
        found = np.asarray(decode_image(path)).astype(float)
        expected = (255 - weights / 255 * (255 - SHADES))[WHERE][..., None]
        assert found.shape == (10, 12, 3) and np.abs(found - expected).max() < 1
        assert np.array_equal(found, np.asarray(Image.open(path).convert("RGB"))) == (name == "all")
    scan_images(tmp_path, "train")
    number = 2 if mode.endswith("A") and kind != "webp" else 1
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
