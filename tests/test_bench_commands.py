"""The benches' command lines: help with defaults, wrong arguments, and a small run of each."""

import importlib
import json
import re

import numpy as np
import pytest

from hnas.architecture_file import read_architectures
from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.base.onednn import has_bfloat16
from hnas.bench import plan_check, rehearsal, speed_convolution, speed_scoring
from hnas.evaluation.tree import PrefixTree
from hnas.search_space import RESNET48_MINI

BENCHES = (
    "chaos",
    "cudnn.__main__",
    "plan_check",
    "rehearsal",
    "search",
    "speed_convolution",
    "speed_scoring",
    "speed_training",
    "rank.__main__",
)


@pytest.mark.parametrize("name", BENCHES)
def test_help_tells_what_each_option_is_and_its_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"hnas.bench.{name}").main(["--help"])
    assert not ended.value.code
    usage, _, text = capsys.readouterr().out.partition("options:\n")
    assert usage.startswith(f"usage: python -m hnas.bench.{name.removesuffix('.__main__')} [-h]")
    options = re.split(r"^  (?=--)", text, flags=re.M)[1:]
    assert options
    for option in options:
        flag = option.split()[0]
        required = f"[{flag}" not in usage
        assert "default" in option or required, option
        assert re.sub(r"[\[(]default.*", "", option).split()[2:], f"nothing is told of {flag}"


@pytest.mark.parametrize("name", BENCHES)
def test_an_unknown_flag_is_an_error_of_one_line(name):
    with pytest.raises(UserError) as error:
        importlib.import_module(f"hnas.bench.{name}").main(["--evolve", "1"])
    assert "\n" not in str(error.value)


# --- a small run of each (speed_training: test_speed_training.py; chaos: test_resume.py)


def printed(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_scoring_is_timed_and_both_engines_agree(tmp_path, capsys):
    path = tmp_path / "codes.json"
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(3), 6)
    write_json(path, {name: {"acc": 0, "arch": arch.code} for name, arch in archs.items()})
    assert list(read_architectures(path).values()) == list(archs.values())
    flags = "--backbone resnet48_mini --image_size 32 --n_images 8 --num_classes 10 --n_arch 4"
    speed_scoring.main(["--modelarch_file", str(path), *flags.split()])
    found = printed(capsys)
    assert found["n_arch"] == 4 and found["largest_difference_top1"] <= found["near_ties"]
    assert found["ratio"] == pytest.approx(found["reference_s"] / found["shared_s"], rel=0.05)
    assert found["first_s"] > 0 and "bfloat16_speedup" not in found
    # Walks of other kinds take turns with it.
    more = "--rounds 1 --bn_calibration_images 6" + (" --amp O1" if has_bfloat16() else "")
    speed_scoring.main(["--modelarch_file", str(path), *flags.split(), *more.split()])
    found = printed(capsys)
    plain = found["calibrated_walk_s"] / (found["walk_s"] * 14 / 8)
    assert found["calibrated_over_plain"] == pytest.approx(plain, rel=0.1)
    if has_bfloat16():
        assert 0 < found["bfloat16_logits_apart"] < 1
    # All codes, without a run; a classifier's products are not counted.
    speed_scoring.main(["--modelarch_file", str(path), *flags.split()[:4], "--count_only", "True"])
    found = printed(capsys)
    assert "ratio" not in found and found["n_arch"] == 6
    naive = sum(RESNET48_MINI.macs(arch, 32, num_classes=0) for arch in archs.values())
    assert found["macs_naive"] == naive > found["macs_shared"]
    with pytest.raises(UserError, match="--n_arch 7, but the file has 6 architectures"):
        speed_scoring.main(["--modelarch_file", str(path), "--n_arch", "7"])


@pytest.mark.slow
def test_a_rehearsal_is_killed_and_resumed(tmp_path, capsys):
    path = tmp_path / "codes.json"
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(3), 400)
    write_json(path, {name: {"acc": 0, "arch": arch.code} for name, arch in archs.items()})
    flags = "--backbone resnet48_mini --image_size 64 --num_classes 12 --kill_after 0"
    rehearsal.main(["--modelarch_file", str(path), "--out", str(tmp_path / "out"), *flags.split()])
    found = printed(capsys)
    assert len(found["chunks"]) == len(found["start_s"]) == 2
    assert all(chunk["seconds"] > 0 and chunk["peak_gib"] > 0 for chunk in found["chunks"])
    macs = PrefixTree(RESNET48_MINI, list(archs.values())).macs(64)
    assert found["macs_shared"] == macs
    predicted = 2 * macs / found["largest_macs_per_s"]
    assert found["predicted_chunk_s"] == pytest.approx(predicted, abs=0.06)
    results = json.loads((tmp_path / "out/stage3/submission.json").read_text())
    assert {name: row["arch"] for name, row in results.items()} == {
        name: arch.code for name, arch in archs.items()
    }


def test_both_convolutions_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(speed_convolution, "SHAPES", ((64, 4, 48, 50), (2, 3, 6, 7)))
    speed_convolution.main(["--rounds", "1"])
    pays, does_not = printed(capsys)["shapes"]
    assert pays["chosen"] and not does_not["chosen"]
    assert pays["ratio"] == pytest.approx(pays["direct_ms"] / pays["winograd_ms"], abs=0.02)


def test_the_plan_is_checked_and_the_command_printed(capsys):
    flags = "--backbone resnet48_mini --image_size 32 --batch_size 2 --n_arch 3 --times 1"
    plan_check.main(flags.split())
    found = printed(capsys)
    assert found["command"] == f"python -m {plan_check.__name__} {flags}"
    for part in ("stage1_step", "stage2_step", "stage3_walk"):
        times = found[part]
        assert times["predicted_s"] >= 0 < times["measured_s"] and times["ratio"] > 0
    assert found["training_gmacs_per_s"] > 0 < found["inference_gmacs_per_s"]
