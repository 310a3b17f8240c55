"""The bench of scoring: both engines agree, and its figures add up."""

import json

import numpy as np
import pytest

from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.bench import speed_scoring
from hnas.search_space import RESNET48_MINI


def test_scoring_is_timed_and_both_engines_agree(tmp_path, capsys):
    path = tmp_path / "codes.json"
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(3), 6)
    write_json(path, {name: {"acc": 0, "arch": arch.code} for name, arch in archs.items()})
    line = f"--modelarch_file {path} --backbone resnet48_mini --image_size 32".split()
    speed_scoring.main([*line, "--n_images", "8", "--num_classes", "10"])
    found = json.loads(capsys.readouterr().out)
    assert found["n_arch"] == 6 and found["largest_difference_top1"] <= found["near_ties"]
    assert found["ratio"] == pytest.approx(found["reference_s"] / found["shared_s"], rel=0.05)
    # A classifier's products are not counted.
    naive = sum(RESNET48_MINI.macs(arch, 32, num_classes=0) for arch in archs.values())
    assert found["macs_naive"] == naive > found["macs_shared"]
    with pytest.raises(UserError, match="--n_arch 7, but the file has 6 architectures"):
        speed_scoring.main([*line, "--n_arch", "7"])
