"""Cutting a list of architectures into shards that are scored apart, e.g. on several clusters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hnas.base.command_line import shown
from hnas.base.errors import UserError
from hnas.evaluation.tree import PrefixTree
from hnas.search_space import Architecture, SearchSpace, feature_sizes

MOST_SHARDS = 9999


@dataclass(frozen=True)
class Shard:
    """One of several shards of a list; as text, ``2/8``.

    Attributes:
        number: 1 to ``of``.
        of: how many there are.
    """

    number: int
    of: int

    @classmethod
    def read(cls, text: str) -> Shard:
        """The shard that ``text`` names.

        Raises:
            ValueError: it is not two whole numbers, of which the first is at least 1 and at most
                the second.
        """
        found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        shard = cls(int(found[1]), int(found[2])) if found else None
        if shard is None or not 1 <= shard.number <= shard.of:
            raise ValueError(
                f"{shown(text)} is not a shard as 2/8, from 1/8 to 8/8, of at most {MOST_SHARDS}"
            )
        return shard

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def positions(
        self, space: SearchSpace, archs: Mapping[str, Architecture], image_size: int
    ) -> list[int]:
        """Where this shard's architectures stand in the list, ascending.

        Raises:
            UserError: there are fewer architectures than shards.
        """
        if len(archs) < self.of:
            raise UserError(
                f"shard {self} of {len(archs)} architectures: make at most as many shards as there "
                "are architectures"
            )
        tree = PrefixTree(space, list(archs.values()))
        cuts = balanced_cuts(leaf_macs(tree, image_size), self.of)
        return sorted(tree.order[cuts[self.number - 1] : cuts[self.number]].tolist())


def leaf_macs(tree: PrefixTree, image_size: int) -> np.ndarray:
    """Each architecture's share of a walk's multiply-accumulates an image; int64 [architectures].

    In the tree's order. What architectures have in common is shared equally among them, rounded
    down, so that the shares depend on the list alone, to the last digit.
    """
    _, sizes = feature_sizes(image_size)
    changes = np.zeros(len(tree) + 1, dtype=np.int64)
    for node in tree.nodes():
        for group in node.groups:
            low, high = group.children[0].low, group.children[-1].high
            share = group.macs(sizes[group.stage]) // (high - low)
            changes[low] += share
            changes[high] -= share
    return np.cumsum(changes[:-1])


def balanced_cuts(costs: np.ndarray, shards: int) -> list[int]:
    """Where to cut a list such that all pieces cost about the same and none is empty.

    Args:
        costs: of each element, int64 [elements].
        shards: how many pieces, at most as many as elements.

    Returns:
        The first element of each piece, and the number of elements.
    """
    total = [0, *np.cumsum(costs).tolist()]
    cuts = [0]
    for number in range(1, shards):
        wanted = total[-1] * number // shards
        after = int(np.searchsorted(total, wanted))
        nearest = after - (after > 0 and wanted - total[after - 1] < total[after] - wanted)
        cuts.append(min(max(nearest, cuts[-1] + 1), len(costs) - shards + number))
    return [*cuts, len(costs)]
