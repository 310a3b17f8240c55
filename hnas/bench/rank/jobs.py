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
from hnas.bench.rank.methods import EIGHT_SEEDS, STAGE1_FORWARDS, Method, find_method
from hnas.bench.rank.records import Records
from hnas.search_space import Architecture, SearchSpace, search_space

BACKBONE = "resnet48_mini"
ARCHITECTURES_SEED = 2022

SPLITS = ("selection", "seen", "sealed", "final")
"""Architectures to tune on; held out for former methods, but looked at once; looked at by three
former methods; never scored before the comparison that docs/ranking-bench.md announces."""

TRUTH_SEEDS = {"selection": 6, "seen": 3, "sealed": 3, "final": 8}
"""How often each architecture is trained alone."""

DEVELOPMENT_SEEDS = (8, 9)
"""Of supernets that are scored on the selection architectures: the first to choose learning rates
by, both for what moves tau. Final ones have the seeds before them."""


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Learning rates are peaks, reached after a tenth of the steps and followed by a cosine to zero.

    Attributes:
        architectures: how many, drawn from the released distribution.
        selection: how many of them, the first, recipes may be tuned on.
        sealed: how many of them, before the final ones, were held out for former methods.
        final: how many of them, the last, are for one announced comparison.
        most_truth_seeds, most_seeds: bounds of the numbers of seeds.
        batch_size: images a step.
        truth_steps, truth_lr: of the networks that are trained alone.
        pretrain_steps, pretrain_lr: of the network that supernets start from and learn from.
        stage1_steps, stage1_lr, queue_size: of stage 1.
        budget: forward passes over a batch that a supernet may take, stage 1's included.
        momentum, weight_decay: of all.
        validation_images: that everything is measured on.
        calibration_images: to re-calibrate BatchNorm with, where it is.
    """

    architectures: int = 96
    selection: int = 16
    sealed: int = 24
    final: int = 32
    most_truth_seeds: int = 8
    most_seeds: int = 8
    batch_size: int = 32
    truth_steps: int = 3200
    truth_lr: float = 0.05
    pretrain_steps: int = 3200
    pretrain_lr: float = 0.05
    stage1_steps: int = 120
    stage1_lr: float = 0.005
    queue_size: int = 1024
    budget: int = 3600
    momentum: float = 0.9
    weight_decay: float = 1e-4
    validation_images: int = 4000
    calibration_images: int = 256

    @classmethod
    def quick(cls) -> Scale:
        """Just enough to run every part of the bench; its figures mean nothing."""
        return cls(
            architectures=7,
            selection=3,
            sealed=0,
            final=4,
            most_truth_seeds=2,
            most_seeds=1,
            batch_size=16,
            truth_steps=8,
            pretrain_steps=12,
            stage1_steps=1,
            queue_size=64,
            budget=26,
            validation_images=100,
            calibration_images=32,
        )

    def truth_seeds(self, split: str) -> int:
        """How often each architecture of a split is trained alone."""
        return min(TRUTH_SEEDS[split], self.most_truth_seeds)

    def seeds(self, method: str) -> int:
        """How many final supernets a method has."""
        return min(8 if method in EIGHT_SEEDS else 5, self.most_seeds)

    def steps(self, method: Method) -> int:
        """Steps of stage 2 that the budget leaves to a method.

        Raises:
            UserError: none.
        """
        left = (self.budget - self.stage1_forwards(method)) * method.stage2
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
SUPERNET = (*STAGE1, "budget", "calibration_images")
DEPENDS = {
    "truth": (*COMMON, "truth_steps", "truth_lr"),
    "pretrain": PRETRAIN,
    "stage1": STAGE1,
    "selection": SUPERNET,
    "final": SUPERNET,
    # Former ones, which are only read; their lines say what else they were.
    "supernet": COMMON,
}


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        kind: ``truth``, ``pretrain``, ``stage1``, or of a supernet the split that it is scored on,
            ``selection`` or ``final``; ``supernet`` for those of former methods.
        what: an architecture's name, nothing, a kind of stage 1, or ``METHOD@RATE``.
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

    @classmethod
    def supernet(cls, split: str, method: str, rate: float, seed: int) -> Job:
        """A method's training at a learning rate, scored on a split."""
        return cls(split, f"{method}@{rate:g}", seed)

    @property
    def method(self) -> Method:
        """Of a supernet."""
        return find_method(self.what.partition("@")[0])

    @property
    def rate(self) -> float:
        """Learning rate of a supernet, for the sum of a step's gradients."""
        return float(self.what.partition("@")[2])

    @property
    def needs(self) -> tuple[Job, ...]:
        """The jobs whose weights it starts from."""
        if self.kind in ("truth", "pretrain"):
            return ()
        pretrained = Job("pretrain", "", self.seed)
        if self.kind == "stage1" or self.method.stage1 == "none":
            return (pretrained,)
        return pretrained, Job("stage1", self.method.stage1, self.seed)


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
        """What jobs cost, apart from the results, so that a repeated job gives the same result."""
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

    def weights(self, job: Job) -> Path:
        return self.folder / "weights" / f"{job.name}.pdparams"

    def seconds(self, job: Job) -> float | None:
        """What a job took by the clock, if that is known."""
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
        elif job.kind in ("selection", "final"):
            settings["method"] = job.method.settings()
            settings["lr"] = job.rate
            settings["architectures"] = len(self.of_splits((job.kind,)))
        return json.loads(json.dumps(settings))

    def result(self, job: Job) -> dict | None:
        """What a job left, if it is finished; weights that others start from must be there too.

        Raises:
            UserError: it is of other settings.
        """
        result, settings = self.runs.get(job.name), self.settings(job)
        if result is None or (
            job.kind in ("pretrain", "stage1") and not self.weights(job).is_file()
        ):
            return None
        found = result.get("settings", {})
        changed = [key for key in settings if found.get(key) != settings[key]]
        if changed:
            raise UserError(
                f"{self.runs.path}: {job.name} is of other settings ({', '.join(changed)}); remove "
                "its line, or choose another --out"
            )
        return result
