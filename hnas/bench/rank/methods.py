"""What ``hnas.bench.rank`` compares: ways of training a supernet at an equal cost.

The cost is counted in forward passes of a sub-network over a batch, teacher's and key encoder's
included. All start from the same pretrained largest network, which is also the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

from hnas.base.errors import UserError

STAGE1_FORWARDS = 4
"""Passes of a step of stage 1: two of the query encoder, two of the key encoder."""


@dataclass(frozen=True)
class Method:
    """How a supernet is trained.

    Attributes:
        about: one line for tables.
        stage1: ``none``, ``largest`` (both paths the largest network) or ``sampled``.
        sampler: ``random``, ``biased``, ``annealed``, ``stratified``, ``sandwich`` or ``fair``.
        tilt: of ``biased`` and ``stratified``; ``annealed`` goes from it to ``tilt_end``.
        teacher: ``pretrained``, ``in place`` (the step's first sub-network) or ``none``.
        subnetworks: a step.
        temperature: of the soft targets.
        macs_weighted: losses weighted by the sub-networks' MACs.
        lr: relative to the bench's, for the sum of a step's gradients.
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

    @property
    def forwards(self) -> int:
        """Forward passes over a batch that a step takes."""
        return self.subnetworks + (self.teacher == "pretrained")


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
        "seed recipe: stage 1 (largest), bias 2, distillation", "largest", "biased", tilt=2.0
    ),
    "no_stage1": Method("seed recipe without stage 1", sampler="biased", tilt=2.0),
    "no_bias": Method("seed recipe without bias", "largest"),
    "bias_1": Method("seed recipe with bias 1", "largest", "biased", tilt=1.0),
    "bias_4": Method("seed recipe with bias 4", "largest", "biased", tilt=4.0),
    "stage1_sampled": Method(
        "seed recipe, stage 1 with two sampled paths (Pi-NAS)", "sampled", "biased", tilt=2.0
    ),
}

DEFAULTS = (*BASELINES, *ABLATIONS)

CANDIDATES = {
    "annealed": Method(
        "seed recipe, bias going from 2 to 0", "largest", "annealed", tilt=2.0, tilt_end=0.0
    ),
    "temperature_4": Method(
        "seed recipe, soft targets of temperature 4", "largest", "biased", 2.0, temperature=4.0
    ),
    "macs_weighted": Method(
        "seed recipe, losses weighted by MACs", "largest", "biased", 2.0, macs_weighted=True
    ),
    "bias_1_temperature_4": Method(
        "seed recipe, bias 1 and temperature 4", "largest", "biased", 1.0, temperature=4.0
    ),
    "bias_1_temperature_4_no_stage1": Method(
        "seed recipe, bias 1, temperature 4, no stage 1",
        sampler="biased",
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
"""The method whose settings are the launchers'."""

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
