"""The committed comparison of the ranking bench: what its runs give, and what README shows."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hnas.tools.rank_jobs import Bench, Scale
from hnas.tools.rank_summary import Truth, summarize, table, truth_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "hnas/tools/results/rank"
SEEDS = range(3)


def committed(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_ground_truth_is_of_the_committed_runs():
    truth = committed("ground_truth.json")
    assert truth == truth_file(Bench(RESULTS, Scale()), SEEDS)
    assert len(truth) >= 40
    for name, entry in truth.items():
        runs = [committed(f"runs/truth-{name}-{seed}.json") for seed in SEEDS]
        assert {run["settings"]["arch"] for run in runs} == {entry["arch"]}
        assert entry["acc"] == pytest.approx(np.mean([run["hits"] / 4000 for run in runs]))


def test_summary_is_of_the_committed_runs():
    summary = committed("summary.json")
    truth = Truth.read(RESULTS / "ground_truth.json")
    found = summarize(Bench(RESULTS, Scale()), truth, list(summary["methods"]), SEEDS)
    assert json.loads(json.dumps(found)) == summary
    assert (RESULTS / "table.md").read_text(encoding="utf-8") == table(summary)


@pytest.mark.parametrize(("kind", "column"), [("plain", "hits"), ("calibrated", "calibrated_hits")])
@pytest.mark.parametrize("split", ["selection", "held_out"])
def test_taus_are_scipys(split, kind, column):
    truth = committed("ground_truth.json")
    names = [name for name, entry in truth.items() if entry["split"] == split]
    for method, own in committed("summary.json")["methods"].items():
        runs = [committed(f"runs/supernet-{method}-{seed}.json")["archs"] for seed in SEEDS]
        taus = [
            stats.kendalltau(
                [run[name][column] for name in names], [truth[name]["acc"] for name in names]
            ).statistic
            for run in runs
        ]
        assert own[split][kind]["kendall_tau_b"]["seeds"] == pytest.approx(taus), method


@pytest.mark.parametrize("readme", ["README.md", "README_ch.md"])
def test_readme_shows_the_table_and_the_plot(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert (RESULTS / "table.md").read_text(encoding="utf-8") in text
    assert "(hnas/tools/results/rank/methods.png)" in text
