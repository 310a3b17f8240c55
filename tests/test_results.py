"""What stage 3 writes: for the organisers, and for the helpers of public code."""

import json

import numpy as np
import pytest
from counted import counts_of, first_ones
from scipy import stats

from hnas.architecture_file import read_architectures
from hnas.base.errors import UserError
from hnas.evaluation.results import warn_if_guessing, write_results
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


@pytest.mark.parametrize(
    ("hits", "images", "classes", "warned"),
    [
        ([40, 31], 4000, 100, True),  # the mean of guessing
        ([0], 4000, 100, True),
        ([31, 58, 40], 4000, 100, True),  # 40 and three standard deviations of 6.3 are 58.9
        ([31, 59, 40], 4000, 100, False),
        ([71], 50000, 1000, True),
        ([72], 50000, 1000, False),
        ([12], 40, 10, False),
        ([9], 40, 10, True),
        ([2], 2, 2, False),  # nothing to tell by
        ([0], 2, 2, False),
        ([], 40, 10, False),
        ([40], 40, 1, False),
    ],
)
def test_scores_of_guessing_are_told(hits, images, classes, warned, caplog):
    right = first_ones(hits, images) if hits else np.zeros([0, images])
    warn_if_guessing(counts_of(right), classes, "the best sub-network")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    if warned:
        (line,) = caplog.messages
        assert "\n" not in line
        start = f"the best sub-network is right about {max(hits)} of {images} images, no more than"
        assert line.startswith(f"{start} guessing among {classes} classes: ")


@pytest.mark.parametrize(("images", "classes"), [(4000, 100), (50000, 1000), (355, 10)])
def test_guessing_is_rarely_missed(images, classes, caplog):
    """The most hits that are warned of, by trial, against the exact distribution of guesses."""
    most = -1
    while not caplog.clear() and most < images:
        warn_if_guessing(counts_of(first_ones([most + 1], images)), classes, "it")
        if not caplog.records:
            break
        most += 1
    missed = stats.binom.sf(most, images, 1 / classes)
    assert 0.0005 < missed < 0.005
