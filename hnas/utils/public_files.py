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


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, or of another network."""


def state_dict_of(content, path: str | Path) -> dict:
    """The state dict in what a file holds, out of its nests.

    Raises:
        CheckpointError: there is none, or it is not clear which.
    """
    for _ in range(MOST_NESTS):
        if not isinstance(content, dict):
            break
        nests = [key for key in NESTED if isinstance(content.get(key), dict)]
        if not nests:
            break
        if len(nests) > 1:
            raise CheckpointError(
                f"checkpoint {path} holds both {nests[0]!r} and {nests[1]!r}; save the one alone "
                "that you mean"
            )
        others = [repr(key) for key in content if key != nests[0]]
        if others:
            rest = ", ..." if len(others) > LISTED else ""
            listed = ", ".join(others[:LISTED])
            logger.info("%s: took %r, left %s%s", path, nests[0], listed, rest)
        content = content[nests[0]]
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, not a state dict"
        )
    return {name: value for name, value in content.items() if name != NAME_TABLE}


def plain_weights(
    arrays: Mapping[str, np.ndarray], path: str | Path
) -> tuple[dict[str, np.ndarray], bool]:
    """Arrays under this project's plain names, and whether public code named them.

    Of stage one the names are those of :class:`hnas.models.pinasv2.PiNASv2`: ``backbone.``,
    ``neck.``, ``key_backbone.``, ``key_neck.``, ``queue`` and ``queue_pointer``. In stage two the
    teacher is left out, with a line in the log.

    Raises:
        CheckpointError: two arrays get the same name.
    """
    own, teacher = [], []
    for name, value in arrays.items():
        stripped = _unwrapped(name)
        if stripped.startswith(TEACHER):
            teacher.append((name, _unwrapped(stripped.removeprefix(TEACHER)), value))
        else:
            own.append((name, stripped, value))
    is_public = bool(teacher) or any(name.startswith("model.") for name in arrays)
    if any(NECK.fullmatch(stripped) for _, stripped, _ in own):
        is_public = True
        own = [(name, _contrastive_name(stripped), value) for name, stripped, value in own]
        own += [
            (name, f"key_{_contrastive_name(stripped)}", value)
            for name, stripped, value in teacher
            if not stripped.startswith("queue")
        ]
    elif teacher:
        logger.info("%s: left %d tensors of the teacher beside the network", path, len(teacher))
    plain: dict[str, np.ndarray] = {}
    for name, stripped, value in own:
        if stripped in plain:
            raise CheckpointError(f"checkpoint {path} holds {stripped} twice, once as {name}")
        plain[stripped] = value
    return plain, is_public


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
