"""Search the space for the best sub-networks of a supernet within a budget.

    python -m hnas.tools.search --ckpt_dir checkpoint_files/stage2/0.pdparams --image_dir DIR \\
        --max_macs 3e9 --save_dir S [--max_params P] [--max_latency_ms T --latency FILE]

S gets search.json (the best, the Pareto front, how it went) and the same as stage 3's
submission.json, which choose, export and rank_report read. How it searches, and goes on where it
was killed: docs/search.md.
"""

from __future__ import annotations

from hnas.base.errors import hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle

from hnas.base.files import print_text, remove_leftovers, write_json
from hnas.evaluation.counts import Counts
from hnas.evaluation.engine import ScoringSettings, evaluate_shared, wanted_variant
from hnas.evaluation.evolution import Budget, Evolution
from hnas.evaluation.images import ScoredImages
from hnas.evaluation.results import (
    ESTIMATES_FILE,
    STATE_FILE,
    architectures_hash,
    estimates,
    evaluation_identity,
    load_state,
    warn_if_guessing,
    write_results,
)
from hnas.evaluation.shared import SharedEvaluator
from hnas.models.elastic import ElasticResNet
from hnas.models.pinasv2 import build_network
from hnas.parallel.distributed import from_main_process, is_main_process, leave
from hnas.programs.flags import Stage
from hnas.programs.memory_needs import IN_SCORING, check_chunk
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.programs.runtime import (
    calibration_images,
    decoded_images,
    require,
    scored_order,
    start,
    validation_images,
)
from hnas.ranking.agreement import expected_agreement
from hnas.ranking.costs import UNITS, Network, open_latency
from hnas.search_space import Architecture
from hnas.tools.choose import Scores, choose, conclusions, table
from hnas.utils.own_scores import score_by_function
from hnas.utils.starting import start_from_checkpoint

logger = logging.getLogger(__name__)

LISTED = 10


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Stage.SEARCH, argv, about=__doc__.splitlines()[0])
    wanted = {"backbone": options.backbone, "image_size": options.image_size}
    if options.sample_space == "full":  # that of all architectures serves the released ones, too
        wanted["sample_space"] = options.sample_space
    asked_by = "--max_latency_ms" if options.max_latency_ms else ""
    latency = open_latency(options.latency, wanted, asked_by)
    arithmetic = start(options)
    require(options, "ckpt_dir")
    check_chunk(options)
    space = options.space
    images = validation_images(options)
    if latency is not None:
        latency.check({"num_classes": len(images.classes)})
    order = scored_order(options, images)
    network = build_network(options.backbone, len(images.classes), space)
    checkpoint = start_from_checkpoint(network, options.ckpt_dir, images.classes)
    given = (options.max_macs, options.max_params, options.max_latency_ms)
    limits = {kind: most for kind, most in zip(UNITS, given, strict=True) if most}
    budget = Budget(space, options.image_size, len(images.classes), limits, latency)
    save_dir = Path(options.save_dir)
    for folder in save_dir.glob("generation_*"):
        remove_leftovers(folder)
    calibration = calibration_images(options, checkpoint.freeze_bn, classes=images.classes)
    logger.info("at most %s", budget)
    sizes = options.population, options.children, options.tournament
    evolution = Evolution(budget, options.seed, *sizes)
    if options.score_function:
        batch = decoded_images(options, images, order[: options.batch_size])
        search_by_function(options, network, evolution, batch, calibration)
        return
    decoded = decoded_images(options, images, order)
    setting = options.backbone, arithmetic, calibration
    whose = evaluation_identity(checkpoint.digest, decoded, *setting)
    scored = search(
        network,
        evolution,
        options.generations,
        decoded,
        save_dir,
        {**whose, **search_identity(options, budget)},
        ScoringSettings(
            calibration,
            options.chunk_size,
            variant=wanted_variant(arithmetic, calibration, options.fused == "auto"),
        ),
    )
    if is_main_process():
        write(save_dir, options, budget, scored)
    leave()


class Scored(NamedTuple):
    """What a search has scored, in order."""

    archs: dict[str, Architecture]
    counts: Counts
    generation: list[int]  # of each


