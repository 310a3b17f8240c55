"""How fast stages one and two train: our steps and the straightforward loop, in turns.

    python -m hnas.bench.speed_training --backbone resnet48_mini --image_size 32 --batch_size 64

The straightforward loop is as public code writes it: PaddleSlim's own layers and Paddle's own
operators; the teacher runs again for every sub-network; the momentum encoder is updated parameter
by parameter; every loss is fetched in its step; images are decoded from their files in every epoch.
Both take turns of a few steps, so that a busy machine slows both. The last lines are JSON, one a
stage. Images are synthetic.

A sample-forward is one image through one sub-network in training, its backward pass included: a
step has ``batch_size`` times 4 sub-networks in stage two, and in stage one twice ``batch_size``,
one for each of its two passes, also where frozen statistics let both be computed at once. In stage
two the first place's law samples, without its extra network.
"""

from __future__ import annotations

from hnas.base.errors import hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import json
import logging
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812
from paddleslim.nas.ofa.layers import SuperBatchNorm2D
from PIL import Image

from hnas.base.command_line import LARGEST_SIDE, OneLineParser, read_bool, whole_number
from hnas.base.device import cpu_threads, processor
from hnas.dataset.image_folder import scan_images
from hnas.dataset.image_store import ImageStore
from hnas.dataset.loader import EpochLoader, ImageDataset
from hnas.dataset.transforms import Shrink, StrongTransform, TrainTransform, TwoViews, normalize
from hnas.models.convolution import use_onednn
from hnas.models.elastic import ElasticBatchNorm2D, freeze_statistics, measure
from hnas.models.pinasv2 import build_network
from hnas.search_space import search_space
from hnas.utils.hapi_wrapper import DistillationModel, distillation_loss, momentum_optimizer
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FirstPlaceSampler, LargestSampler

logger = logging.getLogger(__name__)

LOOPS = ("ours", "straightforward")
CALM_SCALE = 0.1
CLASSES, SUBNETWORKS = 1000, 4
WARM_UP = 2
"""Steps before the clock runs: loader processes start, kernels are chosen."""


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.speed_training",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--backbone", default="resnet48_mini", help="of stage 2")
    parser.add_argument("--image_size", type=whole_number(32, LARGEST_SIDE), default=32, help="px")
    parser.add_argument("--batch_size", type=whole_number(2, 1_000_000), default=64, help="images")
    parser.add_argument("--rounds", type=whole_number(1), default=5, help="turns of each loop")
    parser.add_argument("--steps", type=whole_number(1), default=6, help="steps a turn")
    parser.add_argument("--num_workers", type=whole_number(0, 1024), default=2, help="loaders")
    parser.add_argument("--freeze_bn", type=read_bool, default=True, help="frozen BatchNorm")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pinas-bench-") as folder:
        make_images(options, Path(folder))
        results = [compare(options, stage, folder) for stage in (1, 2)]
    for result in results:
        sys.stdout.write(json.dumps(result) + "\n")


def make_images(options, folder: Path) -> None:
    """JPEG files of smooth noise, twice the training size, enough for all turns in one epoch.

    Every epoch forks loader processes, and copying the pages that they share would slow the first
    steps, which in long epochs are few.
    """
    rng = np.random.default_rng(0)
    for index in range(options.batch_size * (options.rounds * options.steps + WARM_UP)):
        target = folder / "train" / str(index % 10)
        target.mkdir(parents=True, exist_ok=True)
        smooth_noise(rng, 2 * options.image_size).save(target / f"{index:05d}.jpg", quality=90)


