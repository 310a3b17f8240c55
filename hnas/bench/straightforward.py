"""The loops that ``hnas.bench.speed_training`` measures against, as public code writes them.

PaddleSlim's own layers and Paddle's own operators; the teacher runs again for every sub-network;
the momentum encoder is updated parameter by parameter; every loss is fetched in its step; images
are decoded from their files in every epoch. Only what would make it another computation is
as in the real loops: gradients are cleared, not set to zero.
"""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812
from paddleslim.nas.ofa.layers import SuperBatchNorm2D

from hnas.dataset.transforms import normalize
from hnas.models.elastic import ElasticBatchNorm2D
from hnas.utils.hapi_wrapper import DistillationModel, distillation_loss
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel


def with_paddleslim_norms(layer: nn.Layer) -> nn.Layer:
    """Replace this project's BatchNorm by PaddleSlim's.

    Frozen ones become as PaddleSlim's are after a first forward pass in eval mode: latched to
    their running statistics for ever, which is how public code comes to train so.
    """
    for name, child in list(layer.named_children()):
        if isinstance(child, ElasticBatchNorm2D):
            norm = SuperBatchNorm2D(
                child.weight.shape[0], momentum=child._momentum, epsilon=child._epsilon
            )
            norm.set_state_dict(child.state_dict())
            norm.frozen = child.frozen  # for the network, which asks its norms
            norm._use_global_stats = True if child.frozen else None
            for own, other in zip(norm.parameters(), child.parameters(), strict=True):
                own.stop_gradient = other.stop_gradient
            setattr(layer, name, norm)
        else:
            with_paddleslim_norms(child)
    return layer


class StraightforwardDistillation(DistillationModel):
    """Stage two."""

    def train_batch(self, inputs) -> dict:
        images, labels = inputs
        images = normalize(images)
        self.network.train()
        losses = []
        for arch in self.sampler.sample(self.epoch, self.step):
            self.network.activate(arch)
            with paddle.no_grad():
                targets = F.softmax(self.teacher(images))
            logits = self.network(images)
            loss = distillation_loss(logits, labels, targets)
            loss.backward()
            losses.append(loss.item())
        accuracy = (logits.argmax(axis=1) == labels).astype("float32").mean().item()
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        return {"loss": sum(losses) / len(losses), "top1": accuracy}


class StraightforwardContrast(ContrastiveModel):
    """Stage one."""

    def train_batch(self, inputs) -> dict:
        network = self.network
        query_view, key_view = (normalize(view) for view in inputs[:2])
        paths = self.sampler.sample(self.epoch, self.step)
        network.train()
        losses, hits, keys = [], [], []
        for query_path, key_path in zip(paths, reversed(paths), strict=True):
            with paddle.no_grad():
                momentum = network.key_momentum
                pairs = zip(network.key_parameters(), network.query_parameters(), strict=True)
                for key, query in pairs:
                    key.set_value(key * momentum + query * (1 - momentum))
            own = network.embed_keys(key_view, key_path)
            queries = network.embed_queries(query_view, query_path)
            loss, found = network.contrast(queries, own)
            loss.backward()
            losses.append(loss.item())
            hits.append(found.item())
            keys.append(own)
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        network.enqueue((keys[0] + keys[1]) / 2)
        return {"loss": sum(losses) / 2, "top1": sum(hits) / 2}
