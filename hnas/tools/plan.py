"""How long the three stages take, and how much memory: an estimate before anything is run.

    python -m hnas.tools.plan --gpus 8 --gpu h100 --n_arch 45000 --images 50000

Time is multiply-accumulates over a rate: a GPU's by its data sheet, in the precision that --tf32
and --amp give, times the share of it that is reached. Stage 3's walk also moves every activation
through memory several times.
The result is JSON, with all that is assumed; --gmacs_per_s puts a measured rate in its place. What
follows from it, the largest batch that fits among others, is a sentence on stderr.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hnas.base.command_line import (
    LARGEST_SIDE,
    MOST_ARCHITECTURES,
    OneLineParser,
    real_number,
    whole_number,
)
from hnas.base.errors import UserError, run_main
from hnas.base.files import print_text
from hnas.evaluation.tree import GPU_SHARE, PrefixTree, choose_chunk, even_chunk, path_numbers
from hnas.evaluation.variants import Precision
from hnas.search_space import Architecture, SearchSpace, convolution_outputs, search_space
from hnas.utils.SampleMethod import FirstPlaceSampler

logger = logging.getLogger(__name__)

FORWARD, TRAINING = 1, 3
"""Forward passes' worth of a forward pass, and of one with its backward pass."""
EPOCHS, QUEUE, CLASSES, SUBNETWORKS = (10, 5), 128 * 40960, 1000, 4
"""Of the recipe: epochs of stages 1 and 2, numbers in stage 1's queue, ImageNet's classes, stage
2's draws."""
FLOAT = 4  # bytes
USABLE = 0.8
"""Share of a card's memory that a batch may take; libraries take some, too."""
SAMPLED = 300
"""Steps to average stage two's cost over; a third of them train one sub-network more."""
SHARE_OF_BANDWIDTH = 0.8
PASSES = 7.5
"""Times that memory sees an activation of stage 3, in a convolution's outputs: the convolution
reads and writes one each, and so do bias and ReLU; the shortcut's sum, behind every second
convolution, reads two and writes one."""


FLOAT32, TF32, HALF = Precision.FLOAT32, Precision.TF32, Precision.FLOAT16
ASSUMED = {FLOAT32: (0.55, 0.8), TF32: (0.15, 0.5), HALF: (0.15, 0.5)}
MEASURED = {FLOAT32: (0.54, 0.57), TF32: (0.14, 0.37), HALF: (0.11, 0.43)}
ON_H100 = "measured on an H100 through PyTorch, not with Paddle (docs/speed.md)"


class Gpu(NamedTuple):
    """A card."""

    gb_per_s: int  # of its memory
    memory_gib: int
    tflops: dict[Precision, float]  # of dense products, by the data sheet
    shares: dict = ASSUMED  # of them, that training and a convolution of stage 3 reach
    known: str = "assumed, not measured by this project"  # the shares


AMPERE = {FLOAT32: 19.5, TF32: 156.0, HALF: 312.0}
HOPPER = {FLOAT32: 66.9, TF32: 494.5, HALF: 989.4}
GPUS = {
    "h200": Gpu(4800, 139, HOPPER, MEASURED, ON_H100),
    "h100": Gpu(3350, 80, HOPPER, MEASURED, ON_H100),
    "a100": Gpu(2039, 80, AMPERE),
    "a100-40gb": Gpu(1555, 40, AMPERE),
    "l40s": Gpu(864, 44, {FLOAT32: 91.6, TF32: 183.0, HALF: 362.0}),
    "v100": Gpu(900, 32, {FLOAT32: 15.7, HALF: 125.0}),
}


class Rates(NamedTuple):
    """How much a device does in a second."""

    training: float  # multiply-accumulates of stages 1 and 2
    scoring: float  # of stage 3's convolutions
    bytes: float = math.inf  # through memory, beside stage 3's; infinite: in ``scoring`` already


def rates_of(gpu: Gpu, precision: Precision) -> Rates:
    """What is assumed of a card."""
    macs = gpu.tflops[precision] * 1e12 / 2
    training, scoring = gpu.shares[precision]
    return Rates(macs * training, macs * scoring, gpu.gb_per_s * 1e9 * SHARE_OF_BANDWIDTH)


