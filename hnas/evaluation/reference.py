"""The yardstick: one sub-network at a time, each over the whole validation set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle

from hnas.dataset.transforms import normalize
from hnas.evaluation.calibration import calibrated
from hnas.evaluation.hits import Counts, count_hits
from hnas.models.elastic import ElasticResNet
from hnas.search_space import Architecture


@paddle.no_grad()
def evaluate_reference(
    network: ElasticResNet,
    archs: Sequence[Architecture],
    loader,
    calibration: paddle.Tensor | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Counts:
    """Score architectures one by one.

    Args:
        network: the supernet; left in eval mode.
        archs: what to score.
        loader: iterated once an architecture; gives uint8 images [N, 3, H, W] and labels [N].
        calibration: images [N, 3, H, W], uint8, to re-calibrate each sub-network's BatchNorm
            with; None scores at the running statistics.
        progress: called with 1 after each architecture.
    """
    calibration = None if calibration is None else normalize(calibration)
    counts = Counts.zeros(len(archs))
    for index, arch in enumerate(archs):
        network.activate(arch)
        images = 0
        with calibrated(network, calibration):
            for batch, labels in loader:
                hits = count_hits(network(normalize(batch)).unsqueeze(0), labels)[0]
                for column, value in zip(counts.columns(), hits, strict=True):
                    column[index] += value
                images += len(labels)
        counts.images = images
        progress(1)
    return counts
