"""The launchers in order, on a few real digits; and what they say to wrong input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from hnas.bench import chaos
from hnas.bench.speed_training_worker import calm
from hnas.dataset.image_folder import scan_images
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI, Architecture
from hnas.tools.digits_folder import write_digits
from hnas.utils.weights import read_weights

ROOT = Path(__file__).resolve().parent.parent
STAGE1 = "local_train_pinas1_wholenet.sh"
STAGE2 = "local_train_pinas2_simple_wholenet_nof.sh"
STAGE3 = "local_eval.sh"


def launch(script, **variables):
    # Not the caller's variables: one of them may be a launcher's.
    inherited = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "XDG_CACHE_HOME")
    environment = {
        **{name: os.environ[name] for name in inherited if name in os.environ},
        "python": sys.executable,
        "PYTHONWARNINGS": "ignore",
        **{name: str(value) for name, value in variables.items()},
    }
    return subprocess.run(
        ["sh", str(ROOT / script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All three stages on 8 training and 3 validation images a class."""
    root = tmp_path_factory.mktemp("run")
    write_digits(root / "all")
    for split, number in (("train", 8), ("val", 3)):
        for label in range(10):
            target = root / "data" / split / str(label)
            target.mkdir(parents=True)
            for path in sorted((root / "all" / split / str(label)).iterdir())[:number]:
                shutil.copy(path, target)
    paddle.seed(0)
    network = build_network("resnet48_mini", 10, elastic=False)
    calm(network)
    chaos.measure_statistics(network, root / "data", image_size=32)
    paddle.save(network.state_dict(), str(root / "pretrained.pdparams"))
    rng = np.random.default_rng(0)
    archs = [RESNET48_MINI.largest(), *(RESNET48_MINI.sample(rng) for _ in range(4))]
    codes = [arch.code for arch in archs]
    codes[1] = codes[1][1:]  # 51 digits must come back as 51
    (root / "codes.json").write_text(
        json.dumps({f"net{i}": {"acc": 0.0, "arch": code} for i, code in enumerate(codes)})
    )
    common = {
        "image_dir": root / "data",
        "pretrained": root / "pretrained.pdparams",
        "image_size": 32,
        "batch_size": 16,
        "num_workers": 0,
        "log_freq": 1,
        "max_epoch": 2,
        "lr": 0.03,
        "warmup": 1,
    }
    results = [
        launch(
            STAGE1,
            **common,
            backbone="resnet48pinasv2_mini",
            queue_size=32,
            save_dir=root / "stage1",
        ),
        launch(
            STAGE2,
            **common,
            backbone="resnet48_mini",
            ckpt_dir=root / "stage1/0.pdparams",
            save_dir=root / "stage2",
        ),
    ]
    scoring = {
        **common,
        "backbone": "resnet48_mini",
        "ckpt_dir": root / "stage2/0.pdparams",
        "modelarch_file": root / "codes.json",
    }
    results.append(launch(STAGE3, **scoring, save_dir=root / "stage3", bn_calibration_images=0))
    results.append(
        launch(STAGE3, **scoring, save_dir=root / "calibrated", bn_calibration_images=40)
    )
    for result in results:
        assert result.returncode == 0, result.stderr[-2000:]
    return root, common, codes, results


@pytest.mark.slow
def test_all_stages_leave_their_files(run):
    root, _, codes, results = run
    for stage in ("stage1", "stage2"):
        for epoch in (0, 1):
            for suffix in (".pdparams", ".pdopt", ".pdstates"):
                assert (root / stage / f"{epoch}{suffix}").is_file()
    assert "ips" in results[0].stderr and "eta" in results[1].stderr
    submission = json.loads((root / "stage3/submission.json").read_text())
    assert list(submission) == [f"net{i}" for i in range(len(codes))]
    assert [entry["arch"] for entry in submission.values()] == codes


def validation_batch(root):
    """All validation images as the network sees them, by Pillow and NumPy alone."""
    images = scan_images(root / "data", "val")
    pixels = []
    for path in images.paths:
        image = Image.open(path).convert("RGB")
        assert image.size == (40, 40)
        image = image.resize((37, 37), Image.Resampling.BILINEAR).crop((2, 2, 34, 34))
        pixels.append(np.asarray(image).transpose(2, 0, 1))
    return np.stack(pixels), images.labels


