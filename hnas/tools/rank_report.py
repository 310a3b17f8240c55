"""How well predicted accuracies rank architectures, or what they say alone: one HTML page.

    python -m hnas.tools.rank_report --pred submission.json --gt gt.json --out DIR
    python -m hnas.tools.rank_report --pred submission.json --out DIR

Files have the organisers' form. With --gt, true accuracies, --pred may also be macs or params: the
counts of the architectures in --gt, computed from their codes. Without, the page tells what the
scores of a run say by themselves; standard errors come from stage 3's estimates.json beside it. DIR
gets report.html (all of it), report.json and the plots. The last line printed is a JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hnas.architecture_file import in_percent, read_accuracies, read_percent, read_truth
from hnas.base.command_line import LARGEST_SIDE, OneLineParser, path_text, read_path, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_writable, read_json, replacing, write_json
from hnas.ranking.breakdown import DISCRETE, Attribution, attribute, by_option, choices
from hnas.ranking.correlations import RESAMPLES, correlations, rank_errors, top_k
from hnas.ranking.figures import (
    distribution_panel,
    front_panel,
    option_panels,
    rank_panel,
    scatter_panel,
)
from hnas.ranking.front import pareto_front
from hnas.ranking.report_pages import ranking_page, scores_page
from hnas.ranking.scores import Scores, analyse_scores
from hnas.ranking.svg import Panel
from hnas.search_space import Architecture, SearchSpace, search_space

FEWEST = 3
COUNTED = ("macs", "params")
TOP_K = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
LISTED = 5
MANY_EQUAL = 0.25
"""Share of accuracies with one value from which on they may not have been measured."""


@dataclass
class Matched:
    """Architectures that have both a predicted and a true accuracy.

    Attributes:
        archs: the architectures.
        pred, gt: what is predicted, in the file's unit, and the true accuracies in percent [n].
        only_in_pred, only_in_gt: codes of the others.
    """

    archs: list[Architecture]
    pred: np.ndarray
    gt: np.ndarray
    only_in_pred: list[str]
    only_in_gt: list[str]


def match(pred: Mapping[Architecture, float], gt: Mapping[Architecture, float]) -> Matched:
    """Pair what two files say about the same architectures, in the order of ``gt``.

    Raises:
        UserError: fewer than three are in both.
    """
    archs = [arch for arch in gt if arch in pred]
    if len(archs) < FEWEST:
        raise UserError(
            f"--pred and --gt share {len(archs)} architectures ({len(pred)} and {len(gt)} are in "
            f"them); a ranking needs at least {FEWEST}"
        )
    return Matched(
        archs,
        np.array([pred[arch] for arch in archs], np.float64),
        np.array([gt[arch] for arch in archs], np.float64),
        [arch.code for arch in pred if arch not in gt],
        [arch.code for arch in gt if arch not in pred],
    )


def predictions(
    pred: str, archs: Iterable[Architecture], space: SearchSpace, size: int, classes: int
) -> dict[Architecture, float]:
    """What a file predicts, or for ``macs`` and ``params`` the counts of ``archs``."""
    if pred == "macs":
        return {arch: float(space.macs(arch, size, classes)) for arch in archs}
    if pred == "params":
        return {arch: float(space.params(arch, classes)) for arch in archs}
    found, accuracies = read_accuracies(pred)
    return dict(zip(found.values(), accuracies.tolist(), strict=True))


def analyse(matched: Matched, seed: int = 0, resamples: int = RESAMPLES) -> dict:
    """All figures of a report, as plain values; None where something is not defined."""
    pred, gt = matched.pred, matched.gt
    errors = 100 * rank_errors(pred, gt) / len(gt)
    chosen = choices(matched.archs)
    attribution = attribute(chosen, errors)
    found = correlations(pred, gt, seed, resamples)
    ks = [k for k in TOP_K if k == 1 or k <= len(gt) // 2]
    best = [top_k(pred, gt, k) for k in ks]
    report = {
        "architectures": len(gt),
        "resamples": resamples,
        "seed": seed,
        "correlations": found,
        "top_k": [{**asdict(row), "regret": round(row.regret, 6)} for row in best],
        "mean_absolute_rank_error": float(np.abs(errors).mean()),
        "by_option": {name: by_option(chosen[name], errors) for name in DISCRETE},
        "attribution": attribution.record(),
        "unmatched": {
            source: {"count": len(codes), "codes": codes[:LISTED]}
            for source, codes in (("pred", matched.only_in_pred), ("gt", matched.only_in_gt))
        },
    }
    return {**report, "interpretation": interpret(report, attribution), "notes": notes(matched)}


def notes(matched: Matched) -> list[str]:
    """What a reader must know before trusting the figures."""
    found = []
    for source, values in (("predictions", matched.pred), ("true accuracies", matched.gt)):
        if np.ptp(values) == 0:
            found.append(
                f"All {source} are equal: they rank nothing, and no correlation is defined."
            )
            continue
        distinct, counts = np.unique(values, return_counts=True)
        if counts.max() >= FEWEST and counts.max() > MANY_EQUAL * len(values):
            found.append(
                f"{counts.max():,} of {len(values):,} {source} are {distinct[counts.argmax()]:g}: "
                "placeholders? Among them nothing is ranked."
            )
    missing = [
        f"{len(codes):,} only in {source}"
        for source, codes in (("--pred", matched.only_in_pred), ("--gt", matched.only_in_gt))
        if codes
    ]
    if missing:
        found.append(f"Architectures without a partner are left out: {', '.join(missing)}.")
    if len(matched.gt) < 20:
        found.append(
            f"{len(matched.gt)} architectures are few: the intervals are wide and only rough."
        )
    return found


def interpret(report: Mapping, attribution: Attribution) -> list[str]:
    """The figures in sentences."""
    tau = report["correlations"]["kendall_tau_b"]
    if tau["value"] is None:
        return ["Nothing can be said about the ranking."]
    if tau["low"] is None:
        return [
            f"Kendall's tau-b is {tau['value']:.3f}. The architectures are too few, or too many of "
            "them equal, to tell how far that can be trusted."
        ]
    lines = [f"Kendall's tau-b is {tau['value']:.3f} ({tau['low']:.3f} to {tau['high']:.3f})."]
    if tau["low"] <= 0 <= tau["high"]:
        lines[0] += " The interval holds 0: these architectures do not show that it ranks at all."
    elif tau["value"] < 0:
        lines[0] += " It ranks the wrong way round: what it prefers is worse."
    else:
        lines[0] += (
            f" Of two architectures whose accuracies differ, it puts about "
            f"{50 * (1 + tau['value']):.0f} in 100 pairs in the right order."
        )
    first = report["top_k"][0]
    lines[0] += (
        f" Taking the predicted best one costs {first['regret']:.2f} percentage points of true "
        "accuracy."
    )
    clear = attribution.clear()
    if clear:
        name, change = clear[0], attribution.effect[clear[0]]
        kind, stage = name.rsplit(" ", 1)
        lines.append(
            f"Its largest systematic error: the {kind} of stage {stage} is "
            f"{'overrated' if change > 0 else 'underrated'}. From the smallest to the "
            f"largest, the predicted rank rises {abs(change):.0f} % of all "
            f"ranks {'more' if change > 0 else 'less'} than the true one. All choices together "
            f"explain {100 * attribution.explained:.0f} % of the errors' variance; the rest is "
            "other than depths and widths added up, or noise."
        )
    elif report["attribution"]["explained"] is not None:
        lines.append("No choice of depth or width stands out as the cause of its errors.")
    return lines


def draw(matched: Matched, report: Mapping, pred: str) -> dict[str, list[Panel]]:
    """The figures, by name."""
    values, label = matched.pred, "predicted accuracy"
    if pred in COUNTED:
        values, label = matched.pred / 1e6, f"{'MACs' if pred == 'macs' else 'parameters'}, million"
    elif values.min() >= 0 and values.max() <= 100:
        values, label = in_percent(values), "predicted accuracy, %"
    return {
        "scatter": [scatter_panel(values, matched.gt, label, "true accuracy, %")],
        "ranks": [rank_panel(matched.pred, matched.gt)],
        "breakdown": option_panels(report["by_option"], "rank error, %"),
    }


def read_scores(path: str, space: SearchSpace, size: int, classes: int) -> tuple[Scores, list[str]]:
    """The scores of a file, and what is not known of them.

    Standard errors, the number of images and the ranking's agreement come from ``estimates.json``
    beside the file, which stage 3 writes, if it is of the same scores.

    Raises:
        UserError: a wrong file, fewer than three architectures, or an accuracy outside of 0 to 100.
    """
    if path in COUNTED:
        raise UserError(f"--pred {path} needs --gt, whose architectures it counts")
    named, accuracy = read_percent(path)
    names, archs = [*named], [*named.values()]
    if len(names) < FEWEST:
        raise UserError(f"{path} has {len(names)} architectures; a report needs at least {FEWEST}")
    macs = np.array([space.macs(arch, size, classes) for arch in archs], np.float64)
    params = np.array([space.params(arch, classes) for arch in archs], np.float64)
    known = {"error": None, "images": None, "agreement": None}
    missing = "Standard errors are not known: "
    beside = Path(path).with_name("estimates.json")
    if not beside.is_file():
        unknown = [f"{missing}there is no estimates.json of stage 3 beside the scores."]
    else:
        found = estimates_of(read_json(beside), archs, accuracy)
        known, unknown = found or known, []
        if found is None:
            unknown = [f"{missing}{beside} is of other scores."]
    return Scores(names, archs, accuracy, macs, params, **known), unknown


def estimates_of(content, archs: list[Architecture], accuracy: np.ndarray) -> dict | None:
    """What ``estimates.json`` knows of scores besides accuracies; None: it is of others."""
    try:
        rows = {entry["arch"]: entry for entry in content["architectures"].values()}
        own = [rows[arch.code] for arch in archs]
        same = np.array_equal(in_percent(np.array([float(row["acc"]) for row in own])), accuracy)
        error = 100 * np.array([float(row["se"]) for row in own])
        images = int(content["images"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    same = same and images > 0 and np.isfinite(error).all()
    if not same:
        return None
    return {"error": error, "images": images, "agreement": agreement_of(content)}


def agreement_of(content: Mapping) -> dict | None:
    """How well a ranking agrees with that by all images, where ``estimates.json`` tells it."""
    found = content.get("agreement")
    if not isinstance(found, dict):
        return None
    record = {name: found.get(name) for name in ("images", "tau", "low", "high")}
    return record if all(type(value) in (int, float) for value in record.values()) else None


def draw_scores(scores: Scores, report: Mapping) -> dict[str, list[Panel]]:
    """The figures, by name."""
    costs = {"MACs, million": scores.macs, "parameters, million": scores.params}
    return {
        "distribution": [distribution_panel(scores.accuracy, "score, %")],
        "front": [
            front_panel(
                cost / 1e6,
                scores.accuracy,
                pareto_front(scores.accuracy, cost),
                (label, "score, %"),
            )
            for label, cost in costs.items()
        ],
        "influence": option_panels(report["by_option"], "score, %"),
    }


def write_report(
    folder: Path, report: Mapping, figures: Mapping[str, list[Panel]], page: str
) -> None:
    """Write ``report.html``, ``report.json`` and an SVG of each panel.

    Raises:
        UserError: the folder cannot be written.
    """
    for name, panels in figures.items():
        for number, panel in enumerate(panels, 1):
            own = name if len(panels) == 1 else f"{name}_{number}"
            with replacing(folder / f"{own}.svg") as temporary:
                temporary.write_text(panel.svg(alone=True), encoding="utf-8")
    write_json(folder / "report.json", report)
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pred", type=path_text, required=True, help="predictions: JSON, or macs, or params"
    )
    parser.add_argument(
        "--gt", type=path_text, help="true accuracies: JSON [none: the scores alone]"
    )
    parser.add_argument("--out", required=True, type=read_path, help="folder to write")
    parser.add_argument("--backbone", default="resnet48", help="for macs and params [resnet48]")
    parser.add_argument(
        "--image_size", type=whole_number(32, LARGEST_SIDE), default=224, help="for macs [224]"
    )
    parser.add_argument(
        "--num_classes",
        type=whole_number(1, 1_000_000),
        default=1000,
        help="for macs and params [1000]",
    )
    parser.add_argument(
        "--resamples",
        type=whole_number(1, 1_000_000),
        default=RESAMPLES,
        help="of the bootstrap [1000]",
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the bootstrap [0]")
    options = parser.parse_args(argv)
    check_writable(options.out, "--out")

    space = search_space(options.backbone)
    html = options.out / "report.html"
    if not options.gt:
        found = report_scores(options, space)
        sys.stdout.write(json.dumps({**found, "report": str(html)}) + "\n")
        return
    gt = read_truth(options.gt)
    pred = predictions(options.pred, gt, space, options.image_size, options.num_classes)
    matched = match(pred, gt)
    report = {
        "pred": options.pred,
        "gt": options.gt,
        **analyse(matched, options.seed, options.resamples),
    }
    figures = draw(matched, report, options.pred)
    write_report(options.out, report, figures, ranking_page(report, figures))
    sys.stdout.write(json.dumps(summary(report, html)) + "\n")


def report_scores(options, space: SearchSpace) -> dict:
    """Write the report on scores alone.

    Returns:
        The line that is printed, without where the report is.
    """
    size, classes = options.image_size, options.num_classes
    scores, unknown = read_scores(options.pred, space, size, classes)
    found = analyse_scores(scores)
    report = {
        "pred": options.pred,
        "backbone": options.backbone,
        "image_size": size,
        "num_classes": classes,
        **found,
        "notes": [*found["notes"], *unknown],
    }
    figures = draw_scores(scores, report)
    write_report(options.out, report, figures, scores_page(report, figures))
    shown = ("pred", "architectures", "images", "accuracy", "standard_error", "agreement")
    return {
        **{name: report[name] for name in (*shown, "tau_of_macs")},
        "explained": report["attribution"]["explained"],
        "notes": report["notes"],
    }


def summary(report: Mapping, html: Path) -> dict:
    """The line that is printed."""
    return {
        "pred": report["pred"],
        "gt": report["gt"],
        "architectures": report["architectures"],
        "only_in_pred": report["unmatched"]["pred"]["count"],
        "only_in_gt": report["unmatched"]["gt"]["count"],
        **report["correlations"],
        "resamples": report["resamples"],
        "top_k": report["top_k"],
        "mean_absolute_rank_error": report["mean_absolute_rank_error"],
        "explained": report["attribution"]["explained"],
        "notes": report["notes"],
        "report": str(html),
    }


if __name__ == "__main__":
    run_main(main)
