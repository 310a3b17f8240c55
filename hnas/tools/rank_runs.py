"""What one job of ``hnas.tools.bench_rank`` trains and measures, and where it leaves that.

A job's result is ``OUT/runs/NAME.json``, which depends on its settings only; weights that later
jobs start from are ``OUT/weights/NAME.pdparams``, and seconds ``OUT/seconds/NAME.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from hnas.dataset.distorted_digits import CLASSES, DigitsLoader, DigitsTask
from hnas.evaluation.architecture_file import write_json
from hnas.evaluation.hits import Counts
from hnas.evaluation.shared import SharedEvaluator
from hnas.models.convolution import use_onednn
from hnas.models.elastic import ElasticResNet
from hnas.models.pinasv2 import PiNASv2
from hnas.models.registry import search_space
from hnas.models.resnet import ResNet
from hnas.search_space import Architecture, SearchSpace
from hnas.tools.rank_methods import STAGE1_FORWARDS, Method, find_method
from hnas.tools.train_standalone import evaluate, read_json
from hnas.utils.checkpoint import check_finite, load_weights, read_weights, write_state
from hnas.utils.errors import UserError
from hnas.utils.hapi_wrapper import (
    DistillationModel,
    InPlaceDistillationModel,
    SupernetModel,
    learning_rate,
    macs_weights,
    momentum_optimizer,
)
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.hapi_wrapper_standalone import StandaloneModel
from hnas.utils.SampleMethod import AnnealedSampler, LargestSampler, Sampler, build_sampler
from hnas.utils.setup import seed_generators
from hnas.utils.training import start_from_pretrained

BACKBONE = "resnet48_mini"
ARCHITECTURES_SEED = 2022
CHUNK = 1000
# Jobs of one seed draw from different images.
DATA_SEEDS = {"truth": 1000, "pretrain": 2000, "stage1": 3000, "supernet": 4000}
CALIBRATION_SEED = 5000


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Learning rates are peaks, reached after a tenth of the steps and followed by a cosine to zero.

    Attributes:
        architectures: how many, drawn from the released distribution.
        selection: how many of them, the first, recipes may be tuned on.
        seeds: independent runs of everything.
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

    architectures: int = 48
    selection: int = 16
    seeds: int = 3
    batch_size: int = 32
    truth_steps: int = 1600
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
            architectures=5,
            selection=2,
            seeds=1,
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
        return left // method.forwards

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
    "supernet": (*STAGE1, "budget", "supernet_lr", "architectures", "calibration_images"),
}


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        kind: ``truth``, ``pretrain``, ``stage1`` or ``supernet``.
        what: an architecture's name, nothing, ``largest`` or ``sampled``, a method's name.
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
    """The files of a bench, and what its jobs have in common."""

    folder: Path
    scale: Scale

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
        """``selection`` or ``held_out``."""
        chosen = list(self.archs)[: self.scale.selection]
        return "selection" if name in chosen else "held_out"

    def path(self, job: Job) -> Path:
        return self.folder / "runs" / f"{job.name}.json"

    def weights(self, job: Job) -> Path:
        return self.folder / "weights" / f"{job.name}.pdparams"

    def seconds(self, job: Job) -> float | None:
        """What a job took, if that is known."""
        path = self.folder / "seconds" / f"{job.name}.json"
        return read_json(path)["seconds"] if path.is_file() else None

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
            settings["method"] = asdict(find_method(job.what))
            settings["method"].pop("about")
        return json.loads(json.dumps(settings))

    def result(self, job: Job) -> dict | None:
        """What a job left, if it is finished.

        Raises:
            UserError: it is of other settings.
        """
        path = self.path(job)
        if not path.is_file():
            return None
        result, settings = read_json(path), self.settings(job)
        found = result.get("settings", {})
        changed = [key for key in settings if found.get(key) != settings[key]]
        if changed:
            raise UserError(
                f"{path} is of other settings ({', '.join(changed)}); remove it, or choose another "
                "--out"
            )
        needs_weights = job.kind in ("pretrain", "stage1")
        return None if needs_weights and not self.weights(job).is_file() else result


def run_job(bench: Bench, job: Job) -> None:
    """Train, measure, and leave the result.

    It depends on the job's settings and the number of threads, not on what ran before.
    """
    began = time.perf_counter()
    seed_generators(job.seed)
    with paddle.utils.unique_name.guard():
        result = RUN[job.kind](bench, job)
    seconds = round(time.perf_counter() - began, 1)
    # Apart, so that a repeated run gives the same file.
    write_json(bench.folder / "seconds" / f"{job.name}.json", {"seconds": seconds})
    write_json(bench.path(job), {"settings": bench.settings(job), **result})


def train(
    bench: Bench, job: Job, model: SupernetModel, steps: int, lr: float, views: int = 1
) -> None:
    """Train a model on the task's images.

    Raises:
        NotFiniteError: it diverged; its logits would compare as hits.
    """
    scale = bench.scale
    # The schedule's batch of 256 stands for the bench's own, whatever its size.
    schedule = learning_rate(lr, 256, max(1, steps // 10), steps)
    optimizer = momentum_optimizer(
        model.network, schedule, scale.momentum, scale.weight_decay, clip_norm=0.0
    )
    teacher = getattr(model, "teacher", None)
    use_onednn(model.network, *([teacher] if teacher is not None else []))
    model.prepare(optimizer)
    seed = DATA_SEEDS[job.kind] + job.seed
    model.fit(DigitsLoader(bench.task, scale.batch_size, steps, seed, views), 1)
    check_finite(model.network)


def train_alone(bench: Bench, job: Job, arch: Architecture, steps: int, lr: float) -> nn.Layer:
    """A plain network, trained with labels."""
    network = ResNet(bench.space.plan(arch), CLASSES)
    # Without it deep networks come out worse in so few steps, the opposite of ImageNet.
    network.start_as_shortcuts()
    train(bench, job, StandaloneModel(network, arch.code), steps, lr)
    return network


def score_alone(bench: Bench, network: nn.Layer) -> dict:
    """Hits of a plain network on the validation images."""
    hits, _, images = evaluate(network, validation_chunks(bench.task))
    return {"hits": hits, "images": images}


def validation_chunks(task: DigitsTask) -> list[tuple[paddle.Tensor, paddle.Tensor]]:
    """uint8 images [N, 3, H, W] and labels [N], a few at a time."""
    images, labels = task.validation
    return [
        (paddle.to_tensor(images[first : first + CHUNK]), paddle.to_tensor(labels[first:][:CHUNK]))
        for first in range(0, len(labels), CHUNK)
    ]


def run_truth(bench: Bench, job: Job) -> dict:
    """One architecture, trained alone."""
    scale = bench.scale
    arch = bench.archs[job.what]
    return score_alone(bench, train_alone(bench, job, arch, scale.truth_steps, scale.truth_lr))


def run_pretrain(bench: Bench, job: Job) -> dict:
    """The largest network, trained alone: start and teacher of all supernets of a seed."""
    scale = bench.scale
    network = train_alone(
        bench, job, bench.space.largest(), scale.pretrain_steps, scale.pretrain_lr
    )
    write_state(bench.weights(job), network.state_dict())
    return score_alone(bench, network)


def start(bench: Bench, seed: int, supernet: ElasticResNet) -> ResNet:
    """Give a supernet the pretrained weights; the pretrained network is handed back."""
    path = bench.weights(Job("pretrain", "", seed))
    network = ResNet(bench.space.plan(bench.space.largest()), CLASSES)
    load_weights(network, read_weights(path), path)
    start_from_pretrained(supernet, network)
    return network


def run_stage1(bench: Bench, job: Job) -> dict:
    """Contrastive training; the supernet's weights are kept, neck and key encoder are not."""
    scale = bench.scale
    network = PiNASv2(bench.space, CLASSES, queue_size=scale.queue_size)
    start(bench, job.seed, network.backbone)
    network.reset_key_encoder()
    largest = job.what == "largest"
    sampler = LargestSampler(bench.space) if largest else named_sampler(bench, "random", job.seed)
    train(
        bench, job, ContrastiveModel(network, sampler), scale.stage1_steps, scale.stage1_lr, views=2
    )
    write_state(bench.weights(job), network.backbone.state_dict())
    return {"forwards": STAGE1_FORWARDS * scale.stage1_steps}


