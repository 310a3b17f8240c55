"""How well predicted accuracies rank architectures, or what they say alone: one HTML page.

    python -m hnas.tools.rank_report --pred submission.json --gt gt.json --out DIR
    python -m hnas.tools.rank_report --pred submission.json --out DIR

Files have the organisers' form, or are {code: score, ...} with scores of any scale. With --gt, the
truth, --pred may also be macs, params, size (the first place's weighted channels) or depth (blocks)
of its architectures, counted from their codes. Without, the page tells what the scores of a run say
by themselves; standard errors come from stage 3's estimates.json beside it. DIR gets report.html
(all of it) and report.json. The last line printed is a JSON object.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from hnas.architecture_file import (
    IMAGENET30,
    in_percent,
    in_shares,
    note_on_imagenet30,
    read_predictions,
    read_scores,
    read_truth,
)
from hnas.base.command_line import OneLineParser, path_text, read_path, whole_number
from hnas.base.errors import UserError, run_main, shortened
from hnas.base.files import check_writable, print_text, write_json, write_text
from hnas.ranking.agreement import estimates_beside
from hnas.ranking.correlations import RESAMPLES, with_ties
from hnas.ranking.costs import Network, add_network_flags, costs_of, counted, network_of
from hnas.ranking.figures import Panel
from hnas.ranking.findings import COUNTED, FEWEST, analyse_ranking, analyse_scores, match
from hnas.ranking.front import pareto_front
from hnas.ranking.page import ranking_page, scores_page
from hnas.search_space import search_space

LONG = ("interpretation", "correlations", "attribution", "budgets", "best", "next")
"""What is in report.json, but not printed."""


def report_ranking(options) -> tuple[dict, str]:
    """The report on predictions and a truth, and its page."""
    gt, own = read_truth(options.gt), None
    if options.pred not in COUNTED:
        named, predicted = read_predictions(options.pred)
        own = scored_network(options.pred, named.values(), predicted)
    theirs = Network() if options.gt == IMAGENET30 else None
    theirs = theirs or scored_network(options.gt, gt, np.array([*gt.values()]))
    network = network_of(options, own or theirs, options.gt if own is None else options.pred)
    counts, label, run = counted(gt, network), "predicted score", run_name(options.pred)
    if options.pred in COUNTED:
        label = run = COUNTED[options.pred]
        pred = dict(zip(gt, counts.pop(options.pred).tolist(), strict=True))
    else:
        pred = dict(zip(named.values(), predicted.tolist(), strict=True))
    found = analyse_ranking(pred, gt, counts, options.seed, options.resamples)
    if options.gt == IMAGENET30:
        found["notes"].append(note_on_imagenet30(own))
    report = {"run": run, "pred": options.pred, "gt": options.gt, **found}
    _, values, true = match(pred, gt)
    if options.pred in ("macs", "params"):
        values, label = values / 1e6, f"{label}, million"
    scatter = Panel("true score", label)
    scatter.points(true, values)
    return report, ranking_page(report, scatter)


def scored_network(path: str, archs: Collection, values: np.ndarray) -> Network | None:
    """The network of a file's scores, where ``estimates.json`` beside it is of them and says so."""
    with suppress(UserError):
        return estimates_beside(path, list(archs), in_shares(values))[0].network
    return None


def run_name(path: str) -> str:
    """What a page calls a file of scores: its folder, and what that lies in."""
    return "/".join(Path(path).resolve().parts[1:][-3:-1]) or path


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
        "run": run_name(options.pred),
        "pred": options.pred,
        **network._asdict(),
        **found,
        "next": next_steps(options.pred, network, found["best"][0]),
        "notes": [*found["notes"], *unknown],
    }
    millions, panel = costs["macs"] / 1e6, Panel("MACs, million", "score, %")
    best = pareto_front(accuracy, millions)
    panel.points(millions, accuracy)
    panel.front(millions[best], accuracy[best])
    return report, scores_page(report, panel)


def next_steps(pred: str, network: Network, best: Mapping) -> list[str]:
    """Commands that may follow on scores; SUPERNET and IMAGES in them are to be filled in."""
    python, file, folder = ".venv/bin/python -m hnas.tools", shlex.quote(pred), Path(pred).parent
    common = f"--backbone {network.backbone} --image_size {network.image_size} --image_dir IMAGES"
    export, alone = (shlex.quote(str(folder / name)) for name in ("export", "alone"))
    return [
        f"{python}.choose --submission {file} --max_macs {best['macs']}",
        f"{python}.export --arch {best['arch']} --modelarch_file {file} --ckpt_dir SUPERNET "
        f"{common} --save_dir {export}",
        f"{python}.train_standalone run --arch {best['arch']} {common} --save_dir {alone}",
    ]


def summary(report: Mapping) -> dict:
    """What is printed of a report."""
    return {
        **{name: value for name, value in report.items() if name not in LONG},
        **report.get("correlations", {}),
        "explained": report["attribution"]["explained"],
    }


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pred", type=path_text, required=True, help=f"scores: JSON, or {', '.join(COUNTED)}"
    )
    parser.add_argument(
        "--gt",
        type=path_text,
        help=f"the truth: JSON, or {IMAGENET30}, thirty published ImageNet accuracies (a file of "
        f"that name is ./{IMAGENET30}) [none: the scores alone]",
    )
    parser.add_argument("--out", required=True, type=read_path, help="folder to write")
    add_network_flags(parser)
    resamples = whole_number(1, 1_000_000)
    parser.add_argument("--resamples", type=resamples, default=RESAMPLES, help="of the bootstrap")
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
