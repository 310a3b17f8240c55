"""The layouts in which weights of Track 1 are passed around, under this project's names.

Public code saves the whole wrapped model: the network under ``model.``, after training on several
cards under ``model._layers.``, with PaddleSlim's ``.fn`` in the names of convolutions; the teacher
beside it under ``ofa_teacher_model.``; in stage one the neck ``model.neck.mlp.0`` and ``.2``, the
``queue`` and ``queue_ptr``, and the teacher is the key encoder. Paddle 2 adds a table of names, and
cuts arrays of more than a GiB into slices.
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
SLICES = "UnpackBigParamInfor@@"
NESTED = ("state_dict", "model")
WRAPPERS = ("_layers.", "module.", "model.")
TEACHER = "ofa_teacher_model."
NECK = re.compile(r"neck\.mlp\.([02])\.(.+)")
NECK_LAYERS = {"0": "hidden", "2": "project"}


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, or of another network."""


def state_dict_of(content, path: str | Path) -> dict:
    """The state dict in what a file holds, out of its nests and with its large arrays whole.

    Raises:
        CheckpointError: there is none.
    """
    while isinstance(content, dict):
        nests = [key for key in NESTED if isinstance(content.get(key), dict)]
        if not nests:
            break
        others = [str(key) for key in content if key != nests[0]]
        if others:
            logger.info("%s: took %r, left %s", path, nests[0], ", ".join(others))
        content = content[nests[0]]
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, not a state dict"
        )
    state = dict(content)
    state.pop(NAME_TABLE, None)
    return _join_slices(state, path)


def _join_slices(state: dict, path: str | Path) -> dict:
    """Put arrays together that Paddle cut into slices of less than a GiB."""
    for name, cut in (state.pop(SLICES, None) or {}).items():
        try:
            parts = [np.asarray(state.pop(part)).reshape(-1) for part in cut["slices"]]
            state[name] = np.concatenate(parts).reshape(cut["OriginShape"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {path}: the slices of {name} do not fit together ({error})"
            ) from None
    return state


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
    own, teacher = {}, {}
    for name, value in arrays.items():
        stripped = _unwrapped(name)
        part, rest = (
            (teacher, _unwrapped(stripped.removeprefix(TEACHER)))
            if (stripped.startswith(TEACHER))
            else (own, stripped)
        )
        if rest in part:
            raise CheckpointError(f"checkpoint {path} holds {rest} twice, once as {name}")
        part[rest] = value
    is_public = bool(teacher) or any(name.startswith("model.") for name in arrays)
    if any(NECK.fullmatch(name) for name in own):
        queries, keys = _contrastive(own), _contrastive(teacher)
        keys = {
            f"key_{name}": value for name, value in keys.items() if not name.startswith("queue")
        }
        return {**queries, **keys}, True
    if teacher:
        logger.info("%s: left %d tensors of the teacher beside the network", path, len(teacher))
    return own, is_public


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return plain_name(name)


def _contrastive(part: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One encoder of stage one, and what stands beside it, as this project names the query's."""
    named = {}
    for name, value in part.items():
        layer = NECK.fullmatch(name)
        if layer:
            named[f"neck.{NECK_LAYERS[layer[1]]}.{layer[2]}"] = value
        elif name.startswith("blocks."):
            named[f"backbone.{name}"] = value
        else:
            named["queue_pointer" if name == "queue_ptr" else name] = value
    return named
