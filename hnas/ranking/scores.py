"""What the scores of an own run say without any ground truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hnas.ranking.breakdown import DISCRETE, Attribution, attribute, by_option, choices
from hnas.ranking.correlations import kendall_tau_b, none_if_nan
from hnas.ranking.front import pareto_front
from hnas.search_space import Architecture

BUDGETS = 8
"""How many budgets are told the best architecture of."""
LISTED = 10


@dataclass(frozen=True)
class Scores:
    """Architectures with what a supernet scored them at.

    Attributes:
        names: of the architectures.
        archs: the architectures.
        accuracy: in percent [n].
        macs, params: multiply-accumulates of an image, and parameters [n].
        error: standard errors of the accuracies in percentage points [n], or None.
        images: how many each was scored on, or None.
        agreement: how well the ranking agrees with that by more images: ``images`` of them,
            ``tau`` with its interval from ``low`` to ``high``; or None.
    """

    names: Sequence[str]
    archs: Sequence[Architecture]
    accuracy: np.ndarray
    macs: np.ndarray
    params: np.ndarray
    error: np.ndarray | None = None
    images: int | None = None
    agreement: Mapping | None = None

    def row(self, index: int) -> dict:
        """One of them, for JSON."""
        return {
            "name": self.names[index],
            "arch": self.archs[index].code,
            "accuracy": float(self.accuracy[index]),
            "standard_error": None if self.error is None else float(self.error[index]),
            "macs": int(self.macs[index]),
            "params": int(self.params[index]),
        }


def budgets(macs: np.ndarray, number: int = BUDGETS) -> list[float]:
    """Round numbers of MACs from just above the cheapest architecture to the dearest.

    All have two significant digits of the largest one's size.
    """
    low, high = float(macs.min()), float(macs.max())
    digit = 10.0 ** (math.floor(math.log10(high)) - 1)
    ends = np.linspace(low, high, number + 1)[1:]
    return sorted({math.ceil(end / digit - 1e-9) * digit for end in ends})


def analyse_scores(scores: Scores) -> dict:
    """All figures of a report on scores alone, as plain values; None where not defined."""
    accuracy = scores.accuracy
    chosen = choices(scores.archs)
    effects = attribute(chosen, accuracy)
    by_macs = pareto_front(accuracy, scores.macs)
    report = {
        "architectures": len(accuracy),
        "images": scores.images,
        "accuracy": {
            "lowest": float(accuracy.min()),
            "median": float(np.median(accuracy)),
            "highest": float(accuracy.max()),
            "standard_deviation": float(accuracy.std(ddof=1)),
        },
        "standard_error": None if scores.error is None else float(np.median(scores.error)),
        "agreement": None if scores.agreement is None else dict(scores.agreement),
        "tau_of_macs": none_if_nan(kendall_tau_b(scores.macs, accuracy)),
        "front": [scores.row(index) for index in by_macs],
        "budgets": [
            {
                "macs": budget,
                "best": scores.row(_last_within(scores.macs[by_macs], by_macs, budget)),
            }
            for budget in budgets(scores.macs)
        ],
        "best": [scores.row(index) for index in np.argsort(-accuracy, kind="stable")[:LISTED]],
        "by_option": {name: by_option(chosen[name], accuracy) for name in DISCRETE},
        "attribution": effects.record(),
    }
    return {
        **report,
        "interpretation": interpret(report, effects),
        "notes": notes(accuracy),
    }


def _last_within(costs: np.ndarray, front: np.ndarray, budget: float) -> int:
    return int(front[np.searchsorted(costs, budget, side="right") - 1])


def interpret(report: Mapping, effects: Attribution) -> list[str]:
    """The figures in sentences."""
    found = report["accuracy"]
    lines = [
        f"{report['architectures']:,} architectures score {found['lowest']:.2f} to "
        f"{found['highest']:.2f} %, with a median of {found['median']:.2f} % and a standard "
        f"deviation of {found['standard_deviation']:.2f} percentage points."
    ]
    if report["standard_error"] is not None:
        lines.append(
            f"On {report['images']:,} images an accuracy has a standard error of about "
            f"{report['standard_error']:.2f} points as an estimate for other images. All "
            "architectures saw the same images, so that their differences are known better."
        )
    agreement = report["agreement"]
    if agreement is not None and agreement["images"] != report["images"]:
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
    clear = effects.clear()
    if clear:
        kind, stage = clear[0].rsplit(" ", 1)
        change = effects.effect[clear[0]]
        lines.append(
            f"Depths and widths, added up, explain {100 * effects.explained:.0f} % of the scores' "
            f"variance. The {kind} of stage {stage} matters most: from the smallest to the "
            f"largest, the others being equal, accuracy {'rises' if change > 0 else 'falls'} by "
            f"{abs(change):.2f} points."
        )
    return lines


def notes(accuracy: np.ndarray) -> list[str]:
    """What a reader must know before trusting the figures."""
    if np.ptp(accuracy) == 0:
        return [f"All scores are {accuracy[0]:g} %: they rank nothing."]
    distinct = len(np.unique(accuracy))
    if distinct < len(accuracy) / 2:
        return [
            f"{len(accuracy):,} architectures share {distinct:,} different scores: more validation "
            "images would tell more of them apart."
        ]
    return []
