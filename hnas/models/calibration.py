"""BatchNorm re-calibration: statistics of one sub-network instead of a mixture of all.

Shared running statistics that were updated in training average over every sub-network that was
trained. Recomputing them for the sub-network at hand is usual for weight-sharing supernets (e.g.
Yu & Huang, ICCV 2019). A supernet that was trained at frozen statistics is scored at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import paddle
from paddle import nn


def batch_statistics(
    x: paddle.Tensor, mean_of: Callable[[paddle.Tensor], paddle.Tensor]
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Mean and biased variance of each channel.

    Computed here for both engines: what BatchNorm itself keeps is the biased variance on CPUs and
    the unbiased one on GPUs (cuDNN's), which differ by much in small batches of small maps.

    Args:
        x: activations.
        mean_of: their mean over images and positions, which stay with length 1.
    """
    mean = mean_of(x)
    return mean, mean_of((x - mean).square())


@contextmanager
def calibrated(network: nn.Layer, images: paddle.Tensor | None) -> Iterator[None]:
    """Within the context, running statistics are the batch statistics of ``images``.

    Args:
        network: a plain network, or a supernet, whose active sub-network is calibrated.
        images: float [N, 3, H, W], one batch; None leaves the running statistics as they are.

    On leaving, the earlier statistics are back, bit for bit; the network stays in eval mode.
    """
    network.eval()
    if images is None:
        yield
        return
    norms = batch_norms(network)
    kept = [(norm._mean.clone(), norm._variance.clone()) for norm in norms]
    try:
        measure(network, norms, images)
        yield
    finally:
        for norm, (mean, variance) in zip(norms, kept, strict=True):
            norm._mean.set_value(mean)
            norm._variance.set_value(variance)


def batch_norms(network: nn.Layer) -> list[nn.BatchNorm2D]:
    """All BatchNorms of a network."""
    return [layer for layer in network.sublayers() if isinstance(layer, nn.BatchNorm2D)]


def recalibrate(network: nn.Layer, images: paddle.Tensor) -> None:
    """Set running statistics to the batch statistics of ``images``, float [N, 3, H, W], for good.

    The network is left in eval mode.
    """
    network.eval()
    measure(network, batch_norms(network), images)


@paddle.no_grad()
def measure(network: nn.Layer, norms: Sequence[nn.BatchNorm2D], images: paddle.Tensor) -> None:
    """Overwrite the running statistics of ``norms`` by those of their inputs, front to back.

    A layer's are measured before it runs, so that the next one sees what it normalises by them.
    """

    def take(norm: nn.BatchNorm2D, inputs: tuple) -> None:
        (x,) = inputs
        mean, variance = batch_statistics(x, lambda part: part.mean([0, 2, 3], keepdim=True))
        norm._mean[: x.shape[1]] = mean.flatten()
        norm._variance[: x.shape[1]] = variance.flatten()

    hooks = [norm.register_forward_pre_hook(take) for norm in norms]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
