"""Ranking statistics, and where errors come from: by definition, SciPy and hand."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from hnas.ranking.correlations import (
    CORRELATIONS,
    bootstrap_interval,
    kendall_tau_b,
    pearson,
    rank_errors,
    regret,
    with_ties,
)
from hnas.ranking.effects import attribute, choices, holm, largest_effect
from hnas.search_space import RESNET48, Architecture

CODE = "1" + "2345" + "2" + "1232000000" + "232323" + "0000" + "5141" * 2 + "0" * 8 + "7464546474"

# Few distinct values, so that ties are common.
SMALL = st.integers(-3, 3).map(float)
PAIRS = st.lists(st.tuples(SMALL, SMALL), min_size=2, max_size=12).map(
    lambda pairs: np.array(pairs).T
)
EVERY = pytest.mark.parametrize("statistic", CORRELATIONS.values(), ids=CORRELATIONS)


def tau_by_definition(x, y):
    """Over all pairs, one by one."""
    score = in_x = in_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        score, in_x, in_y = score + a * b, in_x + a * a, in_y + b * b
    return score / math.sqrt(in_x * in_y) if in_x * in_y else math.nan


# --- correlations


@given(PAIRS)
def test_tau_is_its_definition(pair):
    np.testing.assert_allclose(kendall_tau_b(*pair), tau_by_definition(*pair), atol=1e-12)


@given(PAIRS)
def test_pearson_is_scipys(pair):
    assume(all(len(set(values)) > 1 for values in pair))
    assert pearson(*pair) == pytest.approx(stats.pearsonr(*pair).statistic, abs=1e-12)


RNG = np.random.default_rng(3)
HITS, TENTHS = RNG.integers(300, 340, 200), np.arange(30) // 3 / 10
PARTS = np.array([RNG.multivariate_hypergeometric([71] * 5, hits) for hits in HITS])
TIES = {  # accuracies, each worked out in two ways
    "of five parts": (HITS / 355, (PARTS / 71).mean(axis=1)),
    "in percent": (HITS / 355, (PARTS / 0.71).mean(axis=1)),
    "near in chains": (TENTHS, TENTHS + np.arange(30) % 3 * 6e-10),
    "at steps' borders": (HITS / 1024, HITS / 1024 * (1 + 2e-16 * RNG.integers(-1, 2, 200))),
}


@pytest.mark.parametrize("case", TIES)
def test_what_only_rounding_tells_apart_is_a_tie(case):
    one, other = TIES[case]
    assert (one != other).any()
    assert kendall_tau_b(one, other) == pytest.approx(1, abs=1e-12)
    assert bootstrap_interval(kendall_tau_b, one, other, 0, 20) == pytest.approx((1, 1), abs=1e-12)
    assert not rank_errors(one, other).any() and regret(one, other) == 0


def test_scores_of_any_scale_are_told_apart():
    for scale in (1e-300, 1e-12, 1, 100, 1e300):
        values = np.linspace(-1, 1, 21) * scale
        assert with_ties(values).tolist() == values.tolist()
    assert with_ties([]).tolist() == []


@EVERY
@pytest.mark.parametrize(
    "pair",
    [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2]), ([1], [1]), ([1, 1 + 4e-16, 1], [1, 2, 3])],
)
def test_constant_lists_have_no_correlation(statistic, pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(statistic(*pair))
        assert all(math.isnan(end) for end in bootstrap_interval(statistic, *pair, 0, 20))


def test_extreme_numbers_do_not_overflow():
    x = np.array([1.0, 2.0, 3.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1e300, 1e-300, 5e307, 5e-324):
            assert pearson(x * scale, x) == pytest.approx(1.0)


@EVERY
def test_lists_that_are_a_mistake(statistic):
    with pytest.raises(ValueError, match="one length"):
        statistic([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="finite"):
        statistic([1, math.nan, 3], [1, 2, 3])


# --- intervals


@EVERY
def test_bootstrap_is_the_quantiles_of_resampled_statistics(statistic):
    rng = np.random.default_rng(1)
    x = rng.normal(size=30)
    y = x + rng.normal(size=30)
    draws = np.random.default_rng(5)
    resampled = []
    for _ in range(200):
        index = draws.integers(0, 30, 30)
        resampled.append(statistic(x[index], y[index]))
    expected = np.percentile(resampled, [2.5, 97.5])
    found = bootstrap_interval(statistic, x, y, 5, resamples=200)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] < statistic(x, y) < found[1]


def test_an_interval_of_few_architectures_leaves_constant_resamples_out():
    low, high = bootstrap_interval(kendall_tau_b, [1, 2, 3], [1, 2, 3], 0, resamples=200)
    assert (low, high) == pytest.approx((1.0, 1.0))


# --- ranks


@given(PAIRS)
def test_regret_is_that_of_the_worst_of_the_predicted_best(pair):
    pred, gt = pair
    lost = [max(gt) - true for guess, true in zip(pred, gt, strict=True) if guess == max(pred)]
    assert regret(pred, gt) == max(lost)


def test_rank_errors_are_positive_where_ranked_too_high_and_equal_values_share_their_rank():
    assert rank_errors([0.9, 0.5, 0.1], [1, 2, 3]).tolist() == [2, 0, -2]
    assert rank_errors([0.9, 0.9, 0.1], [1, 2, 3]).tolist() == [1.5, 0.5, -2]


# --- where errors come from


@pytest.fixture(scope="module")
def archs():
    return list(RESNET48.sample_distinct(np.random.default_rng(0), 200).values())


def test_choices_of_one_code_by_hand():
    found = {name: values[0] for name, values in choices([Architecture.from_code(CODE)]).items()}
    assert found == {
        "depth 1": 2, "depth 2": 3, "depth 3": 4, "depth 4": 5,
        "output width 1": 95, "output width 2": 90, "output width 3": 100, "output width 4": 85,
        "inner width 1": 95, "inner width 2": 95, "inner width 3": 82.5, "inner width 4": 74,
    }  # fmt: skip


def test_attribution_is_ordinary_least_squares(archs):
    chosen = choices(archs)
    noise = np.random.default_rng(2).normal(size=len(archs))
    errors = 4 * (chosen["depth 3"] - 2) - 0.5 * chosen["output width 4"] + 3 * noise
    design = np.stack([np.ones(len(archs)), *chosen.values()], axis=1)
    normal = design.T @ design
    beta = np.linalg.solve(normal, design.T @ errors)
    residual = errors - design @ beta
    variance = residual @ residual / (len(archs) - design.shape[1])
    deviation = np.sqrt(variance * np.diag(np.linalg.inv(normal)))
    spans = np.array([values.max() - values.min() for values in chosen.values()])
    found = attribute(chosen, errors)

    def column(name):
        return [row[name] for row in found["choices"].values()]

    np.testing.assert_allclose(column("effect"), beta[1:] * spans, rtol=1e-6)
    np.testing.assert_allclose(column("standard_error"), deviation[1:] * spans, rtol=1e-6)
    raw = 2 * stats.t.sf(abs(beta / deviation)[1:], len(archs) - 13)
    np.testing.assert_allclose(column("p_value"), holm(raw), atol=1e-9)
    assert found["explained"] == pytest.approx(max(0, 1 - variance / errors.var(ddof=1)))
    # From 2 to 8 blocks, and from 70 to 100 % of the width: what made the errors.
    what, deep, _ = largest_effect(found)
    assert what == "depth of stage 3" and deep == pytest.approx(24, abs=4)
    wide = found["choices"]["output width 4"]
    assert wide["effect"] == pytest.approx(-15, abs=4) and wide["p_value"] < 0.05


def test_few_architectures_and_constant_choices(archs):
    few = attribute(choices(archs[:5]), np.array([1.0, -1, 2, -2, 0]))
    assert few["explained"] is largest_effect(few) is None
    for row in few["choices"].values():
        assert row["standard_error"] is row["p_value"] is None and math.isfinite(row["effect"])
    nothing = {"explained": None, "choices": {}}
    assert attribute({"depth 1": np.ones(5)}, np.arange(5.0)) == nothing
    perfect = attribute(choices(archs), np.zeros(len(archs)))
    assert perfect["explained"] is None
    assert not any(row["effect"] for row in perfect["choices"].values())


def test_holms_correction_by_hand():
    found = holm(np.array([0.04, 0.01, 0.03, 0.5]))
    np.testing.assert_allclose(found, [0.09, 0.04, 0.09, 0.5])
    np.testing.assert_allclose(holm(np.array([0.6, 0.4])), [0.8, 0.8])


def test_chance_alone_is_seldom_called_an_effect(archs):
    """At two standard errors, as it was, 45 % of such reports named a culprit."""
    chosen, rng = choices(archs), np.random.default_rng(6)
    named = two_errors = 0
    for _ in range(200):
        found = attribute(chosen, rng.normal(size=len(archs)))
        named += largest_effect(found) is not None
        rows = found["choices"].values()
        two_errors += any(abs(row["effect"]) > 2 * row["standard_error"] for row in rows)
    assert named <= 0.1 * 200 < 0.3 * 200 < two_errors
