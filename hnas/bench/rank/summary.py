"""The figures of ``hnas.bench.rank``, all in one file: which comparisons there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hnas.base.errors import UserError
from hnas.bench.rank.changes import breaking_part, compare_changes, improved_part
from hnas.bench.rank.comparison import TAU, Entry, compare
from hnas.bench.rank.jobs import Bench, Job
from hnas.bench.rank.methods import (
    COLUMNS,
    FORMER,
    FORMER_FINALISTS,
    FORMER_REFERENCE,
    FORMER_TRIAL,
    LEARNING_RATES,
    METHODS,
    REFERENCE,
)
from hnas.bench.rank.truth import Truth, describe_truth
from hnas.bench.rank.tuning import choose


def final_entries(bench: Bench, rates: Mapping[str, float]) -> dict[str, Entry]:
    """The announced comparison: of all methods that have a learning rate."""
    return {
        name: Entry(
            METHODS[name].title,
            METHODS[name].about,
            [Job.supernet("final", name, rate, seed) for seed in range(bench.scale.seeds(name))],
            METHODS[name].scores,
        )
        for name, rate in rates.items()
    }


def former_entries(names: Sequence[str], seeds: Mapping[str, int]) -> dict[str, Entry]:
    """Former methods by both kinds of scores."""
    return {
        f"{name} {scores}": Entry(
            FORMER[name] + (", re-calibrated" if scores == "calibrated" else ""),
            f"{name}, at batch statistics" if name != "first_place" else name,
            [Job("supernet", name, seed) for seed in range(seeds[name])],
            scores,
        )
        for name in names
        for scores in COLUMNS
    }


def former_comparisons(bench: Bench) -> dict[str, dict]:
    """Of the committed runs of former methods, those that are there.

    ``held_out`` are the finalists on all that was held out, ``seen`` all on what all are scored on,
    ``selection`` a trial of two seeds.
    """
    seeds = dict.fromkeys(FORMER, 3) | dict.fromkeys(FORMER_FINALISTS, 8)
    seeds |= dict.fromkeys(FORMER_TRIAL, 2)
    every = [name for name in FORMER if name not in FORMER_TRIAL]
    found = {
        part: compare(bench, splits, former_entries(names, seeds), reference)
        for part, splits, names, reference in (
            ("held_out", ("seen", "sealed"), FORMER_FINALISTS, f"{FORMER_REFERENCE} calibrated"),
            ("seen", ("seen",), every, f"{FORMER_REFERENCE} calibrated"),
            ("selection", ("selection",), FORMER_TRIAL, f"{FORMER_TRIAL[0]} plain"),
        )
    }
    return {part: own for part, own in found.items() if "unfinished" not in own}


def summarize(bench: Bench, rates: Mapping[str, float]) -> dict:
    """All figures, as plain values.

    Args:
        bench: where the runs are.
        rates: the learning rates that were chosen; of all or some of the compared methods.

    Raises:
        UserError: there is nothing yet.
    """
    truth = Truth.of_bench(bench, ("selection",))
    summary = {
        "ground_truth": {
            split: describe_truth(own)
            for split in ("selection", "seen", "sealed", "final")
            if bench.of_splits((split,)) and (own := Truth.of_bench(bench, (split,)))
        },
        "tuning": choose(bench, METHODS) if truth else {},
        "final": {"unfinished": "learning rates"},
        "changes": {"unfinished": "learning rates"},
        "changes_at": {},
        "improved": {"unfinished": "learning rates"},
        "breaking": {"unfinished": "learning rates"},
        "former": former_comparisons(bench) if bench.of_splits(("seen", "sealed")) else {},
    }
    announced = final_entries(bench, rates)
    if rates:
        summary["final"] = compare(bench, ("final",), announced, REFERENCE)
    if REFERENCE in rates:
        rate = rates[REFERENCE]
        summary["changes"] = compare_changes(bench, rate)
        others = {f"{own:g}": compare_changes(bench, own) for own in LEARNING_RATES if own != rate}
        summary["changes_at"] = {
            own: compared for own, compared in others.items() if "unfinished" not in compared
        }
        summary["breaking"] = breaking_part(bench, rate)
        summary["improved"] = improved_part(bench, rate, summary["changes"], announced)
    if not summary["ground_truth"]:
        raise UserError(f"{bench.folder} has no ground truth yet; run ground_truth first")
    return summary


def headline(summary: Mapping) -> dict:
    """What the program prints: taus, best first, and the reference's lead over each."""
    found = {}
    for part in ("final", "changes", "improved", "breaking", *summary["former"]):
        own = summary["former"].get(part) or summary[part]
        if "methods" not in own:
            found[part] = {key: own[key] for key in ("chosen", "unfinished") if key in own}
            continue
        taus = {name: one[TAU] for name, one in own["methods"].items() if TAU in one}
        ranked = sorted(taus, key=lambda name, taus=taus: -(taus[name]["value"] or -1))
        found[part] = {
            "tau": {name: _rounded(taus[name]) for name in ranked},
            f"{own['reference']} leads by": {
                name: _rounded(own["methods"][name]["reference_leads_by"][TAU])
                for name in ranked
                if "reference_leads_by" in own["methods"][name]
            },
        }
    return found


def _rounded(estimate: Mapping) -> list[float | None]:
    """Value and ends of the interval."""
    ends = (estimate[key] for key in ("value", "low", "high"))
    return [None if end is None else round(end, 3) for end in ends]
