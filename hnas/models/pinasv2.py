"""PiNASv2: momentum-contrast training of a supernet (stage one of the recipe).

MoCo v2 (Chen et al., https://arxiv.org/abs/2003.04297) with the cross-path passes of Pi-NAS
(Peng et al., ICCV 2021, https://arxiv.org/abs/2108.02719).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812
from paddleslim.nas.ofa.layers import SuperLinear

from hnas.base.errors import UserError
from hnas.models.elastic import ElasticResNet
from hnas.parallel.distributed import gather, rank, world_size
from hnas.search_space import Architecture, SearchSpace


class MLPNeck(nn.Layer):
    """avgpool -> fc -> ReLU -> fc -> L2 norm: a feature map [N, C, H, W] -> embeddings [N, D].

    The first layer takes the first C of its input features, so narrow sub-networks share it.
    """

    def __init__(self, in_features: int, hidden: int, dim: int):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        self.hidden = SuperLinear(in_features, hidden)
        self.relu = nn.ReLU()
        self.project = nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.avgpool(x).flatten(1)
        return F.normalize(self.project(self.relu(self.hidden(x))), axis=1)


class ShuffledViews:
    """The key encoder's images in a step: drawn from all ranks' batches, each on one rank.

    MoCo's shuffling (He et al., https://arxiv.org/abs/1911.05722): were keys and queries of an
    image normalised by the same batch, their statistics would give away which belong together.

    Args:
        draw: what the permutation depends on: seed, epoch, step and part of the step.
        views: uint8 [N, 3, H, W] each, of the same images.
    """

    def __init__(self, draw: tuple[int, ...], *views: paddle.Tensor):
        images = len(views[0])
        order = np.random.default_rng(draw).permutation(world_size() * images)
        self._own = slice(rank() * images, (rank() + 1) * images)
        self._back = paddle.to_tensor(np.argsort(order))
        share = paddle.to_tensor(order[self._own])
        self.views = [paddle.gather(gather(view), share) for view in views]

    def restore(self, keys: paddle.Tensor) -> paddle.Tensor:
        """Keys [world_size * N, D] of all, in the order of the images, of shuffled ones [N, D]."""
        return paddle.gather(gather(keys), self._back)

    def own(self, keys: paddle.Tensor) -> paddle.Tensor:
        """The keys [N, D] of this rank's images, of all."""
        return keys[self._own]


class PassOutput(NamedTuple):
    """What two symmetric passes give: see :meth:`PiNASv2.forward`."""

    loss: paddle.Tensor
    keys: paddle.Tensor
    accuracy: paddle.Tensor


