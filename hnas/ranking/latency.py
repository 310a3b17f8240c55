"""The latency of an architecture on a device, added up from measured blocks.

``python -m hnas.tools.latency`` measures the blocks and writes the file that is read here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hnas.base.errors import UserError
from hnas.base.files import read_json
from hnas.search_space import (
    SAMPLE_SPACES,
    STAGE_STRIDES,
    Architecture,
    ChannelPlan,
    SearchSpace,
    search_space,
)

FORMAT = 1
TEXTS = ("backbone", "sample_space", "device", "processor", "engine", "paddle")
NUMBERS = ("image_size", "num_classes", "batch_size", "threads")


@dataclass(frozen=True)
class Part:
    """A piece of a network that is timed on its own.

    Attributes:
        kind: ``stem``, ``block`` or ``head``.
        stage: of a block, from 0.
        channels: (out) of a stem; (in, mid, out) of a block; (in) of a head.
        stride: of a block; with 2 or another number of outputs it has a projection shortcut.
    """

    kind: str
    channels: tuple[int, ...]
    stage: int = 0
    stride: int = 1

    @property
    def name(self) -> str:
        """Its name in the file, e.g. ``block 2 64-120-128 /2``, stages counted from 1."""
        if self.kind != "block":
            return f"{self.kind} {self.channels[0]}"
        return f"block {self.stage + 1} {'-'.join(map(str, self.channels))} /{self.stride}"


def parts_of(plan: ChannelPlan) -> Iterator[Part]:
    """The parts of a network in order, some of them several times."""
    yield Part("stem", (plan.stem,))
    for stage, cin, mid, cout, stride in plan.blocks():
        yield Part("block", (cin, mid, cout), stage, stride)
    yield Part("head", (plan.out_channels,))


def all_parts(space: SearchSpace) -> list[Part]:
    """The distinct parts of all networks that ``space`` holds, conv2's width one per stage."""
    widths = [
        sorted({space.channels(stage, digit) for digit in range(1, largest + 1)})
        for stage, largest in enumerate(space.max_digits)
    ]
    found = {Part("stem", (stem,)): None for stem in widths[0]}
    for stage, own in enumerate(widths):
        entered = [(cin, cout) for cin in widths[stage - 1] for cout in own] if stage else []
        inner = [(cout, cout) for cout in own]
        for ends, stride in ((entered, STAGE_STRIDES[stage]), (inner, 1)):
            for cin, cout in ends:
                found |= {Part("block", (cin, mid, cout), stage, stride): None for mid in own}
    found |= {Part("head", (last,)): None for last in widths[-1]}
    return list(found)


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of all parts of a space on one device.

    Attributes:
        path: of the file.
        space: whose parts they are.
        about: the file's other values: ``TEXTS`` and ``NUMBERS``.
        milliseconds: of a batch, by the parts' names.
    """

    path: Path
    space: SearchSpace
    about: Mapping[str, str | int]
    milliseconds: Mapping[str, float]

    def of(self, arch: Architecture) -> float:
        """Milliseconds that ``arch`` takes for a batch.

        Raises:
            UserError: a part of it was not measured.
        """
        return math.fsum(self._of(part, arch) for part in parts_of(self.space.shared_plan(arch)))

    def _of(self, part: Part, arch: Architecture) -> float:
        if part.name not in self.milliseconds:
            raise UserError(
                f"{self.path} lacks {part.name!r} of architecture {arch.code}: it was measured for "
                f"the {self.about['sample_space']} space; measure with --sample_space full"
            )
        return self.milliseconds[part.name]

    def check_fits(self, backbone: str, image_size: int) -> None:
        """Refuse a table of another network or image size.

        Raises:
            UserError: it is of another.
        """
        for name, wanted in (("backbone", backbone), ("image_size", image_size)):
            if self.about[name] != wanted:
                raise UserError(
                    f"{self.path} was measured with --{name} {self.about[name]}, not {wanted}; "
                    "measure again with python -m hnas.tools.latency"
                )


def read_latency(path: str | Path) -> LatencyTable:
    """The table in a file of ``python -m hnas.tools.latency``; needs no Paddle.

    Raises:
        UserError: missing or broken file.
    """
    path = Path(path)
    content = read_json(path)
    _check(content.get("format") == FORMAT, path, "format")
    for names, kind in ((TEXTS, str), (NUMBERS, int)):
        for name in names:
            _check(type(content.get(name)) is kind, path, name)
    parts = content.get("milliseconds")
    _check(isinstance(parts, dict) and _are_times(parts.values()), path, "milliseconds")
    _check(content["sample_space"] in SAMPLE_SPACES, path, "sample_space")
    space = search_space(content["backbone"], content["sample_space"])
    _check(all(part.name in parts for part in all_parts(space)), path, "milliseconds")
    about = {name: content[name] for name in TEXTS + NUMBERS}
    return LatencyTable(path, space, about, parts)


def _are_times(values: Iterable) -> bool:
    return all(type(value) in (int, float) and 0 <= value < math.inf for value in values)


def _check(is_right: bool, path: Path, name: str) -> None:
    if not is_right:
        raise UserError(
            f"{path}: {name!r} is missing or wrong; it is no file of python -m hnas.tools.latency"
        )
