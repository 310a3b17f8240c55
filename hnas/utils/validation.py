"""What is measured on validation images while a supernet trains; nothing of it enters training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import paddle
from paddle import nn

from hnas.architecture_file import IMAGENET30, note_on_imagenet30, read_truth
from hnas.base.errors import UserError
from hnas.dataset.image_folder import DataError, ImageList
from hnas.evaluation.counts import Counts
from hnas.evaluation.images import balanced_order
from hnas.evaluation.reference import Batches, evaluate_network, evaluate_reference
from hnas.evaluation.results import warn_if_guessing
from hnas.evaluation.shared import SharedEvaluator
from hnas.models.elastic import ElasticResNet
from hnas.parallel.distributed import (
    from_main_process,
    is_main_process,
    rank,
    sum_over_ranks,
    world_size,
)
from hnas.programs.options import Options
from hnas.programs.runtime import calibration_images, validation_images, validation_loader
from hnas.ranking.correlations import kendall_tau_b, none_if_nan, pearson
from hnas.ranking.findings import FEWEST
from hnas.search_space import Architecture

logger = logging.getLogger(__name__)

TRIED = 2000
"""Validation images on which a pretrained network is tried, which tell its accuracy to 1.1 %."""

Figures = dict[str, float | None]
"""By name; None for one that is not defined. ``broken``, 1, is there where training broke."""


def measurement(
    options: Options, network: ElasticResNet, pretrained: nn.Layer, frozen: bool, train: ImageList
) -> Callable[[], Figures]:
    """What stage 2 measures: the extremes' accuracies and, with ``--rank_gt``, how well it ranks.

    ``pretrained`` is the plain largest network, which the supernet started from, and which is tried
    now; ``frozen`` says whether its BatchNorm is, and ``train`` are the training images, for
    re-calibration.

    Raises:
        UserError: validation images or ``--rank_gt`` cannot be used.
    """
    images = validation_images(options, train)
    loader = validation_loader(options, images)
    calibration = calibration_images(options, frozen, train)
    at_first = try_pretrained(options, pretrained, images, network)
    truth = read_ranked(options, network) if options.rank_gt else {}
    share = share_of(options, images) if truth else ()
    # What a part of a training step has, which keeps as many activations.
    batch = max(1, options.batch_size // options.accumulate)

    def measure() -> Figures:
        found = extremes(network, loader, calibration, at_first) if is_main_process() else {}
        return {**found, **ranking(network, truth, share, batch, calibration)} if truth else found

    return measure


def measurement_of_largest(
    options: Options, network: ElasticResNet, pretrained: nn.Layer, train: ImageList
) -> Callable[[], Figures] | None:
    """What stage 1 measures: how much of the ``pretrained`` network's accuracy the largest
    sub-network keeps, on ``TRIED`` images; None, where these cannot be had, which is told."""
    at_first = None
    if is_main_process():
        try:
            images = validation_images(options, train)
            at_first = try_pretrained(options, pretrained, images, network)
        except DataError as error:
            logger.warning("no measurement will tell whether training breaks: %s", error)
    # All measure or none: they wait for each other afterwards.
    if not from_main_process([at_first is not None])[0]:
        return None
    if not is_main_process():
        return dict
    loader = tried(options, images)
    return lambda: extremes(network, loader, None, at_first, ("largest",))


def extremes(
    network: ElasticResNet,
    loader: Batches,
    calibration: paddle.Tensor | None,
    at_first: Counts,
    names: Sequence[str] = ("largest", "smallest"),
) -> Figures:
    """Top-1 accuracy of the largest and the smallest sub-network; a warning where training broke.

    ``calibration`` are uint8 images [N, 3, H, W] to re-calibrate BatchNorm with, None: at running
    statistics. ``at_first`` are the hits of the network that the supernet started from.
    """
    space = network.space
    archs = {"largest": space.largest(), "smallest": space.smallest()}
    counts = [evaluate_reference(network, [archs[name]], loader, calibration) for name in names]
    guesses = warn_if_guessing(counts[0], network.num_classes, "the largest sub-network")
    broken = guesses or warn_if_broken(counts[0], at_first, OF_AN_EPOCH)
    top1 = {f"{n}_top1": float(c.accuracy()[0]) for n, c in zip(names, counts, strict=True)}
    return {**top1, **({"broken": 1.0} if broken else {})}


OF_AN_EPOCH = (
    "a ranking by such a supernet is worth little; if the next epoch is no better, start again "
    "with clip_norm auto or, where that is so, a third of what it comes to"
)
OF_THE_START = (
    "training from such weights breaks easily; run stage 1 again, with clip_norm auto or, where "
    "that is so, a third of what it comes to"
)


def warn_if_broken(largest: Counts, at_first: Counts, told: str) -> bool:
    """Warn where the largest sub-network is right less than half as often as the pretrained one,
    and say what is ``told`` then; gives whether it did.

    Training at frozen statistics can break without a loss that is not finite, and scores of such a
    supernet look like any other. What few images may do by chance is passed over.
    """
    hits, images = largest.top1[0], largest.images
    before = at_first.top1[0] * images / at_first.images
    half = before / 2
    broken = bool(hits < half - 3 * math.sqrt(half * (1 - half / images)))
    if broken:
        logger.warning(
            "the largest sub-network is right about %d of %d images, the pretrained network about "
            "%d: %s",
            *(hits, images, before, told),
        )
    return broken


def network_accuracy(network: nn.Layer, loader: Batches, classes: int) -> Figures:
    """What pretrain and train_standalone measure in the main process: one network's accuracies,
    with a warning where it guesses among so many ``classes``."""
    if not is_main_process():
        return {}
    counts = evaluate_network(network, loader)
    broken = {"broken": 1.0} if warn_if_guessing(counts, classes, "the network") else {}
    top1, top5 = counts.accuracy()[0], counts.top5_accuracy()[0]
    return {"top1": float(top1), "top5": float(top5), **broken}


def tried(options: Options, images: ImageList) -> Batches:
    """Of validation images ``TRIED``, of all classes alike."""
    return validation_loader(options, images, balanced_order(images.labels, 0)[:TRIED])


def try_pretrained(
    options: Options, network: nn.Layer, images: ImageList, supernet: ElasticResNet
) -> Counts | None:
    """Tell how good the pretrained network is on some images, and give its hits: in the main
    process. A warning where it guesses, or is wrong mostly, as is most of what it teaches then; and
    where the weights of ``--ckpt_dir``, at frozen statistics, have lost much of its accuracy.

    Raises:
        UserError: an image cannot be decoded, or logits are not finite.
    """
    if not is_main_process():
        return None
    name = f"the pretrained network {options.pretrained}"
    loader = tried(options, images)
    counts = evaluate_network(network, loader, who=name)
    if options.initial_weights and options.train_flag and supernet.frozen:
        largest = evaluate_reference(supernet, [supernet.space.largest()], loader)
        warn_if_broken(largest, counts, OF_THE_START)
    hits, number = counts.top1[0], counts.images
    logger.info("%s is right about %d of %d validation images", name, hits, number)
    if not warn_if_guessing(counts, len(images.classes), name) and 2 * hits < number:
        told = "%s is wrong about most images, so most of what it teaches is wrong: train it longer"
        logger.warning(told, name)
    return counts


def share_of(options: Options, images: ImageList) -> Batches:
    """Batches of this process's share of the images; of one process all."""
    share = np.arange(rank(), len(images), world_size())
    return validation_loader(options, images, share) if len(share) else ()


