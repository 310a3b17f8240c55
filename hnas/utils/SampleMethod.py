"""Which sub-networks to train next: samplers with one method that gives a step's architectures."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from hnas.base.errors import UserError
from hnas.programs.options import Options
from hnas.search_space import CONVOLUTION_SIZES, Architecture, Candidates, SearchSpace

logger = logging.getLogger(__name__)


class Sampler(Protocol):
    """Chooses sub-networks. The choice depends on the seed and the arguments only."""

    def sample(self, epoch: int, step: int) -> list[Architecture]:
        """The sub-networks of a step of an epoch (both from 0)."""


@dataclass(frozen=True)
class FixedSampler:
    """Always the same network, ``number`` times."""

    arch: Architecture
    number: int = 1

    def sample(self, epoch: int, step: int) -> list[Architecture]:
        return [self.arch] * self.number


@dataclass(frozen=True)
class RandomSampler:
    """Uniform: every choice (four depths, an output width a stage, an inner one a block) alone."""

    space: SearchSpace
    seed: int
    number: int = 1

    def sample(self, epoch: int, step: int) -> list[Architecture]:
        draws = ((self.seed, epoch, step, index) for index in range(self.number))
        return [self.space.sample(np.random.default_rng(draw)) for draw in draws]


@dataclass(frozen=True)
class SandwichSampler:
    """The largest, the smallest, then uniform ones (Yu & Huang, ICCV 2019)."""

    space: SearchSpace
    seed: int
    number: int = 4

    def sample(self, epoch: int, step: int) -> list[Architecture]:
        uniform = RandomSampler(self.space, self.seed, self.number).sample(epoch, step)
        return [self.space.largest(), self.space.smallest(), *uniform[2:]][: self.number]


@dataclass(frozen=True)
class FairSampler:
    """Every option of every choice equally often (after Chu et al., FairNAS, ICCV 2021).

    For each choice of :class:`RandomSampler` the sub-networks of a step go through the options in
    a random order, and again in another one when all had their turn. With as many sub-networks a
    step as a choice has options, each step trains every option exactly once.
    """

    space: SearchSpace
    seed: int
    number: int = 4

    def sample(self, epoch: int, step: int) -> list[Architecture]:
        def turn(index: int, options: int, *choice: int) -> int:
            turns, place = divmod(index, options)
            rng = np.random.default_rng((self.seed, epoch, step, *choice, turns))
            return int(rng.permutation(options)[place])

        return [self.space.compose(partial(turn, index)) for index in range(self.number)]


@dataclass(frozen=True)
class FirstPlaceSampler:
    """The law of the first place of CVPR 2022 NAS Track 1: the largest of many candidates.

    A step draws ``candidates`` sub-networks uniformly and trains the ``number`` largest by
    ``weighted_channels``, and in every step whose number is divisible by ``extra_every`` (0:
    never) one more, uniform. So it prefers deep networks and leaves their widths alone.
    """

    space: SearchSpace
    seed: int
    number: int = 4
    candidates: int = 400
    extra_every: int = 3

    def sample(self, epoch: int, step: int) -> list[Architecture]:
        rng = np.random.default_rng((self.seed, epoch, step))
        # One candidate more, which is for the extra network whether this step has it or not.
        drawn = self.space.sample_many(rng, self.candidates + 1)
        sizes = candidate_sizes(drawn)[: self.candidates]
        chosen = largest_distinct(sizes, self.number)
        if self.extra_every and step % self.extra_every == 0:
            chosen.append(self.candidates)
        return [drawn.architecture(index) for index in chosen]


def candidate_sizes(candidates: Candidates) -> np.ndarray:
    """:func:`hnas.search_space.weighted_channels` of many architectures [n]."""
    stage, block = candidates.blocks
    inner = CONVOLUTION_SIZES[stage, candidates.inner - 1]  # [n, blocks]
    outer = CONVOLUTION_SIZES[stage, candidates.outer[:, stage] - 1]
    present = block < candidates.depths[:, stage]
    stem = CONVOLUTION_SIZES[0, candidates.outer[:, 0] - 1]
    return stem + ((inner + outer) * present).sum(axis=1)


def largest_distinct(sizes: np.ndarray, number: int) -> list[int]:
    """Indices of the ``number`` largest sizes, largest first.

    Of equal sizes the latest counts, and the others only where there are too few different ones.
    """
    latest = {size: index for index, size in enumerate(sizes.tolist())}
    first_choice = [latest[size] == index for index, size in enumerate(sizes.tolist())]
    order = np.lexsort((np.arange(len(sizes)), sizes, first_choice))[::-1]
    return order[:number].tolist()


METHODS = {"random": RandomSampler, "sandwich": SandwichSampler, "fair": FairSampler}


def build_sampler(options: Options, space: SearchSpace, seed: int) -> Sampler:
    """The sampler that ``sample_method``, ``bias_sample_flag`` and their kin describe.

    Raises:
        UserError: unknown method, or fewer candidates than are chosen from them.
    """
    method, number = options.sample_method, options.dyna_batch_size
    if method not in METHODS:
        raise UserError(
            f"unknown sample_method {method!r}; there are {', '.join(METHODS)}, and the first "
            "place's bias toward large: random with --bias_sample_flag True"
        )
    if method == "sandwich" and number < 2:
        raise UserError(
            f"--sample_method sandwich --dyna_batch_size {number}: the largest and the smallest "
            "network are two already"
        )
    if options.bias_sample_flag and method != "random":
        logger.warning("--bias_sample_flag has no effect with --sample_method %s", method)
    elif options.bias_sample_flag:
        candidates = options.stage1_sample_num
        if candidates < number:
            raise UserError(
                f"--stage1_sample_num {candidates} is fewer than --dyna_batch_size {number}, "
                "which are chosen from them"
            )
        return FirstPlaceSampler(space, seed, number, candidates, options.extra_random_every)
    return METHODS[method](space, seed, number)
