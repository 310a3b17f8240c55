"""Evolution against random search, against the released list, and against the clock.

    python -m hnas.bench.search --modelarch_file CVPR_2022_NAS_Track1_test.json --output F

The supernet is the demo's. Its digits are too easy to tell good sub-networks apart, so they are
distorted and noisy here. For each seed `hnas.tools.search` runs twice with the same number of
sub-networks within the same budget of MACs: with generations of children, and with all of them in
the first, uniform, population, whose beginning is the other's. The best of each on the images that
it searched with are compared in pairs; then the same two on images that neither has seen. Killed
and started again, it goes on.
"""

from __future__ import annotations

from hnas.base.signals import hold_signals

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import csv
import logging
import time
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import stats

from hnas.architecture_file import read_architectures
from hnas.base.command_line import OneLineParser, path_text, read_path, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_output, file_digest, read_json, write_json
from hnas.bench.rank.distorted_digits import Distortion
from hnas.dataset.image_folder import scan_images
from hnas.evaluation.counts import Counts
from hnas.evaluation.engine import ScoringSettings, evaluate_shared
from hnas.evaluation.images import DecodedImages, balanced_order
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.state import architectures_hash
from hnas.models.pinasv2 import build_network
from hnas.search_space import Architecture, search_space
from hnas.tools import search
from hnas.tools.digits_folder import VAL_EVERY
from hnas.utils.options import Options
from hnas.utils.runtime import calibration_images, seed_generators
from hnas.utils.training import load_backbone

logger = logging.getLogger(__name__)

