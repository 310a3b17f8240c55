"""Choose networks by scores that are there: best within a budget, Pareto front, who is as good.

    python -m hnas.tools.choose --submission output/demo/stage3/submission.json --max_macs 5e6 \\
        --backbone resnet48_mini --image_size 32 --num_classes 10 [--out DIR]

Nothing is evaluated, and Paddle is not needed. DIR gets choice.json: all networks within the
budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hnas.architecture_file import in_shares, read_scores
from hnas.base.command_line import OneLineParser, path_text, read_path, real_number, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_writable, plain_text, print_text, write_json
from hnas.ranking.agreement import estimates_beside
from hnas.ranking.correlations import with_ties
from hnas.ranking.costs import (
    UNITS,
    LatencyTable,
    Network,
    add_network_flags,
    costs_of,
    network_of,
    open_latency,
)
from hnas.ranking.front import CONFIDENCE, as_good_as_best, pareto_front, student_value
from hnas.search_space import Architecture, search_space

MOST = 1e15


@dataclass(frozen=True)
class Scores:
    """Networks with their accuracies."""

    archs: Mapping[str, Architecture]  # by name
    accuracy: np.ndarray  # shares of 1 [n]
    error: np.ndarray  # standard errors of them as estimates for more such images [n]
    images: int  # that they were scored on
    folds: np.ndarray  # hits by fold [n, FOLDS]
    network: Network | None = None  # that was scored, where that is known


def scores_of(path: str) -> Scores:
    """The scores of a file, and their noise, which ``estimates.json`` beside it tells.

    Raises:
        UserError: a wrong file, accuracies that are none, or no such estimates.
    """
    archs, accuracy = read_scores(path)
    if len(archs) > 1 and np.ptp(with_ties(accuracy)) == 0:
        raise UserError(
            f"all accuracies of {path} are {accuracy[0]:g}: nothing to choose by; give stage 3's "
            "submission.json"
        )
    found, rows = estimates_beside(path, list(archs.values()), in_shares(accuracy))
    own = found.accuracy[rows], found.error[rows], found.images, found.folds[rows]
    return Scores(archs, *own, found.network)


def figure(kind: str, value: float) -> str:
    """A cost as text, without its unit."""
    return f"{value:,.3f}" if kind == "latency" else f"{value:,}"


def within(costs: Mapping[str, np.ndarray], budget: Mapping[str, float]) -> np.ndarray:
    """Which networks cost at most what ``budget`` says of each kind; bool [n].

    Raises:
        UserError: none does.
    """
    fits = np.full(len(costs["macs"]), True)
    for kind, most in budget.items():
        fits &= costs[kind] <= most
    if not fits.any():
        least = ", ".join(f"{figure(kind, costs[kind].min())} {UNITS[kind]}" for kind in budget)
        asked = ", ".join(f"{most:,.10g} {UNITS[kind]}" for kind, most in budget.items())
        raise UserError(
            f"none of {len(fits):,} networks is within {asked}; the least there is: {least}"
        )
    return fits


def choose(
    scores: Scores, costs: Mapping[str, np.ndarray], fits: np.ndarray, cost: str
) -> list[dict]:
    """The networks that ``fits`` [n], best first; of equally accurate ones the cheaper first.

    Returns:
        For each its name, code, accuracy, standard error, images and costs, ``front``: whether
        accuracy and this kind of ``cost`` are Pareto-optimal among them, and ``group``: whether it
        is not worse than the best by more than their noise.
    """
    accuracy, error = with_ties(scores.accuracy[fits]), scores.error[fits]
    front = set(pareto_front(accuracy, costs[cost][fits]).tolist())
    group = as_good_as_best(accuracy, scores.folds[fits], scores.images)
    own = {kind: values[fits].tolist() for kind, values in costs.items()}
    names = np.array(list(scores.archs), object)[fits]
    return [
        {
            "name": names[i],
            "arch": scores.archs[names[i]].code,
            "acc": float(accuracy[i]),
            "se": round(float(error[i]), 6),
            "images": scores.images,
            **{kind: values[i] for kind, values in own.items()},
            "front": int(i) in front,
            "group": bool(group[i]),
        }
        for i in np.lexsort((costs[cost][fits], -accuracy))
    ]


def table(chosen: Sequence[Mapping], top: int, costs: Sequence[str]) -> str:
    """The first ``top`` of what :func:`choose` gives, as text."""
    rows = [["network", "top-1", "+-", *(UNITS[kind] for kind in costs), "front", "group"]]
    for row in chosen[:top]:
        spent = [figure(kind, row[kind]) for kind in costs]
        marks = ["*" if row["front"] else "", "=" if row["group"] else ""]
        rows.append([row["name"], f"{row['acc']:.2%}", f"{row['se']:.2%}", *spent, *marks])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def conclusions(
    chosen: Sequence[Mapping], scored: int, cost: str, latency: LatencyTable | None
) -> str:
    """What the table's marks mean, and the networks that one may want."""
    group = [row for row in chosen if row["group"]]
    front = sum(row["front"] for row in chosen)
    cheapest, axis = min(group, key=lambda row: row[cost]), UNITS[cost]
    if cost == "latency":
        machine = "{processor}, batch {batch_size}, {threads} threads".format_map(latency.about)
        axis = plain_text(f"latency, ms ({machine})")

    def line(what: str, row: Mapping) -> str:
        spent = f"{figure(cost, row[cost])} {UNITS[cost]}"
        return f"{what:<9}{row['name']}: {row['acc']:.2%}, {spent}, {row['arch']}"

    return "\n".join(
        [
            f"{len(chosen):,} of {scored:,} networks within the budget; +- is the standard error",
            f"* {front:,} are on the Pareto front of accuracy and {axis}",
            f"= {len(group):,} are not worse than the best by more than their noise: with about "
            f"{CONFIDENCE:.0%} the truly best is among them",
            line("best", chosen[0]),
            line("cheapest", cheapest) + " (of those marked =)",
        ]
    )


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--submission", type=path_text, required=True, help="stage 3's scores")
    parser.add_argument("--max_macs", type=real_number(1, MOST), help="MACs an image [any]")
    parser.add_argument("--max_params", type=real_number(1, MOST), help="parameters [any]")
    parser.add_argument(
        "--max_latency_ms", type=real_number(0, MOST), help="of a batch, by --latency [any]"
    )
    parser.add_argument("--latency", type=path_text, help="what hnas.tools.latency wrote [none]")
    parser.add_argument(
        "--cost",
        choices=UNITS,
        help="the front's other axis [default: latency with --latency, else macs]",
    )
    parser.add_argument("--top", type=whole_number(1, 1_000_000), default=10, help="rows to print")
    parser.add_argument("--out", type=read_path, help="folder for choice.json [none]")
    batch = whole_number(1, 100_000)
    parser.add_argument("--batch_size", type=batch, help="that --latency must be of [any]")
    add_network_flags(parser)
    options = parser.parse_args(argv)
    if options.out:
        check_writable(options.out, "--out")

    asked_by = "--cost latency" if options.cost == "latency" else ""
    if options.max_latency_ms is not None:
        asked_by = "--max_latency_ms"
    scores = scores_of(options.submission)
    network = network_of(options, scores.network, options.submission)
    wanted = {"batch_size": options.batch_size} if options.batch_size else {}
    latency = open_latency(options.latency, network._asdict() | wanted, asked_by)
    cost = options.cost or ("macs" if latency is None else "latency")
    space = search_space(network.backbone)
    costs = costs_of(scores.archs.values(), space, *network[1:], latency)
    limits = zip(UNITS, (options.max_macs, options.max_params, options.max_latency_ms), strict=True)
    budget = {kind: most for kind, most in limits if most is not None}
    chosen = choose(scores, costs, within(costs, budget), cost)
    if options.out:
        content = {
            "submission": options.submission,
            "latency": options.latency,
            **network._asdict(),
            "scored": len(scores.archs),
            "budget": budget,
            "cost": cost,
            "confidence": CONFIDENCE,
            "critical_value": round(student_value(len(chosen)), 6),
            "networks": chosen,
        }
        write_json(options.out / "choice.json", content)
    shown = table(chosen, options.top, list(costs))
    print_text(f"{shown}\n\n{conclusions(chosen, len(scores.archs), cost, latency)}\n")


if __name__ == "__main__":
    run_main(main)
