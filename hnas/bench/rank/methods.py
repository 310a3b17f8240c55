"""What ``hnas.bench.rank`` compares: ways of training a supernet at an equal cost.

The cost is counted in forward passes of a sub-network over a batch, teacher's and key encoder's
included. All start from the same pretrained largest network, which is also the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hnas.programs.flags import AUTO

STAGE1_FORWARDS = 4
"""Passes of a step of stage 1: two of the query encoder, two of the key encoder."""


STAGE1_CLIP_NORM = {"own": AUTO, "public": 0.0}
"""By the recipe of stage 1."""


@dataclass(frozen=True)
class Method:
    """How a supernet is trained; flags of stage 2 have their names and meanings."""

    stage1: str = ""
    """Whether stage 1 comes first, and by whose ``recipe``: ``own`` or ``public``."""
    sampler: str = "random"
    """Or ``first_place``, ``sandwich``, ``fair``."""
    teacher: str = "pretrained"
    """Or ``in place`` (the step's first sub-network), ``none``."""
    subnetworks: int = 4
    freeze_bn: bool = False
    """Without it BatchNorm is re-calibrated for each architecture."""
    clip_norm: float = 0.0
    """Of stage 2."""

    @property
    def forwards(self) -> float:
        """Forward passes over a batch that a step takes on average."""
        extra = 1 / 3 if self.sampler == "first_place" else 0
        return self.subnetworks + extra + (self.teacher == "pretrained")


# As ``local_own.sh`` runs it, but for stage 1's views: of one kind here.
FIRST_PLACE = Method(stage1="own", sampler="first_place", freeze_bn=True, clip_norm=AUTO)

METHODS = {
    "first_place": FIRST_PLACE,
    "no_stage1": replace(FIRST_PLACE, stage1=""),
    "uniform": replace(FIRST_PLACE, sampler="random"),
    # With the winners' other settings, by their public code.
    "winners": replace(FIRST_PLACE, stage1="public", clip_norm=0.0),
    "organisers": Method(freeze_bn=True),
    "bignas": Method(sampler="sandwich", teacher="in place"),
    "fairnas": Method(sampler="fair", teacher="none", subnetworks=7),
    "single_path": Method(teacher="none", subnetworks=1),
}

PRIMARY = ("first_place", "organisers")
"""The comparison that counts; all others are corrected for their number."""
