"""Files of weights: finding, reading, checking, loading and writing them.

Weights are ``NAME.pdparams`` or ``NAME.safetensors``, with their SHA-256 beside them. Whatever
wrote a file (this project, the organisers' or the winners' code, Paddle 2 or 3), its tensors are
read under this project's plain names; see ``public_files.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from hnas.base.errors import UserError, word_of
from hnas.base.files import (
    digest_path,
    distinct,
    file_digest,
    recorded_digest,
    replacing,
    write_digest,
)
from hnas.base.safe_pickle import load_pickle
from hnas.models.elastic import ElasticResNet, plain_name
from hnas.models.pinasv2 import build_network
from hnas.search_space import BACKBONES
from hnas.weights.public_files import LISTED, plain_weights, state_dict_of

logger = logging.getLogger(__name__)

PARAMS, SAFETENSORS = ".pdparams", ".safetensors"
ABOUT = "about@pinas"
ABOUT_TYPES = {"backbone": str, "arch": str, "freeze_bn": bool, "classes": list}
"""What is said there: backbone, a single network's code, frozen statistics, names of classes."""
BACKBONE_PREFIX = "backbone."
# Stage one's own tensors, which stage two does not take over.
CONTRASTIVE = re.compile(r"(key_backbone|neck|key_neck)\..+|queue|queue_pointer")
CLASSIFIER = re.compile(r"(backbone\.)?blocks\.[0-9]+\.fc\.bias")
LAST_NORM = re.compile(r"(backbone\.)?blocks\.[0-9]+\.bn2\.weight")
VARIANCE = "._variance"
STEM_WEIGHTS = 3 * 7 * 7  # of a channel
LONGEST_NAME = 300


class NotFiniteError(UserError):
    """Weights that are not finite: none to go on with, nor to replace good ones."""


def find_checkpoint(path: str | Path) -> Path:
    """The weights' file of ``path``: the file, or its name without the suffix.

    Raises:
        UserError: there is none.
    """
    for suffix in ("", PARAMS, SAFETENSORS):
        if Path(f"{path}{suffix}").is_file():
            return Path(f"{path}{suffix}")
    if Path(path).is_dir():
        raise UserError(f"checkpoint {path} is a folder; name the file, e.g. {path}/0{PARAMS}")
    raise UserError(f"checkpoint {path} does not exist (nor {path}{PARAMS})")


def read_state(path: str | Path) -> tuple[object, str]:
    """What a file holds, without running anything that it says, and the SHA-256 of what was read.

    The file may be replaced at any time, so nothing of it is read again; see :func:`load_pickle`.

    Raises:
        UserError: broken, not what the digest beside it says, or something else than a state dict.
    """
    path = Path(path)
    try:
        recorded = recorded_digest(path)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    digest = hashlib.sha256(content).hexdigest()
    if recorded not in (None, digest):
        raise UserError(
            f"{path} is damaged: its SHA-256 is not the one beside it; copy it again, or remove "
            "the .sha256 file if the change is yours"
        )
    read = _read_safetensors if path.suffix == SAFETENSORS else load_pickle
    return read(path, content), digest


