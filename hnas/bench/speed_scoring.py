"""How fast stage three is: both engines on the same codes and images, in one run, interleaved.

    python -m hnas.bench.speed_scoring --modelarch_file F --n_arch 300 --image_size 64 --n_images 64

The last line is JSON. Times are seconds: the reference engine's for all codes, measured in parts
between the walks of the shared engine, and the shared engine's mean over its walks, decoding
included; its first walk, which prepares filters and kernels, apart. The network has random weights,
and an image's label is what the largest network says, so that hits are neither all nor none.

With --bn_calibration_images walks with re-calibrated BatchNorm take turns with the others, with
--amp O1 walks in bfloat16.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import paddle
from paddle.base.core import set_num_threads
from paddle.static import InputSpec
from PIL import Image

from hnas.architecture_file import read_architectures
from hnas.base.command_line import (
    LARGEST_SIDE,
    MOST_ARCHITECTURES,
    OneLineParser,
    path_text,
    read_bool,
    whole_number,
)
from hnas.base.device import cpu_threads, processor
from hnas.base.errors import UserError, run_main
from hnas.base.memory import peak_gib, reset_peak
from hnas.base.onednn import refuse_without_bfloat16
from hnas.dataset.image_folder import ImageList
from hnas.dataset.loader import EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform, normalize
from hnas.evaluation.counts import Counts
from hnas.evaluation.images import DecodedImages
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.shards import MOST_SHARDS, Shard
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.stopwatch import onednn_predictor
from hnas.evaluation.tree import PrefixTree, naive_macs
from hnas.evaluation.variants import Precision, cpu_variant
from hnas.models.elastic import ElasticResNet
from hnas.models.pinasv2 import build_network
from hnas.ranking.correlations import kendall_tau_b, none_if_nan
from hnas.search_space import search_space

logger = logging.getLogger(__name__)


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.speed_scoring",
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--modelarch_file",
        type=path_text,
        required=True,
        default=SUPPRESS,
        help="architectures to draw from",
    )
    parser.add_argument(
        "--n_arch",
        type=whole_number(0, MOST_ARCHITECTURES),
        default=0,
        help="drawn of them; 0: all",
    )
    parser.add_argument("--image_size", type=whole_number(32, LARGEST_SIDE), default=224, help="px")
    parser.add_argument("--n_images", type=whole_number(1, 1_000_000), default=64, help="images")
    parser.add_argument("--backbone", default="resnet48", help="supernet")
    parser.add_argument("--rounds", type=whole_number(1), default=2, help="runs of each engine")
    parser.add_argument(
        "--num_classes", type=whole_number(2, 1_000_000), default=1000, help="of the network"
    )
    parser.add_argument(
        "--bn_calibration_images", type=whole_number(0, 100_000), default=0, help="0: none"
    )
    parser.add_argument("--amp", choices=("O0", "O1"), default="O0", help="O1: bfloat16, too")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of all draws")
    parser.add_argument("--count_only", type=read_bool, default=False, help="MACs, no run")
    parser.add_argument(
        "--shards", type=whole_number(1, MOST_SHARDS), default=1, help="count those of shards, too"
    )
    options = parser.parse_args(argv)

    space = search_space(options.backbone)
    archs = list(read_architectures(options.modelarch_file).values())
    rng = np.random.default_rng(options.seed)
    if options.n_arch > len(archs):
        raise UserError(f"--n_arch {options.n_arch}, but the file has {len(archs)} architectures")
    if options.amp != "O0":
        refuse_without_bfloat16(f"--amp {options.amp}")
    if options.n_arch:
        archs = [archs[index] for index in rng.permutation(len(archs))[: options.n_arch]]
    result = {
        "backbone": options.backbone,
        "image_size": options.image_size,
        "n_arch": len(archs),
        "macs_naive": naive_macs(space, archs, options.image_size),
        "macs_shared": PrefixTree(space, archs).macs(options.image_size),
    }
    if options.shards > 1:
        result["macs_shards"] = shard_macs(space, archs, options.image_size, options.shards)
        dealt = (archs[number :: options.shards] for number in range(options.shards))
        result["macs_dealt"] = [PrefixTree(space, own).macs(options.image_size) for own in dealt]
    if not options.count_only:
        paddle.seed(options.seed)
        with tempfile.TemporaryDirectory(prefix="pinas-bench-") as folder:
            result |= measure(options, space, archs, Path(folder), rng)
    sys.stdout.write(json.dumps(result) + "\n")


def shard_macs(space, archs, image_size: int, shards: int) -> list[int]:
    """Multiply-accumulates an image that a walk over each shard executes."""
    named = {str(index): arch for index, arch in enumerate(archs)}
    found = []
    for number in range(1, shards + 1):
        positions = Shard(number, shards).positions(space, named, image_size)
        tree = PrefixTree(space, [archs[position] for position in positions])
        found.append(tree.macs(image_size))
    return found


def measure(options, space, archs, folder: Path, rng) -> dict:
    """Run both engines ``rounds`` times, and the machine's limit between them."""
    network = build_network(options.backbone, options.num_classes, space)
    images = make_images(options, network, folder, rng)
    limit = Limit(network, options.image_size, options.n_images, folder)
    parts = np.array_split(np.arange(len(archs)), options.rounds)
    reference, shared = Reference(options, network, images), Shared(options, network, images)
    others = other_walks(options, network, images, rng)
    for number, part in enumerate(parts, 1):
        reference.run([archs[index] for index in part])
        limit.run()
        for walk in (shared, *others.values()):
            walk.run(archs, folder)
        limit.run()
        logger.info(
            "round %d/%d: reference %.1f s for %d of %d, shared %.1f s",
            number,
            options.rounds,
            reference.seconds[-1],
            len(part),
            len(archs),
            shared.seconds[-1],
        )
    return compared(options, reference, shared, limit) | compared_walks(options, shared, others)