def run_supernet(bench: Bench, job: Job) -> dict:
    """Stage 2 of a method, and the hits of all architectures with and without calibration."""
    method, scale = find_method(job.what), bench.scale
    network = ElasticResNet(bench.space, CLASSES)
    teacher = start(bench, job.seed, network)
    if method.stage1 != "none":
        path = bench.weights(Job("stage1", method.stage1, job.seed))
        load_weights(network, read_weights(path), path)
    steps = scale.steps(method)
    model = stage2_model(bench, method, network, teacher, steps, job.seed)
    # The gradients of a step's sub-networks add up.
    lr = scale.supernet_lr * 4 / method.subnetworks * method.lr
    train(bench, job, model, steps, lr)
    seed = (CALIBRATION_SEED + job.seed, 0, 0)
    (calibration,), _ = bench.task.training_batch(scale.calibration_images, 1, seed)
    hits = score_supernet(bench, network, None)
    calibrated = score_supernet(bench, network, paddle.to_tensor(calibration))
    return {
        "steps": steps,
        "forwards": scale.stage1_forwards(method) + steps * method.forwards,
        "images": scale.validation_images,
        "archs": {
            name: {"arch": arch.code, "hits": int(hits[i]), "calibrated_hits": int(calibrated[i])}
            for i, (name, arch) in enumerate(bench.archs.items())
        },
    }


