"""Learning rates of ``hnas.bench.rank``: of a few the same for all, what ranks selection best."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from hnas.base.errors import UserError
from hnas.base.files import read_json
from hnas.bench.rank.jobs import DEVELOPMENT_SEEDS, Bench, Job
from hnas.bench.rank.methods import COLUMNS, LEARNING_RATES, METHODS
from hnas.bench.rank.truth import Truth, selection_truth, unfinished
from hnas.ranking.correlations import kendall_tau_b, none_if_nan
from hnas.search_space import Architecture

logger = logging.getLogger(__name__)


def tuning_jobs(methods: Iterable[str]) -> list[Job]:
    """A supernet of every learning rate; a method's one after the other."""
    return [
        Job.supernet("selection", name, rate, DEVELOPMENT_SEEDS[0])
        for name in methods
        for rate in LEARNING_RATES
    ]


def scores_of(run: Mapping, column: str, archs: Iterable[Architecture]) -> list[int] | None:
    """A supernet's hits of some architectures; None if it diverged.

    Raises:
        UserError: it did not score one of them.
    """
    hits = {entry["arch"]: entry[column] for entry in run["archs"].values()}
    codes = [arch.code for arch in archs]
    missing = [code for code in codes if code not in hits]
    if not hits:
        return None
    if missing:
        raise UserError(
            f"a supernet did not score {len(missing)} architectures of the ground truth, such as "
            f"{missing[0]}; they were drawn otherwise"
        )
    return [hits[code] for code in codes]


def choose(bench: Bench, methods: Iterable[str]) -> dict[str, dict]:
    """For each method whose rates are all done, their taus and the rate of the highest.

    Of equal ones the lowest rate is taken. A rate at which training diverged has no tau, and a
    method that diverged at all of them no rate.

    Returns:
        ``{"first_place": {"taus": {"0.0067": 0.7, ...}, "chosen": 0.02}, ...}``

    Raises:
        UserError: the selection's ground truth is not finished.
    """
    truth = selection_truth(bench)
    return {
        name: _choice(bench, truth, name)
        for name in methods
        if not unfinished(bench, tuning_jobs([name]))
    }


def _choice(bench: Bench, truth: Truth, name: str) -> dict:
    taus, ranked = {}, {}
    for job in tuning_jobs([name]):
        scores = scores_of(bench.result(job), COLUMNS[job.method.scores], truth.archs.values())
        tau = None if scores is None else none_if_nan(kendall_tau_b(scores, truth.mean))
        taus[f"{job.rate:g}"] = tau
        if scores is not None:
            # Scores that are all equal are worse than any others.
            ranked[job.rate] = -2.0 if tau is None else tau
    if not ranked:
        logger.warning("%s diverged at every learning rate, so it cannot be compared", name)
        return {"taus": taus, "chosen": None}
    best = max(ranked, key=ranked.get)
    if taus[f"{best:g}"] is None:
        logger.warning("%s: all scores are equal, so its learning rate says nothing", name)
    return {"taus": taus, "chosen": best}


def read_rates(path: Path) -> dict[str, float]:
    """The learning rates that ``tune`` has chosen, by method.

    Raises:
        UserError: the file is something else.
    """
    content = read_json(path)
    try:
        rates = {name: choice["chosen"] for name, choice in content["methods"].items()}
    except (KeyError, TypeError, AttributeError):
        rates = {"": None}
    if set(rates) - set(METHODS) or set(rates.values()) - {*LEARNING_RATES, None}:
        raise UserError(f"{path} is no file of learning rates that this bench's tune has written")
    return {name: rate for name, rate in rates.items() if rate is not None}


def rates_of(path: Path, methods: Iterable[str]) -> dict[str, float]:
    """Of some methods, the chosen learning rates.

    Raises:
        UserError: one has none.
    """
    rates = read_rates(path) if path.exists() else {}
    for name in methods:
        if name not in rates:
            raise UserError(
                f"{path} has no learning rate of {name}; run tune with --methods {name} and the "
                "same --out first, name another file with --learning_rates, or, if it diverged, "
                "leave it out of --methods"
            )
    return {name: rates[name] for name in methods}


def related(rate: float, factor: float) -> float:
    """A rate times a factor, with two digits, so that a third of 0.02 is the rate 0.0067."""
    return float(f"{rate * factor:.2g}")
