"""What one job of ``hnas.bench.rank`` trains and measures (jobs: ``hnas/bench/rank/jobs.py``)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import paddle
from paddle import nn

from hnas.base.device import processor
from hnas.bench.rank.distorted_digits import (
    CLASSES,
    STRONG,
    DigitsLoader,
    DigitsTask,
    Distortion,
)
from hnas.bench.rank.jobs import Bench, Job
from hnas.bench.rank.methods import COLUMNS, STAGE1_FORWARDS, Method
from hnas.evaluation.counts import Counts
from hnas.evaluation.reference import evaluate_network
from hnas.evaluation.shared import SharedEvaluator
from hnas.models.convolution import use_onednn
from hnas.models.elastic import ElasticResNet, freeze_statistics
from hnas.models.pinasv2 import PiNASv2
from hnas.models.resnet import ResNet
from hnas.search_space import Architecture
from hnas.utils.hapi_wrapper import (
    DistillationModel,
    ResumableModel,
    StandaloneModel,
    learning_rate,
    momentum_optimizer,
)
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.options import Options
from hnas.utils.runtime import seed_generators
from hnas.utils.SampleMethod import LargestSampler, Sampler, build_sampler
from hnas.utils.starting import start_from_pretrained
from hnas.utils.weights import (
    NotFiniteError,
    check_finite,
    load_weights,
    read_weights,
    write_state,
)

CHUNK = 1000
# Jobs of one seed draw from different images.
DATA_SEEDS = {
    "truth": 1000,
    "pretrain": 2000,
    "stage1": 3000,
    "selection": 4000,
    "final": 4000,
}
CALIBRATION_SEED = 5000


def run_job(bench: Bench, job: Job) -> None:
    """Train, measure, and leave the result.

    It depends on the job's settings and the number of threads, not on what ran before.
    """
    began, cpu = time.perf_counter(), time.process_time()
    seed_generators(job.seed)
    with paddle.utils.unique_name.guard():
        result = RUN[job.kind](bench, job)
    cost = {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "processor": processor(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
    }
    bench.times.put(job.name, cost)
    bench.runs.put(job.name, {"settings": bench.settings(job), **result})


def train(
    bench: Bench,
    job: Job,
    model: ResumableModel,
    steps: int,
    lr: float,
    more: Sequence[Distortion] = (),
    clip_norm: float = 0.0,
) -> None:
    """Train a model on the task's images, and on ``more`` kinds of views of them.

    Raises:
        NotFiniteError: it diverged; its logits would compare as hits.
    """
    scale = bench.scale
    # The schedule's batch of 256 stands for the bench's own, whatever its size.
    schedule = learning_rate(lr, 256, max(1, steps // 10), steps)
    optimizer = momentum_optimizer(
        model.network, schedule, scale.momentum, scale.weight_decay, clip_norm
    )
    teacher = getattr(model, "teacher", None)
    use_onednn(model.network, *([teacher] if teacher is not None else []))
    model.prepare(optimizer)
    seed = DATA_SEEDS[job.kind] + job.seed
    for _ in model.train_epoch(DigitsLoader(bench.task, scale.batch_size, steps, seed, more), 0):
        pass
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
    counts = evaluate_network(network, validation_chunks(bench.task))
    return {"hits": int(counts.top1[0]), "images": counts.images}


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
    frozen = job.what != "largest"
    temperature = 0.1 if frozen else 0.2
    network = PiNASv2(bench.space, CLASSES, queue_size=scale.queue_size, temperature=temperature)
    start(bench, job.seed, network.backbone)
    network.reset_key_encoder()
    if frozen:
        freeze_statistics(network)
    model = ContrastiveModel(network, LargestSampler(bench.space, 2))
    more = [STRONG if job.what == "frozen_two_kinds" else bench.task.distortion]
    # Of the mean of both passes, whose gradients add up.
    train(bench, job, model, scale.stage1_steps, scale.stage1_lr / 2, more)
    write_state(bench.weights(job), network.backbone.state_dict())
    return {"forwards": STAGE1_FORWARDS * scale.stage1_steps}


def run_supernet(bench: Bench, job: Job) -> dict:
    """Stage 2 of a method, and the hits of a split by the scores that it is compared by.

    On the selection architectures by both. A learning rate at which it diverges is a result, too:
    there are no hits then.
    """
    method, scale = job.method, bench.scale
    steps = scale.steps(method)
    result = {
        "steps": steps,
        "forwards": scale.stage1_forwards(method) + round(steps * method.forwards),
        "images": scale.validation_images,
    }
    network = ElasticResNet(bench.space, CLASSES)
    teacher = start(bench, job.seed, network)
    if method.stage1 != "none":
        path = bench.weights(Job("stage1", method.stage1, job.seed))
        load_weights(network, read_weights(path), path)
    if method.freeze_bn:
        freeze_statistics(network)
    model = stage2_model(bench, method, network, teacher, job.seed)
    try:
        # The gradients of a step's sub-networks add up.
        train(bench, job, model, steps, job.rate, clip_norm=method.clip_norm)
    except NotFiniteError:
        return {**result, "archs": {}}
    seed = (CALIBRATION_SEED + job.seed, 0, 0)
    (calibration,), _ = bench.task.training_batch(scale.calibration_images, seed)
    archs = bench.of_splits((job.kind,))
    images = {"plain": None, "calibrated": paddle.to_tensor(calibration)}
    hits = {
        column: score_supernet(bench, network, archs, images[scores])
        for scores, column in COLUMNS.items()
        if job.kind == "selection" or scores == method.scores
    }
    result["archs"] = {
        name: {"arch": arch.code, **{column: int(own[i]) for column, own in hits.items()}}
        for i, (name, arch) in enumerate(archs.items())
    }
    return result


def stage2_model(
    bench: Bench, method: Method, network: ElasticResNet, teacher: ResNet, seed: int
) -> DistillationModel:
    """A method's model of stage 2."""
    sampler = method_sampler(bench, method, seed)
    in_place = method.teacher == "in place"
    teacher = teacher if method.teacher == "pretrained" else None
    return DistillationModel(network, teacher, sampler, in_place=in_place)


def method_sampler(bench: Bench, method: Method, seed: int) -> Sampler:
    """What draws a method's sub-networks."""
    first_place = method.sampler == "first_place"
    options = Options(
        sample_method="random" if first_place else method.sampler,
        bias_sample_flag=first_place,
        dyna_batch_size=method.subnetworks,
    )
    return build_sampler(options, bench.space, seed)


def score_supernet(
    bench: Bench,
    network: ElasticResNet,
    archs: Mapping[str, Architecture],
    calibration: paddle.Tensor | None,
) -> np.ndarray:
    """Hits of architectures on the validation images, int64 [architectures]."""
    evaluator = SharedEvaluator(network, list(archs.values()), calibration)
    counts = Counts.zeros(len(archs))
    for images, labels in validation_chunks(bench.task):
        evaluator.evaluate(images, labels, counts)
    return counts.top1


RUN: dict[str, Callable[[Bench, Job], dict]] = {
    "truth": run_truth,
    "pretrain": run_pretrain,
    "stage1": run_stage1,
    "selection": run_supernet,
    "final": run_supernet,
}
