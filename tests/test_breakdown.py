"""Where ranking errors come from, on architectures whose errors are made by hand."""

import math

import numpy as np
import pytest
from conftest import option_ranks
from scipy import stats

from hnas.ranking.breakdown import (
    DISCRETE,
    attribute,
    by_option,
    choices,
    holm,
    student_two_sided,
)
from hnas.search_space import RATIOS, RESNET48, Architecture

CODE = "1" + "2345" + "2" + "1232000000" + "232323" + "0000" + "5141" * 2 + "0" * 8 + "7464546474"


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


def test_choices_follow_the_codes_digits(archs):
    ranks = option_ranks([arch.code for arch in archs], RESNET48.max_digits)
    found = choices(archs)
    assert len(found) == 12 and set(DISCRETE) <= set(found)
    for stage in range(1, 5):
        assert (found[f"depth {stage}"] - 2).tolist() == ranks[f"depth {stage}"][1].tolist()
        options, chosen = ranks[f"output width {stage}"]
        expected = [100 * RATIOS[options - rank - 1] for rank in chosen]
        np.testing.assert_allclose(found[f"output width {stage}"], expected)


def test_errors_by_option_by_hand():
    rows = by_option(np.array([3.0, 2, 3, 3]), np.array([-1.0, 5, 2, 5]))
    assert rows == [
        {
            "option": 2.0,
            "architectures": 1,
            "mean": 5.0,
            "standard_error": None,
            "mean_absolute": 5.0,
        },
        {
            "option": 3.0,
            "architectures": 3,
            "mean": 2.0,
            "standard_error": pytest.approx(3 / math.sqrt(3)),
            "mean_absolute": pytest.approx(8 / 3),
        },
    ]


def test_attribution_finds_the_choice_that_made_the_errors(archs):
    chosen = choices(archs)
    noise = np.random.default_rng(1).normal(size=len(archs))
    errors = 4 * (chosen["depth 3"] - 2) - 0.5 * chosen["output width 4"] + noise
    found = attribute(chosen, errors)
    # From 2 to 8 blocks, and from 70 to 100 % of the width.
    assert found.effect["depth 3"] == pytest.approx(24, abs=1.5)
    assert found.effect["output width 4"] == pytest.approx(-15, abs=1.5)
    others = set(chosen) - {"depth 3", "output width 4"}
    assert all(abs(found.effect[name]) < 4 * found.standard_error[name] for name in others)
    assert found.explained > 0.95
    expected = np.corrcoef(chosen["depth 3"], errors)[0, 1]
    assert found.correlation["depth 3"] == pytest.approx(expected)


def test_attribution_is_ordinary_least_squares(archs):
    chosen = choices(archs)
    errors = np.random.default_rng(2).normal(size=len(archs))
    design = np.stack([np.ones(len(archs)), *chosen.values()], axis=1)
    normal = design.T @ design
    beta = np.linalg.solve(normal, design.T @ errors)
    residual = errors - design @ beta
    variance = residual @ residual / (len(archs) - design.shape[1])
    deviation = np.sqrt(variance * np.diag(np.linalg.inv(normal)))
    spans = np.array([values.max() - values.min() for values in chosen.values()])
    found = attribute(chosen, errors)
    np.testing.assert_allclose(list(found.effect.values()), beta[1:] * spans, rtol=1e-6)
    np.testing.assert_allclose(
        list(found.standard_error.values()), deviation[1:] * spans, rtol=1e-6
    )
    assert found.explained == pytest.approx(max(0, 1 - variance / errors.var(ddof=1)))


def test_few_architectures_and_constant_choices(archs):
    few = attribute(choices(archs[:5]), np.array([1.0, -1, 2, -2, 0]))
    assert math.isnan(few.explained) and all(map(math.isnan, few.standard_error.values()))
    assert all(map(math.isfinite, few.effect.values()))
    same = attribute({"depth 1": np.ones(5)}, np.arange(5.0))
    assert same.effect == {} and math.isnan(same.explained)
    perfect = attribute(choices(archs), np.zeros(len(archs)))
    assert math.isnan(perfect.explained) and not any(perfect.effect.values())


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 17, 187, 44_988])
def test_students_t_is_scipys(freedom):
    t = np.array([0, 0.01, 0.5, 1, 2, 2.5, 4, 6, 40, math.inf])
    expected = 2 * stats.t.sf(t, freedom)
    np.testing.assert_allclose(student_two_sided(t, freedom), expected, atol=2e-12)
    assert math.isnan(student_two_sided(np.array([math.nan]), freedom)[0])


def test_holms_correction_by_hand():
    found = holm(np.array([0.04, 0.01, 0.03, 0.5]))
    np.testing.assert_allclose(found, [0.09, 0.04, 0.09, 0.5])
    np.testing.assert_allclose(holm(np.array([0.6, 0.4])), [0.8, 0.8])


def test_p_values_are_those_of_ordinary_least_squares(archs):
    chosen = choices(archs)
    errors = np.random.default_rng(5).normal(size=len(archs)) + 0.3 * chosen["depth 3"]
    found = attribute(chosen, errors)
    t = np.array([found.effect[name] / found.standard_error[name] for name in chosen])
    raw = 2 * stats.t.sf(abs(t), len(archs) - 13)
    np.testing.assert_allclose(list(found.p_value.values()), holm(raw), atol=1e-9)
    assert found.clear() == ["depth 3"]


def test_chance_alone_is_seldom_called_an_effect(archs):
    """At two standard errors, as it was, 45 % of such reports named a culprit."""
    chosen, rng = choices(archs), np.random.default_rng(6)
    named = two_errors = 0
    for _ in range(200):
        found = attribute(chosen, rng.normal(size=len(archs)))
        named += bool(found.clear())
        two_errors += any(abs(found.effect[n]) > 2 * found.standard_error[n] for n in chosen)
    assert named <= 0.1 * 200 < 0.3 * 200 < two_errors
