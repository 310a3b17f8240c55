"""What one job of ``hnas.bench.rank`` trains and measures (jobs: ``hnas/bench/rank/jobs.py``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import paddle
from paddle.optimizer.lr import LRScheduler

from hnas.base.device import processor
from hnas.bench.rank.distorted_digits import CLASSES, DigitsTask
from hnas.bench.rank.jobs import Bench, Job
from hnas.bench.rank.methods import STAGE1_CLIP_NORM, Method
from hnas.evaluation.counts import Counts
from hnas.evaluation.reference import evaluate_network
from hnas.evaluation.shared import SharedEvaluator
from hnas.models.convolution import use_onednn
from hnas.models.elastic import ElasticResNet, freeze_statistics
from hnas.models.pinasv2 import PiNASv2
from hnas.models.resnet import ResNet
from hnas.programs.options import Options
from hnas.programs.runtime import seed_generators
from hnas.utils.hapi_wrapper import (
    DistillationModel,
    ResumableModel,
    learning_rate,
    momentum_optimizer,
    swinging_rate,
)
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FixedSampler, Sampler, build_sampler
from hnas.utils.starting import start_from_pretrained
from hnas.weights.loading import (
    NotFiniteError,
    check_finite,
    load_weights,
    read_weights,
    write_state,
)

CHUNK = 1000
SWING_STEPS = 2
"""Half a period of the public code's learning rate: its number of epochs, taken for steps."""
# Kinds draw other images and other random weights; of one kind all jobs of a seed have the same.
SEEDS = {"truth": 1000, "pretrain": 2000, "stage1": 3000, "selection": 4000, "final": 4000}
SEEDS["published"] = 6000
CALIBRATION_SEED = 5000


def run_job(bench: Bench, job: Job) -> dict:
    """Train and measure; gives the result, ``seconds`` and ``processor``.

    The result depends on the job's settings and the number of threads, not on what ran before.
    """
    began = time.perf_counter()
    seed_generators(SEEDS[job.kind] + job.seed)
    with paddle.utils.unique_name.guard():
        result = RUN[job.kind](bench, job)
    return {**result, "seconds": round(time.perf_counter() - began, 1), "processor": processor()}


@dataclass(frozen=True)
class DigitsLoader:
    """Batches of a task, as :class:`hnas.dataset.loader.EpochLoader` gives them.

    Each has ``views`` of its images, distorted independently, each ``copies`` times, and depends on
    (seed, epoch, step) only.
    """

    task: DigitsTask
    batch_size: int
    steps: int
    seed: int
    views: int = 1
    copies: int = 1

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[paddle.Tensor]]:
        """The batches of ``epoch`` from ``start_step`` on: views [N, 3, H, W], labels [N]."""
        for step in range(start_step, self.steps):
            seed = (self.seed, epoch, step)
            images, labels = self.task.training_batch(self.batch_size, seed, self.views)
            yield [paddle.to_tensor(part) for part in (*images * self.copies, labels)]


def train(
    bench: Bench,
    job: Job,
    model: ResumableModel,
    schedule: LRScheduler,
    steps: int,
    views: int = 1,
    copies: int = 1,
    clip_norm: float = 0.0,
) -> None:
    """Train a model on batches as :class:`DigitsLoader` gives them.

    Raises:
        NotFiniteError: it diverged; its logits would compare as hits.
    """
    scale = bench.scale
    optimizer = momentum_optimizer(
        model.network, schedule, scale.momentum, scale.weight_decay, clip_norm
    )
    teacher = getattr(model, "teacher", None)
    use_onednn(model.network, *([teacher] if teacher is not None else []))
    model.prepare(optimizer)
    seed = SEEDS[job.kind] + job.seed
    loader = DigitsLoader(bench.task, scale.batch_size, steps, seed, views, copies)
    for _ in model.train_epoch(loader, 0):
        pass
    check_finite(model.network)


