"""BatchNorm re-calibration: statistics of one sub-network instead of a mixture of all.

The shared running statistics average over every sub-network that was trained. Recomputing them
for the sub-network at hand is usual for weight-sharing supernets (e.g. Yu & Huang, ICCV 2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import paddle
from paddle import nn


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
    norms = [layer for layer in network.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    kept = [(norm._momentum, norm._mean.clone(), norm._variance.clone()) for norm in norms]
    try:
        for norm in norms:
            norm._momentum = 0.0
        network.train()
        with paddle.no_grad():
            network(images)
        network.eval()
        yield
    finally:
        network.eval()
        for norm, (momentum, mean, variance) in zip(norms, kept, strict=True):
            norm._momentum = momentum
            norm._mean.set_value(mean)
            norm._variance.set_value(variance)
