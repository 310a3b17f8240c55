"""python -m hnas.tools.export: what it writes is what was scored, and runs without this project."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import independent
import numpy as np
import paddle
import pytest
from entry_scripts import noise_images, run
from PIL import Image

import train_supernet
from hnas.base.errors import UserError
from hnas.base.files import digest_path, file_digest
from hnas.dataset.image_folder import decode_image
from hnas.dataset.transforms import EvalTransform
from hnas.evaluation.counts import Counts
from hnas.exporting import formats as exporting
from hnas.exporting import predict
from hnas.models.elastic import ElasticResNet, freeze_statistics
from hnas.search_space import RESNET48_MINI, Architecture
from hnas.tools.digits_folder import write_digits
from hnas.tools.export import main
from hnas.weights.loading import load_supernet, read_checkpoint, write_state

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "checkpoint_files/demo_stage2.pdparams"
SIZE, IMAGES = 32, 120
# Runs a program of an export and says what it had to import.
CLEAN = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
onnx_is_there = all(map(exporting.importlib.util.find_spec, ("paddle2onnx", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not onnx_is_there, reason="needs pip install -e '.[onnx]'")
int8_is_there = onnx_is_there and exporting.importlib.util.find_spec("ml_dtypes")
needs_int8 = pytest.mark.skipif(not int8_is_there, reason="needs pip install -e '.[onnx]'")


def weights_of(path, freeze_bn, classes, arch=None):
    """The demo's supernet, or a network of it, as weights that say how they were trained."""
    supernet = load_supernet(DEMO)
    network = supernet if arch is None else supernet.extract(arch, paddle.zeros([2, 3, 32, 32]))
    about = {"backbone": "resnet48_mini", "freeze_bn": freeze_bn, "classes": list(classes)}
    write_state(path, network.state_dict(), {**about, **({"arch": arch.code} if arch else {})})
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """All digits to train with, twelve a class to validate."""
    root = tmp_path_factory.mktemp("digits")
    write_digits(root)
    for folder in (root / "val").iterdir():
        for path in sorted(folder.iterdir())[IMAGES // 10 :]:
            path.unlink()
    return root


@pytest.fixture(scope="module")
def scored(digits, tmp_path_factory):
    """Gives three networks scored by stage 3, at frozen statistics or not, once each:
    checkpoint and submission."""

    @cache
    def score(freeze_bn):
        root = tmp_path_factory.mktemp("scored")
        path = weights_of(root / "supernet.pdparams", freeze_bn, "0123456789")
        space, rng = RESNET48_MINI, np.random.default_rng(3)
        codes = [space.sample(rng).code for _ in range(3)]
        (root / "codes.json").write_text(json.dumps([codes[0][1:], *codes[1:]]))
        flags = {"backbone": "resnet48_mini", "ckpt_dir": path, "seed": 5}
        with pytest.MonkeyPatch.context() as patch:
            flags["modelarch_file"] = root / "codes.json"
            run(train_supernet, patch, digits, root / "stage3", **flags)
        return path, root / "stage3/submission.json"

    return score


def export(images, path, save_dir, **flags):
    line = f"--backbone resnet48_mini --image_size {SIZE} --num_workers 0 --device cpu"
    flags = {"image_dir": images, "ckpt_dir": path, "save_dir": save_dir, **flags}
    main([*line.split(), *(f"--{name}={value}" for name, value in flags.items())])
    return json.loads((Path(save_dir) / "card.json").read_text())


def in_a_clean_process(folder, images):
    """What a folder's program says of images, and what it imported."""
    command = [sys.executable, "-I", "-W", "ignore", "-c", CLEAN, folder / "predict.py", *images]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300, check=True)
    *lines, modules = done.stdout.strip().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if line.startswith("/")), json.loads(modules)


