"""The benches' command lines: help with defaults, wrong arguments, and a small run of each."""

import importlib
import json
import re

import numpy as np
import pytest

from hnas.architecture_file import read_architectures
from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.bench import plan_check, speed_scoring
from hnas.search_space import RESNET48_MINI

BENCHES = ("chaos", "plan_check", "search", "speed_scoring", "speed_training", "rank.__main__")


@pytest.mark.parametrize("name", BENCHES)
def test_help_tells_what_each_option_is_and_its_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"hnas.bench.{name}").main(["--help"])
    assert not ended.value.code
    usage, _, text = capsys.readouterr().out.partition("options:\n")
    assert usage.startswith(f"usage: python -m hnas.bench.{name.removesuffix('.__main__')} [-h]")
    options = re.split(r"^  (?=--)", text, flags=re.M)[1:]
    assert len(options) > 4
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
    assert found["ratio"] == pytest.approx(found["reference_s"] / found["shared_s"], rel=0.02)
    # All codes, without a run; a classifier's products are not counted.
    speed_scoring.main(["--modelarch_file", str(path), *flags.split()[:4], "--count_only", "True"])
    found = printed(capsys)
    assert "ratio" not in found and found["n_arch"] == 6
    naive = sum(RESNET48_MINI.macs(arch, 32, num_classes=0) for arch in archs.values())
    assert found["macs_naive"] == naive > found["macs_shared"]
    assert "macs_shards" not in found
    flags = [*flags.split()[:4], "--count_only", "True", "--shards"]
    speed_scoring.main(["--modelarch_file", str(path), *flags, "2"])
    cut = printed(capsys)
    assert found["macs_shared"] <= sum(cut["macs_shards"]) <= sum(cut["macs_dealt"]) <= naive
    with pytest.raises(UserError, match="shard 1/7 of 6 architectures"):
        speed_scoring.main(["--modelarch_file", str(path), *flags, "7"])
    with pytest.raises(UserError, match="--n_arch 7, but the file has 6 architectures"):
        speed_scoring.main(["--modelarch_file", str(path), "--n_arch", "7"])


def test_the_plan_is_checked_and_the_command_printed(capsys):
    flags = "--backbone resnet48_mini --image_size 32 --batch_size 2 --n_arch 3 --times 1"
    plan_check.main(flags.split())
    found = printed(capsys)
    assert found["command"] == f"python -m {plan_check.__name__} {flags}"
    for part in ("stage1_step", "stage2_step", "stage3_walk"):
        times = found[part]
        assert times["predicted_s"] >= 0 < times["measured_s"] and times["ratio"] > 0
    assert found["training_gmacs_per_s"] > 0 < found["inference_gmacs_per_s"]
