"""What stage 3 writes: for the organisers, and for the helpers of public code."""

import json

import numpy as np
import pytest
from counted import counts_of, first_ones

from hnas.architecture_file import read_architectures
from hnas.base.errors import UserError
from hnas.evaluation.results import write_results
from hnas.search_space import RESNET48


@pytest.fixture
def scored():
    """Three architectures on 7 images."""
    rng = np.random.default_rng(0)
    archs = {f"arch{index}": RESNET48.sample(rng) for index in (1, 30, 7)}
    counts = counts_of(first_ones([3, 0, 7], 7), [5, 1, 7], [0, 2, 1], [1, 0, 0])
    return archs, counts


def test_results_are_in_the_order_of_the_file(scored, tmp_path, caplog):
    archs, counts = scored
    with caplog.at_level("INFO"):
        write_results(tmp_path, archs, counts)
    codes = [arch.code for arch in archs.values()]
    for name, hits in (("submission.json", (3, 0, 7)), ("submission_top5.json", (5, 1, 7))):
        content = json.loads((tmp_path / name).read_text())
        assert list(content) == ["arch1", "arch30", "arch7"]
        assert list(content.values()) == [
            {"acc": number / 7, "arch": code} for number, code in zip(hits, codes, strict=True)
        ]
    assert (tmp_path / "channel_sample.txt").read_text() == (
        f"{codes[0]} {3 / 7} {5 / 7}\n{codes[1]} 0.0 {1 / 7}\n{codes[2]} 1.0 1.0\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "channel_sample.txt",
        "submission.json",
        "submission_top5.json",
    ]
    assert "3 top-1 and 1 top-5 hits of 21 hang on logits closer than 1e-4" in caplog.text
    # Both JSON files can be read as architectures again.
    for name in ("submission.json", "submission_top5.json"):
        assert read_architectures(tmp_path / name) == archs


def test_a_folder_that_cannot_be_written_is_one_line(scored, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write") as caught:
        write_results(tmp_path / "file", *scored)
    assert "\n" not in str(caught.value)