def ranking(
    network: ElasticResNet,
    truth: Mapping[Architecture, float],
    loader: Batches,
    batch: int,
    calibration: paddle.Tensor | None = None,
) -> Figures:
    """Kendall's tau-b and Pearson's correlation of a supernet's accuracies with ``truth``.

    All processes call this together; ``loader`` gives each its share of the images, of which a
    walk over all architectures takes at most ``batch``. ``calibration`` as in :func:`extremes`.
    """
    # What Paddle compiles here gets numbers of its own, as in a run that does not measure.
    with paddle.utils.unique_name.guard():
        evaluator = SharedEvaluator(network, list(truth), calibration)
        counts = Counts.zeros(len(truth))
        for images, labels in loader:
            for start in range(0, len(labels), batch):
                part = slice(start, start + batch)
                evaluator.evaluate(images[part], labels[part], counts)
    hits = sum_over_ranks(paddle.to_tensor(counts.top1)).numpy()
    true = np.array([*truth.values()])
    return {
        "kendall_tau_b": none_if_nan(kendall_tau_b(hits, true)),
        "pearson": none_if_nan(pearson(hits, true)),
    }


def read_ranked(options: Options, network: ElasticResNet) -> dict[Architecture, float]:
    """What ``--rank_gt`` says of architectures, which the supernet must hold.

    Raises:
        UserError: a wrong file, fewer than three, or one that the supernet does not hold.
    """
    path, truth = options.rank_gt, read_truth(options.rank_gt)
    if len(truth) < FEWEST:
        raise UserError(
            f"--rank_gt {path} has {len(truth)} architectures; a ranking needs at least {FEWEST}"
        )
    for arch in truth:
        try:
            network.space.shared_plan(arch)
        except UserError as error:
            raise UserError(f"--rank_gt {path}: {error}") from None
    if path == IMAGENET30 and is_main_process():
        own = options.backbone, options.image_size, network.num_classes
        logger.warning("%s", note_on_imagenet30(own))
    return truth


def figures_text(figures: Figures) -> str:
    """Figures for a log line."""
    return ", ".join(
        f"{name} {'not defined' if value is None else format(value, '.4f')}"
        for name, value in figures.items()
        if name != "broken"  # a warning has said so
    )
