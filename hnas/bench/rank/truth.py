"""The ground truth of ``hnas.bench.rank``: networks trained alone, and how far they can be trusted.

A statistic that is not defined is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hnas.base.errors import UserError
from hnas.bench.rank.estimates import reliability
from hnas.bench.rank.jobs import Bench, Job
from hnas.ranking.correlations import kendall_tau_b, none_if_nan, pearson
from hnas.search_space import Architecture


@dataclass(frozen=True)
class Truth:
    """Accuracies of networks that were trained alone.

    Attributes:
        archs: the architectures by name.
        acc: shares of 1 [seeds, architectures].
    """

    archs: Mapping[str, Architecture]
    acc: np.ndarray

    @classmethod
    def of_bench(cls, bench: Bench, splits: Sequence[str]) -> Truth | None:
        """Of some splits, with the seeds that all of them have; None if one is not finished."""
        archs = bench.of_splits(splits)
        seeds = range(min(bench.scale.truth_seeds(split) for split in splits))
        jobs = [[Job("truth", name, seed) for name in archs] for seed in seeds]
        if unfinished(bench, (job for own in jobs for job in own)):
            return None
        return cls(archs, np.array([[accuracy(bench, job) for job in own] for own in jobs]))

    @property
    def mean(self) -> np.ndarray:
        """Averaged over seeds [architectures]."""
        return self.acc.mean(axis=0)


def truth_jobs(bench: Bench, splits: Sequence[str], seeds: int | None = None) -> list[Job]:
    """What the ground truth of some splits takes; whole seeds one after the other."""
    archs = bench.of_splits(splits)
    number = {name: seeds or bench.scale.truth_seeds(bench.split(name)) for name in archs}
    return [
        Job("truth", name, seed)
        for seed in range(max(number.values(), default=0))
        for name in archs
        if seed < number[name]
    ]


def unfinished(bench: Bench, jobs: Iterable[Job]) -> list[Job]:
    """Those without a result."""
    return [job for job in jobs if bench.result(job) is None]


def accuracy(bench: Bench, job: Job) -> float:
    """Of a finished truth job."""
    result = bench.result(job)
    return result["hits"] / result["images"]


def selection_truth(bench: Bench) -> Truth:
    """What supernets are chosen by.

    Raises:
        UserError: it is not trained yet.
    """
    truth = Truth.of_bench(bench, ("selection",))
    if truth is None:
        raise UserError(
            f"{bench.runs.path} has not all of the selection's ground truth; run ground_truth "
            "with --splits selection and the same --out first"
        )
    return truth


def truth_file(bench: Bench, jobs: Iterable[Job]) -> dict:
    """The organisers' form: ``acc`` is the mean over seeds; ``acc_seeds`` and ``split`` besides."""
    acc: dict[str, list[float]] = {}
    for job in jobs:
        acc.setdefault(job.what, []).append(accuracy(bench, job))
    return {
        name: {
            "acc": sum(own) / len(own),
            "arch": bench.archs[name].code,
            "acc_seeds": own,
            "split": bench.split(name),
        }
        for name, own in acc.items()
    }


def expected_of_the_truth_itself(share: float) -> float:
    """Tau-b of the architectures' true order with that of means of this reliability.

    For normal values, whose correlation with the means is the root of the reliability, it is
    2 / pi * arcsin of that (Kendall, Rank Correlation Methods). NaN where seeds do not agree.
    """
    return float(2 / np.pi * np.arcsin(np.sqrt(share))) if 0 < share <= 1 else float("nan")


def describe_truth(truth: Truth) -> dict:
    """How far accuracies are apart, and how well seeds agree.

    ``reliability`` is the share of the means' variance over architectures that is not noise;
    ``best_tau`` what the true order itself would be expected to reach against the means.
    """
    pairs = list(combinations(truth.acc, 2))
    share = float(reliability(np.ones((1, len(truth.archs))), truth.acc)[0])
    agreement = {"tau": kendall_tau_b, "pearson": pearson}
    return {
        "architectures": len(truth.archs),
        "seeds": len(truth.acc),
        "lowest": float(truth.mean.min()),
        "highest": float(truth.mean.max()),
        "sd": none_if_nan(truth.mean.std(ddof=1)),
        **{
            f"{name}_between_seeds": none_if_nan(np.mean([of(*pair) for pair in pairs]))
            for name, of in agreement.items()
            if pairs
        },
        "reliability": none_if_nan(share),
        "best_tau": none_if_nan(expected_of_the_truth_itself(share)),
    }
