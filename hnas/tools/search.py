"""Search the space for the best sub-networks of a supernet within a budget.

    python -m hnas.tools.search --ckpt_dir checkpoint_files/stage2/0.pdparams --image_dir DIR \\
        --max_macs 3e9 --save_dir S [--max_params P] [--max_latency_ms T --latency FILE]

Regularized evolution; each generation is scored together, as stage 3 scores. S gets front.svg,
search.json (the best, the Pareto front, how it went), search.csv (all that was scored) and the
same as stage 3's submission.json, which choose, export and rank_report read. The same command goes
on where a killed one stopped.
"""

from __future__ import annotations

from hnas.base.signals import hold_signals

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import csv
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError, run_main
from hnas.base.files import file_digest, remove_leftovers, replacing, write_json
from hnas.evaluation.engine import ScoringSettings
from hnas.evaluation.evolution import UNITS, Budget, Evolution
from hnas.evaluation.generations import Scored, search
from hnas.evaluation.results import (
    ESTIMATES_FILE,
    complete_estimates,
    warn_if_guessing,
    write_results,
)
from hnas.models.pinasv2 import build_network
from hnas.parallel.distributed import barrier, is_main_process, leave
from hnas.ranking.figures import choice_panel
from hnas.ranking.latency import LatencyTable, read_latency
from hnas.search_space import find_backbone
from hnas.tools.choose import Scores, choose, conclusions, latency_label, table
from hnas.utils.flags import Stage
from hnas.utils.memory_needs import check_chunk
from hnas.utils.options import Options
from hnas.utils.parsing import parse_options
from hnas.utils.runtime import calibration_images, require, space_of, start, validation_images
from hnas.utils.scoring import decoded_images, identity, scored_order, shared_hash, variant
from hnas.utils.training import start_from_checkpoint

logger = logging.getLogger(__name__)

LISTED = 10


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Stage.SEARCH, argv, about=__doc__.splitlines()[0])
    if find_backbone(options.backbone).contrastive:
        raise UserError(f"--backbone {options.backbone} is stage 1's; search takes resnet48")
    latency = latency_table(options)
    arithmetic = start(options, scores=True)
    require(options, "ckpt_dir")
    check_chunk(options)
    space = space_of(options)
    images = validation_images(options)
    order = scored_order(options, images)
    network = build_network(options.backbone, len(images.classes), space)
    checkpoint = start_from_checkpoint(network, options.ckpt_dir, images.classes)
    budget = Budget(space, options.image_size, len(images.classes), limits(options), latency)
    save_dir = Path(options.save_dir)
    if is_main_process():
        for folder in (save_dir, *save_dir.glob("generation_*")):
            remove_leftovers(folder)
    barrier()
    calibration = calibration_images(options, checkpoint.freeze_bn, classes=images.classes)
    decoded = decoded_images(options, images, order)
    names = shared_hash(decoded.hash, images.select(order))
    whose = identity(options, names, calibration, arithmetic)
    logger.info("at most %s", budget)
    scored = search(
        network,
        Evolution(budget, options.seed, options.population, options.children, options.tournament),
        options.generations,
        decoded,
        save_dir,
        {**whose, **search_identity(options, budget)},
        ScoringSettings(calibration, options.chunk_size, variant=variant(arithmetic, calibration)),
    )
    if is_main_process():
        write(save_dir, options, budget, scored)
    leave()


def latency_table(options: Options) -> LatencyTable | None:
    """The table that ``--latency`` names.

    Raises:
        UserError: it is missing, wrong, or of another network.
    """
    if not options.latency:
        if options.max_latency_ms:
            raise UserError(
                "--max_latency_ms needs --latency FILE, of python -m hnas.tools.latency"
            )
        return None
    found = read_latency(options.latency)
    found.check_fits(options.backbone, options.image_size)
    if options.sample_space == "full" and found.about["sample_space"] != "full":
        raise UserError(
            f"{options.latency} was measured for the released space; measure with "
            "--sample_space full"
        )
    return found


def limits(options: Options) -> dict[str, float]:
    """The limits that are given, by kind of cost."""
    given = (options.max_macs, options.max_params, options.max_latency_ms)
    return {kind: most for kind, most in zip(UNITS, given, strict=True) if most}


def search_identity(options: Options, budget: Budget) -> dict[str, str]:
    """What a search's course depends on besides accuracies, and how long it is."""
    names = ("seed", "sample_space", "population", "children", "tournament")
    return {
        **{name: str(getattr(options, name)) for name in names},
        "budget": str(budget),
        "latency": file_digest(options.latency) if options.latency else "none",
    }


def write(folder: Path, options: Options, budget: Budget, scored: Scored) -> None:
    """Write all results, and print the best of them.

    Raises:
        UserError: a file cannot be written.
    """
    counts, archs = scored.counts, scored.archs
    each = [budget.costs(arch) for arch in archs.values()]
    costs = {kind: np.array([own[kind] for own in each]) for kind in each[0]}
    # What is limited is what matters; the last of several kinds is the least usual.
    cost = next(reversed(budget.limits), "macs")
    images = np.full(len(archs), counts.images)
    scores = Scores(archs, counts.accuracy(), counts.standard_error(), images, counts.folds)
    chosen = choose(scores, costs, np.full(len(archs), True), cost)

    write_results(folder, archs, counts)
    warn_if_guessing(counts, budget.num_classes, "the best network")
    write_json(folder / ESTIMATES_FILE, complete_estimates(archs, counts))
    write_table(folder / "search.csv", chosen, dict(zip(archs, scored.generation, strict=True)))
    write_json(folder / "search.json", summary(options, budget, scored, chosen, cost))
    plot = choice_panel(
        costs[cost],
        100 * scores.accuracy,
        chosen,
        cost,
        UNITS[cost] if cost != "latency" else latency_label(budget.latency),
        budget.limits.get(cost),
    ).svg(alone=True)
    with replacing(folder / "front.svg") as temporary:
        temporary.write_text(plot)
    logger.info("%d networks: %s, front.svg, search.csv", len(archs), folder / "search.json")
    shown = table(chosen, LISTED, list(costs))
    sys.stdout.write(f"{shown}\n\n{conclusions(chosen, len(archs), cost)}\n")


def write_table(path: Path, chosen: Sequence[Mapping], generation: Mapping[str, int]) -> None:
    """All networks as CSV, the best first."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["generation", *chosen[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"generation": generation[row["name"]], **row} for row in chosen)


def summary(
    options: Options, budget: Budget, scored: Scored, chosen: Sequence[Mapping], cost: str
) -> dict:
    """What ``search.json`` says."""
    accuracy, generation = scored.counts.accuracy(), np.array(scored.generation)
    course = [
        {"generation": number, "scored": int((generation <= number).sum())}
        | {"best": float(accuracy[generation <= number].max())}
        for number in range(generation[-1] + 1)
    ]
    return {
        "backbone": options.backbone,
        "image_size": options.image_size,
        "num_classes": budget.num_classes,
        "budget": dict(budget.limits),
        "cost": cost,
        **search_identity(options, budget),
        "scored": len(chosen),
        "images": scored.counts.images,
        "best": chosen[0],
        "front": sorted((row for row in chosen if row["front"]), key=lambda row: row[cost]),
        "course": course,
    }


if __name__ == "__main__":
    run_main(main)
