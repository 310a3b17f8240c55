"""How long the three stages take, and how much memory: an estimate before anything is run.

    python -m hnas.tools.plan --gpus 8 --gpu h100 --n_arch 45000 --images 50000

Time is multiply-accumulates over a rate. The rate of a GPU is its data sheet's times an assumed
efficiency, both printed with the result; --gmacs_per_s puts a measured one in their place. The
result is JSON on standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hnas.architecture_file import read_architectures
from hnas.base.command_line import (
    LARGEST_SIDE,
    MOST_ARCHITECTURES,
    OneLineParser,
    path_text,
    real_number,
    whole_number,
)
from hnas.base.errors import UserError, run_main
from hnas.evaluation.engine import MAX_CHUNK
from hnas.evaluation.ledger import even_chunk
from hnas.evaluation.tree import PrefixTree, naive_macs
from hnas.search_space import Architecture, SearchSpace, feature_sizes, search_space
from hnas.utils.SampleMethod import FirstPlaceSampler

FLOAT = 4  # bytes
FORWARD, TRAINING = 1, 3
"""Forward passes' worth of a forward pass, and of one with its backward pass."""
SAMPLED = 300
"""Steps to average stage two's cost over; a third of them train one sub-network more."""


@dataclass(frozen=True)
class Gpu:
    """Data sheet figures of what float32 convolutions run on, and the share assumed of it."""

    tflops: float
    unit: str
    efficiency: float
    memory_gib: int


GPUS = {
    "h100": Gpu(494.5, "TF32 tensor cores, dense", 0.10, 80),
    "a100": Gpu(156.0, "TF32 tensor cores", 0.15, 80),
    "v100": Gpu(15.7, "FP32 cores", 0.55, 32),
}


@dataclass(frozen=True)
class Recipe:
    """What decides the cost; the defaults are the recipe's on ImageNet."""

    image_size: int = 224
    num_classes: int = 1000
    train_images: int = 1_281_167
    images: int = 50_000
    batch_size: int = 256
    stage1_epochs: int = 10
    stage2_epochs: int = 5
    subnetworks: int = 4
    calibration: int = 0
    queue_size: int = 40960
    gpus: int = 1
    memory_gib: int = 80


def stage1_macs(space: SearchSpace, recipe: Recipe) -> float:
    """Per image of a step: one pass of queries, trained, and two of keys.

    Both passes query with the same network and view, which is computed once.
    """
    return (TRAINING + 2 * FORWARD) * _largest(space, recipe)


def stage2_macs(space: SearchSpace, recipe: Recipe) -> float:
    """Per image of a step: the teacher's forward pass, and sampled sub-networks trained."""
    sampler = FirstPlaceSampler(space, 0, recipe.subnetworks)
    sampled = [
        space.macs(arch, recipe.image_size, recipe.num_classes)
        for step in range(SAMPLED)
        for arch in sampler.sample(0, step)
    ]
    return FORWARD * _largest(space, recipe) + TRAINING * sum(sampled) / SAMPLED


def _largest(space: SearchSpace, recipe: Recipe) -> int:
    return space.macs(space.largest(), recipe.image_size, recipe.num_classes)


def activation_floats(space: SearchSpace, image_size: int) -> int:
    """Outputs of all convolutions of the largest network, per image."""
    stem, sizes = feature_sizes(image_size)
    total = stem * stem * space.base_channels[0]
    for stage, cin, mid, cout, _ in space.plan(space.largest()).blocks():
        total += sizes[stage] ** 2 * (mid + cout + (cout if cin != cout else 0))
    return total


def training_bytes(space: SearchSpace, recipe: Recipe, stage: int) -> int:
    """Weights, gradients, momentum and the activations kept for the backward pass.

    A convolution's output is kept three times: as it is, normalised, and after ReLU or the sum.
    Stage one has a key encoder and a queue; stage two has a teacher. Several processes exchange
    gradients in a buffer, of which a scaled copy is made.
    """
    weights = space.params(space.largest(), recipe.num_classes)
    floats = 3 * weights + (2 * weights if recipe.gpus > 1 else 0) + weights
    floats += 3 * recipe.batch_size * activation_floats(space, recipe.image_size)
    if stage == 1:
        floats += 128 * recipe.queue_size
    return FLOAT * floats


def scored_chunk(space: SearchSpace, recipe: Recipe) -> int:
    """Images a walk scores: with the calibration's they take at most a quarter of the memory."""
    image = 3 * FLOAT * activation_floats(space, recipe.image_size)
    free = recipe.memory_gib * 2**30 // 4 // image - recipe.calibration
    return even_chunk(max(1, min(MAX_CHUNK, free)), recipe.images, recipe.gpus)


def scoring_bytes(space: SearchSpace, recipe: Recipe) -> int:
    """Weights, folded weights, and the activations of a chunk and of the calibration images."""
    images = scored_chunk(space, recipe) + recipe.calibration
    weights = 2 * space.params(space.largest(), recipe.num_classes)
    return FLOAT * (weights + 3 * images * activation_floats(space, recipe.image_size))


