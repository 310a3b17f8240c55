"""Where ranking errors come from, on architectures whose errors are made by hand."""

import math

import numpy as np
import pytest
from conftest import option_ranks

from hnas.ranking.breakdown import DISCRETE, attribute, by_option, choices
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
            "mean_error": 5.0,
            "standard_error": None,
            "mean_absolute_error": 5.0,
        },
        {
            "option": 3.0,
            "architectures": 3,
            "mean_error": 2.0,
            "standard_error": pytest.approx(3 / math.sqrt(3)),
            "mean_absolute_error": pytest.approx(8 / 3),
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
