"""What ``hnas.bench.rank`` is made of: how much is trained, the jobs, and their files.

A finished job has a line in ``OUT/runs.jsonl``: its settings, on which its result depends, the
result, and what it took. Weights that later jobs start from are ``OUT/weights/NAME.pdparams``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from hnas.architecture_file import PUBLISHED, read_accuracies
from hnas.base.errors import UserError
from hnas.base.files import replacing
from hnas.base.settings import check_same_settings
from hnas.bench.rank.distorted_digits import DigitsTask
from hnas.bench.rank.methods import METHODS, STAGE1_CLIP_NORM, STAGE1_FORWARDS, Method
from hnas.search_space import Architecture, SearchSpace, search_space

ARCHITECTURES_SEED = 2022

SPLITS = ("selection", "final")
"""Architectures to choose by, and those that only what is compared is scored on."""

TRAINED_ALONE = ("published", "truth", "pretrain")
"""Kinds of jobs."""


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Learning rates are peaks, reached after a tenth of the steps and followed by a cosine to zero.

    Attributes:
        selection, final: architectures of each split, drawn from the released distribution, and
            trained alone once.
        twice: of ``final``, trained alone once more, which tells how far one training is to be
            relied on.
        seeds, tuning_seeds: supernets of each compared method, and of each of its learning rates
            when one is chosen.
        batch_size: images a step.
        alone_steps, alone_lr: of the networks that are trained alone, that which supernets start
            from and learn from among them.
        stage1_steps, stage1_lr, queue_size: of stage 1.
        budget: forward passes over a batch that a supernet may take, stage 1's included.
        momentum, weight_decay: of all.
        calibration_images: to re-calibrate BatchNorm with, where it is.
    """

    selection: int = 48
    final: int = 192
    twice: int = 32
    seeds: int = 8
    tuning_seeds: int = 2
    batch_size: int = 16
    alone_steps: int = 500
    alone_lr: float = 0.05
    stage1_steps: int = 60
    stage1_lr: float = 0.005
    queue_size: int = 1024
    budget: int = 1800
    momentum: float = 0.9
    weight_decay: float = 1e-4
    validation_images: int = 2000
    calibration_images: int = 256

    @classmethod
    def quick(cls) -> Scale:
        """Just enough to run every part of the bench; its figures mean nothing."""
        return cls(
            selection=3,
            final=8,
            twice=2,
            seeds=2,
            tuning_seeds=1,
            batch_size=4,
            alone_steps=3,
            stage1_steps=1,
            queue_size=16,
            budget=26,
            validation_images=50,
            calibration_images=8,
        )

    def steps(self, method: Method) -> int:
        """Steps of stage 2 that the budget leaves to a method."""
        stage1 = STAGE1_FORWARDS * self.stage1_steps if method.stage1 else 0
        return int((self.budget - stage1) / method.forwards)


# What a job's result depends on, what it starts from included.
ALONE = ("batch_size", "momentum", "weight_decay", "validation_images", "alone_steps", "alone_lr")
SUPERNET = (*ALONE, "stage1_steps", "stage1_lr", "queue_size", "budget", "calibration_images")


@dataclass(frozen=True)
class Candidate:
    """A task on which rankings may be measured, and how networks are trained on it."""

    task: DigitsTask
    base_channels: tuple[int, ...]
    scale: Scale = Scale()


TASKS = {
    # What tells digits apart is so large that most of it is seen by stage 3, on maps of 8 px.
    "small_digit": Candidate(
        DigitsTask(size=128, rotation=0.9, shrink=(1.1, 1.8), noise=0.3),
        base_channels=(8, 12, 24, 48),
    ),
}
"""By the names of ``--task``; docs/ranking-bench.md says how like ImageNet's their truths are."""


@dataclass(frozen=True)
class Job:
    """One training."""

    kind: str
    """``published``, ``truth``, ``pretrain``, ``stage1``, or of a supernet the split that it is
    scored on."""
    seed: int
    what: str = ""
    """An architecture's name, nothing, the recipe of stage 1, or a method's name."""
    rate: float = 0.0
    """A supernet's learning rate, for the sum of a step's gradients."""

    @property
    def name(self) -> str:
        what = f"{self.what}@{self.rate:g}" if self.rate else self.what
        return "-".join(part for part in (self.kind, what, str(self.seed)) if part)

    @property
    def method(self) -> Method:
        """Of a supernet."""
        return METHODS[self.what]

    @property
    def needs(self) -> tuple[Job, ...]:
        """The jobs whose weights it starts from."""
        if self.kind in TRAINED_ALONE:
            return ()
        pretrained = Job("pretrain", self.seed)
        return (pretrained,) if self.stage1 is None else (pretrained, self.stage1)

    @property
    def stage1(self) -> Job | None:
        """That a supernet's stage 2 goes on from, if any."""
        if self.kind not in SPLITS or not self.method.stage1:
            return None
        return Job("stage1", self.seed, self.method.stage1)

    @property
    def scans(self) -> str:
        """Of ``VALIDATION``, what its network is measured on."""
        return {"published": "all", "truth": "truth"}.get(self.kind, "scores")


