"""Sub-networks of a supernet in PyTorch, computed in the ways of stage three's walk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from hnas.search_space import MAX_DEPTHS, Architecture, SearchSpace
from hnas.tools.check_device.subjects import CLASSES, drawn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 1e-5
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TF32 = "TF32"
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
State = dict[str, torch.Tensor]
HEAD = f"blocks.{1 + sum(MAX_DEPTHS)}.fc"


@dataclass(frozen=True)
class Way:
    """How a sub-network is computed.

    Attributes:
        precision: ``float64``, ``float32``, ``TF32``, ``float16`` or ``bfloat16``.
        emulated: in float32, of numbers that are rounded before and after each operator, as this
            project's tests emulate GPUs on CPUs.
        fused: convolution, bias, shortcut and ReLU are one operator of cuDNN.
    """

    precision: str
    emulated: bool = False
    fused: bool = False

    @property
    def dtype(self) -> torch.dtype:
        if self.emulated or self.precision == TF32:
            return torch.float32
        return getattr(torch, self.precision)

    @property
    def layout(self) -> torch.memory_format:
        half = self.dtype in HALVES.values()
        return torch.channels_last if half else torch.contiguous_format

    def __str__(self) -> str:
        return self.precision + " emulated" * self.emulated + " fused" * self.fused

    def allow(self) -> None:
        """Set whether float32 convolutions are TF32's."""
        torch.backends.cudnn.allow_tf32 = self.precision == TF32 and not self.emulated

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """What a convolution reads."""
        return rounded_to_tf32(x) if self.emulated and self.precision == TF32 else x

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """What an operator writes."""
        if self.emulated and self.precision in HALVES:
            return x.to(HALVES[self.precision]).float()
        return x


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Float32 numbers with 10 bits of mantissa, to nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)


def named_blocks(space: SearchSpace, arch: Architecture) -> Iterator[tuple[str, tuple]]:
    """The supernet's name of each block of a sub-network, and what ``ChannelPlan.blocks`` gives."""
    within = dict.fromkeys(range(len(MAX_DEPTHS)), 0)
    for block in space.shared_plan(arch).blocks():
        stage = block[0]
        yield f"blocks.{1 + sum(MAX_DEPTHS[:stage]) + within[stage]}", block
        within[stage] += 1


