"""Scores, states and caches that somebody broke, swapped or forged: each case is one line."""

import io
import os
import re
import struct
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import paddle
import pytest
from entry_scripts import CLASSES, noise_images
from independent import Images, counts_of, first_ones, images_for, supernet

from hnas.base.errors import UserError
from hnas.base.files import check_output, check_writable, remove_leftovers, replacing
from hnas.dataset.image_folder import list_hash, scan_images
from hnas.evaluation.counts import LogitsError, count_hits
from hnas.evaluation.engine import ScoringSettings, evaluate_shared
from hnas.evaluation.ledger import Ledger
from hnas.evaluation.reference import evaluate_network, evaluate_reference, network_logits
from hnas.evaluation.results import STATE_FILE
from hnas.evaluation.spot_check import spot_check
from hnas.evaluation.variants import Precision
from hnas.programs import runtime
from hnas.programs.options import Options
from hnas.search_space import RESNET48_MINI
from hnas.tools import draw_architectures, rank_report, train_standalone
from hnas.tools.digits_folder import main as digits_folder
from hnas.weights.loading import read_checkpoint, read_weights, write_state

NAN, INF = float("nan"), float("inf")
ARCHS = {f"n{i}": RESNET48_MINI.largest() for i in range(2)}


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- A. logits and weights that are not finite


@pytest.mark.parametrize("classes", [3, 12])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["the label's", "another", "all"])
def test_logits_that_are_not_finite_are_no_hits(classes, bad, where):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 6)
    logits = rng.normal(size=(2, 6, classes)).astype("float32")
    logits[:, np.arange(6), labels] += 10  # all are hits
    column = {"the label's": labels[2], "another": (labels[2] + 1) % classes, "all": slice(None)}
    logits[1, 2, column[where]] = bad
    found, bad_images = count_hits(paddle.to_tensor(logits), paddle.to_tensor(labels))
    assert np.transpose(found.columns()).tolist() == [[6, 6, 0, 0], [5, 5, 0, 0]]
    assert bad_images.tolist() == [0, 1]
    assert found.folds.tolist() == [[1] * 6 + [0] * 10, [1, 1, 0, 1, 1, 1] + [0] * 10]


@pytest.mark.parametrize("value", [0.0, 5e3, -5e3, 3e38])
def test_equal_logits_of_any_size_go_to_the_smallest_index(value):
    """Those of 3e38 add up to infinity, which is no reason to refuse them."""
    logits = paddle.full([1, 8, 8], value)
    found, bad = count_hits(logits, paddle.arange(8))
    assert np.concatenate(found.columns()).tolist() == [1, 5, 8, 8] and bad.tolist() == [0]


