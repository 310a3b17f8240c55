"""Samplers: what they depend on, and how strongly they favour large sub-networks."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import option_ranks
from scipy.stats import chisquare

from hnas.base.errors import UserError
from hnas.search_space import RELEASED_DIGITS, SearchSpace
from hnas.utils.options import Stage, parse_options
from hnas.utils.SampleMethod import (
    AnnealedSampler,
    LargestSampler,
    StratifiedSampler,
    build_sampler,
)

ROOT = Path(__file__).parents[1]
SPACE = SearchSpace()
WIDTHS = [[64, 64, 56], [128, 120, 112], [256, 240, 232, 216, 208]]
WIDTHS += [[512, 488, 464, 432, 408, 384, 360]]
NUMBER = 2000


def sample(method, number=NUMBER, seed=3, bias_strength=2.0, bias=False):
    """Sub-networks of ``number`` steps."""
    sampler = build_sampler(method, SPACE, seed, bias_strength, bias)
    return [sampler.sample(0, step, 0) for step in range(number)]


def law(options, b):
    """Probabilities of options k = 0 (small) .. n - 1, proportional to exp(b k / (n - 1))."""
    weights = [np.exp(b * k / (options - 1)) for k in range(options)]
    return np.array(weights) / sum(weights)


def expected_macs(b):
    """Exact mean MACs at 224 px: choices are independent, so means of products are products."""
    # Expected channels of each stage; small first, as the law has them.
    channel = [law(len(widths), b) @ widths[::-1] for widths in WIDTHS]
    total = 112**2 * 3 * 49 * channel[0] + 1000 * channel[3]
    for stage, (side, deepest) in enumerate(zip((56, 28, 14, 7), (5, 5, 8, 5), strict=True)):
        width, previous = channel[stage], channel[max(stage - 1, 0)]
        first = 9 * previous * width + 9 * width * width
        if stage:
            first += previous * width
        blocks_after_first = law(deepest - 1, b) @ np.arange(1, deepest)
        total += side**2 * (first + blocks_after_first * 18 * width * width)
    return total


@pytest.mark.parametrize("method", ["random", "biased", "sandwich", "fair"])
def test_a_choice_depends_on_its_seed_and_place_only(method):
    places = list(itertools.product(range(3), range(3), range(3), range(2, 5)))
    sampler = {seed: build_sampler(method, SPACE, seed, 2.0) for seed in range(3)}
    archs = {place: sampler[place[0]].sample(*place[1:]) for place in places}
    # Changing any of seed, epoch, step and index, or swapping two, changes the architecture.
    assert len(set(archs.values())) == len(places)

    # Neither the order of calls, nor the global generator, nor the sampler's past matters.
    np.random.seed(0)
    for seed, epoch, step, index in reversed(places):
        again = build_sampler(method, SPACE, seed, 2.0).sample(epoch, step, index)
        assert again == archs[seed, epoch, step, index]


def test_a_fresh_process_draws_the_same():
    places = [(0, 0, 0), (4, 1000, 3), (1, 0, 2)]
    program = (
        "from hnas.search_space import SearchSpace\n"
        "from hnas.utils.SampleMethod import build_sampler\n"
        "sampler = build_sampler('biased', SearchSpace(), 7, 2.0)\n"
        f"print(*[sampler.sample(*place) for place in {places}])\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    sampler = build_sampler("biased", SPACE, 7, 2.0)
    assert output.split() == [sampler.sample(*place).code for place in places]


@pytest.mark.parametrize(
    ("method", "bias", "strength", "b"),
    [
        ("random", False, 2.0, 0.0),
        ("random", True, 2.0, 2.0),
        ("biased", False, 2.0, 2.0),
        ("biased", True, -1.0, -1.0),
    ],
)
def test_frequencies_follow_the_documented_law(method, bias, strength, b):
    archs = sample(method, bias_strength=strength, bias=bias)
    for choice, (options, ranks) in option_ranks(map(str, archs), RELEASED_DIGITS).items():
        counts = np.bincount(ranks, minlength=options)
        assert chisquare(counts, law(options, b) * len(ranks)).pvalue > 1e-4, choice


@pytest.mark.parametrize(("method", "b"), [("random", 0.0), ("biased", 2.0)])
def test_mean_macs_equal_the_exact_expectation(method, b):
    macs = np.array([SPACE.macs(arch) for arch in sample(method)])
    standard_error = macs.std() / np.sqrt(len(macs))
    assert abs(macs.mean() - expected_macs(b)) < 4 * standard_error


def test_bias_shifts_the_mean_macs_well_up():
    # The released 45,000 were drawn uniformly: 2.971 GMAC, of which this is the expectation.
    assert expected_macs(0.0) == pytest.approx(2.971e9, rel=0.005)
    assert expected_macs(2.0) > 1.2 * expected_macs(0.0)
    uniform, biased = (
        np.mean([SPACE.macs(arch) for arch in sample(method, 500)])
        for method in ("random", "biased")
    )
    assert biased > 1.2 * uniform


def test_sandwich_is_largest_smallest_then_random():
    sampler = build_sampler("sandwich", SPACE, 0, 2.0)
    for epoch, step in itertools.product(range(2), range(3)):
        assert sampler.sample(epoch, step, 0) == SPACE.largest()
        assert sampler.sample(epoch, step, 1) == SPACE.smallest()
    rest = [sampler.sample(0, step, index) for step in range(300) for index in (2, 3)]
    assert len(set(rest)) == len(rest)
    tilted = build_sampler("sandwich", SPACE, 0, 2.0, bias=True)
    for archs, b in (
        (rest, 0.0),
        ([tilted.sample(0, step, index) for step in range(300) for index in (2, 3)], 2.0),
    ):
        ranks = option_ranks(map(str, archs), RELEASED_DIGITS)
        counts = np.bincount(ranks["depth 3"][1], minlength=7)
        assert chisquare(counts, law(7, b) * len(archs)).pvalue > 1e-4


@pytest.mark.parametrize("step", range(5))
def test_fair_trains_every_option_once_a_step(step):
    """A step of 420 sub-networks is a multiple of every choice's options: 3, 4, 5 and 7."""
    sampler = build_sampler("fair", SPACE, 3, 2.0)
    codes = [str(sampler.sample(1, step, index)) for index in range(420)]
    for options in (3, 4, 5, 7):
        choices = option_ranks(codes[:options], RELEASED_DIGITS)
        for choice, (number, ranks) in choices.items():
            # Blocks that not all of them have are seen less often.
            if number == options and not choice.startswith("inner"):
                assert sorted(ranks) == list(range(options)), choice
    for choice, (options, ranks) in option_ranks(codes, RELEASED_DIGITS).items():
        counts = np.bincount(ranks, minlength=options)
        if choice.startswith("inner") and not choice.endswith((".1", ".2")):
            assert counts.min() > 0, choice
        else:
            assert (counts == 420 / options).all(), choice


