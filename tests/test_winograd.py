"""Winograd's convolutions of stage 3 against sums in float64."""

import hypothesis.strategies as st
import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from paddle.nn import functional as F  # noqa: N812

from hnas.evaluation.winograd import (
    CACHE_BYTES,
    LARGEST_MAP,
    POINTS,
    SMALLEST_MAP,
    TILE,
    filters_to_points,
    map_matrices,
    parts_of,
    tile_matrices,
    winograd,
    worth_it,
)


@given(st.integers(0, 2**31))
def test_a_tile_filters_as_the_sum_does(seed):
    """In one dimension and two, in float64: four outputs of six inputs and a filter of three."""
    rng = np.random.default_rng(seed)
    into, kernel, out = tile_matrices()
    x, w = rng.normal(size=POINTS), rng.normal(size=3)
    expected = [x[place : place + 3] @ w for place in range(TILE)]
    np.testing.assert_allclose(out @ ((into @ x) * (kernel @ w)), expected, atol=1e-12)
    x, w = rng.normal(size=(POINTS, POINTS)), rng.normal(size=(3, 3))
    expected = [
        [(x[row : row + 3, column : column + 3] * w).sum() for column in range(TILE)]
        for row in range(TILE)
    ]
    products = (into @ x @ into.T) * (kernel @ w @ kernel.T)
    np.testing.assert_allclose(out @ products @ out.T, expected, atol=1e-12)


def run(x, filters, outputs, bias=None, shortcut=None, relu=False):
    """[N, C, H, W] in and out; the shortcut, too."""
    last = [None if part is None else paddle.to_tensor(to_last(part)) for part in (x, shortcut)]
    y = paddle.full([len(x), *x.shape[2:], outputs], np.nan)
    points = filters_to_points(paddle.to_tensor(filters))
    winograd(last[0], points, outputs, bias, last[1], relu, y)
    return y.numpy().transpose(0, 3, 1, 2)


def to_last(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def exact(x, filters):
    tensors = (paddle.to_tensor(part.astype(np.float64)) for part in (x, filters))
    return F.conv2d(*tensors, padding=1).numpy()


@pytest.mark.parametrize("size", [1, 4, 5, 6, 7, 8, 14, 16, 28])
@pytest.mark.parametrize(
    ("images", "widths", "whole", "bias", "added", "relu"),
    [
        (3, (20, 17), (24, 18), True, 0, True),
        (1, (24, 18), (24, 18), False, 0, False),
        (5, (6, 30), (9, 31), True, 33, True),
        (2, (17, 9), (17, 12), False, 9, True),
        (2, (16, 16), (16, 16), True, 16, False),
    ],
)
def test_a_convolution_is_that_of_float64(size, images, widths, whole, bias, added, relu):
    (inputs, outputs), rng = widths, np.random.default_rng(size)
    x = np.maximum(rng.normal(size=(images, inputs, size, size)), 0).astype(np.float32)
    filters = rng.normal(size=(whole[1], whole[0], 3, 3)).astype(np.float32)
    offset = rng.normal(size=outputs).astype(np.float32) if bias else None
    shortcut = None
    expected = exact(x, filters[:outputs, :inputs])
    if bias:
        expected += offset[:, None, None]
    if added:
        shortcut = rng.normal(size=(images, added, size, size)).astype(np.float32)
        expected += shortcut[:, :outputs]
    if relu:
        expected = np.maximum(expected, 0)
    found = run(x, filters, outputs, offset, shortcut, relu)
    np.testing.assert_allclose(found, expected, atol=2e-6 * 3 * inputs**0.5 * 4)


def test_rounding_stays_small_thanks_to_the_points(monkeypatch):
    """Root mean square error of many channels, over the outputs' deviation."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(4, 512, 8, 8)), 0).astype(np.float32)
    filters = (rng.normal(size=(32, 512, 3, 3)) / 68).astype(np.float32)
    expected = exact(x, filters)

    def error():
        map_matrices.cache_clear()
        return float(np.sqrt(((run(x, filters, 32) - expected) ** 2).mean()) / expected.std())

    own = error()
    with monkeypatch.context() as patch:
        patch.setattr("hnas.evaluation.winograd.FINITE", (0.0, 1.0, -1.0, 2.0, -2.0))
        usual = error()
    map_matrices.cache_clear()
    assert own < 2.5e-6 < 1.25 * usual


def test_many_images_are_computed_in_parts(monkeypatch):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 5, 6, 6)).astype(np.float32)
    filters = rng.normal(size=(6, 5, 3, 3)).astype(np.float32)
    shortcut = rng.normal(size=(7, 8, 6, 6)).astype(np.float32)
    whole = run(x, filters, 6, shortcut=shortcut)
    monkeypatch.setattr("hnas.evaluation.winograd.CACHE_BYTES", 3 * POINTS**2 * 4 * 6 * 4)
    assert [len(part) for part in parts_of(7, 6, 6)] == [2, 2, 3]
    np.testing.assert_allclose(run(x, filters, 6, shortcut=shortcut), whole, atol=1e-5)


@settings(max_examples=50)
@given(st.integers(1, 1500), st.integers(1, 28), st.integers(1, 512))
def test_parts_are_all_images_and_fit_the_cache(images, size, channels):
    parts = parts_of(images, size, channels)
    assert [image for part in parts for image in part] == list(range(images))
    bytes_each = POINTS**2 * (-(-size // TILE)) ** 2 * channels * 4
    assert all(len(part) == 1 or len(part) * bytes_each <= CACHE_BYTES for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("images", "size", "inputs", "outputs", "pays"),
    [
        (16, 14, 256, 256, True),
        (16, 56, 64, 64, False),
        (16, SMALLEST_MAP - 1, 512, 512, False),
        (4, LARGEST_MAP, 128, 128, True),
        (2, 7, 512, 512, False),
        (16, 7, 512, 512, True),
        (2, 14, 208, 232, True),
        (600, 8, 16, 16, False),
        (355, 4, 32, 32, False),
        (64, 16, 56, 64, True),
        (64, 4, 208, 232, True),
    ],
)
def test_it_is_used_where_it_was_measured_to_pay(images, size, inputs, outputs, pays):
    assert worth_it(images, size, inputs, outputs) is pays
