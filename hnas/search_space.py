"""The ResNet48 search space: architecture codes, channel widths, MACs and parameters.

No other module knows how the digits of a code are laid out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from hnas.base.command_line import shown
from hnas.base.errors import UserError

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
MIN_DEPTH = 2
MAX_DEPTHS = (5, 5, 8, 5)
STAGE_STRIDES = (1, 2, 2, 2)
CODE_LENGTH = 1 + len(MAX_DEPTHS) + 1 + 2 * sum(MAX_DEPTHS)

FULL_DIGITS = (7, 7, 7, 7)
"""Largest width digit of each stage in the full space."""
RELEASED_DIGITS = (3, 3, 5, 7)
"""Largest width digit of each stage in the 45,000 codes that the organisers released."""


@dataclass(frozen=True)
class Architecture:
    """One sub-network, as digits.

    Codes with and without the leading ``1``, of 52 and 51 digits, are the same architecture.
    """

    depths: tuple[int, ...]  # blocks of each of the four stages
    stem: int  # width digit, 1 (full width) to 7 (0.7 of it)
    widths: tuple[tuple[tuple[int, int], ...], ...]  # of each block's two convolutions, by stage
    image_digit: bool = field(default=True, compare=False)  # whether the code has the leading 1

    @classmethod
    def from_code(cls, code: str) -> Architecture:
        """Parse a code of 52 digits, or of 51 without the leading image size digit.

        Raises:
            UserError: naming the offending digit (counted from 1) and what is allowed.
        """
        if not isinstance(code, str):
            raise UserError("architecture code must be a string of digits")
        if not (code.isascii() and code.isdigit()):
            raise UserError(f"architecture code {shown(code)} holds more than digits")
        if len(code) not in (CODE_LENGTH, CODE_LENGTH - 1):
            raise UserError(
                f"architecture code {shown(code)} has {len(code)} digits; "
                f"{CODE_LENGTH} or, without the image size, {CODE_LENGTH - 1} are allowed"
            )
        digits = enumerate(map(int, code), 1)

        def read(what: str, low: int, high: int, allowed: str = "") -> int:
            place, digit = next(digits)
            if not low <= digit <= high:
                raise UserError(
                    f"architecture code {shown(code)}: digit {place} ({what}) is {digit}; "
                    f"allowed: {allowed or f'{low} to {high}'}"
                )
            return digit

        image_digit = len(code) == CODE_LENGTH
        if image_digit:
            read("image size", 1, 1, "1 (224 px)")
        depths = tuple(
            read(f"depth of stage {stage}", MIN_DEPTH, deepest)
            for stage, deepest in enumerate(MAX_DEPTHS, 1)
        )
        stem = read("stem width", 1, len(RATIOS))
        widths = []
        for stage, (depth, deepest) in enumerate(zip(depths, MAX_DEPTHS, strict=True), 1):
            own = [(1, len(RATIOS))] * depth
            none = [(0, 0, f"0, since stage {stage} has {depth} blocks")] * (deepest - depth)
            pairs = [
                tuple(read(f"stage {stage}, block {block}, conv{c}", *allowed) for c in (1, 2))
                for block, allowed in enumerate(own + none, 1)
            ]
            widths.append(tuple(pairs[:depth]))
        return cls(depths, stem, tuple(widths), image_digit)

    @property
    def code(self) -> str:
        """The code as it was read: 52 digits, or 51 when the image size was left out."""
        text = "1" if self.image_digit else ""
        text += "".join(map(str, self.depths)) + str(self.stem)
        for blocks, deepest in zip(self.widths, MAX_DEPTHS, strict=True):
            digits = "".join(f"{conv1}{conv2}" for conv1, conv2 in blocks)
            text += digits.ljust(2 * deepest, "0")
        return text

    def __str__(self) -> str:
        return self.code


@dataclass(frozen=True)
class ChannelPlan:
    """Output channels of one network's convolutions, all that is needed to build it."""

    stem: int
    stages: tuple[tuple[tuple[int, int], ...], ...]  # of each block's two convolutions, by stage

    def blocks(self):
        """Yield ``(stage, cin, mid, cout, stride)`` of every block from stem to head.

        A block needs a 1x1 projection on its shortcut whenever ``cin != cout``.
        """
        cin = self.stem
        for stage, blocks in enumerate(self.stages):
            for index, (mid, cout) in enumerate(blocks):
                yield stage, cin, mid, cout, STAGE_STRIDES[stage] if index == 0 else 1
                cin = cout

    @property
    def out_channels(self) -> int:
        """Input features of the classifier."""
        return self.stages[-1][-1][1]


