"""The yardstick: one network at a time, over all images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import paddle
from paddle import nn

from hnas.dataset.transforms import normalize
from hnas.evaluation.counts import Counts, LogitsError, count_hits
from hnas.models.elastic import ElasticResNet, calibrated
from hnas.search_space import Architecture

Batches = Iterable[tuple[paddle.Tensor, paddle.Tensor]]
"""uint8 images [N, 3, H, W] and int64 labels [N], batch after batch; N may differ."""


@paddle.no_grad()
def network_logits(
    network: nn.Layer, images: paddle.Tensor, calibration: paddle.Tensor | None = None
) -> paddle.Tensor:
    """Logits [N, classes] of uint8 images [N, 3, H, W], as :func:`evaluate_network` has them."""
    with calibrated(network, None if calibration is None else normalize(calibration)):
        return network(normalize(images))


@paddle.no_grad()
def evaluate_network(
    network: nn.Layer,
    loader: Batches,
    calibration: paddle.Tensor | None = None,
    who: str = "the network",
) -> Counts:
    """Count the hits of one network: the one way to a single network's accuracy in this project.

    Args:
        network: a plain network, or a supernet, whose active sub-network is evaluated; gives
            float32 logits [N, classes] for normalised images. Left in eval mode.
        loader: of the images to score, iterated once.
        calibration: uint8 images [N, 3, H, W] to re-calibrate BatchNorm with; None scores at the
            running statistics, which are as before in either case afterwards.
        who: what an error calls it.

    Returns:
        Counts of length 1.

    Raises:
        LogitsError: a logit is NaN or infinite.
    """
    counts = Counts.zeros(1)
    with calibrated(network, None if calibration is None else normalize(calibration)):
        for images, labels in loader:
            hits = count_hits(network(normalize(images)).unsqueeze(0), labels)
            if hits.bad[0]:
                raise LogitsError(who, hits.bad[0], len(labels))
            counts.add(hits.counts(len(labels)))
    return counts


def evaluate_reference(
    network: ElasticResNet,
    archs: Sequence[Architecture],
    loader: Batches,
    calibration: paddle.Tensor | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Counts:
    """Score architectures one by one.

    Args:
        network: the supernet; left in eval mode.
        archs: what to score.
        loader: of the images to score, iterated once an architecture.
        calibration: as in :func:`evaluate_network`, for each sub-network anew.
        progress: called with 1 after each architecture.

    Raises:
        LogitsError: a logit is NaN or infinite; names the architecture.
    """
    counts = Counts.zeros(len(archs))
    for index, arch in enumerate(archs):
        network.activate(arch)
        own = evaluate_network(network, loader, calibration, f"architecture {arch.code}")
        for column, (value,) in zip(counts.columns(), own.columns(), strict=True):
            column[index] = value
        counts.folds[index] = own.folds[0]
        counts.images = own.images
        progress(1)
    return counts
