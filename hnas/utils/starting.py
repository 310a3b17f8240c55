"""What a run starts from: weights of earlier stages, or the checkpoint where it was killed."""

from __future__ import annotations

import dataclasses
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from paddle import nn

from hnas.base.errors import UserError
from hnas.base.settings import changed_settings
from hnas.dataset.image_store import sample_digest
from hnas.dataset.loader import EpochLoader
from hnas.models.elastic import ElasticResNet, plain_name
from hnas.models.pinasv2 import PiNASv2, build_network
from hnas.models.resnet import ResNet
from hnas.programs.flags import TRAINING
from hnas.programs.options import Options
from hnas.search_space import SearchSpace
from hnas.utils.hapi_wrapper import ResumableModel
from hnas.weights.checkpoint import (
    STATES,
    load_training,
    newest_set,
    noted_run,
    read_progress,
)
from hnas.weights.loading import (
    PARAMS,
    Checkpoint,
    backbone_weights,
    check_classes,
    is_contrastive,
    load_weights,
    read_checkpoint,
)

logger = logging.getLogger(__name__)


def pretrained_network(
    options: Options, classes: Sequence[str], space: SearchSpace
) -> tuple[ResNet, str]:
    """The plain largest network with the weights of ``--pretrained``, and their file's SHA-256.

    Raises:
        UserError: missing or of another network, e.g. for another number of classes.
    """
    network = build_network(options.backbone, len(classes), space, elastic=False)
    digest = start_from_checkpoint(network, options.pretrained, classes).digest
    network.eval()
    return network, digest


def start_from_checkpoint(
    network: nn.Layer, path: str, classes: Sequence[str], checkpoint: Checkpoint | None = None
) -> Checkpoint:
    """Give a plain network or a supernet the weights of a checkpoint of any stage, and return it:
    of ``path``, or a ``checkpoint`` that was read from it already.

    Raises:
        UserError: it is of another network or other classes.
    """
    checkpoint = checkpoint or read_checkpoint(path)
    weights = backbone_weights(checkpoint.weights)
    check_classes(dataclasses.replace(checkpoint, weights=weights), classes, path)
    load_weights(network, weights, path)
    if isinstance(network, ElasticResNet):
        network.mixed = not checkpoint.freeze_bn
    logger.info("weights from %s", path)
    return checkpoint


def start_from_pretrained(supernet: nn.Layer, network: ResNet, reorder: bool = True) -> None:
    """Give a supernet the weights of a plain network, which is reordered before, and left so."""
    if reorder:
        network.reorder()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    load_weights(supernet, weights, "pretrained network")
    if isinstance(supernet, ElasticResNet):
        supernet.mixed = False  # The statistics are of one network.


CONTRAST_PARTS = ("neck.", "key_backbone.", "key_neck.", "queue")
"""What stage one has besides the backbone, by the start of the names."""


def start_contrast_from_checkpoint(network: PiNASv2, path: str, classes: Sequence[str]) -> str:
    """Give stage one's model the weights of a checkpoint; gives back the file's SHA-256.

    Of stage one's own, or of public code's stage one, everything is taken: neck, key encoder and
    queue too. A part that a file has not (weights of another stage have the backbone only; public
    ones may lack the key encoder or its neck) starts as in a new run, the key encoder as a copy
    of the query encoder.

    Raises:
        UserError: it is of another network or other classes.
    """
    checkpoint = read_checkpoint(path)
    check_classes(checkpoint, classes, path)
    found = dict(checkpoint.weights)
    if not is_contrastive(found):
        load_weights(network.backbone, found, path)
        network.reset_key_encoder()
        logger.info("weights from %s", path)
        return checkpoint.digest
    own = {plain_name(name): tensor.numpy() for name, tensor in network.state_dict().items()}
    absent = [part for part in CONTRAST_PARTS if not any(n.startswith(part) for n in found)]
    if absent:
        logger.info("%s: as in a new run start %s", path, ", ".join(absent).replace(".", ""))
    lacking = [name for name in own if name.startswith(tuple(absent))]
    new = {name: found.get(name.removeprefix("key_"), own[name]) for name in lacking}
    load_weights(network, found | new, path)
    logger.info("stage 1 goes on with %d tensors of %s", len(found), path)
    return checkpoint.digest


# Flags that do not change what is computed: a test changes all of them. Paths may differ on another
# machine; what they lead to is in the set by its digest. Of another device the log tells.
# fmt: off
NEUTRAL_FLAGS = frozenset((
    "save_dir", "save_dir_new", "save_freq", "save_steps", "keep", "log_freq", "eval_freq",
    "bn_calibration_images", "resume", "train_flag", "image_dir", "pretrained",
    "ckpt_dir", "num_workers", "device", "verify_images", "bad_images", "cache_dir",
    "visualdl_dir", "modelarch_file", "rank_gt",
))
# fmt: on
# What decides which images a step of an epoch sees.
DATA_ORDER = frozenset({"images", "image_pixels", "total_batch", "seed"})


def describe_run(options: Options, loader: EpochLoader) -> dict:
    """What a run's result depends on: settings and images, with which, the epoch and the step
    samplers and augmentations draw."""
    settings = {
        option.name: getattr(options, option.name)
        for option in dataclasses.fields(options)
        if option.name not in NEUTRAL_FLAGS and option.metadata["stages"] & TRAINING
    }
    images = loader.dataset.images
    data = {"images": images.digest(), "image_pixels": sample_digest(images)}
    return {**settings, "total_batch": loader.total_batch, **data}


