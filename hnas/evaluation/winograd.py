"""3x3 convolutions by Winograd's minimal filtering, for CPUs.

Four by four outputs take 36 products a pair of channels instead of 144 (Lavin & Gray, CVPR 2016,
https://arxiv.org/abs/1509.09308, F(4x4, 3x3)). The points are 0, the roots of 1/2 and of 2, and
infinity: rounding in float32 costs some 2e-6 of the outputs' deviation, half of what the usual
0, 1, -1, 2, -2 cost (tests/test_winograd.py), and ten times what plain sums do.

All transforms are matrix products over whole maps, which lie as [H, W, N, C] meanwhile. Filters
lie as [6, 6, I, O], whose leading part is used as it is: other widths need no copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import paddle

from hnas.base.onednn import BIAS, DST, SRC, WEIGHTS, Step, dense, library, scratch
from hnas.evaluation.onednn_steps import activation

TILE, POINTS = 4, 6
"""Outputs of a tile in one dimension, and the points where it is evaluated."""
FINITE = (0.0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5))
SPARE = 16
"""Floats between rows of filters: rows that are a power of two apart share places in the cache."""
CACHE_BYTES = 5 << 20
"""Of the values at the points of as many images as are computed at once."""
SMALLEST_MAP, LARGEST_MAP = 3, 28
FEWEST_CHANNELS = 48
FEWEST_ROWS = 64


def worth_it(images: int, size: int, inputs: int, outputs: int) -> bool:
    """Whether it is faster than a direct convolution (docs/speed.md).

    Smaller maps are mostly padding; the values of larger ones do not stay in the cache. Few rows
    make the products wait for filters, which take four times the memory.
    """
    tiles = -(-size // TILE)
    rows = tiles * tiles * images
    return (
        SMALLEST_MAP <= size <= LARGEST_MAP
        and min(inputs, outputs) >= FEWEST_CHANNELS
        and (rows >= FEWEST_ROWS or (2 * rows >= FEWEST_ROWS and inputs * outputs <= 1 << 16))
    )


def tile_matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one tile in one dimension, float64.

    Returns:
        From its inputs to the points [6, 6], from a filter to the points [6, 3], and from products
        at the points to its outputs [4, 6].
    """

    def powers(number: int) -> np.ndarray:
        infinity = np.eye(number)[-1:]
        return np.concatenate([np.vander(FINITE, number, increasing=True), infinity])

    # A product of polynomials is interpolated from its values; filtering is the transpose of that.
    return np.linalg.inv(powers(POINTS)).T, powers(3), powers(TILE).T


