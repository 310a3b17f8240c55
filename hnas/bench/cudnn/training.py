"""Steps of both training stages in PyTorch, against those that Paddle computed on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from hnas.bench.cudnn.network import DEVICE, EPSILON, HALVES, TF32, Way, normalised, on_device
from hnas.search_space import RESNET48_MINI, Architecture
from hnas.tools.check_device.subjects import images, labels

BATCH, SIZE, RATE, MOMENTUM, DECAY = 8, 32, 0.002, 0.9, 1e-4
TEMPERATURE, KEY_MOMENTUM = 0.2, 0.999
SCALE = 1024.0
"""As ``hnas.tools.check_device.training`` has them."""

State = dict[str, torch.Tensor]


def features(state: State, prefix: str, arch: Architecture, x: torch.Tensor) -> torch.Tensor:
    """The last stage's map of a sub-network, at the running statistics, not folded."""

    def conv_bn(x, conv: str, norm: str, cout: int, stride: int, padding: int) -> torch.Tensor:
        filters = state[f"{prefix}{conv}.weight"][:cout, : x.shape[1]]
        names = ("_mean", "_variance", "weight", "bias")
        parts = [state[f"{prefix}{norm}.{part}"][:cout] for part in names]
        return F.batch_norm(F.conv2d(x, filters, None, stride, padding), *parts, eps=EPSILON)

    space = RESNET48_MINI
    plan, deepest = space.shared_plan(arch), [len(s) for s in space.plan(space.largest()).stages]
    x = F.relu(conv_bn(x, "blocks.0.conv", "blocks.0.bn", plan.stem, 2, 3))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, blocks in enumerate(plan.stages):
        for index, (mid, cout) in enumerate(blocks):
            name = f"blocks.{1 + sum(deepest[:stage]) + index}"
            stride = 2 if stage and not index else 1
            shortcut = x
            if x.shape[1] != cout:
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


def classify(state: State, prefix: str, arch: Architecture, x: torch.Tensor) -> torch.Tensor:
    return linear(state, f"{prefix}blocks.24.fc", pooled(features(state, prefix, arch, x)))


class Stage1:
    """Contrast of two sub-networks, the key encoder's momentum, the queue."""

    def __init__(self, state: State):
        self._state = state
        self._keys = {
            name: value.detach().clone()
            for name, value in state.items()
            if name.startswith(("backbone.", "neck."))
        }
        self._pointer = 0

    def _embed(self, state: State, arch: Architecture, x: torch.Tensor) -> torch.Tensor:
        y = pooled(features(state, "backbone.", arch, x))
        y = linear(state, "neck.project", F.relu(linear(state, "neck.hidden", y)))
        return F.normalize(y, dim=1)

    def losses(self, archs, step: int, inputs, autocast) -> Iterator[torch.Tensor]:
        """One, of both passes, that is to be differentiated."""
        queue = self._state["queue"]
        views = [inputs(images(BATCH, SIZE, 2 * step + view)) for view in range(2)]
        pairs = [(archs[0], archs[1]), (archs[1], archs[0])]
        keys = []
        for _, key_path in pairs:
            with torch.no_grad(), autocast():
                for name, key in self._keys.items():
                    key.lerp_(self._state[name], 1 - KEY_MOMENTUM)
                keys.append(self._embed(self._keys, key_path, views[1]).to(queue.dtype))
        total = 0
        for (path, _), key in zip(pairs, keys, strict=True):
            with autocast():
                query = self._embed(self._state, path, views[0]).to(queue.dtype)
            logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1)
            target = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
            total = total + F.cross_entropy(logits / TEMPERATURE, target)
        yield total
        place = slice(self._pointer, self._pointer + BATCH)
        queue[:, place] = ((keys[0] + keys[1]) / 2).T
        self._pointer = (self._pointer + BATCH) % queue.shape[1]


