"""The yardstick: one sub-network at a time, each over the whole validation set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import paddle
from tqdm import tqdm

from hnas.dataset.transforms import normalize
from hnas.evaluation.calibration import calibrated
from hnas.models.elastic import ElasticResNet
from hnas.search_space import Architecture


class Counts(NamedTuple):
    """Correct predictions of each architecture: int64 [architectures], and the images seen."""

    top1: np.ndarray
    top5: np.ndarray
    images: int


def correct_predictions(logits: paddle.Tensor, labels: paddle.Tensor) -> tuple[int, int]:
    """Top-1 and top-5 hits of logits [N, C] against labels [N].

    A label ranks behind every class of a larger logit, and behind those of an equal logit with
    a smaller index, so that ties are decided alike everywhere.
    """
    own = paddle.take_along_axis(logits, labels.unsqueeze(1), axis=1)  # [N, 1]
    index = paddle.arange(logits.shape[1]).unsqueeze(0)  # [1, C]
    before = (logits > own) | ((logits == own) & (index < labels.unsqueeze(1)))
    rank = before.astype("int32").sum(axis=1)
    return int((rank < 1).sum()), int((rank < 5).sum())


@paddle.no_grad()
def evaluate_reference(
    network: ElasticResNet,
    archs: Sequence[Architecture],
    loader,
    calibration: paddle.Tensor | None = None,
    on_result: Callable[[int, int, int, int], None] = lambda *_: None,
) -> Counts:
    """Score architectures one by one.

    Args:
        network: the supernet; left in eval mode.
        archs: what to score.
        loader: iterated once an architecture; gives uint8 images [N, 3, H, W] and labels [N].
        calibration: images [N, 3, H, W], uint8, to re-calibrate each sub-network's BatchNorm
            with; None scores at the running statistics.
        on_result: called with (index, top-1 hits, top-5 hits, images) after each architecture.
    """
    calibration = None if calibration is None else normalize(calibration)
    top1, top5 = np.zeros((2, len(archs)), dtype=np.int64)
    images = 0
    for index, arch in enumerate(tqdm(archs, desc="scoring", unit="arch")):
        network.activate(arch)
        images = 0
        with calibrated(network, calibration):
            for batch, labels in loader:
                hits1, hits5 = correct_predictions(network(normalize(batch)), labels)
                top1[index] += hits1
                top5[index] += hits5
                images += len(labels)
        on_result(index, int(top1[index]), int(top5[index]), images)
    return Counts(top1, top5, images)
