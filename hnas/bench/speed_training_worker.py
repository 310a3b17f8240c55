"""One of the loops that ``hnas.bench.speed_training`` alternates between, in a process of its own.

    python -m hnas.bench.speed_training_worker LOOP SETTINGS

Reads lines of JSON, ``[command, steps]``, and answers each with one: ``run`` times steps, ``load``
times the loader alone, ``curve`` trains on the same batches whatever the loop and gives its losses,
``control`` does so from weights that differ by about their last bit.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812

from hnas.base.errors import run_main
from hnas.bench.straightforward import (
    StraightforwardContrast,
    StraightforwardDistillation,
    with_paddleslim_norms,
)
from hnas.dataset.image_folder import scan_images
from hnas.dataset.loader import EpochLoader, ImageDataset, load_batches
from hnas.dataset.pixel_cache import PixelCache
from hnas.dataset.transforms import StrongTransform, TrainTransform, TwoViews, normalize
from hnas.models.convolution import use_onednn
from hnas.models.elastic import freeze_statistics, measure
from hnas.models.pinasv2 import build_network
from hnas.search_space import search_space
from hnas.utils.gradient_step import GradientStep, momentum_optimizer
from hnas.utils.hapi_wrapper import DistillationModel
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FirstPlaceSampler, LargestSampler

STRAIGHTFORWARD, PLAIN = "straightforward", "plain"  # any other loop is ours
CALM_SCALE = 0.1
LAST_BIT = 2.0**-24  # of a float32, relative
KEY_PASSES = 2  # of a step of stage one


class TimedStep(GradientStep):
    """Adds up the seconds of backward passes and of the optimizer."""

    def __init__(self, optimizer, seconds: dict[str, float]):
        super().__init__(optimizer)
        self._seconds = seconds

    def backward(self, loss) -> None:
        with clocked(self._seconds, "backward"):
            super().backward(loss)

    def step(self) -> None:
        with clocked(self._seconds, "optimizer"):
            super().step()


@contextmanager
def clocked(seconds: dict[str, float], name: str):
    """Add the time of the block to ``seconds[name]``."""
    began = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - began


class PlainSteps:
    """The limit: plain networks of a step's architectures, forward, backward and step, no more.

    Args:
        forward_only: how often the first of them also runs without a backward pass.
    """

    def __init__(self, settings, supernet, archs, forward_only: int):
        self._networks = [supernet.extract(arch) for arch in archs]
        self._forward_only = forward_only
        for network in self._networks:
            for layer in network.sublayers():
                if isinstance(layer, nn.BatchNorm2D):
                    layer._use_global_stats = settings.freeze_bn or None
        use_onednn(*self._networks)
        parameters = [p for network in self._networks for p in network.parameters()]
        self._optimizer = momentum_optimizer(
            SimpleNamespace(parameters=lambda: parameters), settings.lr, 0.9, 1e-4
        )

    def train_batch(self, inputs) -> dict:
        images, labels = normalize(inputs[0]), inputs[-1]
        for _ in range(self._forward_only):
            with paddle.no_grad():
                self._networks[0](images)
        for network in self._networks:
            network.train()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
        self._optimizer.step()
        self._optimizer.clear_grad(set_to_zero=False)
        return {"loss": loss}


@paddle.no_grad()
def calm(network) -> None:
    """Scale the last BatchNorm of every block down, as trained networks have it.

    With scales of 1 untrained blocks magnify differences of rounding some ten times a step, until
    loss curves of the same computation have nothing in common.
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
    """A model and its loader."""

    def __init__(self, kind: str, settings: SimpleNamespace):
        self.kind, self.settings = kind, settings
        self.seconds: dict[str, float] = defaultdict(float)
        self.images = scan_images(settings.image_dir, "train")
        crop = TrainTransform(settings.image_size)
        strong = StrongTransform(settings.image_size)
        self.transform = crop if settings.stage == 2 else TwoViews(strong, crop)
        pixels = None
        if kind != STRAIGHTFORWARD:
            folder = Path(settings.image_dir) / "cache"
            pixels = PixelCache(self.images, settings.storage_size, folder)
        dataset = ImageDataset(self.images, self.transform, settings.seed, pixels=pixels)
        self.loader = EpochLoader(dataset, settings.batch_size, settings.num_workers)
        self.model = self.build()
        self._epoch, self._left = -1, 0

    def build(self):
        """The model, the same in all loops."""
        settings = self.settings
        paddle.seed(settings.seed)
        space = search_space(settings.backbone)
        straight = self.kind == STRAIGHTFORWARD
        if settings.stage == 1:
            network = build_network(
                settings.backbone, settings.num_classes, space, queue_size=settings.queue_size
            )
            kind = StraightforwardContrast if straight else ContrastiveModel
            calm(network.backbone)
            settle(network.backbone, settings.image_size)
            network.reset_key_encoder()
            model = kind(network, LargestSampler(space, 2))
            if self.kind == PLAIN:
                # Frozen statistics let both passes' queries be computed once.
                queries = 1 if settings.freeze_bn else 2
                archs = [space.largest()] * queries
                return PlainSteps(settings, network.backbone, archs, KEY_PASSES)
        else:
            network = build_network(settings.backbone, settings.num_classes, space)
            teacher = build_network(settings.backbone, settings.num_classes, space, False)
            kind = StraightforwardDistillation if straight else DistillationModel
            for part in (network, teacher):
                calm(part)
                settle(part, settings.image_size)
            # Without the law's extra network, so that all steps train as many.
            sampler = FirstPlaceSampler(space, settings.seed, settings.subnetworks, extra_every=0)
            model = kind(network, teacher, sampler)
            if self.kind == PLAIN:
                archs = sampler.sample(0, 0)
                return PlainSteps(settings, network, archs, 0)
        if settings.freeze_bn:
            freeze_statistics(network)
        if straight:
            with_paddleslim_norms(network)
        else:
            use_onednn(network, *([teacher] if settings.stage == 2 else []))
        optimizer = momentum_optimizer(network, settings.lr, 0.9, 1e-4)
        model.prepare(optimizer, gradients=TimedStep(optimizer, self.seconds))
        return model

    def batch(self):
        """The next batch; begins another epoch when one ends."""
        if not self._left:
            self._epoch += 1
            self._batches, self._left = self.loader.epoch(self._epoch), len(self.loader)
        self._left -= 1
        return next(self._batches)

    def run(self, steps: int) -> dict:
        """Seconds of ``steps`` steps, the data included, and where they went."""
        if self._left < steps:  # starting loader processes is not part of a step
            self._left = 0
            self.model.train_batch(self.batch())
        self.seconds.clear()
        began = time.perf_counter()
        for step in range(steps):
            with clocked(self.seconds, "data"):
                batch = self.batch()
            self.model.epoch, self.model.step = self._epoch, step
            logs = self.model.train_batch(batch)
        float(logs["loss"])  # a GPU may still be computing
        return {"seconds": time.perf_counter() - began, **self.seconds}

    def load(self, steps: int) -> dict:
        """Seconds of ``steps`` batches of the loader alone, from a new epoch's second on."""
        self._left = 0
        self.batch()
        began = time.perf_counter()
        for _ in range(steps):
            self.batch()
        return {"seconds": time.perf_counter() - began}

    def curve(self, steps: int) -> dict:
        """Losses of a new model over the same batches in all loops, decoded from the files."""
        return self.train_alike(self.build(), steps)

    def control(self, steps: int) -> dict:
        """The same after changing the convolutions' weights by about their last bit."""
        model = self.build()
        rng = np.random.default_rng(self.settings.seed)
        for parameter in model.network.parameters():
            if parameter.ndim == 4:
                signs = rng.choice([-1, 1], parameter.shape)
                nudged = parameter.numpy() * (1 + signs * LAST_BIT)
                parameter.set_value(nudged.astype("float32"))
        return self.train_alike(model, steps)

    def train_alike(self, model, steps: int) -> dict:
        settings = self.settings
        dataset = ImageDataset(self.images, self.transform, settings.seed)
        order = EpochLoader(dataset, settings.batch_size).batches(0)
        losses = []
        for step in range(steps):
            [batch] = load_batches(dataset, [order[step % len(order)]], 0)
            model.epoch, model.step = 0, step
            losses.append(float(model.train_batch(batch)["loss"]))
        return {"losses": losses}


def main() -> None:
    loop = Loop(sys.argv[1], SimpleNamespace(**json.loads(sys.argv[2])))
    for line in sys.stdin:
        command, steps = json.loads(line)
        answer = {"run": loop.run, "load": loop.load, "curve": loop.curve, "control": loop.control}[
            command
        ](steps)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
