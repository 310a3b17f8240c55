"""The pieces that both training stages share: weights to start from, resuming, fitting."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from paddle import nn

from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.dataset.loader import EpochLoader
from hnas.models.convolution import use_onednn
from hnas.models.elastic import ElasticResNet, plain_name
from hnas.models.pinasv2 import PiNASv2
from hnas.models.registry import build_network
from hnas.models.resnet import ResNet
from hnas.parallel.distributed import (
    GradientExchange,
    StopSignals,
    agree,
    barrier,
    copy_from_main_process,
    is_main_process,
    leave,
    world_size,
)
from hnas.search_space import SearchSpace
from hnas.utils.callbacks import HISTORY, Checkpoints, TrainLogger, VisualDLWriter
from hnas.utils.gradient_step import (
    GradientStep,
    learning_rate,
    momentum_optimizer,
    swinging_rate,
)
from hnas.utils.hapi_wrapper import ResumableModel
from hnas.utils.options import Options
from hnas.utils.resuming import describe_run, resume
from hnas.utils.validation import Figures, Validation
from hnas.utils.weights import (
    PARAMS,
    Checkpoint,
    backbone_weights,
    check_classes,
    is_contrastive,
    load_weights,
    read_checkpoint,
    write_state,
)

logger = logging.getLogger(__name__)


def pretrained_network(options: Options, classes: Sequence[str], space: SearchSpace) -> ResNet:
    """The plain largest network with the weights of ``--pretrained``.

    Raises:
        CheckpointError: missing or of another network, e.g. for another number of classes.
    """
    network = build_network(options.backbone, len(classes), space, elastic=False)
    load_backbone(network, options.pretrained, classes)
    network.eval()
    return network


def load_backbone(network: nn.Layer, path: str, classes: Sequence[str]) -> Checkpoint:
    """Set a plain network's or a supernet's weights from a checkpoint of any stage.

    Raises:
        CheckpointError: it is of another network or other classes.
    """
    checkpoint = read_checkpoint(path)
    weights = backbone_weights(checkpoint.weights)
    check_classes(replace(checkpoint, weights=weights), classes, path)
    load_weights(network, weights, path)
    if isinstance(network, ElasticResNet):
        network.mixed = not checkpoint.freeze_bn
    return checkpoint


def start_from_pretrained(supernet: nn.Layer, network: ResNet) -> None:
    """Give a supernet the reordered weights of a plain network, which is left reordered."""
    network.reorder()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    load_weights(supernet, weights, "pretrained network")
    if isinstance(supernet, ElasticResNet):
        supernet.mixed = False  # The statistics are of one network.


def start_from_checkpoint(supernet: nn.Layer, path: str, classes: Sequence[str]) -> Checkpoint:
    """Give a supernet the weights of a checkpoint of any stage; the checkpoint is handed back.

    Raises:
        CheckpointError: it is of another network or other classes.
    """
    checkpoint = load_backbone(supernet, path, classes)
    logger.info("weights from %s", path)
    return checkpoint


CONTRAST_PARTS = ("neck.", "key_backbone.", "key_neck.", "queue")
"""What stage one has besides the backbone, by the start of the names."""


def start_contrast_from_checkpoint(network: PiNASv2, path: str, classes: Sequence[str]) -> None:
    """Give stage one's model the weights of a checkpoint.

    Of stage one's own, or of public code's stage one, everything is taken: neck, key encoder and
    queue too. A part that a file has not (weights of another stage have the backbone only; public
    ones may lack the key encoder or its neck) starts as in a new run, the key encoder as a copy
    of the query encoder; so does a queue of another size.

    Raises:
        CheckpointError: it is of another network or other classes.
    """
    checkpoint = read_checkpoint(path)
    check_classes(checkpoint, classes, path)
    found = dict(checkpoint.weights)
    if not is_contrastive(found):
        load_weights(network.backbone, found, path)
        network.reset_key_encoder()
        logger.info("weights from %s", path)
        return
    own = {plain_name(name): tensor.numpy() for name, tensor in network.state_dict().items()}
    shape, wanted = found.get("queue", own["queue"]).shape, own["queue"].shape
    if shape[:-1] == wanted[:-1] and shape != wanted:
        logger.warning(
            "%s has a queue of %d keys, not --queue_size %d: starting with a new one",
            path,
            shape[-1],
            wanted[-1],
        )
        del found["queue"]
        found.pop("queue_pointer", None)
    absent = [part for part in CONTRAST_PARTS if not any(n.startswith(part) for n in found)]
    if absent:
        named = ", ".join(part.rstrip(".") for part in absent)
        logger.info("%s: as in a new run start %s", path, named)
    start = {**found}
    for name in own:
        if name.startswith(tuple(absent)):
            start[name] = found.get(name.removeprefix("key_"), own[name])
    load_weights(network, start, path)
    logger.info("stage 1 goes on with %d tensors of %s", len(found), path)


def prepare(model: ResumableModel, options: Options, steps_per_epoch: int) -> None:
    """``paddle.Model.prepare`` with the recipe's optimizer and learning rate.

    Raises:
        UserError: the batch cannot be split as ``--accumulate`` says, or ``--amp O2``.
    """
    if options.batch_size % options.accumulate:
        raise UserError(
            f"--batch_size {options.batch_size} is not a multiple of "
            f"--accumulate {options.accumulate}"
        )
    if options.amp == "O2":
        raise UserError("--amp O2 is for stage 3; train with O1, which keeps float32 weights")
    total_batch = options.batch_size * world_size()
    if options.lr_schedule == "swing":
        schedule = swinging_rate(options.lr, total_batch, options.max_epoch)
    else:
        schedule = learning_rate(
            options.lr,
            total_batch,
            options.warmup * steps_per_epoch,
            options.max_epoch * steps_per_epoch,
        )
    optimizer = momentum_optimizer(
        model.network,
        schedule,
        options.momentum,
        options.weight_decay,
        options.clip_norm,
        options.nesterov,
        options.no_norm_decay,
    )
    if options.onednn:
        teacher = getattr(model, "teacher", None)
        use_onednn(model.network, *([teacher] if teacher is not None else []))
    model.prepare(optimizer, GradientStep(optimizer, options.accumulate, options.amp))


def fit(
    model: ResumableModel,
    options: Options,
    loader: EpochLoader,
    measure: Callable[[], Figures] | None = None,
) -> None:
    """Train from the start or from where ``--resume`` says, save, and record the losses.

    ``SAVE_DIR/final.pdparams`` holds the last weights, ``SAVE_DIR/history.json`` the mean loss of
    each epoch and what was measured after it.

    Args:
        measure: see :class:`Validation`; called every ``eval_freq`` epochs.

    Raises:
        Stopped: SIGTERM or Ctrl-C, after saving.
        DivergedError: the loss is not finite.
    """
    log = TrainLogger(options.log_freq)
    about = about_weights(options, loader)
    curves = []
    if options.visualdl_dir and is_main_process():
        curves.append(VisualDLWriter(options.visualdl_dir, log))
    run = describe_run(options, loader)
    start = resume(model, options, log, run, len(loader))
    logger.info("training from epoch %d step %d", start.epoch + 1, start.step + 1)
    if start.epoch >= options.max_epoch:
        logger.info("all %d epochs are done already: nothing is left to train", options.max_epoch)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals(patient=world_size() > 1))
        if world_size() > 1:
            agree(start.position, "the epoch and step to start from")
            copy_from_main_process([*model.network.state_dict().values()])
            trained = [p for p in model.network.parameters() if not p.stop_gradient]
            stop = model.exchange = GradientExchange(trained, stop)
        callbacks = [log, Checkpoints(options, log, stop, run, start.run_id, about)]
        if measure is not None and options.eval_freq:
            callbacks.append(Validation(measure, options.eval_freq, log, options.save_dir))
        callbacks += [stack.enter_context(closing(writer)) for writer in curves]
        model.fit(loader, options.max_epoch, callbacks, start.position)
    if is_main_process():
        # Also when nothing was left to train: a kill may have come just before either.
        write_json(Path(options.save_dir) / HISTORY, log.history())
        path = Path(options.save_dir) / f"final{PARAMS}"
        write_state(path, model.network.state_dict(), about)
    barrier()
    leave()


def about_weights(options: Options, loader: EpochLoader) -> dict:
    """What a file of weights says of how they were trained; see :class:`Checkpoint`."""
    own = {"arch": options.arch} if options.arch else {}
    return {
        "backbone": options.backbone,
        "freeze_bn": options.freeze_bn,
        "classes": list(loader.dataset.images.classes),
        **own,
    }
