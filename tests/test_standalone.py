"""python -m hnas.tools.train_standalone: plain networks, their accuracies, kills and resuming."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import independent
import numpy as np
import paddle
import pytest
from entry_scripts import ROOT, noise_images
from PIL import Image

from hnas.base.errors import UserError
from hnas.base.files import read_json
from hnas.models.resnet import ResNet
from hnas.search_space import RESNET48_MINI, Architecture
from hnas.tools import rank_report
from hnas.tools.train_standalone import main
from hnas.utils.hapi_wrapper import DistillationModel, momentum_optimizer
from hnas.utils.SampleMethod import FixedSampler
from hnas.weights.loading import ABOUT

CLASSES, BATCH, EPOCHS, SEED = 10, 4, 2, 3
SMALL = "122223" + "3313000000" + "2212000000" + "5414" + "0" * 12 + "6727000000"
# 51 digits; stage 2 is narrower from its second block on, which the supernet refuses.
PROJECTED = "22221" + "1111000000" + "1113000000" + "1111" + "0" * 12 + "1111000000"
WIDE = "122221" + "1111000000" + "1111000000" + "1111" + "0" * 12 + "1111000000"
CODES = {"small": SMALL, "projected": PROJECTED, "wide": WIDE}


def flags(work, **changes):
    """A command line for a few images on the CPU; what is given twice counts the second time."""
    line = f"--backbone resnet48_mini --image_size 32 --batch_size {BATCH} --max_epoch {EPOCHS} "
    line += f"--lr 0.3 --warmup 1 --seed {SEED} --num_workers 0 --log_freq 1 --save_steps 1 "
    line += f"--device cpu --image_dir {work / 'images'}"
    values = {"modelarch_file": work / "codes.json", "save_dir": work / "undisturbed", **changes}
    return ["run", *line.split(), *(f"--{name}={value}" for name, value in values.items())]


def command(work, **changes):
    """The tool in a process of its own: only there equal bits are promised."""
    args = [sys.executable, "-um", "hnas.tools.train_standalone", *flags(work, **changes)]
    return {"args": args, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two images a class, three codes, and ``undisturbed/``, an uninterrupted run of them."""
    folder = tmp_path_factory.mktemp("standalone")
    noise_images(folder / "images", 2)
    entries = {name: {"acc": 0.0, "arch": code} for name, code in CODES.items()}
    (folder / "codes.json").write_text(json.dumps(entries))
    done = subprocess.run(**command(folder), timeout=120, check=True, stderr=subprocess.PIPE)
    assert "Warning" not in done.stderr, done.stderr
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def refusal(*arguments, **changes):
    with pytest.raises(UserError) as error:
        main(flags(*arguments, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def weights_path(folder, code):
    return folder / ("1" + code)[-52:] / "final.pdparams"


# --- what is trained


def test_a_step_follows_the_cross_entropy():
    arch = Architecture.from_code(PROJECTED)
    paddle.seed(1)
    network, other = (ResNet(RESNET48_MINI.plan(arch), CLASSES) for _ in range(2))
    other.set_state_dict({name: value.clone() for name, value in network.state_dict().items()})
    model = DistillationModel(network, None, FixedSampler(arch))
    model.prepare(momentum_optimizer(network, 0.05, 0.9, 1e-3))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 3, 32, 32), np.uint8), rng.integers(0, CLASSES, 8)
    logs = model.train_batch([paddle.to_tensor(images), paddle.to_tensor(labels)])

    other.train()
    logits = other(paddle.to_tensor(independent.normalized(images)))
    log_p = logits - paddle.logsumexp(logits, axis=1, keepdim=True)
    loss = -log_p[list(range(8)), labels.tolist()].mean()
    loss.backward()
    assert float(logs["loss"]) == pytest.approx(float(loss), rel=1e-4)
    assert float(logs["top1"]) == np.mean(logits.numpy().argmax(1) == labels)
    assert logs["arch"] == PROJECTED and [code for code, _ in logs["parts"]] == [PROJECTED]
    for found, weight in zip(network.parameters(), other.parameters(), strict=True):
        if not weight.stop_gradient:
            step = 0.05 * (weight.grad.numpy() + 1e-3 * weight.numpy())
            np.testing.assert_allclose(found, weight.numpy() - step, rtol=1e-3, atol=1e-4)


