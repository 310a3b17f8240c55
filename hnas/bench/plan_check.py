"""The plan's formulas against measured times on this machine's CPU.

    python -m hnas.bench.plan_check --backbone resnet48_mini --image_size 64

The rates are measured on the largest network alone: forward and backward passes in dygraph for
the training stages, forward passes in Paddle Inference for stage three. With them the plan
predicts a step of either stage and a walk over all architectures, which are then timed. The last
line is JSON: predicted and measured seconds, and their ratio.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter
from pathlib import Path

import numpy as np
import paddle
from paddle.static import InputSpec

from hnas.base.command_line import LARGEST_SIDE, MOST_ARCHITECTURES, OneLineParser, whole_number
from hnas.base.device import cpu_threads
from hnas.base.errors import run_main
from hnas.evaluation.counts import Counts
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.stopwatch import onednn_predictor
from hnas.evaluation.tree import PrefixTree
from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import PiNASv2, build_network
from hnas.search_space import SearchSpace, search_space
from hnas.tools.plan import FORWARD, TRAINING, Recipe, stage1_macs, stage2_macs
from hnas.utils.gradient_step import momentum_optimizer
from hnas.utils.hapi_wrapper import DistillationModel
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FirstPlaceSampler, LargestSampler

CLASSES, QUEUE = 10, 1024


def seconds_of(action, times: int) -> float:
    """Mean seconds of a run, after one to warm up."""
    action()
    began = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - began) / times


def training_rate(space: SearchSpace, images: paddle.Tensor, times: int) -> float:
    """MACs a second of the largest network's forward and backward pass."""
    network = build_network("resnet48", CLASSES, space)
    x = images.astype("float32")

    def step():
        network(x).mean().backward()
        network.clear_gradients()

    macs = space.macs(space.largest(), x.shape[2], CLASSES) * TRAINING * len(x)
    return macs / seconds_of(step, times)


def inference_rate(space: SearchSpace, images: paddle.Tensor, times: int) -> float:
    """MACs a second of the largest network in Paddle Inference."""
    network = build_network("resnet48", CLASSES, space, elastic=False)
    network.eval()
    x = images.astype("float32")
    with tempfile.TemporaryDirectory(prefix="pinas-plan-") as folder:
        path = str(Path(folder) / "largest")
        spec = [InputSpec([None, 3, None, None], "float32", "image")]
        paddle.jit.save(paddle.jit.to_static(network, input_spec=spec, full_graph=True), path)
        predictor = onednn_predictor(f"{path}.json", f"{path}.pdiparams", cpu_threads())
        seconds = seconds_of(lambda: predictor.run([x]), times)
    return space.macs(space.largest(), x.shape[2], CLASSES) * FORWARD * len(x) / seconds


def stage1_seconds(space: SearchSpace, images: paddle.Tensor, times: int) -> float:
    """Seconds of a step of stage one."""
    model = ContrastiveModel(PiNASv2(space, CLASSES, queue_size=QUEUE), LargestSampler(space, 2))
    freeze_statistics(model.network)
    model.prepare(momentum_optimizer(model.network, 0.01, 0.9, 1e-4))
    return seconds_of(lambda: model.train_batch([images, images]), times)


def stage2_seconds(space: SearchSpace, images: paddle.Tensor, recipe: Recipe, times: int) -> float:
    """Seconds of a step of stage two, sub-networks as the recipe draws them."""
    network = build_network("resnet48", CLASSES, space)
    teacher = build_network("resnet48", CLASSES, space, elastic=False)
    sampler = FirstPlaceSampler(space, 0, recipe.subnetworks)
    freeze_statistics(network)
    model = DistillationModel(network, teacher, sampler)
    model.prepare(momentum_optimizer(network, 0.01, 0.9, 1e-4))
    labels = paddle.zeros([len(images)], dtype="int64")

    def step():
        model.train_batch([images, labels])
        model.step += 1

    # In whole rounds of three steps, of which one trains one sub-network more.
    return seconds_of(step, 3 * times)


def walk_seconds(space: SearchSpace, images: paddle.Tensor, archs: list) -> float:
    """Seconds of a walk over ``archs``."""
    network = build_network("resnet48", CLASSES, space)
    network.eval()
    evaluator = SharedEvaluator(network, archs)
    labels = paddle.zeros([len(images)], dtype="int64")
    counts = Counts.zeros(len(archs))
    return seconds_of(lambda: evaluator.evaluate(images, labels, counts), 1)


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.plan_check",
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backbone", default="resnet48_mini", help="supernet")
    parser.add_argument("--image_size", type=whole_number(32, LARGEST_SIDE), default=64, help="px")
    parser.add_argument("--batch_size", type=whole_number(1, 1_000_000), default=32, help="images")
    parser.add_argument(
        "--n_arch",
        type=whole_number(1, MOST_ARCHITECTURES),
        default=200,
        help="architectures to score",
    )
    parser.add_argument("--times", type=whole_number(1), default=5, help="of each measurement")
    options = parser.parse_args(argv)

    paddle.set_device("cpu")
    paddle.seed(0)
    rng = np.random.default_rng(0)
    space = search_space(options.backbone)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    images = paddle.to_tensor(rng.integers(0, 256, shape, dtype=np.uint8))
    archs = list(space.sample_distinct(rng, options.n_arch).values())
    recipe = Recipe(options.image_size, CLASSES, batch_size=options.batch_size)
    trained = training_rate(space, images, options.times)
    scored = inference_rate(space, images, options.times)
    predicted = {
        "stage1_step": stage1_macs(space, recipe) * options.batch_size / trained,
        "stage2_step": stage2_macs(space, recipe) * options.batch_size / trained,
        "stage3_walk": PrefixTree(space, archs).macs(options.image_size)
        * options.batch_size
        / scored,
    }
    measured = {
        "stage1_step": stage1_seconds(space, images, options.times),
        "stage2_step": stage2_seconds(space, images, recipe, options.times),
        "stage3_walk": walk_seconds(space, images, archs),
    }
    result = {
        "command": f"python -m hnas.bench.plan_check --backbone {options.backbone} --image_size "
        f"{options.image_size} --batch_size {options.batch_size} --n_arch {options.n_arch} "
        f"--times {options.times}",
        "threads": cpu_threads(),
        "training_gmacs_per_s": round(trained / 1e9, 2),
        "inference_gmacs_per_s": round(scored / 1e9, 2),
        **{
            name: {
                "predicted_s": round(predicted[name], 3),
                "measured_s": round(measured[name], 3),
                "ratio": round(measured[name] / predicted[name], 2),
            }
            for name in predicted
        },
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    run_main(main)
