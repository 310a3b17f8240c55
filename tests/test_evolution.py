"""What a search proposes: laws of regularized evolution, budgets, and that it finds something."""

import numpy as np
import pytest
from conftest import option_ranks
from hypothesis import given
from hypothesis import strategies as st

from hnas.base.errors import UserError
from hnas.evaluation.evolution import Budget, Evolution, crossed, mutated
from hnas.search_space import FULL_DIGITS, RELEASED_DIGITS, RESNET48, RESNET48_MINI, search_space

SPACE = RESNET48_MINI
ANY = Budget(SPACE, 32, 10, {})


def evolution(budget=ANY, seed=0, population=20, children=10, tournament=5):
    return Evolution(budget, seed, population, children, tournament)


def choices_of(arch, digits):
    """Every choice of a code by its name, read by position."""
    ranks = option_ranks([arch.code], digits)
    return {name: int(chosen[0]) for name, (_, chosen) in ranks.items() if len(chosen)}


@given(
    seed=st.integers(0, 2**32 - 1),
    full=st.booleans(),
    backbone=st.sampled_from(["resnet48", "resnet48_mini"]),
)
def test_a_mutation_changes_one_choice(seed, full, backbone):
    space = search_space(backbone, "full" if full else "released")
    digits = FULL_DIGITS if full else RELEASED_DIGITS
    rng = np.random.default_rng(seed)
    parent = space.sample(rng)
    child = mutated(space, parent, rng)
    space.shared_plan(child)
    before, after = choices_of(parent, digits), choices_of(child, digits)
    changed = [name for name in before if name in after and before[name] != after[name]]
    assert len(changed) == 1
    for name, (options, chosen) in option_ranks([child.code], digits).items():
        assert ((chosen >= 0) & (chosen < options)).all(), name
    # Blocks come and go with the depth only.
    if set(before) != set(after):
        assert changed[0].startswith("depth")


def test_every_choice_and_option_is_reached():
    rng = np.random.default_rng(0)
    parent = SPACE.largest()
    found = [mutated(SPACE, parent, rng).code for _ in range(4000)]
    ranks = option_ranks(found, RELEASED_DIGITS)
    for name, (options, chosen) in ranks.items():
        assert set(chosen.tolist()) == set(range(options)), name
    # 4 depths, 4 outputs and 23 inner widths, all as likely.
    depths = sum(
        int((chosen != options - 1).sum())
        for name, (options, chosen) in ranks.items()
        if name.startswith("depth")
    )
    assert depths / 4000 == pytest.approx(4 / 31, abs=4 * (4 / 31 / 4000) ** 0.5)


def test_proposals_are_new_within_the_budget_and_the_seeds():
    macs = [SPACE.macs(SPACE.sample(np.random.default_rng(i)), 32, 10) for i in range(50)]
    budget = Budget(SPACE, 32, 10, {"macs": np.quantile(macs, 0.2), "params": 1.2e6})
    runs = []
    for seed in (0, 0, 1):
        scored = []
        for generation in range(4):
            accuracy = np.array([SPACE.params(arch, 10) for arch in scored], float)
            scored += evolution(budget, seed).propose(scored, accuracy, generation)
        runs.append(scored)
    assert runs[0] == runs[1] != runs[2]
    for scored in runs:
        assert len(scored) == 20 + 3 * 10
        assert len({SPACE.plan(arch) for arch in scored}) == len(scored)
        for arch in scored:
            assert SPACE.macs(arch, 32, 10) <= np.quantile(macs, 0.2)
            assert SPACE.params(arch, 10) <= 1.2e6


def test_networks_of_equal_channels_are_scored_once():
    """Of 64 channels, 1.0 and 0.95 are both 64 in multiples of 8."""
    archs = evolution(Budget(RESNET48, 224, 1000, {}), population=200).propose([], np.zeros(0), 0)
    assert len({RESNET48.plan(arch) for arch in archs}) == 200


@given(seed=st.integers(0, 2**32 - 1))
def test_a_child_of_two_has_every_choice_from_one_of_them(seed):
    rng = np.random.default_rng(seed)
    one, other = SPACE.sample(rng), SPACE.sample(rng)
    child = crossed(SPACE, one, other, rng)
    SPACE.shared_plan(child)
    parents = [choices_of(arch, RELEASED_DIGITS) for arch in (one, other)]
    for name, option in choices_of(child, RELEASED_DIGITS).items():
        assert option in [own[name] for own in parents if name in own], name
    assert crossed(SPACE, one, one, rng) == one


def test_parents_are_the_best_of_the_living_only():
    rng = np.random.default_rng(3)
    old = [SPACE.sample(rng) for _ in range(30)]
    scored = [*old, *(SPACE.sample(rng) for _ in range(20))]
    # Of 50, the last 20 live; all are drawn for the tournament; number 41 is the best of them.
    accuracy = np.concatenate([np.full(30, 0.9), np.full(20, 0.1)])
    accuracy[41] = 0.5
    for child in evolution(tournament=20).propose(scored, accuracy, 1):
        before = choices_of(scored[41], RELEASED_DIGITS)
        after = choices_of(child, RELEASED_DIGITS)
        assert sum(before[n] != after[n] for n in before if n in after) == 1


def test_evolution_beats_random_search():
    """Where widths and depths add up, within a budget; the same first draws, the same number."""
    budget = Budget(SPACE, 32, 10, {"macs": 4.9e6})
    differences = []
    for seed in range(5):
        best = []
        for population, generations in ((20, 14), (160, 0)):
            scored, accuracy = [], np.zeros(0)
            for generation in range(generations + 1):
                own = evolution(budget, seed, population)
                scored += own.propose(scored, accuracy, generation)
                accuracy = np.array([score(arch) for arch in scored])
            assert len(scored) == 160
            best.append(accuracy.max())
        differences.append(best[0] - best[1])
    differences = np.array(differences)
    assert differences.mean() > 2 * differences.std(ddof=1) / len(differences) ** 0.5


def score(arch):
    """Depth helps as its root, width of the early stages more than that of the late ones."""
    inner = sum(
        np.mean([1 - c1 / 10 for c1, _ in blocks]) / (stage + 1)
        for stage, blocks in enumerate(arch.widths)
    )
    outer = sum(1 - blocks[0][1] / 10 for blocks in arch.widths[:2])
    return inner + outer + np.sqrt(arch.depths).sum() / 2


def test_a_budget_that_leaves_few_or_none():
    smallest = SPACE.smallest()
    macs = SPACE.macs(smallest, 32, 10)
    tight = evolution(Budget(SPACE, 32, 10, {"macs": macs}), population=5)
    assert tight.propose([], np.zeros(0), 0) == [smallest]
    assert tight.propose([smallest], np.ones(1), 1) == []
    with pytest.raises(UserError, match="no architecture is within 1,000 MACs, 50 parameters"):
        evolution(Budget(SPACE, 32, 10, {"macs": 1e3, "params": 50})).propose([], np.zeros(0), 0)
