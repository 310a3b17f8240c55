"""The figures of ``hnas.bench.rank``: how well each method ranks, and what could be reached.

Predictions are compared with accuracies of networks trained alone, averaged over their seeds. A
statistic that is not defined is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np

from hnas.base.errors import UserError
from hnas.bench.rank.distorted_digits import CLASSES
from hnas.bench.rank.jobs import OPEN_SPLITS, Bench, Job
from hnas.bench.rank.methods import BASELINES, FINALISTS, METHODS, RECIPE, RECIPE_SCORES
from hnas.bench.rank.truth import PARTS, Truth, describe_truth, present
from hnas.ranking.correlations import CORRELATIONS, none_if_nan, pearson, resampled_taus
from hnas.search_space import Architecture, SearchSpace

STATISTICS = {"plain": "hits", "calibrated": "calibrated_hits"}
TAU = "kendall_tau_b"
READINGS = {"either": tuple(STATISTICS), "plain": ("plain",)}


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


def baselines(truth: Truth, space: SearchSpace, size: int) -> dict:
    """Correlations of what needs no training, by part."""
    return {
        name: {
            part: {
                statistic: none_if_nan(function([count(arch) for arch in own.archs], own.mean))
                for statistic, function in CORRELATIONS.items()
            }
            for part, own in present(truth).items()
        }
        for name, count in counts(space, size).items()
    }


def counts(space: SearchSpace, size: int) -> dict[str, Callable[[Architecture], int]]:
    """What can be known of an architecture without training."""
    return {
        "macs": lambda arch: space.macs(arch, size, CLASSES),
        "params": lambda arch: space.params(arch, CLASSES),
    }


def describe_method(
    truth: Truth, runs: Sequence[Mapping], parts: Iterable[str] = tuple(PARTS)
) -> dict:
    """Correlations of a method's supernets, by part, with and without calibration.

    Args:
        truth: what they are compared with.
        runs: results of ``run_supernet``, one a seed.
        parts: which ones.

    Raises:
        UserError: they do not score all architectures of these parts.
    """
    result = {}
    for part, own in present(truth).items():
        if part not in parts:
            continue
        result[part] = {}
        for kind, column in STATISTICS.items():
            scores = [_scores(run, column, own.archs) for run in runs]
            result[part][kind] = {
                **{
                    statistic: spread([function(score, own.mean) for score in scores])
                    for statistic, function in CORRELATIONS.items()
                },
                **describe_scores(scores, [run["images"] for run in runs]),
            }
    return result


def describe_scores(scores: Sequence[Sequence[int]], images: Sequence[int]) -> dict:
    """How far a method's scores are apart, and how well its supernets agree with each other.

    Args:
        scores: hits of the architectures, for each seed.
        images: that they were counted on, for each seed.

    Returns:
        ``score_sd``, the standard deviation over architectures in percentage points of accuracy,
        mean over seeds; and ``pearson_between_seeds``, mean over pairs of them.
    """
    points = 100 * np.array(scores, np.float64) / np.array(images, np.float64)[:, None]
    deviation = points.std(axis=1, ddof=1).mean() if points.shape[1] > 1 else float("nan")
    pairs = [pearson(one, other) for one, other in combinations(points, 2)]
    return {
        "score_sd": none_if_nan(deviation),
        "pearson_between_seeds": none_if_nan(np.mean(pairs)) if pairs else None,
    }


def _scores(run: Mapping, column: str, archs: Sequence[Architecture]) -> list[int]:
    hits = {Architecture.from_code(entry["arch"]): entry[column] for entry in run["archs"].values()}
    missing = [arch.code for arch in archs if arch not in hits]
    if missing:
        raise UserError(
            f"the supernets did not score {len(missing)} architectures of the ground truth, such "
            f"as {missing[0]}; they were drawn otherwise"
        )
    return [hits[arch] for arch in archs]


def summarize(bench: Bench, truth: Truth, seeds: Mapping[str, Sequence[int]]) -> dict:
    """All figures, as plain values, of the methods of which every seed is finished.

    Args:
        bench: where the runs are.
        truth: what they are compared with.
        seeds: of each method.

    Raises:
        UserError: there is none.
    """
    results = {
        name: [bench.result(Job("supernet", name, seed)) for seed in own]
        for name, own in seeds.items()
    }
    done = [name for name, own in results.items() if None not in own]
    if not done:
        raise UserError(f"{bench.folder} has no method with all of its seeds; run supernets first")
    size = bench.task.distortion.size
    return {
        "recipe": RECIPE,
        "truth_seeds": len(truth.acc),
        "truth": {
            part: describe_truth(own, bench.space, size) for part, own in present(truth).items()
        },
        "baselines": baselines(truth, bench.space, size),
        "methods": {
            name: {
                "about": METHODS[name].about,
                "seeds": len(seeds[name]),
                "steps": results[name][0]["steps"],
                "forwards": results[name][0]["forwards"],
                "seconds": total_seconds(bench, name, seeds[name]),
                **describe_method(
                    truth, results[name], PARTS if name in FINALISTS else OPEN_SPLITS
                ),
            }
            for name in done
        },
        "margin_architectures_se": {
            part: margin_errors(bench.space, size, own, {name: results[name] for name in done})
            for part, own in present(truth).items()
            if RECIPE in done
        },
        "unfinished": [name for name in seeds if name not in done],
    }


def margin_errors(
    space: SearchSpace, size: int, truth: Truth, results: Mapping[str, Sequence[Mapping]]
) -> dict[str, float | None]:
    """How much the recipe's lead over each baseline depends on the architectures.

    Standard errors of the differences of mean tau-b, by bootstrap over the architectures.

    Args:
        space, size: to count MACs and parameters.
        truth: of one part.
        results: runs of the recipe and of other methods; those that are not scored on all of
            the part are left out.
    """

    def taus(preds: Sequence[Sequence[int]]) -> np.ndarray:
        return resampled_taus(preds, truth.mean, seed=0)

    def taus_of(name: str, kind: str) -> np.ndarray:
        return taus([_scores(run, STATISTICS[kind], truth.archs) for run in results[name]])

    rivals = {
        f"{name} {kind}": taus_of(name, kind)
        for name in BASELINES
        if name in results and (name in FINALISTS or set(truth.splits) <= set(OPEN_SPLITS))
        for kind in STATISTICS
    }
    for name, count in counts(space, size).items():
        rivals[name] = taus([[count(arch) for arch in truth.archs]])
    own = taus_of(RECIPE, RECIPE_SCORES)
    return {name: _error(own - other) for name, other in rivals.items()}


def _error(differences: np.ndarray) -> float | None:
    # Where few architectures are drawn from, a resample may hold equal accuracies only.
    known = differences[np.isfinite(differences)]
    return float(known.std()) if len(known) else None


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


def verdict(summary: Mapping, part: str = "held_out") -> dict | None:
    """The recipe's tau against the best baseline's; None where one is not there.

    ``either`` takes baselines as they score better, with or without re-calibrated BatchNorm, and
    ``plain`` at their running statistics. ``margin_se`` is that of a difference of two means over
    seeds, and ``paired_se`` of the mean difference within a seed, whose supernets have the start
    and the images in common; what needs no training has no spread. Both hold for these
    architectures; ``architectures_se`` is of the mean margin over others of the same distribution.
    """
    own = summary["methods"].get(RECIPE, {}).get(part)
    tau = own[RECIPE_SCORES][TAU] if own else {"mean": None}
    rivals = {reading: _rivals(summary, part, kinds) for reading, kinds in READINGS.items()}
    if tau["mean"] is None or not all(rivals.values()):
        return None
    limit = summary["truth"][part]["ceiling"]
    return {
        "recipe": f"{RECIPE} {RECIPE_SCORES}",
        "tau": tau["mean"],
        "share_of_ceiling": tau["mean"] / limit if limit else None,
        **{
            reading: _lead(tau, own, summary["margin_architectures_se"][part])
            for reading, own in rivals.items()
        },
    }


def _rivals(summary: Mapping, part: str, kinds: Sequence[str]) -> dict[str, Mapping]:
    """Taus over seeds of the baselines, where they are defined."""
    rivals = {
        f"{name} {kind}": summary["methods"][name][part][kind][TAU]
        for name in BASELINES
        if part in summary["methods"].get(name, {})
        for kind in kinds
    }
    for name, figures in summary["baselines"].items():
        rivals[name] = {"mean": figures[part][TAU], "se": 0.0, "seeds": None}
    return {name: tau for name, tau in rivals.items() if tau["mean"] is not None}


def _lead(
    tau: Mapping, rivals: Mapping[str, Mapping], architectures_se: Mapping[str, float | None]
) -> dict:
    """Of the recipe over the best of its rivals."""
    best = max(rivals, key=lambda name: rivals[name]["mean"])
    errors = [tau["se"], rivals[best]["se"]]
    theirs = rivals[best]["seeds"] or [rivals[best]["mean"]] * len(tau["seeds"])
    # A mean is defined where all seeds are.
    differences = [own - other for own, other in zip(tau["seeds"], theirs, strict=False)]
    return {
        "best_baseline": best,
        "best_baseline_tau": rivals[best]["mean"],
        "margin": tau["mean"] - rivals[best]["mean"],
        "margin_se": None if None in errors else float(np.hypot(*errors)),
        "paired_se": spread(differences)["se"],
        "pairs": len(differences),
        "architectures_se": architectures_se[best],
    }


def headline(summary: Mapping) -> dict:
    """What the program prints: mean taus, best first, and the recipe's lead."""
    truth = summary["truth"].get("held_out") or summary["truth"].get("seen", {})
    return {
        "architectures": truth.get("architectures", 0),
        "ceiling": truth.get("ceiling"),
        "held_out_tau": mean_taus(summary, "held_out"),
        "seen_tau": mean_taus(summary, "seen"),
        "verdict": {
            part: verdict(summary, part)
            for part in ("held_out", "seen", "sealed")
            if part in summary["truth"]
        },
        "unfinished": summary["unfinished"],
    }


def mean_taus(summary: Mapping, part: str) -> dict[str, float | None]:
    """Of everything that is compared on a part, best first."""
    taus = {
        f"{name} {kind}": own[part][kind][TAU]["mean"]
        for name, own in summary["methods"].items()
        if part in own
        for kind in STATISTICS
    }
    taus |= {name: own[part][TAU] for name, own in summary["baselines"].items() if part in own}
    ranked = sorted(taus, key=lambda name: (taus[name] is None, -(taus[name] or 0)))
    return {name: taus[name] for name in ranked}
