"""The prefix tree of many sub-networks, and what evaluating it costs.

Sub-networks that agree on the stem and the first blocks share those activations exactly. More is
shared between the children of a node: the first convolution at a smaller width is a channel
slice of the same convolution at a larger one, and so is a second convolution with fewer outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hnas.search_space import MAX_DEPTHS, Architecture, SearchSpace, feature_sizes

END = 0
_FIELD = 1 << 16
MAX_CHUNK = 1024
CPU_SHARE, GPU_SHARE = 0.25, 0.6
"""Of the free memory for a walk's activations. A machine's memory has other uses, a card's none."""


@dataclass(frozen=True)
class Child:
    """A block with its widths, and the sorted architectures ``low`` to ``high - 1`` that use it."""

    mid: int
    cout: int
    low: int
    high: int


@dataclass(frozen=True)
class Group:
    """Children of a node at the same position: they share conv1 and the projection.

    Attributes:
        stage, block: position in the supernet, from 0.
        cin: channels of the node's activation.
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
        own: dict[int, list[Child]] = {}
        for child in self.children:
            own.setdefault(child.mid, []).append(child)
        return [(mid, max(child.cout for child in of), of) for mid, of in own.items()]

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


@dataclass(frozen=True)
class Node:
    """A prefix: the architectures that end here and the groups of blocks that may follow.

    Attributes:
        channels: of the prefix's activation.
        leaves: sorted positions of the architectures whose last block this is.
        groups: at most one for the next block of the stage and one for the next stage.
    """

    channels: int
    leaves: range
    groups: tuple[Group, ...]


class PrefixTree:
    """Architectures sorted so that those with a common prefix stand together.

    Nodes are ranges of the sorted list, made when they are visited: the tree of 45,000
    architectures takes a few MB.

    Args:
        space: gives the channel counts.
        archs: any number; two with the same channel counts share their leaf.
    """

    def __init__(self, space: SearchSpace, archs: Sequence[Architecture]):
        plans = [space.shared_plan(arch) for arch in archs]
        tokens = np.zeros((len(plans), sum(MAX_DEPTHS) + 2), dtype=np.int64)
        for row, plan in enumerate(plans):
            tokens[row, 0] = plan.stem
            for column, (stage, block, mid, cout) in enumerate(_positions(plan), 1):
                position = stage * 16 + block + 1
                tokens[row, column] = (position * _FIELD + mid) * _FIELD + cout
        self.order = np.lexsort(tokens.T[::-1])
        """Index into ``archs`` of each sorted architecture."""
        self._tokens = tokens[self.order]
        self.stem_channels = int(tokens[:, 0].max())
        """Width at which the stem is computed; narrower ones are slices."""

    def __len__(self) -> int:
        return len(self.order)

    def roots(self) -> list[tuple[int, int, int]]:
        """(stem channels, low, high) of each stem width."""
        return [(int(token), low, high) for token, low, high in self._runs(0, 0, len(self))]

    def node(self, low: int, high: int, level: int, channels: int) -> Node:
        """The node after ``level`` blocks that the architectures ``low`` to ``high - 1`` share."""
        leaves, groups = range(low, low), {}
        for token, start, stop in self._runs(level + 1, low, high):
            if token == END:
                leaves = range(start, stop)
                continue
            rest, cout = divmod(int(token), _FIELD)
            position, mid = divmod(rest, _FIELD)
            groups.setdefault(position - 1, []).append(Child(mid, cout, start, stop))
        made = (
            Group(position // 16, position % 16, channels, tuple(children))
            for position, children in groups.items()
        )
        return Node(channels, leaves, tuple(made))

    def _runs(self, column: int, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        values = self._tokens[low:high, column]
        if high - low == 1:
            yield values[0], low, high
            return
        starts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            yield values[start], low + start, low + stop

    def nodes(self) -> Iterator[Node]:
        """Every node, depth first."""
        pending = [(low, high, 0, channels) for channels, low, high in self.roots()]
        while pending:
            *place, level, channels = pending.pop()
            node = self.node(*place, level, channels)
            yield node
            for group in node.groups:
                pending += [(c.low, c.high, level + 1, c.cout) for c in group.children]

    def cost(self, image_size: int) -> tuple[int, int]:
        """Of one walk, an image: multiply-accumulates, and numbers that convolutions write.

        Heads, as everywhere in the evaluator's figures, are not counted.
        """
        stem, sizes = feature_sizes(image_size)
        macs = stem * stem * 3 * 49 * self.stem_channels
        outputs = stem * stem * self.stem_channels
        for node in self.nodes():
            for group in node.groups:
                own, written = group.cost()
                macs += sizes[group.stage] ** 2 * own
                outputs += sizes[group.stage] ** 2 * written
        return macs, outputs


def _positions(plan) -> Iterator[tuple[int, int, int, int]]:
    for stage, blocks in enumerate(plan.stages):
        for block, (mid, cout) in enumerate(blocks):
            yield stage, block, mid, cout


def naive_macs(space: SearchSpace, archs: Iterable[Architecture], image_size: int) -> int:
    """Multiply-accumulates an image of evaluating each on its own, heads not counted."""
    return sum(space.macs(arch, image_size, num_classes=0) for arch in archs)


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
