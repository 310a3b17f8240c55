"""Measure the latency of every block of a search space on this device.

    python -m hnas.tools.latency --output latency.json [--batch_size 1] [--threads 1]

An architecture's latency is then the sum of its blocks', which `search` and `choose` look up. The
sum is compared with whole networks at the end. A run that is killed goes on from OUTPUT.partial.
"""

from __future__ import annotations

from hnas.base.signals import hold_signals

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle.base.core import set_num_threads
from tqdm import tqdm

from hnas.base.command_line import (
    LARGEST_SIDE,
    OneLineParser,
    read_path,
    real_number,
    whole_number,
)
from hnas.base.device import cpu_threads, device_name, on_gpu, processor, set_tf32
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_output, read_json, write_json
from hnas.evaluation.stopwatch import Stopwatch
from hnas.parallel.distributed import finished_before_stopping
from hnas.ranking.latency import FORMAT, LatencyTable, all_parts
from hnas.search_space import SAMPLE_SPACES, Architecture, find_backbone, search_space

logger = logging.getLogger(__name__)

GOOD_ERROR = 0.1
"""Mean difference of sums and whole networks up to which the sums are good, as a share."""


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if find_backbone(options.backbone).contrastive:
        raise UserError(f"--backbone {options.backbone} is stage 1's; latency takes resnet48")
    check_output(options.output, "--output")
    choose_device(options)
    settings = settings_of(options)
    if options.output.is_file():
        check_same(options.output, read_json(options.output), settings)
        logger.info("%s is finished; remove it to measure again", options.output)
        return
    space = search_space(options.backbone, options.sample_space)
    parts = {part.name: part for part in all_parts(space)}
    drawn = space.sample_distinct(np.random.default_rng(options.seed), options.networks)
    watch = Stopwatch(
        options.image_size,
        options.batch_size,
        options.num_classes,
        options.threads,
        options.seconds,
    )
    networks = {arch.code: space.plan(arch) for arch in drawn.values()}
    times = Times(Path(f"{options.output}.partial"), settings)
    logger.info(
        "%d blocks and %d whole networks, %d times each, on %s",
        len(parts),
        len(networks),
        options.rounds,
        settings["processor"],
    )
    # Round after round, so that what slows the machine for a while slows no block in all of them.
    with tqdm(total=options.rounds * (len(parts) + len(networks)), unit="program") as progress:
        for number in range(options.rounds):
            times.take(parts, watch.part, number, progress.update)
            times.take(networks, watch.network, number, progress.update)
    result = {"format": FORMAT, **settings, "milliseconds": times.least(parts)}
    table = LatencyTable(options.output, space, settings, result["milliseconds"])
    result["check"] = compare(table, drawn.values(), times.least(networks))
    write_json(options.output, result)
    times.path.unlink()
    report(result["check"], options.output)


def parser() -> OneLineParser:
    made = OneLineParser(description=__doc__.splitlines()[0])
    made.add_argument("--output", type=read_path, required=True, help="JSON file to write")
    made.add_argument("--backbone", default="resnet48", help="whose blocks [resnet48]")
    made.add_argument(
        "--sample_space", choices=SAMPLE_SPACES, default="released", help="[released]"
    )
    made.add_argument("--image_size", type=whole_number(32, LARGEST_SIDE), default=224, help="px")
    made.add_argument("--batch_size", type=whole_number(1, 100_000), default=1, help="images [1]")
    made.add_argument("--num_classes", type=whole_number(1, 1_000_000), default=1000, help="[1000]")
    made.add_argument(
        "--threads",
        type=whole_number(1, 1024),
        default=cpu_threads(),
        help="of CPUs [PINAS_THREADS, or one a core]",
    )
    made.add_argument(
        "--seconds",
        type=real_number(0, 3600),
        default=0.2,
        help="to repeat each program for, in each round [0.2]",
    )
    made.add_argument("--rounds", type=whole_number(1, 1000), default=3, help="[3]")
    made.add_argument(
        "--networks", type=whole_number(1, 100_000), default=20, help="to check sums with [20]"
    )
    made.add_argument("--seed", type=whole_number(0), default=0, help="of those networks [0]")
    made.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="[auto]")
    return made


