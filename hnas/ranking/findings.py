"""What a report finds: of predictions and a truth, and of scores alone.

Both ask what choices of depth and width do to a value, to accuracies or to *rank errors*: predicted
less true rank in percent of the number of architectures, positive where it is ranked too high.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from hnas.base.errors import UserError
from hnas.ranking.agreement import Estimates
from hnas.ranking.correlations import (
    RESAMPLES,
    correlations,
    kendall_tau_b,
    none_if_nan,
    rank_errors,
    top_k,
    with_ties,
)
from hnas.ranking.effects import DISCRETE, attribute, by_option, choices, largest_effect
from hnas.ranking.front import pareto_front
from hnas.search_space import Architecture

FEWEST = 3
"""Architectures that a report takes."""
TOP_K = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
LISTED, LISTED_CODES = 10, 5
MANY_EQUAL = 0.25
"""Share of accuracies with one value from which on they may not have been measured."""
BUDGETS = 8
"""How many budgets are told the best architecture of."""


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
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict:
    """All figures of a report, as plain values; None where something is not defined.

    Args:
        pred, gt: predictions in any unit, and true accuracies in percent.
        seed, resamples: of the bootstrap.

    Raises:
        UserError: fewer than three architectures are in both.
    """
    archs, predicted, true = match(pred, gt)
    errors = 100 * rank_errors(predicted, true) / len(true)
    chosen = choices(archs)
    best = [top_k(predicted, true, k) for k in TOP_K if k == 1 or k <= len(true) // 2]
    lonely = {
        "pred": [arch.code for arch in pred if arch not in gt],
        "gt": [arch.code for arch in gt if arch not in pred],
    }
    report = {
        "architectures": len(true),
        "resamples": resamples,
        "seed": seed,
        "correlations": correlations(predicted, true, seed, resamples),
        "top_k": [{**row, "regret": round(row["regret"], 6)} for row in best],
        "mean_absolute_rank_error": float(np.abs(errors).mean()),
        "by_option": {name: by_option(chosen[name], errors) for name in DISCRETE},
        "attribution": attribute(chosen, errors),
        "unmatched": {
            source: {"count": len(codes), "codes": codes[:LISTED_CODES]}
            for source, codes in lonely.items()
        },
    }
    notes = notes_on_ranking(predicted, true)
    missing = [f"{len(codes):,} only in --{source}" for source, codes in lonely.items() if codes]
    if missing:
        notes.append(f"Architectures without a partner are left out: {', '.join(missing)}.")
    return {**report, "interpretation": interpret_ranking(report), "notes": notes}


def notes_on_ranking(pred: np.ndarray, gt: np.ndarray) -> list[str]:
    """What a reader must know before trusting the figures of predictions and accuracies [n]."""
    found = []
    for source, values in (("predictions", pred), ("true accuracies", gt)):
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
        found.append(f"{len(gt)} architectures are few: the intervals are wide and only rough.")
    return found


def interpret_ranking(report: Mapping) -> list[str]:
    """The figures in sentences."""
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
            f"Of two architectures whose accuracies differ, it puts about "
            f"{50 * (1 + tau['value']):.0f} in 100 pairs in the right order."
        )
    lines = [
        f"Kendall's tau-b is {tau['value']:.3f} ({tau['low']:.3f} to {tau['high']:.3f}). {meaning} "
        f"Taking the predicted best one costs {report['top_k'][0]['regret']:.2f} percentage points "
        "of true accuracy."
    ]
    found = largest_effect(attribution)
    if found is not None:
        what, change, explained = found
        lines.append(
            f"Its largest systematic error: the {what} is "
            f"{'overrated' if change > 0 else 'underrated'}. From the smallest to the "
            f"largest, the predicted rank rises {abs(change):.0f} % of all "
            f"ranks {'more' if change > 0 else 'less'} than the true one. All choices together "
            f"explain {explained} % of the errors' variance; the rest is other than depths and "
            "widths added up, or noise."
        )
    elif attribution["explained"] is not None:
        lines.append("No choice of depth or width stands out as the cause of its errors.")
    return lines


# --- of scores alone


def budgets(macs: np.ndarray, number: int = BUDGETS) -> list[float]:
    """Round numbers of MACs from just above the cheapest architecture to the dearest.

    All have two significant digits of the largest one's size.
    """
    low, high = float(macs.min()), float(macs.max())
    digit = 10.0 ** (math.floor(math.log10(high)) - 1)
    ends = np.linspace(low, high, number + 1)[1:]
    return sorted({math.ceil(end / digit - 1e-9) * digit for end in ends})


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
    images = error = agreement = None
    if known is not None:
        images, error = known.images, 100 * known.error[rows]
        # All images agree with themselves.
        if known.agreement is not None and known.images < known.of_images:
            agreement = {"images": known.of_images, **asdict(known.agreement)}

    def row(index: int) -> dict:
        return {
            "name": names[index],
            "arch": archs[names[index]].code,
            "accuracy": float(accuracy[index]),
            "standard_error": None if error is None else float(error[index]),
            "macs": int(macs[index]),
            "params": int(costs["params"][index]),
        }

    chosen, front = choices(list(archs.values())), pareto_front(accuracy, macs)
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
        "front": [row(index) for index in front],
        "budgets": [
            {"macs": most, "best": row(front[np.searchsorted(macs[front], most, side="right") - 1])}
            for most in budgets(macs)
        ],
        "best": [row(index) for index in np.argsort(-accuracy, kind="stable")[:LISTED]],
        "by_option": {name: by_option(chosen[name], accuracy) for name in DISCRETE},
        "attribution": attribute(chosen, accuracy),
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
