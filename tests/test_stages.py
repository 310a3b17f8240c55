"""The launchers in order, on a few real digits; and what they say to wrong input."""

import json
import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from entry_scripts import ROOT, write_inputs
from independent import validation_images

from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI, Architecture
from hnas.weights.loading import read_weights

STAGE1 = "local_train_pinas1_wholenet.sh"
STAGE2 = "local_train_pinas2_simple_wholenet_nof.sh"
STAGE3 = "local_eval.sh"


def launch(script, **variables):
    # Not the caller's variables: one of them may be a launcher's.
    inherited = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "XDG_CACHE_HOME")
    environment = {name: os.environ[name] for name in inherited if name in os.environ}
    environment |= {"python": sys.executable, "PYTHONWARNINGS": "ignore"}
    environment |= {name: str(value) for name, value in variables.items()}
    command = ["sh", str(ROOT / script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All three stages on 8 training and validation images a class: folder, flags, codes, logs."""
    root = tmp_path_factory.mktemp("run")
    write_inputs(root, 8)
    rng = np.random.default_rng(0)
    archs = [RESNET48_MINI.largest(), *(RESNET48_MINI.sample(rng) for _ in range(4))]
    codes = [arch.code for arch in archs]
    codes[1] = codes[1][1:]  # 51 digits must come back as 51
    entries = {f"net{i}": {"acc": 0.0, "arch": code} for i, code in enumerate(codes)}
    (root / "codes.json").write_text(json.dumps(entries))
    common = {"image_dir": root / "images", "pretrained": root / "pretrained.pdparams"}
    common |= {"image_size": 32, "batch_size": 16, "num_workers": 0, "log_freq": 1}
    common |= {"max_epoch": 2, "lr": 0.03, "warmup": 1, "backbone": "resnet48_mini"}
    first = {"backbone": "resnet48pinasv2_mini", "queue_size": 32, "save_dir": root / "stage1"}
    second = {"ckpt_dir": root / "stage1/0.pdparams", "save_dir": root / "stage2"}
    third = {"ckpt_dir": root / "stage2/0.pdparams", "modelarch_file": root / "codes.json"}
    logs = []
    for script, flags in (
        (STAGE1, first),
        (STAGE2, second),
        (STAGE3, {**third, "save_dir": root / "stage3"}),
    ):
        result = launch(script, **{**common, **flags})
        assert result.returncode == 0, result.stderr[-2000:]
        logs.append(result.stderr)
    return root, common, codes, logs


@pytest.mark.slow
def test_standalone_networks_reproduce_the_submission(run):
    root, _, codes, logs = run
    assert "ips" in logs[0] and "eta" in logs[1]
    images, labels = validation_images(root / "images")
    supernet = build_network("resnet48_mini", 10)
    supernet.set_state_dict(paddle.load(str(root / "stage2/0.pdparams")))
    names = ("submission.json", "submission_top5.json")
    submission, top5 = (json.loads((root / "stage3" / name).read_text()) for name in names)
    rows = (root / "stage3/channel_sample.txt").read_text().splitlines()
    assert len(rows) == len(top5) == len(codes)
    for index, code in enumerate(codes):
        alone = supernet.extract(Architecture.from_code(code))
        alone.eval()
        logits = alone(images).numpy()
        own = logits[np.arange(len(labels)), labels]
        ahead = (logits > own[:, None]).sum(1)
        one, five = ((ahead < places).sum() / len(labels) for places in (1, 5))
        assert submission[f"net{index}"]["acc"] == one
        assert top5[f"net{index}"] == {"acc": five, "arch": code}
        assert rows[index] == f"{code} {one} {five}"


@pytest.mark.slow
def test_what_each_stage_trains(run):
    """Stage 1 the backbone but not the classifier; neither moves the pretrained statistics."""
    root = run[0]
    pretrained = read_weights(root / "pretrained.pdparams")
    stage1, stage2 = (read_weights(root / stage / "1.pdparams") for stage in ("stage1", "stage2"))
    assert {"queue", "queue_pointer"} <= set(stage1)
    classifier, moved = "blocks.24.fc.weight", "blocks.1.conv2.weight"
    np.testing.assert_array_equal(stage1[f"backbone.{classifier}"], pretrained[classifier])
    for state, prefix in ((stage1, "backbone."), (stage2, "")):
        for name, value in pretrained.items():
            if name == moved or name.endswith(("_mean", "_variance")):
                # Reordering moves channels of the widths within blocks.
                found = np.sort(state[f"{prefix}{name}"], axis=None)
                same = np.array_equal(found, np.sort(value, axis=None))
                assert same == (name != moved), name
    for name in ("blocks.0.bn", "blocks.9.bn2", "blocks.6.downsample.1"):
        assert not np.array_equal(stage2[f"{name}.weight"], pretrained[f"{name}.weight"])