class PiNASv2(nn.Layer):
    """Query encoder, momentum key encoder and queue of negatives over one supernet.

    Args:
        space: search space of the backbone.
        num_classes: of the backbone's classifier. Stage one does not train it; it stays in the
            checkpoint for stage two.
        dim: length D of an embedding.
        queue_size: number K of keys in the queue; a multiple of the batch size.
        key_momentum: the key encoder becomes ``m * key + (1 - m) * query`` every step.
        temperature: of the softmax over similarities.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_classes: int = 1000,
        dim: int = 128,
        queue_size: int = 65536,
        key_momentum: float = 0.999,
        temperature: float = 0.2,
    ):
        super().__init__()
        self.space = space
        self.key_momentum = key_momentum
        self.temperature = temperature
        width = space.base_channels[-1]
        self.backbone = ElasticResNet(space, num_classes)
        self.neck = MLPNeck(width, width, dim)
        self.key_backbone = ElasticResNet(space, num_classes)
        self.key_neck = MLPNeck(width, width, dim)
        for parameter in [*self.backbone.head.parameters(), *self.key_parameters()]:
            parameter.stop_gradient = True
        self.register_buffer("queue", F.normalize(paddle.randn([dim, queue_size]), axis=0))
        self.register_buffer("queue_pointer", paddle.zeros([1], dtype="int64"))
        self.reset_key_encoder()

    def key_parameters(self) -> list[paddle.Tensor]:
        """Parameters of the key encoder, in the order of :meth:`query_parameters`."""
        return [*self.key_backbone.parameters(), *self.key_neck.parameters()]

    def query_parameters(self) -> list[paddle.Tensor]:
        """Parameters of the query encoder."""
        return [*self.backbone.parameters(), *self.neck.parameters()]

    @paddle.no_grad()
    def reset_key_encoder(self) -> None:
        """Make the key encoder a copy of the query encoder, BatchNorm statistics included."""
        self.key_backbone.set_state_dict(self.backbone.state_dict())
        self.key_neck.set_state_dict(self.neck.state_dict())

    @paddle.no_grad()
    def update_key_encoder(self) -> None:
        """Momentum update: key <- m * key + (1 - m) * query."""
        for key, query in zip(self.key_parameters(), self.query_parameters(), strict=True):
            key.lerp_(query, 1.0 - self.key_momentum)

    @paddle.no_grad()
    def enqueue(self, keys: paddle.Tensor) -> None:
        """Overwrite the queue's oldest N keys by ``keys`` [N, D].

        Raises:
            UserError: the batch does not divide the queue.
        """
        size, batch = self.queue.shape[1], keys.shape[0]
        if size % batch:
            raise UserError(
                f"queue_size {size} is not a multiple of the batch of {batch} keys; "
                "choose queue_size or batch_size so that one divides the other"
            )
        # The pointer is never read here: that would let the host wait for the GPU's whole step.
        columns = (self.queue_pointer + paddle.arange(batch)) % size
        rows = paddle.arange(self.queue.shape[0]).unsqueeze(1)
        self.queue.index_put_((rows, columns), keys.T.astype(self.queue.dtype))
        self.queue_pointer.set_value((self.queue_pointer + batch) % size)

    def embed_queries(self, images, path: Architecture) -> paddle.Tensor:
        """Query embeddings [N, D] of ``images`` [N, 3, H, W] under the sub-network ``path``."""
        self.backbone.activate(path)
        return self.neck(self.backbone.features(images))

    @paddle.no_grad()
    def embed_keys(self, images, path: Architecture) -> paddle.Tensor:
        """Key embeddings [N, D], without gradient."""
        self.key_backbone.activate(path)
        return self.key_neck(self.key_backbone.features(images))

    def _all_keys(self, view, shuffled, path: Architecture):
        """Keys [N, D] of this rank's images, and [world_size * N, D] of all ranks' in order."""
        if shuffled is None:
            keys = self.embed_keys(view, path)
            return keys, keys
        keys = shuffled.restore(self.embed_keys(view, path))
        return shuffled.own(keys), keys

    def forward(
        self,
        view_a,
        view_b,
        path_a: Architecture,
        path_b: Architecture,
        shuffled: ShuffledViews | None = None,
    ) -> PassOutput:
        """Both passes over two views [N, 3, H, W] of the same images.

        Pass 0 queries path A with view A against the keys of path B with view B; pass 1 is the
        reverse. With other ranks, ``shuffled`` holds the images to compute keys of.

        Returns:
            The mean loss of both passes; their keys averaged and renormalised, all ranks'
            [world_size * N, D], for :meth:`enqueue` after the backward pass; and the share of
            queries that find their own key first among all of the queue.
        """
        images_a, images_b = (view_a, view_b) if shuffled is None else shuffled.views
        key_b, every_b = self._all_keys(images_b, shuffled, path_b)
        loss_0, accuracy_0 = self.contrast(self.embed_queries(view_a, path_a), key_b)
        key_a, every_a = self._all_keys(images_a, shuffled, path_a)
        loss_1, accuracy_1 = self.contrast(self.embed_queries(view_b, path_b), key_a)
        keys = F.normalize((every_a + every_b) / 2, axis=1)
        return PassOutput((loss_0 + loss_1) / 2, keys, (accuracy_0 + accuracy_1) / 2)

    def contrast(self, queries, keys) -> tuple[paddle.Tensor, paddle.Tensor]:
        """InfoNCE loss of queries [N, D] against their keys [N, D] and the queue [D, K]."""
        positive = (queries * keys).sum(axis=1, keepdim=True)  # [N, 1]
        negative = queries @ self.queue  # [N, K]
        logits = paddle.concat([positive, negative], axis=1) / self.temperature
        target = paddle.zeros([logits.shape[0]], dtype="int64")
        hits = (logits.argmax(axis=1) == 0).astype("float32").mean()
        return F.cross_entropy(logits, target), hits