@dataclass(frozen=True)
class Bench:
    """The files of a bench, all in one folder, and what its jobs have in common."""

    folder: Path
    scale: Scale
    name: str = "small_digit"
    """Of the task."""

    @property
    def runs(self) -> Path:
        return self.folder / "runs.jsonl"

    @cached_property
    def space(self) -> SearchSpace:
        channels = TASKS[self.name].base_channels
        return replace(search_space("resnet48_mini"), base_channels=channels)

    @cached_property
    def task(self) -> DigitsTask:
        return replace(TASKS[self.name].task, validation_images=self.scale.validation_images)

    @cached_property
    def published(self) -> tuple[dict[str, Architecture], np.ndarray]:
        """Architectures by name, and their ImageNet accuracies in percent."""
        return read_accuracies(PUBLISHED)

    @cached_property
    def archs(self) -> dict[str, Architecture]:
        """The architectures by name; those of a smaller bench are a larger one's first."""
        rng = np.random.default_rng(ARCHITECTURES_SEED)
        return self.space.sample_distinct(rng, self.scale.selection + self.scale.final)

    def of_split(self, split: str) -> dict[str, Architecture]:
        """The architectures of one of ``SPLITS``."""
        every, first = list(self.archs.items()), self.scale.selection
        return dict(every[:first] if split == "selection" else every[first:])

    def arch(self, job: Job) -> Architecture:
        """Of a job that trains one alone."""
        if job.kind == "pretrain":
            return self.space.largest()
        return (self.published[0] if job.kind == "published" else self.archs)[job.what]

    def weights(self, job: Job) -> Path:
        return self.folder / "weights" / f"{job.name}.pdparams"

    def settings(self, job: Job) -> dict:
        """All that a job's result depends on but threads, processor and code, as JSON gives it."""
        names = ALONE if job.kind in TRAINED_ALONE else SUPERNET
        settings = {name: getattr(self.scale, name) for name in names}
        settings |= {"base_channels": self.space.base_channels, "task": asdict(self.task)}
        settings["scans"] = job.scans
        stage1 = job if job.kind == "stage1" else job.stage1
        if stage1 is not None:
            settings["stage1_clip_norm"] = STAGE1_CLIP_NORM[stage1.what]
        if job.kind in ("published", "truth"):
            settings["arch"] = self.arch(job).code
        elif job.kind in SPLITS:
            settings["method"] = asdict(job.method)
            settings["lr"] = job.rate
            settings["architectures"] = len(self.of_split(job.kind))
        return json.loads(json.dumps(settings))

    def entries(self) -> dict[str, dict]:
        """All results by the jobs' names, in the order of the lines; none if there is no file.

        Raises:
            UserError: the file cannot be read, or is not one of these.
        """
        try:
            lines = self.runs.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"cannot read {self.runs}: {error.strerror or error}") from error
        entries = {}
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                entries[entry.pop("job")] = entry
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    f"{self.runs}, line {number} is not a whole entry of a job; remove the line, "
                    "and the job is done again"
                ) from None
        return entries

    def put(self, job: Job, result: dict) -> None:
        """Add a job's result, or replace it. It is on the disk when this returns.

        The file is replaced as a whole: a kill leaves all results, or all but the newest. So one
        process writes it.

        Raises:
            UserError: the file cannot be written, or is not one of these.
        """
        entries = self.entries() | {job.name: {"settings": self.settings(job), **result}}
        with replacing(self.runs) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for name, entry in entries.items():
                file.write(json.dumps({"job": name, **entry}, separators=(",", ":")) + "\n")

    def results(self, jobs: Iterable[Job]) -> dict[Job, dict]:
        """What those of the jobs left that are finished.

        Weights that others start from must be there too.

        Raises:
            UserError: a result is of other settings.
        """
        entries, found = self.entries(), {}
        for job in jobs:
            lost = job.kind in ("pretrain", "stage1") and not self.weights(job).is_file()
            if job.name not in entries or lost:
                continue
            check_same_settings(
                f"{self.runs}: {job.name}",
                entries[job.name].get("settings", {}),
                self.settings(job),
                "remove its line, or choose another --out",
            )
            found[job] = entries[job.name]
        return found

    def unfinished(self, jobs: Iterable[Job]) -> list[Job]:
        """Those without a result, in their order."""
        jobs = list(dict.fromkeys(jobs))
        found = self.results(jobs)
        return [job for job in jobs if job not in found]


def published_jobs(bench: Bench) -> list[Job]:
    """Two trainings of each published architecture, the first of all before the second ones."""
    return [Job("published", seed, name) for seed in range(2) for name in bench.published[0]]


def truth_jobs(bench: Bench, split: str) -> list[Job]:
    """One training of each architecture of a split."""
    return [Job("truth", 0, name) for name in bench.of_split(split)]


def second_jobs(bench: Bench) -> list[Job]:
    """The trainings of those of ``final`` that are trained twice: the second ones."""
    return [Job("truth", 1, name) for name in [*bench.of_split("final")][: bench.scale.twice]]


def supernet_jobs(bench: Bench, wanted: Iterable[tuple[str, float]], split: str) -> list[Job]:
    """Supernets of methods at learning rates, scored on a split; one seed after the other.

    What is chosen by is of other seeds than what is compared.
    """
    scale, wanted = bench.scale, list(wanted)
    seeds = range(scale.seeds)
    if split == "selection":
        seeds = range(scale.seeds, scale.seeds + scale.tuning_seeds)
    return [Job(split, seed, name, rate) for seed in seeds for name, rate in wanted]
