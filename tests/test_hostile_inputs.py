"""Inputs that are lossy, endless or strange: a right result, or one line. A new case is a line."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hnas import architecture_file
from hnas.architecture_file import ArchitectureFileError, read_architectures
from hnas.base.errors import UserError
from hnas.dataset.image_folder import MAX_ASPECT, DataError, decode_image, scan_images
from hnas.dataset.loader import EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform
from hnas.evaluation.images import DecodedImages
from hnas.ranking.findings import Matched, notes_on_ranking
from hnas.search_space import RESNET48_MINI

ROOT = Path(__file__).resolve().parents[1]
RAMP = np.linspace(0, 65535, 120).astype(np.uint16).reshape(10, 12)
FEW_SECONDS = 20


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- pixels


def png(pixels: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits a channel, written by hand: colour 0 is grey, 2 RGB, 4 grey and alpha."""
    height, width = pixels.shape[:2]

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


def tiff(pixels: np.ndarray, order: str = "<", photometric: int = 1, kind: int = 1) -> bytes:
    """A grey TIFF, written by hand; kind 1 holds whole numbers, 2 signed ones, 3 floats."""
    pixels = pixels.astype(pixels.dtype.newbyteorder(order))
    height, width = pixels.shape
    # Width, height, bits, compression, photometric, strip, samples, rows a strip, bytes, kind.
    tags = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: photometric}
    tags |= {273: 8, 277: 1, 278: height, 279: pixels.nbytes, 339: kind}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + pixels.nbytes)
    return head + pixels.tobytes() + directory


GREY_ALPHA = np.stack([RAMP, np.full_like(RAMP, 65535)], axis=2)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
SIXTEEN_BITS = {
    "grey.png": (png(RAMP, 0), RAMP),
    "grey-alpha.png": (png(GREY_ALPHA, 4), RAMP),
    "colour.png": (png(COLOUR, 2), COLOUR),
    "little.tif": (tiff(RAMP), RAMP),
    "big.tif": (tiff(RAMP, ">"), RAMP),
    "white-is-zero.tif": (tiff(RAMP, photometric=0), 65535 - RAMP),
    "grey.ppm": (b"P5 12 10 65535\n" + RAMP.astype(">u2").tobytes(), RAMP),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_sixteen_bits_are_scaled_to_eight(name, tmp_path):
    content, values = SIXTEEN_BITS[name]
    (tmp_path / name).write_bytes(content)
    pixels = np.asarray(decode_image(tmp_path / name)).astype(float)
    expected = values / 65535 * 255
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    # Cut or rounded, it is the next whole number.
    assert np.abs(pixels - expected).max() <= 1
    assert pixels.min() == 0 and pixels.max() == 255


def test_eight_bits_stay_as_they_are(tmp_path):
    values = (RAMP >> 8).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values).save(tmp_path / "grey.tif")
    for path in tmp_path.glob("grey.*"):
        np.testing.assert_array_equal(np.asarray(decode_image(path))[..., 1], values)


