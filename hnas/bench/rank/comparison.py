"""Comparisons of ``hnas.bench.rank``: how well methods rank, and what can be told apart.

A statistic that is not defined is None. A comparison is there only when all of it is finished, so
that nobody looks at a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hnas.bench.rank.distorted_digits import CLASSES
from hnas.bench.rank.estimates import (
    STATISTICS,
    corrected_interval,
    difference,
    holm,
    interval,
    reliability,
    subsets,
    within,
)
from hnas.bench.rank.jobs import Bench, Job
from hnas.bench.rank.methods import COLUMNS
from hnas.bench.rank.truth import Truth, describe_truth, unfinished
from hnas.bench.rank.tuning import scores_of
from hnas.ranking.correlations import none_if_nan, pearson

TAU = "kendall_tau_b"


@dataclass(frozen=True)
class Entry:
    """What is compared: a method's supernets by one kind of their scores.

    Attributes:
        title: readable name.
        about: one line.
        jobs: one a seed; none for what needs no training.
        scores: ``plain`` or ``calibrated``.
        fixed: what is known without training, by architecture.
    """

    title: str
    about: str
    jobs: Sequence[Job] = ()
    scores: str = "plain"
    fixed: Sequence[float] = ()


def untrained(bench: Bench, truth: Truth) -> dict[str, Entry]:
    """What is known of the architectures without training."""
    archs, size = truth.archs.values(), bench.task.distortion.size
    macs = [bench.space.macs(arch, size, CLASSES) for arch in archs]
    params = [bench.space.params(arch, CLASSES) for arch in archs]
    return {
        "macs": Entry("MACs", "no training", fixed=macs),
        "params": Entry("parameters", "no training", fixed=params),
    }


def compare(
    bench: Bench, splits: Sequence[str], entries: Mapping[str, Entry], reference: str
) -> dict:
    """Correlations of all, and what each is behind the reference, with intervals.

    Args:
        bench: where the runs are.
        splits: on which architectures.
        entries: what is compared, by name.
        reference: the name of what the others are compared with.

    Returns:
        ``{"unfinished": number of jobs}`` if that is not 0. Else ``truth``, ``reference`` and by
        name ``methods``. Where a supernet diverged, a method has ``diverged``, how many, and no
        correlations.
    """
    truth = Truth.of_bench(bench, splits)
    jobs = {job for entry in entries.values() for job in entry.jobs}
    todo = len(unfinished(bench, jobs))
    if truth is None or todo:
        return {"unfinished": todo or "ground truth"}
    number = len(truth.archs)
    share = reliability(subsets(number), truth.acc)
    entries = {**entries, **untrained(bench, truth)}
    scores = {name: _scores(bench, entry, truth) for name, entry in entries.items()}
    methods, values = {}, {}
    for name, entry in entries.items():
        methods[name] = _about(bench, entry)
        lost = sum(own is None for own in scores[name])
        if lost:
            methods[name]["diverged"] = lost
            continue
        values[name] = {
            statistic: within(how, scores[name], truth.mean)
            for statistic, how in STATISTICS.items()
        }
        methods[name] |= {
            statistic: interval(own, number)
            | {
                "seed_values": [none_if_nan(value) for value in own[:, 0]] if entry.jobs else None,
                "corrected": corrected_interval(STATISTICS[statistic], own, share, number),
            }
            for statistic, own in values[name].items()
        }
        methods[name] |= describe_scores(bench, entry, scores[name])
    if reference in values:
        _add_differences(methods, values, reference, number)
    return {"truth": describe_truth(truth), "reference": reference, "methods": methods}


def _scores(bench: Bench, entry: Entry, truth: Truth) -> list[Sequence[float] | None]:
    if not entry.jobs:
        return [entry.fixed]
    archs, column = truth.archs.values(), COLUMNS[entry.scores]
    return [scores_of(bench.result(job), column, archs) for job in entry.jobs]


def _about(bench: Bench, entry: Entry) -> dict:
    found = {"title": entry.title, "about": entry.about, "seeds": len(entry.jobs)}
    if not entry.jobs:
        return found
    runs = [bench.result(job) for job in entry.jobs]
    costs = [bench.seconds(job) for job in entry.jobs]
    return found | {
        "scores": entry.scores,
        "rate": runs[0]["settings"].get("lr"),
        "steps": runs[0]["steps"],
        "forwards": runs[0]["forwards"],
        "seconds": None if None in costs else round(float(np.mean(costs)), 1),
    }


def describe_scores(bench: Bench, entry: Entry, scores: Sequence[Sequence[float]]) -> dict:
    """How far a method's scores are apart, and how well its supernets agree with each other.

    Returns:
        ``score_sd``, the standard deviation over architectures in percentage points of accuracy,
        mean over seeds; and ``pearson_between_seeds``, mean over pairs of them.
    """
    if not entry.jobs:
        return {}
    images = [bench.result(job)["images"] for job in entry.jobs]
    points = 100 * np.array(scores, np.float64) / np.array(images, np.float64)[:, None]
    pairs = [pearson(one, other) for one, other in combinations(points, 2)]
    return {
        "score_sd": none_if_nan(points.std(axis=1, ddof=1).mean()),
        "pearson_between_seeds": none_if_nan(np.mean(pairs)) if pairs else None,
    }


def _add_differences(
    methods: dict[str, dict],
    values: Mapping[str, Mapping[str, np.ndarray]],
    reference: str,
    number: int,
) -> None:
    """To each method the reference's lead over it; tau-b's p-values also adjusted by Holm."""
    others = [name for name in values if name != reference]
    for name in others:
        lead = {}
        for statistic, own in values[name].items():
            best = values[reference][statistic]
            # What needs no training is the same for all seeds.
            theirs = own if methods[name]["seeds"] else np.repeat(own, len(best), axis=0)
            lead[statistic] = difference(STATISTICS[statistic], best, theirs, number)
        methods[name]["reference_leads_by"] = lead
    trained = [name for name in others if methods[name]["seeds"]]
    adjusted = holm({name: methods[name]["reference_leads_by"][TAU]["p"] for name in trained})
    for name, p in adjusted.items():
        methods[name]["reference_leads_by"][TAU]["p_holm"] = p
