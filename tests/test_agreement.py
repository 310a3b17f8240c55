"""How well a ranking by the first images agrees with that by all, and paired errors: by simulation.

The simulated supernets have the accuracies of the ranking bench's. An image is easy or hard for all
architectures, and further suits groups of architectures more than others:
hit = ability + interaction - difficulty > 0, all of them normal. With the variances chosen here the
error of a difference of two accuracies is 0.7 to 0.8 of the unpaired one.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hnas.base.errors import UserError
from hnas.evaluation.counts import Counts, by_fold
from hnas.evaluation.results import estimates
from hnas.ranking.agreement import (
    FOLDS,
    STUDENT,
    Agreement,
    corrected_for_length,
    expected_agreement,
    fold_sizes,
    read_estimates,
)
from hnas.ranking.correlations import kendall_tau_b
from hnas.ranking.front import as_good_as_best, difference_errors
from hnas.search_space import RESNET48_MINI

RESULTS = Path(__file__).parents[1] / "docs/results/ranking_bench.json"
INTERACTION = 0.55
"""Standard deviation of what an image means to one architecture more than to all."""


def simulated_hits(rng, accuracies, images: int) -> np.ndarray:
    """Which images each architecture is right about; bool [architectures, images]."""
    number, groups = len(accuracies), 2
    ability = stats.norm.ppf(accuracies) * math.hypot(1, INTERACTION)
    member = rng.normal(size=(number, groups))
    member /= np.linalg.norm(member, axis=1, keepdims=True)
    common = member @ rng.normal(size=(groups, images))
    interaction = (common + rng.normal(size=(number, images))) * math.sqrt(0.5) * INTERACTION
    return ability[:, None] + interaction > rng.normal(size=images)


# --- the method's parts


def test_folds_go_round():
    assert stats.t.ppf(0.975, FOLDS - 2) == pytest.approx(STUDENT, abs=1e-4)
    for images in (0, 1, 15, 16, 17, 100):
        expected = [len(range(fold, images, FOLDS)) for fold in range(FOLDS)]
        assert fold_sizes(images).tolist() == expected


@pytest.mark.parametrize("one", [300, 390])
def test_correction_is_the_models(one):
    """Against normal scores and errors that are drawn."""
    rng = np.random.default_rng(0)
    images, of_images, number, ratio = 600, 1500, 200_000, 400.0
    true = rng.normal(size=number)

    def errors(size):
        return rng.normal(size=number) * math.sqrt(ratio / size)

    first, second = errors(one), errors(images - one)
    halves = kendall_tau_b(true + first, true + second)
    before = (one * first + (images - one) * second) / images
    after = (images * before + (of_images - images) * errors(of_images - images)) / of_images
    expected = kendall_tau_b(true + before, true + after)
    found = corrected_for_length(halves, (one, images - one), images, of_images)
    assert found == pytest.approx(expected, abs=0.004)


def test_correction_at_its_ends():
    assert corrected_for_length(1.0, (50, 50), 100, 1000) == pytest.approx(1)
    for tau in (0.0, -0.3):  # images see nothing: only those that are shared agree
        expected = 2 / math.pi * math.asin(math.sqrt(0.1))
        assert corrected_for_length(tau, (50, 50), 100, 1000) == pytest.approx(expected, abs=1e-3)
    for tau in (-1.0, 0.0, 0.4, 1.0):
        assert corrected_for_length(tau, (50, 50), 100, 100) == pytest.approx(1)


def test_where_nothing_can_be_said():
    rng = np.random.default_rng(0)
    hits = rng.random((5, 200)) < 0.5
    assert expected_agreement(by_fold(hits[:, :31], 0), 31, 200) is None
    assert expected_agreement(by_fold(hits[:, :32], 0), 32, 200) is not None
    same = np.repeat(hits[:1], 5, axis=0)
    assert expected_agreement(by_fold(same[:, :100], 0), 100, 200) is None
    assert expected_agreement(by_fold(hits[:1, :100], 0), 100, 200) is None
    assert expected_agreement(by_fold(same, 0), 200, 200) == Agreement(1, 1, 1)
    # Two architectures are never certain before the end.
    hits = np.stack([np.ones(999), np.zeros(999)]).astype(bool)
    found = expected_agreement(by_fold(hits, 0), 999, 1000)
    assert (found.tau, found.low) == (1, -1)


def test_45000_architectures_take_seconds():
    rng = np.random.default_rng(0)
    folds = rng.binomial(64, rng.normal(0.7, 0.02, (45_000, 1)), (45_000, FOLDS))
    began = time.process_time()
    found = expected_agreement(folds, 1024, 50_000)
    assert time.process_time() - began < 10
    correlation = math.sqrt((0.02**2 + 0.21 / 50_000) / (0.02**2 + 0.21 / 1024))
    assert found.low < 2 / math.pi * math.asin(correlation) < found.high < found.low + 0.02


# --- coverage


def looks(rng, accuracies, images):
    """(images, true tau, estimate) at each of ``STEPS`` of one simulated evaluation."""
    hits = simulated_hits(rng, accuracies, images)
    final = hits.sum(axis=1)
    for step in STEPS:
        now = hits[:, :step]
        true = kendall_tau_b(now.sum(axis=1), final)
        yield step, true, expected_agreement(by_fold(now, 0), step, images)


STEPS = (200, 400, 700, 1000, 1300, 1600, 1900)
SUPERNETS = {  # job: architectures, images, target
    "supernet-single_path-0": (40, 2000, 0.9),
    "supernet-sandwich_inplace-0": (150, 2000, 0.9),
    "supernet-fair-0": (64, 2000, 0.95),
    "supernet-seed_recipe-0": (150, 2000, 0.95),
    "supernet-bias_4-0": (40, 2000, 0.95),
}


@pytest.fixture(scope="module")
def simulated():
    """Evaluations of every supernet: lists of (images, true tau, estimate), by job."""
    rng, runs, bench = np.random.default_rng(3), {}, json.loads(RESULTS.read_text())
    for job, (number, images, _) in SUPERNETS.items():
        # As many as wanted, spread as those that the bench measured.
        measured = np.array(bench["supernets"][job]) / bench["images"]
        drawn = np.quantile(measured, rng.random(number))
        drawn += rng.normal(size=number) * measured.std() / 20
        drawn = np.clip(drawn, 0.01, 0.99)
        runs[job] = [list(looks(rng, drawn, images)) for _ in range(20)]
    return runs


def test_the_interval_holds_the_true_tau(simulated):
    """At least as often as it says, to two standard errors: evaluations' looks go together.

    And the estimate is right on average.
    """
    below, above = [], []
    for runs in simulated.values():
        for run in runs:
            below.append(np.mean([true < found.low for _, true, found in run]))
            above.append(np.mean([true > found.high for _, true, found in run]))
    for missed in (below, above):
        error = np.std(missed) / math.sqrt(len(missed))
        assert np.mean(missed) <= 0.025 + 2 * error
    assert np.mean(below) <= 0.04 and np.mean(above) <= 0.04
    for runs in simulated.values():
        bias = [np.mean([found.tau - true for step, true, found in run[2:]]) for run in runs]
        assert abs(np.mean(bias)) <= 0.008 + 2 * np.std(bias) / math.sqrt(len(bias))


def test_where_it_stops_the_target_is_reached(simulated):
    """Looking after every chunk gives chances to be wrong, which the interval must pay for."""
    reached, saved = [], []
    for job, runs in simulated.items():
        target, images = SUPERNETS[job][2], SUPERNETS[job][1]
        for run in runs:
            stops = [(step, true) for step, true, found in run if found.low >= target]
            saved.append(1 - stops[0][0] / images if stops else 0)
            reached += [true >= target for _, true in stops[:1]]
    assert len(reached) > 80
    assert np.mean(reached) >= 0.95
    assert np.mean(saved) > 0.2


# --- paired errors


def test_paired_errors_are_those_of_differences():
    """Against what differences really vary by, and smaller than unpaired."""
    rng = np.random.default_rng(5)
    accuracies = np.array([0.91, 0.912, 0.92, 0.9])
    images, found, differences, unpaired = 800, [], [], []
    for _ in range(300):
        hits = simulated_hits(rng, accuracies, images)
        rates = hits.mean(axis=1)
        found.append(difference_errors(by_fold(hits, 0), images, 2))
        differences.append(rates - rates[2])
        unpaired.append(math.sqrt(2 * rates[0] * (1 - rates[0]) / images))
    found, true = np.array(found), np.std(differences, axis=0)
    assert (found[:, 2] == 0).all() and true[2] == 0
    others = [0, 1, 3]
    np.testing.assert_allclose(np.sqrt((found**2).mean(axis=0))[others], true[others], rtol=0.12)
    assert true[0] < 0.85 * np.mean(unpaired)


def group(hits) -> np.ndarray:
    return as_good_as_best(hits.mean(axis=1), by_fold(hits, 0), hits.shape[1])


def test_the_truly_best_is_kept_however_many_are_as_good():
    rng = np.random.default_rng(6)
    for number in (2, 8):
        accuracies = np.array([0.8] * number + [0.7])
        kept = np.mean([group(simulated_hits(rng, accuracies, 640)) for _ in range(300)], axis=0)
        assert 0.93 < kept[:number].mean() < 0.995 and kept[number] < 0.03


def test_few_images_are_not_certain():
    hits = np.stack([np.ones(40), np.ones(40), np.arange(40) > 0]).astype(bool)
    few = by_fold(hits[:, :31], 0)
    assert difference_errors(few, 31, 0).tolist() == [0, math.inf, math.inf]
    assert group(hits[:, :31]).all()
    assert difference_errors(by_fold(hits, 0), 40, 0)[1] == 1 / 40 and group(hits).all()


# --- estimates.json


def written(images=100, known=True) -> dict:
    rng = np.random.default_rng(7)
    archs = RESNET48_MINI.sample_distinct(rng, 3)
    counts = Counts.zeros(3)
    hits = rng.random((3, images)) < 0.7
    top1 = hits.sum(axis=1)
    counts.add(Counts(top1, top1, 0 * top1, 0 * top1, images, by_fold(hits, 0)))
    agreement = Agreement(0.9, 0.8, 0.95) if known else None
    return estimates(archs, counts, agreement, 500)


@pytest.mark.parametrize("known", [True, False])
def test_estimates_are_read_as_they_were_written(known, tmp_path):
    content = written(known=known)
    (tmp_path / "estimates.json").write_text(json.dumps(content))
    found = read_estimates(tmp_path / "estimates.json")
    entries = content["architectures"]
    assert found.images == 100
    assert found.codes == tuple(entry["arch"] for entry in entries.values())
    assert found.accuracy.tolist() == [entry["acc"] for entry in entries.values()]
    assert found.error.tolist() == [entry["se"] for entry in entries.values()]
    assert found.agreement == (Agreement(0.9, 0.8, 0.95) if known else None)
    assert found.of_images == 500 and found.folds.shape == (3, FOLDS)


def changed(**changes):
    """The first architecture's entry with other values."""

    def change(content):
        next(iter(content["architectures"].values())).update(changes)

    return change


