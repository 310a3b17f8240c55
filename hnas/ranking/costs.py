"""What networks cost: MACs, parameters, and latency on a device, added up from measured blocks.

``python -m hnas.tools.latency`` measures the blocks and writes the file that is read here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hnas.base.command_line import LARGEST, LARGEST_SIDE, OneLineParser, whole_number
from hnas.base.errors import UserError
from hnas.base.files import file_digest, read_json
from hnas.base.settings import check_same_settings
from hnas.search_space import (
    BACKBONES,
    SAMPLE_SPACES,
    STAGE_STRIDES,
    Architecture,
    ChannelPlan,
    SearchSpace,
    search_space,
    weighted_channels,
)

logger = logging.getLogger(__name__)

UNITS = {"macs": "MACs", "params": "parameters", "latency": "ms"}
"""The kinds of cost, and how one says it."""
FORMAT = 1
MOST_MS = 1e9
"""Of a part, which is twelve days."""
TEXTS = ("backbone", "sample_space", "device", "processor", "engine", "paddle")
NUMBERS = ("image_size", "num_classes", "batch_size", "threads")


class Network(NamedTuple):
    """What costs depend on besides a code; by default what the competition scored."""

    backbone: str = "resnet48"
    image_size: int = 224  # px
    num_classes: int = 1000

    @classmethod
    def read(cls, content: Mapping) -> Network:
        """From a file's values; a KeyError, TypeError or ValueError where they are none."""
        found = cls(*(content[name] for name in cls._fields))
        if found.backbone not in BACKBONES or not all(map(is_count, found[1:])):
            raise ValueError("its network is none")
        return found


def add_network_flags(parser: OneLineParser) -> None:
    """The flags of the network whose costs are told, which :func:`network_of` reads."""
    sizes, classes = whole_number(32, LARGEST_SIDE), whole_number(1, 1_000_000)
    told = "[where no file says it: {}]".format
    parser.add_argument("--backbone", choices=BACKBONES, help=f"whose widths {told('resnet48')}")
    parser.add_argument("--image_size", type=sizes, help=f"px {told(224)}")
    parser.add_argument("--num_classes", type=classes, help=told(1000))


def network_of(options, scored: Network | None, path: str) -> Network:
    """The network whose costs are told: what ``path`` says was ``scored``, or the flags.

    Where neither says all, the competition's is taken, and a line on stderr says so.

    Raises:
        UserError: the flags say otherwise.
    """
    values = {name: getattr(options, name) for name in Network._fields}
    given = {name: value for name, value in values.items() if value is not None}
    if scored is not None:
        check_same_settings(path, scored._asdict(), given, "leave out the flags that differ")
        return scored
    network = Network(**given)
    if len(given) < len(values):
        taken = " ".join(f"--{name} {value}" for name, value in network._asdict().items())
        logger.warning("%s does not say of which network it is; taken: %s", path, taken)
    return network


@dataclass(frozen=True)
class Part:
    """A piece of a network that is timed on its own."""

    kind: str  # ``stem``, ``block`` or ``head``
    channels: tuple[int, ...]  # (out) of a stem; (in, mid, out) of a block; (in) of a head
    stage: int = 0  # of a block, from 0
    stride: int = 1  # of a block

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