def _read_safetensors(path: Path, content: bytes) -> dict:
    try:
        arrays = load_safetensors(content)
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        said = head.get("__metadata__", {})
        return arrays | ({ABOUT: said[ABOUT]} if ABOUT in said else {})
    except Exception as error:
        # A broken file can make its reader fail in any way.
        raise UserError(f"cannot read {path}: {word_of(error)}") from None


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds: arrays by plain name, and how they were trained, as
    :func:`write_state` was told; empty if the file does not say. ``digest`` is its SHA-256."""

    weights: dict[str, np.ndarray]
    about: dict
    digest: str

    @property
    def freeze_bn(self) -> bool:
        """Whether they were trained at frozen BatchNorm statistics, as far as the file says."""
        return bool(self.about.get("freeze_bn", False))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Weights by parameter name, in the plain network's names, whatever wrote them.

    Raises:
        UserError: missing or broken file, no dict of arrays, a name twice or one that is none, or
            negative variances.
        NotFiniteError: NaN, infinity, or numbers that are infinite as float32.
    """
    path = find_checkpoint(path)
    content, digest = read_state(path)
    state = state_dict_of(content, path)
    about = _read_about(state.pop(ABOUT, "{}"), path)
    arrays = {}
    for name, value in state.items():
        # Paddle saves a single tensor as (parameter name, array).
        if isinstance(value, tuple) and len(value) == 2:
            value = value[1]
        told = f"checkpoint {path}: {name!r:.{LONGEST_NAME}} is"
        if not isinstance(value, np.ndarray):
            raise UserError(f"{told} a {type(value).__name__}, not an array")
        if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(f"{told} no name of a tensor")
        arrays[name] = value
    weights, is_public = plain_weights(arrays, path)
    _check_values(weights, path)
    # Public Track 1 code trains at frozen statistics, whatever its users meant to do.
    about = about or ({"freeze_bn": True} if is_public else {})
    return Checkpoint(weights, about, digest)


def _check_values(weights: Mapping[str, np.ndarray], source: Path) -> None:
    """Look at every number that was read, as the float32 that networks compute with."""
    for name, value in weights.items():
        if value.dtype.kind != "f":
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(value.astype(np.float32, copy=False))
        if not finite.all():
            raise NotFiniteError(
                f"checkpoint {source}: {value.size - np.count_nonzero(finite)} of {value.size} "
                f"numbers of {name} are not finite in float32; take an earlier checkpoint"
            )
        if name.endswith(VARIANCE) and (value < 0).any():
            raise UserError(
                f"checkpoint {source}: {name} holds negative variances; take another file"
            )


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """The weights of :func:`read_checkpoint`."""
    return read_checkpoint(path).weights


def _read_about(text, path: Path) -> dict:
    try:
        about = json.loads(text, object_pairs_hook=distinct)
        said = [(about.get(key, kind()), kind) for key, kind in ABOUT_TYPES.items()]
        said += [(name, str) for name in about.get("classes", [])]
        if all(isinstance(value, kind) for value, kind in said):
            return about
    except (AttributeError, TypeError, ValueError, RecursionError):
        pass
    raise UserError(f"checkpoint {path}: {ABOUT!r} is not what this program writes")


