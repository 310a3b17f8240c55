"""Distillation within a step, which the ranking bench compares with a pretrained teacher's."""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812

from hnas.utils.hapi_wrapper import DistillationModel
from hnas.utils.SampleMethod import Sampler


class InPlaceDistillationModel(DistillationModel):
    """Without a teacher of its own: a step's first sub-network learns from the labels and teaches
    the others (Yu et al., BigNAS, ECCV 2020). The sampler should give the largest first."""

    def __init__(self, network: nn.Layer, sampler: Sampler, **more):
        super().__init__(network, None, sampler, **more)

    def next_targets(self, targets, logits) -> paddle.Tensor:
        return F.softmax(logits.detach() / self.temperature) if targets is None else targets