class SubNetwork:
    """A sub-network's forward as stage three computes it, on slices of a supernet's weights.

    Args:
        state: the supernet's weights and statistics, NumPy arrays by the plain network's names.
        space, arch: which sub-network of which space.
        calibration: images at the front of a batch that re-calibrate BatchNorm; with 0 it is
            folded into the convolutions.
        way: how to compute.
    """

    def __init__(self, state, space: SearchSpace, arch: Architecture, calibration: int, way: Way):
        self.way, self.calibration = way, calibration
        self._state = state
        self._slices: dict[str, tuple[torch.Tensor, ...]] = {}
        plan = space.shared_plan(arch)
        self._prepare("blocks.0.conv", "blocks.0.bn", 3, plan.stem)
        self._blocks = []
        for name, (stage, cin, mid, cout, stride) in named_blocks(space, arch):
            self._prepare(f"{name}.conv1", f"{name}.bn1", cin, mid)
            self._prepare(f"{name}.conv2", f"{name}.bn2", mid, cout)
            if cin != cout:
                self._prepare(f"{name}.downsample.0", f"{name}.downsample.1", cin, cout)
            self._blocks.append((stage, name, stride, cin != cout))
        wide = torch.float64 if way.precision == "float64" else torch.float32
        self._head = [on_device(state[f"{HEAD}.{part}"]).to(wide) for part in ("weight", "bias")]
        self._head[0] = self._head[0][: plan.out_channels]

    def _prepare(self, conv: str, norm: str, cin: int, cout: int) -> None:
        """Filters and, folded, the bias, or else scale and shift of one convolution."""
        filters = on_device(self._state[f"{conv}.weight"])[:cout, :cin]
        scale, shift, mean, variance = (
            on_device(self._state[f"{norm}.{part}"])[:cout].double()
            for part in ("weight", "bias", "_mean", "_variance")
        )
        wide = torch.float64 if self.way.precision == "float64" else torch.float32
        rest = [scale.to(wide), shift.to(wide)]
        if not self.calibration:
            factor = scale / (variance + EPSILON).sqrt()
            filters = filters.to(wide) * factor.to(wide).reshape(-1, 1, 1, 1)
            rest = [self.way.result((shift - mean * factor).to(wide)).to(self.way.dtype)]
        filters = self.way.result(filters.float() if wide == torch.float32 else filters.double())
        filters = self.way.inputs(filters).to(self.way.dtype)
        self._slices[conv] = (filters.contiguous(memory_format=self.way.layout), *rest)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes] of normalised images [N, 3, H, W]; first come the calibration's."""
        self.way.allow()
        result = self.way.result
        x = result(pixels.to(self.way.dtype)).contiguous(memory_format=self.way.layout)
        x = self._convolve(x, "blocks.0.conv", 2, 3, relu=True)
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(4):
            x = self.stage(x, stage)
        weight, bias = self._head
        torch.backends.cuda.matmul.allow_tf32 = False
        return x[self.calibration :].to(weight.dtype).mean((2, 3)) @ weight + bias

    @torch.no_grad()
    def stage(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        """The blocks of a stage (0..3), of a map in the way's type and layout."""
        for own, name, stride, projects in self._blocks:
            if own == stage:
                shortcut = self._convolve(x, f"{name}.downsample.0", stride, 0) if projects else x
                y = self._convolve(x, f"{name}.conv1", stride, 1, relu=True)
                x = self._convolve(y, f"{name}.conv2", 1, 1, shortcut, relu=True)
        return x

    def _convolve(self, x, conv: str, stride: int, padding: int, shortcut=None, relu=False):
        """Convolution, BatchNorm, shortcut, ReLU."""
        way = self.way
        filters, *rest = self._slices[conv]
        if way.fused and relu:
            return _fused(x, filters, rest[0], shortcut, stride, padding)
        y = way.result(F.conv2d(way.inputs(x), filters, None, stride, padding))
        if self.calibration:
            seen = y[: self.calibration]
            seen = seen if seen.dtype == torch.float64 else seen.float()
            mean = seen.mean((0, 2, 3), keepdim=True)
            variance = (seen - mean).square().mean((0, 2, 3))
            y = way.result(F.batch_norm(y, mean.flatten(), variance, *rest, eps=EPSILON))
        else:
            y = way.result(y + rest[0].reshape(1, -1, 1, 1))
        y = y if shortcut is None else way.result(y + shortcut)
        return F.relu(y) if relu else y


def _fused(x, filters, bias, shortcut, stride, padding):
    geometry = [stride] * 2, [padding] * 2, [1, 1], 1
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, filters, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, filters, shortcut, 1.0, bias, *geometry)


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def supernet_state(space: SearchSpace) -> dict[str, np.ndarray]:
    """What ``seed_weights`` draws for a supernet, float32 by the plain network's names."""
    rng = np.random.default_rng(0)
    state: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = drawn(name, list(shape), rng).astype(np.float32)

    def conv_bn(conv: str, norm: str, cin: int, cout: int, kernel: int) -> None:
        add(f"{conv}.weight", cout, cin, kernel, kernel)
        for part in ("weight", "bias", "_mean", "_variance"):
            add(f"{norm}.{part}", cout)

    plan = space.plan(space.largest())
    conv_bn("blocks.0.conv", "blocks.0.bn", 3, plan.stem, 7)
    index = 0
    for index, (_, cin, mid, cout, _) in enumerate(plan.blocks(), 1):
        conv_bn(f"blocks.{index}.conv1", f"blocks.{index}.bn1", cin, mid, 3)
        conv_bn(f"blocks.{index}.conv2", f"blocks.{index}.bn2", mid, cout, 3)
        if cin != cout:
            conv_bn(f"blocks.{index}.downsample.0", f"blocks.{index}.downsample.1", cin, cout, 1)
    add(f"blocks.{index + 1}.fc.weight", plan.out_channels, CLASSES)
    add(f"blocks.{index + 1}.fc.bias", CLASSES)
    return state


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> float32, as ``hnas.dataset.transforms.normalize``."""
    mean, deviation = (np.float32(part).reshape(1, 3, 1, 1) for part in (MEAN, DEVIATION))
    return on_device((pixels.astype(np.float32) / 255 - mean) / deviation)


def features(
    space: SearchSpace, state: State, prefix: str, arch: Architecture, x: torch.Tensor
) -> torch.Tensor:
    """The last stage's map of a sub-network, at the running statistics, not folded: to train."""

    def conv_bn(x, conv: str, norm: str, cout: int, stride: int, padding: int) -> torch.Tensor:
        filters = state[f"{prefix}{conv}.weight"][:cout, : x.shape[1]]
        names = ("_mean", "_variance", "weight", "bias")
        parts = [state[f"{prefix}{norm}.{part}"][:cout] for part in names]
        return F.batch_norm(F.conv2d(x, filters, None, stride, padding), *parts, eps=EPSILON)

    stem = space.shared_plan(arch).stem
    x = F.relu(conv_bn(x, "blocks.0.conv", "blocks.0.bn", stem, 2, 3))
    x = F.max_pool2d(x, 3, 2, 1)
    for name, (_, cin, mid, cout, stride) in named_blocks(space, arch):
        shortcut = x
        if cin != cout:
            norm = f"{name}.downsample.1"
            shortcut = conv_bn(x, f"{name}.downsample.0", norm, cout, stride, 0)
        y = F.relu(conv_bn(x, f"{name}.conv1", f"{name}.bn1", mid, stride, 1))
        x = F.relu(conv_bn(y, f"{name}.conv2", f"{name}.bn2", cout, 1, 1) + shortcut)
    return x


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """By the first rows of a weight [inputs, outputs]."""
    return x @ state[f"{name}.weight"][: x.shape[1]] + state[f"{name}.bias"]


def pooled(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def classify(
    space: SearchSpace, state: State, prefix: str, arch: Architecture, x: torch.Tensor
) -> torch.Tensor:
    """Logits [N, classes]."""
    return linear(state, f"{prefix}{HEAD}", pooled(features(space, state, prefix, arch, x)))
