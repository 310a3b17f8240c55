"""The only place that reads or writes checkpoints."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from hnas.models.elastic import plain_name
from hnas.utils.errors import UserError
from hnas.utils.safe_pickle import load_pickle

logger = logging.getLogger(__name__)

PARAMS, OPTIMIZER, STATES = ".pdparams", ".pdopt", ".pdstates"
PARALLEL_PREFIXES = ("_layers.", "module.")
BACKBONE_PREFIX = "backbone."
NAME_TABLE = "StructuredToParameterName@@"
LISTED = 10


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, or of another network."""


def find_checkpoint(path: str | Path) -> Path:
    """The weights' file of ``path``: the file, or its name without ``.pdparams``.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for candidate in (path, path.with_name(path.name + PARAMS)):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise CheckpointError(
            f"checkpoint {path} is a folder; name the file, e.g. {path}/0{PARAMS}"
        )
    raise CheckpointError(f"checkpoint {path} does not exist (nor {path}{PARAMS})")


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Weights by parameter name, in the plain network's names, whatever wrote them.

    DataParallel's prefixes and PaddleSlim's ``.fn`` are taken off.

    Raises:
        CheckpointError: missing file, or not a dict of arrays.
        UnsafePickleError: broken, or holds something else than a state dict.
    """
    path = find_checkpoint(path)
    state = _read_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(state).__name__}, not a state dict")
    state.pop(NAME_TABLE, None)
    weights = {}
    for name, value in state.items():
        # Paddle saves a single tensor as (parameter name, array).
        if isinstance(value, tuple) and len(value) == 2:
            value = value[1]
        if not isinstance(value, np.ndarray):
            raise CheckpointError(
                f"checkpoint {path}: {name!r} is a {type(value).__name__}, not an array"
            )
        weights[_plain(str(name))] = value
    return weights


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _plain(name: str) -> str:
    for prefix in PARALLEL_PREFIXES:
        name = name.removeprefix(prefix)
    return plain_name(name)


def backbone_weights(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a classifier takes from ``weights``: all, or of stage one's model the backbone.

    Neck, key encoder and queue stay behind, as the recipe says.
    """
    backbone = {
        name.removeprefix(BACKBONE_PREFIX): value
        for name, value in weights.items()
        if name.startswith(BACKBONE_PREFIX)
    }
    if not backbone:
        return dict(weights)
    left = len(weights) - len(backbone)
    logger.info("stage-one checkpoint: took the backbone, left %d neck and key tensors", left)
    return backbone


def load_weights(layer: nn.Layer, weights: Mapping[str, np.ndarray], source: str | Path) -> None:
    """Set all parameters and buffers of ``layer``, checking names, shapes and dtypes.

    Args:
        layer: a plain network or a supernet.
        weights: by plain name; see :func:`read_weights`.
        source: where they come from, for the message.

    Raises:
        CheckpointError: names or shapes differ; lists at most ten of each kind and a count.
    """
    expected = {_plain(name): tensor for name, tensor in layer.state_dict().items()}
    problems = []
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    mismatched = [
        f"{name} {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and list(weights[name].shape) != list(tensor.shape)
    ]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("shape", mismatched)):
        if names:
            listed = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
            problems.append(f"{len(names)} {kind}: {listed}")
    if problems:
        raise CheckpointError(f"checkpoint {source} is of another network: {'; '.join(problems)}")
    for name, tensor in expected.items():
        value = weights[name]
        if value.dtype.kind not in "fiu":
            raise CheckpointError(f"checkpoint {source}: {name} has dtype {value.dtype}")
        tensor.set_value(value.astype(str(tensor.dtype).removeprefix("paddle.")))


def write_state(path: str | Path, state) -> None:
    """Write what ``paddle.save`` takes: temporary file, fsync, atomic rename.

    A kill or a full disk leaves the previous file as it was.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        paddle.save(state, str(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def save_training(stem: Path, network: nn.Layer, optimizer, progress: dict) -> None:
    """Write ``stem.pdopt``, ``.pdstates`` and, last, ``.pdparams``, which makes it complete."""
    write_state(f"{stem}{OPTIMIZER}", optimizer_state(network, optimizer))
    write_state(f"{stem}{STATES}", progress)
    write_state(f"{stem}{PARAMS}", network.state_dict())


def load_training(stem: Path, network: nn.Layer, optimizer) -> dict:
    """Restore what :func:`save_training` wrote; gives the progress back."""
    load_weights(network, read_weights(f"{stem}{PARAMS}"), f"{stem}{PARAMS}")
    restore_optimizer(network, optimizer, load_pickle(f"{stem}{OPTIMIZER}"), f"{stem}{OPTIMIZER}")
    return load_pickle(f"{stem}{STATES}")


def latest_training(folder: str | Path) -> Path | None:
    """The newest epoch in ``folder`` that holds all three files, as a path without suffix."""
    epochs = [
        int(path.stem)
        for path in Path(folder).glob(f"*{PARAMS}")
        if re.fullmatch(r"\d+", path.stem)
        and all(path.with_suffix(suffix).is_file() for suffix in (OPTIMIZER, STATES))
    ]
    return Path(folder) / str(max(epochs)) if epochs else None


def optimizer_state(network: nn.Layer, optimizer) -> dict:
    """The optimizer's state under the network's structured names.

    Paddle's own names count the layers that the process ever made, so they would not fit a
    process that built them in another order.
    """
    structured = {tensor.name: name for name, tensor in network.named_parameters()}
    state = {}
    for name, value in optimizer.state_dict().items():
        owner = _owner(name, structured)
        state[f"{structured[owner]}@{name.removeprefix(owner)}" if owner else name] = value
    return state


def restore_optimizer(network: nn.Layer, optimizer, state: dict, source: str) -> None:
    """Set the optimizer's state from :func:`optimizer_state`'s.

    Raises:
        CheckpointError: it is of another network.
    """
    own = {name: tensor.name for name, tensor in network.named_parameters()}
    state.pop(NAME_TABLE, None)
    restored = {}
    for key, value in state.items():
        name, at, suffix = key.partition("@")
        if at and name not in own:
            raise CheckpointError(f"optimizer state {source} is of another network: no {name}")
        if at:
            restored[own[name] + suffix] = paddle.to_tensor(value)
        else:
            restored[key] = value
    # Paddle refuses a state without the velocity of a parameter; sub-networks may have left
    # some untrained so far.
    for tensor in network.parameters():
        velocity = f"{tensor.name}_velocity_0"
        if not tensor.stop_gradient and velocity not in restored:
            restored[velocity] = paddle.zeros_like(tensor)
    optimizer.set_state_dict(restored)


def _owner(state_name: str, structured: dict[str, str]) -> str | None:
    """The parameter whose name ``state_name`` starts with."""
    parts = state_name.split("_")
    for end in range(len(parts), 0, -1):
        prefix = "_".join(parts[:end])
        if prefix in structured:
            return prefix
    return None