BACKBONE, IMAGE_SIZE, CLASSES = "resnet48_mini", 32, 10
CHECKPOINT = "checkpoint_files/demo_stage2.pdparams"
DISTORTION = Distortion(size=40, rotation=0.25, shrink=(1.15, 1.4), noise=0.2)
"""The demo's digits have 32 of 40 px, a factor of 1.25, upright and without noise."""
VIEWS = {"search": 1, "fresh": 4}
"""Distorted images of each of the demo's 355 validation scans, in two folders."""
POPULATION, CHILDREN, GENERATIONS, TOURNAMENT = 40, 20, 8, 10
DRAWS_FOR_BUDGET = 1001
METHODS = {
    "evolution": (POPULATION, GENERATIONS),
    "random": (POPULATION + GENERATIONS * CHILDREN, 0),
}
"""Population and generations."""
TIMED_EACH = 3
"""Sub-networks of a generation that are also timed one by one."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.search",
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=read_path, required=True, help="JSON file to write")
    parser.add_argument("--modelarch_file", type=path_text, help="the released list; none: skip it")
    parser.add_argument(
        "--listed", type=whole_number(1), default=5000, help="drawn of the list and compared with"
    )
    parser.add_argument("--seeds", type=whole_number(2, 1000), default=5, help="of the searches")
    parser.add_argument(
        "--work", type=read_path, default=Path("output/search_bench"), help="folder to go on from"
    )
    options = parser.parse_args(argv)
    check_output(options.output, "--output")
    for split in VIEWS:
        write_task(options.work / split, split)
    budget = median_macs()
    runs = [run_pair(options.work, seed, budget) for seed in range(options.seeds)]
    bench = Bench(options.work)
    fresh = bench.fresh_accuracies([row["arch"] for run in runs for row in run.values()])
    for run in runs:
        for row in run.values():
            row["fresh"] = fresh[row["arch"]]
    result = {
        "task": f"{BACKBONE}, {CHECKPOINT}, digits distorted by {DISTORTION}",
        "images": {split: 355 * views for split, views in VIEWS.items()},
        "max_macs": budget,
        "scored_each": POPULATION + GENERATIONS * CHILDREN,
        "runs": runs,
        "test": {kind: paired_test(runs, kind) for kind in ("acc", "fresh")},
        "time": bench.clock(options.work / "evolution_0"),
    }
    if options.modelarch_file:
        found = [run["evolution"]["arch"] for run in runs]
        path, number = options.modelarch_file, options.listed
        result["list"] = bench.best_of_list(path, number, budget, found)
    write_json(options.output, result)
    logger.info("%s: %s", options.output, result["test"]["acc"])


def write_task(folder: Path, split: str) -> None:
    """Write ``folder/train`` and ``folder/val`` with 0..9/*.png, unless they are there.

    The scans are divided as the demo's are; training ones, to re-calibrate with, have one view.
    """
    from sklearn.datasets import load_digits

    done = folder / "done"
    if done.is_file():
        return
    digits = load_digits()
    rng = np.random.default_rng(list(VIEWS).index(split))
    place = np.zeros(len(digits.target), dtype=int)
    for label in range(CLASSES):
        own = digits.target == label
        place[own] = np.arange(1, own.sum() + 1)
    is_val = place % VAL_EVERY == 0
    for part, which, views in (
        ("train", np.flatnonzero(~is_val), 1),
        ("val", np.flatnonzero(is_val), VIEWS[split]),
    ):
        for view in range(views):
            scans = (digits.images[which] / 16).astype(np.float32)
            pixels = DISTORTION.expose(DISTORTION.place(scans, rng), rng)
            for index, image in zip(which, pixels, strict=True):
                path = folder / part / str(digits.target[index]) / f"{index:04d}_{view}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.transpose(1, 2, 0)).save(path)
    done.write_text("", encoding="utf-8")


def median_macs() -> int:
    """The budget: half of the space's uniform draws take at most as many."""
    space, rng = search_space(BACKBONE), np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(DRAWS_FOR_BUDGET)]
    return int(np.median([space.macs(arch, IMAGE_SIZE, CLASSES) for arch in drawn]))


def run_pair(work: Path, seed: int, budget: int) -> dict[str, dict]:
    """The best sub-network of both methods with one seed: ``arch``, ``acc`` and ``macs``."""
    found = {}
    for method, (population, generations) in METHODS.items():
        folder = work / f"{method}_{seed}"
        if not (folder / "search.json").is_file():
            search.main(
                f"--backbone {BACKBONE} --ckpt_dir {CHECKPOINT} --image_size {IMAGE_SIZE} "
                f"--image_dir {work / 'search'} --num_workers 0 --save_dir {folder} "
                f"--max_macs {budget} --population {population} --generations {generations} "
                f"--children {CHILDREN} --tournament {TOURNAMENT} --seed {seed}".split()
            )
        best = read_json(folder / "search.json")["best"]
        found[method] = {name: best[name] for name in ("arch", "acc", "macs")}
    return found


def paired_test(runs: Sequence[Mapping], kind: str) -> dict:
    """One-sided paired t test over seeds: is evolution's best better than random search's?"""
    evolution, random = (np.array([run[method][kind] for run in runs]) for method in METHODS)
    difference = evolution - random
    error = difference.std(ddof=1) / np.sqrt(len(runs))
    p = stats.ttest_rel(evolution, random, alternative="greater").pvalue if error else None
    return {
        "evolution": round(float(evolution.mean()), 5),
        "random": round(float(random.mean()), 5),
        "difference": round(float(difference.mean()), 5),
        "standard_error": round(float(error), 5),
        "p": None if p is None else round(float(p), 6),
    }


class Bench:
    """The supernet and the task's images, as the searches have them.

    Args:
        work: the folder of everything.
    """

    def __init__(self, work: Path):
        self._work = work
        self._space = search_space(BACKBONE)
        seed_generators(0)
        self._network = build_network(BACKBONE, CLASSES, self._space)
        classes = tuple(map(str, range(CLASSES)))
        checkpoint = load_backbone(self._network, CHECKPOINT, classes)
        self._settings, self._images = {}, {}
        for split in VIEWS:
            options = Options(image_dir=str(work / split), image_size=IMAGE_SIZE)
            calibration = calibration_images(options, checkpoint.freeze_bn, classes=classes)
            self._settings[split] = ScoringSettings(calibration)
            images = scan_images(work / split, "val")
            order = balanced_order(images.labels, 0)
            self._images[split] = DecodedImages(images, order, IMAGE_SIZE, 1.0, work)

    def fresh_accuracies(self, codes: Iterable[str]) -> dict[str, float]:
        """Accuracies on the images that no search has seen, by code."""
        archs = {code: Architecture.from_code(code) for code in dict.fromkeys(codes)}
        counts = self._score("fresh", archs, self._work / "fresh_scores")
        return dict(zip(archs, counts.accuracy().tolist(), strict=True))

    def best_of_list(self, path: str, number: int, budget: int, found: Sequence[str]) -> dict:
        """The best within the budget of ``number`` architectures drawn from a file.

        The codes ``found`` by searches are scored anew, re-calibrated with the same images as
        these: every seed has drawn its own.
        """
        listed = list(read_architectures(path).values())
        number = min(number, len(listed))
        drawn = np.random.default_rng(0).permutation(len(listed))[:number]
        macs = {i: self._space.macs(listed[i], IMAGE_SIZE, CLASSES) for i in drawn}
        archs = {f"arch{i + 1}": listed[i] for i in drawn if macs[i] <= budget}
        if not archs:
            raise UserError(f"no architecture of {path} takes at most {budget} MACs")
        accuracy = self._score("search", archs, self._work / "list_scores").accuracy()
        best = int(np.argmax(accuracy))
        others = {code: Architecture.from_code(code) for code in dict.fromkeys(found)}
        own = self._score("search", others, self._work / "found_scores").accuracy()
        accuracies = dict(zip(others, own.tolist(), strict=True))
        return {
            "listed": len(listed),
            "drawn": number,
            "within": len(archs),
            "arch": list(archs.values())[best].code,
            "acc": float(accuracy[best]),
            "found": [accuracies[code] for code in found],
        }

    def _score(self, split: str, archs: Mapping[str, Architecture], folder: Path) -> Counts:
        images = self._images[split]
        identity = {
            "checkpoint": file_digest(CHECKPOINT),
            "image_list": images.hash,
            "architecture_list": architectures_hash(archs),
        }
        settings = self._settings[split]
        return evaluate_shared(self._network, archs, images, folder, identity, settings)

    def clock(self, folder: Path) -> dict:
        """Seconds of a search's generations in walks, and one by one; interleaved.

        Of a generation ``TIMED_EACH`` are scored one by one, and stand for all of it. Besides the
        clock's time the processor's is told, which counts this process alone.
        """
        path = self._work / "time.json"
        if path.is_file():
            return read_json(path)
        images, settings = self._images["search"], self._settings["search"]
        batch = images.batch(0, len(images))
        rows = read_generations(folder)
        evaluator = SharedEvaluator(self._network, rows[0], settings.calibration, settings.variant)
        spent = {"shared": np.zeros(2), "one_by_one": np.zeros(2)}
        for archs in rows:
            evaluator.take(archs)
            began = clocks()
            evaluator.evaluate(*batch, Counts.zeros(len(archs)))
            spent["shared"] += clocks() - began
            own = archs[:: max(1, len(archs) // TIMED_EACH)][:TIMED_EACH]
            began = clocks()
            evaluate_reference(self._network, own, [batch], settings.calibration)
            spent["one_by_one"] += (clocks() - began) * len(archs) / len(own)
        result = {
            name: {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}
            for name, (wall, cpu) in ((name, own.tolist()) for name, own in spent.items())
        }
        wall, cpu = spent["one_by_one"] / spent["shared"]
        result |= {"ratio_wall": round(float(wall), 2), "ratio_cpu": round(float(cpu), 2)}
        result |= {"sub-networks": sum(map(len, rows)), "images": len(images)}
        write_json(path, result)
        return result


def read_generations(folder: Path) -> list[list[Architecture]]:
    """What a search has scored, generation by generation."""
    with open(folder / "search.csv", encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["generation"]))
    return [
        [Architecture.from_code(row["arch"]) for row in own]
        for _, own in groupby(rows, key=lambda row: row["generation"])
    ]


def clocks() -> np.ndarray:
    """Seconds of the wall's clock and of this process's processor time."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    run_main(main)