def normalized(pixels):
    mean, std = np.float32([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 1, 3, 1, 1)
    return paddle.to_tensor((pixels.astype("float32") / np.float32(255) - mean) / std)


@pytest.mark.slow
def test_standalone_networks_reproduce_the_submission(run):
    root, _, codes, _ = run
    pixels, labels = validation_batch(root)
    supernet = build_network("resnet48_mini", 10)
    supernet.set_state_dict(paddle.load(str(root / "stage2/0.pdparams")))
    submission, top5 = (
        json.loads((root / "stage3" / name).read_text())
        for name in ("submission.json", "submission_top5.json")
    )
    rows = (root / "stage3/channel_sample.txt").read_text().splitlines()
    assert len(rows) == len(top5) == len(codes)
    for index, code in enumerate(codes):
        alone = supernet.extract(Architecture.from_code(code))
        alone.eval()
        logits = alone(normalized(pixels)).numpy()
        own = logits[np.arange(len(labels)), labels]
        ahead = (logits > own[:, None]).sum(1)
        one, five = ((ahead < places).sum() / len(labels) for places in (1, 5))
        assert submission[f"net{index}"]["acc"] == one
        assert top5[f"net{index}"] == {"acc": five, "arch": code}
        assert rows[index] == f"{code} {one} {five}"


@pytest.mark.slow
def test_calibration_gives_other_accuracies(run):
    root, _, codes, _ = run
    plain, calibrated = (
        [entry["acc"] for entry in json.loads((root / f / "submission.json").read_text()).values()]
        for f in ("stage3", "calibrated")
    )
    assert len(plain) == len(calibrated) == len(codes) and plain != calibrated


@pytest.mark.slow
def test_stage_two_starts_from_stage_ones_backbone(run):
    """Stage one moved the weights that stage two loads, but not the classifier."""
    root = run[0]
    pretrained = read_weights(root / "pretrained.pdparams")
    stage1 = read_weights(root / "stage1/0.pdparams")
    name = "blocks.24.fc.weight"
    np.testing.assert_array_equal(stage1[f"backbone.{name}"], pretrained[name])
    name = "blocks.1.conv2.weight"
    assert not np.array_equal(
        np.sort(stage1[f"backbone.{name}"], axis=None), np.sort(pretrained[name], axis=None)
    )
    assert {"queue", "queue_pointer"} <= set(stage1)


@pytest.mark.slow
def test_statistics_stay_the_pretrained_ones(run):
    """Through both stages, which are frozen by default; scales and shifts train."""
    root = run[0]
    pretrained = read_weights(root / "pretrained.pdparams")
    stage1, stage2 = (read_weights(root / stage / "1.pdparams") for stage in ("stage1", "stage2"))
    for name in ("blocks.0.bn", "blocks.9.bn2", "blocks.6.downsample.1"):
        for part in ("_mean", "_variance"):
            # Widths that reordering leaves alone.
            np.testing.assert_array_equal(
                stage1[f"backbone.{name}.{part}"], pretrained[f"{name}.{part}"]
            )
            np.testing.assert_array_equal(stage2[f"{name}.{part}"], pretrained[f"{name}.{part}"])
        assert not np.array_equal(stage2[f"{name}.weight"], pretrained[f"{name}.weight"])
    for state, prefix in ((stage1, "backbone."), (stage2, "")):
        for name, value in pretrained.items():
            if name.endswith(("_mean", "_variance")):
                found = state[f"{prefix}{name}"]
                np.testing.assert_array_equal(np.sort(found), np.sort(value), err_msg=name)


@pytest.mark.slow
def test_stage_three_says_what_fits_the_training(run):
    """No re-calibration by default, and a warning where it is asked for."""
    logs = [result.stderr for result in run[3]]
    assert "bn_calibration_images 0: the weights were trained with freeze_bn" in logs[1]
    assert "trained with freeze_bn" not in logs[2]
    assert "--bn_calibration_images 40, but the weights were trained with freeze_bn" in logs[3]


def refused(result, *culprits):
    """Exit code 2 and, last, one line that names the culprits; no traceback."""
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for culprit in culprits:
        assert str(culprit) in line
    return line


@pytest.mark.slow
def test_wrong_input_is_one_line_and_exit_code_2(run, tmp_path):
    root, common, _, _ = run
    scoring = {
        **common,
        "backbone": "resnet48_mini",
        "ckpt_dir": root / "stage2/0.pdparams",
        "modelarch_file": root / "codes.json",
        "save_dir": tmp_path / "out",
    }

    def score(**changes):
        return launch(STAGE3, **{**scoring, **changes})

    refused(score(image_dir=tmp_path / "nowhere"), tmp_path / "nowhere")
    refused(score(ckpt_dir=tmp_path / "none.pdparams"), tmp_path / "none.pdparams")
    (tmp_path / "bad.json").write_text('{"net7": {"acc": 0, "arch": "1658511"}}')
    refused(score(modelarch_file=tmp_path / "bad.json"), "bad.json", "net7", "7 digits")
    line = refused(score(backbone="resnet48"), "0.pdparams", "another network")
    assert ", ..." in line  # many shapes differ; ten are listed

    empty = tmp_path / "empty"
    shutil.copytree(root / "data", empty)
    shutil.rmtree(empty / "val/3")
    (empty / "val/3").mkdir()
    refused(score(image_dir=empty), empty / "val/3", "no images")

    corrupt = tmp_path / "corrupt"
    shutil.copytree(root / "data", corrupt)
    victim = sorted((corrupt / "train/5").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:60])
    stage2 = {**common, "image_dir": corrupt, "use_ckpt": False, "save_dir": tmp_path / "s2"}
    for workers in (0, 2):
        result = launch(STAGE2, **{**stage2, "backbone": "resnet48_mini", "num_workers": workers})
        refused(result, victim)
