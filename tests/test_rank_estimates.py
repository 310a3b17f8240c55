"""The ranking bench's estimates and their errors, against SciPy's, formulas and made-up worlds."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from hnas.bench.rank import coverage, estimates
from hnas.bench.rank.estimates import STATISTICS, subsets

SCIPY = {
    "kendall_tau_b": lambda x, y: stats.kendalltau(x, y).statistic,
    "pearson": lambda x, y: stats.pearsonr(x, y).statistic,
    "spearman": lambda x, y: stats.spearmanr(x, y).statistic,
}


def drawn(seed, seeds, number, ties=False):
    """Scores [seeds, number] and a truth [number] that go together."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(number)
    scores = truth + rng.standard_normal((seeds, number))
    return (np.rint(2 * scores), np.rint(3 * truth)) if ties else (scores, truth)


@pytest.mark.parametrize("name", STATISTICS)
def test_correlations_within_subsets_are_scipys(name):
    (scores,), truth = drawn(0, 1, 9, ties=True)
    masks = subsets(9)
    left_out = [set(), *({i} for i in range(9)), *map(set, combinations(range(9), 2))]
    assert [set(np.flatnonzero(mask == 0)) for mask in masks] == left_out
    found = STATISTICS[name].within(masks, scores, truth)
    expected = [SCIPY[name](scores[mask > 0], truth[mask > 0]) for mask in masks]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_what_is_not_defined_is_none_and_not_a_number():
    constant = np.ones((2, 9))
    _, truth = drawn(1, 1, 9)
    for statistic in STATISTICS.values():
        values = estimates.within(statistic, constant, truth)
        found = estimates.interval(values, 9)
        found |= estimates.difference(statistic, values, values, 9)
        found |= estimates.corrected_interval(statistic, values, np.ones(46), 9)
        assert set(found.values()) == {None}
    # Without reliability there is nothing to correct by.
    scores, truth = drawn(1, 2, 9)
    values = estimates.within(STATISTICS["pearson"], scores, truth)
    assert estimates.interval(values, 9)["low"] is not None
    found = estimates.corrected_interval(STATISTICS["pearson"], values, np.full(46, -0.1), 9)
    assert set(found.values()) == {None}
    few = estimates.interval(values[:, :22], estimates.FEWEST - 1)
    assert few["value"] is not None and few["low"] is None


def test_reliability_is_that_of_an_analysis_of_variance():
    rng = np.random.default_rng(2)
    acc = rng.standard_normal(7) + 0.5 * rng.standard_normal((4, 7)) + rng.standard_normal((4, 1))
    masks = subsets(7)
    found = estimates.reliability(masks, acc)
    for mask, share in zip(masks, found, strict=True):
        own = acc[:, mask > 0]
        seeds, number = own.shape
        rows, columns = own.mean(axis=1, keepdims=True), own.mean(axis=0, keepdims=True)
        noise = ((own - rows - columns + own.mean()) ** 2).sum() / (seeds - 1) / (number - 1)
        between = seeds * ((columns - own.mean()) ** 2).sum() / (number - 1)
        assert share == pytest.approx(1 - noise / between)
    assert np.isnan(estimates.reliability(masks, acc[:1])).all()


def test_the_kernel_of_tau_is_whether_pairs_agree():
    scores, truth = drawn(3, 2, 10)
    found = estimates._kernel(estimates.within(STATISTICS["kendall_tau_b"], scores, truth), 10)
    for kernel, own in zip(found, scores, strict=True):
        signs = np.sign(own[:, None] - own) * np.sign(truth[:, None] - truth)
        np.testing.assert_allclose(kernel, signs, atol=1e-9)


@pytest.mark.parametrize("linear", [0.0, 1.0])
def test_the_variance_over_pairs_is_right_on_average(linear):
    """Of the mean over pairs of a x_i + a x_j + x_i x_j, whose variance is known."""
    rng, number = np.random.default_rng(4), 8
    x = rng.standard_normal((20000, number))
    kernel = linear * (x[:, :, None] + x[:, None, :]) + x[:, :, None] * x[:, None, :]
    kernel[:, np.arange(number), np.arange(number)] = 0
    expected = 4 * linear**2 / number + 2 / (number * (number - 1))
    found = estimates._unbiased(kernel)
    error = found.std() / np.sqrt(len(x))
    assert found.mean() == pytest.approx(expected, abs=4 * error)
    assert 4 * error < 0.15 * expected