def peak_rate(lr: float, steps: int) -> LRScheduler:
    """The schedule of all trainings but the winners' stage 1."""
    # The schedule's batch of 256 stands for the bench's own, whatever its size.
    return learning_rate(lr, 256, max(1, steps // 10), steps)


def run_alone(bench: Bench, job: Job) -> dict:
    """A plain network, trained with labels, and its hits on the validation images.

    ``pretrain`` is of the largest, start and teacher of all supernets of a seed.
    """
    scale, arch = bench.scale, bench.arch(job)
    # Slices of the same random weights for all of a kind and seed: much of a network's luck is in
    # what it starts from, and what all have does not count in a ranking.
    network = ElasticResNet(bench.space, CLASSES).extract(arch)
    # Without it deep networks come out worse in so few steps, the opposite of ImageNet.
    network.start_as_shortcuts()
    model = DistillationModel(network, None, FixedSampler(arch))
    steps = scale.alone_steps
    train(bench, job, model, peak_rate(scale.alone_lr, steps), steps)
    if job.kind == "pretrain":
        write_state(bench.weights(job), network.state_dict())
    counts = evaluate_network(network, validation_chunks(bench.task, job.scans))
    return {"hits": int(counts.top1[0]), "images": counts.images}


def validation_chunks(task: DigitsTask, scans: str) -> list[tuple[paddle.Tensor, paddle.Tensor]]:
    """uint8 images [N, 3, H, W] and labels [N] of some scans, a few at a time."""
    images, labels = task.validation(scans)
    return [
        (paddle.to_tensor(images[first : first + CHUNK]), paddle.to_tensor(labels[first:][:CHUNK]))
        for first in range(0, len(labels), CHUNK)
    ]


def start(bench: Bench, seed: int, supernet: ElasticResNet) -> ResNet:
    """Give a supernet the pretrained weights; the pretrained network is handed back."""
    path = bench.weights(Job("pretrain", seed))
    network = ResNet(bench.space.plan(bench.space.largest()), CLASSES)
    load_weights(network, read_weights(path), path)
    start_from_pretrained(supernet, network)
    return network


def run_stage1(bench: Bench, job: Job) -> dict:
    """Contrastive training as the first place ran it: the largest network twice, frozen statistics.

    The public code's learning rate swings every few steps, its views are the same pixels, and
    nothing bounds its gradients. The supernet's weights are kept, neck and key encoder are not.
    """
    scale, public = bench.scale, job.what == "public"
    network = PiNASv2(bench.space, CLASSES, queue_size=scale.queue_size, temperature=0.1)
    start(bench, job.seed, network.backbone)
    network.reset_key_encoder()
    freeze_statistics(network)
    model = ContrastiveModel(network, FixedSampler(bench.space.largest(), 2))
    # Of the mean of both passes, whose gradients add up.
    lr, steps = scale.stage1_lr / 2, scale.stage1_steps
    schedule = swinging_rate(lr, 256, SWING_STEPS) if public else peak_rate(lr, steps)
    views = {"views": 1, "copies": 2} if public else {"views": 2}
    train(bench, job, model, schedule, steps, **views, clip_norm=STAGE1_CLIP_NORM[job.what])
    write_state(bench.weights(job), network.backbone.state_dict())
    return {"steps": scale.stage1_steps}


def run_supernet(bench: Bench, job: Job) -> dict:
    """Stage 2 of a method, and its hits of the split's architectures, in their order.

    A learning rate at which it diverges is a result, too: there are no hits then.
    """
    method, scale = job.method, bench.scale
    result = {"steps": scale.steps(method), "images": scale.validation_images}
    network = ElasticResNet(bench.space, CLASSES)
    teacher = start(bench, job.seed, network)
    if job.stage1 is not None:
        path = bench.weights(job.stage1)
        load_weights(network, read_weights(path), path)
    if method.freeze_bn:
        freeze_statistics(network)
    model = DistillationModel(
        network,
        teacher if method.teacher == "pretrained" else None,
        method_sampler(bench, method, job.seed),
        in_place=method.teacher == "in place",
    )
    try:
        # The gradients of a step's sub-networks add up.
        schedule = peak_rate(job.rate, result["steps"])
        train(bench, job, model, schedule, result["steps"], clip_norm=method.clip_norm)
    except NotFiniteError:
        return {**result, "hits": []}
    return {**result, "hits": score_supernet(bench, job, network)}


def method_sampler(bench: Bench, method: Method, seed: int) -> Sampler:
    """What draws a method's sub-networks."""
    first_place = method.sampler == "first_place"
    options = Options(
        sample_method="random" if first_place else method.sampler,
        bias_sample_flag=first_place,
        dyna_batch_size=method.subnetworks,
    )
    return build_sampler(options, bench.space, seed)


def score_supernet(bench: Bench, job: Job, network: ElasticResNet) -> list[int]:
    """Hits of a split's architectures on the validation images."""
    calibration = None
    if not job.method.freeze_bn:
        seed = (CALIBRATION_SEED + job.seed, 0, 0)
        (images,), _ = bench.task.training_batch(bench.scale.calibration_images, seed)
        calibration = paddle.to_tensor(images)
    archs = list(bench.of_split(job.kind).values())
    evaluator = SharedEvaluator(network, archs, calibration)
    counts = Counts.zeros(len(archs))
    for images, labels in validation_chunks(bench.task, job.scans):
        evaluator.evaluate(images, labels, counts)
    return counts.top1.tolist()


RUN: dict[str, Callable[[Bench, Job], dict]] = {
    "published": run_alone,
    "truth": run_alone,
    "pretrain": run_alone,
    "stage1": run_stage1,
    "selection": run_supernet,
    "final": run_supernet,
}