MINI = {"backbone": "resnet48_mini", "image_size": 32, "num_classes": 10}
SIXTEEN = "1 " * 15 + "1"
BROKEN = {  # what becomes of the content, words of the error
    "of an earlier version": (
        lambda c: [entry.pop("folds") for entry in c["architectures"].values()], "'folds' is miss"),
    "half an agreement": (lambda c: c["agreement"].update(low=None), "not an estimates.json"),
    "an agreement of 2": (lambda c: c["agreement"].update(tau=2), "from -1 to 1"),
    "NaN": (lambda c: c["agreement"].update(tau=math.nan), "from -1 to 1"),
    "an agreement with fewer": (lambda c: c["agreement"].update(images=99), "no number of images"),
    "no images": (lambda c: c.update(images=0), "no number of images"),
    "true images": (lambda c: c.update(images=True), "no number of images"),
    "too many images": (lambda c: [part.update(images=2**52) for part in (c, c["agreement"])],
                        "do not add up"),
    "an agreement of 1e400": (lambda c: c["agreement"].update(tau=10**400), "too large"),
    "an unknown network": (
        lambda c: c.update(network=MINI | {"backbone": "x" * 10**6}), "its network is none"),
    "a network of 1e400 px": (
        lambda c: c.update(network=MINI | {"image_size": 10**400}), "its network is none"),
    "half a network": (lambda c: c.update(network={"backbone": "resnet48"}), "size' is missing"),
    "no architectures": (lambda c: c.update(architectures={}), "no architectures"),
    "a list": (lambda c: c.update(architectures=[1]), "not an estimates.json"),
    "an error of text": (changed(se="0.1"), "from 0 to 1"),
    "an error of NaN": (changed(se=math.nan), "from 0 to 1"),
    "another accuracy": (changed(acc=0.5001), "do not add up"),
    "an accuracy of text": (changed(acc="0.5"), "do not add up"),
    "folds of a list": (changed(folds=[1] * 16), "not an estimates.json"),
    "15 folds": (changed(folds=SIXTEEN[2:]), "16 whole numbers"),
    "a fold of another script": (changed(folds=SIXTEEN.replace("1", "١", 1)), "16 whole"),
    "a huge fold": (changed(folds=SIXTEEN + "0" * 30), "16 whole numbers"),
    "a fold above its images": (changed(folds=SIXTEEN + "0"), "more hits than images"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_estimates_are_not_believed(case, tmp_path):
    change, words = BROKEN[case]
    content = written()
    change(content)
    path = tmp_path / "estimates.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as error:
        read_estimates(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300
