"""Which sub-network to train next: samplers with one method that returns an architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hnas.base.errors import UserError
from hnas.search_space import Architecture, SearchSpace


class Sampler(Protocol):
    """Chooses sub-networks. The choice depends on the seed and the arguments only."""

    def sample(self, epoch: int, step: int, index: int) -> Architecture:
        """The ``index``-th sub-network (from 0) of a step of an epoch (both from 0)."""


@dataclass(frozen=True)
class LargestSampler:
    """Always the largest network."""

    space: SearchSpace

    def sample(self, epoch: int, step: int, index: int) -> Architecture:
        return self.space.largest()


@dataclass(frozen=True)
class RandomSampler:
    """Depths and width digits independent; uniform, or tilted toward large.

    With a ``tilt`` of b, option k of the n options of a choice, from small (k = 0) to large,
    is drawn with a probability proportional to ``exp(b * k / (n - 1))``: the largest depth and
    width are ``exp(b)`` times as likely as the smallest, whatever n is. Every choice (four
    depths, one output width per stage, one inner width per block) is drawn on its own.
    """

    space: SearchSpace
    seed: int
    tilt: float = 0.0

    def sample(self, epoch: int, step: int, index: int) -> Architecture:
        rng = np.random.default_rng((self.seed, epoch, step, index))
        return self.space.sample(rng, self.tilt)


@dataclass(frozen=True)
class SandwichSampler:
    """The largest, the smallest, then random ones (Yu & Huang, ICCV 2019)."""

    space: SearchSpace
    seed: int
    tilt: float = 0.0

    def sample(self, epoch: int, step: int, index: int) -> Architecture:
        if index == 0:
            return self.space.largest()
        if index == 1:
            return self.space.smallest()
        return RandomSampler(self.space, self.seed, self.tilt).sample(epoch, step, index)


@dataclass(frozen=True)
class FairSampler:
    """Every option of every choice equally often (after Chu et al., FairNAS, ICCV 2021).

    For each choice (four depths, one output width per stage, one inner width per block) the
    sub-networks of a step go through the options in a random order, and again in another one when
    all had their turn. With as many sub-networks a step as a choice has options, each step trains
    every option exactly once.
    """

    space: SearchSpace
    seed: int

    def sample(self, epoch: int, step: int, index: int) -> Architecture:
        def turn(options: int, *choice: int) -> int:
            turns, place = divmod(index, options)
            rng = np.random.default_rng((self.seed, epoch, step, *choice, turns))
            return int(rng.permutation(options)[place])

        return self.space.compose(turn)


METHODS = ("random", "biased", "sandwich", "fair")


def build_sampler(
    method: str, space: SearchSpace, seed: int, bias_strength: float, bias: bool = False
) -> Sampler:
    """Build a sampler by the name that the command line uses.

    Args:
        method: ``random`` (uniform), ``biased`` (toward large), ``sandwich`` or ``fair``.
        bias_strength: tilt toward large networks where it is on.
        bias: turn the tilt on for ``random`` (which makes it ``biased``) and for the random
            part of ``sandwich``.

    Raises:
        UserError: unknown method.
    """
    if method not in METHODS:
        raise UserError(f"unknown sample_method {method!r}; there are {', '.join(METHODS)}")
    tilt = bias_strength if bias or method == "biased" else 0.0
    if method == "sandwich":
        return SandwichSampler(space, seed, tilt)
    if method == "fair":
        return FairSampler(space, seed)
    return RandomSampler(space, seed, tilt)