def compared(options, reference: Reference, shared: Shared, limit: Limit) -> dict:
    """What the engines took and found."""
    found = np.stack(shared.counts.columns())
    expected = np.concatenate([np.stack(columns) for columns in reference.columns], axis=1)
    differences = np.abs(found - expected).max(axis=1)
    reference_s, shared_s = sum(reference.seconds), float(np.mean(shared.seconds))
    limit_s = shared.macs / limit.macs_per_second()
    products = len(found[0]) * options.n_images
    return {
        "processor": processor(),
        "n_images": options.n_images,
        "threads": cpu_threads(),
        "reference_s": round(reference_s, 3),
        "shared_s": round(shared_s, 3),
        "ratio": round(reference_s / shared_s, 3),
        "first_s": round(shared.first_seconds, 3),
        "macs_executed": round(shared.macs / options.n_images),
        "reference_images_x_archs_per_s": round(products / reference_s, 1),
        "shared_images_x_archs_per_s": round(products / shared_s, 1),
        "reference_peak_gib": round(reference.peak, 2),
        "shared_peak_gib": round(shared.peak, 2),
        "largest_difference_top1": int(differences[0]),
        "largest_difference_top5": int(differences[1]),
        "near_ties": int(shared.counts.near1.sum() + shared.counts.near5.sum()),
        "mean_top1": round(float(shared.counts.accuracy().mean()), 4),
        "onednn_limit_s": round(limit_s, 3),
        "onednn_limit_gmacs_per_s": round(limit.macs_per_second() / 1e9, 1),
        "walk_over_limit": round(shared.walk_s / limit_s, 3),
        "python_share": round(shared.python_share, 4),
    }


def other_walks(options, network, images, rng) -> dict[str, Shared]:
    """Walks that take turns with the usual one."""
    size, number = options.image_size, options.bn_calibration_images
    found = {}
    if number:
        pixels = rng.integers(0, 256, (number, 3, size, size), dtype=np.uint8)
        found["calibrated"] = Shared(options, network, images, paddle.to_tensor(pixels))
    if options.amp != "O0":
        half = cpu_variant(Precision.BFLOAT16)
        found["bfloat16"] = Shared(options, network, images, variant=half)
    return found


def compared_walks(options, shared: Shared, others: Mapping[str, Shared]) -> dict:
    """What other walks took and found."""
    result = {}
    for name, walk in others.items():
        result[f"{name}_walk_s"] = round(walk.walk_s, 3)
        result["walk_s"] = round(shared.walk_s, 3)
    if "calibrated" in others:
        images = options.n_images + options.bn_calibration_images
        plain = shared.walk_s * images / options.n_images
        result["bn_calibration_images"] = options.bn_calibration_images
        result["calibrated_over_plain"] = round(others["calibrated"].walk_s / plain, 3)
    if "bfloat16" in others:
        half = others["bfloat16"]
        result["bfloat16_speedup"] = round(shared.walk_s / half.walk_s, 3)
        tau = kendall_tau_b(half.counts.top1, shared.counts.top1)
        result["bfloat16_tau"] = none_if_nan(round(tau, 4))
        apart = np.abs(half.watched - shared.watched).max() / shared.watched.std()
        result["bfloat16_logits_apart"] = round(float(apart), 4)
    return result


