"""BatchNorm: which variance it keeps, and whether slices of shared statistics are updated in place.

Expected values are NumPy's.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle

from hnas.models.elastic import ElasticBatchNorm2D, calibrated, freeze_statistics
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.results import (
    FAILED,
    Result,
    at_most,
    differing,
    fact,
    relative_error,
)

WIDE, NARROW = 12, 8
MOMENTUM, EPSILON = 0.9, 1e-5
LIMIT = 1e-4
"""Relative. Variances of the 72 values below differ by 1.4e-2."""


def images(channels: int) -> np.ndarray:
    """Activations [8, C, 3, 3], whose small maps set the two variances well apart."""
    rng = np.random.default_rng(channels)
    return (rng.normal(size=(8, channels, 3, 3)) * 2 + 1).astype(np.float32)


def network() -> paddle.nn.Layer:
    """One elastic BatchNorm whose statistics differ from channel to channel."""
    norm = ElasticBatchNorm2D(WIDE, momentum=MOMENTUM)
    ramp = paddle.arange(1, WIDE + 1, dtype="float32")
    for tensor in (norm.weight, norm.bias, norm._mean, norm._variance):
        tensor.set_value(ramp / 4)
    return paddle.nn.Sequential(norm)


def statistics(norm: ElasticBatchNorm2D) -> tuple[np.ndarray, np.ndarray]:
    return norm._mean.numpy(), norm._variance.numpy()


def check(machine: Machine) -> Iterator[Result]:
    """(c) BatchNorm over slices: in training, at frozen statistics, re-calibrated."""
    yield from check_training()
    yield check_frozen()
    yield check_calibrated()


def check_training() -> Iterator[Result]:
    """A training step at the narrow width."""
    layer = network()
    (norm,) = layer
    x = images(NARROW)
    before = statistics(norm)
    layer.train()
    given = paddle.to_tensor(x, stop_gradient=False)
    y = layer(given)
    mean, biased = x.mean((0, 2, 3)), x.var((0, 2, 3))
    right = normalised(x, mean, biased)
    yield at_most("BatchNorm's output in training", relative_error(y.numpy(), right), LIMIT)
    upstream = np.flip(x, 0).copy()
    (found,) = paddle.grad(y, [given], paddle.to_tensor(upstream))
    error = relative_error(found.numpy(), gradient(x, upstream, mean, biased))
    yield at_most("BatchNorm's gradient in training", error, LIMIT)
    after = statistics(norm)
    kept = [MOMENTUM * old[:NARROW] for old in before]
    yield at_most(
        "running mean of a slice",
        relative_error(after[0][:NARROW], kept[0] + (1 - MOMENTUM) * mean),
        LIMIT,
        "as a step leaves it in the shared one",
    )
    yield kind_of_variance((after[1][:NARROW] - kept[1]) / (1 - MOMENTUM), biased, x)
    others = sum(differing(a[NARROW:], b[NARROW:]) for a, b in zip(after, before, strict=True))
    yield at_most("statistics outside the slice that changed", others, 0)


def kind_of_variance(found: np.ndarray, biased: np.ndarray, x: np.ndarray) -> Result:
    """Whether the running variance is the biased one or the unbiased; nothing depends on which."""
    name = "running variance of a slice"
    positions = x.size // x.shape[1]
    unbiased = biased * positions / (positions - 1)
    errors = {"biased": relative_error(found, biased), "unbiased": relative_error(found, unbiased)}
    kind = min(errors, key=errors.get)
    if errors[kind] <= 10 * LIMIT:  # of a tenth of the variance, the rest being subtracted
        return fact(name, kind, "scoring and calibration do not depend on it")
    note = f"neither the biased (off by {errors['biased']:.1g}) nor the unbiased one"
    return Result(name, FAILED, errors[kind], 10 * LIMIT, note)


def scales(x: np.ndarray) -> np.ndarray:
    """Scale, and shift, of :func:`network` for the channels of ``x``, [1, C, 1, 1]."""
    return (np.arange(1, x.shape[1] + 1) / 4).reshape(1, -1, 1, 1)


def normalised(x: np.ndarray, mean: np.ndarray, variance: np.ndarray, affine=True) -> np.ndarray:
    """By statistics of each channel; ``affine``: then scaled and shifted."""
    shape = (1, -1, 1, 1)
    unit = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + EPSILON)
    return unit * scales(x) + scales(x) if affine else unit


def gradient(x: np.ndarray, upstream: np.ndarray, mean: np.ndarray, variance: np.ndarray):
    """Of ``x``, through the statistics too."""
    unit = normalised(x, mean, variance, affine=False)
    centred = upstream - upstream.mean((0, 2, 3), keepdims=True)
    centred -= unit * (upstream * unit).mean((0, 2, 3), keepdims=True)
    return centred * (scales(x) / np.sqrt(variance.reshape(scales(x).shape) + EPSILON))


def check_frozen() -> Result:
    """Training at frozen statistics: they are used, and stay."""
    layer = network()
    (norm,) = layer
    freeze_statistics(layer)
    layer.train()
    before = statistics(norm)
    x = images(NARROW)
    y = layer(paddle.to_tensor(x)).numpy()
    if moved := sum(differing(a, b) for a, b in zip(statistics(norm), before, strict=True)):
        return Result("frozen statistics that changed", FAILED, moved, 0)
    right = normalised(x, *(part[:NARROW] for part in before))
    return at_most("BatchNorm at frozen statistics", relative_error(y, right), LIMIT)


def check_calibrated() -> Result:
    """Re-calibration normalises by the biased variance of its images, and leaves no trace."""
    layer = network()
    (norm,) = layer
    before = statistics(norm)
    x = images(NARROW)
    with paddle.no_grad(), calibrated(layer, paddle.to_tensor(x)):
        y = layer(paddle.to_tensor(x)).numpy()
    if left := sum(differing(a, b) for a, b in zip(statistics(norm), before, strict=True)):
        return Result("statistics that re-calibration left behind", FAILED, left, 0)
    right = normalised(x, x.mean((0, 2, 3)), x.var((0, 2, 3)))
    return at_most("BatchNorm re-calibrated", relative_error(y, right), LIMIT)
