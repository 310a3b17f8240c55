"""What came of supernets: how many broke, and how well the others rank.

A supernet is broken if its training diverged, or if its scores are on average below half of the
accuracy of the network that it began with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from hnas.bench.rank.estimates import interval, share, tau_kernel
from hnas.bench.rank.jobs import Bench, Job, supernet_jobs, truth_jobs


def verdict(bench: Bench, methods: Iterable[str], rate: float, split: str) -> dict[str, dict]:
    """By method, of finished supernets, what share ``broken``, and ``tau_b`` of the others.

    ``tau_b`` is None where all broke, and missing while the split's truth is not finished.
    """
    truth, found = truth_of(bench, split), {}
    for name in methods:
        scores = scores_of(bench, supernet_jobs(bench, [name], rate, split))
        trained = [own for own in scores if own is not None]
        found[name] = {"broken": share(len(scores) - len(trained), len(scores))}
        if truth is not None:
            kernels = [tau_kernel(own, truth) for own in trained]
            found[name]["tau_b"] = interval(np.stack(kernels)) if kernels else None
    return found


def truth_of(bench: Bench, split: str) -> np.ndarray | None:
    """Mean accuracies [n] of a split's networks trained alone; None if one is not finished."""
    jobs = truth_jobs(bench, [split])
    found = bench.results(jobs)
    if len(found) < len(jobs):
        return None
    acc = [found[job]["hits"] / found[job]["images"] for job in jobs]
    return np.reshape(acc, [bench.scale.truth_seeds, -1]).mean(axis=0)


def scores_of(bench: Bench, jobs: Sequence[Job]) -> list[np.ndarray | None]:
    """Accuracies [n] of a split's architectures by each of finished supernets, None if broken."""
    # The weights that they began with need not be there any more.
    found, entries, scores = bench.results(jobs), bench.entries(), []
    for job in jobs:
        acc = np.array(found[job]["hits"]) / found[job]["images"]
        start = entries[Job("pretrain", job.seed).name]
        whole = len(acc) and acc.mean() >= start["hits"] / start["images"] / 2
        scores.append(acc if whole else None)
    return scores
