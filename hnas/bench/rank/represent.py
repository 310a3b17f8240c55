"""How like ImageNet's a task's truth is: networks of published accuracies, trained alone on it.

A law or a method that ranks well by a truth that hangs on other stages than ImageNet's need not
rank well there. So a task is chosen by this figure, before any supernet is trained on it.
"""

from __future__ import annotations

import numpy as np

from hnas.bench.rank.estimates import interval, tau_kernel
from hnas.bench.rank.jobs import Bench, published_jobs
from hnas.ranking.correlations import correlations, kendall_tau_b, none_if_nan
from hnas.search_space import Architecture, search_space


def represent(bench: Bench) -> dict:
    """The agreement of the task's accuracies with ImageNet's, when all are trained.

    Returns:
        the task's ``accuracy`` in percent; ``tau_b`` of a training with ImageNet, the mean of both,
        and ``reliability``, tau-b of both with each other, with intervals for other
        architectures; ``pearson`` of both trainings' mean with ImageNet; ``hangs_on``, tau-b of
        what describes a network with the accuracy: here, the mean of both, and on ImageNet.
    """
    jobs = published_jobs(bench)
    found, (archs, imagenet) = bench.results(jobs), bench.published
    own = np.array([100 * found[job]["hits"] / found[job]["images"] for job in jobs])
    own = own.reshape(2, len(archs))
    hangs_on = {}
    for name, values in descriptions(list(archs.values())).items():
        here = np.mean([kendall_tau_b(values, acc) for acc in own])
        hangs_on[name] = [none_if_nan(float(here)), kendall_tau_b(values, imagenet)]
    return {
        "accuracy": {"mean": float(own.mean()), "sd": float(own.std(axis=1, ddof=1).mean())},
        # Two trainings do not tell how others would vary.
        "tau_b": interval(np.mean([tau_kernel(acc, imagenet) for acc in own], axis=0)[None]),
        "reliability": interval(tau_kernel(*own)[None]),
        "pearson": correlations(own.mean(axis=0), imagenet)["pearson"],
        "hangs_on": hangs_on,
    }


def descriptions(archs: list[Architecture]) -> dict[str, list[int]]:
    """What a network is described by, its size on ImageNet among them."""
    depths = {f"depth of stage {s + 1}": [arch.depths[s] for arch in archs] for s in range(4)}
    space = search_space("resnet48")
    return depths | {
        "total depth": [sum(arch.depths) for arch in archs],
        "MACs": [space.macs(arch) for arch in archs],
        "parameters": [space.params(arch) for arch in archs],
    }
