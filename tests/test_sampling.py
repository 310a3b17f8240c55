"""Samplers: what they depend on, and how strongly they favour large sub-networks."""

import hashlib
import itertools

import numpy as np
import pytest
from conftest import assert_uniform, option_ranks
from independent import first_place_size

from hnas.base.errors import UserError
from hnas.programs.options import Options
from hnas.search_space import SearchSpace, weighted_channels
from hnas.utils.SampleMethod import FirstPlaceSampler, build_sampler, largest_distinct

SPACE = SearchSpace()
NUMBER = 2000


def sampler_of(method, seed=3, number=1, **flags):
    options = Options(sample_method=method, dyna_batch_size=number, **flags)
    return build_sampler(options, SPACE, seed)


METHODS = {
    # the start of a digest of what is drawn: a run that is resumed by a later version goes on alike
    "random": ({}, "501c1de59fd25194"),
    "random with bias": ({"bias_sample_flag": True}, "222128d7cf84a8f5"),
    "sandwich": ({}, "07de4e1c0d6a55fe"),
    "fair": ({}, "7b705da5dbbff916"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_choice_depends_on_its_seed_and_place_only(name):
    method, (flags, _) = name.partition(" ")[0], METHODS[name]
    flags = {**flags, "extra_random_every": 0}
    places = list(itertools.product(range(3), range(3), range(3)))
    sampler = {seed: sampler_of(method, seed, 5, **flags) for seed in range(3)}
    archs = {place: sampler[place[0]].sample(*place[1:]) for place in places}
    # Changing any of seed, epoch and step, or swapping two, changes the architectures, and those
    # of a step differ.
    fixed = 2 if method == "sandwich" else 0
    drawn = [arch for own in archs.values() for arch in own[fixed:]]
    assert len(set(drawn)) == len(drawn) == len(places) * (5 - fixed)

    # Neither the order of calls, nor the global generator, nor the sampler's past matters.
    np.random.seed(0)
    for seed, epoch, step in reversed(places):
        again = sampler_of(method, seed, 5, **flags).sample(epoch, step)
        assert again == archs[seed, epoch, step]


@pytest.mark.parametrize("name", METHODS)
def test_draws_stay_as_they_were(name):
    method, (flags, digest) = name.partition(" ")[0], METHODS[name]
    sampler = sampler_of(method, 7, 4, **flags)
    places = [(0, 0), (4, 1000), (1, 1)]
    codes = " ".join(arch.code for place in places for arch in sampler.sample(*place))
    assert hashlib.sha256(codes.encode()).hexdigest().startswith(digest)


def kept_by_a_loop(codes, keep=4):
    """What the first place's loop keeps of its candidates: a table by size, filled one by one."""
    table = {}
    for code in codes:
        table[first_place_size(code)] = code
        if len(table) > keep:
            del table[min(table)]
    return [table[size] for size in sorted(table, reverse=True)]


def test_a_step_trains_what_the_first_places_loop_keeps_of_uniform_candidates():
    sampler, archs = FirstPlaceSampler(SPACE, 4, extra_every=0), []
    for step in range(5):
        drawn = SPACE.sample_many(np.random.default_rng((4, 0, step)), 401)
        archs += (own := [drawn.architecture(index) for index in range(400)])
        codes = [arch.code for arch in own]
        assert [weighted_channels(arch) for arch in own] == [first_place_size(c) for c in codes]
        assert [arch.code for arch in sampler.sample(0, step)] == kept_by_a_loop(codes)
        SPACE.shared_plan(own[0])
    assert_uniform(archs)


def test_means_of_the_law_are_those_that_were_read_from_the_public_code():
    sampler = FirstPlaceSampler(SPACE, 0)
    archs = [arch for step in range(600) for arch in sampler.sample(0, step)]
    depths = np.mean([arch.depths for arch in archs], axis=0)
    np.testing.assert_allclose(depths, [4.44, 4.53, 7.66, 4.75], atol=0.1)
    digits = [np.mean([d for a in archs for d, _ in a.widths[stage]]) for stage in range(4)]
    np.testing.assert_allclose(digits, [2.02, 1.98, 2.93, 3.83], atol=0.06)
    assert np.mean([SPACE.macs(arch) for arch in archs]) == pytest.approx(4.18e9, rel=0.015)
    kept = [weighted_channels(arch) for step in range(600) for arch in sampler.sample(0, step)[:4]]
    assert np.mean(kept) == pytest.approx(3982, rel=0.005)


def test_some_steps_train_one_more_which_is_uniform_and_does_not_move_the_others():
    def steps(every):
        sampler = FirstPlaceSampler(SPACE, 5, extra_every=every, candidates=20)
        return [sampler.sample(0, step) for step in range(1500)]

    without, some, all_have = map(steps, (0, 3, 1))
    assert [len(own) for own in without] == [4] * 1500
    assert [len(own) - 4 for own in some] == [step % 3 == 0 for step in range(1500)]
    assert [own[:4] for own in all_have] == [own[:4] for own in some] == without
    assert_uniform(own[4] for own in all_have)


@pytest.mark.parametrize(
    ("sizes", "number", "expected"),
    [
        ([32, 24, 32, 16], 3, [2, 1, 3]),  # of equal sizes the latest, one of each size
        ([32, 24, 32, 16], 4, [2, 1, 3, 0]),  # until there are no others
        ([8, 8, 8], 2, [2, 1]),
    ],
)
def test_ties(sizes, number, expected):
    assert largest_distinct(np.array(sizes), number) == expected


def test_random_is_uniform_as_the_released_list_is():
    sampler = sampler_of("random")
    archs = [arch for step in range(NUMBER) for arch in sampler.sample(0, step)]
    assert_uniform(archs)
    macs = np.array([SPACE.macs(arch) for arch in archs])
    # The mean of the released 45,000.
    assert abs(macs.mean() - 2.971e9) < 4 * macs.std() / np.sqrt(len(macs))


def test_sandwich_is_largest_smallest_then_uniform():
    sampler = sampler_of("sandwich", 0, number=4)
    steps = [sampler.sample(epoch, step) for epoch in range(2) for step in range(150)]
    assert {tuple(own[:2]) for own in steps} == {(SPACE.largest(), SPACE.smallest())}
    rest = [arch for own in steps for arch in own[2:]]
    assert len(set(rest)) == len(rest) == 600
    assert_uniform(rest)


@pytest.mark.parametrize("step", range(5))
def test_fair_trains_every_option_once_a_step(step):
    """A step of 420 sub-networks is a multiple of every choice's options: 3, 4, 5 and 7."""
    codes = [str(arch) for arch in sampler_of("fair", number=420).sample(1, step)]
    for options in (3, 4, 5, 7):
        choices = option_ranks(codes[:options])
        for choice, (number, ranks) in choices.items():
            # Blocks that not all of them have are seen less often.
            if number == options and not choice.startswith("inner"):
                assert sorted(ranks) == list(range(options)), choice
    for choice, (options, ranks) in option_ranks(codes).items():
        counts = np.bincount(ranks, minlength=options)
        if choice.startswith("inner") and not choice.endswith((".1", ".2")):
            assert counts.min() > 0, choice
        else:
            assert (counts == 420 / options).all(), choice


def test_fair_orders_are_random_and_independent_of_each_other():
    steps = [sampler_of("fair", 0, number=4).sample(0, step) for step in range(600)]
    assert_uniform(own[0] for own in steps)
    ranks = option_ranks([str(own[0]) for own in steps])
    later = option_ranks([str(own[3]) for own in steps])
    # Choices with as many options do not move together, nor do a step's turns.
    for other in (ranks["output width 2"], later["output width 1"]):
        same = (ranks["output width 1"][1] == other[1]).mean()
        assert abs(same - 1 / 3) < 4 * np.sqrt(2 / 9 / 600)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_method": "evolution"}, "'evolution'; there are random, sandwich, fair, and"),
        ({"sample_method": "sandwich", "dyna_batch_size": 1}, "and the smallest network are two"),
        ({"sample_method": "sandwich", "dyna_batch_size": 0}, "and the smallest network are two"),
        (
            {"bias_sample_flag": True, "stage1_sample_num": 3},
            "--stage1_sample_num 3 is fewer than --dyna_batch_size 4",
        ),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        build_sampler(Options(**settings), SPACE, 0)


def test_a_flag_without_effect_is_named(caplog):
    sampler_of("fair", bias_sample_flag=True)
    assert "--bias_sample_flag has no effect with --sample_method fair" in caplog.text
