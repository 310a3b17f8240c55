"""Going on where a run was killed: which checkpoint, whether it fits, and the place in the run."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hnas.dataset.loader import EpochLoader
from hnas.utils.callbacks import TrainLogger
from hnas.utils.checkpoint import (
    STATES,
    load_training,
    new_run_id,
    newest_set,
    noted_run,
    read_progress,
    restore_generators,
    run_of,
)
from hnas.utils.flags import TRAINING
from hnas.utils.hapi_wrapper import ResumableModel
from hnas.utils.options import Options
from hnas.utils.public_files import CheckpointError

logger = logging.getLogger(__name__)

# Flags that do not change what is computed; paths may differ on another machine.
# fmt: off
NEUTRAL_FLAGS = frozenset((
    "save_dir", "save_dir_new", "save_freq", "save_steps", "keep", "log_freq", "eval_freq",
    "bn_calibration_images", "resume", "train_flag", "image_dir", "pretrained", "use_ckpt",
    "ckpt_dir", "num_workers", "device", "verify_images", "bad_images", "cache_dir",
    "visualdl_dir", "modelarch_file", "init", "rank_gt",
))
# fmt: on
# What decides which images a step of an epoch sees.
DATA_ORDER = frozenset({"images", "total_batch", "seed"})


def describe_run(options: Options, loader: EpochLoader) -> dict:
    """What a run's result depends on: its settings and its images.

    The samplers and augmentations have no state of their own: what they draw depends on these
    settings, the epoch and the step.
    """
    settings = {
        option.name: getattr(options, option.name)
        for option in dataclasses.fields(options)
        if option.name not in NEUTRAL_FLAGS and option.metadata["stages"] & TRAINING
    }
    return {
        **settings,
        "total_batch": loader.total_batch,
        "images": loader.dataset.images.digest(),
    }


class Start(NamedTuple):
    """Where training goes on: the next step's epoch and number, from 0, of the run ``run_id``."""

    epoch: int
    step: int
    run_id: str

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.step


def resume(
    model: ResumableModel, options: Options, log: TrainLogger, run: Mapping, steps: int
) -> Start:
    """Restore the newest checkpoint of the folder that ``--resume`` names.

    Args:
        run: :func:`describe_run`'s, compared with the checkpoint's.
        steps: of an epoch.

    Raises:
        CheckpointError: a folder was named and holds nothing to resume from, or the checkpoint
            is within an epoch of other images, batches or seed, or is none of this program.
    """
    stem = find_set(options)
    if stem is None:
        return Start(0, 0, new_run_id())
    progress = read_progress(stem)
    try:
        check_progress(progress)
        changed = changed_settings(progress["run"], run)
        epoch, step = progress["epoch"], progress["step"]
        if step and set(changed) & DATA_ORDER:
            raise CheckpointError(
                f"{stem} is in the middle of an epoch, and {', '.join(changed)} differ now; resume "
                "with the same, or start anew"
            )
        if step > steps:
            raise ValueError(f"step {step} of an epoch of {steps}")
        load_training(stem, model.network, model._optimizer)
        log.restore(progress["losses"])
        restore_generators(progress["generators"])
        model.gradients.restore(progress.get("scaler", {}))
    except NONSENSE as error:
        raise CheckpointError(
            f"{stem}{STATES} is not what this program saves: {type(error).__name__}, {error}; "
            "start anew"
        ) from None
    if changed:
        logger.warning("resumed with other values than before: %s", ", ".join(changed))
    logger.info("resumed from %s", stem)
    return Start(epoch, step, run_of(progress))


# What Python, NumPy and Paddle raise when they are given values of other kinds than they gave.
NONSENSE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def find_set(options: Options) -> Path | None:
    """The newest set of the folder that ``--resume`` names, of the run that began last there.

    If that run was killed before its first save, the sets in the folder are an earlier run's:
    ``auto`` leaves them alone, and a folder's name asks for them.

    Returns:
        A path without suffix, or None: start anew.

    Raises:
        CheckpointError: a folder was named and holds nothing to resume from.
    """
    if not options.resume:
        return None
    auto = options.resume == "auto"
    folder = options.save_dir if auto else options.resume
    run_id = noted_run(folder)
    stem = newest_set(folder, run_id)
    if stem is not None:
        return stem
    earlier = newest_set(folder) if run_id is not None else None
    if earlier is None:
        if not auto:
            raise CheckpointError(
                f"--resume {folder}: no whole set of .pdparams, .pdopt, .pdstates"
            )
        logger.info("nothing to resume in %s: starting anew", folder)
    elif auto:
        logger.warning(
            "the run that began last in %s was killed before it saved anything, and %s is an "
            "earlier run's: starting anew; to go on from the earlier run, give --resume %s",
            folder,
            earlier,
            folder,
        )
    else:
        logger.warning("%s is of an earlier run than the one that began last there", earlier)
    return None if auto else earlier


def check_progress(progress: Mapping) -> None:
    """Check position, losses and settings of a ``.pdstates``.

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
        if values.shape != (number,):
            raise ValueError(f"{name} is {number}, and {parts} has the shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{parts} are not finite")
    seconds = losses["seconds"]
    if type(seconds) is not float or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r:.40}")
    check_validation(losses.get("validation", []), progress["epoch"])
    for name in ("run", "generators"):
        if not isinstance(progress[name], dict):
            raise TypeError(f"{name} is a {type(progress[name]).__name__}")
    for name, value in progress["run"].items():
        if not isinstance(value, bool | int | float | str):
            raise TypeError(f"{name} of run is a {type(value).__name__}")


def check_validation(rows, epochs: int) -> None:
    """Check what was measured after the first ``epochs`` epochs, see :class:`Validation`.

    Raises:
        KeyError, TypeError, ValueError: it is not what this program saves.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TypeError("validation is no list of rows")
    numbers = [row["epoch"] for row in rows]
    if any(type(number) is not int or not 0 <= number < epochs for number in numbers):
        raise ValueError(f"validation after epochs {numbers!r:.40}, of {epochs}")
    for row in rows:
        figures = [value for name, value in row.items() if name != "epoch" and value is not None]
        if not all(type(value) is float and math.isfinite(value) for value in figures):
            raise ValueError(f"validation after epoch {row['epoch']} is not finite")


def changed_settings(before: Mapping, run: Mapping) -> list[str]:
    """Which of a run's settings had another value before."""
    if "batch_size" in before:
        # Checkpoints of times when one process was all there was.
        before = {"total_batch": before["batch_size"], **before}
    return [key for key in run if before.get(key, run[key]) != run[key]]
