"""The yardstick: one network at a time, over all images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import paddle
from paddle import nn

from hnas.dataset.transforms import normalize
from hnas.evaluation.counts import Counts, LogitsError, count_hits
from hnas.models.elastic import ElasticResNet, before_each, calibrated
from hnas.search_space import Architecture

Batches = Iterable[tuple[paddle.Tensor, paddle.Tensor]]
"""uint8 images [N, 3, H, W] and int64 labels [N], batch after batch; N may differ."""
LARGEST = float(np.finfo(np.float32).max)


@paddle.no_grad()
def network_logits(
    network: nn.Layer,
    images: paddle.Tensor,
    calibration: paddle.Tensor | None = None,
    who: str = "the network",
    largest: float = LARGEST,
) -> paddle.Tensor:
    """Logits [N, classes] of uint8 images [N, 3, H, W], as :func:`evaluate_network` has them.

    Raises:
        LogitsError: as :func:`watched_logits`.
    """
    # With re-calibration alone do engines hold a convolution's output before its BatchNorm.
    kinds = (nn.ReLU,) if calibration is None else (nn.ReLU, nn.BatchNorm2D)
    with calibrated(network, None if calibration is None else normalize(calibration)):
        return watched_logits(network, normalize(images), who, largest, kinds)


def watched_logits(
    network: nn.Layer,
    x: paddle.Tensor,
    who: str,
    largest: float = LARGEST,
    kinds: tuple[type[nn.Layer], ...] = (nn.ReLU,),
) -> paddle.Tensor:
    """Logits [N, classes] of normalised images, with a look at them and at what layers are given.

    Paddle's ReLU makes 0 of NaN on CPUs, so logits may look right behind what overflowed. All
    convolutions end in one.

    Raises:
        LogitsError: a logit is NaN or infinite; or a layer of ``kinds`` is given NaN, or a number
            beyond ``largest``. Names ``who`` and the layer.
    """
    names = {layer: name for name, layer in network.named_sublayers() if isinstance(layer, kinds)}

    def look(layer: nn.Layer, inputs: tuple) -> None:
        rows = inputs[0].reshape([len(x), 1, -1])
        # Sums of squares are cheap, and no smaller than any of them: few are looked at closely.
        if not bool((paddle.matmul(rows, rows, transpose_y=True) <= largest**2).all()):
            bad = int((~(rows.abs() <= largest)).any(axis=[1, 2]).sum())
            what = f"activations before {names[layer]} that are NaN or beyond {largest:.6g}"
            if bad:
                raise LogitsError(who, bad, len(x), what)

    with before_each(names, look):
        logits = network(x)
    bad = int((~paddle.isfinite(logits).all(axis=1)).sum())
    if bad:
        raise LogitsError(who, bad, len(x))
    return logits


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
        LogitsError: as :func:`watched_logits`.
    """
    counts = Counts.zeros(1)
    with calibrated(network, None if calibration is None else normalize(calibration)):
        for images, labels in loader:
            logits = watched_logits(network, normalize(images), who)
            counts.add(count_hits(logits.unsqueeze(0), labels)[0])
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
        LogitsError: as :func:`evaluate_network`; names the architecture.
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
