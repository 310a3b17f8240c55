"""What ``hnas.bench.rank`` is made of: how much is trained, the jobs, and their files.

A finished job has a line in ``OUT/runs.jsonl``, its result, which depends on its settings only, and
one in ``OUT/seconds.jsonl``. Weights that later jobs start from are ``OUT/weights/NAME.pdparams``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError
from hnas.bench.rank.distorted_digits import DigitsTask
from hnas.bench.rank.methods import FINALISTS, STAGE1_FORWARDS, Method, find_method
from hnas.bench.rank.records import Records
from hnas.search_space import Architecture, SearchSpace, search_space

BACKBONE = "resnet48_mini"
ARCHITECTURES_SEED = 2022

SPLITS = ("selection", "seen", "sealed", "final")
"""Architectures to tune on; held out, but looked at once; held out and scored by finalists only;
never scored before the comparison that docs/ranking-bench.md announces."""

LOOKED_AT = ("selection", "seen", "sealed")
"""What the committed runs of former methods are scored on."""

OPEN_SPLITS = ("selection", "seen")
"""What all methods are scored on."""


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Learning rates are peaks, reached after a tenth of the steps and followed by a cosine to zero.

    Attributes:
        architectures: how many, drawn from the released distribution.
        selection: how many of them, the first, recipes may be tuned on.
        sealed: how many of them, before the final ones, only the finalists are scored on.
        final: how many of them, the last, are for one announced comparison.
        seeds: independent runs of everything.
        finalist_seeds: of the finalists, where the sealed are compared.
        batch_size: images a step.
        truth_steps, truth_lr: of the networks that are trained alone.
        pretrain_steps, pretrain_lr: of the network that supernets start from and learn from.
        stage1_steps, stage1_lr, queue_size: of stage 1.
        budget: forward passes over a batch that a supernet may take, stage 1's included.
        supernet_lr: for the sum of the gradients of four sub-networks.
        momentum, weight_decay: of all.
        validation_images: that everything is measured on.
        calibration_images: to re-calibrate BatchNorm with, where it is.
    """

    architectures: int = 96
    selection: int = 16
    sealed: int = 24
    final: int = 32
    seeds: int = 3
    finalist_seeds: int = 8
    batch_size: int = 32
    truth_steps: int = 3200
    truth_lr: float = 0.05
    pretrain_steps: int = 3200
    pretrain_lr: float = 0.05
    stage1_steps: int = 200
    stage1_lr: float = 0.005
    queue_size: int = 1024
    budget: int = 6000
    supernet_lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    validation_images: int = 4000
    calibration_images: int = 256

    @classmethod
    def quick(cls) -> Scale:
        """Just enough to run every part of the bench; its figures mean nothing."""
        return cls(
            architectures=7,
            selection=2,
            sealed=1,
            final=2,
            seeds=1,
            finalist_seeds=1,
            batch_size=16,
            truth_steps=12,
            pretrain_steps=20,
            stage1_steps=3,
            queue_size=64,
            budget=40,
            validation_images=200,
            calibration_images=32,
        )

    def steps(self, method: Method) -> int:
        """Steps of stage 2 that the budget leaves to a method.

        Raises:
            UserError: none.
        """
        left = self.budget - self.stage1_forwards(method)
        if left < method.forwards:
            raise UserError(f"a budget of {self.budget} forward passes leaves no step of stage 2")
        return int(left / method.forwards)

    def stage1_forwards(self, method: Method) -> int:
        """Forward passes over a batch that a method's stage 1 takes."""
        return 0 if method.stage1 == "none" else STAGE1_FORWARDS * self.stage1_steps