@dataclass(frozen=True)
class Candidates:
    """Many drawn architectures as arrays."""

    depths: np.ndarray  # blocks of each stage [n, 4]
    outer: np.ndarray  # each stage's width digit of conv2, the first also of the stem [n, 4]
    inner: np.ndarray  # width digits of every possible block's conv1 [n, 23]

    @property
    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Stage and place within it, both from 0, of each column of ``inner``."""
        places = [(stage, b) for stage, deepest in enumerate(MAX_DEPTHS) for b in range(deepest)]
        return tuple(np.array(places).T)

    def architecture(self, index: int) -> Architecture:
        """One of them."""
        depths, outer = self.depths[index].tolist(), self.outer[index].tolist()
        inner = np.split(self.inner[index], np.cumsum(MAX_DEPTHS)[:-1])
        widths = tuple(
            tuple((mid, outer[stage]) for mid in inner[stage][:depth].tolist())
            for stage, depth in enumerate(depths)
        )
        return Architecture(tuple(depths), outer[0], widths)


@dataclass(frozen=True)
class SearchSpace:
    """Widths of a backbone and the architectures that are drawn from it."""

    base_channels: tuple[int, ...] = (64, 128, 256, 512)  # full ones; the stem has the first's
    divisor: int = 8  # channel counts are rounded to multiples of it
    max_digits: tuple[int, ...] = RELEASED_DIGITS  # largest that sampling uses in each stage

    def channels(self, stage: int, digit: int) -> int:
        """Channel count of width digit 1..7 in ``stage`` (0..3).

        The nearest multiple of the divisor, never more than 10 % below the exact width.
        """
        # The products are a hair below the integer for some ratios (e.g. 90 * 0.7).
        value = round(self.base_channels[stage] * RATIOS[digit - 1], 6)
        divisor = self.divisor
        rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
        return rounded + divisor if rounded < 0.9 * value else rounded

    def plan(self, arch: Architecture) -> ChannelPlan:
        """Channel counts of ``arch``."""
        return ChannelPlan(
            self.channels(0, arch.stem),
            tuple(
                tuple((self.channels(s, c1), self.channels(s, c2)) for c1, c2 in blocks)
                for s, blocks in enumerate(arch.widths)
            ),
        )

    def shared_plan(self, arch: Architecture) -> ChannelPlan:
        """Channel counts of ``arch`` as a sub-network of the supernet.

        Raises:
            UserError: a block other than the first of stages 2 to 4 changes its channel
                count, which takes a projection shortcut that the shared weights do not hold.
        """
        plan = self.plan(arch)
        previous = None
        for stage, cin, _, cout, _ in plan.blocks():
            projects = stage > 0 and stage != previous
            if cin != cout and not projects:
                raise UserError(
                    f"architecture code {arch.code}: stage {stage + 1} changes from {cin} to "
                    f"{cout} channels inside the stage, for which the supernet has no projection "
                    "shortcut; conv2 needs one width digit per stage, and the stem stage 1's"
                )
            previous = stage
        return plan

    def macs(self, arch: Architecture, image_size: int = 224, num_classes: int = 1000) -> int:
        """Multiply-accumulates per image: all convolutions and the classifier."""
        plan = self.plan(arch)
        stem, sizes = feature_sizes(image_size)
        total = stem * stem * 3 * plan.stem * 49
        for stage, cin, mid, cout, _ in plan.blocks():
            weights = 9 * cin * mid + 9 * mid * cout + (cin * cout if cin != cout else 0)
            total += sizes[stage] ** 2 * weights
        return total + plan.out_channels * num_classes

    def params(self, arch: Architecture, num_classes: int = 1000) -> int:
        """Trainable parameters: filters, BatchNorm scales and shifts, classifier."""
        plan = self.plan(arch)
        total = 3 * plan.stem * 49 + 2 * plan.stem
        for _, cin, mid, cout, _ in plan.blocks():
            total += 9 * cin * mid + 2 * mid + 9 * mid * cout + 2 * cout
            if cin != cout:
                total += cin * cout + 2 * cout
        return total + plan.out_channels * num_classes + num_classes

    def largest(self) -> Architecture:
        """All stages at full depth and width."""
        return self._extreme(MAX_DEPTHS, (1, 1, 1, 1))

    def smallest(self) -> Architecture:
        """All stages at depth 2 and at the smallest width that sampling uses."""
        return self._extreme((MIN_DEPTH,) * 4, self.max_digits)

    def _extreme(self, depths, digits) -> Architecture:
        widths = tuple(((d, d),) * depth for depth, d in zip(depths, digits, strict=True))
        return Architecture(tuple(depths), digits[0], widths)

    def sample(self, rng: np.random.Generator, tilt: float = 0.0) -> Architecture:
        """Draw an architecture: depths and digits independent, conv2's digit one per stage.

        Of the n options of a choice, ordered from small (0) to large (n - 1), option k has a
        probability proportional to ``exp(tilt * k / (n - 1))``: 0 is uniform, as the released
        45,000 are; a positive tilt favours depth and width.
        """

        def draw(options: int, *_) -> int:
            exponents = tilt * np.linspace(0.0, 1.0, options)
            weights = np.exp(exponents - exponents.max())
            return int(rng.choice(options, p=weights / weights.sum()))

        return self.compose(draw)

    def compose(self, choose: Callable[..., int]) -> Architecture:
        """An architecture from one call of ``choose`` for each of its choices, in a fixed order.

        Args:
            choose: called with the number n of options, the stage, and what is chosen there (0:
                depth, 1: conv2's width, 2 and up: conv1's width of each block); returns an option
                from 0 (shallow, narrow) to n - 1.
        """
        depths = tuple(
            MIN_DEPTH + choose(deepest - MIN_DEPTH + 1, stage, 0)
            for stage, deepest in enumerate(MAX_DEPTHS)
        )
        widths = []
        for stage, (depth, narrowest) in enumerate(zip(depths, self.max_digits, strict=True)):
            conv2 = narrowest - choose(narrowest, stage, 1)
            widths.append(
                tuple((narrowest - choose(narrowest, stage, 2 + b), conv2) for b in range(depth))
            )
        return Architecture(depths, widths[0][0][1], tuple(widths))

    def sample_many(self, rng: np.random.Generator, number: int) -> Candidates:
        """Draw ``number`` architectures by the law of :meth:`sample` without a tilt, as arrays."""
        stages = len(MAX_DEPTHS)
        narrowest = np.array(self.max_digits)
        return Candidates(
            rng.integers(MIN_DEPTH, np.array(MAX_DEPTHS) + 1, (number, stages)),
            rng.integers(1, narrowest + 1, (number, stages)),
            rng.integers(1, np.repeat(narrowest, MAX_DEPTHS) + 1, (number, sum(MAX_DEPTHS))),
        )

    def sample_distinct(
        self, rng: np.random.Generator, number: int, first: Iterable[Architecture] = ()
    ) -> dict[str, Architecture]:
        """``first`` and then uniform draws, none twice, named arch1, arch2, ... to ``number``."""
        drawn = dict.fromkeys(first)
        while len(drawn) < number:
            drawn[self.sample(rng)] = None
        return {f"arch{i}": arch for i, arch in enumerate(drawn, 1)}


def feature_sizes(image_size: int) -> tuple[int, list[int]]:
    """Height of the stem's convolution and of the four stages' feature maps."""
    # All layers of stride 2 are padded to ceil(size / 2).
    stem, *sizes = (math.ceil(image_size / 2**halved) for halved in range(1, 6))
    return stem, sizes


def convolution_outputs(plan: ChannelPlan, image_size: int) -> int:
    """Numbers that all convolutions of a network put out, per image."""
    stem, sizes = feature_sizes(image_size)
    return stem**2 * plan.stem + sum(
        sizes[stage] ** 2 * (mid + cout + (cout if cin != cout else 0))
        for stage, cin, mid, cout, _ in plan.blocks()
    )


WEIGHTED_BASES = (64, 70.4, 108.8, 121.6)
"""What the first place counts a channel of each stage by, in full widths."""

CONVOLUTION_SIZES = np.ceil(np.outer(WEIGHTED_BASES, RATIOS) / 8).astype(np.int64) * 8
"""Of a convolution by stage and width digit (from 0): rounded up to multiples of 8."""


def weighted_channels(arch: Architecture) -> int:
    """The first place's size of an architecture: channels of all convolutions, by stage.

    The sum over the stem and both convolutions of every block; projections are not counted.
    """
    blocks = ((stage, digit) for stage, own in enumerate(arch.widths) for b in own for digit in b)
    digits = [(0, arch.stem), *blocks]
    return int(sum(CONVOLUTION_SIZES[stage, digit - 1] for stage, digit in digits))


RESNET48 = SearchSpace()
# A quarter of ResNet48's widths for CPUs, with a divisor of 1, since multiples of 8 would merge
# the ratios. The first stage has 20 channels instead of 16: between 70 and 100 % of 16 lie only
# six integers for seven ratios.
RESNET48_MINI = SearchSpace(base_channels=(20, 32, 64, 128), divisor=1)


class Backbone(NamedTuple):
    """A named network."""

    space: SearchSpace
    contrastive: bool  # whether it is stage one's model


BACKBONES = {
    "resnet48": Backbone(RESNET48, contrastive=False),
    "resnet48pinasv2": Backbone(RESNET48, contrastive=True),
    "resnet48_mini": Backbone(RESNET48_MINI, contrastive=False),
    "resnet48pinasv2_mini": Backbone(RESNET48_MINI, contrastive=True),
}
SAMPLE_SPACES = {"released": RELEASED_DIGITS, "full": FULL_DIGITS}


def find_backbone(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
        UserError: there is none; the message lists the names.
    """
    if name not in BACKBONES:
        raise UserError(f"unknown backbone {shown(name)}; there are {', '.join(BACKBONES)}")
    return BACKBONES[name]


def search_space(name: str, sample_space: str = "released") -> SearchSpace:
    """The search space of a backbone; ``sample_space`` is ``released`` or ``full``."""
    digits = SAMPLE_SPACES[sample_space]
    return replace(find_backbone(name).space, max_digits=digits)
