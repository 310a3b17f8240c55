"""The ranking bench's own samplers: how evenly they spread, and how they change in training."""

import numpy as np
import pytest
from conftest import law, option_ranks
from scipy.stats import chisquare

from hnas.bench.rank.samplers import AnnealedSampler, StratifiedSampler
from hnas.search_space import RELEASED_DIGITS, SearchSpace
from hnas.utils.SampleMethod import RandomSampler

SPACE = SearchSpace()


@pytest.mark.parametrize(("number", "b"), [(4, 0.0), (4, 1.0), (3, -2.0), (1, 1.0)])
def test_stratified_spreads_a_step_over_every_choice(number, b):
    sampler = StratifiedSampler(SPACE, 5, number, b)
    steps = [list(map(str, sampler.sample(1, step))) for step in range(400)]
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


def test_annealed_goes_from_one_tilt_to_the_other():
    number, steps = 400, 5
    sampler = AnnealedSampler(SPACE, 1, number, 2.0, -1.0, steps)
    for step, b in enumerate((2.0, 1.25, 0.5, -0.25, -1.0)):
        codes = list(map(str, sampler.sample(0, step)))
        for choice, (options, ranks) in option_ranks(codes, RELEASED_DIGITS).items():
            counts = np.bincount(ranks, minlength=options)
            assert chisquare(counts, law(options, b) * len(ranks)).pvalue > 1e-4, (step, choice)
    annealed = AnnealedSampler(SPACE, 1, 3, 2.0, -1.0, 1)
    assert annealed.sample(0, 0) == RandomSampler(SPACE, 1, 3, tilt=2.0).sample(0, 0)
