"""How fast a card is: memory, convolutions, walks and training steps at 224 px."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from hnas.bench.cudnn.network import (
    DEVICE,
    HALVES,
    TF32,
    SubNetwork,
    Way,
    classify,
    normalised,
    on_device,
    supernet_state,
)
from hnas.search_space import Architecture, SearchSpace, feature_sizes, find_backbone
from hnas.tools.check_device.subjects import CLASSES, images, labels

SIZE = 224
BATCHES, SEARCHED_BATCHES = (64, 256, 1024), (64, 256)
"""Images of a walk; fewer where cuDNN searches, which takes a minute for the largest."""
BATCH = 256
ARCHITECTURES = 12
SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
"""Channels and size of the maps of ResNet48's stages at 224 px."""
PRECISIONS = ("float32", TF32, *HALVES)
SECONDS = 1.0
"""Of each measurement, at least."""


def all_rates() -> Iterator[dict]:
    """Every measurement as a row."""
    for dtype in (torch.float32, torch.float16):
        yield traffic(dtype)
    for precision in PRECISIONS:
        for channels, size in SHAPES:
            yield convolution(Way(precision), channels, size)
    space = find_backbone("resnet48").space
    state = supernet_state(space)
    for precision in PRECISIONS:
        yield training(space, state, precision)
    for batch in SEARCHED_BATCHES if torch.backends.cudnn.benchmark else BATCHES:
        for precision in PRECISIONS:
            for fused in (False, True):
                yield walk(space, state, Way(precision, fused=fused), batch)
    yield from stages(space, state)


def row(what: str, unit: str, work: float, seconds: list[float]) -> dict:
    """Of the median round, the slowest and the fastest."""
    ordered = sorted(seconds, reverse=True)
    slowest, middle, fastest = (
        work / 1e9 / ordered[place] for place in (0, len(ordered) // 2, len(ordered) - 1)
    )
    names = {unit: middle, "slowest": slowest, "fastest": fastest}
    return {"what": what} | {name: float(f"{value:.4g}") for name, value in names.items()}


def timed(function: Callable[[], object]) -> list[float]:
    """Seconds of each call, after warming up."""
    seconds: list[float] = []
    for call in range(100_000):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        if call > 1:
            seconds.append(time.perf_counter() - began)
        if len(seconds) >= 3 and sum(seconds) > SECONDS:
            break
    return seconds


def drawn_on_device(*shape: int) -> torch.Tensor:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return on_device(values / np.float32(np.sqrt(np.prod(shape[1:]))))


def traffic(dtype: torch.dtype) -> dict:
    """GB/s of a sum: two tensors of 512 MiB are read and one is written."""
    numbers = (512 << 20) // dtype.itemsize
    one, other = (torch.rand(numbers, device=DEVICE).to(dtype) for _ in range(2))
    total = torch.empty_like(one)
    seconds = timed(lambda: torch.add(one, other, out=total))
    return row(f"sum in {dtype}", "gb_per_s", 3 * (512 << 20), seconds)


@torch.no_grad()
def convolution(way: Way, channels: int, size: int) -> dict:
    """GMAC/s of the 3x3 convolution of a stage, ten times between two looks at the clock."""
    way.allow()
    x = drawn_on_device(BATCH, channels, size, size).to(way.dtype)
    filters = drawn_on_device(channels, channels, 3, 3).to(way.dtype)
    x, filters = (part.contiguous(memory_format=way.layout) for part in (x, filters))

    def ten() -> None:
        for _ in range(10):
            F.conv2d(x, filters, None, 1, 1)

    macs = 10 * BATCH * size * size * 9 * channels * channels
    return row(f"convolution {channels}x{size}x{size} in {way}", "gmacs_per_s", macs, timed(ten))


def drawn_architectures(space: SearchSpace) -> list[Architecture]:
    """Whose sub-networks are timed."""
    rng = np.random.default_rng(2)
    return [space.sample(rng) for _ in range(ARCHITECTURES)]


def walk(space: SearchSpace, state: dict[str, np.ndarray], way: Way, batch: int) -> dict:
    """GMAC/s of whole sub-networks, one after the other, as stage three computes them."""
    chosen = drawn_architectures(space)
    networks = [SubNetwork(state, space, arch, 0, way) for arch in chosen]
    x = normalised(images(batch, SIZE))
    macs = batch * sum(space.macs(arch, SIZE, CLASSES) for arch in chosen)
    seconds = timed(lambda: [network(x) for network in networks])
    return row(f"walk of {batch} images in {way}", "gmacs_per_s", macs, seconds)


def stages(space: SearchSpace, state: dict[str, np.ndarray]) -> Iterator[dict]:
    """GMAC/s of each stage of the sub-networks by itself, on maps of its size.

    Stage three's walk shares the early stages, so that the last ones are most of its work.
    """
    chosen = drawn_architectures(space)
    _, sizes = feature_sizes(SIZE)
    for precision, fused, stage in product(PRECISIONS, (False, True), range(4)):
        way = Way(precision, fused=fused)
        way.allow()
        networks = [SubNetwork(state, space, arch, 0, way) for arch in chosen]
        macs, inputs = 0, []
        for arch in chosen:
            blocks = [block for block in space.shared_plan(arch).blocks() if block[0] == stage]
            _, width, *_, stride = blocks[0]
            x = drawn_on_device(BATCH, width, sizes[stage] * stride, sizes[stage] * stride).abs()
            inputs.append(x.to(way.dtype).contiguous(memory_format=way.layout))
            for _, cin, mid, cout, _ in blocks:
                weights = 9 * mid * (cin + cout) + (cin * cout if cin != cout else 0)
                macs += BATCH * sizes[stage] ** 2 * weights
        pairs = list(zip(networks, inputs, strict=True))
        seconds = timed(partial(_run_stage, pairs, stage))
        yield row(f"stage {stage + 1} of {BATCH} images in {way}", "gmacs_per_s", macs, seconds)


def _run_stage(pairs, stage: int) -> None:
    for network, x in pairs:
        network.stage(x, stage)


def training(space: SearchSpace, state: dict[str, np.ndarray], precision: str) -> dict:
    """GMAC/s of steps of the largest network at frozen statistics; half precision is autocast.

    A backward pass counts as two forward passes, as ``hnas.tools.plan`` counts it.
    """
    Way(precision).allow()
    parameters = {
        name: on_device(value).requires_grad_(not name.endswith(("_mean", "_variance")))
        for name, value in state.items()
    }
    trained = [part for part in parameters.values() if part.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.9, weight_decay=4e-5)
    half = HALVES.get(precision)
    scaler = torch.amp.GradScaler(DEVICE, enabled=half is torch.float16)
    x, truth = normalised(images(BATCH, SIZE)), on_device(labels(BATCH))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, half, enabled=half is not None):
            loss = F.cross_entropy(classify(space, parameters, "", space.largest(), x), truth)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    macs = 3 * BATCH * space.macs(space.largest(), SIZE, CLASSES)
    return row(f"training in {precision}", "gmacs_per_s", macs, timed(step))