def backbone_weights(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a classifier takes from ``weights``: all, or of stage one's model the backbone.

    Neck, key encoder and queue stay behind, as the recipe says; nothing else does.
    """
    if not is_contrastive(weights):
        return dict(weights)
    own = [name for name in weights if not CONTRASTIVE.fullmatch(name)]
    left = len(weights) - len(own)
    logger.info("stage-one checkpoint: left %d tensors of neck, key encoder and queue", left)
    return {name.removeprefix(BACKBONE_PREFIX): weights[name] for name in own}


def is_contrastive(weights: Mapping[str, np.ndarray]) -> bool:
    """Whether ``weights`` are of stage one's model."""
    return any(name.startswith(BACKBONE_PREFIX) for name in weights)


def looks_like(weights: Mapping[str, np.ndarray]) -> str | None:
    """The name of the backbone whose widths ``weights`` have; None: none of ours."""
    prefix = BACKBONE_PREFIX if is_contrastive(weights) else ""
    stem = weights.get(f"{prefix}blocks.0.conv.weight", np.empty(0)).size
    last = max((v.size for name, v in weights.items() if LAST_NORM.fullmatch(name)), default=0)
    for name, (space, contrastive) in BACKBONES.items():
        widths = STEM_WEIGHTS * space.base_channels[0], space.base_channels[-1]
        if (stem, last) == widths and contrastive == bool(prefix):
            return name
    return None


def check_classes(checkpoint: Checkpoint, classes: Sequence[str], source: str | Path) -> None:
    """The classifier must be of these classes: as many, and of the same names if it says them.

    Raises:
        UserError: it is not.
    """
    trained = checkpoint.about.get("classes", list(classes))
    if "classes" not in checkpoint.about:
        logger.info("%s does not name its classes: taken to be those of image_dir", source)
    weights = checkpoint.weights.items()
    outputs = [value.size for name, value in weights if CLASSIFIER.fullmatch(name)]
    for number in (*outputs, len(trained)):
        if number != len(classes):
            raise UserError(
                f"checkpoint {source} classifies {number} classes, but image_dir has "
                f"{len(classes)} class folders; use the images that it was trained on"
            )
    for own, other in zip(trained, classes, strict=True):
        if own != other:
            raise UserError(
                f"checkpoint {source} was trained on other classes: {own!r} where image_dir has "
                f"{other!r}; use folders of the same names"
            )


def load_weights(layer: nn.Layer, weights: Mapping[str, np.ndarray], source: str | Path) -> None:
    """Set all parameters and buffers of a network, checking names, shapes and dtypes.

    Floats are converted to the layer's precision; integers only fit integers. The message says
    that the weights are from ``source``.

    Raises:
        UserError: they differ; lists at most ten names of each kind and a count.
    """
    expected = {plain_name(name): tensor for name, tensor in layer.state_dict().items()}
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
        found = looks_like(weights)
        hint = f" (it is a {found} file)" if found not in (None, looks_like(expected)) else ""
        raise UserError(f"checkpoint {source} is of another network{hint}: {'; '.join(listed)}")
    for _, value, tensor in both:
        tensor.set_value(value.astype(_dtype(tensor)))
    if isinstance(layer, ElasticResNet):
        layer.mixed = True  # As far as is known; those who know how they were trained say so.


def load_supernet(path: str | Path) -> ElasticResNet:
    """A supernet with the weights of a checkpoint of any stage, in eval mode.

    Backbone and number of classes are the file's.

    Raises:
        UserError: as :func:`read_checkpoint`, or it is of no supernet.
    """
    checkpoint = read_checkpoint(path)
    weights = backbone_weights(checkpoint.weights)
    backbone = looks_like(weights)
    classifier = [value for name, value in weights.items() if CLASSIFIER.fullmatch(name)]
    if backbone is None or not classifier:
        raise UserError(f"checkpoint {path} is of no supernet that is known here")
    network = build_network(backbone, classifier[0].size)
    load_weights(network, weights, path)
    network.mixed = not checkpoint.freeze_bn
    network.eval()
    return network


def _dtype(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).removeprefix("paddle.")


def write_state(path: str | Path, state, about: Mapping | None = None) -> str:
    """Write what ``paddle.save`` takes, or as safetensors if the suffix says so.

    ``about`` says how weights were trained, in plain values: see :class:`Checkpoint`. The SHA-256
    goes beside the file, and is returned.

    Raises:
        UserError: the file cannot be written; the previous one is as it was.
    """
    path = Path(path)
    with replacing(path) as temporary:
        if path.suffix == SAFETENSORS:
            arrays = {name: np.ascontiguousarray(value) for name, value in state.items()}
            metadata = None if about is None else {ABOUT: json.dumps(about)}
            temporary.write_bytes(save_safetensors(arrays, metadata))
        else:
            content = state if about is None else {**state, ABOUT: json.dumps(about)}
            paddle.save(content, str(temporary))
        digest = file_digest(temporary)
        # Between the two renames a file without a digest is right, one with an old digest wrong.
        digest_path(path).unlink(missing_ok=True)
    write_digest(path, digest)
    return digest


def check_finite(network: nn.Layer) -> None:
    """Raise :class:`NotFiniteError` for the first tensor that is not finite throughout."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(paddle.isfinite(tensor).all()):
            raise NotFiniteError(f"{name} is not finite")