def all_parts(space: SearchSpace, coarse: bool = False) -> list[Part]:
    """The distinct parts of all networks that ``space`` holds, conv2's width one per stage.

    ``coarse`` leaves out blocks but those of the least, a middle and the largest inner width.
    """
    widths = [
        sorted({space.channels(stage, digit) for digit in range(1, largest + 1)})
        for stage, largest in enumerate(space.max_digits)
    ]
    found = {Part("stem", (stem,)): None for stem in widths[0]}
    for stage, own in enumerate(widths):
        entered = [(cin, cout) for cin in widths[stage - 1] for cout in own] if stage else []
        inner = [(cout, cout) for cout in own]
        mids = [own[0], own[len(own) // 2], own[-1]] if coarse else own
        for ends, stride in ((entered, STAGE_STRIDES[stage]), (inner, 1)):
            for cin, cout in ends:
                found |= {Part("block", (cin, mid, cout), stage, stride): None for mid in mids}
    found |= {Part("head", (last,)): None for last in widths[-1]}
    return list(found)


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of all parts of a space on one device."""

    path: Path  # of the file
    space: SearchSpace
    about: Mapping[str, str | int]  # the file's other values: ``TEXTS`` and ``NUMBERS``
    milliseconds: Mapping[str, float]  # of a batch, by the parts' names
    digest: str = ""  # of the file, when it was read

    def check(self, wanted: Mapping[str, object]) -> None:
        """Refuse to serve other settings; the :class:`UserError` names them."""
        measure = "measure again with python -m hnas.tools.latency"
        check_same_settings(self.path, self.about, wanted, measure)

    def of(self, arch: Architecture) -> float:
        """Milliseconds that ``arch`` takes for a batch.

        Raises:
            UserError: a part of it was not measured.
        """
        names = [part.name for part in parts_of(self.space.shared_plan(arch))]
        lacking = next((name for name in names if name not in self.milliseconds), None)
        if lacking:
            raise UserError(
                f"{self.path} lacks {lacking!r} of architecture {arch.code}: it was measured for "
                f"the {self.about['sample_space']} space; measure with --sample_space full"
            )
        return math.fsum(self.milliseconds[name] for name in names)


def costs_of(
    archs: Iterable[Architecture],
    space: SearchSpace,
    size: int,
    classes: int,
    latency: LatencyTable | None = None,
) -> dict[str, np.ndarray]:
    """MACs an image, parameters and, by its table, milliseconds a batch [n], by kind."""
    archs = list(archs)
    costs = {
        "macs": np.array([space.macs(arch, size, classes) for arch in archs]),
        "params": np.array([space.params(arch, classes) for arch in archs]),
    }
    if latency is not None:
        costs["latency"] = np.array([latency.of(arch) for arch in archs])
    return costs


def counted(archs: Collection[Architecture], network: Network) -> dict[str, np.ndarray]:
    """What a code alone tells of architectures, [n] in their order; larger networks have more."""
    return {
        **costs_of(archs, search_space(network.backbone), *network[1:]),
        "size": np.array([weighted_channels(arch) for arch in archs]),
        "depth": np.array([sum(arch.depths) for arch in archs]),
    }


def open_latency(
    path: str | None, wanted: Mapping[str, object], asked_by: str = ""
) -> LatencyTable | None:
    """What ``--latency`` names, measured as ``wanted``; ``asked_by`` is a flag that needs it.

    Raises:
        UserError: it is missing, broken, or of something else.
    """
    if not path:
        if asked_by:
            raise UserError(
                f"{asked_by} takes --latency FILE, which python -m hnas.tools.latency measures"
            )
        return None
    table = read_latency(path)
    table.check(wanted)
    return table


def is_count(value: object) -> bool:
    """Whether it is a size, a number of classes, and the like."""
    return type(value) is int and 0 < value <= LARGEST


def is_time(value: object) -> bool:
    """Whether it is a part's milliseconds."""
    return type(value) in (int, float) and 0 <= value <= MOST_MS


def read_latency(path: str | Path) -> LatencyTable:
    """The table in a file of ``python -m hnas.tools.latency``; needs no Paddle.

    Raises:
        UserError: missing or broken file.
    """
    path = Path(path)
    content, digest = read_json(path), file_digest(path)
    kinds = {**dict.fromkeys(TEXTS, str), "milliseconds": dict}
    wrong = {name for name, kind in kinds.items() if type(content.get(name)) is not kind}
    wrong |= {name for name in NUMBERS if not is_count(content.get(name))}
    if content.get("format") != FORMAT:
        wrong = {"format"}
    elif not wrong and content["sample_space"] not in SAMPLE_SPACES:
        wrong = {"sample_space"}
    elif not wrong:
        parts = content["milliseconds"]
        space = search_space(content["backbone"], content["sample_space"])
        times = [parts.get(name) for name in {*parts, *(part.name for part in all_parts(space))}]
        if all(map(is_time, times)):
            about = {name: content[name] for name in TEXTS + NUMBERS}
            return LatencyTable(path, space, about, parts, digest)
        wrong = {"milliseconds"}
    raise UserError(
        f"{path}: {min(wrong)!r} is missing or wrong; it is no file of python -m hnas.tools.latency"
    )
