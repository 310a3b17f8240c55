"""The only place that reads or writes checkpoints.

Weights are ``NAME.pdparams`` or ``NAME.safetensors``. What training resumes from is a *set* of
three files, ``NAME.pdparams``, ``NAME.pdopt`` (optimizer and learning rate scheduler) and
``NAME.pdstates`` (position, generators, losses). The last is written last and holds the digests
of the others, so a set that a crash left half-written, or mixed of two, is never loaded.
"""

from __future__ import annotations

import logging
import re
import time
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

PARAMS, OPTIMIZER, STATES, SAFETENSORS = ".pdparams", ".pdopt", ".pdstates", ".safetensors"
PARALLEL_PREFIXES = ("_layers.", "module.")
BACKBONE_PREFIX = "backbone."
# Stage one's own tensors, which stage two does not take over.
CONTRASTIVE = re.compile(r"(key_backbone|neck|key_neck)\..+|queue|queue_pointer")
NAME_TABLE = "StructuredToParameterName@@"
CLASSIFIER = re.compile(r"blocks\.\d+\.fc\.bias")
LISTED = 10
# Sets: 3 is after epoch 3 (from 0), 3-120 is 120 steps into epoch 3.
SET_NAME = re.compile(r"(\d+)(?:-(\d+))?")


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


def save_training(stem: str | Path, network: nn.Layer, optimizer, progress: Mapping) -> None:
    """Write the set ``stem``.

    Args:
        stem: path without suffix.
        progress: what :func:`load_training` gives back: plain values and arrays.

    Raises:
        NotFiniteError: before anything is written.
        UserError: files that cannot be written.
    """
    check_finite(network)
    digests = {
        PARAMS: write_state(f"{stem}{PARAMS}", network.state_dict()),
        OPTIMIZER: write_state(f"{stem}{OPTIMIZER}", optimizer_state(network, optimizer)),
    }
    write_state(f"{stem}{STATES}", {**progress, "digests": digests, "saved": time.time()})


def load_training(stem: str | Path, network: nn.Layer, optimizer) -> dict:
    """Restore what :func:`save_training` wrote; gives the progress back.

    Raises:
        CheckpointError: of another network, or files that are not of one set.
    """
    progress = read_progress(stem)
    _check_whole(Path(stem), progress)
    load_weights(network, read_weights(f"{stem}{PARAMS}"), f"{stem}{PARAMS}")
    restore_optimizer(network, optimizer, read_state(f"{stem}{OPTIMIZER}"), f"{stem}{OPTIMIZER}")
    return progress


def read_progress(stem: str | Path) -> dict:
    """The content of ``stem.pdstates``.

    Raises:
        CheckpointError: not a state of this program.
    """
    progress = read_state(f"{stem}{STATES}")
    digests = progress.get("digests") if isinstance(progress, dict) else None
    whole = isinstance(digests, dict) and set(digests) == {PARAMS, OPTIMIZER}
    if not whole or not isinstance(progress.get("saved"), float):
        raise CheckpointError(f"{stem}{STATES} is not what this program saves; start anew")
    return progress


def newest_set(folder: str | Path) -> Path | None:
    """The set in ``folder`` that was saved last and is whole, as a path without suffix.

    One that a crash left unfinished, or that is damaged, is passed over with a line in the log.
    """
    sets = []
    for path in Path(folder).glob(f"*{STATES}"):
        stem = path.with_suffix("")
        if not SET_NAME.fullmatch(stem.name):
            continue
        try:
            sets.append((read_progress(stem)["saved"], stem))
        except UserError as error:
            logger.warning("passed over %s: %s", stem, error)
    for _, stem in sorted(sets, reverse=True):
        try:
            _check_whole(stem, read_progress(stem))
            return stem
        except UserError as error:
            logger.warning("passed over %s: %s", stem, error)
    return None


def _check_whole(stem: Path, progress: Mapping) -> None:
    for suffix, digest in progress["digests"].items():
        path = Path(f"{stem}{suffix}")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if file_digest(path) != digest:
            raise CheckpointError(f"{path} is damaged or not of the same set as {stem}{STATES}")


def remove_set(stem: str | Path) -> None:
    """Delete a set, in the order that never leaves a half that looks whole."""
    for suffix in (STATES, OPTIMIZER, PARAMS):
        for path in (Path(f"{stem}{suffix}"), digest_path(f"{stem}{suffix}")):
            path.unlink(missing_ok=True)


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
    own = dict(network.named_parameters())
    state.pop(NAME_TABLE, None)
    restored = {}
    for key, value in state.items():
        name, at, suffix = key.partition("@")
        if at and (name not in own or list(np.shape(value)) != list(own[name].shape)):
            raise CheckpointError(f"optimizer state {source} is of another network: {name}")
        if at:
            restored[own[name].name + suffix] = paddle.to_tensor(value)
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
