"""What came of ``hnas.bench.rank``: learning rates, taus, and what can be told apart.

A comparison is there only when all of it is finished, so that nobody looks at a part of it. A
supernet is broken if its training diverged, or if its scores are on average below half of the
accuracy of the network that it began with. How many broke is one figure of a method, tau-b of those
that did not the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hnas.bench.rank.distorted_digits import CLASSES
from hnas.bench.rank.estimates import difference, interval, reliability, share, tau_kernel
from hnas.bench.rank.jobs import TUNING_SEED, Bench, Job
from hnas.bench.rank.methods import LEARNING_RATES, REFERENCE
from hnas.ranking.correlations import kendall_tau_b, none_if_nan


def truth_jobs(bench: Bench, splits: Sequence[str]) -> list[Job]:
    """What the truth of some splits takes; whole seeds one after the other."""
    archs = [name for split in splits for name in bench.of_split(split)]
    return [Job("truth", seed, name) for seed in range(bench.scale.truth_seeds) for name in archs]


def tuning_jobs(methods: Iterable[str]) -> list[Job]:
    """A supernet of every learning rate; a method's one after the other."""
    return [
        Job("selection", TUNING_SEED, name, rate) for name in methods for rate in LEARNING_RATES
    ]


def final_jobs(bench: Bench, rates: Mapping[str, float]) -> list[Job]:
    """The supernets that are compared; whole seeds one after the other."""
    return [
        Job("final", seed, name, rate)
        for seed in range(bench.scale.seeds)
        for name, rate in rates.items()
    ]


def truth_of(bench: Bench, split: str) -> np.ndarray | None:
    """Accuracies [seeds, architectures] of networks trained alone; None if one is not finished."""
    jobs = truth_jobs(bench, [split])
    found = bench.results(jobs)
    if len(found) < len(jobs):
        return None
    acc = [found[job]["hits"] / found[job]["images"] for job in jobs]
    return np.reshape(acc, [bench.scale.truth_seeds, -1])


def scores_of(bench: Bench, jobs: Sequence[Job]) -> list[np.ndarray | None] | None:
    """Accuracies of a split's architectures by each of some supernets; of a broken one None.

    None altogether if one is not finished.
    """
    found = bench.results(jobs)
    if len(found) < len(jobs):
        return None
    # The weights that they began with need not be there any more.
    entries, scores = bench.entries(), []
    for job in jobs:
        acc = np.array(found[job]["hits"]) / found[job]["images"]
        start = entries[Job("pretrain", job.seed).name]
        whole = len(acc) and acc.mean() >= start["hits"] / start["images"] / 2
        scores.append(acc if whole else None)
    return scores


def choose_rates(bench: Bench, methods: Iterable[str]) -> dict[str, float]:
    """For each method whose rates are all done the one that ranks the selection best.

    Of equal ones the lowest is taken; a method that broke at each of them has none.
    """
    truth = truth_of(bench, "selection")
    rates = {}
    for name in methods:
        scores = scores_of(bench, tuning_jobs([name]))
        if truth is None or scores is None:
            continue
        taus = {
            # Scores that are all equal are worse than any others.
            rate: np.nan_to_num(kendall_tau_b(own, truth.mean(axis=0)), nan=-2.0)
            for rate, own in zip(LEARNING_RATES, scores, strict=True)
            if own is not None
        }
        if taus:
            rates[name] = max(taus, key=taus.get)
    return rates


def compare(bench: Bench, rates: Mapping[str, float]) -> dict:
    """The final comparison: what each method's supernets came to, and what the reference leads by.

    Returns:
        ``{"unfinished": number of jobs}`` if that is not 0. Else ``truth``, ``reference`` and by
        name ``methods``, networks' sizes among them.
    """
    jobs = [*truth_jobs(bench, ["final"]), *final_jobs(bench, rates)]
    unfinished = len(bench.unfinished(jobs))
    if unfinished or not rates:
        return {"unfinished": unfinished}
    acc = truth_of(bench, "final")
    truth, archs = acc.mean(axis=0), bench.of_split("final").values()
    sizes = {
        "macs": [bench.space.macs(arch, bench.task.size, CLASSES) for arch in archs],
        "params": [bench.space.params(arch, CLASSES) for arch in archs],
    }
    methods, kernels = {}, {}
    for name, rate in rates.items():
        scores = scores_of(bench, [job for job in jobs if job.what == name])
        trained = [own for own in scores if own is not None]
        kernels[name] = {
            seed: tau_kernel(own, truth) for seed, own in enumerate(scores) if own is not None
        }
        methods[name] = {
            "rate": rate,
            "supernets": len(scores),
            "broken": share(len(scores) - len(trained), len(scores)),
            "tau": interval(np.stack(list(kernels[name].values()))) if trained else None,
        }
    for name, values in sizes.items():
        kernel = tau_kernel(values, truth)
        kernels[name] = dict.fromkeys(range(bench.scale.seeds), kernel)
        methods[name] = {"tau": interval(kernel[None])}
    for name in set(kernels) - {REFERENCE}:
        seeds = sorted(kernels.get(REFERENCE, {}).keys() & kernels[name].keys())
        if seeds:
            pairs = (np.stack([kernels[of][seed] for seed in seeds]) for of in (REFERENCE, name))
            methods[name]["reference_leads_by"] = difference(*pairs)
    described = {"architectures": len(truth), "reliability": none_if_nan(reliability(acc))}
    return {"truth": described, "reference": REFERENCE, "methods": methods}