@pytest.fixture(scope="module")
def sound():
    """A supernet, and its state."""
    net = supernet(RESNET48_MINI)
    return net, {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.fixture
def net(sound):
    """One to break."""
    yield sound[0]
    sound[0].set_state_dict(sound[1])


def by_shared(net, archs, images, calibration, folder):
    named = {arch.code: arch for arch in archs}
    evaluate_shared(net, named, images, folder, {}, ScoringSettings(calibration))


ENGINES = {
    "shared": by_shared,
    "reference": lambda net, archs, images, calibration, _: evaluate_reference(
        net, archs, [images.batches], calibration
    ),
    "one network": lambda net, archs, images, calibration, _: evaluate_network(
        net, [images.batches], calibration
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_name_the_architecture_and_how_many_images(engine, net, tmp_path):
    archs = [RESNET48_MINI.smallest()]
    net.activate(archs[0])
    bias = net.head.fc.fn.bias
    bias.set_value(np.where(np.arange(10) == 3, np.float32(NAN), bias.numpy()))
    with pytest.raises(LogitsError) as error:
        ENGINES[engine](net, archs, Images(5, 10), None, tmp_path)
    text = one_line(error)
    assert "not finite for 5 of 5 images" in text
    assert engine == "one network" or archs[0].code in text


INSIDE = {  # of which tensor channel 1 becomes what, and what is named, re-calibrated or not
    "filters that add up to NaN": ("blocks.5.conv1.fn.weight", 3e38, "blocks.5.", "blocks.5.bn1"),
    "filters of the stem": ("blocks.0.conv.fn.weight", 3e38, "blocks.0.", "blocks.0.bn"),
    "a scale": ("blocks.5.bn1.weight", -3e38, "blocks.5.relu", "blocks.5.bn2"),
    "infinite variances": ("blocks.5.conv1.fn.weight", 1e20, None, "blocks.5.bn1 has variances"),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", INSIDE)
def test_what_is_not_finite_inside_is_refused(case, engine, calibrated, net, tmp_path):
    """In a block of the list's last, whose logits are finite: ReLU makes 0 of NaN."""
    name, value, *named = INSIDE[case]
    net.activate(RESNET48_MINI.largest())
    tensor = net.state_dict()[name]
    values = tensor.numpy()
    values[1] = value * (-1.0) ** np.indices(values.shape[1:]).sum(axis=0)
    tensor.set_value(values)
    archs = [RESNET48_MINI.smallest(), RESNET48_MINI.largest()]
    calibration = images_for(32, 24, seed=2)[0] if calibrated else None
    given = net, archs, Images(12, 10), calibration, tmp_path
    if not named[calibrated]:
        return ENGINES[engine](*given)  # every number is finite
    with pytest.raises(UserError, match=named[calibrated]) as error:
        ENGINES[engine](*given)
    return one_line(error)


@pytest.mark.parametrize(
    ("factor", "widened", "calibrated", "layer"),
    [  # of a convolution's filters, and whether BatchNorm's statistics are of such outputs
        (1e6, False, False, "blocks.1.relu"),
        (1e6, True, False, None),
        (1e6, True, True, "blocks.1.bn1"),
        (1, True, True, None),
    ],
)
def test_what_float16_does_not_hold_is_refused(factor, widened, calibrated, layer, net):
    images, labels = images_for(32, 5)
    block, arch = net.stage_blocks(0)[0], RESNET48_MINI.smallest()
    block.conv1.fn.weight.set_value(block.conv1.fn.weight * factor)
    if widened:
        block.bn1._mean.set_value(block.bn1._mean * factor)
        block.bn1._variance.set_value(block.bn1._variance * factor**2)
    net.activate(arch)
    calibration = images_for(32, 24, seed=2)[0] if calibrated else None
    logits = network_logits(net, images, calibration)
    counted = [hits for (hits,) in count_hits(logits.unsqueeze(0), labels)[0].columns()[:2]]
    given = net, ("n0", arch), (images, labels), calibration, logits, counted
    spot_check(*given, Precision.FLOAT32)
    refused = pytest.raises(LogitsError, match=f"before {layer} that .* 65504")
    with refused if layer else nullcontext():
        spot_check(*given, Precision.FLOAT16)


WEIGHTS = {  # what one value becomes, of which tensor: what is said
    "NaN": ("blocks.0.conv.weight", np.float32, NAN, "not finite"),
    "infinity": ("blocks.0.bn.bias", np.float32, -INF, "not finite"),
    "a float64 beyond float32": ("blocks.0.bn.weight", np.float64, 1e39, "not finite in float32"),
    "a float16's infinity": ("blocks.0.bn.weight", np.float16, INF, "not finite"),
    "a negative variance": ("blocks.0.bn._variance", np.float32, -1e-9, "negative variances"),
    "a variance of NaN": ("blocks.0.bn._variance", np.float32, NAN, "not finite"),
}


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_looked_at_when_they_are_read(case, suffix, tmp_path):
    name, dtype, value, words = WEIGHTS[case]
    array, path = np.ones(8, dtype), tmp_path / f"w{suffix}"
    array[3] = value
    write_state(path, {"blocks.0.bn._mean": -np.ones(8, np.float32), name: array})
    for read in (read_weights, read_checkpoint):
        with pytest.raises(UserError, match=words) as error:
            read(path)
        assert str(path) in one_line(error) and name in one_line(error)


# --- B. checks that one program had and another lacked


@pytest.fixture
def root(tmp_path, monkeypatch):
    """train/ and val/ of ten classes, an image each; and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return noise_images(tmp_path, 1)


@pytest.mark.parametrize("names", ["abcdefghij", "012345678x", "0123456789x"])
def test_stage_three_compares_vals_classes_with_trains(names, root):
    options = Options(image_dir=str(root), image_size=32, bn_calibration_images=2)
    assert runtime.calibration_images(options, False, classes=CLASSES).shape[0] == 2
    with pytest.raises(UserError, match="is in .* but not in") as error:
        runtime.calibration_images(options, False, classes=list(names))
    assert "class '" in one_line(error)


def test_train_standalone_refuses_several_processes(monkeypatch):
    monkeypatch.setattr(train_standalone, "world_size", lambda: 2, raising=False)
    with pytest.raises(UserError, match="train_standalone runs in one process"):
        train_standalone.main(["run", "--arch", RESNET48_MINI.largest().code])


PROGRAMS = {  # what writes, and how: a folder or a file below something that is no folder
    "stages": lambda path: runtime.start(Options(save_dir=str(path / "out"), device="cpu")),
    "curves": lambda path: runtime.start(
        Options(save_dir=str(path.parent / "fine"), visualdl_dir=str(path / "c"), device="cpu")
    ),
    "cache": lambda path: runtime.training_images(  # before the images are looked for
        Options(image_dir="none", use_tensor_dataset=True, cache_dir=str(path / "cache"))
    ),
    "digits_folder": lambda path: digits_folder(["--output", str(path / "digits")]),
    "draw_architectures": lambda path: draw_architectures.main(["--output", str(path / "a.json")]),
    "rank_report": lambda path: rank_report.main(
        ["--pred", "macs", "--gt", "none", "--out", str(path / "report")]
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_folders_that_cannot_be_written_are_noticed_first(program, tmp_path):
    (tmp_path / "file").write_text("")
    # Input that is missing is noticed later.
    with pytest.raises(UserError, match="cannot write to --") as error:
        PROGRAMS[program](tmp_path / "file")
    assert "choose another folder" in one_line(error)


def test_trying_a_folder_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new/folder", "--save_dir")
    check_output(tmp_path / "new/file", "--output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    check_writable(tmp_path / "new", "--save_dir")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
    with pytest.raises(UserError, match="--output .* is a folder"):
        check_output(tmp_path / "new", "--output")


# --- C. states and chunks of an evaluation

IDENTITY = {"checkpoint": "c" * 64, "image_list": "i" * 64}
FOUR = ("top1", "top5", "near1", "near5")


def arrays(start=0, images=10, **changes) -> dict[str, np.ndarray]:
    """What a state of 10 of 23 images holds, or with other numbers another file."""
    columns = {name: np.array([images // 2, images]) for name in ("top1", "top5")}
    columns |= {name: np.zeros(2, np.int64) for name in ("near1", "near5")}
    columns |= {"folds": counts_of(first_ones(columns["top1"], images)).folds}
    numbers = {"start": np.array(start), "chunk": np.array(5), "images": np.array(images)}
    whose = {f"identity_{name}": np.array(value) for name, value in IDENTITY.items()}
    content = {**numbers, **columns, **whose, **changes}
    return {name: value for name, value in content.items() if value is not None}


def as_npz(content, save=np.savez) -> bytes:
    file = io.BytesIO()
    save(file, **content)
    return file.getvalue()


def member(name: str, header: str, content: bytes = b"") -> bytes:
    """An .npz of one array with a header of one's own, besides a whole state."""
    text = header.ljust(118 - 1) + "\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + content
    file = io.BytesIO(as_npz(arrays(**{name: None})))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{name}.npy", array)
    return file.getvalue()


def patched(content: bytes, offset: int, value: int) -> bytes:
    """The content with a 16-bit field of all entries of the central directory replaced."""
    found = bytearray(content)
    for match in re.finditer(b"PK\x01\x02", content):
        found[match.start() + offset : match.start() + offset + 2] = struct.pack("<H", value)
    return bytes(found)


def two_start(content: bytes) -> bytes:
    file = io.BytesIO(content)
    with pytest.warns(UserWarning), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("top1.npy", archive.read("top5.npy"))
    return file.getvalue()


GOOD_FOLDS = arrays()["folds"]
GOOD, CHUNK = as_npz(arrays()), as_npz(arrays(10, 5))
BOMB = as_npz(arrays(top1=np.zeros(12_500_000, int)), np.savez_compressed)  # 100 MB in 100 kB
HUGE = "{'descr': '<i8', 'fortran_order': False, 'shape': (1125899906842624,), }"
OBJECTS = "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"
STATES = {  # name of the file, content, words of the error
    "of an earlier version": (STATE_FILE, arrays(folds=None), "'folds' is missing"),
    "folds above their images": (
        STATE_FILE, arrays(folds=np.eye(2, 16, dtype=np.int64) * [[5], [10]]), "above its images"),
    "negative folds": (
        STATE_FILE, arrays(folds=GOOD_FOLDS + np.eye(2, 16, 1, dtype=np.int64) * -9), "below 0"),
    "folds of other hits": (STATE_FILE, arrays(folds=GOOD_FOLDS[::-1]), "do not add up"),
    "fewer folds": (STATE_FILE, arrays(folds=GOOD_FOLDS[:, :8]), "wrong shapes"),
    "hits above the images": (STATE_FILE, arrays(top1=np.array([5, 11])), "above the 10 images"),
    "near ties above the images": (STATE_FILE, arrays(near5=np.array([0, 11])), "above the 10"),
    "negative hits": (STATE_FILE, arrays(top1=np.array([5, -1])), "below 0"),
    "more top-1 than top-5": (STATE_FILE, arrays(top5=np.array([4, 9])), "more top-1"),
    "floats": (STATE_FILE, arrays(top1=np.array([5.0, 5.0])), "not int64"),
    "text": (STATE_FILE, arrays() | {"images": np.array("ten")}, "not int64"),
    "one architecture more": (
        STATE_FILE,
        arrays(**dict.fromkeys(FOUR, np.zeros(3, np.int64)), folds=np.zeros((3, 16), np.int64)),
        "3 architectures, not 2"),
    "columns of two lengths": (STATE_FILE, arrays(top1=np.zeros(3, np.int64)), "wrong shapes"),
    "a table": (STATE_FILE, arrays(**dict.fromkeys(FOUR, np.zeros((2, 1), np.int64))), "shapes"),
    "a list of chunks": (STATE_FILE, arrays(chunk=np.array([5])), "wrong shapes"),
    "folds without axes": (STATE_FILE, arrays(folds=np.array(5)), "wrong shapes"),
    "a chunk of nothing": (STATE_FILE, arrays(chunk=np.array(0)), "chunk 0"),
    "chunks of -5": (STATE_FILE, arrays(chunk=np.array(-5)), "chunk -5"),
    "images that overflow": (STATE_FILE, arrays() | {"images": np.array(2**63 - 1)}, "images 9223"),
    "a chunk beyond all": (STATE_FILE, arrays(chunk=np.array(2**62)), "chunk 46116"),
    "no images": (STATE_FILE, arrays(images=0), "images 0"),
    "images beyond the set": (STATE_FILE, arrays(images=25), "which it cannot of 23"),
    "half a chunk": (STATE_FILE, arrays(images=7), "which it cannot of 23"),
    "a start": (STATE_FILE, arrays(start=5), "copied or renamed"),
    "a missing array": (STATE_FILE, arrays(near1=None), "'near1' is missing"),
    "a missing identity": (STATE_FILE, arrays(identity_checkpoint=None), "is missing"),
    "another checkpoint": (
        STATE_FILE, arrays(identity_checkpoint=np.array("d" * 64)), "settings: checkpoint dddd"),
    "one array more": (STATE_FILE, arrays(more=np.zeros(2)), "unknown arrays"),
    "an array twice": (STATE_FILE, two_start, "an array twice"),
    "a copy of a chunk": ("eval_chunk_backup.npz", CHUNK, "copied or renamed"),
    "a chunk in nine digits": ("eval_chunk_000000010.npz", CHUNK, "copied or renamed"),
    "a chunk elsewhere": ("eval_chunk_00000015.npz", CHUNK, "copied or renamed"),
    "a chunk as state": (STATE_FILE, CHUNK, "copied or renamed"),
    "a state as chunk": ("eval_chunk_00000000.npz", GOOD, "copied or renamed"),
    "a state as later chunk": ("eval_chunk_00000010.npz", GOOD, "copied or renamed"),
    "a chunk between two": ("eval_chunk_00000012.npz", arrays(12, 5), "copied or renamed"),
    "a chunk beyond the set": ("eval_chunk_00000025.npz", arrays(25, 5), "which it cannot of 23"),
    "a chunk over the end": ("eval_chunk_00000020.npz", arrays(20, 5), "which it cannot of 23"),
    "a short chunk": ("eval_chunk_00000010.npz", arrays(10, 3), "copied or renamed"),
    "encrypted": (STATE_FILE, lambda good: patched(good, 8, 1), "encrypted"),
    "a compression that is unknown": (STATE_FILE, lambda good: patched(good, 10, 99), "compressed"),
    "2**50 elements": (STATE_FILE, member("top1", HUGE, bytes(16)), "is broken"),
    "objects": (STATE_FILE, member("top1", OBJECTS, bytes(16)), "is broken"),
    "a bomb": (STATE_FILE, BOMB, "is broken"),
    "no archive": (STATE_FILE, b"nonsense", "is broken"),
    "nothing": (STATE_FILE, b"", "is broken"),
    "half a file": (STATE_FILE, GOOD[: len(GOOD) // 2], "is broken"),
    "a flipped bit": (
        STATE_FILE, lambda good: good.replace(b"c\0\0\0", b"d\0\0\0", 1), "is broken"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_states_and_chunks_are_not_believed(case, tmp_path):
    name, content, words = STATES[case]
    content = as_npz(content) if isinstance(content, dict) else content
    content = content(GOOD) if callable(content) else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        Ledger(tmp_path, IDENTITY, ARCHS, 23)
    assert str(tmp_path / name) in one_line(error)


def test_what_the_table_starts_from_is_believed(tmp_path):
    (tmp_path / STATE_FILE).write_bytes(GOOD)
    for start, number in ((10, 5), (20, 3)):
        content = as_npz(arrays(start, number))
        (tmp_path / f"eval_chunk_{start:08d}.npz").write_bytes(content)
    ledger = Ledger(tmp_path, IDENTITY, ARCHS, 23)
    ledger.begin(7)
    assert (ledger.chunk, ledger.counts.images) == (5, 15)
    assert list(ledger.chunks()) == [range(15, 20)]


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        (lambda path: None, False),
        (lambda path: os.utime(path, (1_600_000_000, 1_600_000_000)), True),
        (lambda path: path.write_bytes(path.read_bytes()), True),
        (lambda path: path.rename(path.with_name("7.png")), True),
    ],
)
def test_an_image_that_was_replaced_is_another(change, is_another, root):
    before = list_hash(scan_images(root, "val"), np.arange(10), 32)
    change(root / "val/0/0.png")
    found = scan_images(root, "val")
    assert (list_hash(found, np.arange(10), 32) != before) == is_another


# --- D. temporary files


WRITER = """
import os, sys, time
from hnas.base.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_bytes(b"part")
    print(temporary.name, flush=True)
    time.sleep(60)
"""


def test_leftovers_go_and_files_of_living_writers_stay(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.pixels")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as writer:
        name = writer.stdout.readline().strip()
        (tmp_path / f".old.pixels.4711-{'a' * 16}.tmp").write_bytes(b"of a killed one")
        (tmp_path / ".mine.tmp").write_bytes(b"of somebody else")
        remove_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([".mine.tmp", name])
        writer.kill()
        writer.wait()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".mine.tmp"]


def test_temporary_names_are_unique_whatever_the_process_number(tmp_path, monkeypatch):
    """Two containers that share a cache may both be process 7."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert (tmp_path / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["a"]
