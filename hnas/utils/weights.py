"""Files of weights: finding, reading, checking, loading and writing them.

Weights are ``NAME.pdparams`` or ``NAME.safetensors``, with their SHA-256 beside them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from hnas.base.errors import UserError
from hnas.base.files import digest_path, file_digest, replacing
from hnas.base.safe_pickle import load_pickle
from hnas.models.elastic import plain_name

logger = logging.getLogger(__name__)

PARAMS, SAFETENSORS = ".pdparams", ".safetensors"
PARALLEL_PREFIXES = ("_layers.", "module.")
BACKBONE_PREFIX = "backbone."
# Stage one's own tensors, which stage two does not take over.
CONTRASTIVE = re.compile(r"(key_backbone|neck|key_neck)\..+|queue|queue_pointer")
NAME_TABLE = "StructuredToParameterName@@"
CLASSIFIER = re.compile(r"blocks\.\d+\.fc\.bias")
LISTED = 10


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, or of another network."""


class NotFiniteError(CheckpointError):
    """Weights that are not finite; they must not replace good ones."""


def find_checkpoint(path: str | Path) -> Path:
    """The weights' file of ``path``: the file, or its name without the suffix.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for candidate in (path, *(Path(f"{path}{suffix}") for suffix in (PARAMS, SAFETENSORS))):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise CheckpointError(
            f"checkpoint {path} is a folder; name the file, e.g. {path}/0{PARAMS}"
        )
    raise CheckpointError(f"checkpoint {path} does not exist (nor {path}{PARAMS})")


def read_state(path: str | Path):
    """What a file holds, without running anything that it says; see :func:`load_pickle`.

    Raises:
        CheckpointError: its SHA-256 is not the one that stands beside it.
        UnsafePickleError: broken, or holds something else than a state dict.
    """
    path = Path(path)
    _check_digest(path)
    return _read_safetensors(path) if path.suffix == SAFETENSORS else load_pickle(path)


def _check_digest(path: Path) -> None:
    recorded = digest_path(path)
    if not recorded.is_file():
        return
    words = recorded.read_text(encoding="utf-8", errors="replace").split()
    if not words or words[0] != file_digest(path):
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {recorded.name}; copy it again, "
            f"or remove {recorded.name} if the change is yours"
        )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:
        # A broken file can make its reader fail in any way.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot read {path}: {reason}") from None


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Weights by parameter name, in the plain network's names, whatever wrote them.

    DataParallel's prefixes and PaddleSlim's ``.fn`` are taken off.

    Raises:
        CheckpointError: missing file, not a dict of arrays, or a name twice.
        UnsafePickleError: broken, or holds something else than a state dict.
    """
    path = find_checkpoint(path)
    state = read_state(path)
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
        plain = _plain(str(name))
        if plain in weights:
            raise CheckpointError(f"checkpoint {path} holds {plain} twice, once as {name}")
        weights[plain] = value
    return weights


def _plain(name: str) -> str:
    while name.startswith(PARALLEL_PREFIXES):
        name = name.partition(".")[2]
    return plain_name(name)


def backbone_weights(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a classifier takes from ``weights``: all, or of stage one's model the backbone.

    Neck, key encoder and queue stay behind, as the recipe says; nothing else does.
    """
    if not any(name.startswith(BACKBONE_PREFIX) for name in weights):
        return dict(weights)
    taken = {
        name.removeprefix(BACKBONE_PREFIX): value
        for name, value in weights.items()
        if not CONTRASTIVE.fullmatch(name)
    }
    left = len(weights) - len(taken)
    logger.info("stage-one checkpoint: left %d tensors of neck, key encoder and queue", left)
    return taken


def check_classes(weights: Mapping[str, np.ndarray], classes: int, source: str | Path) -> None:
    """The classifier in ``weights`` must have as many outputs as there are class folders.

    Raises:
        CheckpointError: it has not.
    """
    for name, value in weights.items():
        if CLASSIFIER.fullmatch(name) and value.shape != (classes,):
            raise CheckpointError(
                f"checkpoint {source} classifies {value.size} classes, but image_dir has {classes} "
                "class folders; use the images that it was trained on"
            )


def load_weights(layer: nn.Layer, weights: Mapping[str, np.ndarray], source: str | Path) -> None:
    """Set all parameters and buffers of ``layer``, checking names, shapes and dtypes.

    Floats are converted to the layer's precision; integers only fit integers.

    Args:
        layer: a plain network or a supernet.
        weights: by plain name; see :func:`read_weights`.
        source: where they come from, for the message.

    Raises:
        CheckpointError: they differ; lists at most ten names of each kind and a count.
    """
    expected = {_plain(name): tensor for name, tensor in layer.state_dict().items()}
    both = [(name, weights[name], expected[name]) for name in expected if name in weights]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {list(value.shape)} instead of {list(tensor.shape)}"
            for name, value, tensor in both
            if list(value.shape) != list(tensor.shape)
        ],
        "of another type": [
            f"{name} {value.dtype} instead of {_dtype(tensor)}"
            for name, value, tensor in both
            if value.dtype.kind != np.dtype(_dtype(tensor)).kind
        ],
    }
    listed = [
        f"{len(names)} {kind}: {', '.join(names[:LISTED])}{', ...' * (len(names) > LISTED)}"
        for kind, names in problems.items()
        if names
    ]
    if listed:
        raise CheckpointError(f"checkpoint {source} is of another network: {'; '.join(listed)}")
    for _, value, tensor in both:
        tensor.set_value(value.astype(_dtype(tensor)))


def _dtype(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).removeprefix("paddle.")


def write_state(path: str | Path, state) -> str:
    """Write what ``paddle.save`` takes, or as safetensors if the suffix says so.

    A temporary file takes the place of the old one when it is whole; its SHA-256 goes beside it.

    Returns:
        The SHA-256.

    Raises:
        UserError: the file cannot be written; the previous one is as it was.
    """
    path = Path(path)
    with replacing(path) as temporary:
        if path.suffix == SAFETENSORS:
            _write_safetensors(temporary, state)
        else:
            paddle.save(state, str(temporary))
        digest = file_digest(temporary)
        # Between the two renames a file without a digest is right, one with an old digest wrong.
        digest_path(path).unlink(missing_ok=True)
    with replacing(digest_path(path)) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    return digest


def _write_safetensors(path: Path, state: Mapping[str, paddle.Tensor]) -> None:
    from safetensors.numpy import save

    path.write_bytes(save({name: np.ascontiguousarray(value) for name, value in state.items()}))


def check_finite(network: nn.Layer) -> None:
    """Look at every weight and statistic.

    Raises:
        NotFiniteError: naming the first tensor that is not finite throughout.
    """
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(paddle.isfinite(tensor).all()):
            raise NotFiniteError(f"{name} is not finite")
