"""What a run looks at, as its processes hand it to each other; no Paddle is needed here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

CHECKS = (
    "facts",
    "tf32",
    "operators",
    "norms",
    "walk",
    "kernels",
    "fused",
    "training",
    "repeat",
    "loaders",
    "collectives",
    "rates",
)
"""In the order of the table."""
ALONE = ("repeat",)
"""Those that need a process in which no convolution ran before, on a GPU."""
SLOW = ("rates",)
"""Left out of a quick run."""
WITH_TF32 = ("tf32", "operators", "walk", "training", "rates")
"""Those with convolutions, which a GPU may compute in TF32."""

DEVICE_LOST = 3
"""Exit code of a process that checks, when the device gives no more answers."""
TWIN_ENDED = "twin.ended"
"""The file that says that the process on the CPU is over."""


@dataclass(frozen=True)
class Plan:
    """How thorough a run is.

    Attributes:
        gpus: which of the visible cards: the first one is checked, all exchange; empty: the CPU.
        quick: fewer and smaller of everything, for continuous integration.
        full: larger images and more architectures.
        tf32: of this process: ``off``, ``on``, or Paddle's setting, ``auto``.
    """

    gpus: tuple[int, ...] = ()
    quick: bool = False
    full: bool = False
    tf32: str = "off"

    def to_json(self) -> str:
        """For the command line of a process of the run."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """What :meth:`to_json` gave."""
        values = json.loads(text)
        return cls(**{**values, "gpus": tuple(values["gpus"])})