def test_fair_orders_are_random_and_independent_of_each_other():
    sampler = build_sampler("fair", SPACE, 0, 2.0)
    codes = [str(sampler.sample(0, step, 0)) for step in range(600)]
    ranks = option_ranks(codes, RELEASED_DIGITS)
    for choice, (options, chosen) in ranks.items():
        counts = np.bincount(chosen, minlength=options)
        assert chisquare(counts).pvalue > 1e-4, choice
    # Choices with as many options do not move together, nor do a step's turns.
    same = (ranks["output width 1"][1] == ranks["output width 2"][1]).mean()
    assert abs(same - 1 / 3) < 4 * np.sqrt(2 / 9 / 600)
    later = [str(sampler.sample(0, step, 3)) for step in range(600)]
    again = option_ranks(later, RELEASED_DIGITS)["output width 1"][1]
    assert abs((again == ranks["output width 1"][1]).mean() - 1 / 3) < 4 * np.sqrt(2 / 9 / 600)


@pytest.mark.parametrize(("number", "b"), [(4, 0.0), (4, 1.0), (3, -2.0), (1, 1.0)])
def test_stratified_spreads_a_step_over_every_choice(number, b):
    sampler = StratifiedSampler(SPACE, 5, number, b)
    steps = [[str(sampler.sample(1, step, i)) for i in range(number)] for step in range(400)]
    for codes in steps[:40]:
        for choice, (options, ranks) in option_ranks(codes, RELEASED_DIGITS).items():
            if len(ranks) < number:  # a block that not all of them have
                continue
            below = np.searchsorted(sorted(ranks), range(1, options))
            expected = number * np.cumsum(law(options, b))[:-1]
            assert (np.abs(below - expected) < 1).all(), choice
    # Each of a step's sub-networks follows the law by itself.
    for index in {0, number - 1}:
        codes = [step[index] for step in steps]
        for choice, (options, ranks) in option_ranks(codes, RELEASED_DIGITS).items():
            counts = np.bincount(ranks, minlength=options)
            assert chisquare(counts, law(options, b) * len(ranks)).pvalue > 1e-4, choice
    ranks = option_ranks([step[0] for step in steps], RELEASED_DIGITS)
    one, other = (np.array(ranks[f"output width {stage}"][1]) for stage in (1, 2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(len(steps))
    # More sub-networks than the sampler was made for begin another round.
    assert sampler.sample(0, 0, number) != sampler.sample(0, 0, 0)


def test_annealed_goes_from_one_tilt_to_the_other():
    number, steps = 400, 5
    sampler = AnnealedSampler(SPACE, 1, 2.0, -1.0, steps)
    for step, b in enumerate((2.0, 1.25, 0.5, -0.25, -1.0)):
        codes = [str(sampler.sample(0, step, index)) for index in range(number)]
        for choice, (options, ranks) in option_ranks(codes, RELEASED_DIGITS).items():
            counts = np.bincount(ranks, minlength=options)
            assert chisquare(counts, law(options, b) * len(ranks)).pvalue > 1e-4, (step, choice)
    assert AnnealedSampler(SPACE, 1, 2.0, -1.0, 1).sample(0, 0, 0) == build_sampler(
        "biased", SPACE, 1, 2.0
    ).sample(0, 0, 0)


def test_largest_sampler():
    sampler = LargestSampler(SPACE)
    assert {sampler.sample(0, step, index) for step in range(3) for index in range(3)} == {
        SPACE.largest()
    }


def test_unknown_method_names_the_known_ones():
    with pytest.raises(UserError, match="'evolution'; there are random, biased, sandwich, fair"):
        build_sampler("evolution", SPACE, 0, 2.0)


def test_a_huge_bias_strength_is_refused_or_gives_the_largest():
    try:
        options = parse_options(Stage.DISTILL, ["run", "--bias_strength", "1000"])
    except UserError:
        return
    sampler = build_sampler("biased", SPACE, 0, options.bias_strength)
    assert sampler.sample(0, 0, 0) == SPACE.largest()
