"""The figures of ``hnas.tools.bench_rank``: how well each method ranks, and what could be reached.

Predictions are compared with accuracies of networks trained alone, averaged over their seeds. A
statistic that is not defined is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from hnas.dataset.distorted_digits import CLASSES
from hnas.evaluation.architecture_file import read_accuracies, write_json
from hnas.evaluation.rank_plots import methods_plot
from hnas.evaluation.ranking import CORRELATIONS, kendall_tau_b, none_if_nan
from hnas.search_space import Architecture, SearchSpace
from hnas.tools.rank_jobs import Bench, Job
from hnas.tools.rank_methods import BASELINES, METHODS, RECIPE, RECIPE_SCORES
from hnas.tools.train_standalone import read_json
from hnas.utils.atomic import replacing
from hnas.utils.errors import UserError

SPLITS = ("selection", "held_out")
STATISTICS = {"plain": "hits", "calibrated": "calibrated_hits"}
TAU = "kendall_tau_b"
READINGS = {"either": tuple(STATISTICS), "plain": ("plain",)}


@dataclass(frozen=True)
class Truth:
    """Accuracies of networks that were trained alone.

    Attributes:
        archs: the architectures.
        splits: of each, ``selection`` or ``held_out``.
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
                f"{path} is not a ground truth of bench_rank: every entry needs acc_seeds, one "
                f"list of numbers of the same length, and a split ({' or '.join(SPLITS)})"
            )
        return cls(list(archs.values()), splits, acc)

    def of_split(self, split: str) -> Truth:
        """The part that a split holds."""
        chosen = [index for index, own in enumerate(self.splits) if own == split]
        return Truth(
            [self.archs[index] for index in chosen], [split] * len(chosen), self.acc[:, chosen]
        )

    @property
    def mean(self) -> np.ndarray:
        """Averaged over seeds [architectures]."""
        return self.acc.mean(axis=0)


def truth_file(bench: Bench, seeds: Iterable[int]) -> dict:
    """The organisers' form: ``acc`` is the mean over seeds; ``acc_seeds`` and ``split`` besides.

    Raises:
        UserError: something is not trained yet.
    """
    content = {}
    for name, arch in bench.archs.items():
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
        raise UserError(f"{bench.path(job)} is missing; run bench_rank again with the same --out")
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


def expected_tau(pearson: float, seeds: int) -> float:
    """Tau between two means over so many seeds each, from the correlation of single seeds.

    Spearman-Brown's formula gives the correlation of the means; for normal values tau is
    2 / pi * arcsin of it (Kendall, Rank Correlation Methods). NaN where seeds do not agree.
    """
    if not pearson > 0:
        return float("nan")
    return float(2 / np.pi * np.arcsin(seeds * pearson / (1 + (seeds - 1) * pearson)))


def spread(values: Sequence[float]) -> dict:
    """Mean, sample standard deviation and standard error over seeds, and the values."""
    values = np.asarray(values, np.float64)
    deviation = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return {
        "mean": none_if_nan(values.mean()),
        "sd": none_if_nan(deviation),
        "se": none_if_nan(deviation / np.sqrt(len(values))),
        "seeds": [none_if_nan(value) for value in values],
    }


def describe_truth(truth: Truth, space: SearchSpace, size: int) -> dict:
    """How far accuracies are apart, how well seeds agree, and whether size helps."""
    pairs = list(combinations(truth.acc, 2))
    taus = [kendall_tau_b(one, other) for one, other in pairs]
    pearson = [float(np.corrcoef(pair)[0, 1]) for pair in pairs]
    macs = [space.macs(arch, size, CLASSES) for arch in truth.archs]
    return {
        "architectures": len(truth.archs),
        "lowest": float(truth.mean.min()),
        "highest": float(truth.mean.max()),
        "sd": none_if_nan(truth.mean.std(ddof=1)) if len(truth.archs) > 1 else None,
        "tau_between_seeds": none_if_nan(np.mean(taus)) if taus else None,
        "pearson_between_seeds": none_if_nan(np.mean(pearson)) if pearson else None,
        "expected_tau_of_means": (
            none_if_nan(expected_tau(np.mean(pearson), len(truth.acc))) if pearson else None
        ),
        "tau_of_macs": none_if_nan(kendall_tau_b(macs, truth.mean)),
        "ceiling": none_if_nan(ceiling(truth.acc)),
    }


