"""How long the three stages take, and how much memory: an estimate before anything is run.

    python -m hnas.tools.plan --gpus 8 --gpu h100 --n_arch 45000 --images 50000

Time is multiply-accumulates over a rate: a GPU's by its data sheet, in the precision that --tf32
and --amp give, times the share of it that is reached. Stage 3's walk also moves every activation
through memory several times, more often where convolution, bias, shortcut and ReLU are not fused.
All that is assumed is printed with the result; --gmacs_per_s puts a measured rate in its place. The
result is JSON on standard output.
"""

from __future__ import annotations

import json
import math
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
    read_bool,
    real_number,
    whole_number,
)
from hnas.base.errors import UserError, run_main
from hnas.evaluation.engine import GPU_SHARE, choose_chunk, path_numbers
from hnas.evaluation.ledger import even_chunk
from hnas.evaluation.tree import PrefixTree, naive_macs
from hnas.evaluation.variants import Precision, Variant, usual_variant
from hnas.search_space import Architecture, SearchSpace, feature_sizes, search_space
from hnas.utils.SampleMethod import FirstPlaceSampler

FLOAT = 4  # bytes
FORWARD, TRAINING = 1, 3
"""Forward passes' worth of a forward pass, and of one with its backward pass."""
SAMPLED = 300
"""Steps to average stage two's cost over; a third of them train one sub-network more."""


@dataclass(frozen=True)
class Gpu:
    """A card's data sheet.

    Attributes:
        float32, tf32, half: TFLOP/s of dense products; 0: the card has none such.
        gb_per_s: of its memory.
        memory_gib: how much.
        training: the share of them that training is taken to reach, in float32, TF32 and half
            precision.
        scoring: the same of stage 3's convolutions by themselves.
        known: how the shares are known.
    """

    float32: float
    tf32: float
    half: float
    gb_per_s: int
    memory_gib: int
    training: tuple[float, float, float]
    scoring: tuple[float, float, float]
    known: str = "assumed, not measured by this project"

    def rate(self, precision: Precision) -> float:
        """TFLOP/s by the data sheet."""
        if precision.is_half:
            return self.half
        return self.tf32 if precision is Precision.TF32 else self.float32

    def share(self, precision: Precision, of: tuple[float, float, float]) -> float:
        """The share of :meth:`rate` that ``training`` or ``scoring`` has for a precision."""
        if precision.is_half:
            return of[2]
        return of[1 if precision is Precision.TF32 else 0]


THROUGH_PYTORCH = "measured on one through PyTorch, not with Paddle (docs/speed.md)"
GPUS = {
    "h100": Gpu(
        *(66.9, 494.5, 989.4, 3350, 80),
        training=(0.54, 0.14, 0.11),
        scoring=(0.57, 0.37, 0.43),
        known=THROUGH_PYTORCH,
    ),
    "a100": Gpu(19.5, 156.0, 312.0, 2039, 80, (0.55, 0.15, 0.15), (0.8, 0.5, 0.5)),
    "v100": Gpu(15.7, 0.0, 125.0, 900, 32, (0.55, 0.0, 0.15), (0.8, 0.0, 0.5)),
}
SHARE_OF_BANDWIDTH = 0.8
PASSES, FUSED_PASSES = 7.5, 2.5
"""Times that memory sees an activation of stage 3, counted in a convolution's outputs: the
convolution reads and writes one each, and so do bias and ReLU; the shortcut's sum, behind every
second convolution, reads two and writes one. Fused only the shortcut is read in addition."""


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
    variant: Variant = Variant()


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
    """Images a walk scores, as stage 3 chooses them on a card that has all its memory free."""
    memory, number = GPU_SHARE * recipe.memory_gib * 2**30, recipe.variant.precision.bytes
    limit = choose_chunk(space, recipe.image_size, recipe.calibration, memory, number)
    return even_chunk(limit, recipe.images, recipe.gpus)


def scoring_bytes(space: SearchSpace, recipe: Recipe) -> int:
    """Weights, folded weights, and the activations of a chunk and of the calibration images."""
    images = scored_chunk(space, recipe) + recipe.calibration
    weights, number = (
        space.params(space.largest(), recipe.num_classes),
        recipe.variant.precision.bytes,
    )
    activations = images * path_numbers(space, recipe.image_size)
    return FLOAT * weights + number * (weights + activations)


@dataclass(frozen=True)
class Rates:
    """How fast a device is.

    Attributes:
        training: multiply-accumulates a second of stages 1 and 2.
        scoring: of stage 3's convolutions.
        bytes: a second through memory beside stage 3's; infinite: in ``scoring`` already.
    """

    training: float
    scoring: float
    bytes: float = math.inf

    def scoring_seconds(self, macs: float, outputs: float, variant: Variant) -> float:
        """Of convolutions that do ``macs`` and write ``outputs`` numbers."""
        passes = FUSED_PASSES if variant.fused else PASSES
        moved = passes * outputs * variant.precision.bytes
        return macs / self.scoring + moved / self.bytes


def rates_of(gpu: Gpu, precision: Precision, efficiency: float = 0.0) -> Rates:
    """What is assumed of a card; ``efficiency`` is the share that training reaches, if not 0."""
    macs = gpu.rate(precision) * 1e12 / 2
    return Rates(
        macs * (efficiency or gpu.share(precision, gpu.training)),
        macs * gpu.share(precision, gpu.scoring),
        gpu.gb_per_s * 1e9 * SHARE_OF_BANDWIDTH,
    )


