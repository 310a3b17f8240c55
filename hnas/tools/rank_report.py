"""How well predicted accuracies rank architectures, or what they say alone: one HTML page.

    python -m hnas.tools.rank_report --pred submission.json --gt gt.json --out DIR
    python -m hnas.tools.rank_report --pred submission.json --out DIR

Files have the organisers' form. With --gt, true accuracies, --pred may also be macs or params: the
counts of the architectures in --gt, computed from their codes. Without, the page tells what the
scores of a run say by themselves; standard errors come from stage 3's estimates.json beside it. DIR
gets report.html (all of it) and report.json. The last line printed is a JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from hnas.architecture_file import (
    check_one_unit,
    in_percent,
    in_shares,
    read_accuracies,
    read_scores,
    read_truth,
)
from hnas.base.command_line import OneLineParser, path_text, read_path, whole_number
from hnas.base.errors import UserError, run_main, shortened
from hnas.base.files import check_writable, print_text, write_json, write_text
from hnas.ranking.agreement import estimates_beside
from hnas.ranking.correlations import RESAMPLES, with_ties
from hnas.ranking.costs import add_network_flags, costs_of, network_of
from hnas.ranking.figures import ORANGE, Panel, option_panels
from hnas.ranking.findings import FEWEST, analyse_ranking, analyse_scores, match
from hnas.ranking.front import pareto_front
from hnas.ranking.page import ranking_page, scores_page
from hnas.search_space import search_space

COUNTED = {"macs": "MACs", "params": "parameters"}
PRINTED = (
    "pred",
    "gt",
    "architectures",
    "images",
    "accuracy",
    "standard_error",
    "agreement",
    "tau_of_macs",
    "resamples",
    "top_k",
    "mean_absolute_rank_error",
    "notes",
)
"""Of a report, where it has them."""


def report_ranking(options) -> tuple[dict, str]:
    """The report on predictions and a truth, and its page."""
    gt = read_truth(options.gt)
    if options.pred in COUNTED:
        archs, known = list(gt), None
        with suppress(UserError):  # unless the truth is stage 3's
            known, _ = estimates_beside(options.gt, archs, np.array([*gt.values()]) / 100)
        network = network_of(options, known and known.network, options.gt)
        costs = costs_of(archs, search_space(network.backbone), *network[1:])
        predicted = costs[options.pred]
    else:
        named, predicted = read_accuracies(options.pred)
        archs = list(named.values())
        if predicted.min() >= 0 and predicted.max() <= 100:
            check_one_unit(options.pred, predicted)
    pred = dict(zip(archs, predicted.tolist(), strict=True))
    found = analyse_ranking(pred, gt, options.seed, options.resamples)
    report = {"pred": options.pred, "gt": options.gt, **found}
    _, values, true = match(pred, gt)
    label = "predicted accuracy"
    if options.pred in COUNTED:
        values, label = values / 1e6, f"{COUNTED[options.pred]}, million"
    elif values.min() >= 0 and values.max() <= 100:
        values, label = in_percent(values), "predicted accuracy, %"
    scatter = Panel("true accuracy, %", label)
    scatter.points(true, values)
    breakdown = option_panels(report["by_option"], "rank error, %")
    return report, ranking_page(report, scatter, breakdown)


def report_scores(options) -> tuple[dict, str]:
    """The report on scores alone, and its page; with what ``estimates.json`` tells, if it can."""
    if options.pred in COUNTED:
        raise UserError(f"--pred {options.pred} needs --gt, whose architectures it counts")
    archs, accuracy = read_scores(options.pred)
    if len(archs) < FEWEST:
        raise UserError(
            f"{options.pred} has {len(archs)} architectures; a report needs at least {FEWEST}"
        )
    known, rows, unknown = None, [], []
    try:
        known, rows = estimates_beside(options.pred, list(archs.values()), in_shares(accuracy))
    except UserError as reason:
        unknown = [f"Standard errors are not known: {shortened(str(reason))}."]
    network = network_of(options, known and known.network, options.pred)
    accuracy = with_ties(in_percent(accuracy))
    costs = costs_of(archs.values(), search_space(network.backbone), *network[1:])
    found = analyse_scores(archs, accuracy, costs, known, rows)
    report = {
        "pred": options.pred,
        **network._asdict(),
        **found,
        "notes": [*found["notes"], *unknown],
    }
    fronts = []
    for kind, label in COUNTED.items():
        millions, panel = costs[kind] / 1e6, Panel(f"{label}, million", "score, %")
        panel.points(millions, accuracy)
        best = pareto_front(accuracy, millions)
        panel.front(millions[best], accuracy[best], ORANGE)
        fronts.append(panel)
    return report, scores_page(report, fronts, option_panels(report["by_option"], "score, %"))


def summary(report: Mapping) -> dict:
    """What is printed of a report."""
    unmatched = report.get("unmatched", {})
    return {
        **{name: report[name] for name in PRINTED if name in report},
        **{f"only_in_{source}": codes["count"] for source, codes in unmatched.items()},
        **report.get("correlations", {}),
        "explained": report["attribution"]["explained"],
    }


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pred", type=path_text, required=True, help="predictions: JSON, or macs, or params"
    )
    parser.add_argument(
        "--gt", type=path_text, help="true accuracies: JSON [none: the scores alone]"
    )
    parser.add_argument("--out", required=True, type=read_path, help="folder to write")
    add_network_flags(parser)
    parser.add_argument(
        "--resamples",
        type=whole_number(1, 1_000_000),
        default=RESAMPLES,
        help="of the bootstrap [1000]",
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the bootstrap [0]")
    options = parser.parse_args(argv)
    check_writable(options.out, "--out")
    report, page = report_ranking(options) if options.gt else report_scores(options)
    write_json(options.out / "report.json", report)
    written = options.out / "report.html"
    write_text(written, page)
    print_text(json.dumps({**summary(report), "report": str(written)}) + "\n")


if __name__ == "__main__":
    run_main(main)
