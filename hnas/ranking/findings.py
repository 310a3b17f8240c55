"""What a report finds: of predictions and a truth, and of scores alone.

Both ask what choices of depth and width do to a value, to accuracies or to *rank errors*: predicted
less true rank in percent of the number of architectures, positive where it is ranked too high.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from hnas.base.errors import UserError
from hnas.ranking.agreement import Estimates, expected_agreement
from hnas.ranking.correlations import (
    RESAMPLES,
    bootstrap_interval,
    correlations,
    kendall_tau_b,
    none_if_nan,
    rank_errors,
    regret,
    right_order,
    with_ties,
)
from hnas.ranking.effects import attribute, choices, largest_effect
from hnas.ranking.front import CONFIDENCE, as_good_as_best, pareto_front
from hnas.search_space import Architecture

FEWEST = 3
"""Architectures that a report takes."""
LISTED = 10
MANY_EQUAL = 0.25
"""Share of accuracies with one value from which on they may not have been measured."""
BUDGETS = 8
"""How many networks are told that are the best of all that cost no more."""
COUNTED = {
    "macs": "MACs", "params": "parameters", "size": "weighted channels", "depth": "blocks"
}  # fmt: skip
"""What is counted from a code, by its name as a prediction."""


# --- of predictions and a truth


def match(
    pred: Mapping[Architecture, float], gt: Mapping[Architecture, float]
) -> tuple[list[Architecture], np.ndarray, np.ndarray]:
    """Architectures of both files, in the order of ``gt``, and what each file says of them [n].

    Raises:
        UserError: fewer than three are in both.
    """
    archs = [arch for arch in gt if arch in pred]
    if len(archs) < FEWEST:
        raise UserError(
            f"--pred and --gt share {len(archs)} architectures ({len(pred)} and {len(gt)} are in "
            f"them); a ranking needs at least {FEWEST}"
        )
    predicted, true = (with_ties([named[arch] for arch in archs]) for named in (pred, gt))
    return archs, predicted, true


def analyse_ranking(
    pred: Mapping[Architecture, float],
    gt: Mapping[Architecture, float],
    counts: Mapping[str, np.ndarray],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict:
    """All figures of a report, as plain values; None where something is not defined.

    Args:
        pred, gt: predictions and truth, of any scale.
        counts: by their names in ``COUNTED``, of the architectures of ``gt`` in its order.
        seed, resamples: of the bootstrap.

    Raises:
        UserError: fewer than three architectures are in both.
    """
    archs, predicted, true = match(pred, gt)
    errors = 100 * rank_errors(predicted, true) / len(true)
    rows = [row for row, arch in enumerate(gt) if arch in pred]
    taus = {name: kendall_tau_b(values[rows], true) for name, values in counts.items()}
    lonely = {"pred": len(pred) - len(true), "gt": len(gt) - len(true)}
    report = {
        "architectures": len(true),
        "resamples": resamples,
        "seed": seed,
        "correlations": correlations(predicted, true, seed, resamples),
        "tau_of_counts": {name: none_if_nan(tau) for name, tau in taus.items()},
        "regret": regret(predicted, true),
        "attribution": attribute(choices(archs), errors),
        **{f"only_in_{source}": number for source, number in lonely.items()},
    }
    told = interpret_ranking(report, predicted, true, {n: v[rows] for n, v in counts.items()})
    notes = notes_on_ranking(predicted, true)
    missing = [f"{number:,} only in --{source}" for source, number in lonely.items() if number]
    if missing:
        notes.append(f"Architectures without a partner are left out: {', '.join(missing)}.")
    return {**report, "interpretation": told, "notes": notes}


def notes_on_ranking(pred: np.ndarray, gt: np.ndarray) -> list[str]:
    """What a reader must know before trusting the figures of predictions and accuracies [n]."""
    found = []
    for source, values in (("predictions", pred), ("true scores", gt)):
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) == 1:
            found.append(
                f"All {source} are equal: they rank nothing, and no correlation is defined."
            )
            continue
        if counts.max() >= FEWEST and counts.max() > MANY_EQUAL * len(values):
            found.append(
                f"{counts.max():,} of {len(values):,} {source} are {distinct[counts.argmax()]:g}: "
                "placeholders? Among them nothing is ranked."
            )
    if len(gt) < 20:
        found.append(f"{len(gt)} architectures are few: intervals, if any, are wide and rough.")
    return found


def interpret_ranking(
    report: Mapping, predicted: np.ndarray, true: np.ndarray, counts: Mapping[str, np.ndarray]
) -> list[str]:
    """The figures in sentences; lists are [n]."""
    tau, attribution = report["correlations"]["kendall_tau_b"], report["attribution"]
    if tau["value"] is None:
        return ["Nothing can be said about the ranking."]
    if tau["low"] is None:
        return [
            f"Kendall's tau-b is {tau['value']:.3f}. The architectures are too few, or too many of "
            "them equal, to tell how far that can be trusted."
        ]
    if tau["low"] <= 0 <= tau["high"]:
        meaning = "The interval holds 0: these architectures do not show that it ranks at all."
    elif tau["value"] < 0:
        meaning = "It ranks upside down: what it prefers is worse, whatever |Pearson| is."
    else:
        meaning = (
            f"Of two architectures whose true scores differ, it puts about "
            f"{100 * right_order(predicted, true):.0f} in 100 pairs in the right order."
        )
    lines = [
        f"Kendall's tau-b is {tau['value']:.3f} ({tau['low']:.3f} to {tau['high']:.3f}). {meaning} "
        f"Taking the predicted best one costs {report['regret']:.4g} points of the true score."
    ]
    tau_of = {name: tau for name, tau in report["tau_of_counts"].items() if tau is not None}
    most = max(tau_of, key=tau_of.get, default="")
    if most:
        known = f"counting {COUNTED[most]}, which needs no training and has a tau-b of "
        known += f"{tau_of[most]:.3f}"
        if tau_of[most] >= tau["value"]:
            lines.append(f"It does not beat {known}.")
        elif not least_lead(predicted, counts[most], true, report["seed"], report["resamples"]) > 0:
            lines.append(f"These architectures do not show that it beats {known}.")
    found = largest_effect(attribution)
    if found is not None:
        what, change, explained = found
        lines.append(
            f"Its largest systematic error: the {what} is "
            f"{'overrated' if change > 0 else 'underrated'}. From the smallest to the "
            f"largest, the predicted rank rises {abs(change):.0f} % of all "
            f"ranks {'more' if change > 0 else 'less'} than the true one. All choices together "
            f"explain {explained} % of the errors' variance; the rest is other than depths and "
            "widths added up, or noise. Noise does this, too: of a noisy truth what matters most "
            "seems overrated, of noisy scores underrated."
        )
    elif attribution["explained"] is not None:
        lines.append("No choice of depth or width stands out in its errors.")
    return lines


def least_lead(pred: np.ndarray, other: np.ndarray, gt: np.ndarray, *seed_and_resamples) -> float:
    """The lower end of the lead in tau-b of predictions over others [n], on the same resamples."""

    def lead(rows: np.ndarray, gt: np.ndarray) -> float:
        own, others = (values[rows.astype(int)] for values in (pred, other))
        return kendall_tau_b(own, gt) - kendall_tau_b(others, gt)

    return bootstrap_interval(lead, np.arange(len(gt)), gt, *seed_and_resamples)[0]


# --- of scores alone


def analyse_scores(
    archs: Mapping[str, Architecture],
    accuracy: np.ndarray,
    costs: Mapping[str, np.ndarray],
    known: Estimates | None,
    rows: Sequence[int],
) -> dict:
    """All figures of a report on scores alone, as plain values; None where not defined.

    Args:
        archs, accuracy, costs: n by name, their scores in percent, ``macs`` and ``params``.
        known, rows: what ``estimates.json`` says, and where they are in it.
    """
    names, macs = list(archs), costs["macs"]
    images = error = agreement = group = None
    if known is not None:
        images, error = known.images, 100 * known.error[rows]
        group = as_good_as_best(with_ties(known.accuracy[rows]), known.folds[rows], images)
        # All images agree with themselves; of a part of the networks other pairs count.
        if known.images < known.of_images and known.agreement is not None:
            some = known.folds[rows], known.images, known.of_images
            of_these = (
                known.agreement if len(rows) == len(known.codes) else expected_agreement(*some)
            )
            agreement = of_these and {"images": known.of_images, **asdict(of_these)}

    def row(index: int) -> dict:
        return {
            "name": names[index],
            "arch": archs[names[index]].code,
            "accuracy": float(accuracy[index]),
            "standard_error": None if error is None else float(error[index]),
            "group": None if group is None else bool(group[index]),
            "macs": int(macs[index]),
            "params": int(costs["params"][index]),
        }

    front = pareto_front(accuracy, macs)
    few = np.linspace(0, len(front) - 1, min(BUDGETS, len(front))).astype(int)
    report = {
        "architectures": len(accuracy),
        "images": images,
        "accuracy": {
            "lowest": float(accuracy.min()),
            "median": float(np.median(accuracy)),
            "highest": float(accuracy.max()),
            "standard_deviation": float(accuracy.std(ddof=1)),
        },
        "standard_error": None if error is None else float(np.median(error)),
        "agreement": agreement,
        "tau_of_macs": none_if_nan(kendall_tau_b(macs, accuracy)),
        "group": None if group is None else int(group.sum()),
        "budgets": [row(index) for index in front[few]],
        "best": [row(index) for index in np.argsort(-accuracy, kind="stable")[:LISTED]],
        "attribution": attribute(choices(list(archs.values())), accuracy),
    }
    notes = notes_on_scores(accuracy)
    return {**report, "interpretation": interpret_scores(report), "notes": notes}


def interpret_scores(report: Mapping) -> list[str]:
    """The figures in sentences."""
    scores = report["accuracy"]
    lines = [
        f"{report['architectures']:,} architectures score {scores['lowest']:.2f} to "
        f"{scores['highest']:.2f} %, with a median of {scores['median']:.2f} % and a standard "
        f"deviation of {scores['standard_deviation']:.2f} percentage points."
    ]
    if report["group"] is not None:
        lines.append(
            f"{report['group']:,} of them are not worse than the best by more than their noise: "
            f"with about {100 * CONFIDENCE:.0f} % the truly best of all these is among them."
        )
    if report["standard_error"] is not None:
        lines.append(
            f"On {report['images']:,} images an accuracy has a standard error of about "
            f"{report['standard_error']:.2f} points as an estimate for other images. All "
            "architectures saw the same images, so that their differences are known better."
        )
    agreement = report["agreement"]
    if agreement is not None:
        lines.append(
            f"The ranking by these {report['images']:,} images is expected to agree with that by "
            f"all {agreement['images']:,} at a tau-b of {agreement['tau']:.3f} "
            f"({agreement['low']:.3f} to {agreement['high']:.3f})."
        )
    tau = report["tau_of_macs"]
    if tau is not None:
        lines.append(
            f"MACs alone would order {50 * (1 + tau):.0f} in 100 pairs as these scores do (tau-b "
            f"{tau:.3f}).".replace("-0.", "\N{MINUS SIGN}0.")
        )
    found = largest_effect(report["attribution"])
    if found is not None:
        what, change, explained = found
        lines.append(
            f"Depths and widths, added up, explain {explained} % of the scores' variance. The "
            f"{what} matters most: from the smallest to the largest, the others being equal, "
            f"accuracy {'rises' if change > 0 else 'falls'} by {abs(change):.2f} points."
        )
    return lines


def notes_on_scores(accuracy: np.ndarray) -> list[str]:
    """What a reader must know before trusting the figures."""
    distinct = len(np.unique(accuracy))
    if distinct == 1:
        return [f"All scores are {accuracy[0]:g} %: they rank nothing."]
    if distinct < len(accuracy) / 2:
        return [
            f"{len(accuracy):,} architectures share {distinct:,} different scores: more validation "
            "images would tell more of them apart."
        ]
    return []