def estimate(
    space: SearchSpace, archs: Sequence[Architecture], recipe: Recipe, rates: Rates
) -> dict:
    """Hours, GMAC per image and GiB per device of each stage and of the naive loop.

    Args:
        archs: to be scored.
        rates: of one device.
    """
    chunk = scored_chunk(space, recipe)
    # Every walk carries the calibration images along.
    carried = (chunk + recipe.calibration) / chunk
    walk, outputs = (carried * part for part in PrefixTree(space, archs).cost(recipe.image_size))
    naive = naive_macs(space, archs, recipe.image_size)
    steps = recipe.train_images // (recipe.batch_size * recipe.gpus)
    trained = steps * recipe.batch_size * recipe.gpus
    scored = rates.scoring_seconds(walk, outputs, recipe.variant)
    stage1, stage2 = stage1_macs(space, recipe), stage2_macs(space, recipe)
    rows = {
        "stage1": (stage1, recipe.stage1_epochs * trained, 1, stage1 / rates.training),
        "stage2": (stage2, recipe.stage2_epochs * trained, 2, stage2 / rates.training),
        "stage3": (walk, recipe.images, 3, scored),
        "stage3_naive": (naive, recipe.images, 3, scored * naive / walk),
    }
    memory = {
        stage: scoring_bytes(space, recipe) if stage == 3 else training_bytes(space, recipe, stage)
        for stage in (1, 2, 3)
    }
    return {
        name: {
            "gmacs_per_image": round(macs / 1e9, 1),
            "images": images,
            "hours": round(seconds * images / recipe.gpus / 3600, 3),
            "gib_per_device": round(memory[stage] / 2**30, 1),
        }
        for name, (macs, images, stage, seconds) in rows.items()
    }


def assumptions(options, variant: Variant, rates: Rates) -> list[str]:
    """What the estimate rests on, one sentence each."""
    if options.gmacs_per_s:
        speed = [f"{options.gmacs_per_s} GMAC/s a device, as given"]
    else:
        gpu, precision = GPUS[options.gpu], variant.precision
        peak = gpu.rate(precision)
        training = f"{rates.training / 1e9:.0f} GMAC/s"
        speed = [
            f"{options.gpu}, {precision.value}: {peak} TFLOP/s (data sheet); "
            f"{'as given' if options.efficiency else gpu.known}: training reaches "
            f"{2e-12 * rates.training / peak:.2g} of them ({training} a device); {gpu.known}: a "
            f"convolution of stage 3 reaches {2e-12 * rates.scoring / peak:.2g}; assumed: memory "
            f"reaches {SHARE_OF_BANDWIDTH} of {gpu.gb_per_s} GB/s",
        ]
    passes = FUSED_PASSES if variant.fused else PASSES
    return [
        *speed,
        f"stage 3 walks in {variant}: memory sees each of its activations {passes} times"
        + ("" if variant.fused else "; the program tries at the start whether fusing works"),
        "a multiply-accumulate is two floating point operations; a backward pass costs two forward",
        "devices work at the same rate, exchange hidden or free; loading images, evaluations and "
        "checkpoints cost nothing",
        "stage 1 trains the largest network only; its first convolution's saving is ignored",
        "the naive loop runs at the same rate and decodes nothing anew, which flatters it",
        f"memory: training in float32, {options.batch_size} images a step and device, each "
        "convolution's output kept three times for the backward pass; libraries' own memory not "
        f"counted; stage 3 takes chunks of {GPU_SHARE:.0%} of {GPUS[options.gpu].memory_gib} GiB, "
        f"of which {options.bn_calibration_images} images re-calibrate BatchNorm",
    ]


def planned_variant(options) -> Variant:
    """The variant that the flags ask for on that card.

    Raises:
        UserError: the card, or re-calibration, does not allow it.
    """
    has_tf32 = GPUS[options.gpu].tf32 > 0
    if options.tf32 == "on" and not has_tf32:
        raise UserError(f"--tf32 on, but {options.gpu} has no TF32; give auto or off")
    if options.fused and options.bn_calibration_images:
        raise UserError(
            "--fused True, but BatchNorm re-calibration cannot be fused; give "
            "--bn_calibration_images 0"
        )
    tf32 = has_tf32 and options.tf32 != "off"
    precision = Precision.TF32 if tf32 else Precision.FLOAT32
    return usual_variant(precision if options.amp == "O0" else Precision.FLOAT16, options.fused)


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    recipe = Recipe()
    parser.add_argument("--gpus", type=whole_number(1), default=1, help="devices [default 1]")
    parser.add_argument("--gpu", choices=GPUS, default="a100", help="kind [default a100]")
    parser.add_argument(
        "--efficiency",
        type=real_number(0, 1),
        default=0.0,
        help="share of the data sheet's rate that training reaches",
    )
    parser.add_argument(
        "--tf32", choices=("auto", "on", "off"), default="auto", help="auto: where the card has it"
    )
    parser.add_argument(
        "--amp", choices=("O0", "O1"), default="O0", help="O1: half precision [default O0]"
    )
    parser.add_argument(
        "--fused", type=read_bool, default=False, help="stage 3 with the fused operator"
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
    variant = planned_variant(options)

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
        variant=variant,
    )
    if options.gmacs_per_s:
        rates = Rates(options.gmacs_per_s * 1e9, options.gmacs_per_s * 1e9)
    else:
        rates = rates_of(GPUS[options.gpu], variant.precision, options.efficiency)
    result = {
        "device": "as given" if options.gmacs_per_s else options.gpu,
        "devices": options.gpus,
        "architectures": len(archs),
        **estimate(space, archs, recipe, rates),
        "assumptions": assumptions(options, variant, rates),
    }
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    run_main(main)