def long_png(width: int, height: int) -> bytes:
    file = BytesIO()
    Image.new("L", (width, height)).save(file, "png")
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
REFUSED_IMAGES = {
    "float.tif": (tiff(RAMP.astype(np.float32), kind=3), "mode F, whose range is unknown"),
    "int32.tif": (tiff(RAMP.astype(np.int32), kind=2), "mode I, whose range is unknown"),
    "int16.tif": (tiff(RAMP.astype(np.int16), kind=2), "mode I, whose range is unknown"),
    "thin.png": (long_png(1, 2_000_000), "1 x 2000000 px, one side more than 100 times"),
    "flat.png": (long_png(MAX_ASPECT * 2 + 1, 2), "201 x 2 px, one side more than 100 times"),
    "eps.jpg": (EPS, "cannot identify image file"),
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


# --- kinds of files


def open_socket(path: Path) -> None:
    """A socket's file; names of sockets are short."""
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


ENDLESS = {
    "pipe": os.mkfifo,
    "socket": open_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "folder": Path.mkdir,
    "nothing": lambda path: path.symlink_to("/nowhere"),
    "itself": lambda path: path.symlink_to(path.name),
}
READ = """
import sys
from pathlib import Path
from hnas.architecture_file import read_architectures
from hnas.base.errors import UserError
from hnas.dataset.image_folder import decode_image
try:
    {"image": decode_image, "architectures": read_architectures}[sys.argv[1]](Path(sys.argv[2]))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["image", "architectures"])
@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_is_refused_at_once(what, kind, tmp_path):
    path = tmp_path / "input.png"
    ENDLESS[kind](path)
    reader = {"image": decode_image, "architectures": read_architectures}[what]
    if kind in ("pipe", "socket", "device"):
        # In a process of its own, which can be ended when it hangs.
        done = subprocess.run(
            [sys.executable, "-c", READ, what, str(path)],
            capture_output=True,
            text=True,
            timeout=FEW_SECONDS,
            cwd=ROOT,
        )
        message = done.stdout
    else:
        with pytest.raises((DataError, ArchitectureFileError)) as caught:
            reader(path)
        message = f"{caught.value}\n"
    assert str(path) in message and message.count("\n") == 1, message


# --- names and links


def write_folder(root: Path, names: list) -> Path:
    """Images of those names, text or bytes, in the class folders of ``root/train``."""
    for name in names:
        path = Path(os.fsdecode(os.path.join(os.fsencode(root / "train"), os.fsencode(name))))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (7, 7, 7)).save(path)
    return root


HIDDEN = ["cat/._1.png", "cat/.hidden.jpg", ".ipynb_checkpoints/1-checkpoint.png", "._dog/1.png"]


def test_hidden_names_are_ignored(tmp_path):
    write_folder(tmp_path, ["cat/1.png", "dog/1.png", *HIDDEN])
    (tmp_path / "train/.DS_Store").write_bytes(b"\0")
    for _ in range(2):  # from the folders, and from the index of the first scan
        images = scan_images(tmp_path, "train")
        assert images.classes == ("cat", "dog")
        assert [images.name(path) for path in images.paths] == ["cat/1.png", "dog/1.png"]


LATIN = b"caf\xe9/\xff.png"


@pytest.mark.parametrize("workers", [0, 1])
def test_names_that_are_not_utf8(workers, tmp_path):
    images = scan_images(write_folder(tmp_path, [LATIN, "dog/1.png"]), "train")
    assert os.fsencode(images.name(images.paths[0])) == LATIN
    decoded = DecodedImages(images, np.arange(2), 8, 1.0, tmp_path, workers)
    assert decoded.pixels.shape == (2, 3, 8, 8) and len(images.digest()) == 64
    images.paths[0].write_text("no image")
    dataset = ImageDataset(images, EvalTransform(8), seed=0)
    with pytest.raises(DataError) as caught:
        list(EvalLoader(dataset, 2, workers))
    assert LATIN in os.fsencode(str(caught.value))


@pytest.mark.parametrize("target", ["/nowhere", "1.png"])
def test_links_to_nothing_and_to_themselves(target, tmp_path):
    write_folder(tmp_path, ["cat/0.png"])
    (tmp_path / "train/cat/1.png").symlink_to(target)
    images = scan_images(tmp_path, "train")
    with pytest.raises(DataError, match=r"cannot read .*/cat/1\.png: "):
        DecodedImages(images, np.arange(2), 8, 1.0, tmp_path)


# --- sizes


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[]," * 100 + "[]]",
        "[" + '"1",' * 300 + '"1"]',
        "{" + '"a":{},' * 100 + '"b":{}}',
        "1," * 101,
        "1\n" * 101,
    ],
    ids=["lists", "codes", "objects", "commas", "lines"],
)
def test_too_many_architectures(text, tmp_path, monkeypatch):
    """Refused before anything is built of them: 48 MB of ``[],`` took 3.8 GB."""
    assert architecture_file.MAX_ENTRIES < 10**6
    monkeypatch.setattr(architecture_file, "MAX_ENTRIES", 100)
    monkeypatch.setattr(json, "loads", None)
    (tmp_path / "archs").write_text(text)
    with pytest.raises(ArchitectureFileError, match="holds more than 100 entries"):
        read_architectures(tmp_path / "archs")


def test_as_many_architectures_as_are_allowed(tmp_path, monkeypatch):
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(0), 20)
    content = {name: {"acc": 0.0, "arch": arch.code} for name, arch in archs.items()}
    codes = [arch.code for arch in archs.values()]
    monkeypatch.setattr(architecture_file, "MAX_ENTRIES", 20)
    for text in (json.dumps(content), json.dumps(codes), ",".join(codes)):
        (tmp_path / "archs").write_text(text)
        assert len(read_architectures(tmp_path / "archs")) == 20


def test_a_full_disk_is_noticed_before_decoding(tmp_path):
    """A write to a mapping of space that is not there would be SIGBUS."""
    images = scan_images(write_folder(tmp_path, ["cat/0.png"]), "train")

    def full(descriptor, start, size):
        assert (start, size) == (0, 3 * 8 * 8)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        patch.setattr(DecodedImages, "_decode", None)
        with pytest.raises(
            UserError, match="cannot reserve .* No space left on device; .*cache_gb"
        ):
            DecodedImages(images, np.arange(1), 8, 0.0, tmp_path / "save")
    assert list((tmp_path / "save").iterdir()) == []
    DecodedImages(images, np.arange(1), 8, 0.0, tmp_path / "save")


# --- placeholders


@pytest.mark.parametrize(("equal", "said"), [(0, False), (10, False), (11, True), (39, True)])
def test_many_equal_accuracies_are_mentioned(equal, said):
    values = np.linspace(0.1, 0.9, 40)
    values[:equal] = 0.0
    matched = Matched([], values, np.linspace(50, 70, 40), [], [])
    found = [note for note in notes_on_ranking(matched) if "placeholders" in note]
    assert found == [f"{equal} of 40 predictions are 0: placeholders? Among them nothing is ranked."
                     for _ in range(said)]  # fmt: skip
