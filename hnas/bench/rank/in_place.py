"""Distillation within a step, which the ranking bench compares with a pretrained teacher's."""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812

from hnas.utils.hapi_wrapper import DistillationModel, distillation_loss, soft_loss
from hnas.utils.SampleMethod import Sampler


class InPlaceDistillationModel(DistillationModel):
    """Stage two without a network that teaches (Yu et al., BigNAS, ECCV 2020).

    A step's first sub-network learns from the labels; the others see no labels and learn from the
    first one's probabilities.

    Args:
        network: the supernet.
        sampler: chooses the sub-networks; it should give the largest first, as
            :class:`hnas.utils.SampleMethod.SandwichSampler` does.
        more: ``loss_weights`` and ``temperature`` of :class:`DistillationModel`.
    """

    def __init__(self, network: nn.Layer, sampler: Sampler, **more):
        super().__init__(network, None, sampler, **more)

    def objective(self, logits, labels, targets) -> paddle.Tensor:
        """Cross-entropy with the labels, or with the first sub-network once that has been."""
        if targets is None:
            return distillation_loss(logits, labels, None)
        return soft_loss(logits, targets, self.temperature)

    def next_targets(self, targets, logits) -> paddle.Tensor:
        """The first sub-network's probabilities [N, C], for all that come after it."""
        return F.softmax(logits.detach() / self.temperature) if targets is None else targets