def smooth_noise(rng: np.random.Generator, size: int) -> Image.Image:
    """An image of ``size`` px without sharp edges."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def compare(options: Namespace, stage: int, folder: str) -> dict:
    """One stage: turns of both loops, their speeds and ratios."""
    loops = {kind: Loop(kind, options, stage, folder) for kind in LOOPS}
    seconds = {kind: [] for kind in LOOPS}
    for loop in loops.values():
        loop.run(WARM_UP)
    for number in range(options.rounds):
        for kind, loop in loops.items():
            seconds[kind].append(loop.run(options.steps))
        told = ", ".join(f"{kind} {seconds[kind][-1]:.2f} s" for kind in LOOPS)
        logger.info("stage %d round %d/%d: %s", stage, number + 1, options.rounds, told)
    forwards = options.batch_size * (2 if stage == 1 else SUBNETWORKS)
    forwards *= options.steps * options.rounds
    ours, straightforward = (np.array(seconds[kind]) for kind in LOOPS)
    shown = ("backbone", "image_size", "batch_size", "num_workers", "freeze_bn")
    return {
        "stage": stage,
        **{name: getattr(options, name) for name in shown},
        "processor": processor(),
        "threads": cpu_threads(),
        "ours_sample_forwards_per_s": round(forwards / ours.sum(), 1),
        "straightforward_sample_forwards_per_s": round(forwards / straightforward.sum(), 1),
        "ratio": round(straightforward.sum() / ours.sum(), 2),
        "ratio_of_rounds": [round(of(straightforward / ours), 2) for of in (np.min, np.max)],
    }


def with_paddleslim_norms(layer: nn.Layer) -> nn.Layer:
    """Replace this project's BatchNorm by PaddleSlim's.

    Frozen ones become as PaddleSlim's are after a first forward pass in eval mode: latched to
    their running statistics for ever, which is how public code comes to train so.
    """
    for name, child in list(layer.named_children()):
        if isinstance(child, ElasticBatchNorm2D):
            norm = SuperBatchNorm2D(
                child.weight.shape[0], momentum=child._momentum, epsilon=child._epsilon
            )
            norm.set_state_dict(child.state_dict())
            norm.frozen = child.frozen  # for the network, which asks its norms
            norm._use_global_stats = True if child.frozen else None
            for own, other in zip(norm.parameters(), child.parameters(), strict=True):
                own.stop_gradient = other.stop_gradient
            setattr(layer, name, norm)
        else:
            with_paddleslim_norms(child)
    return layer


class StraightforwardDistillation(DistillationModel):
    """Stage two as public code writes it; gradients are cleared, as ours are, not set to zero."""

    def train_batch(self, inputs) -> dict:
        images, labels = inputs
        images = normalize(images)
        self.network.train()
        losses = []
        for arch in self.sampler.sample(self.epoch, self.step):
            self.network.activate(arch)
            with paddle.no_grad():
                targets = F.softmax(self.teacher(images))
            logits = self.network(images)
            loss = distillation_loss(logits, labels, targets)
            loss.backward()
            losses.append(loss.item())
        accuracy = (logits.argmax(axis=1) == labels).astype("float32").mean().item()
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        return {"loss": sum(losses) / len(losses), "top1": accuracy}


class StraightforwardContrast(ContrastiveModel):
    """Stage one, likewise."""

    def train_batch(self, inputs) -> dict:
        network = self.network
        query_view, key_view = (normalize(view) for view in inputs[:2])
        paths = self.sampler.sample(self.epoch, self.step)
        network.train()
        losses, hits, keys = [], [], []
        for query_path, key_path in zip(paths, reversed(paths), strict=True):
            with paddle.no_grad():
                momentum = network.key_momentum
                pairs = zip(network.key_parameters(), network.query_parameters(), strict=True)
                for key, query in pairs:
                    key.set_value(key * momentum + query * (1 - momentum))
            own = network.embed_keys(key_view, key_path)
            queries = network.embed_queries(query_view, query_path)
            loss, found = network.contrast(queries, own)
            loss.backward()
            losses.append(loss.item())
            hits.append(found.item())
            keys.append(own)
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        network.enqueue((keys[0] + keys[1]) / 2)
        return {"loss": sum(losses) / 2, "top1": sum(hits) / 2}


@paddle.no_grad()
def calm(network) -> None:
    """Scale the last BatchNorm of every block down, as trained networks have it.

    With scales of 1 untrained blocks magnify differences of rounding some ten times a step.
    """
    for block in network.active_blocks():
        block.bn2.weight.scale_(CALM_SCALE)


@paddle.no_grad()
def settle(network, image_size: int) -> None:
    """Give a network the running statistics of noise, as a pretrained one has its images'."""
    paddle.seed(0)
    norms = [layer for layer in network.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    network.eval()
    measure(network, norms, paddle.randn([16, 3, image_size, image_size]))


class Loop:
    """One of ``LOOPS``: a stage's model and its loader."""

    def __init__(self, kind: str, options: Namespace, stage: int, folder: str):
        size, straightforward = options.image_size, kind == "straightforward"
        images = scan_images(folder, "train")
        crop = TrainTransform(size)
        transform = crop if stage == 2 else TwoViews(StrongTransform(size), crop)
        stored = round(size * 8 / 7)
        cache = Path(folder) / "cache"
        pixels = None if straightforward else ImageStore(images, Shrink(stored), cache)
        dataset = ImageDataset(images, transform, seed=0, pixels=pixels)
        loader = EpochLoader(dataset, options.batch_size, options.num_workers)
        self._batches = loader.epoch(0)
        self.model = new_model(stage, options, straightforward)

    def run(self, steps: int) -> float:
        """Seconds of ``steps`` steps, the data included."""
        began = time.perf_counter()
        for _ in range(steps):
            logs = self.model.train_batch(next(self._batches))
            self.model.step += 1
        float(logs["loss"])  # a GPU may still be computing
        return time.perf_counter() - began


def new_model(stage: int, options: Namespace, straightforward: bool):
    """A stage's model with its optimizer, ours or the straightforward one."""
    paddle.seed(0)
    model = (contrast if stage == 1 else distillation)(options, straightforward)
    if options.freeze_bn:
        freeze_statistics(model.network)
    if straightforward:
        with_paddleslim_norms(model.network)
    else:
        use_onednn(model.network, *([model.teacher] if stage == 2 else []))
    model.prepare(momentum_optimizer(model.network, 1e-4, 0.9, 1e-4))
    return model


def contrast(options: Namespace, straightforward: bool) -> ContrastiveModel:
    name = options.backbone.replace("resnet48", "resnet48pinasv2")
    space = search_space(name)
    network = build_network(name, CLASSES, space, queue_size=16 * options.batch_size)
    calm(network.backbone)
    settle(network.backbone, options.image_size)
    network.reset_key_encoder()
    kind = StraightforwardContrast if straightforward else ContrastiveModel
    return kind(network, LargestSampler(space, 2))


def distillation(options: Namespace, straightforward: bool) -> DistillationModel:
    space = search_space(options.backbone)
    network = build_network(options.backbone, CLASSES, space)
    teacher = build_network(options.backbone, CLASSES, space, elastic=False)
    for part in (network, teacher):
        calm(part)
        settle(part, options.image_size)
    # Without the law's extra network, so that all steps train as many.
    sampler = FirstPlaceSampler(space, 0, SUBNETWORKS, extra_every=0)
    kind = StraightforwardDistillation if straightforward else DistillationModel
    return kind(network, teacher, sampler)


if __name__ == "__main__":
    run_main(main)
