"""What a flag is: which programs it concerns, its default in each, its unit and its bounds."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import field


class Stage(enum.Enum):
    """A program that takes :class:`Options`; as text, what users call it."""

    PRETRAIN = "pretrain"
    CONTRAST = "stage 1"
    DISTILL = "stage 2"
    SCORE = "stage 3"
    STANDALONE = "train_standalone"
    EXPORT = "export"
    SEARCH = "search"

    def __str__(self) -> str:
        return self.value


ALL = frozenset(Stage)
PRETRAIN = frozenset({Stage.PRETRAIN})
CONTRAST = frozenset({Stage.CONTRAST})
DISTILL = frozenset({Stage.DISTILL})
SCORE = frozenset({Stage.SCORE})
STANDALONE = frozenset({Stage.STANDALONE})
EXPORT = frozenset({Stage.EXPORT})
SEARCH = frozenset({Stage.SEARCH})
SUPERNET = CONTRAST | DISTILL
TRAINING = ALL - SCORE - EXPORT - SEARCH

AUTO = -1
"""``auto`` as a number: the program decides, and says so in the log."""
MOST_EPOCHS = 100_000
LARGEST_RATE = 1e30
"""A float32 holds it, times any batch / 256."""
MOST_COST = 1e15
"""Of an architecture, in any unit."""
PATHS = frozenset({"file", "folder"})
"""Units of flags that are paths."""


def flag(
    default,
    help_text: str,
    unit: str = "",
    *,
    stages: frozenset[Stage] = ALL,
    low: float | None = None,
    high: float | None = None,
    auto: bool = False,
    own: Mapping[Stage, object] | None = None,
):
    """A field of :class:`hnas.utils.options.Options`.

    Args:
        default: of every stage that has none of its own.
        help_text, unit: for ``--help``.
        stages: where the flag has an effect.
        low, high: the least and the largest value that is allowed; None: any.
        auto: whether ``auto`` is a value, too; it becomes ``AUTO``.
        own: defaults of single stages.
    """
    metadata = {"help": help_text, "unit": unit, "stages": stages, "own": own or {}}
    return field(default=default, metadata={**metadata, "low": low, "high": high, "auto": auto})


def default_of(option: dataclasses.Field, stage: Stage) -> object:
    """What a field of :class:`Options` is in a stage if nothing is given."""
    return option.metadata["own"].get(stage, option.default)


def default_text(option: dataclasses.Field, stage: Stage) -> str:
    """A default as a command line would give it."""
    default = default_of(option, stage)
    if option.metadata["auto"] and default == AUTO:
        return "auto"
    return "none" if default == "" else str(default)
