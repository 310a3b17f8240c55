"""Reading the command line of the entry scripts: ``python3 -u SCRIPT run --flag value ...``."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence

from hnas.base.command_line import (
    SHOWN,
    OneLineParser,
    expand_path,
    read_bool,
    real_number,
    shown,
    whole_number,
)
from hnas.base.errors import UserError
from hnas.programs.flags import AUTO, PATHS, Stage, default_of, default_text
from hnas.programs.options import Options
from hnas.search_space import find_backbone

logger = logging.getLogger(__name__)

STAGES = (
    "each stage has its script: train_supernet_pinas_stage1.py, "
    "train_supernet_pinas_stage2_simple.py, train_supernet.py"
)
INSTEAD = dict.fromkeys(("phase", "mode", "pinas_stage"), STAGES)
INSTEAD["json_path"] = "give --modelarch_file"
"""What stands for flags of the public code."""


RECIPES = {
    "own": {"lr_schedule": "cosine", "stage1_views": "two_kinds", "shuffle": True},
    "public": {"lr_schedule": "swing", "stage1_views": "same", "shuffle": False},
}
"""What each ``recipe`` makes of flags that are not given, or are ``auto``."""


def parse_options(stage: Stage, argv: Sequence[str] | None = None, about: str = "") -> Options:
    """Read the command line of a stage.

    Args:
        stage: whose defaults hold, and whose flags ``--help`` prints.
        argv: arguments after the script's name; ``sys.argv[1:]`` if None.
        about: first line of ``--help``.

    Raises:
        UserError: unknown flag, wrong type or value out of bounds, or stage 1's backbone elsewhere.
    """
    fields = {option.name: option for option in dataclasses.fields(Options)}
    parsed, unknown = _parser(stage, fields.values(), about).parse_known_args(argv)
    if unknown:
        raise UserError(_explain_unknown(unknown[0], list(fields)))
    given = vars(parsed)
    given.pop("command")
    for name in [name for name in given if stage not in fields[name].metadata["stages"]]:
        logger.info("--%s has no effect in %s", name, stage)
        del given[name]
    options = Options(
        **{name: default_of(option, stage) for name, option in fields.items()} | given
    )
    _follow_recipe(options, stage, given)
    if stage is Stage.CONTRAST and options.save_dir_new:
        options.save_dir = options.save_dir_new
    if not options.save_dir:
        raise UserError("--save_dir is missing: results need a folder")
    if stage is not Stage.CONTRAST:
        refuse_contrastive(options.backbone, stage)
    return options


def _follow_recipe(options: Options, stage: Stage, given: Mapping[str, object]) -> None:
    """Set what the recipe decides; the log shows each value where that is the public code's."""
    recipe = options.recipe if stage is Stage.CONTRAST else "own"
    for name, value in RECIPES[recipe].items():
        if given.get(name, "auto") == "auto":
            setattr(options, name, value)
    if recipe == "public":
        told = ", ".join(f"{name} {getattr(options, name)}" for name in RECIPES[recipe])
        logger.info("recipe public: %s, channels not sorted", told)


def refuse_contrastive(backbone: str, program: object) -> None:
    """For programs that take a supernet without stage one's neck.

    Raises:
        UserError: ``backbone`` is one with it, or unknown.
    """
    if find_backbone(backbone).contrastive:
        raise UserError(f"--backbone {backbone} is stage 1's; {program} takes resnet48")


def _parser(stage: Stage, fields: Iterable[dataclasses.Field], about: str) -> OneLineParser:
    """Takes all flags, describes those of the stage, and gives those that are given."""
    note = "Flags of the other programs are taken, too, and named in the log as without effect."
    usage = "%(prog)s run [--flag value ...]"
    parser = OneLineParser(usage=usage, description=about, epilog=note, allow_abbrev=False)
    parser.add_argument("command", nargs="?", choices=["run"], help="the only command")
    groups = {}
    for option in fields:
        title, has_effect = option.metadata["group"], stage in option.metadata["stages"]
        if has_effect and title not in groups:
            groups[title] = parser.add_argument_group(title)
        target = groups[title] if has_effect else parser
        target.add_argument(
            f"--{option.name}",
            type=_reader(option),
            default=SUPPRESS,
            help=_help_text(option, stage) if has_effect else SUPPRESS,
            metavar=option.type,
        )
    return parser


def _help_text(option: dataclasses.Field, stage: Stage) -> str:
    default = f"default {default_text(option, default_of(option, stage))}"
    notes = "; ".join(filter(None, [option.metadata["unit"], default]))
    return f"{option.metadata['help']} [{notes}]".replace("%", "%%")


def _reader(option: dataclasses.Field) -> Callable[[str], object]:
    about = option.metadata
    bounds, choices = (about["low"], about["high"]), about["choices"]
    readers = {"bool": read_bool, "int": whole_number(*bounds), "float": real_number(*bounds)}

    def read(text: str) -> object:
        if about["unit"] in PATHS:
            text = expand_path(text)
        if about["auto"] and text == "auto":
            return AUTO
        value = readers.get(option.type, _read_text)(text)
        if choices and value not in choices:
            raise ArgumentTypeError(f"{shown(value)}; allowed: {', '.join(choices)}")
        return value

    return read


def _read_text(text: str) -> str:
    """Existing command lines write ``None`` or ``False`` for a path that is not there."""
    return "" if text in ("None", "False") else text


def _explain_unknown(argument: str, names: Sequence[str]) -> str:
    if not argument.startswith("--"):
        return f"unexpected argument {shown(argument)}; flags are written --name value"
    name = argument[2:].split("=", 1)[0]
    if len(name) > SHOWN:
        return f"unknown flag {shown(argument)}; see --help"
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean --{nearest[0]}?" if nearest else "see --help"
    return f"unknown flag --{name}; {INSTEAD.get(name, hint)}"
