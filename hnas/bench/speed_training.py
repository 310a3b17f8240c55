"""How fast stages one and two train: our steps and the straightforward loop, interleaved.

    python -m hnas.bench.speed_training --backbone resnet48_mini --image_size 32 --batch_size 64

Three processes take turns of a few steps each, so that a busy machine slows all: ours, with the
threads that the launchers set; the straightforward loop (hnas/bench/straightforward.py) as a user
starts it, with Paddle's own threads; and plain networks of the same architectures, forward,
backward and step, as the limit. Before that both loops train on the same batches, and their losses
are compared; ``--control True`` also compares the straightforward loop with itself, started from
weights that differ by about their last bit. The last lines are JSON, one a stage. Images
are synthetic.

A sample-forward is one image through one sub-network in training, its backward pass included: a
step has ``batch_size`` times ``subnetworks`` in stage two, and in stage one twice ``batch_size``,
one for each of its two passes, also where frozen statistics let both be computed at once. In stage
two the first place's law samples, without its extra network.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentDefaultsHelpFormatter
from pathlib import Path

import numpy as np
from PIL import Image

from hnas.base.command_line import LARGEST_SIDE, OneLineParser, read_bool, whole_number
from hnas.base.errors import UserError, run_main

logger = logging.getLogger(__name__)

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")
LOOPS = ("ours", "straightforward", "plain")


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.speed_training",
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--stages", type=whole_number(1, 2), nargs="+", default=[1, 2], help="of training"
    )
    parser.add_argument("--backbone", default="resnet48_mini", help="of stage 2")
    parser.add_argument("--image_size", type=whole_number(32, LARGEST_SIDE), default=32, help="px")
    parser.add_argument(
        "--source_size",
        type=whole_number(0, LARGEST_SIDE),
        default=0,
        help="of the files, px; 0: twice as large",
    )
    parser.add_argument("--batch_size", type=whole_number(2, 1_000_000), default=64, help="images")
    parser.add_argument("--subnetworks", type=whole_number(1), default=4, help="a step of stage 2")
    parser.add_argument("--rounds", type=whole_number(1), default=5, help="turns of each loop")
    parser.add_argument("--steps", type=whole_number(1), default=6, help="steps a turn")
    parser.add_argument(
        "--curve_steps",
        type=whole_number(0),
        default=50,
        help="whose losses are compared; 0: none",
    )
    parser.add_argument(
        "--num_workers", type=whole_number(0, 1024), default=2, help="of the loaders"
    )
    parser.add_argument(
        "--num_classes", type=whole_number(2, 1_000_000), default=1000, help="of the images"
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1, 1024),
        default=len(os.sched_getaffinity(0)),
        help="of all but the straightforward loop",
    )
    parser.add_argument(
        "--control",
        type=read_bool,
        default=False,
        help="compare the straightforward loop with itself",
    )
    parser.add_argument(
        "--freeze_bn", type=read_bool, default=True, help="train at frozen BatchNorm statistics"
    )
    parser.add_argument("--loader_only", type=read_bool, default=False, help="no training")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of all draws")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pinas-bench-") as folder:
        make_images(options, Path(folder))
        results = [measure(options, stage, folder) for stage in options.stages]
    for result in results:
        sys.stdout.write(json.dumps(result) + "\n")


def make_images(options, folder: Path) -> None:
    """JPEG files of smooth noise, enough for all turns in one epoch.

    Every epoch forks loader processes, and copying the pages that they share would slow the first
    steps, which in long epochs are few.
    """
    rng = np.random.default_rng(options.seed)
    size = options.source_size or 2 * options.image_size
    classes = rng.integers(
        0, options.num_classes, options.batch_size * (options.rounds * options.steps + 3)
    )
    classes[: options.num_classes] = np.arange(options.num_classes)[: len(classes)]
    for index, label in enumerate(classes):
        target = folder / "train" / f"{label:04d}"
        target.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image = coarse.resize((size, size), Image.Resampling.BICUBIC)
        image.save(target / f"{index:05d}.jpg", quality=90)


class Worker:
    """A loop in a process of its own; see hnas/bench/speed_training_worker.py."""

    def __init__(self, kind: str, settings: dict, threads: int):
        environment = dict(os.environ)
        for name in THREAD_VARIABLES:
            environment.pop(name, None)
        if kind != "straightforward":
            environment |= dict(
                zip(THREAD_VARIABLES, (str(threads), str(threads), "5"), strict=True)
            )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hnas.bench.speed_training_worker", kind, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=Path(__file__).resolve().parents[2],
        )
        self.kind = kind

    def ask(self, command: str, steps: int) -> dict:
        """Give a command and wait for the answer.

        Raises:
            UserError: the process failed.
        """
        try:
            self._process.stdin.write(json.dumps([command, steps]) + "\n")
            self._process.stdin.flush()
            while line := self._process.stdout.readline():
                if line.startswith("{"):  # libraries may print
                    return json.loads(line)
        except BrokenPipeError:
            pass
        raise UserError(f"the {self.kind} loop ended with {self._process.wait()}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def measure(options, stage: int, folder: str) -> dict:
    """One stage: losses compared, then turns of all loops."""
    contrastive = options.backbone.replace("resnet48", "resnet48pinasv2")
    settings = {
        "stage": stage,
        "image_dir": folder,
        "backbone": contrastive if stage == 1 else options.backbone,
        "queue_size": options.batch_size * 16,
        # The recipe's, which is what the losses are compared at.
        "lr": (0.0008 if stage == 1 else 0.0005) * options.batch_size / 256,
        "storage_size": round(options.image_size * 8 / 7),
        **{
            name: getattr(options, name)
            for name in ("image_size", "batch_size", "subnetworks", "num_workers", "freeze_bn")
        },
        "num_classes": len(list((Path(folder) / "train").iterdir())),
        "seed": options.seed,
    }
    workers = {kind: Worker(kind, settings, options.threads) for kind in LOOPS}
    try:
        return {**describe(options, stage), **compare(options, stage, workers)}
    finally:
        for worker in workers.values():
            worker.close()


def describe(options, stage: int) -> dict:
    return {
        "stage": stage,
        "backbone": options.backbone,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "num_workers": options.num_workers,
        "freeze_bn": options.freeze_bn,
    }


def compare(options, stage: int, workers: dict[str, Worker]) -> dict:
    """The stage's figures."""
    result = {} if options.loader_only else compare_curves(options, workers)
    turns = {kind: [] for kind in LOOPS}
    loads = {kind: [] for kind in LOOPS[:2]}
    for number in range(options.rounds):
        if not options.loader_only:
            for kind, worker in workers.items():
                if not number:
                    worker.ask("run", 2)
                turns[kind].append(worker.ask("run", options.steps))
            said = ", ".join(f"{kind} {turns[kind][-1]['seconds']:.2f} s" for kind in LOOPS)
            logger.info("stage %d round %d/%d: %s", stage, number + 1, options.rounds, said)
    for _ in range(options.rounds):
        for kind in loads:
            loads[kind].append(workers[kind].ask("load", options.steps)["seconds"])
    if not options.loader_only:
        result |= compare_turns(options, stage, turns)
    for kind, times in loads.items():
        rate = options.batch_size * options.steps * options.rounds / sum(times)
        result[f"{kind}_loader_images_per_s"] = round(rate)
    return result