@pytest.mark.parametrize(
    ("frozen", "form"),
    [
        *((True, "pdparams"), (False, "pdparams"), (False, "inference")),
        pytest.param(False, "onnx", marks=needs_onnx),
    ],
)
def test_an_export_scores_what_stage_3_said(digits, scored, tmp_path, caplog, frozen, form):
    path, submission = scored(frozen)
    entries = json.loads(submission.read_text())
    name = list(entries)[list(exporting.FILES).index(form)]
    folder = tmp_path / "out"
    # As it was written, in percent and rounded, or rounded.
    written = {"inference": lambda acc: round(100 * acc, 2), "onnx": lambda acc: round(acc, 4)}
    said = written.get(form, float)
    told = {own: {**entry, "acc": said(entry["acc"])} for own, entry in entries.items()}
    (tmp_path / "told.json").write_text(json.dumps(told))
    flags = {"arch": name, "modelarch_file": tmp_path / "told.json", "seed": 5, "format": form}
    with caplog.at_level("INFO"):
        card = export(digits, path, folder, **flags)
    hits = round(entries[name]["acc"] * IMAGES)
    # These weights were not trained at frozen statistics: at the running ones little is left.
    assert (hits > IMAGES // 2) is not frozen
    accuracy = card["accuracy"]
    assert accuracy["hits"] == accuracy["hits_of_source"] == hits
    assert accuracy["images"] == IMAGES and accuracy["top1"] == entries[name]["acc"]
    assert accuracy["largest_logit_difference"] < 1e-3
    assert f"{name}: {hits} of {IMAGES} hits, as the scores say" in caplog.text
    assert f"source {hits}, exported network {hits} top-1 hits of {IMAGES} images" in caplog.text

    arch = Architecture.from_code(entries[name]["arch"])
    assert card["arch"] == entries[name]["arch"] and card["name"] == name
    assert card["macs"] == RESNET48_MINI.macs(arch, SIZE, 10)
    assert card["params"] == RESNET48_MINI.params(arch, 10)
    assert card["identity"]["checkpoint"] == file_digest(path)
    assert set(card["files"]) == set(exporting.FILES[form])
    for file, digest in card["files"].items():
        assert file_digest(folder / file) == digest
        assert digest_path(folder / file).read_text().split() == [digest, file]

    if form == "onnx":
        takes_any_batch(folder / "network.onnx")
    assert (folder / "predict.py").read_text() == Path(predict.__file__).read_text()
    if frozen:
        return
    # To the hit, by a program that knows nothing of this project.
    paths = sorted((digits / "val").glob("*/*.png"))
    said, modules = in_a_clean_process(folder, paths)
    assert len(said) == IMAGES and "hnas" not in modules
    assert sum(said[str(path)] == path.parent.name for path in paths) == hits
    unwanted = {"paddle"} if form == "onnx" else {"onnxruntime"}
    assert not unwanted & set(modules)


@needs_int8
def test_int8_says_what_it_costs_and_predicts_what_its_card_says(digits, scored, tmp_path, caplog):
    path, submission = scored(False)
    name, entry = next(iter(json.loads(submission.read_text()).items()))
    flags = {"arch": entry["arch"], "seed": 5, "format": "onnx", "quantize_images": 40}
    with caplog.at_level("INFO"):
        card = export(digits, path, tmp_path / "int8", quantize="int8", **flags)
    accuracy = card["accuracy"]
    before, after = accuracy["hits_of_source"], accuracy["hits"]
    assert before == round(entry["acc"] * IMAGES) and abs(after - before) <= 5
    shown = [f"{100 * hits / IMAGES:.2f} %" for hits in (before, after)]
    assert f"float32 {shown[0]}, int8 {shown[1]} top-1 of {IMAGES} images" in caplog.text
    assert ("int8 loses" in caplog.text) == (before - after > IMAGES / 100)
    assert (tmp_path / "int8/network.onnx").stat().st_size < 1.6 * card["params"]  # bytes
    takes_any_batch(tmp_path / "int8/network.onnx")
    paths = sorted((digits / "val").glob("*/*.png"))
    said, modules = in_a_clean_process(tmp_path / "int8", paths)
    assert sum(said[str(path)] == path.parent.name for path in paths) == after
    assert "onnxruntime" in modules and "hnas" not in modules
    # The same again has the same scales, and the folder keeps its precision.
    again = export(digits, path, tmp_path / "int8", quantize="int8", **flags)
    assert {**again, "files": card["files"]} == card
    with pytest.raises(UserError, match="precision int8 instead of float32; choose another"):
        export(digits, path, tmp_path / "int8", **flags)


def test_programs_prepare_images_as_scoring_does(exported, tmp_path):
    how = json.loads((exported / "card.json").read_text())["preprocessing"]
    rng = np.random.default_rng(0)
    sizes = (37, 37, 3), (100, 53, 4), (53, 101, 3), (38, 37, 2), (224, 41, 3), (8, 8, 4)
    for width, height, bands in sizes:  # two and four have transparency
        pixels = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
        path = tmp_path / "image.png"
        Image.fromarray(pixels).save(path)
        expected = independent.normalized(EvalTransform(SIZE)(decode_image(path))[np.newaxis])
        np.testing.assert_array_equal(predict.prepare(path, how), expected)


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """A network on its own, as weights."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(small / "images", small / "own.pdparams", folder, eval_images=1)
    return folder


def predicted(capsys, folder, *line):
    """Exit code, and lines of stdout and of stderr, of a folder's program."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["predict.py", *map(str, line)])
        runpy.run_path(str(folder / "predict.py"), run_name="__main__")
    out, errors = capsys.readouterr()
    return ended.value.code, out.splitlines(), errors.splitlines()


def test_predictions_of_files_and_folders(exported, small, capsys):
    val = small / "images/val"
    paths = [str(val / name / "0.png") for name in "0123456789"]
    code, lines, errors = predicted(capsys, exported, paths[3], val)
    assert (code, errors) == (0, [])
    classes = dict(line.split() for line in lines)
    assert list(classes) == [paths[3], *paths[:3], *paths[4:]] and len(lines) == 11
    _, top, _ = predicted(capsys, exported, paths[3], "--top", 2)
    assert re.fullmatch(rf"{paths[3]} {classes[paths[3]]} \d+\.\d\d%, \d \d+\.\d\d%", top[0])
    code, lines, _ = predicted(capsys, exported, val, "--top=99", "--json")
    assert code == 0
    for path, line in zip(paths, lines, strict=True):
        told = json.loads(line)
        shares = {each["class"]: each["probability"] for each in told["classes"]}
        assert told["image"] == path and next(iter(shares)) == classes[path]
        assert sorted(shares.values(), reverse=True) == list(shares.values())
        assert set(shares) == {*"0123456789"} and sum(shares.values()) == pytest.approx(1)
    code, lines, _ = predicted(capsys, exported, "--help")
    assert code == 0 and "Classify images by the network beside this file." in lines
    code, lines, errors = predicted(capsys, exported, val, "--top", 0)
    assert code == 2 and not lines and "--top: 1 or more" in errors[-1]


def test_bad_images_cost_a_line_each(exported, small, tmp_path, capsys):
    good = small / "images/val/7/0.png"
    content = good.read_bytes()
    files = {"empty.png": b"", "half.png": content[: len(content) // 2], "text.png": b"text"}
    files |= {"script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
    for name, part in files.items():
        (tmp_path / name).write_bytes(part)
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "grey.png")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("L", (1, 60_000)).save(tmp_path / "thread.png")
    names = (*files, "grey.png", "folder", "pipe.png", "none.png", "thread.png")
    bad = [str(tmp_path / name) for name in names]
    code, lines, errors = predicted(capsys, exported, good, *bad, good)
    assert code == 2 and len(lines) == 2 and lines[0] == lines[1]
    assert [line.partition(": ")[0] for line in errors] == bad
    assert all(len(line) < 500 for line in errors)
    (tmp_path / "folder/notes.txt").write_text("no image")
    (tmp_path / "folder/.hidden.png").write_bytes(b"")
    for name in ("e.PNG", os.fsdecode(b"\xe9.png")):  # the latter cannot be written as it is
        (tmp_path / "folder" / name).write_bytes(content)
    (tmp_path / "folder/.checkpoints").mkdir()
    shutil.copy(good, tmp_path / "folder/.checkpoints")
    for link, target in (("linked", small / "images/val/7"), ("folder/loop", tmp_path / "folder")):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "folder/again").symlink_to(tmp_path / "linked")  # each folder once
    (tmp_path / "folder/linked").symlink_to(tmp_path / "linked")
    code, lines, errors = predicted(capsys, exported, tmp_path / "folder")
    assert code == 0 and len(lines) == 3 and not errors
    with pytest.MonkeyPatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        code, _, errors = predicted(capsys, exported, good)
    assert (code, errors) == (2, ["cannot write the output: [Errno 28] No space left on device"])


def changed(name, old, new):
    """Damage to a file of a folder."""

    def damage(folder):
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new, 1))

    return damage