def choose_device(options) -> None:
    """Set Paddle's device and threads.

    Raises:
        UserError: a GPU is asked for and Paddle has none.
    """
    has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if options.device == "gpu" and not has_gpu:
        raise UserError("--device gpu, but this Paddle sees no GPU; use --device cpu or see README")
    paddle.set_device("cpu" if options.device == "cpu" or not has_gpu else "gpu")
    set_num_threads(options.threads)


def settings_of(options) -> dict:
    """What the times belong to, as the file says it."""
    return {
        "backbone": options.backbone,
        "sample_space": options.sample_space,
        "image_size": options.image_size,
        "num_classes": options.num_classes,
        "batch_size": options.batch_size,
        "device": "gpu" if on_gpu() else "cpu",
        "processor": device_name() if on_gpu() else f"{processor()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "engine": f"Paddle Inference, {arithmetic()}",
        "paddle": paddle.__version__,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "networks": options.networks,
        "seed": options.seed,
    }


def arithmetic() -> str:
    """What a network's convolutions are computed by, or in."""
    if not on_gpu():
        return "oneDNN, float32"
    return "TF32" if set_tf32("auto") else "float32"


class Times:
    """What is measured so far: milliseconds of each round by name, kept in a file.

    Args:
        path: of the file.
        settings: what the times belong to.

    Raises:
        UserError: the file is of other settings.
    """

    def __init__(self, path: Path, settings: Mapping):
        self.path = path
        self._settings = settings
        self._times: dict[str, list[float]] = {}
        if path.is_file():
            content = read_json(path)
            check_same(path, content, settings)
            self._times = content.get("times", {})
            logger.info("continuing with the %d programs of %s", len(self._times), path)

    def take(
        self,
        what: Mapping[str, object],
        measure: Callable[[object], float],
        number: int,
        progress: Callable[[int], object],
    ) -> None:
        """Measure in round ``number``, from 0, what an earlier run has not."""
        for name, thing in what.items():
            own = self._times.setdefault(name, [])
            if len(own) <= number:
                # Not while Paddle traces: it wraps exceptions, the end of the program, too.
                with finished_before_stopping():
                    own.append(measure(thing))
                    write_json(self.path, {**self._settings, "times": self._times})
            progress(1)

    def least(self, names: Mapping) -> dict[str, float]:
        """The fastest round of each."""
        return {name: round(min(self._times[name]), 6) for name in names}


def check_same(path: Path, content: Mapping, settings: Mapping) -> None:
    """Refuse a file of other settings.

    Raises:
        UserError: names the first that differs.
    """
    for name, value in settings.items():
        if content.get(name) != value:
            raise UserError(
                f"{path} was measured with {name} {content.get(name)}, not {value}; remove it, or "
                "choose another --output"
            )


def compare(
    table: LatencyTable, archs: Sequence[Architecture], measured: Mapping[str, float]
) -> dict:
    """How far the sums are from whole networks: errors as shares of what was measured."""
    rows = []
    for arch in archs:
        added, whole = table.of(arch), measured[arch.code]
        error = added / whole - 1
        rows.append({"arch": arch.code, "added": round(added, 4), "measured": whole})
        rows[-1]["error"] = round(error, 4)
    errors = np.array([row["error"] for row in rows])
    return {
        "mean_error": round(float(errors.mean()), 4),
        "mean_absolute_error": round(float(np.abs(errors).mean()), 4),
        "largest_absolute_error": round(float(np.abs(errors).max()), 4),
        "networks": rows,
    }


def report(check: Mapping, path: Path) -> None:
    """Log what the sums are worth, and print it as JSON."""
    if check["mean_absolute_error"] > GOOD_ERROR:
        logger.warning(
            "the sums are off by %.0f %% on average: was the machine busy? Networks may still be "
            "in the right order; raise --rounds or --seconds, or measure on an idle machine",
            100 * check["mean_absolute_error"],
        )
    told = {name: value for name, value in check.items() if name != "networks"}
    sys.stdout.write(json.dumps({**told, "output": str(path)}) + "\n")


if __name__ == "__main__":
    run_main(main)
