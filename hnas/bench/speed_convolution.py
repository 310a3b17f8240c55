"""Stage three's two ways of a 3x3 convolution on CPUs, timed in turns: directly, and by Winograd.

    OMP_NUM_THREADS=2 python -m hnas.bench.speed_convolution

The last line is JSON; times are milliseconds, the median of the rounds. ``chosen`` says whether
stage three takes Winograd's there: the rule is ``worth_it`` in ``hnas/evaluation/winograd.py``.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Callable

import numpy as np
import paddle

from hnas.base.command_line import OneLineParser, whole_number
from hnas.base.device import cpu_threads, processor
from hnas.base.errors import run_main
from hnas.evaluation.cpu_kernels import CpuKernels
from hnas.evaluation.kernels import Convolution, new_identity
from hnas.evaluation.variants import cpu_variant
from hnas.evaluation.winograd import filters_to_points, winograd, worth_it
from hnas.models.convolution import ramp

logger = logging.getLogger(__name__)

WIDE = (
    (28, 104, 120),
    (28, 128, 128),
    (14, 208, 232),
    (14, 256, 256),
    (7, 408, 464),
    (7, 512, 512),
)
MIDDLE = ((16, 56, 64), (8, 104, 120), (4, 208, 232), (4, 256, 256), (3, 256, 256), (2, 512, 512))
NARROW = ((8, 17, 18), (4, 26, 29), (4, 32, 32), (2, 58, 64))
SHAPES = tuple(
    (images, *shape)
    for images, shapes in ((2, WIDE), (16, ((56, 56, 64), *WIDE)), (64, MIDDLE), (355, NARROW))
    for shape in shapes
)
"""Images, height and width of the map, input and output channels: of 224 px, 64 px, and the small
network at 32 px."""


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.speed_convolution",
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=whole_number(1), default=9, help="of each, for one shape")
    options = parser.parse_args(argv)
    shapes = [timed(*shape, options.rounds) for shape in SHAPES]
    result = {"processor": processor(), "threads": cpu_threads(), "shapes": shapes}
    sys.stdout.write(json.dumps(result) + "\n")


def timed(images: int, size: int, inputs: int, outputs: int, rounds: int) -> dict:
    """One shape, with bias and ReLU."""
    kernels = CpuKernels(cpu_variant())
    x = ramp([images, size, size, inputs])
    filters, bias = ramp([outputs, inputs, 3, 3]), ramp([outputs])
    conv = Convolution(filters, (bias,), outputs, new_identity())
    points, offset = filters_to_points(filters), bias.numpy()
    y = paddle.empty([images, size, size, outputs])

    def by_winograd() -> None:
        winograd(x, points, outputs, offset, None, True, y)

    def directly() -> None:
        kernels.direct(x, conv, 1, 1, relu=True)

    times: dict[Callable, list[float]] = {directly: [], by_winograd: []}
    for _ in range(rounds + 1):
        for function, own in times.items():
            began = time.perf_counter()
            function()
            own.append(1000 * (time.perf_counter() - began))
    direct_ms, winograd_ms = (float(np.median(own[1:])) for own in times.values())
    found = {
        "images": images,
        "size": size,
        "inputs": inputs,
        "outputs": outputs,
        "direct_ms": round(direct_ms, 3),
        "winograd_ms": round(winograd_ms, 3),
        "ratio": round(direct_ms / winograd_ms, 2),
        "chosen": worth_it(images, size, inputs, outputs),
    }
    logger.info("%s", found)
    return found


if __name__ == "__main__":
    run_main(main)
