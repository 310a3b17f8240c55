"""The ground truth of ``hnas.bench.rank``: its file, its parts, how far it can be trusted.

A statistic that is not defined is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from hnas.architecture_file import read_accuracies
from hnas.base.errors import UserError
from hnas.base.files import read_json
from hnas.bench.rank.distorted_digits import CLASSES
from hnas.bench.rank.jobs import SPLITS, Bench, Job
from hnas.ranking.correlations import kendall_tau_b, none_if_nan, pearson
from hnas.search_space import Architecture, SearchSpace

PARTS = {**{split: (split,) for split in SPLITS}, "held_out": ("seen", "sealed")}
"""What figures are given for."""


@dataclass(frozen=True)
class Truth:
    """Accuracies of networks that were trained alone.

    Attributes:
        archs: the architectures.
        splits: of each, one of ``SPLITS``.
        acc: shares of 1 [seeds, architectures].
    """

    archs: list[Architecture]
    splits: list[str]
    acc: np.ndarray

    @classmethod
    def read(cls, path: str | Path) -> Truth:
        """The file that the bench's ``ground_truth`` writes.

        Raises:
            UserError: it is something else.
        """
        archs, _ = read_accuracies(path)
        entries = read_json(Path(path))
        try:
            splits = [entries[name]["split"] for name in archs]
            acc = np.array([entries[name]["acc_seeds"] for name in archs], np.float64).T
        except (KeyError, TypeError, ValueError):
            acc, splits = np.zeros(0), []
        if acc.ndim != 2 or not np.isfinite(acc).all() or set(splits) - set(SPLITS):
            raise UserError(
                f"{path} is no ground truth of this bench: every entry needs acc_seeds, one "
                f"list of numbers of the same length, and a split ({', '.join(SPLITS)})"
            )
        return cls(list(archs.values()), splits, acc)

    def of_splits(self, splits: Sequence[str]) -> Truth:
        """The architectures of some of ``SPLITS``."""
        chosen = [index for index, own in enumerate(self.splits) if own in splits]
        return Truth(
            [self.archs[index] for index in chosen],
            [self.splits[index] for index in chosen],
            self.acc[:, chosen],
        )

    @property
    def mean(self) -> np.ndarray:
        """Averaged over seeds [architectures]."""
        return self.acc.mean(axis=0)


def truth_file(bench: Bench, archs: Mapping[str, Architecture], seeds: Iterable[int]) -> dict:
    """The organisers' form: ``acc`` is the mean over seeds; ``acc_seeds`` and ``split`` besides.

    Raises:
        UserError: something is not trained yet.
    """
    content = {}
    for name, arch in archs.items():
        runs = [_finished(bench, Job("truth", name, seed)) for seed in seeds]
        acc = [run["hits"] / run["images"] for run in runs]
        content[name] = {
            "acc": sum(acc) / len(acc),
            "arch": arch.code,
            "acc_seeds": acc,
            "split": bench.split(name),
        }
    return content


def _finished(bench: Bench, job: Job) -> dict:
    result = bench.result(job)
    if result is None:
        raise UserError(
            f"{bench.runs.path} has no {job.name}; run ground_truth again with the same --out"
        )
    return result


def ceiling(acc: np.ndarray) -> float:
    """Mean tau-b of each seed's accuracies against the mean of the others'; NaN for one seed.

    Args:
        acc: [seeds, architectures].
    """
    if len(acc) < 2:
        return float("nan")
    taus = [
        kendall_tau_b(acc[seed], np.delete(acc, seed, axis=0).mean(axis=0))
        for seed in range(len(acc))
    ]
    return float(np.mean(taus))


def tau_between_halves(acc: np.ndarray) -> float:
    """Mean tau-b of means over two halves of the seeds, all ways to halve them; NaN for one seed.

    Of an odd number one seed is left out.

    Args:
        acc: [seeds, architectures].
    """
    seeds, half = range(len(acc)), len(acc) // 2
    taus = [
        kendall_tau_b(acc[list(one)].mean(axis=0), acc[list(other)].mean(axis=0))
        for one, other in combinations(combinations(seeds, half), 2)
        if half and not set(one) & set(other)
    ]
    return float(np.mean(taus)) if taus else float("nan")


def expected_tau(pearson: float, seeds: int) -> float:
    """Tau between two means over so many seeds each, from the correlation of single seeds.

    Spearman-Brown's formula gives the correlation of the means; for normal values tau is
    2 / pi * arcsin of it (Kendall, Rank Correlation Methods). NaN where seeds do not agree.
    """
    if not pearson > 0:
        return float("nan")
    return float(2 / np.pi * np.arcsin(seeds * pearson / (1 + (seeds - 1) * pearson)))


def describe_truth(truth: Truth, space: SearchSpace, size: int) -> dict:
    """How far accuracies are apart, how well seeds agree, and whether size helps."""
    pairs = list(combinations(truth.acc, 2))
    taus = [kendall_tau_b(one, other) for one, other in pairs]
    agreement = [pearson(*pair) for pair in pairs]
    macs = [space.macs(arch, size, CLASSES) for arch in truth.archs]
    return {
        "architectures": len(truth.archs),
        "lowest": float(truth.mean.min()),
        "highest": float(truth.mean.max()),
        "sd": none_if_nan(truth.mean.std(ddof=1)) if len(truth.archs) > 1 else None,
        "tau_between_seeds": none_if_nan(np.mean(taus)) if taus else None,
        "pearson_between_seeds": none_if_nan(np.mean(agreement)) if agreement else None,
        "expected_tau_of_means": (
            none_if_nan(expected_tau(np.mean(agreement), len(truth.acc))) if agreement else None
        ),
        "tau_between_halves": none_if_nan(tau_between_halves(truth.acc)),
        "tau_of_macs": none_if_nan(kendall_tau_b(macs, truth.mean)),
        "ceiling": none_if_nan(ceiling(truth.acc)),
    }


def present(truth: Truth) -> dict[str, Truth]:
    """The parts that a ground truth has all splits of."""
    return {
        part: truth.of_splits(splits)
        for part, splits in PARTS.items()
        if set(splits) <= set(truth.splits)
    }