DAMAGES = {
    "a flipped bit": (changed("network.pdparams", b"blocks.3", b"blocks.2"), "network.pdparams is"),
    "no network": (lambda folder: (folder / "network.pdparams").unlink(), "No such file"),
    "no card": (lambda folder: (folder / "card.json").unlink(), "No such file"),
    "half a card": (changed("card.json", b'"arch":', b""), "Expecting"),
    "NaN": (changed("card.json", b"0.485", b"NaN"), "mean or std in card.json is no number"),
    "zero": (changed("card.json", b"0.229", b"0.0"), "mean or std in card.json is no number"),
    "words": (changed("card.json", b"0.229", b'"wide"'), "could not convert"),
    "no files": (changed("card.json", b'"files"', b'"shelves"'), "'files'"),
    "no format": (changed("card.json", b'"pdparams"', b'"tar"'), "'tar'"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_export_predicts_nothing(case, exported, small, tmp_path, capsys):
    damage, words = DAMAGES[case]
    folder = shutil.copytree(exported, tmp_path / "copy")
    damage(folder)
    code, lines, errors = predicted(capsys, folder, small / "images/val/7/0.png")
    assert (code, lines) == (2, []) and len(errors) == 1
    assert words in errors[0] and f"the network in {folder}, export it again: " in errors[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_no_prediction(value, exported, small):
    logits, image = np.float32([[0.0] * 9 + [value]]), small / "images/val/7/0.png"
    with pytest.raises(ValueError, match="logits that are not finite"):
        predict.classify(lambda _: logits, predict.read_card(exported), image, 1)


def takes_any_batch(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    ((taken,), (given,)) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape, taken.type) == ("image", ["N", 3, SIZE, SIZE], "tensor(float)")
    assert (given.name, given.shape, given.type) == ("logits", ["N", 10], "tensor(float)")
    x = np.random.default_rng(0).normal(size=(3, 3, SIZE, SIZE)).astype("float32")
    together = session.run(None, {"image": x})[0]
    apart = np.concatenate([session.run(None, {"image": x[i : i + 1]})[0] for i in range(3)])
    np.testing.assert_allclose(together, apart, atol=1e-4)


def test_a_network_that_was_trained_alone(digits, tmp_path):
    arch = RESNET48_MINI.sample(np.random.default_rng(1))
    own = weights_of(tmp_path / "own.pdparams", False, "0123456789", arch)
    card = export(digits, own, tmp_path / "out", eval_images=20)
    assert card["arch"] == arch.code and card["statistics"] == "its own"
    assert card["accuracy"]["largest_logit_difference"] < 1e-4
    weights = [read_checkpoint(path).weights for path in (own, tmp_path / "out/network.pdparams")]
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name])
    about = read_checkpoint(tmp_path / "out/network.pdparams").about
    assert about["arch"] == arch.code and about["backbone"] == "resnet48_mini"
    # Once more is the same again; anything else stays out of the folder.
    again = export(digits, own, tmp_path / "out", eval_images=20)
    assert {**again, "files": card["files"]} == card
    with pytest.raises(UserError, match="card.json is of other .*: seed 0 instead of 1; choose an"):
        export(digits, own, tmp_path / "out", seed=1)
    # What is damaged is noticed when it is loaded.
    shutil.copy(DEMO, tmp_path / "out/network.pdparams")
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(tmp_path / "out/network.pdparams")
    with pytest.raises(UserError, match="is of no supernet that is known here"):
        load_supernet(own)


def test_extract_with_calibration_has_the_statistics_of_these_images():
    supernet = load_supernet(DEMO)
    arch = RESNET48_MINI.sample(np.random.default_rng(2))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 3, SIZE, SIZE), dtype=np.uint8)
    before = {name: value.numpy() for name, value in supernet.state_dict().items()}
    network = supernet.extract(arch, paddle.to_tensor(pixels))
    x = independent.normalized(pixels)
    with paddle.no_grad():
        expected = independent.forward(
            supernet.state_dict(), arch.code, paddle.to_tensor(x), (20, 32, 64, 128), 1, True
        )
        found = network(paddle.to_tensor(x))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-4)
    for name, value in supernet.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])
    assert not network.training


