"""What is measured on validation images while a supernet trains; nothing of it enters training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.callbacks import Callback

from hnas.architecture_file import read_truth
from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.dataset.image_folder import ImageList
from hnas.dataset.loader import EvalLoader
from hnas.evaluation.counts import Counts
from hnas.evaluation.reference import Batches, evaluate_network, evaluate_reference
from hnas.evaluation.results import warn_if_guessing
from hnas.evaluation.shared import SharedEvaluator
from hnas.models.elastic import ElasticResNet
from hnas.parallel.distributed import (
    barrier,
    is_main_process,
    rank,
    sum_over_ranks,
    world_size,
)
from hnas.ranking.correlations import kendall_tau_b, none_if_nan, pearson
from hnas.search_space import Architecture, SearchSpace
from hnas.utils.callbacks import HISTORY, TrainLogger
from hnas.utils.checkpoint import generators_state, restore_generators
from hnas.utils.options import Options
from hnas.utils.runtime import validation_loader

logger = logging.getLogger(__name__)

FEWEST = 3
"""Architectures of which a ranking can be judged."""

Figures = dict[str, float | None]
"""By name; None for one that is not defined."""


@dataclass(frozen=True)
class Extremes:
    """Top-1 accuracy of the largest and the smallest sub-network.

    Attributes:
        network: the supernet.
        loader: of all validation images.
        calibration: as in :class:`Ranking`.
        pretrained: the plain largest network, which the supernet started from.
    """

    network: ElasticResNet
    loader: Batches
    calibration: paddle.Tensor | None
    pretrained: nn.Layer

    def measure(self) -> Figures:
        """Both figures, in the main process only; a warning where training broke."""
        if not is_main_process():
            return {}
        space = self.network.space
        largest, smallest = (
            evaluate_reference(self.network, [arch], self.loader, self.calibration)
            for arch in (space.largest(), space.smallest())
        )
        who = "the largest sub-network"
        guesses = warn_if_guessing(largest, self.network.num_classes, who)
        # Where it is right about half of the images, it cannot be below half of another's.
        if not guesses and 2 * largest.top1[0] < largest.images:
            warn_if_broken(largest, self.at_first)
        return {
            "largest_top1": float(largest.accuracy()[0]),
            "smallest_top1": float(smallest.accuracy()[0]),
        }

    @cached_property
    def at_first(self) -> Counts:
        """Hits of the pretrained network, counted once."""
        return evaluate_network(self.pretrained, self.loader)


def warn_if_broken(largest: Counts, at_first: Counts) -> None:
    """Warn where the largest sub-network is right less than half as often as the pretrained one.

    Training at frozen statistics can break without a loss that is not finite, and scores of such a
    supernet look like any other. What few images may do by chance is passed over.
    """
    hits, before, images = largest.top1[0], at_first.top1[0], largest.images
    half = before / 2
    if hits < half - 3 * math.sqrt(half * (1 - half / images)):
        logger.warning(
            "the largest sub-network is right about %d of %d images, the pretrained network about "
            "%d: a ranking by such a supernet is worth little; if the next epoch is no better, "
            "start again with a lower --lr, or with --clip_norm",
            hits,
            images,
            before,
        )


@dataclass(frozen=True)
class Ranking:
    """How well a supernet ranks architectures whose stand-alone accuracies are known.

    Attributes:
        network: the supernet.
        truth: accuracies of the architectures.
        loader: of this process's share of the validation images.
        image_size: their height and width.
        batch: the most images of a walk.
        calibration: as stage 3 would take them: uint8 images [N, 3, H, W] to re-calibrate every
            sub-network's BatchNorm with; None scores at the running statistics.
    """

    network: ElasticResNet
    truth: Mapping[Architecture, float]
    loader: Batches
    image_size: int
    batch: int
    calibration: paddle.Tensor | None = None

    @classmethod
    def of_run(
        cls,
        options: Options,
        network: ElasticResNet,
        images: ImageList,
        loader: EvalLoader,
        calibration: paddle.Tensor | None,
    ) -> Ranking:
        """What ``--rank_gt`` asks for, on the ``images`` that ``loader`` gives.

        Raises:
            UserError: see :func:`read_ranked`.
        """
        truth = read_ranked(options.rank_gt, network.space)
        share = np.arange(rank(), len(images), world_size())
        if world_size() > 1:
            loader = validation_loader(options, images, share) if len(share) else ()
        # What a part of a training step has, which keeps as many activations.
        batch = max(1, options.batch_size // options.accumulate)
        return cls(network, truth, loader, options.image_size, batch, calibration)

    def measure(self) -> Figures:
        """Kendall's tau-b and Pearson's correlation; all processes call this together."""
        # What Paddle compiles here gets numbers of its own, as in a run that does not measure.
        with paddle.utils.unique_name.guard():
            evaluator = SharedEvaluator(self.network, list(self.truth), self.calibration)
            counts = Counts.zeros(len(self.truth))
            for images, labels in self.loader:
                for start in range(0, len(labels), self.batch):
                    part = slice(start, start + self.batch)
                    evaluator.evaluate(images[part], labels[part], counts)
        hits = sum_over_ranks(paddle.to_tensor(counts.top1)).numpy()
        true = np.array([*self.truth.values()])
        return {
            "kendall_tau_b": none_if_nan(kendall_tau_b(hits, true)),
            "pearson": none_if_nan(pearson(hits, true)),
        }


def read_ranked(path: str, space: SearchSpace) -> dict[Architecture, float]:
    """Stand-alone accuracies in percent of architectures that the supernet holds.

    Raises:
        UserError: a wrong file, fewer than three, or one that the supernet does not hold.
    """
    truth = read_truth(path)
    if len(truth) < FEWEST:
        raise UserError(
            f"--rank_gt {path} has {len(truth)} architectures; a ranking needs at least {FEWEST}"
        )
    for arch in truth:
        try:
            space.shared_plan(arch)
        except UserError as error:
            raise UserError(f"--rank_gt {path}: {error}") from None
    return truth


class Validation(Callback):
    """Measures the network after epochs, and notes what it finds in the log and history.json.

    What was measured is saved with the next checkpoint. A run that is killed between an epoch's
    checkpoint and the end of its measurement makes up for it when it is resumed.

    Args:
        measure: gives the figures by name, None for one that is not defined; all processes call
            it. What it draws from the global generators is taken back.
        eval_freq: epochs from one to the next.
        log: where the figures are kept.
        folder: of ``history.json``.
    """

    def __init__(
        self,
        measure: Callable[[], Figures],
        eval_freq: int,
        log: TrainLogger,
        folder: str,
    ):
        super().__init__()
        self.measure = measure
        self.eval_freq = eval_freq
        self.log = log
        self.path = Path(folder) / HISTORY

    def on_train_begin(self, logs=None):
        done = self.log.epochs_done
        if done and done - 1 not in self.log.validation:
            self.on_epoch_end(done - 1)

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.eval_freq:
            return
        generators = generators_state()
        figures = self.measure()
        restore_generators(generators)
        self.log.validation[epoch] = figures
        if is_main_process():
            logger.info("epoch %d validation: %s", epoch + 1, figures_text(figures))
            write_json(self.path, self.log.history())
        barrier()


def figures_text(figures: Figures) -> str:
    """Figures for a log line."""
    return ", ".join(
        f"{name} {'not defined' if value is None else format(value, '.4f')}"
        for name, value in figures.items()
    )
