"""Changes of first place, the one improved recipe that is chosen from them, and what breaks.

The rule that chooses it on the selection architectures is the one that docs/ranking-bench.md
announced before its taus were computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hnas.bench.rank.comparison import TAU, Entry, compare
from hnas.bench.rank.jobs import DEVELOPMENT_SEEDS, Bench, Job
from hnas.bench.rank.methods import CHANGES, CLIPPED, COLUMNS, REFERENCE, find_method
from hnas.bench.rank.tuning import related

LEAST_TOP1 = 0.45
"""Mean top-1 below which training counts as broken: half of what networks trained alone reach."""

NAME = "improved"


def change_entries(rate: float) -> dict[str, Entry]:
    """First place with one change at a time; ``rate`` is first place's own."""
    return {
        change.title: Entry(
            change.title,
            "",
            [
                Job.supernet("selection", change.method, related(rate, change.rate), seed)
                for seed in DEVELOPMENT_SEEDS
            ],
            change.scores,
        )
        for change in CHANGES
    }


def compare_changes(bench: Bench, rate: float) -> dict:
    """What each change does on the selection architectures (``compare``)."""
    entries = change_entries(rate)
    return compare(bench, ("selection",), entries, next(iter(entries)))


def mean_top1(bench: Bench, entry: Entry) -> list[float | None]:
    """Of each of its supernets over what it scored, from 0 to 1; None if it diverged."""
    found = []
    for job in entry.jobs:
        run = bench.result(job)
        hits = [own[COLUMNS[entry.scores]] for own in run["archs"].values()]
        found.append(float(np.mean(hits)) / run["images"] if hits else None)
    return found


def broke(top1: float | None) -> bool:
    """Whether a supernet of that mean top-1 diverged or is of less than ``LEAST_TOP1``."""
    return top1 is None or top1 < LEAST_TOP1


def choose_change(bench: Bench, rate: float, changes: Mapping) -> dict:
    """By the announced rule, the change that may be tested on final.

    Those are left out whose stage 2 is not of the usual length, and those of which a supernet
    :func:`broke`. Of the others the one of the highest
    mean tau-b is taken, if that is higher than first place's.

    Args:
        bench: where the runs are.
        rate: first place's learning rate.
        changes: the finished comparison of them (``compare``).

    Returns:
        ``chosen``, a title of ``CHANGES`` or None, and of every change its supernets' ``top1``.
    """
    methods = changes["methods"]
    top1 = {title: mean_top1(bench, entry) for title, entry in change_entries(rate).items()}
    asked = methods[CHANGES[0].title].get(TAU, {}).get("value")
    taus = {
        change.title: methods[change.title][TAU]["value"]
        for change in CHANGES[1:]
        if find_method(change.method).stage2 == 1.0 and not any(map(broke, top1[change.title]))
    }
    better = {
        title: tau
        for title, tau in taus.items()
        if tau is not None and asked is not None and tau > asked
    }
    return {"chosen": max(better, key=better.get) if better else None, "top1": top1}


def improved_entry(bench: Bench, rate: float, title: str) -> Entry:
    """A change on the final architectures, with the seeds of first place.

    Args:
        bench: how many seeds first place has.
        rate: first place's learning rate.
        title: of ``CHANGES``.
    """
    change = next(change for change in CHANGES if change.title == title)
    rate, seeds = related(rate, change.rate), range(bench.scale.seeds(REFERENCE))
    jobs = [Job.supernet("final", change.method, rate, seed) for seed in seeds]
    return Entry(f"{find_method(REFERENCE).title}, {title}", "", jobs, change.scores)


def improved_part(
    bench: Bench, rate: float, changes: Mapping, announced: Mapping[str, Entry]
) -> dict:
    """What the summary says of it: the choice and, once it is trained, its comparison.

    Args:
        bench: where the runs are.
        rate: first place's learning rate.
        changes: the comparison of them.
        announced: what it is compared with, first place included.
    """
    if "unfinished" in changes:
        return {"unfinished": "changes"}
    choice = choose_change(bench, rate, changes)
    if choice["chosen"] is None:
        return choice
    entries = {NAME: improved_entry(bench, rate, choice["chosen"]), **announced}
    return choice | compare(bench, ("final",), entries, NAME)


def breaking_entries(bench: Bench, rate: float) -> dict[str, Entry]:
    """First place with and without clipped gradients, on the selection, with all seeds."""
    seeds = [*range(bench.scale.most_seeds), *DEVELOPMENT_SEEDS]
    titles = {CHANGES[0].title: REFERENCE, "gradients clipped": CLIPPED}
    return {
        title: Entry(
            title, "", [Job.supernet("selection", method, rate, seed) for seed in seeds], "plain"
        )
        for title, method in titles.items()
    }


def breaking_part(bench: Bench, rate: float) -> dict:
    """What the summary says of it: how many broke, beside their comparison (``compare``)."""
    entries = breaking_entries(bench, rate)
    compared = compare(bench, ("selection",), entries, CHANGES[0].title)
    for title, entry in entries.items() if "methods" in compared else ():
        top1 = mean_top1(bench, entry)
        compared["methods"][title] |= {"top1": top1, "broke": sum(map(broke, top1))}
    return compared
