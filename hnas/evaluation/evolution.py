"""Regularized evolution over a search space, a generation of children at a time.

Real et al., "Regularized Evolution for Image Classifier Architecture Search", AAAI 2019
(arXiv:1802.01548), Algorithm 1: the living are those that were scored last; a parent is the best
of a few living ones drawn at random; its child differs from it in one choice; the oldest die.

Two things differ. Several children are made before any of them is scored: one walk scores many for
less. And half of them have two parents, as in Guo et al. (ECCV 2020, arXiv:1904.00420).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hnas.base.errors import UserError
from hnas.ranking.costs import UNITS, LatencyTable, costs_of
from hnas.search_space import MIN_DEPTH, Architecture, SearchSpace

TWO_PARENTS = 0.5
"""Share of the children."""
PATIENCE = 100
"""Attempts at a new architecture before they become bolder."""
BOLDEST = 12
"""Steps of boldness before there is taken to be none left."""


@dataclass(frozen=True)
class Budget:
    """What an architecture may cost."""

    space: SearchSpace
    image_size: int  # px
    num_classes: int
    limits: Mapping[str, float]  # the most of each kind of ``UNITS``, or of some
    latency: LatencyTable | None = None  # needed to limit it

    def costs(self, archs: Iterable[Architecture]) -> dict[str, np.ndarray]:
        """As :func:`costs_of` has them."""
        return costs_of(archs, self.space, self.image_size, self.num_classes, self.latency)

    def allows(self, arch: Architecture) -> bool:
        """Whether ``arch`` costs at most the limits."""
        costs = self.costs([arch])
        return all(costs[kind][0] <= most for kind, most in self.limits.items())

    def __str__(self) -> str:
        asked = (f"{most:,.10g} {UNITS[kind]}" for kind, most in self.limits.items())
        return ", ".join(asked) or "no limit"


@dataclass(frozen=True)
class Evolution:
    """What to score next, as a function of the seed and of what was scored."""

    budget: Budget
    seed: int
    population: int  # drawn uniformly at first, and alive at a time
    children: int  # of a generation
    tournament: int  # living ones, drawn without replacement, of which the best is a parent

    def propose(
        self, scored: Sequence[Architecture], accuracy: np.ndarray, generation: int
    ) -> list[Architecture]:
        """The architectures of a generation: new ones, no two with the same channel counts.

        Args:
            scored: in the order of their generations.
            accuracy: of these [n].
            generation: from 0. Where no others are found, it has fewer than it should, or none.

        Raises:
            UserError: no architecture keeps to the budget.
        """
        rng = np.random.default_rng((self.seed, generation))
        space = self.budget.space
        known = {space.plan(arch) for arch in scored}
        living = range(max(0, len(scored) - self.population), len(scored))

        def first(boldness: int) -> Architecture:
            # The tilt finds small ones where a budget leaves few others.
            return space.sample(rng, tilt=-4.0 * boldness)

        def parent() -> Architecture:
            drawn = rng.choice(living, min(self.tournament, len(living)), replace=False)
            return scored[drawn[np.argmax(accuracy[drawn])]]

        def child(boldness: int) -> Architecture:
            made = parent()
            if rng.random() < TWO_PARENTS:
                made = crossed(space, made, parent(), rng)
            for _ in range(1 + boldness):
                made = mutated(space, made, rng)
            return made

        make, number = (child, self.children) if generation else (first, self.population)
        made: list[Architecture] = []
        for boldness in range(BOLDEST + 1):
            attempts = PATIENCE
            while attempts and len(made) < number:
                arch, attempts = make(boldness), attempts - 1
                plan = space.plan(arch)
                if plan not in known and self.budget.allows(arch):
                    known.add(plan)
                    made.append(arch)
                    attempts = PATIENCE
        if not generation and not made:
            smallest = self.budget.costs([space.smallest()])
            least = (f"{cost:,.10g} {UNITS[kind]}" for kind, (cost,) in smallest.items())
            raise UserError(
                f"no architecture is within {self.budget}; the smallest of the space takes "
                f"{', '.join(least)}"
            )
        return made


def mutated(space: SearchSpace, arch: Architecture, rng: np.random.Generator) -> Architecture:
    """``arch`` with another option of one of its choices, drawn uniformly.

    Blocks that a greater depth adds get uniform inner widths.
    """
    choices = [(stage, n) for stage, depth in enumerate(arch.depths) for n in range(depth + 2)]
    changed = choices[rng.integers(len(choices))]

    def choose(options: int, stage: int, what: int) -> int:
        kept = _option(space, arch, stage, what)
        if kept is None:
            return int(rng.integers(options))
        if (stage, what) == changed and options > 1:
            other = int(rng.integers(options - 1))
            return other + (other >= kept)
        return kept

    return space.compose(choose)


def crossed(
    space: SearchSpace, one: Architecture, other: Architecture, rng: np.random.Generator
) -> Architecture:
    """Each choice from one of two architectures, both as likely; from the one that has it."""

    def choose(options: int, stage: int, what: int) -> int:
        found = [_option(space, arch, stage, what) for arch in (one, other)]
        # A depth is one of the two, so a block is there in one of them at least.
        kept = [option for option in found if option is not None]
        return kept[rng.integers(len(kept))]

    return space.compose(choose)


def _option(space: SearchSpace, arch: Architecture, stage: int, what: int) -> int | None:
    """What ``arch`` has chosen, as :meth:`SearchSpace.compose` counts; None: no such block."""
    if what == 0:
        return arch.depths[stage] - MIN_DEPTH
    blocks = arch.widths[stage]
    if what == 1:
        return space.max_digits[stage] - blocks[0][1]
    return space.max_digits[stage] - blocks[what - 2][0] if what - 2 < len(blocks) else None
