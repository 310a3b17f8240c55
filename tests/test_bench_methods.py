"""The ranking bench's methods: which sub-networks a step trains, by what loss, at what rate."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import law, option_ranks
from scipy.stats import chisquare

from hnas.bench.rank import runs
from hnas.bench.rank.jobs import Bench, Job, Scale
from hnas.bench.rank.methods import CHANGES, COMPARED, METHODS
from hnas.bench.rank.tuning import related
from hnas.search_space import RELEASED_DIGITS, RESNET48_MINI
from hnas.utils.SampleMethod import candidate_sizes, weighted_channels

BENCH = Bench(Path(), Scale())


def steps_of(name, number):
    sampler = runs.method_sampler(BENCH, METHODS[name], seed=3)
    return [sampler.sample(0, step) for step in range(number)]


@pytest.mark.parametrize(
    ("name", "subnetworks", "frozen", "stage1", "teaches", "scores"),
    [
        ("first_place", (5, 4, 4), True, "frozen", True, "plain"),
        ("first_place_no_stage1", (5, 4, 4), True, None, True, "plain"),
        ("first_place_uniform", (4, 4, 4), True, "frozen", True, "plain"),
        ("tilted", (4, 4, 4), False, "largest", True, "calibrated"),
        ("organisers", (4, 4, 4), True, None, True, "plain"),
        ("organisers_calibrated", (4, 4, 4), False, None, True, "calibrated"),
        ("bignas", (4, 4, 4), False, None, False, "calibrated"),
        ("fairnas", (7, 7, 7), False, None, False, "calibrated"),
        ("single_path", (1, 1, 1), False, None, False, "calibrated"),
    ],
)
def test_methods_train_as_they_are_called(
    name, subnetworks, frozen, stage1, teaches, scores, monkeypatch
):
    """What ``run_supernet`` trains with, but for the training."""
    seen = {}
    monkeypatch.setattr(runs, "start", lambda bench, seed, network: paddle.nn.Linear(1, 1))
    monkeypatch.setattr(runs, "read_weights", lambda path: seen.update(stage1=path.stem))
    monkeypatch.setattr(runs, "load_weights", lambda *arguments: None)
    monkeypatch.setattr(
        runs,
        "train",
        lambda bench, job, model, steps, lr, clip_norm: seen.update(
            model=model, lr=lr, clip_norm=clip_norm
        ),
    )
    monkeypatch.setattr(
        runs, "score_supernet", lambda bench, network, archs, images: np.zeros(len(archs))
    )
    result = runs.run_supernet(BENCH, Job.supernet("final", name, 0.0067, 5))
    model = seen["model"]
    assert tuple(len(model.sampler.sample(0, step)) for step in range(3)) == subnetworks
    assert model.network.frozen == frozen and (model.teacher is not None) == teaches
    assert seen.get("stage1") == (f"stage1-{stage1}-5" if stage1 else None)
    # The same rates for all: not scaled by how many gradients a step adds up.
    assert seen["clip_norm"] == 0
    assert seen["lr"] == 0.0067 and len(result["archs"]) == 32
    assert METHODS[name].scores == scores and set(COMPARED) >= {name}


@pytest.mark.parametrize(("name", "tilt"), [("organisers", 0.0), ("tilted", 2.0)])
def test_laws_of_independent_choices(name, tilt):
    codes = [str(arch) for archs in steps_of(name, 150) for arch in archs]
    for choice, (options, ranks) in option_ranks(codes, RELEASED_DIGITS).items():
        counts = np.bincount(ranks, minlength=options)
        assert chisquare(counts, law(options, tilt) * len(ranks)).pvalue > 1e-4, choice


def test_first_places_law_prefers_the_largest():
    steps = steps_of("first_place", 60)
    chosen = [weighted_channels(arch) for step in steps for arch in step[:4]]
    uniform = [weighted_channels(step[4]) for step in steps[::3]]
    # Shares of uniform draws that are smaller than what is trained: 396 of 400.
    drawn = candidate_sizes(RESNET48_MINI.sample_many(np.random.default_rng(0), 4000))
    below = np.searchsorted(np.sort(drawn), chosen) / len(drawn)
    assert np.mean(below) == pytest.approx(1 - 2.5 / 400, abs=0.003)
    assert np.mean(np.searchsorted(np.sort(drawn), uniform) / len(drawn)) < 0.8


def test_bignas_trains_the_largest_first_and_the_smallest():
    for step in steps_of("bignas", 5):
        assert step[0] == RESNET48_MINI.largest() and step[1] == RESNET48_MINI.smallest()
    others = {arch for step in steps_of("bignas", 5) for arch in step[2:]}
    assert len(others) == 10


def test_fairnas_gives_every_option_its_turn():
    """A choice of seven options has each once a step, another as equally as seven divide."""
    for step in steps_of("fairnas", 30):
        codes = [str(arch) for arch in step]
        found = option_ranks(codes, RELEASED_DIGITS)
        assert {options for options, _ in found.values()} == {3, 4, 5, 7}
        for choice, (options, ranks) in found.items():
            if len(ranks) < 7:  # a block that not all of them have
                continue
            counts = np.bincount(ranks, minlength=options)
            assert counts.min() == 7 // options and counts.max() == -(-7 // options), choice


def test_changes_are_one_each():
    base = METHODS["first_place"].settings()
    for change in CHANGES[1:]:
        own = METHODS[change.method].settings()
        changed = {key for key in base if own[key] != base[key]} - {"tilt"}
        assert len(changed) + (change.rate != 1) <= 1, change.title
        assert changed or change.rate != 1 or change.scores == "calibrated"
    assert len({change.title for change in CHANGES}) == len(CHANGES)
    # So a tuned supernet at another learning rate is one of them.
    assert [related(0.02, rate) for rate in (1 / 3, 1, 3)] == [0.0067, 0.02, 0.06]
    assert [related(rate, 3) for rate in (0.0067, 0.02)] == [0.02, 0.06]
