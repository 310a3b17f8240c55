"""How well predicted accuracies rank architectures: figures, plots, one HTML page.

    python -m hnas.tools.rank_report --pred submission.json --gt gt.json --out DIR

Both files have the organisers' form. --pred may also be macs or params: the counts of the
architectures in --gt, computed from their codes. DIR gets report.html (all of it), report.json
and the plots. The last line printed is a JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hnas.architecture_file import in_percent, read_accuracies, read_truth
from hnas.base.command_line import LARGEST_SIDE, OneLineParser, path_text, read_path, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import check_writable, replacing, write_json
from hnas.ranking.breakdown import DISCRETE, attribute, by_option, choices
from hnas.ranking.correlations import (
    RESAMPLES,
    correlations,
    none_if_nan,
    rank_errors,
    top_k,
)
from hnas.ranking.page import page, signed
from hnas.ranking.plots import breakdown_plot, rank_plot, scatter_plot
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
        "attribution": {
            "explained": none_if_nan(attribution.explained),
            "choices": {
                name: {
                    "correlation": none_if_nan(attribution.correlation[name]),
                    "effect": effect,
                    "standard_error": none_if_nan(attribution.standard_error[name]),
                }
                for name, effect in attribution.effect.items()
            },
        },
        "unmatched": {
            source: {"count": len(codes), "codes": codes[:LISTED]}
            for source, codes in (("pred", matched.only_in_pred), ("gt", matched.only_in_gt))
        },
    }
    return {**report, "interpretation": interpret(report), "notes": notes(matched)}


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


def interpret(report: Mapping) -> list[str]:
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
    clear = {
        name: row
        for name, row in report["attribution"]["choices"].items()
        if row["standard_error"] is not None and abs(row["effect"]) > 2 * row["standard_error"]
    }
    if clear:
        name, row = max(clear.items(), key=lambda item: abs(item[1]["effect"]))
        kind, stage = name.rsplit(" ", 1)
        lines.append(
            f"Its largest systematic error: the {kind} of stage {stage} is "
            f"{'overrated' if row['effect'] > 0 else 'underrated'}. From the smallest to the "
            f"largest, the predicted rank rises {signed(abs(row['effect']), 0)[1:]} % of all "
            f"ranks {'more' if row['effect'] > 0 else 'less'} than the true one."
        )
    elif report["attribution"]["explained"] is not None:
        lines.append("No choice of depth or width stands out as the cause of its errors.")
    return lines


def draw(matched: Matched, report: Mapping, pred: str) -> dict[str, bytes]:
    """The plots, as PNG by name."""
    values, label = matched.pred, "predicted accuracy"
    if pred in COUNTED:
        values, label = matched.pred / 1e6, f"{'MACs' if pred == 'macs' else 'parameters'}, million"
    elif values.min() >= 0 and values.max() <= 100:
        values, label = in_percent(values), "predicted accuracy, %"
    return {
        "scatter": scatter_plot(values, matched.gt, label, "true accuracy, %"),
        "ranks": rank_plot(matched.pred, matched.gt),
        "breakdown": breakdown_plot(report["by_option"]),
    }


def write_report(folder: Path, report: Mapping, plots: Mapping[str, bytes]) -> None:
    """Write ``report.html``, ``report.json`` and a PNG of each plot.

    Raises:
        UserError: the folder cannot be written.
    """
    for name, png in plots.items():
        with replacing(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    write_json(folder / "report.json", report)
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page(report, plots), encoding="utf-8")


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pred", type=path_text, required=True, help="predictions: JSON, or macs, or params"
    )
    parser.add_argument("--gt", type=path_text, required=True, help="true accuracies: JSON")
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
    gt = read_truth(options.gt)
    pred = predictions(options.pred, gt, space, options.image_size, options.num_classes)
    matched = match(pred, gt)
    report = {
        "pred": options.pred,
        "gt": options.gt,
        **analyse(matched, options.seed, options.resamples),
    }
    write_report(options.out, report, draw(matched, report, options.pred))
    sys.stdout.write(json.dumps(summary(report, options.out / "report.html")) + "\n")


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