def baselines(truth: Truth, space: SearchSpace, size: int) -> dict:
    """Correlations of what needs no training, by split."""
    counts = {
        "macs": lambda arch: space.macs(arch, size, CLASSES),
        "params": lambda arch: space.params(arch, CLASSES),
    }
    parts = {split: truth.of_split(split) for split in SPLITS}
    return {
        name: {
            split: {
                statistic: none_if_nan(function([count(arch) for arch in part.archs], part.mean))
                for statistic, function in CORRELATIONS.items()
            }
            for split, part in parts.items()
        }
        for name, count in counts.items()
    }


def describe_method(truth: Truth, runs: Sequence[Mapping]) -> dict:
    """Correlations of a method's supernets, by split, with and without calibration.

    Args:
        truth: what they are compared with.
        runs: results of ``run_supernet``, one a seed.

    Raises:
        UserError: they do not score all architectures of the truth.
    """
    result = {}
    for split in SPLITS:
        part = truth.of_split(split)
        result[split] = {}
        for kind, column in STATISTICS.items():
            scores = [_scores(run, column, part.archs) for run in runs]
            result[split][kind] = {
                statistic: spread([function(score, part.mean) for score in scores])
                for statistic, function in CORRELATIONS.items()
            }
    return result


def _scores(run: Mapping, column: str, archs: Sequence[Architecture]) -> list[int]:
    hits = {Architecture.from_code(entry["arch"]): entry[column] for entry in run["archs"].values()}
    missing = [arch.code for arch in archs if arch not in hits]
    if missing:
        raise UserError(
            f"the supernets did not score {len(missing)} architectures of the ground truth, such "
            f"as {missing[0]}; they were drawn otherwise"
        )
    return [hits[arch] for arch in archs]


def summarize(bench: Bench, truth: Truth, methods: Sequence[str], seeds: Sequence[int]) -> dict:
    """All figures, as plain values, of the methods of which every seed is finished.

    Raises:
        UserError: there is none.
    """
    jobs = {name: [Job("supernet", name, seed) for seed in seeds] for name in methods}
    results = {name: [bench.result(job) for job in own] for name, own in jobs.items()}
    done = [name for name, own in results.items() if None not in own]
    if not done:
        raise UserError(f"{bench.folder} has no method with all of its seeds; run supernets first")
    size = bench.task.distortion.size
    return {
        "recipe": RECIPE,
        "seeds": len(seeds),
        "truth_seeds": len(truth.acc),
        "truth": {
            split: describe_truth(truth.of_split(split), bench.space, size)
            for split in SPLITS
            if split in truth.splits
        },
        "baselines": baselines(truth, bench.space, size),
        "methods": {
            name: {
                "about": METHODS[name].about,
                "steps": results[name][0]["steps"],
                "forwards": results[name][0]["forwards"],
                "seconds": total_seconds(bench, name, seeds),
                **describe_method(truth, results[name]),
            }
            for name in done
        },
        "unfinished": [name for name in methods if name not in done],
    }


def total_seconds(bench: Bench, name: str, seeds: Sequence[int]) -> float | None:
    """Mean of a supernet's training and scoring, its stage 1 included."""
    stage1 = METHODS[name].stage1
    times = []
    for seed in seeds:
        jobs = [Job("supernet", name, seed)]
        jobs += [Job("stage1", stage1, seed)] if stage1 != "none" else []
        times.append([bench.seconds(job) for job in jobs])
    known = [sum(own) for own in times if None not in own]
    return round(float(np.mean(known)), 1) if known else None


def verdict(summary: Mapping) -> dict | None:
    """The recipe's held-out tau against the best baseline's; None where one is not there.

    ``either`` takes baselines as they score better, with or without re-calibrated BatchNorm, and
    ``plain`` at their running statistics. ``margin_se`` is that of a difference of two means over
    seeds, and ``paired_se`` of the mean difference within a seed, whose supernets have the start
    and the images in common; what needs no training has no spread.
    """
    own = summary["methods"].get(RECIPE)
    tau = own["held_out"][RECIPE_SCORES][TAU] if own else {"mean": None}
    rivals = {reading: _rivals(summary, kinds) for reading, kinds in READINGS.items()}
    if tau["mean"] is None or not all(rivals.values()):
        return None
    limit = summary["truth"]["held_out"]["ceiling"]
    return {
        "recipe": f"{RECIPE} {RECIPE_SCORES}",
        "tau": tau["mean"],
        "share_of_ceiling": tau["mean"] / limit if limit else None,
        **{reading: _lead(tau, own) for reading, own in rivals.items()},
    }


