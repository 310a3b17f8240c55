"""What ``hnas.bench.rank`` compares: ways of training a supernet at an equal cost.

The cost is counted in forward passes of a sub-network over a batch, teacher's and key encoder's
included. All start from the same pretrained largest network, which is also the teacher.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hnas.base.errors import UserError

STAGE1_FORWARDS = 4
"""Passes of a step of stage 1: two of the query encoder, two of the key encoder."""


@dataclass(frozen=True)
class Method:
    """How a supernet is trained.

    Attributes:
        about: one line for tables.
        stage1: ``none``, ``frozen`` (as the first place ran it: the largest network twice, frozen
            statistics), or at batch statistics, temperature 0.2 and with exchanged views
            ``largest`` or ``sampled``.
        sampler: ``first_place``, ``random``, ``tilted``, ``annealed``, ``stratified``, ``sandwich``
            or ``fair``.
        tilt: of ``tilted`` and ``stratified``; ``annealed`` goes from it to ``tilt_end``.
        teacher: ``pretrained``, ``in place`` (the step's first sub-network) or ``none``.
        subnetworks: a step.
        temperature: of the soft targets.
        macs_weighted: losses weighted by the sub-networks' MACs.
        lr: relative to the bench's, for the sum of a step's gradients.
        freeze_bn: stage 2 trains at the running statistics that it starts from.
    """

    about: str
    stage1: str = "none"
    sampler: str = "random"
    tilt: float = 0.0
    tilt_end: float = 0.0
    teacher: str = "pretrained"
    subnetworks: int = 4
    temperature: float = 1.0
    macs_weighted: bool = False
    lr: float = 1.0
    freeze_bn: bool = False

    @property
    def forwards(self) -> float:
        """Forward passes over a batch that a step takes on average."""
        extra = 1 / 3 if self.sampler == "first_place" else 0
        return self.subnetworks + extra + (self.teacher == "pretrained")

    def settings(self) -> dict:
        """What a supernet depends on; runs from before frozen statistics existed do not say so."""
        settings = asdict(self)
        del settings["about"]
        if not self.freeze_bn:
            del settings["freeze_bn"]
        return settings


BASELINES = {
    "uniform_distill": Method("uniform, distillation, no stage 1 (the organisers')"),
    "sandwich_inplace": Method(
        "sandwich, in-place distillation (BigNAS)", sampler="sandwich", teacher="in place"
    ),
    "single_path": Method(
        "uniform, one path a step, no distillation", teacher="none", subnetworks=1
    ),
    "fair": Method(
        "each option equally often, no distillation (after FairNAS)",
        sampler="fair",
        teacher="none",
    ),
}

ABLATIONS = {
    "seed_recipe": Method(
        "seed recipe: stage 1 (largest), bias 2, distillation", "largest", "tilted", tilt=2.0
    ),
    "no_stage1": Method("seed recipe without stage 1", sampler="tilted", tilt=2.0),
    "no_bias": Method("seed recipe without bias", "largest"),
    "bias_1": Method("seed recipe with bias 1", "largest", "tilted", tilt=1.0),
    "bias_4": Method("seed recipe with bias 4", "largest", "tilted", tilt=4.0),
    "stage1_sampled": Method(
        "seed recipe, stage 1 with two sampled paths (Pi-NAS)", "sampled", "tilted", tilt=2.0
    ),
}

DEFAULTS = (*BASELINES, *ABLATIONS)

CANDIDATES = {
    "first_place": Method(
        "first place: frozen statistics, the largest of 400 candidates, stage 1 as it ran",
        "frozen",
        "first_place",
        freeze_bn=True,
    ),
    "tilted": Method(
        "batch statistics, tilt 2, stage 1 (largest, exchanged views)",
        "largest",
        "tilted",
        tilt=2.0,
    ),
    "annealed": Method(
        "seed recipe, bias going from 2 to 0", "largest", "annealed", tilt=2.0, tilt_end=0.0
    ),
    "temperature_4": Method(
        "seed recipe, soft targets of temperature 4", "largest", "tilted", 2.0, temperature=4.0
    ),
    "macs_weighted": Method(
        "seed recipe, losses weighted by MACs", "largest", "tilted", 2.0, macs_weighted=True
    ),
    "bias_1_temperature_4": Method(
        "seed recipe, bias 1 and temperature 4", "largest", "tilted", 1.0, temperature=4.0
    ),
    "bias_1_temperature_4_no_stage1": Method(
        "seed recipe, bias 1, temperature 4, no stage 1",
        sampler="tilted",
        tilt=1.0,
        temperature=4.0,
    ),
    "stratified": Method(
        "seed recipe, bias 1, temperature 4, a step's sub-networks spread evenly",
        "largest",
        "stratified",
        1.0,
        temperature=4.0,
    ),
}

RECIPE = "seed_recipe"
"""The method that the finalists are compared with: the launchers' settings until `first_place`."""

FINALISTS = ("uniform_distill", "fair", RECIPE)
"""The recipe and the baselines near it: more seeds, and scores on the sealed architectures too."""

RECIPE_SCORES = "calibrated"
"""Which of its scores: ``calibrated`` or ``plain`` (``bn_calibration_images=0``)."""

METHODS = {**BASELINES, **ABLATIONS, **CANDIDATES}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