@lru_cache
def map_matrices(size: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """From a row of a map, padding of 1 included, to the points of its tiles, and back.

    Returns:
        [6 * tiles, size] and [size, 6 * tiles], float32; the tiles of a point stand together.
    """
    into, _, out = tile_matrices()
    tiles = -(-size // TILE)
    to_points, to_outputs = np.zeros((POINTS, tiles, size)), np.zeros((size, POINTS, tiles))
    for tile in range(tiles):
        first = tile * TILE
        for tap in range(POINTS):
            if 0 <= first - 1 + tap < size:
                to_points[:, tile, first - 1 + tap] = into[:, tap]
        for place in range(first, min(first + TILE, size)):
            to_outputs[place, :, tile] = out[place - first]
    flat = to_points.reshape(-1, size), to_outputs.reshape(size, -1)
    return tuple(paddle.to_tensor(matrix.astype(np.float32)) for matrix in flat)


def filters_to_points(filters: paddle.Tensor) -> paddle.Tensor:
    """Transformed filters: [O, I, 3, 3] -> [6, 6, I, O + SPARE]."""
    _, kernel, _ = tile_matrices()
    outputs, inputs = filters.shape[:2]
    # In float64, so that they are rounded once.
    both = paddle.to_tensor(np.kron(kernel, kernel))
    flat = filters.astype("float64").transpose([2, 3, 1, 0]).reshape([9, inputs * outputs])
    points = paddle.matmul(both, flat).astype("float32")
    held = paddle.zeros([POINTS, POINTS, inputs, outputs + SPARE])
    held[:, :, :, :outputs] = points.reshape([POINTS, POINTS, inputs, outputs])
    return held


def winograd(x, points, outputs: int, bias: np.ndarray | None, shortcut, relu: bool, y) -> None:
    """Write a convolution of stride 1 and padding 1 to ``y`` [N, H, H, O].

    Args:
        x: [N, H, H, C], float32.
        points: of the whole filters, as :func:`filters_to_points` gives them.
        outputs: O, the first output channels of the filters.
        bias: [O], or None.
        shortcut: [N, H, H, O or more] to add, or None.
        relu: whether to apply ReLU at the end.
    """
    images, size, _, inputs = x.shape
    wide = 0 if shortcut is None else shortcut.shape[3]
    then = bias is not None, wide, relu
    for part in parts_of(images, size, max(inputs, outputs)):
        run = _program(len(part), size, inputs, outputs, tuple(points.shape[2:]), then)
        first = part.start * size * size * 4
        run(
            x.data_ptr() + first * inputs,
            points.data_ptr(),
            bias,
            0 if shortcut is None else shortcut.data_ptr() + first * wide,
            y.data_ptr() + first * outputs,
        )


def parts_of(images: int, size: int, channels: int) -> list[range]:
    """Images in equal parts whose values at the points fit into the cache."""
    tiles = -(-size // TILE)
    most = max(1, CACHE_BYTES // (POINTS**2 * tiles**2 * channels * 4))
    number = -(-images // most)
    ends = [images * part // number for part in range(number + 1)]
    return [range(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]


@lru_cache(maxsize=4096)
def _program(
    images: int,
    size: int,
    inputs: int,
    outputs: int,
    filters: tuple[int, int],
    then: tuple[bool, int, bool],
) -> Callable[[int, int, np.ndarray | None, int, int], None]:
    """What computes one shape, of addresses: input, filters, bias, shortcut (0: none), output.

    Args:
        images, size, inputs, outputs: the shape, with the height of the map.
        filters: last axes of what :func:`filters_to_points` gives, [I, O + SPARE].
        then: whether there is a bias, channels of what is added (0: nothing is), and whether ReLU
            comes last.
    """
    lib = library()
    tiles = -(-size // TILE)
    rows = POINTS * tiles
    with_bias, added, relu = then
    held, row = filters[0] * filters[1], filters[1]
    weights = lib.description(
        (POINTS, 1, POINTS, inputs, outputs), (POINTS * held, POINTS * held, held, row, 1)
    )
    grid = (POINTS, tiles, POINTS, tiles * images, inputs)
    maps, inside = (images, size, size), _inside(lib, images, size, outputs)
    enter = lib.reorder(activation((*maps, inputs)), _inside(lib, images, size, inputs))
    down = _product((rows, size), (size, size * images * inputs))
    across = _product((1, rows, size), (rows, size, images * inputs))
    products = _product(grid, (POINTS, 1, POINTS, inputs, outputs), weights)
    back_across = _product((1, size, rows), (rows, rows, images * outputs))
    after = lib.attributes(add=added > 0, relu=relu)
    back_down = _product((size, rows), (rows, size * images * outputs), None, with_bias, after)
    load = lib.reorder(activation((*maps, outputs), channels=added or outputs), inside)
    leave = lib.reorder(inside, activation((*maps, outputs)))

    def run(x: int, points: int, bias: np.ndarray | None, shortcut: int, y: int) -> None:
        into, out = (matrix.data_ptr() for matrix in map_matrices(size))
        # Two buffers take turns: each step reads what the one before has written.
        most = rows * rows * images * max(inputs, outputs) * 4
        one, other = scratch("winograd 1", most), scratch("winograd 2", most)
        result = scratch("winograd 3", size * size * images * outputs * 4)
        lib.run(enter, x, one)
        lib.run(down, into, one, other)
        lib.run(across, into, other, one)
        lib.run(products, one, points, other)
        lib.run(back_across, out, other, one)
        if shortcut:
            lib.run(load, shortcut, result)
        tiled = None if bias is None else np.tile(bias, size * images)
        given = [] if tiled is None else [tiled.ctypes.data]
        lib.run(back_down, out, one, *given, result)
        lib.run(leave, result, y)

    return run


def _inside(lib, images: int, size: int, channels: int):
    """As [H, W, N, C]."""
    strides = (channels, 1, size * images * channels, images * channels)
    return lib.description((images, channels, size, size), strides)


def _product(left, right, weights=None, bias: bool = False, attributes=None) -> Step:
    """Of arrays of matrices, dense but for ``weights``; an axis of length 1 serves all others."""
    lib = library()
    result = (*map(max, zip(left[:-2], right[:-2], strict=True)), left[-2], right[-1])
    source, target = (lib.description(shape, dense(shape)) for shape in (left, result))
    weights = weights or lib.description(right, dense(right))
    row = (*[1] * (len(result) - 1), result[-1])
    bias = lib.description(row, dense(row)) if bias else None
    primitive = lib.make(
        "dnnl_matmul_primitive_desc_create", lib.engine, source, weights, bias, target, attributes
    )
    arguments = [(SRC, source), (WEIGHTS, weights), (DST, target)]
    if bias:
        arguments.insert(2, (BIAS, bias))
    return lib.step(primitive, *arguments)
