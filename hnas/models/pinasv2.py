"""PiNASv2: momentum-contrast training of a supernet (stage one of the recipe). Networks by name.

MoCo v2 (Chen et al., https://arxiv.org/abs/2003.04297) with the cross-path passes of Pi-NAS
(Peng et al., ICCV 2021, https://arxiv.org/abs/2108.02719).
"""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812
from paddleslim.nas.ofa.layers import SuperLinear

from hnas.models.elastic import ElasticResNet
from hnas.models.resnet import ResNet
from hnas.search_space import Architecture, SearchSpace, find_backbone


class MLPNeck(nn.Layer):
    """avgpool -> fc -> ReLU -> fc -> L2 norm: a feature map [N, C, H, W] -> embeddings [N, D].

    The first layer takes the first C of its input features, so narrow sub-networks share it.
    """

    def __init__(self, in_features: int, hidden: int, dim: int):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        weights = paddle.ParamAttr(initializer=nn.initializer.KaimingNormal())
        zeros = paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))
        self.hidden = SuperLinear(in_features, hidden, weight_attr=weights, bias_attr=zeros)
        self.relu = nn.ReLU()
        self.project = nn.Linear(hidden, dim, weight_attr=weights, bias_attr=zeros)

    def forward(self, x):
        x = self.avgpool(x).flatten(1)
        return F.normalize(self.project(self.relu(self.hidden(x))), axis=1)


class PiNASv2(nn.Layer):
    """Query encoder, momentum key encoder and queue of negatives over one supernet.

    Embeddings have ``dim`` numbers; the queue holds ``queue_size`` of them. The backbone's
    classifier is not trained; it stays in the checkpoint for stage two.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_classes: int = 1000,
        dim: int = 128,
        queue_size: int = 40960,
        key_momentum: float = 0.999,
        temperature: float = 0.1,
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
        for layer in (self.backbone.head, self.key_backbone, self.key_neck):
            for parameter in layer.parameters():
                parameter.stop_gradient = True
        self.register_buffer("queue", F.normalize(paddle.randn([dim, queue_size]), axis=0))
        self.register_buffer("queue_pointer", paddle.zeros([1], dtype="int64"))
        self.reset_key_encoder()

    @paddle.no_grad()
    def reset_key_encoder(self) -> None:
        """Make the key encoder a copy of the query encoder, BatchNorm statistics included."""
        self.key_backbone.set_state_dict(self.backbone.state_dict())
        self.key_neck.set_state_dict(self.neck.state_dict())

    @paddle.no_grad()
    def update_key_encoder(self) -> None:
        """Momentum update: key <- m * key + (1 - m) * query.

        BatchNorm's running mean and variance follow: Paddle counts them among the parameters.
        """
        # One tensor for all of them: of a number, every call would make its own.
        share = paddle.full([1], 1.0 - self.key_momentum, "float32")
        for own, other in ((self.key_backbone, self.backbone), (self.key_neck, self.neck)):
            for key, query in zip(own.parameters(), other.parameters(), strict=True):
                key.lerp_(query, share)

    @paddle.no_grad()
    def enqueue(self, keys: paddle.Tensor) -> None:
        """Overwrite the queue's oldest N keys by ``keys`` [N, D], no more than it holds."""
        size, batch = self.queue.shape[1], keys.shape[0]
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
        """Key embeddings [N, D], without gradient.

        At running statistics, never the batch's, which would give away what belongs together.
        """
        self.key_backbone.eval()
        self.key_backbone.activate(path)
        return self.key_neck(self.key_backbone.features(images))

    def contrast(self, queries, keys) -> tuple[paddle.Tensor, paddle.Tensor]:
        """InfoNCE loss of queries [N, D] against their keys [N, D] and the queue [D, K].

        Returns:
            The mean loss, and the share of queries that find their own key first of all K + 1.
        """
        # In float32: among K half-precision logits many would be equal.
        with paddle.amp.auto_cast(enable=False):
            queries, keys = queries.astype("float32"), keys.astype("float32")
            positive = (queries * keys).sum(axis=1, keepdim=True)  # [N, 1]
            negative = queries @ self.queue  # [N, K]
            logits = paddle.concat([positive, negative], axis=1) / self.temperature
            target = paddle.zeros([logits.shape[0]], dtype="int64")
            hits = (logits.argmax(axis=1) == 0).astype("float32").mean()
            return F.cross_entropy(logits, target), hits


def build_network(
    name: str,
    num_classes: int = 1000,
    space: SearchSpace | None = None,
    elastic: bool = True,
    **contrastive_options,
) -> nn.Layer:
    """Build a network by the name that the command line gives it.

    ``space`` replaces the backbone's own search space; ``elastic=False`` builds the plain largest
    network, e.g. a teacher; ``contrastive_options`` are :class:`PiNASv2`'s.

    Raises:
        UserError: unknown name.
    """
    backbone = find_backbone(name)
    space = space or backbone.space
    if not elastic:
        return ResNet(space.plan(space.largest()), num_classes)
    kind = PiNASv2 if backbone.contrastive else ElasticResNet
    return kind(space, num_classes, **contrastive_options)