def search(
    network: ElasticResNet,
    evolution: Evolution,
    generations: int,
    images: ScoredImages,
    folder: Path,
    identity: Mapping[str, str],
    settings: ScoringSettings,
) -> Scored:
    """Score a first population and ``generations`` generations of children in ``folder``.

    Several processes may call this together; all of them get the whole result.

    Raises:
        UserError: a generation in ``folder`` is not of ``identity``, or the reference engine counts
            other hits.
        UserError: nothing keeps to the budget.
    """
    evaluator, archs, counts, born = None, {}, Counts.zeros(0), []
    for generation in range(generations + 1):
        proposed = evolution.propose([*archs.values()], counts.accuracy(), generation)
        if not proposed:
            logger.warning("nothing is left to score in the space within the budget")
            break
        new = {f"arch{number}": arch for number, arch in enumerate(proposed, len(archs) + 1)}
        own = folder / f"generation_{generation:04d}"
        whose = {**identity, "architecture_list": architectures_hash(new)}
        if evaluator is None:
            evaluator = SharedEvaluator(network, proposed, settings.calibration, settings.variant)
        found = evaluate_shared(network, new, images, own, whose, settings, evaluator)
        if is_main_process():
            # The first generation's chunks are the others' too, in a resumed run as well.
            settings = replace(settings, chunk=load_state(own / STATE_FILE, whose).chunk)
        archs |= new
        counts = _joined(counts, found)
        born += [generation] * len(new)
        best = int(np.argmax(counts.accuracy()))
        logger.info(
            "generation %d/%d: %d scored, best %s %s with top-1 %.4f",
            generation,
            generations,
            len(archs),
            list(archs)[best],
            list(archs.values())[best].code,
            counts.accuracy()[best],
        )
    return Scored(archs, counts, born)


def search_by_function(
    options: Options,
    network: ElasticResNet,
    evolution: Evolution,
    images: ScoredImages,
    calibration: paddle.Tensor | None,
) -> None:
    """As :func:`search`, by an own score and always from the start; prints the best."""
    archs, scores = [], {}
    for generation in range(options.generations + 1):
        archs += evolution.propose(archs, np.array([*scores.values()]), generation)
        score_by_function(options, network, archs[len(scores) :], images, calibration, scores)
        best = max(scores, key=scores.get)
        logger.info("generation %d: %d scored, best %s", generation, len(scores), best)
    for code in sorted(scores, key=scores.get, reverse=True)[:LISTED]:
        print_text(f"{code}  {scores[code]:.6g}\n")


def _joined(counts: Counts, found: Counts) -> Counts:
    """Counts, and then the main process's of a generation, which alone are complete."""
    table = np.vstack([found.columns(), found.folds.T])
    images, *numbers = from_main_process([found.images, *table.ravel().tolist()])
    found = np.array(numbers, dtype=np.int64).reshape(table.shape)
    table = np.hstack([np.vstack([counts.columns(), counts.folds.T]), found])
    return Counts(*table[:4], images, table[4:].T)


def search_identity(options: Options, budget: Budget) -> dict[str, str]:
    """What a search's course depends on besides accuracies, and how long it is."""
    names = ("seed", "sample_space", "population", "children", "tournament")
    return {
        **{name: str(getattr(options, name)) for name in names},
        "budget": str(budget),
        "latency": budget.latency.digest if options.latency else "none",
    }


def write(folder: Path, options: Options, budget: Budget, scored: Scored) -> None:
    """Write all results, and print the best of them.

    Raises:
        UserError: a file cannot be written.
    """
    counts, archs = scored.counts, scored.archs
    costs = budget.costs(archs.values())
    # What is limited is what matters; the last of several kinds is the least usual.
    cost = next(reversed(budget.limits), "macs")
    scores = Scores(archs, counts.accuracy(), counts.standard_error(), counts.images, counts.folds)
    chosen = choose(scores, costs, np.full(len(archs), True), cost)

    write_results(folder, archs, counts)
    warn_if_guessing(counts, budget.num_classes, "the best network")
    agreement = expected_agreement(counts.folds, counts.images, counts.images)
    network = Network(options.backbone, options.image_size, budget.num_classes)
    found = estimates(archs, counts, agreement, counts.images, network)
    write_json(folder / ESTIMATES_FILE, found)
    write_json(folder / "search.json", summary(options, budget, scored, chosen, cost))
    logger.info("%d networks: %s", len(archs), folder / "search.json")
    shown = table(chosen, LISTED, list(costs))
    print_text(f"{shown}\n\n{conclusions(chosen, len(archs), cost, budget.latency)}\n")


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
    run_main(main, IN_SCORING)
