"""What came of supernets: how many broke, how well the others rank, and which differ.

A supernet is broken if its training diverged, or if its best score is below half of the accuracy of
the network that it began with. What is said of ranking is of those that trained.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hnas.bench.rank.estimates import difference, interval, share, tau_kernel
from hnas.bench.rank.jobs import Bench, Job, second_jobs, supernet_jobs, truth_jobs
from hnas.bench.rank.methods import METHODS, PRIMARY
from hnas.ranking.correlations import kendall_tau_b
from hnas.ranking.costs import Network, counted
from hnas.ranking.effects import holm
from hnas.search_space import Architecture

FEWEST = 3
"""Trained supernets, of which it can be told how well a method's others would rank."""
ANNOUNCED = 2 * len(METHODS) - 2
"""Comparisons beside ``PRIMARY``."""
Kernels = dict[int, np.ndarray]
"""By seed, of supernets that trained, what each pair of architectures says, [n, n]."""


def verdict(bench: Bench, wanted: Iterable[tuple[str, float]], split: str) -> dict:
    """What is known of finished supernets of methods at learning rates.

    Returns:
        by ``NAME@RATE`` how many ``supernets``, what share ``broken``, and ``tau_b`` of the others,
        None where fewer than three are left; ``by_code``: tau-b of what codes alone tell. Of
        ``selection`` also the ``chosen`` learning rates; of ``final``, once there is the truth of
        ``selection``, ``comparisons``, as :func:`compare` gives them. Only what broke,
        while the split's truth is not finished.
    """
    truth, kernels, found = truth_of(bench, truth_jobs(bench, split)), {}, {}
    tried = defaultdict(dict)
    for name, rate in wanted:
        scores = scores_of(bench, supernet_jobs(bench, [(name, rate)], split))
        own = {seed: acc for seed, acc in scores.items() if acc is not None}
        broken = share(len(scores) - len(own), len(scores))
        about = {"supernets": len(scores), "broken": broken}
        if truth is not None:
            kernels[name] = {seed: tau_kernel(acc, truth) for seed, acc in own.items()}
            few = len(own) < min(FEWEST, len(scores))
            about["tau_b"] = None if few else interval(np.stack([*kernels[name].values()]))
            taus = [kendall_tau_b(acc, truth) for acc in own.values()]
            tried[name][rate] = about["broken"]["value"], float(np.mean(taus or -1))
        found[f"{name}@{rate:g}"] = about
    if truth is None:
        return found
    codes = by_code(bench.of_split(split).values())
    codes = {name: tau_kernel(own, truth)[None] for name, own in codes.items()}
    found["by_code"] = {name: interval(own) for name, own in codes.items()}
    if split == "selection":
        found["chosen"] = {name: choose_rate(rates) for name, rates in tried.items()}
    chosen = best_by_code(bench) if split == "final" else None
    if chosen is not None:
        found["comparisons"] = compare(kernels, chosen, codes[chosen][0])
    return found


def choose_rate(tried: Mapping[float, tuple[float, float]]) -> dict[str, float | None]:
    """The learning rate by which a method is compared, of those ``tried``, each with what share of
    supernets broke and the others' mean tau-b: fewest broke, then it ranks best, then the lowest.

    ``next``: the rate three times further that is to be tried, where it is at an end of them.
    """
    rate = min(tried, key=lambda rate: (tried[rate][0], -tried[rate][1], rate))
    further = {max(tried): rate * 3, min(tried): rate / 3}
    return {"rate": rate, "next": further.get(rate)}


def compare(kernels: Mapping[str, Kernels], law: str, code: np.ndarray) -> dict[str, dict]:
    """Differences of tau-b between methods, over seeds of which both trained.

    ``PRIMARY`` as it is; the first of it less each other method, and each method less the ranking
    by codes alone, ``law``, which says ``code`` [n, n], also with ``p_holm``, over all of these
    that were announced, whether they are known or not. Intervals are not adjusted.
    """
    first, *_ = PRIMARY
    found = {}
    for name, other in kernels.items():
        if first in kernels and name != first:
            found[f"{first} - {name}"] = lead(kernels[first], other)
        found[f"{name} - {law}"] = lead(other, dict.fromkeys(other, code))
    others = [own for name, own in found.items() if name != " - ".join(PRIMARY)]
    told = [own for own in others if own["p"] is not None]
    p = np.ones(ANNOUNCED)
    p[: len(told)] = [own["p"] for own in told]
    for own, adjusted in zip(told, holm(p), strict=False):
        own["p_holm"] = float(adjusted)
    return found


def lead(own: Kernels, other: Kernels) -> dict[str, float | None]:
    """The difference over the ``seeds`` of both; not told where they are fewer than three."""
    both = sorted(own.keys() & other.keys())
    found = dict.fromkeys(("value", "low", "high", "p"))
    if len(both) >= FEWEST:
        found = difference(*(np.stack([each[seed] for seed in both]) for each in (own, other)))
    return found | {"seeds": len(both)}


def by_code(archs: Iterable[Architecture]) -> dict[str, np.ndarray]:
    """What codes alone tell, larger is better: lists [n] by name, of this space on ImageNet."""
    archs = list(archs)
    # Of the thirty published networks the last is the best, but found by looking at them.
    later = np.array([np.dot([1, 2, 3, 4], arch.depths) for arch in archs])
    return {**counted(archs, Network()), "later_depth": later}


def best_by_code(bench: Bench) -> str | None:
    """What codes tell that ranks best on ``selection``; None while its truth is not finished."""
    truth = truth_of(bench, truth_jobs(bench, "selection"))
    if truth is None:
        return None
    laws = by_code(bench.of_split("selection").values())
    return max(laws, key=lambda name: kendall_tau_b(laws[name], truth))


def reliability(bench: Bench) -> dict:
    """Tau-b, with its interval, between two trainings of the networks that are trained twice; and
    the ``ceiling``, what a ranking without error would have with one training, by normal scores."""
    second = truth_of(bench, second_jobs(bench))
    first = truth_of(bench, truth_jobs(bench, "final"))
    found = interval(tau_kernel(first[: len(second)], second)[None])
    ceiling = {name: None if own is None else ceiling_of(own) for name, own in found.items()}
    return found | {"ceiling": ceiling}


def ceiling_of(tau: float) -> float:
    """Of normal values that correlate r, tau is 2 asin(r) / pi; two trainings' r is the square of
    each one's with the quality."""
    correlation = math.sin(math.pi / 2 * max(0.0, tau))
    return 2 / math.pi * math.asin(math.sqrt(correlation))


def truth_of(bench: Bench, jobs: Sequence[Job]) -> np.ndarray | None:
    """Accuracies [n] of networks trained alone; None if one is not finished."""
    found = bench.results(jobs)
    if len(found) < len(jobs):
        return None
    return np.array([found[job]["hits"] / found[job]["images"] for job in jobs])


def scores_of(bench: Bench, jobs: Sequence[Job]) -> dict[int, np.ndarray | None]:
    """By seed accuracies [n] of a split's architectures by finished supernets, None if broken."""
    # The weights that they began with need not be there any more.
    found, entries, scores = bench.results(jobs), bench.entries(), {}
    for job in jobs:
        acc = np.array(found[job]["hits"]) / found[job]["images"]
        start = entries[Job("pretrain", job.seed).name]
        whole = len(acc) and acc.max() >= start["hits"] / start["images"] / 2
        scores[job.seed] = acc if whole else None
    return scores
