"""What ``hnas.bench.rank`` compares: ways of training a supernet at an equal cost.

The cost is counted in forward passes of a sub-network over a batch, teacher's and key encoder's
included. All start from the same pretrained largest network, which is also the teacher.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from hnas.base.errors import UserError

STAGE1_FORWARDS = 4
"""Passes of a step of stage 1: two of the query encoder, two of the key encoder."""

COLUMNS = {"plain": "hits", "calibrated": "calibrated_hits"}
"""Of a supernet's scores: at running statistics, and with BatchNorm computed anew."""

LEARNING_RATES = (0.0067, 0.02, 0.06)
"""What each method's is chosen from: peaks, for the sum of the gradients of a step."""


@dataclass(frozen=True)
class Method:
    """How a supernet is trained.

    Attributes:
        title: its name in figures.
        about: one line for tables.
        stage1: ``none``, ``frozen`` (as the first place ran it: the largest network twice, frozen
            statistics), ``frozen_two_kinds`` (of views) or ``largest`` (batch statistics,
            temperature 0.2, exchanged views).
        sampler: ``first_place``, ``random``, ``tilted``, ``sandwich`` or ``fair``.
        tilt: of ``tilted``.
        teacher: ``pretrained``, ``in place`` (the step's first sub-network) or ``none``.
        subnetworks: a step.
        temperature: of the soft targets.
        freeze_bn: stage 2 trains at the running statistics that it starts from.
        stage2: its length, relative to what the bench's budget leaves to it.
        clip_norm: largest norm of all gradients of a step of stage 2 together; 0: any.
    """

    title: str
    about: str
    stage1: str = "none"
    sampler: str = "random"
    tilt: float = 0.0
    teacher: str = "pretrained"
    subnetworks: int = 4
    temperature: float = 1.0
    freeze_bn: bool = False
    stage2: float = 1.0
    clip_norm: float = 0.0

    @property
    def forwards(self) -> float:
        """Forward passes over a batch that a step takes on average."""
        extra = 1 / 3 if self.sampler == "first_place" else 0
        return self.subnetworks + extra + (self.teacher == "pretrained")

    @property
    def scores(self) -> str:
        """Which of its scores it is compared by, as ``bn_calibration_images=auto`` chooses.

        ``plain`` ones are at running statistics, which are those that it was trained at where they
        were frozen; elsewhere BatchNorm is ``calibrated`` anew for each architecture.
        """
        return "plain" if self.freeze_bn else "calibrated"

    def settings(self) -> dict:
        """What a supernet depends on."""
        settings = asdict(self)
        del settings["title"], settings["about"]
        if not self.clip_norm:
            # Runs of before it could be set do not name it.
            del settings["clip_norm"]
        return settings


FIRST_PLACE = Method(
    "first place",
    "stage 1 and 2 at frozen statistics, the 4 largest of 400 candidates and one more in every "
    "third step, labels and teacher",
    stage1="frozen",
    sampler="first_place",
    freeze_bn=True,
)

COMPARED = {
    "first_place": FIRST_PLACE,
    "first_place_no_stage1": replace(
        FIRST_PLACE,
        title="first place, no stage 1",
        about="the same without stage 1",
        stage1="none",
    ),
    "first_place_uniform": replace(
        FIRST_PLACE,
        title="first place, uniform draws",
        about="first place with 4 uniform sub-networks a step",
        sampler="random",
    ),
    "tilted": Method(
        "tilt 2, batch statistics",
        "the former default: stage 1 and 2 at batch statistics, tilt 2, labels and teacher",
        stage1="largest",
        sampler="tilted",
        tilt=2.0,
    ),
    "organisers": Method(
        "organisers' baseline",
        "4 uniform sub-networks a step at frozen statistics, labels and teacher, no stage 1",
        freeze_bn=True,
    ),
    "organisers_calibrated": Method(
        "organisers', batch statistics", "the same at batch statistics"
    ),
    "bignas": Method(
        "BigNAS",
        "largest, smallest, two uniform; labels for the largest, which teaches the others",
        sampler="sandwich",
        teacher="in place",
    ),
    "fairnas": Method(
        "FairNAS",
        "7 sub-networks a step, in which every option has its turn equally often; labels",
        sampler="fair",
        teacher="none",
        subnetworks=7,
    ),
    "single_path": Method(
        "single path (SPOS)",
        "one uniform sub-network a step; labels",
        teacher="none",
        subnetworks=1,
    ),
}
"""What is compared on the final architectures."""