def training_macs(space: SearchSpace, size: int) -> tuple[float, float]:
    """Per image of a step of stages 1 and 2.

    Stage 1: one pass of queries, trained, and two of keys; both passes query with the same network
    and view, which is computed once. Stage 2: the teacher's pass, and sub-networks trained.
    """
    largest = space.macs(space.largest(), size, CLASSES)
    sampler = FirstPlaceSampler(space, 0, SUBNETWORKS)
    steps = (sampler.sample(0, step) for step in range(SAMPLED))
    sampled = sum(space.macs(arch, size, CLASSES) for step in steps for arch in step) / SAMPLED
    return (TRAINING + 2 * FORWARD) * largest, FORWARD * largest + TRAINING * sampled


def training_bytes(space: SearchSpace, options, batch: int) -> tuple[int, int]:
    """Of stages 1 and 2 at a batch: weights, gradients, momentum, and activations that are kept.

    A convolution's output is kept three times: as it is, normalised, and after ReLU or the sum.
    Stage one has a key encoder and a queue; stage two has a teacher. Several processes exchange
    gradients in a buffer, of which a scaled copy is made.
    """
    largest = space.largest()
    copies = 6 if options.gpus > 1 else 4
    activations = convolution_outputs(space.plan(largest), options.image_size)
    floats = copies * space.params(largest, CLASSES) + 3 * batch * activations
    return FLOAT * (floats + QUEUE), FLOAT * floats


def largest_batch(space: SearchSpace, options) -> int:
    """Images a card that stages 1 and 2 train in ``USABLE`` of its memory; 0: not one."""
    empty, one = (max(training_bytes(space, options, batch)) for batch in (0, 1))
    return max(0, int((USABLE * options.memory_gib * 2**30 - empty) / (one - empty)))


def scored_chunk(space: SearchSpace, options, precision: Precision) -> int:
    """Images a walk scores, as stage 3 chooses them on a card that has all its memory free."""
    memory = GPU_SHARE * options.memory_gib * 2**30
    limit = choose_chunk(space, options.image_size, 0, memory, precision.bytes)
    return even_chunk(limit, options.images, options.gpus)


def estimate(
    space: SearchSpace, archs: Sequence[Architecture], options, precision: Precision, rates: Rates
) -> dict:
    """Hours, GMAC per image and GiB per device of each stage."""
    size, number = options.image_size, precision.bytes
    chunk = scored_chunk(space, options, precision)
    walk, outputs = PrefixTree(space, archs).cost(size)
    seconds = walk / rates.scoring + PASSES * outputs * number / rates.bytes
    weights = space.params(space.largest(), CLASSES)
    # Weights, folded ones, and activations.
    scoring = FLOAT * weights + number * (weights + chunk * path_numbers(space, size))
    total = options.batch_size * options.gpus
    trained = options.train_images // total * total
    stage1, stage2 = training_macs(space, size)
    memory1, memory2 = training_bytes(space, options, options.batch_size)
    rows = {
        "stage1": (stage1, EPOCHS[0] * trained, stage1 / rates.training, memory1),
        "stage2": (stage2, EPOCHS[1] * trained, stage2 / rates.training, memory2),
        "stage3": (walk, options.images, seconds, scoring),
    }
    return {
        name: {
            "gmacs_per_image": round(macs / 1e9, 1),
            "images": images,
            "hours": round(each * images / options.gpus / 3600, 3),
            "gib_per_device": round(memory / 2**30, 1),
        }
        for name, (macs, images, each, memory) in rows.items()
    }


def assumptions(options, precision: Precision, rates: Rates) -> list[str]:
    """What the estimate rests on, one sentence each."""
    gpu = GPUS[options.gpu]
    training, scoring = gpu.shares[precision]
    speed = (
        f"{options.gpu}, {precision.value}: {gpu.tflops[precision]} TFLOP/s (data sheet); "
        f"{gpu.known}: training reaches {training} of them ({rates.training / 1e9:.0f} GMAC/s a "
        f"device), a convolution of stage 3 {scoring}; assumed: memory reaches "
        f"{SHARE_OF_BANDWIDTH} of {gpu.gb_per_s} GB/s"
    )
    return [
        f"{options.gmacs_per_s} GMAC/s a device, as given" if options.gmacs_per_s else speed,
        f"stage 3 walks in {precision.value}: memory sees an activation {PASSES} times",
        f"the recipe's {EPOCHS[0]} and {EPOCHS[1]} epochs; a backward pass costs two forward",
        "left out: exchange, loading images, evaluations, checkpoints, and the gradients of frozen "
        "BatchNorm's scale and bias, for which Paddle has a GPU start a block of threads a channel",
        f"memory: training in float32, {options.batch_size} images a step and device, each "
        "convolution's output kept three times for the backward pass; libraries' own memory not "
        f"counted, so a batch may take {USABLE:.0%} of {options.memory_gib} GiB; stage 3 takes "
        f"chunks of {GPU_SHARE:.0%}, and does not re-calibrate BatchNorm",
    ]


