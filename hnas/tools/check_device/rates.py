"""How fast the device is: convolutions, a block, a walk, and training steps. Nothing passes or
fails here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.evaluation.counts import Counts
from hnas.evaluation.gpu_kernels import find_fused, gpu_kernels
from hnas.evaluation.kernels import Convolution, new_identity
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.variants import Precision, Variant
from hnas.models.elastic import freeze_statistics
from hnas.models.registry import build_network
from hnas.tools.check_device.arithmetic import scoring_precisions
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.results import Result, fact, guarded, not_here
from hnas.tools.check_device.subjects import CLASSES, images, labels, seed_weights
from hnas.tools.check_device.training import prepared
from hnas.tools.check_device.walk import variants
from hnas.utils.hapi_wrapper import DistillationModel
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FirstPlaceSampler, LargestSampler

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
"""Channels and size of the maps of ResNet48's stages at 224 px."""
LAYOUTS = ("NCHW", "NHWC")
BATCH, WARM_UP = 64, 3
SECONDS = 0.5
"""Of each measurement, at least."""
WALK_ON_GPU, WALK_ON_CPU = ("resnet48", 224, BATCH, 12), ("resnet48", 224, 2, 3)
"""Backbone, px, images and architectures."""
TRAINED_ON_GPU, TRAINED_ON_CPU = ("", 224, BATCH), ("_mini", 32, 16)
"""End of the backbone's name, px, and images of a batch."""


def check(machine: Machine) -> Iterator[Result]:
    """(i) Rates; those of blocks and layouts on GPUs alone."""
    for precision, missing in scoring_precisions(machine):
        if missing:
            yield not_here(f"rates in {precision.value}", missing)
            continue
        if machine.has_gpu:
            for layout in LAYOUTS:
                yield from convolution_rates(precision, layout)
                yield from block_rates(precision, layout)
        yield from guarded("the walk", walk_rates, machine, precision)
    mixed = machine.has_gpu and machine.plan.tf32 == "off"
    for stage in (1, 2):
        for amp in ("O0", "O1") if mixed else ("O0",):
            name = f"training stage {stage}, --amp {amp} --tf32 {machine.plan.tf32}"
            yield from guarded(name, training_rate, machine, name, stage, amp)


def seconds_of(function: Callable[[], paddle.Tensor]) -> float:
    """Seconds a call, after warming up."""
    for _ in range(WARM_UP):
        y = function()
    wait_for(y)
    calls, began = 0, time.perf_counter()
    while not calls or time.perf_counter() - began < SECONDS:
        for _ in range(4):
            y = function()
        wait_for(y)
        calls += 4
    return (time.perf_counter() - began) / calls


def wait_for(y: paddle.Tensor) -> float:
    """Until the device has computed it."""
    return float(y.flatten()[:1].astype("float32").sum())


def drawn(*shape: int) -> paddle.Tensor:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return paddle.to_tensor(values) / float(np.sqrt(np.prod(shape[1:])))


@paddle.no_grad()
def convolution_rates(precision: Precision, layout: str) -> Iterator[Result]:
    """GMAC/s of the 3x3 convolution of each stage."""

    def one(channels: int, size: int) -> Iterator[Result]:
        x = drawn(BATCH, channels, size, size)
        x = x.transpose([0, 2, 3, 1]).contiguous() if layout == "NHWC" else x
        x, w = (part.astype(precision.dtype) for part in (x, drawn(channels, channels, 3, 3)))
        seconds = seconds_of(lambda: F.conv2d(x, w, padding=1, data_format=layout))
        rate = BATCH * size * size * 9 * channels * channels / seconds / 1e9
        yield fact(f"{name} {channels}x{size}x{size}", f"{rate:,.0f} GMAC/s")

    name = f"convolution, {precision.value}, {layout},"
    for channels, size in SHAPES:
        yield from guarded(name, one, channels, size)


@paddle.no_grad()
def block_rates(precision: Precision, layout: str) -> Iterator[Result]:
    """GMAC/s of a whole block of stage 3, fused and not."""

    def one(variant: Variant) -> Iterator[Result]:
        channels, size = SHAPES[2]
        kernels = gpu_kernels(variant, 0)
        convolutions = [
            Convolution(
                kernels.arranged(drawn(channels, channels, 3, 3)),
                (kernels.vector(drawn(channels), is_bias=True),),
                channels,
                new_identity(),
            )
            for _ in range(2)
        ]
        x = kernels.accept(drawn(BATCH, channels, size, size))
        conv1, conv2 = convolutions
        seconds = seconds_of(lambda: kernels.last(kernels.first(x, conv1, 1), x, conv2))
        rate = BATCH * size * size * 18 * channels * channels / seconds / 1e9
        yield fact(f"block of stage 3: {variant}", f"{rate:,.0f} GMAC/s")

    operator, _ = find_fused(precision, layout)
    for fused in (False, True)[: 1 if operator is None else 2]:
        variant = Variant(precision, layout, fused)
        yield from guarded(f"block of stage 3: {variant}", one, variant)


def walk_rates(machine: Machine, precision: Precision) -> Iterator[Result]:
    """GMAC/s of a walk over a few architectures: what ``hnas.tools.plan`` takes."""
    backbone, size, number, archs = WALK_ON_GPU if machine.has_gpu else WALK_ON_CPU
    network = build_network(backbone, CLASSES)
    seed_weights(network)
    rng = np.random.default_rng(2)
    drawn_archs = [network.space.sample(rng) for _ in range(archs)]
    batch = paddle.to_tensor(images(number, size)), paddle.to_tensor(labels(number))
    for variant in variants(machine, precision, 0):
        evaluator = SharedEvaluator(network, drawn_archs, variant=variant)
        evaluator.evaluate(*batch, Counts.zeros(archs))
        walks, began = 0, time.perf_counter()
        while not walks or time.perf_counter() - began < SECONDS:
            evaluator.evaluate(*batch, Counts.zeros(archs))
            walks += 1
        macs = walks * number * evaluator.tree.macs(size)
        rate = macs / (time.perf_counter() - began) / 1e9
        yield fact(f"walk at {size} px: {variant}", f"plan --gmacs_per_s {rate:.0f}")


def training_rate(machine: Machine, name: str, stage: int, amp: str) -> Iterator[Result]:
    """Images/s of a stage's steps."""
    suffix, size, batch = TRAINED_ON_GPU if machine.has_gpu else TRAINED_ON_CPU
    if stage == 1:
        network = build_network(f"resnet48pinasv2{suffix}", CLASSES, queue_size=16 * batch)
        model = ContrastiveModel(network, LargestSampler(network.space, 2))
    else:
        network = build_network(f"resnet48{suffix}", CLASSES)
        teacher = build_network(f"resnet48{suffix}", CLASSES, elastic=False)
        seed_weights(teacher, 1)
        model = DistillationModel(network, teacher, FirstPlaceSampler(network.space, 0))
    seed_weights(network)
    freeze_statistics(network)
    prepared(model, onednn=True, amp=amp)
    other = images(batch, size, seed=1) if stage == 1 else labels(batch)
    parts = [paddle.to_tensor(part) for part in (images(batch, size), other)]
    seconds = seconds_of(lambda: model.train_batch(parts)["loss"])
    what = f"resnet48{suffix}, {size} px, batches of {batch}"
    yield fact(name, f"{batch / seconds:,.0f} images/s", what)