def estimate(
    space: SearchSpace, archs: Sequence[Architecture], recipe: Recipe, macs_per_s: float
) -> dict:
    """Hours, GMAC per image and GiB per device of each stage and of the naive loop.

    Args:
        archs: to be scored.
        macs_per_s: of one device.
    """
    chunk = scored_chunk(space, recipe)
    # Every walk carries the calibration images along.
    carried = (chunk + recipe.calibration) / chunk
    walk = carried * PrefixTree(space, archs).macs(recipe.image_size)
    naive = naive_macs(space, archs, recipe.image_size)
    steps = recipe.train_images // (recipe.batch_size * recipe.gpus)
    trained = steps * recipe.batch_size * recipe.gpus
    rows = {
        "stage1": (stage1_macs(space, recipe), recipe.stage1_epochs * trained, 1),
        "stage2": (stage2_macs(space, recipe), recipe.stage2_epochs * trained, 2),
        "stage3": (walk, recipe.images, 3),
        "stage3_naive": (naive, recipe.images, 3),
    }
    memory = {
        stage: scoring_bytes(space, recipe) if stage == 3 else training_bytes(space, recipe, stage)
        for stage in (1, 2, 3)
    }
    return {
        name: {
            "gmacs_per_image": round(macs / 1e9, 1),
            "images": images,
            "hours": round(macs * images / (macs_per_s * recipe.gpus) / 3600, 3),
            "gib_per_device": round(memory[stage] / 2**30, 1),
        }
        for name, (macs, images, stage) in rows.items()
    }


def assumptions(options, macs_per_s: float) -> list[str]:
    """What the estimate rests on, one sentence each."""
    if options.gmacs_per_s:
        rate = f"{options.gmacs_per_s} GMAC/s a device, as given"
    else:
        gpu = GPUS[options.gpu]
        share = options.efficiency or gpu.efficiency
        rate = (
            f"{options.gpu}: {gpu.tflops} TFLOP/s ({gpu.unit}, data sheet) x {share} assumed, not "
            f"measured by this project = {macs_per_s / 1e9:.0f} GMAC/s a device"
        )
    return [
        rate,
        "a multiply-accumulate is two floating point operations; a backward pass costs two forward",
        "devices work at the same rate, exchange hidden or free; loading images, evaluations and "
        "checkpoints cost nothing",
        "stage 1 trains the largest network only; its first convolution's saving is ignored",
        "the naive loop runs at the same rate and decodes nothing anew, which flatters it",
        f"memory: float32, {options.batch_size} images a step and device, each convolution's "
        "output kept three times for the backward pass; libraries' own memory not counted; "
        f"stage 3 takes chunks of a quarter of {GPUS[options.gpu].memory_gib} GiB, of which "
        f"{options.bn_calibration_images} images re-calibrate BatchNorm",
    ]


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    recipe = Recipe()
    parser.add_argument("--gpus", type=whole_number(1), default=1, help="devices [default 1]")
    parser.add_argument("--gpu", choices=GPUS, default="a100", help="kind [default a100]")
    parser.add_argument(
        "--efficiency", type=real_number(0, 1), default=0.0, help="share of the data sheet's"
    )
    parser.add_argument(
        "--gmacs_per_s", type=real_number(0, 1e9), default=0.0, help="measured, of one device"
    )
    parser.add_argument(
        "--n_arch", type=whole_number(1, MOST_ARCHITECTURES), default=45000, help="to score"
    )
    parser.add_argument(
        "--modelarch_file", type=path_text, help="architectures to score; else drawn, uniform"
    )
    parser.add_argument("--images", type=whole_number(1), default=recipe.images, help="to score on")
    parser.add_argument("--train_images", type=whole_number(1), default=recipe.train_images)
    parser.add_argument("--batch_size", type=whole_number(1, 1_000_000), default=recipe.batch_size)
    parser.add_argument(
        "--image_size", type=whole_number(32, LARGEST_SIDE), default=recipe.image_size
    )
    parser.add_argument("--stage1_epochs", type=whole_number(1), default=recipe.stage1_epochs)
    parser.add_argument("--stage2_epochs", type=whole_number(1), default=recipe.stage2_epochs)
    parser.add_argument("--dyna_batch_size", type=whole_number(1), default=recipe.subnetworks)
    parser.add_argument("--bn_calibration_images", type=whole_number(0), default=recipe.calibration)
    parser.add_argument("--backbone", default="resnet48", help="[default resnet48]")
    options = parser.parse_args(argv)
    if min(options.efficiency, options.gmacs_per_s) < 0 or options.efficiency > 1:
        raise UserError("--efficiency lies between 0 and 1, --gmacs_per_s is positive")

    space = search_space(options.backbone)
    if options.modelarch_file:
        archs = list(read_architectures(options.modelarch_file).values())[: options.n_arch]
    else:
        drawn = space.sample_distinct(np.random.default_rng(0), options.n_arch)
        archs = list(drawn.values())
    recipe = Recipe(
        options.image_size,
        train_images=options.train_images,
        images=options.images,
        batch_size=options.batch_size,
        stage1_epochs=options.stage1_epochs,
        stage2_epochs=options.stage2_epochs,
        subnetworks=options.dyna_batch_size,
        calibration=options.bn_calibration_images,
        gpus=options.gpus,
        memory_gib=GPUS[options.gpu].memory_gib,
    )
    gpu = GPUS[options.gpu]
    if options.gmacs_per_s:
        macs_per_s = options.gmacs_per_s * 1e9
    else:
        macs_per_s = gpu.tflops * 1e12 / 2 * (options.efficiency or gpu.efficiency)
    result = {
        "device": "as given" if options.gmacs_per_s else options.gpu,
        "devices": options.gpus,
        "architectures": len(archs),
        **estimate(space, archs, recipe, macs_per_s),
        "assumptions": assumptions(options, macs_per_s),
    }
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    run_main(main)