def test_variances_of_two_crossed_factors_are_told_apart():
    """Means, for which all is known: the parts of an analysis of variance."""
    rng, seeds, number = np.random.default_rng(5), 6, 12
    table = rng.standard_normal(number) + 0.7 * rng.standard_normal((seeds, 1))
    table += 0.5 * rng.standard_normal((seeds, number))
    masks = subsets(number)
    values = table @ masks.T / masks.sum(axis=1)
    found = estimates.variance(values, number, corrected=False)
    rows, columns = table.mean(axis=1), table.mean(axis=0)
    left = table - rows[:, None] - columns + table.mean()
    both = (left**2).sum() / (seeds - 1) / (number - 1) / (seeds * number)
    assert found.architectures == pytest.approx(columns.var(ddof=1) / number)
    assert found.seeds == pytest.approx(rows.var(ddof=1) / seeds - both)
    # A mean depends on architectures one by one, so the correction takes nothing off.
    again = estimates.variance(values, number, corrected=True)
    assert again.architectures == pytest.approx(found.architectures)
    assert estimates.variance(values[:1], number, corrected=False).seeds == 0


def test_one_supernet_and_many_equal_ones_have_no_error_over_seeds():
    scores, truth = drawn(6, 1, 20)
    values = estimates.within(STATISTICS["kendall_tau_b"], scores, truth)
    one, many = (estimates.interval(own, 20) for own in (values, np.repeat(values, 4, axis=0)))
    assert one.pop("seeds") is None and many.pop("seeds") == 0 and one == pytest.approx(many)
    same = estimates.difference(STATISTICS["kendall_tau_b"], values, values, 20)
    assert same["value"] == same["low"] == same["high"] == 0 and same["p"] == 1


def test_a_difference_is_over_the_seeds_in_common():
    scores, truth = drawn(7, 8, 20)
    own, other = (
        estimates.within(STATISTICS["kendall_tau_b"], part, truth)
        for part in (scores, scores[::-1][:5] ** 3)
    )
    statistic = STATISTICS["kendall_tau_b"]
    found = estimates.difference(statistic, own, other, 20)
    taus = [stats.kendalltau(row, truth).statistic for row in scores]
    assert found["value"] == pytest.approx(np.mean(taus[:5]) - np.mean(taus[3:]))
    assert found["low"] < found["value"] < found["high"] and 0 < found["p"] < 1
    turned = estimates.difference(statistic, other, own, 20)
    assert turned["p"] == pytest.approx(found["p"]) and turned["low"] == -found["high"]


def test_an_interval_of_a_difference_ends_where_correlations_do():
    """One of two supernets ranks upside down, so the spread says nothing."""
    truth = np.random.default_rng(8).standard_normal((6, 12)) * 0.01 + np.arange(12)
    statistic = STATISTICS["kendall_tau_b"]
    own, other = (
        estimates.within(statistic, np.stack([np.arange(12), sign * np.arange(12)]), truth.mean(0))
        for sign in (1, -1)
    )
    found = estimates.difference(statistic, own, other, 12)
    assert found["value"] == pytest.approx(1) and (found["low"], found["high"]) == (-2, 2)
    assert 0.3 < found["p"] < 0.7


def test_holm_is_as_in_the_paper():
    p = {"a": 0.01, "b": None, "c": 0.04, "d": 0.03, "e": 0.005}
    expected = {"a": 0.03, "b": None, "c": 0.06, "d": 0.06, "e": 0.02}
    assert estimates.holm(p) == pytest.approx(expected)
    assert estimates.holm({"a": 0.7, "b": 0.6}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_taus_of_a_made_up_world_are_those_of_normal_values():
    world = replace(coverage.ANNOUNCED, preference=0.0, seeds=2)
    found = coverage.expected(world, np.random.default_rng(0), 400)["kendall_tau_b"]
    for index, (deviation, noise) in enumerate(zip(world.deviation, world.noise, strict=True)):
        spread = 1 + deviation**2 + noise**2
        for column, truth in enumerate((1 + world.truth_noise**2 / 8, 1)):
            tau = 2 / np.pi * np.arcsin(1 / np.sqrt(spread * truth))
            assert found[index, column] == pytest.approx(tau, abs=0.012)


def test_intervals_hold_as_often_as_they_say():
    """A fast version of the committed study, whose bounds are wider for its 150 trials."""
    world = coverage.WORLDS["as announced, 5 seeds"]
    found = coverage.coverage(world, trials=150, draws=600, seed=3)
    for kind in ("correlation", "corrected", "difference"):
        assert 0.90 <= found["kendall_tau_b"][kind] <= 0.99, kind
    assert found["pearson"]["difference"] >= 0.88 <= found["spearman"]["difference"]


def test_the_study_writes_every_world(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(coverage, "WORLDS", {"small": replace(coverage.ANNOUNCED, seeds=2)})
    coverage.main(["--out", str(tmp_path / "coverage.json"), "--trials", "2"])
    assert set(capsys.readouterr().out.split('"')[1::2]) >= {"small", "difference"}
    assert (tmp_path / "coverage.json").is_file()
