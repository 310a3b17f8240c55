"""Scoring the generations of a search, each by the shared walk, resumable at any moment.

A search is a function of its settings and of the counts of its generations, so nothing else is
kept: each generation has a folder with stage three's own files, and a search that is started again
goes through the same generations and finds their counts there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hnas.evaluation.counts import Counts
from hnas.evaluation.engine import ScoringSettings, evaluate_shared
from hnas.evaluation.evolution import Evolution
from hnas.evaluation.images import DecodedImages, ImagesOnDemand
from hnas.evaluation.results import STATE_FILE, architectures_hash, load_state
from hnas.evaluation.shared import SharedEvaluator
from hnas.models.elastic import ElasticResNet
from hnas.parallel.distributed import from_main_process, is_main_process
from hnas.search_space import Architecture

logger = logging.getLogger(__name__)


@dataclass
class Scored:
    """What a search has scored so far, in order.

    Attributes:
        archs: by name, ``arch1``, ``arch2``, ...
        counts: of them.
        generation: that each belongs to.
    """

    archs: dict[str, Architecture] = field(default_factory=dict)
    counts: Counts = field(default_factory=lambda: Counts.zeros(0))
    generation: list[int] = field(default_factory=list)

    def add(self, archs: Mapping[str, Architecture], counts: Counts, generation: int) -> None:
        """Add those of a generation."""
        self.archs |= archs
        self.generation += [generation] * len(archs)
        columns = zip(self.counts.columns(), counts.columns(), strict=True)
        folds = np.concatenate([self.counts.folds, counts.folds])
        self.counts = Counts(*map(np.concatenate, columns), counts.images, folds)


def search(
    network: ElasticResNet,
    evolution: Evolution,
    generations: int,
    images: DecodedImages | ImagesOnDemand,
    folder: Path,
    identity: Mapping[str, str],
    settings: ScoringSettings,
) -> Scored:
    """Score a first population and ``generations`` generations of children.

    Several processes may call this together; all of them get the whole result.

    Args:
        network: the supernet.
        evolution: what to score.
        generations: after the first population.
        images: to score on.
        folder: for the generations' folders.
        identity: what the counts belong to.
        settings: how to score.

    Raises:
        StateError: a generation in ``folder`` is of something else.
        EngineError: the reference engine counts other hits.
        UserError: nothing keeps to the budget.
    """
    evaluator = None
    scored = Scored()
    for generation in range(generations + 1):
        proposed = evolution.propose(
            list(scored.archs.values()), scored.counts.accuracy(), generation
        )
        if not proposed:
            logger.warning("nothing is left to score in the space within the budget")
            break
        first = len(scored.archs) + 1
        archs = {f"arch{number}": arch for number, arch in enumerate(proposed, first)}
        own = folder / f"generation_{generation:04d}"
        whose = {**identity, "architecture_list": architectures_hash(archs)}
        if evaluator is None:
            evaluator = SharedEvaluator(network, proposed, settings.calibration, settings.variant)
        counts = evaluate_shared(network, archs, images, own, whose, settings, evaluator)
        scored.add(archs, _everywhere(counts), generation)
        if is_main_process():
            # The first generation's chunks are the others' too, in a resumed run as well.
            settings = replace(settings, chunk=load_state(own / STATE_FILE, whose).chunk)
        report(scored, generation, generations)
    return scored


def _everywhere(counts: Counts) -> Counts:
    """The main process's counts, which alone are complete."""
    table = np.vstack([counts.columns(), counts.folds.T])
    images, *numbers = from_main_process([counts.images, *table.ravel().tolist()])
    columns, folds = np.split(np.array(numbers, dtype=np.int64).reshape(table.shape), [4])
    return Counts(*columns, images, folds.T)


def report(scored: Scored, generation: int, generations: int) -> None:
    """Log what is best after a generation."""
    accuracy = scored.counts.accuracy()
    best = int(np.argmax(accuracy))
    name, arch = list(scored.archs.items())[best]
    logger.info(
        "generation %d/%d: %d scored, best %s %s with top-1 %.4f",
        generation,
        generations,
        len(accuracy),
        name,
        arch.code,
        accuracy[best],
    )
