"""The layouts in which weights of Track 1 are passed around, under this project's names.

Public code saves the whole wrapped model: the network under ``model.``, after training on several
cards under ``model._layers.``, with PaddleSlim's ``.fn`` in the names of convolutions; the teacher
beside it under ``ofa_teacher_model.``; in stage one the neck ``model.neck.mlp.0`` and ``.2``, the
``queue`` and ``queue_ptr``, and the teacher is the key encoder. Paddle 2 adds a table of names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError
from hnas.models.elastic import plain_name

logger = logging.getLogger(__name__)

NAME_TABLE = "StructuredToParameterName@@"
NESTED = ("state_dict", "model")
WRAPPERS = ("_layers.", "module.", "model.")
TEACHER = "ofa_teacher_model."
NECK = re.compile(r"neck\.mlp\.([02])\.(.+)")
NECK_LAYERS = {"0": "hidden", "2": "project"}
MOST_NESTS = 3
LISTED = 10


def state_dict_of(content, path: str | Path) -> dict:
    """The state dict in what a file holds, out of its nests.

    Raises:
        UserError: there is none, or it is not clear which.
    """
    for _ in range(MOST_NESTS):
        found = content if isinstance(content, dict) else {}
        nests = [key for key in NESTED if isinstance(found.get(key), dict)]
        if len(nests) > 1:
            raise UserError(
                f"checkpoint {path} holds both {nests[0]!r} and {nests[1]!r}; save the one alone "
                "that you mean"
            )
        for key in nests:
            logger.info("%s: took %r, left %d others", path, key, len(found) - 1)
            content = found[key]
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict")
    return {name: value for name, value in content.items() if name != NAME_TABLE}


def plain_weights(
    arrays: Mapping[str, np.ndarray], path: str | Path
) -> tuple[dict[str, np.ndarray], bool]:
    """Arrays under this project's plain names, and whether public code named them.

    Of stage one the names are those of :class:`hnas.models.pinasv2.PiNASv2`: ``backbone.``,
    ``neck.``, ``key_backbone.``, ``key_neck.``, ``queue`` and ``queue_pointer``. In stage two the
    teacher is left out, with a line in the log.

    Raises:
        UserError: two arrays get the same name.
    """
    names = {name: _unwrapped(name) for name in arrays}
    teacher = [name for name in names if names[name].startswith(TEACHER)]
    contrastive = any(NECK.fullmatch(stripped) for stripped in names.values())
    if teacher and not contrastive:
        logger.info("%s: left %d tensors of the teacher beside the network", path, len(teacher))
    plain: dict[str, np.ndarray] = {}
    for name, stripped in names.items():
        part = ""
        if stripped.startswith(TEACHER):
            part, stripped = "key_", _unwrapped(stripped.removeprefix(TEACHER))
            if not contrastive or stripped.startswith("queue"):
                continue
        if contrastive:
            stripped = part + _contrastive_name(stripped)
        if stripped in plain:
            raise UserError(f"checkpoint {path} holds {stripped} twice, once as {name}")
        plain[stripped] = arrays[name]
    wrapped = any(name.startswith("model.") for name in arrays)
    return plain, wrapped or contrastive or bool(teacher)


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return plain_name(name)


def _contrastive_name(name: str) -> str:
    """What public code has in stage one's query encoder or beside it, as this project names it."""
    layer = NECK.fullmatch(name)
    if layer:
        return f"neck.{NECK_LAYERS[layer[1]]}.{layer[2]}"
    if name.startswith("blocks."):
        return f"backbone.{name}"
    return "queue_pointer" if name == "queue_ptr" else name