def _rivals(summary: Mapping, kinds: Sequence[str]) -> dict[str, Mapping]:
    """Held-out taus over seeds of the baselines, where they are defined."""
    rivals = {
        f"{name} {kind}": summary["methods"][name]["held_out"][kind][TAU]
        for name in BASELINES
        if name in summary["methods"]
        for kind in kinds
    }
    for name, figures in summary["baselines"].items():
        tau = figures["held_out"][TAU]
        rivals[name] = {"mean": tau, "se": 0.0, "seeds": [tau] * summary["seeds"]}
    return {name: tau for name, tau in rivals.items() if tau["mean"] is not None}


def _lead(tau: Mapping, rivals: Mapping[str, Mapping]) -> dict:
    """Of the recipe over the best of its rivals."""
    best = max(rivals, key=lambda name: rivals[name]["mean"])
    errors = [tau["se"], rivals[best]["se"]]
    # A mean is defined where all seeds are.
    differences = np.subtract(tau["seeds"], rivals[best]["seeds"])
    return {
        "best_baseline": best,
        "best_baseline_tau": rivals[best]["mean"],
        "margin": tau["mean"] - rivals[best]["mean"],
        "margin_se": None if None in errors else float(np.hypot(*errors)),
        "paired_se": spread(differences)["se"],
    }


def headline(summary: Mapping) -> dict:
    """What the program prints: mean held-out taus, best first, and the recipe's lead."""
    truth = summary["truth"].get("held_out", {})
    taus = {
        f"{name} {kind}": own["held_out"][kind][TAU]["mean"]
        for name, own in summary["methods"].items()
        for kind in STATISTICS
    }
    taus |= {name: own["held_out"][TAU] for name, own in summary["baselines"].items()}
    ranked = sorted(taus, key=lambda name: (taus[name] is None, -(taus[name] or 0)))
    return {
        "architectures": truth.get("architectures", 0),
        "seeds": summary["seeds"],
        "ceiling": truth.get("ceiling"),
        "held_out_tau": {name: taus[name] for name in ranked},
        "verdict": verdict(summary),
        "unfinished": summary["unfinished"],
    }


def table(summary: Mapping) -> str:
    """Markdown: tau-b by method, mean and standard error over seeds."""
    heads = [f"{split.replace('_', '-')}, {kind}" for split in SPLITS for kind in STATISTICS]
    heads += ["abs. Pearson, held-out", "Spearman, held-out", "seconds"]
    lines = [
        f"| method | what | {' | '.join(heads)} |",
        "|---" * (2 + len(heads)) + "|",
    ]
    for name, own in summary["methods"].items():
        cells = [shown(own[split][kind][TAU]) for split in SPLITS for kind in STATISTICS]
        used = own["held_out"][RECIPE_SCORES]
        cells += [shown(used["abs_pearson"]), shown(used["spearman"]), number(own["seconds"], 0)]
        mark = " **(the defaults)**" if name == summary["recipe"] else ""
        lines.append(f"| `{name}` | {own['about']}{mark} | {' | '.join(cells)} |")
    for name, own in summary["baselines"].items():
        taus = [number(own[split][TAU]) for split in SPLITS for _ in STATISTICS]
        others = [number(own["held_out"][key]) for key in ("abs_pearson", "spearman")]
        lines.append(f"| {name} | no training | {' | '.join([*taus, *others])} | – |")
    limits = [
        number(summary["truth"].get(split, {}).get("ceiling"))
        for split in SPLITS
        for _ in STATISTICS
    ]
    lines.append(
        f"| ceiling | one seed of the ground truth against the others | {' | '.join(limits)} "
        "| – | – | – |"
    )
    return "\n".join(lines) + "\n"


def shown(value: Mapping) -> str:
    """Mean ± standard error; the latter only where there are several seeds."""
    error = "" if value["se"] is None else f" ± {number(value['se'])}"
    return number(value["mean"]) + error


def number(value: float | None, digits: int = 3) -> str:
    """A cell of a table; a dash where nothing is known."""
    return "–" if value is None else f"{value:.{digits}f}"


def write_summary(summary: Mapping, folder: Path) -> None:
    """``summary.json``, ``table.md`` and ``methods.png``.

    Raises:
        UserError: they cannot be written.
    """
    write_json(folder / "summary.json", summary)
    with replacing(folder / "table.md") as temporary:
        temporary.write_text(table(summary), encoding="utf-8")
    methods = {
        name: {kind: own["held_out"][kind][TAU]["seeds"] for kind in STATISTICS}
        for name, own in summary["methods"].items()
    }
    plain = {name: own["held_out"][TAU] for name, own in summary["baselines"].items()}
    limit = summary["truth"].get("held_out", {}).get("ceiling")
    with replacing(folder / "methods.png") as temporary:
        temporary.write_bytes(methods_plot(methods, plain, limit))
