"""Choose networks by scores that are there: best within a budget, Pareto front, who is as good.

    python -m hnas.tools.choose --submission output/demo/stage3/submission.json --max_macs 5e6 \\
        --backbone resnet48_mini --image_size 32 --num_classes 10 [--out DIR]

Nothing is evaluated, and Paddle is not needed. DIR gets choice.json (all networks within the
budget) and front.svg.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hnas.architecture_file import in_shares, read_scores
from hnas.base.command_line import OneLineParser, path_text, read_path, real_number, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_writable, replacing, write_json
from hnas.ranking.agreement import FOLDS, estimates_beside
from hnas.ranking.costs import UNITS, LatencyTable, costs_of, open_latency
from hnas.ranking.front import (
    CONFIDENCE,
    critical_value,
    difference_errors,
    error_of_hits,
    independent_difference,
    not_worse,
    pareto_front,
)
from hnas.search_space import Architecture, search_space
from hnas.tools.flops import add_network_flags

MOST = 1e15


@dataclass(frozen=True)
class Scores:
    """Networks with their accuracies."""

    archs: Mapping[str, Architecture]  # by name
    accuracy: np.ndarray  # shares of 1 [n]
    error: np.ndarray  # standard errors of them as estimates for more such images [n]
    images: np.ndarray  # how many each was scored on [n]
    folds: np.ndarray | None = None  # hits by fold, where all saw the same images [n, FOLDS]


def scores_of(path: str, images: int = 0) -> Scores:
    """The scores of a file, and their noise.

    Args:
        path: the organisers' form; accuracies as shares of 1, or in percent.
        images: how many each was scored on; 0: as the entries say, or estimates.json beside it.

    Raises:
        UserError: a wrong file, accuracies that are none, or a number of images that is not known.
    """
    archs, accuracy = read_scores(path)
    if len(archs) > 1 and np.ptp(accuracy) == 0:
        raise UserError(
            f"all accuracies of {path} are {accuracy[0]:g}: nothing to choose by; give stage 3's "
            "submission.json"
        )
    accuracy, folds = in_shares(accuracy), None
    content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    own = [entry.get("images") for entry in content.values()]
    if images:
        number = np.full(len(archs), images)
    elif all(type(count) is int and count > 0 for count in own):
        number = np.array(own)
    else:
        try:
            found, rows = estimates_beside(path, list(archs.values()), accuracy)
        except UserError as error:
            raise UserError(
                f"on how many images {path} was scored is not known: {error}; or give --images N"
            ) from None
        number, folds = np.full(len(archs), found.images), found.folds[rows]
    return Scores(archs, accuracy, error_of_hits(accuracy * number, number), number, folds)


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
    """The networks within the budget, best first; of equally accurate ones the cheaper first.

    Args:
        fits: bool [n].
        cost: the kind against which the front is drawn.

    Returns:
        For each its name, code, accuracy, standard error, images and costs, ``front``: whether it
        is Pareto-optimal among them, and ``group``: whether it is not worse than the best by more
        than their noise.
    """
    accuracy, error = scores.accuracy[fits], scores.error[fits]
    front = set(pareto_front(accuracy, costs[cost][fits]).tolist())
    if scores.folds is None:
        group = not_worse(accuracy, independent_difference(accuracy, error))
    else:
        best, images = int(np.argmax(accuracy)), int(scores.images[0])
        paired = difference_errors(scores.folds[fits], images, best)
        group = not_worse(accuracy, paired, freedom=FOLDS - 1)
    own = {kind: values[fits].tolist() for kind, values in costs.items()}
    names = np.array(list(scores.archs), object)[fits]
    number = scores.images[fits].tolist()
    return [
        {
            "name": names[i],
            "arch": scores.archs[names[i]].code,
            "acc": float(accuracy[i]),
            "se": round(float(error[i]), 6),
            "images": number[i],
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


def conclusions(chosen: Sequence[Mapping], scored: int, cost: str) -> str:
    """What the table's marks mean, and the networks that one may want."""
    group = [row for row in chosen if row["group"]]
    front = sum(row["front"] for row in chosen)
    cheapest = min(group, key=lambda row: row[cost])
    against = "latency" if cost == "latency" else UNITS[cost]

    def line(what: str, row: Mapping) -> str:
        spent = f"{figure(cost, row[cost])} {UNITS[cost]}"
        return f"{what:<9}{row['name']}: {row['acc']:.2%}, {spent}, {row['arch']}"

    return "\n".join(
        [
            f"{len(chosen):,} of {scored:,} networks within the budget; +- is the standard error",
            f"* {front:,} are on the Pareto front of accuracy and {against}",
            f"= {len(group):,} are not worse than the best by more than their noise: with "
            f"{CONFIDENCE:.0%} the truly best is among them",
            line("best", chosen[0]),
            line("cheapest", cheapest) + " (of those marked =)",
        ]
    )


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--submission", type=path_text, required=True, help="scores: stage 3's submission.json"
    )
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
    parser.add_argument(
        "--top", type=whole_number(1, 1_000_000), default=10, help="rows to print [default 10]"
    )
    parser.add_argument("--out", type=read_path, help="folder for choice.json and front.svg [none]")
    parser.add_argument(
        "--images",
        type=whole_number(1),
        default=0,
        help="that each network was scored on [default: as estimates.json beside the scores says]",
    )
    add_network_flags(parser)
    options = parser.parse_args(argv)
    if options.out:
        check_writable(options.out, "--out")

    asked_by = "--cost latency" if options.cost == "latency" else ""
    if options.max_latency_ms is not None:
        asked_by = "--max_latency_ms"
    size, classes = options.image_size, options.num_classes
    latency = open_latency(options.latency, options.backbone, size, asked_by=asked_by)
    cost = options.cost or ("macs" if latency is None else "latency")
    scores = scores_of(options.submission, options.images)
    space = search_space(options.backbone)
    costs = costs_of(scores.archs.values(), space, size, classes, latency)
    limits = {
        "macs": options.max_macs,
        "params": options.max_params,
        "latency": options.max_latency_ms,
    }
    budget = {kind: most for kind, most in limits.items() if most is not None}
    chosen = choose(scores, costs, within(costs, budget), cost)
    if options.out:
        # Takes a second to import.
        from hnas.ranking.figures import choice_panel

        label = UNITS[cost] if cost != "latency" else latency_label(latency)
        panel = choice_panel(
            costs[cost], 100 * scores.accuracy, chosen, cost, label, budget.get(cost)
        )
        with replacing(options.out / "front.svg") as temporary:
            temporary.write_text(panel.svg(alone=True))
        write_choice(options, len(scores.archs), cost, budget, chosen)
    shown = table(chosen, options.top, list(costs))
    sys.stdout.write(f"{shown}\n\n{conclusions(chosen, len(scores.archs), cost)}\n")


def latency_label(table: LatencyTable) -> str:
    """The axis of a latency: of what, and where it was measured."""
    about = table.about
    return (
        f"latency, ms ({about['processor']}, batch {about['batch_size']}, "
        f"{about['threads']} threads)"
    )


def write_choice(
    options, scored: int, cost: str, budget: Mapping, chosen: Sequence[Mapping]
) -> None:
    """Write ``choice.json``.

    Raises:
        UserError: the folder cannot be written.
    """
    content = {
        "submission": options.submission,
        "latency": options.latency,
        "backbone": options.backbone,
        "image_size": options.image_size,
        "num_classes": options.num_classes,
        "scored": scored,
        "budget": budget,
        "cost": cost,
        "confidence": CONFIDENCE,
        "critical_value": round(critical_value(len(chosen)), 6),
        "networks": chosen,
    }
    write_json(options.out / "choice.json", content)


if __name__ == "__main__":
    run_main(main)