REFERENCE = "first_place"
"""What the others' differences are taken from: the launchers' defaults."""

PRIMARY = "organisers"
"""The difference that the comparison is announced for."""

EIGHT_SEEDS = ("first_place", "first_place_no_stage1", "first_place_uniform", PRIMARY)
"""Compared with eight seeds; the others with five."""

VARIANTS = {
    "first_place_batch": replace(FIRST_PLACE, freeze_bn=False),
    "first_place_tilted": replace(FIRST_PLACE, sampler="tilted", tilt=2.0),
    "first_place_two_kinds": replace(FIRST_PLACE, stage1="frozen_two_kinds"),
    "first_place_quarter": replace(FIRST_PLACE, stage2=0.25),
    "first_place_half": replace(FIRST_PLACE, stage2=0.5),
    "first_place_double": replace(FIRST_PLACE, stage2=2.0),
    "first_place_quadruple": replace(FIRST_PLACE, stage2=4.0),
    "first_place_temperature_4": replace(FIRST_PLACE, temperature=4.0),
    "first_place_clipped": replace(FIRST_PLACE, clip_norm=10.0),
}
"""Of first place, for :data:`CHANGES` and :data:`CLIPPED`."""


@dataclass(frozen=True)
class Change:
    """One change of the first place's recipe, whose effect is measured.

    Attributes:
        title: for tables and figures.
        method: its name.
        scores: ``plain`` or ``calibrated``.
        rate: learning rate relative to the first place's.
    """

    title: str
    method: str = REFERENCE
    scores: str = "plain"
    rate: float = 1.0


CHANGES = (
    Change("as it ran"),
    Change("re-calibrated", scores="calibrated"),
    Change("batch statistics in stage 2", "first_place_batch"),
    Change("batch statistics, re-calibrated", "first_place_batch", "calibrated"),
    Change("tilt 2", "first_place_tilted"),
    Change("uniform", "first_place_uniform"),
    Change("no stage 1", "first_place_no_stage1"),
    Change("two kinds of views", "first_place_two_kinds"),
    Change("stage 2 / 4", "first_place_quarter"),
    Change("stage 2 / 2", "first_place_half"),
    Change("stage 2 x 2", "first_place_double"),
    Change("stage 2 x 4", "first_place_quadruple"),
    Change("learning rate / 3", rate=1 / 3),
    Change("learning rate x 3", rate=3.0),
    Change("temperature 4", "first_place_temperature_4"),
)
"""What may move tau, one change at a time; the first is what the others are compared with."""

CLIPPED = "first_place_clipped"
"""Compared with first place by how many of their supernets break."""

METHODS = {**COMPARED, **VARIANTS}


LENGTHS = tuple(
    change
    for change in CHANGES
    if (change.scores, change.rate) == ("plain", 1.0)
    and replace(METHODS[change.method], stage2=1.0) == FIRST_PLACE
)
"""Those that change nothing but how long stage 2 is."""


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


FORMER = {
    "uniform_distill": "uniform, distilled",
    "sandwich_inplace": "sandwich, in place",
    "single_path": "single path, fast rate",
    "fair": "fair, 4 a step",
    "seed_recipe": "tilt 2, stage 1",
    "no_stage1": "tilt 2, no stage 1",
    "stage1_sampled": "tilt 2, stage 1 on sampled paths",
    "no_bias": "no tilt, stage 1",
    "bias_1": "tilt 1, stage 1",
    "bias_4": "tilt 4, stage 1",
    "macs_weighted": "tilt 2, stage 1, losses by MACs",
    "bias_1_temperature_4": "tilt 1, stage 1, temperature 4",
    "first_place": "first place",
    "tilted": "tilt 2, batch statistics",
}
"""Compared before, by title, on architectures that have been looked at; but for ``first_place`` all
at batch statistics. Their runs are committed and can be read; the code that trained them is that of
commit a1c8890."""

FORMER_REFERENCE = "seed_recipe"

FORMER_FINALISTS = ("seed_recipe", "uniform_distill", "fair")
"""Those with eight seeds and scores on the sealed architectures; the others have three."""

FORMER_TRIAL = ("first_place", "tilted")
"""Two seeds each, compared on the selection architectures."""
