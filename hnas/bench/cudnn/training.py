"""Steps of both training stages in PyTorch, against those that Paddle computed on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from hnas.bench.cudnn.network import (
    DEVICE,
    HALVES,
    TF32,
    State,
    Way,
    classify,
    features,
    linear,
    normalised,
    on_device,
    pooled,
)
from hnas.search_space import RESNET48_MINI, Architecture
from hnas.tools.check_device.subjects import images, labels

BATCH, SIZE, RATE, MOMENTUM, DECAY = 8, 32, 0.002, 0.9, 1e-4
TEMPERATURE, KEY_MOMENTUM = 0.2, 0.999
SCALE = 1024.0
"""As ``hnas.tools.check_device.training`` has them."""


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
        y = pooled(features(RESNET48_MINI, state, "backbone.", arch, x))
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
            teacher = classify(RESNET48_MINI, self._state, "teacher.", RESNET48_MINI.largest(), x)
            targets = F.softmax(teacher, 1)
        for arch in archs:
            with autocast():
                logits = classify(RESNET48_MINI, self._state, "", arch, x)
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