@paddle.no_grad()
def make_images(options, network: ElasticResNet, folder: Path, rng) -> ImageList:
    """PNG files of smooth noise; BatchNorm is given their statistics, labels the predictions."""
    paths = []
    for index in range(options.n_images):
        paths.append(folder / f"{index:05d}.png")
        smooth_noise(rng, options.image_size).save(paths[-1])
    classes = tuple(str(label) for label in range(options.num_classes))
    images = ImageList(folder, classes, tuple(paths), np.zeros(len(paths), dtype=np.int64))
    dataset = ImageDataset(images, EvalTransform(options.image_size), options.seed)
    batches = [normalize(batch) for batch, _ in EvalLoader(dataset, 64)]
    network.train()
    for _ in range(20):
        network(batches[0])
    network.eval()
    labels = np.concatenate([network(batch).argmax(axis=1).numpy() for batch in batches])
    return ImageList(folder, classes, tuple(paths), labels)


def smooth_noise(rng: np.random.Generator, size: int) -> Image.Image:
    """An image of ``size`` px without sharp edges."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


class Reference:
    """Runs of the reference engine: the images through a data loader for every architecture."""

    def __init__(self, options, network, images):
        dataset = ImageDataset(images, EvalTransform(options.image_size), options.seed)
        self._network, self._loader = network, EvalLoader(dataset, 64)
        self.seconds: list[float] = []
        self.columns: list[tuple[np.ndarray, ...]] = []
        self.peak = 0.0

    def run(self, archs) -> None:
        reset_peak()
        began = time.perf_counter()
        counts = evaluate_reference(self._network, archs, self._loader)
        self.seconds.append(time.perf_counter() - began)
        self.columns.append(counts.columns())
        self.peak = max(self.peak, peak_gib())


class Shared:
    """Walks of the shared engine, decoding included.

    Attributes:
        seconds: of warm walks, decoding included; ``walk_seconds`` without it.
        first_seconds: of the first, preparing included.
        watched: logits [N, classes] of the first architecture.
    """

    def __init__(self, options, network, images, calibration=None, variant=None):
        self._options, self._network, self._images = options, network, images
        self._calibration, self._variant = calibration, variant
        self._evaluator: SharedEvaluator | None = None
        self.seconds: list[float] = []
        self.walk_seconds: list[float] = []
        self.first_seconds = self.peak = 0.0

    @property
    def walk_s(self) -> float:
        """Mean of the warm walks."""
        return float(np.mean(self.walk_seconds))

    def run(self, archs, folder: Path) -> None:
        """A warm walk, and before it the first."""
        reset_peak()
        if self._evaluator is None:
            self._walk(archs, folder)
            self.first_seconds = self.seconds.pop()
            self.walk_seconds.clear()
        self._walk(archs, folder)
        self.peak = max(self.peak, peak_gib())

    def _walk(self, archs, folder: Path) -> None:
        size, number = self._options.image_size, self._options.n_images
        began = time.perf_counter()
        decoded = DecodedImages(self._images, np.arange(number), size, 8.0, folder)
        if self._evaluator is None:
            self._evaluator = SharedEvaluator(
                self._network, archs, self._calibration, self._variant
            )
        evaluator, self.counts = self._evaluator, Counts.zeros(len(archs))
        evaluator.macs = 0
        walk = time.perf_counter()
        logits = evaluator.evaluate(*decoded.batch(0, number), self.counts, watch=0)
        ended = time.perf_counter()
        self.watched = logits.numpy()
        self.seconds.append(ended - began)
        self.walk_seconds.append(ended - walk)
        self.macs, self.python_share = evaluator.macs, evaluator.python_share


class Limit:
    """The largest network as a whole in Paddle Inference with oneDNN: what the machine can do."""

    def __init__(self, network: ElasticResNet, image_size: int, n_images: int, folder: Path):
        space = network.space
        plain = network.extract(space.largest())
        plain.eval()
        spec = [InputSpec([None, 3, None, None], "float32", "image")]
        path = str(folder / "largest")
        paddle.jit.save(paddle.jit.to_static(plain, input_spec=spec), path)
        self._threads = cpu_threads()
        self._predictor = onednn_predictor(f"{path}.json", f"{path}.pdiparams", self._threads)
        self._images = paddle.randn([n_images, 3, image_size, image_size])
        self._macs = space.macs(space.largest(), image_size, num_classes=0) * n_images
        self._seconds: list[float] = []
        self.run(1)
        self._seconds.clear()

    def run(self, times: int = 5) -> None:
        for _ in range(times):
            began = time.perf_counter()
            self._predictor.run([self._images])
            self._seconds.append(time.perf_counter() - began)
        # A predictor leaves the process with one thread for matrix products.
        set_num_threads(self._threads)

    def macs_per_second(self) -> float:
        return self._macs / float(np.mean(self._seconds))


if __name__ == "__main__":
    run_main(main)