def conclusion(found: dict, batch: int, options) -> str:
    """What to do with an estimate, in a sentence; ``batch`` is the largest that fits."""
    hours = [found[stage]["hours"] for stage in ("stage1", "stage2", "stage3")]
    one, two, three, total = (
        f"{each:.1f} h" if each >= 1.5 else f"{60 * each:.0f} min" for each in (*hours, sum(hours))
    )
    fits = f"the largest batch that fits {options.memory_gib:g} GiB is {batch:,} a card"
    if not batch:
        fits = f"at {options.image_size} px no batch fits {options.memory_gib:g} GiB"
    elif batch < options.batch_size:
        wanted = options.batch_size
        parts = next(n for n in range(2, wanted + 1) if wanted % n == 0 and wanted // n <= batch)
        fits += f": lower --batch_size {options.batch_size}, or train with --accumulate {parts}"
    device = "device(s) of that rate" if options.gmacs_per_s else options.gpu
    return (
        f"on {options.gpus} {device} stage 1 takes about {one}, stage 2 {two} and stage 3 {three}, "
        f"together {total}; {fits}"
    )


def planned_precision(options) -> Precision:
    """What the flags ask for on that card.

    Raises:
        UserError: the card does not allow it.
    """
    has_tf32 = TF32 in GPUS[options.gpu].tflops
    if options.tf32 == "on" and not has_tf32:
        raise UserError(f"--tf32 on, but {options.gpu} has no TF32; give auto or off")
    if options.amp == "O1":
        return HALF
    return TF32 if has_tf32 and options.tf32 != "off" else FLOAT32


def parser() -> OneLineParser:
    made = OneLineParser(description=__doc__.splitlines()[0])
    count, side = whole_number(1), whole_number(32, LARGEST_SIDE)
    batch, archs = whole_number(1, 1_000_000), whole_number(1, MOST_ARCHITECTURES)
    made.add_argument("--gpus", type=count, default=1, help="devices")
    made.add_argument("--gpu", choices=GPUS, default="a100", help="kind of device")
    made.add_argument("--memory_gib", type=real_number(0, 1e6), default=0, help="if not its kind's")
    made.add_argument("--tf32", choices=("auto", "on", "off"), default="auto", help="not on V100")
    made.add_argument("--amp", choices=("O0", "O1"), default="O0", help="O1: half precision")
    made.add_argument("--gmacs_per_s", type=real_number(0, 1e9), default=0.0, help="if measured")
    made.add_argument("--n_arch", type=archs, default=45000, help="to score")
    made.add_argument("--images", type=count, default=50_000, help="to score on")
    made.add_argument("--train_images", type=count, default=1_281_167, help="an epoch")
    made.add_argument("--batch_size", type=batch, default=256, help="of a device")
    made.add_argument("--image_size", type=side, default=224, help="px")
    made.add_argument("--backbone", default="resnet48", help="supernet")
    return made


def main(argv=None) -> None:
    options = parser().parse_args(argv)
    options.memory_gib = options.memory_gib or GPUS[options.gpu].memory_gib
    precision = planned_precision(options)
    space = search_space(options.backbone)
    drawn = space.sample_many(np.random.default_rng(0), options.n_arch)
    archs = [drawn.architecture(index) for index in range(options.n_arch)]
    if options.train_images < options.batch_size * options.gpus:
        raise UserError(f"--train_images {options.train_images} is no batch; lower --batch_size")
    measured = options.gmacs_per_s * 1e9
    rates = Rates(measured, measured) if measured else rates_of(GPUS[options.gpu], precision)
    result = {
        "device": "as given" if measured else options.gpu,
        "devices": options.gpus,
        "architectures": len(archs),
        **estimate(space, archs, options, precision, rates),
        "assumptions": assumptions(options, precision, rates),
    }
    print_text(json.dumps(result, indent=1) + "\n")
    logger.info("%s", conclusion(result, largest_batch(space, options), options))


if __name__ == "__main__":
    run_main(main)