def resume(
    model: ResumableModel, options: Options, run: Mapping, steps: int
) -> tuple[int, int, str, Mapping | None]:
    """Restore the set that ``--resume`` names, or the newest one of the folder that it names.

    ``run``, :func:`describe_run`'s, is compared with the checkpoint's; an epoch has ``steps``.

    Returns:
        The next step's epoch and number, from 0, the run's id, and the state of its log, if any.

    Raises:
        UserError: a folder was named and holds nothing to resume from, or the checkpoint is
            of another teacher, within an epoch of other images, batches or seed, or foreign.
    """
    stem = find_set(options)
    if stem is None:
        return 0, 0, secrets.token_hex(8), None
    progress = read_progress(stem)
    try:
        check_progress(progress)
        before, epoch, step = progress["run"], progress["epoch"], progress["step"]
        changed = changed_settings(before, run)
        if "teacher" in changed and "teacher" in before:
            told = f"{stem} is of another teacher than --pretrained {options.pretrained}"
            raise UserError(f"{told}; give the same, or start anew")
        if step and set(changed) & DATA_ORDER:
            raise UserError(
                f"{stem} is in the middle of an epoch, and {', '.join(changed)} differ now; resume "
                f"with the same, or remove {stem}.*: then the epoch begins anew"
            )
        if step > steps:
            raise ValueError(f"step {step} of an epoch of {steps}")
        load_training(stem, model.network, model.optimizer, progress)
        model.gradients.restore(progress.get("scaler", {}))
    except NONSENSE as error:
        raise UserError(
            f"{stem}{STATES} is not what this program saves: {type(error).__name__}, {error}; "
            "start anew"
        ) from None
    if "initial_weights" in changed:
        changed.remove("initial_weights")
        logger.info("other weights to start from than before: no matter, the set's are taken")
    if changed:
        logger.warning("resumed with other values than before: %s", ", ".join(changed))
    logger.info("resumed from %s", stem)
    return epoch, step, progress["run_id"], progress["losses"]


# What Python, NumPy and Paddle raise when they are given values of other kinds than they gave.
NONSENSE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def find_set(options: Options) -> Path | None:
    """The set that ``--resume`` names, without suffix, or the newest one of the run that began last
    in the folder that it names; None: start anew.

    If that run was killed before its first save, the sets in the folder are an earlier run's:
    ``auto`` leaves them alone, and a folder's name asks for them.

    Raises:
        UserError: a folder was named and holds nothing to resume from.
    """
    if not options.resume:
        if (earlier := newest_set(options.save_dir)) is not None:
            logger.warning(
                "starting anew, and writing over the epochs of an earlier run; to go on from that "
                "one, stop now and give --resume %s",
                earlier,
            )
        return None
    if (stem := named_set(options)) is not None:
        return stem
    auto = options.resume == "auto"
    folder = options.save_dir if auto else options.resume
    run_id = noted_run(folder)
    stem = newest_set(folder, run_id)
    if stem is not None:
        return stem
    earlier = newest_set(folder) if run_id is not None else None
    if earlier is not None and not auto:
        logger.warning("%s is of an earlier run than the one that began last there", earlier)
        return earlier
    if not auto:
        raise UserError(f"--resume {folder}: no whole set of .pdparams, .pdopt, .pdstates")
    if earlier is None:
        logger.info("nothing to resume in %s: starting anew", folder)
    else:
        logger.warning(
            "the run that began last in %s was killed before it saved anything, and %s is an "
            "earlier run's: starting anew; to go on from the earlier run, give --resume %s",
            *(folder, earlier, folder),
        )
    return None


def named_set(options: Options) -> Path | None:
    """The one set that ``--resume`` names, also by its weights; None: no set or a folder."""
    stem = options.resume.removesuffix(PARAMS)
    return Path(stem) if Path(f"{stem}{STATES}").is_file() else None


def check_progress(progress: Mapping) -> None:
    """Check position, losses, figures and settings of a ``.pdstates``.

    Raises:
        KeyError, TypeError, ValueError: it is not what this program saves.
    """
    losses = progress["losses"]
    for name, parts in (("epoch", "epoch_losses"), ("step", "step_losses")):
        number, values = progress[name], losses[parts]
        if type(number) is not int:
            raise TypeError(f"{name} is a {type(number).__name__}")
        if not isinstance(values, np.ndarray) or values.dtype != np.float64:
            raise TypeError(f"{parts} is no array of float64")
        if values.shape != (number,) or not np.isfinite(values).all():
            raise ValueError(f"{parts} are not {number} finite numbers")
    seconds = losses["seconds"]
    if type(seconds) is not float or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r:.40}")
    if not isinstance(rows := losses.get("validation", []), list):
        raise TypeError(f"validation is a {type(rows).__name__}")
    for figures in map(dict, rows):
        number = figures.pop("epoch")
        if type(number) is not int or not 0 <= number < progress["epoch"]:
            raise ValueError(f"validation is after epoch {number!r:.40}")
        values = [value for value in figures.values() if value is not None]
        if not all(type(value) is float and math.isfinite(value) for value in values):
            raise ValueError(f"validation after epoch {number} is not finite")
    if not isinstance(progress["run"], dict):
        raise TypeError(f"run is a {type(progress['run']).__name__}")
    for name, value in progress["run"].items():
        if not isinstance(value, bool | int | float | str):
            raise TypeError(f"{name} of run is a {type(value).__name__}")
