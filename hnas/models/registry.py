"""The networks that the command line knows, by name."""

from __future__ import annotations

from paddle import nn

from hnas.models.elastic import ElasticResNet
from hnas.models.pinasv2 import PiNASv2
from hnas.models.resnet import ResNet
from hnas.search_space import SearchSpace, find_backbone


def build_network(
    name: str,
    num_classes: int = 1000,
    space: SearchSpace | None = None,
    elastic: bool = True,
    **contrastive_options,
) -> nn.Layer:
    """Build a network by name.

    Args:
        name: one of ``BACKBONES``.
        num_classes: outputs of the classifier.
        space: replaces the backbone's own search space (see :func:`search_space`).
        elastic: False builds the plain largest network, e.g. a teacher.
        contrastive_options: of :class:`PiNASv2`, for the contrastive names only.

    Returns:
        An :class:`ElasticResNet`, a plain :class:`ResNet`, or a :class:`PiNASv2`.

    Raises:
        UserError: unknown name.
    """
    backbone = find_backbone(name)
    space = space or backbone.space
    if not elastic:
        return ResNet(space.plan(space.largest()), num_classes)
    if backbone.contrastive:
        return PiNASv2(space, num_classes, **contrastive_options)
    return ElasticResNet(space, num_classes, **contrastive_options)
