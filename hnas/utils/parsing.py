"""Reading the command line of the entry scripts: ``python3 -u SCRIPT run --flag value ...``."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence

from hnas.base.command_line import (
    SHOWN,
    OneLineParser,
    check_path,
    read_bool,
    read_float,
    read_int,
    shown,
)
from hnas.base.errors import UserError
from hnas.utils.flags import AUTO, PATHS, Stage, default_of, default_text
from hnas.utils.options import Options

logger = logging.getLogger(__name__)


def parse_options(stage: Stage, argv: Sequence[str] | None = None, about: str = "") -> Options:
    """Read the command line of a stage.

    Args:
        stage: whose defaults hold.
        argv: arguments after the script's name; ``sys.argv[1:]`` if None.
        about: first line of ``--help``.

    Raises:
        UserError: unknown flag, wrong type or value out of bounds.
    """
    fields = dataclasses.fields(Options)
    parser = OneLineParser(description=about, allow_abbrev=False)
    parser.add_argument("command", nargs="?", choices=["run"], help="the only command")
    for option in fields:
        parser.add_argument(
            f"--{option.name}",
            type=_reader(option),
            default=default_of(option, stage),
            help=_help_text(option, stage),
            metavar=option.type,
        )
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(_explain_unknown(unknown[0], [option.name for option in fields]))
    values = vars(parsed)
    values.pop("command")
    options = Options(**values)
    _check_bounds(options)
    for option in fields:
        given = any(a == f"--{option.name}" or a.startswith(f"--{option.name}=") for a in arguments)
        if given and stage not in option.metadata["stages"]:
            logger.info("--%s has no effect in %s", option.name, stage)
    if stage is Stage.CONTRAST and options.save_dir_new:
        options.save_dir = options.save_dir_new
    if not options.save_dir:
        raise UserError("--save_dir is missing: results need a folder")
    return options


def _help_text(option: dataclasses.Field, stage: Stage) -> str:
    unit = option.metadata["unit"]
    notes = [unit] if unit else []
    notes.append(f"default {default_text(option, stage)}")
    if stage not in option.metadata["stages"]:
        notes.append("no effect here")
    text = f"{option.metadata['help']} [{'; '.join(notes)}]"
    return text.replace("%", "%%")


def _reader(option: dataclasses.Field) -> Callable[[str], object]:
    readers = {"bool": read_bool, "int": read_int, "float": read_float, "str": _read_text}
    reader = readers[option.type]

    def read(text: str) -> object:
        if option.metadata["unit"] in PATHS:
            check_path(text)
        if option.metadata["auto"] and text == "auto":
            return AUTO
        if option.metadata["auto"] and reader(text) == AUTO:
            raise ArgumentTypeError(f"{text} is too small; the least is {option.metadata['low']}")
        if option.name == "image_size" and "," in text:
            raise ArgumentTypeError(f"{text}: networks are trained and scored at one size here")
        return reader(text)

    return read


def _read_text(text: str) -> str:
    """Existing command lines write ``None`` or ``False`` for a path that is not there."""
    return "" if text in ("None", "False") else text


SCRIPTS = (
    "every stage is a script of its own: train_supernet_pinas_stage1.py, "
    "train_supernet_pinas_stage2_simple.py, train_supernet.py"
)
INSTEAD = {
    "json_path": "the architectures to score are given by --modelarch_file",
    "phase": SCRIPTS,
    "mode": SCRIPTS,
}
"""Flags of public code that others stand for here."""


def _explain_unknown(argument: str, names: Sequence[str]) -> str:
    if not argument.startswith("--"):
        return f"unexpected argument {shown(argument)}; flags are written --name value"
    name = argument[2:].split("=", 1)[0]
    if len(name) > SHOWN:
        return f"unknown flag {shown(argument)}; see --help"
    if name in INSTEAD:
        return f"unknown flag --{name}; {INSTEAD[name]}"
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean --{nearest[0]}?" if nearest else "see --help"
    return f"unknown flag --{name}; {hint}"


def _check_bounds(options: Options) -> None:
    for option in dataclasses.fields(options):
        value, low, high = (
            getattr(options, option.name),
            option.metadata["low"],
            option.metadata["high"],
        )
        if option.metadata["auto"] and value == AUTO:
            continue
        if low is not None and value < low:
            raise UserError(f"--{option.name} {shown(value)} is too small; the least is {low}")
        if high is not None and value > high:
            raise UserError(f"--{option.name} {shown(value)} is too large; the most is {high}")
    choices = {
        "sample_space": ("released", "full"),
        "device": ("auto", "cpu", "gpu"),
        "eval_engine": ("shared", "reference"),
        "amp": ("O0", "O1", "O2"),
        "tf32": ("auto", "on", "off"),
        "bad_images": ("fatal", "skip"),
        "stage1_views": ("two_kinds", "one_kind"),
        "lr_schedule": ("cosine", "swing"),
        "format": ("pdparams", "inference", "onnx"),
    }
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            given = shown(getattr(options, name))
            raise UserError(f"--{name} {given}; allowed: {', '.join(allowed)}")