def test_accuracies_are_those_of_the_final_weights(work):
    # A plain network is trained, which need not be one of the supernet's.
    with pytest.raises(UserError, match="no projection"):
        RESNET48_MINI.shared_plan(Architecture.from_code(PROJECTED))
    images, labels = independent.validation_images(work / "images")
    found = results(work / "undisturbed")
    assert {name: entry["arch"] for name, entry in found.items()} == CODES
    assert list(found) == list(CODES)
    for name, code in CODES.items():
        network = ResNet(RESNET48_MINI.plan(Architecture.from_code(code)), CLASSES)
        state = paddle.load(str(weights_path(work / "undisturbed", code)))
        missing, unexpected = network.set_state_dict(state)
        # How they were trained is said in the same file.
        assert missing == [] and unexpected == [ABOUT]
        network.eval()
        logits = network(images).numpy()
        order = np.argsort(-logits, axis=1, kind="stable")
        entry = found[name]
        assert entry["images"] == len(labels) == 20
        assert entry["acc"] == (order[:, 0] == labels).mean()
        history = read_json(weights_path(work / "undisturbed", code).with_name("history.json"))
        assert len(history["validation"]) == EPOCHS
        assert history["validation"][-1]["top1"] == entry["acc"]
        assert entry["top5"] == (order[:, :5] == labels[:, None]).any(axis=1).mean()
        assert (entry["seed"], entry["epochs"]) == (SEED, EPOCHS)
        assert entry["params"] == sum(
            int(np.prod(p.shape)) for p in network.parameters() if not p.stop_gradient
        )
        left = {path.name for path in weights_path(work / "undisturbed", code).parent.iterdir()}
        assert left == {"final.pdparams", "final.pdparams.sha256", "history.json"}
    assert len({entry["loss"] for entry in found.values()}) == 3
    # Training began with the weights of the seed, and changed them.
    paddle.seed(SEED)
    fresh = ResNet(RESNET48_MINI.plan(Architecture.from_code(SMALL)), CLASSES).state_dict()
    final = paddle.load(str(weights_path(work / "undisturbed", SMALL)))
    name = "blocks.0.conv.weight"
    assert 0 < np.abs(final[name].numpy() - fresh[name].numpy()).max() < 1


def test_the_results_are_a_ground_truth(work, tmp_path, capsys):
    gt = work / "undisturbed/results.json"
    counts = ["--backbone", "resnet48_mini", "--image_size", "32", "--num_classes", "10"]
    arguments = ["--pred", "macs", "--gt", str(gt), "--out", str(tmp_path), "--resamples", "5"]
    rank_report.main([*arguments, *counts])
    assert json.loads(capsys.readouterr().out)["architectures"] == len(CODES)


# --- one or many, once or again


def test_one_architecture_alone_is_the_same(work, tmp_path):
    """So results do not depend on what was trained before, nor on the code's image digit, nor on
    what is measured meanwhile."""
    code = "1" + PROJECTED
    (tmp_path / code).mkdir()
    alone = command(work, arch=code, modelarch_file="", save_dir=tmp_path, eval_freq=0)
    done = subprocess.run(**alone, timeout=120, check=True, stderr=subprocess.PIPE)
    assert "nothing to resume" not in done.stderr
    expected = {**results(work / "undisturbed")["projected"], "arch": code}
    assert results(tmp_path) == {code: expected}
    one, other = (weights_path(folder, PROJECTED) for folder in (tmp_path, work / "undisturbed"))
    assert one.read_bytes() == other.read_bytes()


