"""The backbones that the command line knows."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from paddle import nn

from hnas.models.elastic import ElasticResNet
from hnas.models.pinasv2 import PiNASv2
from hnas.models.resnet import ResNet
from hnas.search_space import FULL_DIGITS, RELEASED_DIGITS, SearchSpace
from hnas.utils.errors import UserError

RESNET48 = SearchSpace()

# A quarter of ResNet48's widths for CPUs, with a divisor of 1, since multiples of 8 would merge
# the ratios. The first stage has 20 channels instead of 16: between 70 and 100 % of 16 lie only
# six integers for seven ratios.
RESNET48_MINI = SearchSpace(base_channels=(20, 32, 64, 128), divisor=1)


@dataclass(frozen=True)
class Backbone:
    """A named network: its search space, and whether it is stage one's contrastive model."""

    space: SearchSpace
    contrastive: bool


BACKBONES = {
    "resnet48": Backbone(RESNET48, contrastive=False),
    "resnet48pinasv2": Backbone(RESNET48, contrastive=True),
    "resnet48_mini": Backbone(RESNET48_MINI, contrastive=False),
    "resnet48pinasv2_mini": Backbone(RESNET48_MINI, contrastive=True),
}
SAMPLE_SPACES = {"released": RELEASED_DIGITS, "full": FULL_DIGITS}


def find_backbone(name: str) -> Backbone:
    """The backbone of that name.

    Raises:
        UserError: there is none; the message lists the names.
    """
    if name not in BACKBONES:
        nearest = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"unknown backbone {name!r}; {hint}there are {', '.join(BACKBONES)}")
    return BACKBONES[name]


def search_space(name: str, sample_space: str = "released", truncate: bool = False) -> SearchSpace:
    """The search space of a backbone; ``sample_space`` is ``released`` or ``full``."""
    digits = SAMPLE_SPACES[sample_space]
    return replace(find_backbone(name).space, truncate=truncate, max_digits=digits)


def build_classifier(
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