class Stage2:
    """Labels, and a teacher's probabilities, for each of a step's sub-networks."""

    def __init__(self, state: State):
        self._state = state

    def losses(self, archs, step: int, inputs, autocast) -> Iterator[torch.Tensor]:
        """One of each sub-network."""
        x, truth = inputs(images(BATCH, SIZE, 2 * step)), on_device(labels(BATCH, step))
        with torch.no_grad(), autocast():
            teacher = classify(self._state, "teacher.", RESNET48_MINI.largest(), x)
            targets = F.softmax(teacher, 1)
        for arch in archs:
            with autocast():
                logits = classify(self._state, "", arch, x)
                yield F.cross_entropy(logits, truth) + F.cross_entropy(logits, targets)


STAGES: dict[str, Callable] = {"stage 1": Stage1, "stage 2": Stage2}


def run(stage: str, given: dict[str, np.ndarray], way: Way) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the steps, and the first step's gradient as ``RecordedStep`` keeps it."""
    way.allow()
    half = HALVES.get(way.precision)
    wide = torch.float64 if way.precision == "float64" else torch.float32
    own = {name.split("|")[1]: value for name, value in given.items() if f"{stage}|" in name}
    order = [str(line).split() for line in own.pop("parameters")]
    codes = [str(line).split() for line in own.pop("codes")]
    state = {name: on_device(value).clone() for name, value in own.items()}
    state = {name: v.to(wide) if v.is_floating_point() else v for name, v in state.items()}
    trained = [state[name].requires_grad_() for name, kind in order if kind == "trained"]
    optimizer = torch.optim.SGD(trained, RATE, momentum=MOMENTUM, weight_decay=DECAY)
    scaled = half is torch.float16
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE, enabled=scaled)
    model = STAGES[stage](state)

    def autocast():
        return torch.autocast(DEVICE, half, enabled=half is not None)

    def inputs(pixels: np.ndarray) -> torch.Tensor:
        return normalised(pixels).to(wide)

    curve, gradient = [], np.empty(0)
    for step in range(len(codes)):
        optimizer.zero_grad()
        archs = [Architecture.from_code(code) for code in codes[step]]
        values = []
        for loss in model.losses(archs, step, inputs, autocast):
            scaler.scale(loss).backward()
            values.append(float(loss.detach()))
        curve.append(sum(values) / len(archs))
        if not step:
            sizes = dict(sizes_of(own, order))
            parts = [
                np.zeros(size)
                if kind == "fixed" or state[name].grad is None
                else state[name].grad.double().cpu().numpy().ravel()
                for (name, kind), size in zip(order, sizes.values(), strict=True)
            ]
            gradient = np.concatenate(parts) / (SCALE if scaled else 1)
        scaler.step(optimizer)
        scaler.update()
    return np.array(curve), gradient


def sizes_of(own: dict[str, np.ndarray], order: list[list[str]]) -> Iterator[tuple[str, int]]:
    """Of every parameter by name; a key encoder's is the query encoder's."""
    for name, _ in order:
        yield name, own[name.replace("key_", "")].size


def training(given: dict[str, np.ndarray]) -> Iterator[dict]:
    """Each precision's losses and first gradient against Paddle's on a CPU, in float32.

    The columns are those of the ``training`` rows of ``hnas.tools.check_device``.
    """
    for stage in STAGES:
        curve, expected = given[f"{stage} losses"], given[f"{stage} gradient"].astype(np.float64)
        for precision in ("float64", "float32", TF32, *HALVES):
            losses, gradient = run(stage, given, Way(precision))
            lengths = [float(np.linalg.norm(part)) for part in (gradient, expected)]
            errors = np.abs(losses / curve - 1)
            yield {
                "stage": stage,
                "precision": precision,
                "first_loss": float(errors[0]),
                "direction": 1 - float(gradient @ expected) / (lengths[0] * lengths[1]),
                "length": abs(lengths[0] / lengths[1] - 1),
                "losses": float(errors.max()),
                "finite": bool(np.isfinite(losses).all()),
            }