def test_what_is_finished_is_kept_also_under_other_names(work, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(work / "undisturbed", folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    content = (folder / "results.json").read_bytes()
    main(flags(work, save_dir=folder))
    assert (folder / "results.json").read_bytes() == content
    (tmp_path / "codes.txt").write_text(f"{WIDE[1:]}\n{SMALL}\n")
    main(flags(work, save_dir=folder, modelarch_file=tmp_path / "codes.txt"))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*")} == before
    before, after = results(work / "undisturbed"), results(folder)
    assert list(after) == ["arch1", "arch2", "projected"]
    assert after["arch1"] == {**before["wide"], "arch": WIDE[1:]}
    assert after["arch2"] == before["small"] and after["projected"] == before["projected"]


@pytest.mark.parametrize(
    ("number", "code", "step", "finished"),
    [(signal.SIGTERM, 143, 2, 1), (signal.SIGKILL, -9, 5, 2)],
)
def test_a_killed_run_that_is_continued_ends_in_the_same_bytes(
    work, tmp_path, number, code, step, finished
):
    """Stopped within the second architecture, or when the third's last step is just done."""
    line, last = f"epoch 2/2 step {step}/", [*CODES.values()][finished]
    process = subprocess.Popen(
        **command(work, save_dir=tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for printed in process.stdout:
        if line in printed and printed.rstrip().endswith(last):
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == code
    assert number == signal.SIGKILL or "; continue with the same command\n" in rest
    assert list(results(tmp_path)) == list(CODES)[:finished]

    done = subprocess.run(**command(work, save_dir=tmp_path), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    trained = re.findall(r"architecture \d of 3: (\w+)", done.stderr)
    assert trained == list(CODES)[finished:]
    expected = work / "undisturbed"
    for name in ("results.json", *(weights_path(Path(), code) for code in CODES.values())):
        assert (tmp_path / name).read_bytes() == (expected / name).read_bytes(), name


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": SMALL}, "either --arch CODE or --modelarch_file FILE"),
        ({"arch": "9" + SMALL[1:], "modelarch_file": ""}, "digit 1 (image size) is 9"),
        ({"seed": 4}, "undisturbed/results.json is of other settings: seed 3 instead of 4;"),
        ({"max_epoch": 3}, "other settings: max epoch 2 instead of 3; give the same as before"),
        ({"modelarch_file": "OTHER"}, "another architecture of the name 'wide'"),
    ],
)
def test_what_is_wrong_or_of_other_settings_is_refused(work, tmp_path, changes, message):
    (tmp_path / "OTHER").write_text(json.dumps({"wide": {"acc": 0, "arch": SMALL}}))
    changes = {name: tmp_path / v if v == "OTHER" else v for name, v in changes.items()}
    before = (work / "undisturbed/results.json").read_bytes()
    assert message in refusal(work, **changes)
    assert (work / "undisturbed/results.json").read_bytes() == before


def test_a_flag_that_is_new_was_off_before(work, tmp_path):
    folder = tmp_path / "before"
    shutil.copytree(work / "undisturbed", folder)
    settings = json.loads((folder / "run.json").read_text())
    assert settings.pop("deterministic") is False
    (folder / "run.json").write_text(json.dumps(settings))
    main(flags(work, save_dir=folder))
    message = refusal(work, save_dir=folder, deterministic=True)
    assert "other settings: deterministic False instead of True" in message


def test_results_of_other_images_are_not_mixed(work, tmp_path):
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        shutil.copytree(work / "images", tmp_path / "images")
        image, kind = tmp_path / "images" / split / "0/0.png", split.removeprefix("train")
        Image.new("RGB", (40, 40)).save(image)
        message = refusal(work, image_dir=tmp_path / "images")
        assert f"settings: {kind or 'image'} pixels " in message
        image.unlink()
        message = refusal(work, image_dir=tmp_path / "images")
        assert f"settings: {f'{kind} images'.strip()} " in message


def test_results_of_unknown_origin(work, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    assert "results.json is there without run.json" in refusal(work, save_dir=tmp_path)


EDITED = [{"acc": value, "top5": 0.5} for value in (5, 10**400, 0.123, 1.0)]
EDITED += [{"top5": None}, {"images": 10**30}, {"images": 0}]


@pytest.mark.parametrize("changes", EDITED)
def test_an_edited_result_is_not_taken_over(work, tmp_path, changes):
    folder = tmp_path / "edited"
    shutil.copytree(work / "undisturbed", folder)
    content = results(folder)
    content["wide"] |= changes
    (folder / "results.json").write_text(json.dumps(content))
    message = refusal(work, save_dir=folder)
    assert "results.json: entry 'wide' has acc" in message or "no number within" in message
    assert results(folder) == content
