"""The pieces that both training stages share: weights to start from, resuming, fitting."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from paddle import nn

from hnas.dataset.loader import EpochLoader
from hnas.evaluation.architecture_file import write_json
from hnas.models.registry import build_classifier
from hnas.models.resnet import ResNet
from hnas.utils.callbacks import EpochCheckpoint, TrainLogger
from hnas.utils.checkpoint import (
    CheckpointError,
    backbone_weights,
    latest_training,
    load_training,
    load_weights,
    read_weights,
)
from hnas.utils.hapi_wrapper import SupernetModel, learning_rate, momentum_optimizer
from hnas.utils.options import Options

logger = logging.getLogger(__name__)


def pretrained_network(options: Options, num_classes: int, space) -> ResNet:
    """The plain largest network with the weights of ``--pretrained``.

    Raises:
        CheckpointError: missing or of another network, e.g. for another number of classes.
    """
    network = build_classifier(options.backbone, num_classes, space, elastic=False)
    load_weights(network, read_weights(options.pretrained), options.pretrained)
    network.eval()
    return network


def start_from_pretrained(supernet: nn.Layer, network: ResNet) -> None:
    """Give a supernet the reordered weights of a plain network, which is left reordered."""
    network.reorder()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    load_weights(supernet, weights, "pretrained network")


def start_from_checkpoint(supernet: nn.Layer, path: str) -> None:
    """Give a supernet the weights of a checkpoint of any stage."""
    load_weights(supernet, backbone_weights(read_weights(path)), path)
    logger.info("weights from %s", path)


def prepare(model: SupernetModel, options: Options, steps_per_epoch: int, **more) -> None:
    """``paddle.Model.prepare`` with the recipe's optimizer and learning rate."""
    schedule = learning_rate(
        options.lr,
        options.batch_size,
        options.warmup * steps_per_epoch,
        options.max_epoch * steps_per_epoch,
    )
    optimizer = momentum_optimizer(model.network, schedule, options.momentum, options.weight_decay)
    model.prepare(optimizer, **more)


def fit(model: SupernetModel, options: Options, loader: EpochLoader, callbacks=()) -> None:
    """Train from the start or from where ``--resume`` says, save, and record the losses.

    ``SAVE_DIR/history.json`` holds the mean loss of each epoch and the seconds of this run.
    """
    start_epoch = resume(model, options)
    began = time.perf_counter()
    log = TrainLogger(options.log_freq)
    saver = EpochCheckpoint(options.save_dir, options.save_freq)
    model.fit(loader, options.max_epoch, [log, saver, *callbacks], start_epoch)
    history = Path(options.save_dir) / "history.json"
    earlier = json.loads(history.read_text())["epoch_losses"] if start_epoch else []
    write_json(
        history,
        {
            "epoch_losses": earlier[:start_epoch] + log.epoch_losses,
            "seconds": round(time.perf_counter() - began, 1),
        },
    )


def resume(model: SupernetModel, options: Options) -> int:
    """Restore the newest epoch of the folder that ``--resume`` names; gives the next epoch.

    Raises:
        CheckpointError: a folder was named and holds nothing to resume from.
    """
    if not options.resume:
        return 0
    folder = options.save_dir if options.resume == "auto" else options.resume
    stem = latest_training(folder)
    if stem is None and options.resume != "auto":
        raise CheckpointError(f"--resume {folder}: no epoch with .pdparams, .pdopt and .pdstates")
    if stem is None:
        logger.info("nothing to resume in %s: starting anew", folder)
        return 0
    progress = load_training(stem, model.network, model._optimizer)
    logger.info("resumed from %s: epoch %d is next", stem, progress["epoch"] + 1)
    return progress["epoch"]