# What a job's result depends on; later ones also on what they start from.
COMMON = ("batch_size", "momentum", "weight_decay", "validation_images")
PRETRAIN = (*COMMON, "pretrain_steps", "pretrain_lr")
STAGE1 = (*PRETRAIN, "stage1_steps", "stage1_lr", "queue_size")
DEPENDS = {
    "truth": (*COMMON, "truth_steps", "truth_lr"),
    "pretrain": PRETRAIN,
    "stage1": STAGE1,
    "supernet": (*STAGE1, "budget", "supernet_lr", "calibration_images"),
}


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        kind: ``truth``, ``pretrain``, ``stage1`` or ``supernet``.
        what: an architecture's name, nothing, a kind of stage 1, a method's name.
        seed: from 0.
    """

    kind: str
    what: str
    seed: int

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.kind, self.what, str(self.seed)) if part)

    @classmethod
    def from_name(cls, name: str) -> Job:
        kind, *what, seed = name.split("-")
        return cls(kind, "".join(what), int(seed))


@dataclass(frozen=True)
class Bench:
    """The files of a bench, and what its jobs have in common.

    Attributes:
        folder: of all its files.
        scale: how much is trained.
    """

    folder: Path
    scale: Scale

    @cached_property
    def runs(self) -> Records:
        """Results with their settings, by the jobs' names."""
        return Records(self.folder / "runs.jsonl")

    @cached_property
    def times(self) -> Records:
        """Seconds, apart from the results, so that a repeated job gives the same result."""
        return Records(self.folder / "seconds.jsonl")

    @cached_property
    def space(self) -> SearchSpace:
        return search_space(BACKBONE)

    @cached_property
    def task(self) -> DigitsTask:
        return DigitsTask(validation_images=self.scale.validation_images)

    @cached_property
    def archs(self) -> dict[str, Architecture]:
        """The architectures by name; those of a smaller bench are a larger one's first."""
        rng = np.random.default_rng(ARCHITECTURES_SEED)
        return self.space.sample_distinct(rng, self.scale.architectures)

    def split(self, name: str) -> str:
        """An architecture's, one of ``SPLITS``."""
        scale, place = self.scale, list(self.archs).index(name)
        final = scale.architectures - scale.final
        ends = (scale.selection, final - scale.sealed, final, scale.architectures)
        return next(split for split, end in zip(SPLITS, ends, strict=True) if place < end)

    def of_splits(self, splits: Sequence[str]) -> dict[str, Architecture]:
        """The architectures of some of ``SPLITS``."""
        return {name: arch for name, arch in self.archs.items() if self.split(name) in splits}

    def scored(self, method: str) -> dict[str, Architecture]:
        """The architectures that a method's supernets are scored on."""
        return self.of_splits((*OPEN_SPLITS, "sealed") if method in FINALISTS else OPEN_SPLITS)

    def weights(self, job: Job) -> Path:
        return self.folder / "weights" / f"{job.name}.pdparams"

    def seconds(self, job: Job) -> float | None:
        """What a job took, if that is known."""
        return (self.times.get(job.name) or {}).get("seconds")

    def settings(self, job: Job) -> dict:
        """All that a job's result depends on, as JSON gives it back."""
        settings = {
            "backbone": BACKBONE,
            "task": asdict(self.task),
            **{name: getattr(self.scale, name) for name in DEPENDS[job.kind]},
        }
        if job.kind == "truth":
            settings["arch"] = self.archs[job.what].code
        elif job.kind == "supernet":
            settings["method"] = find_method(job.what).settings()
            settings["architectures"] = len(self.scored(job.what))
        return json.loads(json.dumps(settings))

    def result(self, job: Job) -> dict | None:
        """What a job left, if it is finished; weights that others start from must be there too.

        Raises:
            UserError: it is of other settings.
        """
        result, settings = self.runs.get(job.name), self.settings(job)
        if result is None:
            return None
        found = result.get("settings", {})
        changed = [key for key in settings if found.get(key) != settings[key]]
        if changed:
            raise UserError(
                f"{self.runs.path}: {job.name} is of other settings ({', '.join(changed)}); remove "
                "its line, or choose another --out"
            )
        needs_weights = job.kind in ("pretrain", "stage1")
        return None if needs_weights and not self.weights(job).is_file() else result
