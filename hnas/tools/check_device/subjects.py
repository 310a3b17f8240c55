"""Networks, images and labels that are the same on every device and need no files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from paddle import nn

CLASSES = 10
QUIET = 0.3
"""Scale of the last BatchNorm of a block, below 1 as in trained networks: with 1, differences of
rounding would grow from block to block."""


def seed_weights(network: nn.Layer, seed: int = 0) -> None:
    """Set weights and statistics from NumPy's generator, as no two devices of Paddle draw alike."""
    rng = np.random.default_rng(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.set_value(drawn(name, tensor.shape, rng).astype(np.float32))


def drawn(name: str, shape: list[int], rng: np.random.Generator) -> np.ndarray:
    """Weights or statistics of one name, float64: the names say of what."""
    values = rng.normal(size=shape)
    if name == "queue":
        return values / np.linalg.norm(values, axis=0)
    if len(shape) == 4:
        outputs, _, *kernel = shape
        return values * np.sqrt(2 / (outputs * np.prod(kernel)))
    if len(shape) == 2:
        return values * np.sqrt(1 / shape[0])
    if name.endswith("_variance"):
        return rng.uniform(0.5, 1.5, shape)
    if name.endswith("weight"):
        return rng.uniform(0.8, 1.2, shape) * (QUIET if ".bn2." in name else 1)
    return values * 0.1


def images(number: int, size: int, seed: int = 0) -> np.ndarray:
    """Coloured patches under noise, uint8 [N, 3, S, S]: patches, so that images differ in mean."""
    rng = np.random.default_rng((seed, number, size))
    patches = rng.integers(40, 216, (number, 3, 4, 4))
    whole = np.kron(patches, np.ones((1, 1, -(-size // 4), -(-size // 4))))[..., :size, :size]
    return (whole + rng.integers(-40, 41, whole.shape)).astype(np.uint8)


def labels(number: int, seed: int = 0) -> np.ndarray:
    """int64 [N]."""
    return np.random.default_rng((seed, number)).integers(0, CLASSES, number)
