"""The layouts in which weights of Track 1 are passed around, under this project's names.

Public code saves the whole wrapped model: the network under ``model.``, after training on several
cards under ``model._layers.``, with PaddleSlim's ``.fn`` in the names of convolutions; the teacher
beside it under ``ofa_teacher_model.``; in stage one the neck ``model.neck.mlp.0`` and ``.2``, the
``queue`` and ``queue_ptr``, and the teacher is the key encoder. Paddle 2 adds a table of names, and
cuts arrays of more than a GiB into slices.
"""

from __future__ import annotations

import logging
import math
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
MOST_NESTS, MOST_AXES = 3, 32
LISTED = 10


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, or of another network."""


def state_dict_of(content, path: str | Path) -> dict:
    """The state dict in what a file holds, out of its nests and with its large arrays whole.

    Raises:
        CheckpointError: there is none, or it is not clear which.
    """
    for _ in range(MOST_NESTS + 1):
        found = content if isinstance(content, dict) else {}
        nests = [key for key in NESTED if isinstance(found.get(key), dict)]
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
    else:
        raise CheckpointError(f"checkpoint {path} nests states in states without end")
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, not a state dict"
        )
    state = dict(content)
    state.pop(NAME_TABLE, None)
    return _join_slices(state, path)


def _join_slices(state: dict, path: str | Path) -> dict:
    """Put arrays together that Paddle cut into slices of less than a GiB."""
    cuts = state.pop(SLICES, {})
    if not isinstance(cuts, dict):
        raise CheckpointError(f"checkpoint {path}: {SLICES!r} is not a table of slices")
    for name, cut in cuts.items():
        try:
            if name in state:
                raise ValueError("it is there whole, too")
            state[name] = _joined(cut, state)
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {path}: the slices of {name!r} do not fit together: {error}"
            ) from None
    return state


def _joined(cut, state: dict) -> np.ndarray:
    """The array that ``cut`` describes; its slices are taken out of ``state``.

    Raises:
        ValueError: ``cut`` is not what Paddle writes, or the slices are not those.
    """
    names, shape = (
        cut.get(key) if isinstance(cut, dict) else None for key in ("slices", "OriginShape")
    )
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError("they are not listed")
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > MOST_AXES
        or any(type(side) is not int or side < 0 for side in shape)
    ):
        raise ValueError("their shape is none")
    parts = []
    for name in names:
        part = state.pop(name, None) if isinstance(name, str) else None
        if not isinstance(part, np.ndarray):
            raise ValueError(f"{name!r:.100} is missing, or no array")
        parts.append(part.reshape(-1))
    if len({part.dtype for part in parts}) > 1:
        raise ValueError("they are of several types")
    values = sum(part.size for part in parts)
    if values != math.prod(shape):
        raise ValueError(f"{values} values for another shape")
    return np.concatenate(parts).reshape(shape)


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
