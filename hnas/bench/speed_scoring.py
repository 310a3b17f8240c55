"""How fast stage three is: both engines on the same codes and images, in one run, interleaved.

    python -m hnas.bench.speed_scoring --modelarch_file F --n_arch 300 --image_size 64 --n_images 64

The last line is JSON. Times are seconds: the reference engine's for all codes, measured in parts
between the walks of the shared engine, and the shared engine's mean over its walks, decoding
included; its first walk, which prepares filters and kernels, apart. The network has random weights,
and an image's label is what the largest network says, so that hits are neither all nor none.
"""

from __future__ import annotations

from hnas.base.errors import UserError, hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import paddle

from hnas.architecture_file import read_architectures
from hnas.base.command_line import (
    LARGEST_SIDE,
    MOST_ARCHITECTURES,
    OneLineParser,
    path_text,
    whole_number,
)
from hnas.base.device import cpu_threads, processor
from hnas.bench.speed_training import settle, smooth_noise
from hnas.dataset.image_folder import ImageList
from hnas.dataset.loader import EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform, normalize
from hnas.evaluation.counts import Counts
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.tree import PrefixTree, naive_macs
from hnas.models.elastic import ElasticResNet
from hnas.models.pinasv2 import build_network
from hnas.search_space import Architecture, search_space

logger = logging.getLogger(__name__)


def main(argv=None) -> None:
    options = parse(argv)
    space = search_space(options.backbone)
    archs = list(read_architectures(options.modelarch_file).values())
    rng = np.random.default_rng(options.seed)
    if options.n_arch > len(archs):
        raise UserError(f"--n_arch {options.n_arch}, but the file has {len(archs)} architectures")
    if options.n_arch:
        archs = [archs[index] for index in rng.permutation(len(archs))[: options.n_arch]]
    result = {
        "backbone": options.backbone,
        "image_size": options.image_size,
        "n_arch": len(archs),
        "n_images": options.n_images,
        "processor": processor(),
        "threads": cpu_threads(),
        "macs_naive": naive_macs(space, archs, options.image_size),
        "macs_shared": PrefixTree(space, archs).macs(options.image_size),
    }
    paddle.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="pinas-bench-") as folder:
        result |= measure(options, archs, Path(folder), rng)
    sys.stdout.write(json.dumps(result) + "\n")


def parse(argv):
    parser = OneLineParser(
        prog="python -m hnas.bench.speed_scoring",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--modelarch_file", type=path_text, required=True, help="to draw from")
    most = whole_number(0, MOST_ARCHITECTURES)
    parser.add_argument("--n_arch", type=most, default=0, help="drawn of them; 0: all")
    parser.add_argument("--image_size", type=whole_number(32, LARGEST_SIDE), default=224, help="px")
    parser.add_argument("--n_images", type=whole_number(1, 1_000_000), default=64, help="images")
    parser.add_argument("--backbone", default="resnet48", help="supernet")
    parser.add_argument("--rounds", type=whole_number(1), default=2, help="runs of each engine")
    classes = whole_number(2, 1_000_000)
    parser.add_argument("--num_classes", type=classes, default=1000, help="of the network")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of all draws")
    return parser.parse_args(argv)


def measure(options, archs: list[Architecture], folder: Path, rng: np.random.Generator) -> dict:
    """Run both engines ``rounds`` times, in turns."""
    network = build_network(options.backbone, options.num_classes, search_space(options.backbone))
    images = make_images(options, network, folder, rng)
    loader = EvalLoader(ImageDataset(images, EvalTransform(options.image_size), options.seed), 64)
    began = time.perf_counter()
    evaluator = SharedEvaluator(network, archs)
    counts = walk(evaluator, loader, len(archs))
    first_s = time.perf_counter() - began
    reference_s, shared_s, expected = 0.0, 0.0, []
    for number, part in enumerate(np.array_split(np.arange(len(archs)), options.rounds), 1):
        began = time.perf_counter()
        found = evaluate_reference(network, [archs[index] for index in part], loader)
        expected.append(np.stack(found.columns()))
        between = time.perf_counter()
        counts = walk(evaluator, loader, len(archs))
        ended = time.perf_counter()
        reference_s += between - began
        shared_s += (ended - between) / options.rounds
        logger.info("round %d of %d", number, options.rounds)
    apart = np.abs(np.stack(counts.columns()) - np.concatenate(expected, axis=1)).max(axis=1)
    return {
        "reference_s": round(reference_s, 3),
        "shared_s": round(shared_s, 3),
        "ratio": round(reference_s / shared_s, 3),
        "first_s": round(first_s, 3),
        "largest_difference_top1": int(apart[0]),
        "largest_difference_top5": int(apart[1]),
        "near_ties": int(counts.near1.sum() + counts.near5.sum()),
    }


def walk(evaluator: SharedEvaluator, loader: EvalLoader, number: int) -> Counts:
    """Decode all images, and score ``number`` architectures on them at once."""
    images, labels = (paddle.concat(parts) for parts in zip(*loader, strict=True))
    counts = Counts.zeros(number)
    evaluator.evaluate(images, labels, counts)
    return counts


@paddle.no_grad()
def make_images(options, network: ElasticResNet, folder: Path, rng) -> ImageList:
    """PNG files of smooth noise, and the network's predictions as their labels."""
    paths = [folder / f"{index:05d}.png" for index in range(options.n_images)]
    for path in paths:
        smooth_noise(rng, options.image_size).save(path)
    classes = tuple(str(label) for label in range(options.num_classes))
    images = ImageList(folder, classes, tuple(paths), np.zeros(len(paths), dtype=np.int64))
    dataset = ImageDataset(images, EvalTransform(options.image_size), options.seed)
    settle(network, options.image_size)
    batches = [normalize(batch) for batch, _ in EvalLoader(dataset, 64)]
    labels = np.concatenate([network(batch).argmax(axis=1).numpy() for batch in batches])
    return ImageList(folder, classes, tuple(paths), labels)


if __name__ == "__main__":
    run_main(main)
