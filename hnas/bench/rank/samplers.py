"""Samplers of the ranking bench alone; the launchers' are in ``hnas/utils/SampleMethod.py``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hnas.search_space import Architecture, SearchSpace, choice_probabilities
from hnas.utils.SampleMethod import RandomSampler


@dataclass(frozen=True)
class StratifiedSampler:
    """As :class:`RandomSampler`, with a step's sub-networks spread evenly over every choice.

    For each choice the step's ``number`` sub-networks take, in a random order, one draw from each
    of ``number`` equally likely parts of the distribution (stratified sampling; Latin hypercube
    sampling over all choices: McKay et al., Technometrics, 1979). Each sub-network by itself is
    distributed as without it, but no step has large or small options only.
    """

    space: SearchSpace
    seed: int
    number: int
    tilt: float = 0.0

    def sample(self, epoch: int, step: int) -> list[Architecture]:
        return [self.draw(epoch, step, place) for place in range(self.number)]

    def draw(self, epoch: int, step: int, place: int) -> Architecture:
        """The sub-network at a place (from 0) of a step."""

        def choose(options: int, *choice: int) -> int:
            rng = np.random.default_rng((self.seed, epoch, step, 0, *choice))
            part, within = rng.permutation(self.number)[place], rng.random(self.number)[place]
            shares = np.cumsum(choice_probabilities(options, self.tilt))
            # The last sum may be a little less than 1.
            return int(np.searchsorted(shares[:-1], (part + within) / self.number, "right"))

        return self.space.compose(choose)


@dataclass(frozen=True)
class AnnealedSampler:
    """As :class:`RandomSampler`, with a tilt that goes linearly over an epoch's ``steps``."""

    space: SearchSpace
    seed: int
    number: int
    start: float
    end: float
    steps: int

    def sample(self, epoch: int, step: int) -> list[Architecture]:
        share = min(1.0, step / max(1, self.steps - 1))
        tilt = self.start + share * (self.end - self.start)
        return RandomSampler(self.space, self.seed, self.number, tilt).sample(epoch, step)
