"""The ranking bench's estimates and their errors, against SciPy's, formulas and made-up worlds."""

import numpy as np
import pytest
from scipy import stats

from hnas.bench.rank import estimates
from hnas.bench.rank.estimates import tau_kernel
from hnas.bench.rank.verdict import FEWEST


def drawn(seed, seeds, number, ties=False):
    """Scores [seeds, number] and a truth [number] that go together."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(number)
    scores = truth + rng.standard_normal((seeds, number))
    return (np.rint(2 * scores), np.rint(3 * truth)) if ties else (scores, truth)


def kernels_of(scores, truth):
    return np.stack([tau_kernel(own, truth) for own in scores])


def tau(x, y):
    return stats.kendalltau(x, y).statistic


@pytest.mark.parametrize("ties", [False, True])
def test_the_mean_over_pairs_is_scipys_tau_and_its_variance_the_jackknifes(ties):
    """Of taus without each architecture; with ties tau is linearised, so roughly."""
    scores, truth = drawn(0, 5, 30, ties)
    for own in scores:
        kernel = tau_kernel(own, truth)
        assert kernel.sum() / (30 * 29) == pytest.approx(tau(own, truth))
        assert (kernel == kernel.T).all() and not kernel.diagonal().any()
        without = [tau(np.delete(own, i), np.delete(truth, i)) for i in range(30)]
        expected = 29 / 30 * ((without - np.mean(without)) ** 2).sum()
        (found,) = estimates.over_architectures(kernel[None], corrected=False)
        assert found == pytest.approx(expected, rel=0.06 if ties else 1e-9)


@pytest.mark.parametrize("linear", [0.5, 1.0])
def test_the_corrected_variance_is_right_on_average(linear):
    """Of the mean over pairs of a x_i + a x_j + x_i x_j, whose variance is known."""
    rng, number = np.random.default_rng(4), 12
    x = rng.standard_normal((20000, number))
    kernel = linear * (x[:, :, None] + x[:, None, :]) + x[:, :, None] * x[:, None, :]
    kernel[:, np.arange(number), np.arange(number)] = 0
    expected = 4 * linear**2 / number + 2 / (number * (number - 1))
    found = estimates.over_architectures(kernel, corrected=True)
    assert found.mean() == pytest.approx(expected, rel=0.05)
    assert estimates.over_architectures(kernel, corrected=False).mean() > 1.02 * expected


def test_variances_of_two_crossed_factors_are_told_apart():
    """Means, for which all is known: the parts of an analysis of variance."""
    rng, seeds, number = np.random.default_rng(5), 6, 12
    table = rng.standard_normal(number) + 0.7 * rng.standard_normal((seeds, 1))
    table += 0.5 * rng.standard_normal((seeds, number))
    kernels = (table[:, :, None] + table[:, None, :]) / 2
    kernels[:, np.arange(number), np.arange(number)] = 0
    rows, columns = table.mean(axis=1), table.mean(axis=0)
    left = table - rows[:, None] - columns + table.mean()
    both = (left**2).sum() / (seeds - 1) / (number - 1) / (seeds * number)
    architectures, own = columns.var(ddof=1) / number, rows.var(ddof=1) / seeds - both
    deviation, freedom = estimates.standard_error(kernels, corrected=False)
    assert deviation**2 == pytest.approx(architectures + own, rel=1e-6)
    parts = architectures**2 / (number - 1) + (rows.var(ddof=1) / seeds) ** 2 / (seeds - 1)
    assert freedom == pytest.approx((architectures + own) ** 2 / parts, rel=1e-6)


def test_what_is_not_defined_is_none_and_not_a_number():
    _, truth = drawn(1, 1, 9)
    constant = kernels_of(np.ones((2, 9)), truth)
    found = estimates.interval(constant) | estimates.difference(constant, constant)
    assert set(found.values()) == {None}
    nothing = np.zeros((0, 9, 9))
    assert set(estimates.difference(nothing, nothing).values()) == {None}
    few = estimates.FEWEST - 1
    scores, truth = drawn(1, 2, few)
    found = estimates.interval(kernels_of(scores, truth))
    assert found["value"] is not None and found["low"] is None
    perfect = estimates.interval(tau_kernel(truth, truth)[None])
    assert perfect == {"value": 1.0, "low": None, "high": None}


def test_one_supernet_and_many_equal_ones_have_no_error_over_seeds():
    scores, truth = drawn(6, 1, 20)
    one = kernels_of(scores, truth)
    many = np.repeat(one, 4, axis=0)
    assert estimates.interval(one) == pytest.approx(estimates.interval(many))
    same = estimates.difference(one, many)
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_differences_are_paired_and_symmetric():
    scores, truth = drawn(7, 5, 20)
    own, other = kernels_of(scores, truth), kernels_of(scores[::-1] ** 3, truth)
    found, turned = estimates.difference(own[:3], other[:3]), estimates.difference(other, own)
    taus = [tau(row, truth) for row in scores]
    assert found["value"] == pytest.approx(np.mean(taus[:3]) - np.mean(taus[2:]))
    assert found["low"] < found["value"] < found["high"] and 0 < found["p"] <= 1
    back = estimates.difference(own, other)
    assert turned["p"] == pytest.approx(back["p"]) and turned["low"] == -back["high"]
    # One of two supernets ranks upside down, so the spread says nothing.
    order = np.arange(12)
    good, broken = kernels_of([order, order], order), kernels_of([order, -order], order)
    found = estimates.difference(good, broken)
    assert found["value"] == pytest.approx(1) and (found["low"], found["high"]) == (-2, 2)


def test_shares_have_exact_intervals():
    low, high = stats.beta.ppf([0.025, 0.975], [3, 4], [6, 5])
    expected = {"value": 3 / 8, "low": low, "high": high}
    assert estimates.share(3, 8) == pytest.approx(expected)


@pytest.mark.parametrize(("seeds", "breaks"), [(5, 0.0), (8, 0.15)])
def test_intervals_hold_as_often_as_they_say(seeds, breaks):
    """Normal qualities, two methods with deviations of their own; what broke is left out."""
    rng, number = np.random.default_rng(3), 32
    deviations, noises = (0.3, 0.35), (0.3, 0.4)
    # Tau of normal values that correlate so; the truth's noise is half of its single trainings'.
    correlations = [
        1 / np.sqrt((1 + d**2 + n**2) * 1.0625) for d, n in zip(deviations, noises, strict=True)
    ]
    taus = 2 / np.pi * np.arcsin(correlations)
    held = {"tau": [], "difference": []}
    for _ in range(200):
        quality, both = rng.standard_normal((2, number))
        truth = quality + 0.25 * rng.standard_normal(number)
        same = rng.standard_normal((seeds, number))
        trained = rng.random((2, seeds)) >= breaks
        kernels = []
        for d, n in zip(deviations, noises, strict=True):
            own = np.sqrt([0.7, 0.3]) @ [both, rng.standard_normal(number)]
            single = np.sqrt(0.5) * (same + rng.standard_normal((seeds, number)))
            kernels.append(kernels_of(np.rint(20 * (quality + d * own + n * single)), truth))
        both_trained = [kernels[0][trained.all(axis=0)], kernels[1][trained.all(axis=0)]]
        found = estimates.interval(kernels[0][trained[0]])
        held["tau"].append(found["low"] <= taus[0] <= found["high"])
        if len(both_trained[0]) >= FEWEST:
            found = estimates.difference(*both_trained)
            held["difference"].append(found["low"] <= taus[0] - taus[1] <= found["high"])
    assert all(0.91 <= np.mean(told) <= 0.99 and len(told) > 180 for told in held.values()), held