def compare_curves(options, workers: dict[str, Worker]) -> dict:
    """How far the losses of both loops are apart."""
    if not options.curve_steps:
        return {}
    ours, other = (
        np.array(workers[kind].ask("curve", options.curve_steps)["losses"]) for kind in LOOPS[:2]
    )
    result = {
        "curve_steps": options.curve_steps,
        "largest_relative_loss_difference": largest_difference(ours, other),
        "first_and_last_loss": [round(ours[0], 4), round(ours[-1], 4)],
    }
    if options.control:
        nudged = np.array(workers[LOOPS[1]].ask("control", options.curve_steps)["losses"])
        result["largest_relative_loss_difference_of_control"] = largest_difference(nudged, other)
    return result


def largest_difference(losses: np.ndarray, others: np.ndarray) -> float:
    """Of two curves, relative, with two digits."""
    return float(f"{np.abs(losses / others - 1).max():.2g}")


def compare_turns(options, stage: int, turns: dict[str, list[dict]]) -> dict:
    """Speeds, their ratios, and where our time goes."""
    forwards = options.batch_size * (2 if stage == 1 else options.subnetworks)
    seconds = {kind: sum(turn["seconds"] for turn in turns[kind]) for kind in LOOPS}
    rates = {kind: forwards * options.steps * options.rounds / seconds[kind] for kind in LOOPS}
    pairs = zip(turns["ours"], turns["straightforward"], strict=True)
    ratios = [other["seconds"] / ours["seconds"] for ours, other in pairs]
    shares = {
        name: sum(turn[name] for turn in turns["ours"]) / seconds["ours"]
        for name in ("data", "backward", "optimizer")
    }
    shares["forward"] = 1 - sum(shares.values())
    return {
        **{f"{kind}_sample_forwards_per_s": round(rate, 1) for kind, rate in rates.items()},
        "ratio": round(seconds["straightforward"] / seconds["ours"], 2),
        "ratio_of_rounds": [round(min(ratios), 2), round(max(ratios), 2)],
        "share_of_limit": round(seconds["plain"] / seconds["ours"], 2),
        "ours_shares": {name: round(share, 3) for name, share in sorted(shares.items())},
    }


if __name__ == "__main__":
    run_main(main)
