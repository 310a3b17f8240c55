"""What a flag is: which programs it concerns, its default in each, its unit and its bounds."""

from __future__ import annotations

import dataclasses
import enum

from hnas.base.command_line import LARGEST


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
PRETRAIN, CONTRAST, DISTILL, SCORE, STANDALONE, EXPORT, SEARCH = (
    frozenset({stage}) for stage in Stage
)
SUPERNET = CONTRAST | DISTILL
TRAINING = ALL - SCORE - EXPORT - SEARCH

AUTO = -1  # ``auto`` as a number: the program decides, and says so in the log
PATHS = frozenset({"file", "folder"})  # units of flags that are paths


def flag(
    default,
    help_text: str,
    unit: str = "",
    *,
    group: str,
    stages: frozenset[Stage],
    low: float = 0,
    high: float = LARGEST,
    choices: tuple[str, ...] = (),
    auto: bool = False,
    **own: object,
):
    """A field of :class:`hnas.programs.options.Options`.

    Args:
        default: of every program that has none of its own.
        help_text, unit: for ``--help``.
        group: the heading that it stands under.
        stages: where it has an effect.
        low, high: the least and the largest number that is allowed.
        choices: texts that are allowed; none: any.
        auto: whether ``auto`` is a value, too; it becomes ``AUTO``.
        own: defaults of single programs, by their name in :class:`Stage`.
    """
    metadata = {"help": help_text, "unit": unit, "group": group, "stages": stages}
    metadata |= {"low": low, "high": high, "choices": choices, "auto": auto}
    metadata["own"] = {Stage[name.upper()]: value for name, value in own.items()}
    return dataclasses.field(default=default, metadata=metadata)


def default_of(option: dataclasses.Field, stage: Stage) -> object:
    """What a field of :class:`Options` is in a stage if nothing is given."""
    return option.metadata["own"].get(stage, option.default)


def default_text(option: dataclasses.Field, default: object) -> str:
    """A default as a command line would give it."""
    if option.metadata["auto"] and default == AUTO:
        return "auto"
    return "none" if default == "" else str(default)