def stage2_model(
    bench: Bench,
    method: Method,
    network: ElasticResNet,
    teacher: ResNet,
    steps: int,
    seed: int,
) -> DistillationModel:
    """A method's model of stage 2."""
    sampler = method_sampler(bench, method, steps, seed)
    size = bench.task.distortion.size
    more = {
        "loss_weight": macs_weights(bench.space, size) if method.macs_weighted else None,
        "temperature": method.temperature,
    }
    if method.teacher == "in place":
        return InPlaceDistillationModel(network, sampler, method.subnetworks, **more)
    teacher = teacher if method.teacher == "pretrained" else None
    return DistillationModel(network, teacher, sampler, method.subnetworks, **more)


def method_sampler(bench: Bench, method: Method, steps: int, seed: int) -> Sampler:
    """What draws a method's sub-networks."""
    if method.sampler == "annealed":
        return AnnealedSampler(bench.space, seed, method.tilt, method.tilt_end, steps)
    return named_sampler(bench, method.sampler, seed, method.tilt)


def named_sampler(bench: Bench, name: str, seed: int, tilt: float = 0.0) -> Sampler:
    """A sampler of the command line's names."""
    return build_sampler(name, bench.space, seed, tilt)


def score_supernet(
    bench: Bench, network: ElasticResNet, calibration: paddle.Tensor | None
) -> np.ndarray:
    """Hits of all architectures on the validation images, int64 [architectures]."""
    archs = list(bench.archs.values())
    evaluator = SharedEvaluator(network, archs, bench.task.distortion.size, calibration)
    counts = Counts.zeros(len(archs))
    for images, labels in validation_chunks(bench.task):
        evaluator.evaluate(images, labels, counts)
    return counts.top1


RUN: dict[str, Callable[[Bench, Job], dict]] = {
    "truth": run_truth,
    "pretrain": run_pretrain,
    "stage1": run_stage1,
    "supernet": run_supernet,
}