def test_extract_warns_where_statistics_are_a_mixture(tmp_path, caplog):
    """Of weights that were trained at batch statistics, unless it is given images."""
    space, images = RESNET48_MINI, paddle.zeros([2, 3, SIZE, SIZE], "uint8")
    arch = space.smallest()

    def warned(network, *calibration):
        caplog.clear()
        network.extract(arch, *calibration)
        return "mixture" in caplog.text

    assert not warned(load_supernet(weights_of(tmp_path / "frozen.pdparams", True, "0123456789")))
    supernet = load_supernet(DEMO)  # does not say how it was trained
    assert warned(supernet) and not warned(supernet, images)
    # And of one that is trained here, as soon as a smaller network is.
    x = paddle.rand([2, 3, SIZE, SIZE])
    for frozen in (True, False):
        supernet = ElasticResNet(space, 10)
        if frozen:
            freeze_statistics(supernet)
        supernet(x)
        supernet.activate(arch)
        supernet.eval()
        supernet(x)
        assert not warned(supernet)
        supernet.train()
        supernet(x)
        assert warned(supernet) is not frozen


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Ten noise images a split, a supernet, a network of its own and a file of names."""
    root = tmp_path_factory.mktemp("small")
    noise_images(root / "images", 1)
    arch = RESNET48_MINI.smallest()
    weights_of(root / "supernet.pdparams", True, "0123456789")
    weights_of(root / "own.pdparams", False, "0123456789", arch)
    weights_of(root / "letters.pdparams", True, "abcdefghij")
    broken = read_checkpoint(root / "supernet.pdparams")
    # Finite; within the network it gives NaN, which ReLU hides.
    broken.weights["blocks.5.conv1.weight"][1] = -3e38 * (-1.0) ** np.arange(9).reshape(3, 3)
    write_state(root / "broken.pdparams", broken.weights, broken.about)
    largest = RESNET48_MINI.largest().code
    entries = {"big": {"acc": 0.0, "arch": largest}, "other": {"acc": 0.9, "arch": arch.code}}
    (root / "names.json").write_text(json.dumps(entries))
    (root / "taken").mkdir()
    (root / "taken/card.json").write_text('{"identity": [3]}')
    return root


SMALLEST, LARGEST = RESNET48_MINI.smallest().code, RESNET48_MINI.largest().code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--arch is missing"),
        ({"arch": "big"}, "--arch big is no code; to give a name, give --modelarch_file"),
        ({"arch": "bug", "modelarch_file": "names.json"}, "names.json; did you mean big?"),
        ({"arch": LARGEST, "ckpt_dir": "own.pdparams"}, "is the network 12222.*; give its own"),
        (
            {"ckpt_dir": "own.pdparams", "bn_calibration_images": 5},
            "is no supernet: its statistics are its own; leave the flag out",
        ),
        ({"arch": SMALLEST, "ckpt_dir": "letters.pdparams"}, "trained on other classes: 'a'"),
        ({"arch": LARGEST, "ckpt_dir": "broken.pdparams"}, "source gives .* before blocks.5.relu"),
        (
            {"arch": LARGEST, "ckpt_dir": "broken.pdparams", "bn_calibration_images": 5},
            "blocks.5.bn1 has variances that are not finite",
        ),
        ({"arch": SMALLEST, "eval_images": 11}, "--eval_images 11, but .* has 10"),
        ({"arch": SMALLEST, "backbone": "resnet48pinasv2_mini"}, "is stage 1's"),
        ({"arch": SMALLEST, "save_dir": "taken"}, "taken/card.json is of other settings: arch"),
        ({"quantize": "int8"}, "--quantize int8 takes --format onnx, not pdparams"),
    ],
)
def test_wrong_input_is_one_line(small, tmp_path, flags, message):
    paths = ("ckpt_dir", "modelarch_file", "save_dir")
    flags = {"ckpt_dir": "supernet.pdparams", "save_dir": "out", **flags}
    flags = {n: small / v if n in paths and v else v for n, v in flags.items()}
    with pytest.raises(UserError, match=message) as caught:
        export(small / "images", flags.pop("ckpt_dir"), flags.pop("save_dir"), **flags)
    assert "\n" not in str(caught.value)
    assert not [*(small / "out").glob("[!.]*")]


def test_without_onnx_it_says_what_to_install(small, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    flags = {"format": "onnx", "quantize": "int8"}
    with pytest.raises(UserError) as caught:
        export(small / "images", small / "supernet.pdparams", small / "out", **flags)
    (line,) = str(caught.value).splitlines()
    command = re.search(r"run (\S+) -m pip install (.+)$", line)
    assert command[1] == sys.executable
    extra = re.search(r"^onnx = (\[.+\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert command[2].split() == [*(f"'{name}'" for name in json.loads(extra[1])), "'numpy<2'"]


def test_scores_of_other_weights_are_noticed(small, tmp_path, caplog):
    flags = {"arch": SMALLEST[1:], "modelarch_file": small / "names.json"}  # found by its code
    export(small / "images", small / "supernet.pdparams", tmp_path, **flags)
    assert "the scores say 0.9000 for other, here it has" in caplog.text


@needs_int8
def test_int8_takes_as_many_images_as_there_are(small, tmp_path, caplog):
    flags = {"arch": SMALLEST, "format": "onnx", "quantize": "int8"}
    with caplog.at_level("INFO"):
        export(small / "images", small / "supernet.pdparams", tmp_path, **flags)
    assert "--quantize_images 256, but only 10 images of " in caplog.text


@pytest.mark.parametrize("factor", [0.9, 1.02])
def test_an_export_that_differs_is_not_written(small, tmp_path, monkeypatch, factor):
    """Even with the same hits."""

    def distorted(*made):
        read = exporting.read_network(*made)
        return lambda x: factor * read(x)

    monkeypatch.setattr("hnas.tools.export.read_network", distorted)
    with pytest.raises(UserError, match="(.+) hits and its source .* apart: nothing was written"):
        export(small / "images", small / "own.pdparams", tmp_path / "out")
    assert not [*(tmp_path / "out").glob("[!.]*")]


def test_other_hits_of_like_logits_and_logits_that_are_no_numbers_are_not_written(caplog):
    counts = Counts.zeros(2)
    counts.top1[:], counts.top5[:], counts.near1[:], counts.images = [60, 57], 90, 2, 100
    found = exporting.Found(counts, difference=1e-3, largest=20.0)
    with pytest.raises(UserError, match="has 57 hits and its source 60"):
        exporting.check(found)
    counts.near1[:] = 3
    exporting.check(found)
    exporting.tell_loss(found)
    assert "int8 loses 3 of 60 hits: raise --quantize_images, or" in caplog.text
    batch = (paddle.zeros([4, 3, 8, 8], "uint8"), paddle.zeros([4], "int64"))
    logits = paddle.to_tensor([[1.0, float("nan")]] * 4)
    with pytest.raises(UserError, match="the exported network gives logits .* for 4 of 4 images"):
        exporting.compare(lambda x: paddle.zeros([4, 2]), lambda x: logits, [batch])
