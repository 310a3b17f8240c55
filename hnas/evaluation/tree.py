"""The prefix tree of many sub-networks, and what evaluating it costs.

Sub-networks that agree on the stem and the first blocks share those activations exactly. More is
shared between the children of a node: the first convolution at a smaller width is a channel
slice of the same convolution at a larger one, and so is a second convolution with fewer outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import NamedTuple

import numpy as np

from hnas.search_space import Architecture, ChannelPlan, SearchSpace, feature_sizes

MAX_CHUNK = 1024
CPU_SHARE, GPU_SHARE = 0.25, 0.6
"""Of the free memory for a walk's activations. A machine's memory has other uses, a card's none."""
END = ()
"""Behind an architecture's last block; sorts before any block."""


class Child(NamedTuple):
    """A block, or a stem, and the architectures that agree down to it.

    Attributes:
        mid, cout: widths of its two convolutions; a stem has but ``cout``.
        low, high: of the sorted architectures those from ``low`` to ``high - 1`` use it.
        level: blocks down to it.
    """

    mid: int
    cout: int
    low: int
    high: int
    level: int


@dataclass(frozen=True)
class Group:
    """Blocks with the same input at the same position: they share conv1 and the projection.

    Attributes:
        stage, block: position in the supernet, from 0.
        cin: channels of their input.
        children: by (mid, cout), ascending.
    """

    stage: int
    block: int
    cin: int
    children: tuple[Child, ...]

    @property
    def projects(self) -> bool:
        """Whether the block has a projection shortcut: the first of stages 2 to 4."""
        return self.stage > 0 and self.block == 0

    @property
    def stride(self) -> int:
        return 2 if self.projects else 1

    @cached_property
    def by_mid(self) -> list[tuple[int, int, list[Child]]]:
        """Each of conv1's widths, conv2's largest width with it, and the children of both."""
        runs = ((mid, [*run]) for mid, run in groupby(self.children, attrgetter("mid")))
        return [(mid, run[-1].cout, run) for mid, run in runs]

    @property
    def widest_mid(self) -> int:
        return self.children[-1].mid

    @property
    def widest_out(self) -> int:
        return max(child.cout for child in self.children)

    def cost(self) -> tuple[int, int]:
        """A position's multiply-accumulates and numbers that all children's convolutions write."""
        widths = [(9 * self.cin, self.widest_mid)]
        if self.projects:
            widths.append((self.cin, self.widest_out))
        widths += [(9 * mid, widest) for mid, widest, _ in self.by_mid]
        return sum(a * b for a, b in widths), sum(outputs for _, outputs in widths)


class PrefixTree:
    """Architectures sorted so that those with a common prefix stand together.

    Nodes are ranges of the sorted list, made when they are visited: the tree of 45,000
    architectures takes a few MB.

    Args:
        space: gives the channel counts.
        archs: at least one; two with the same channel counts share their leaf.
    """

    def __init__(self, space: SearchSpace, archs: Sequence[Architecture]):
        known: dict[tuple, tuple] = {}  # one of equal blocks is kept
        paths = [_path(space.shared_plan(arch), known) for arch in archs]
        self.order = np.array(sorted(range(len(paths)), key=paths.__getitem__))
        """Index into ``archs`` of each sorted architecture."""
        self._paths = [paths[index] for index in self.order]
        self.stem_channels = self._paths[-1][0]
        """Width at which the stem is computed; narrower ones are slices."""

    def roots(self) -> list[Child]:
        """The stems."""
        runs = self._runs(0, len(self._paths), 0)
        return [Child(0, channels, low, high, 0) for channels, low, high in runs]

    def node(self, child: Child) -> tuple[range, tuple[Group, ...]]:
        """What follows a block or a stem: sorted positions of the architectures whose last block it
        is, and at most one group for the next block of the stage and one for the next stage."""
        leaves, groups, level = range(0), {}, child.level + 1
        for block, low, high in self._runs(child.low, child.high, level):
            if block == END:
                leaves = range(low, high)
                continue
            *position, mid, cout = block
            groups.setdefault(tuple(position), []).append(Child(mid, cout, low, high, level))
        made = (
            Group(*position, child.cout, tuple(children)) for position, children in groups.items()
        )
        return leaves, tuple(made)

    def _runs(self, low: int, high: int, column: int) -> Iterator[tuple]:
        """What the paths have in a column, and from where to where they have it."""
        for found, run in groupby(self._paths[low:high], itemgetter(column)):
            high = low + sum(1 for _ in run)
            yield found, low, high
            low = high

    def groups(self) -> Iterator[Group]:
        """Every group."""
        pending = self.roots()
        while pending:
            _, groups = self.node(pending.pop())
            for group in groups:
                yield group
                pending += group.children

    def cost(self, image_size: int) -> tuple[int, int]:
        """Multiply-accumulates and numbers written by one walk's convolutions, an image."""
        stem, sizes = feature_sizes(image_size)
        macs = stem * stem * 3 * 49 * self.stem_channels
        outputs = stem * stem * self.stem_channels
        for group in self.groups():
            own, written = group.cost()
            macs += sizes[group.stage] ** 2 * own
            outputs += sizes[group.stage] ** 2 * written
        return macs, outputs


def choose_chunk(
    space: SearchSpace, image_size: int, calibration: int, memory: float, number: int = 4
) -> int:
    """Images a walk such that its activations take at most ``memory`` bytes.

    ``number`` is the bytes of an activation.
    """
    images = int(memory / (number * path_numbers(space, image_size)))
    return max(1, min(MAX_CHUNK, images - calibration))


def path_numbers(space: SearchSpace, image_size: int) -> int:
    """Activations of the one path that is alive in a walk, an image.

    Every block may keep its output, conv1's output and the shortcut, all at full width and depth.
    """
    stem, sizes = feature_sizes(image_size)
    numbers = 2 * stem * stem * space.base_channels[0]
    for stage, _, mid, cout, _ in space.plan(space.largest()).blocks():
        numbers += 3 * sizes[stage] ** 2 * max(mid, cout)
    return numbers


def even_chunk(limit: int, images: int, processes: int) -> int:
    """The largest chunk of at most ``limit`` images that gives every process as many chunks.

    A walk's multiply-accumulates are those of its tree times its images, so equal chunks are
    equal work. One process takes ``limit``.
    """
    if processes == 1:
        return min(limit, images)
    rounds = -(-images // (limit * processes))
    return -(-images // (rounds * processes))


def _path(plan: ChannelPlan, known: dict[tuple, tuple]) -> tuple:
    """The stem's width, and stage, block and widths of each block."""
    blocks = (
        (stage, block, *widths)
        for stage, blocks in enumerate(plan.stages)
        for block, widths in enumerate(blocks)
    )
    return plan.stem, *(known.setdefault(block, block) for block in blocks), END
