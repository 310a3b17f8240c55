"""The committed comparison of the ranking bench: what its runs give, and what README shows."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hnas.tools import bench_rank
from hnas.tools.rank_jobs import SPLITS, Bench, Scale
from hnas.tools.rank_methods import DEFAULTS, FINALISTS
from hnas.tools.rank_summary import summarize
from hnas.tools.rank_tables import COLUMNS, table
from hnas.tools.rank_truth import PARTS, Truth, truth_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "hnas/tools/results/rank"
SEEDS = range(3)


def committed(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_ground_truth_is_of_the_committed_runs():
    truth = committed("ground_truth.json")
    bench = Bench(RESULTS, Scale())
    assert truth == truth_file(bench, bench.archs, SEEDS)
    assert len(truth) >= 40
    for name, entry in truth.items():
        runs = [committed(f"runs/truth-{name}-{seed}.json") for seed in SEEDS]
        assert {run["settings"]["arch"] for run in runs} == {entry["arch"]}
        assert entry["acc"] == pytest.approx(np.mean([run["hits"] / 4000 for run in runs]))


def test_summary_is_of_the_committed_runs():
    summary = committed("summary.json")
    bench = Bench(RESULTS, Scale())
    methods = ["--methods", ",".join(summary["methods"])]
    options = bench_rank.parse(["report", "--out", "x", "--splits", ",".join(SPLITS), *methods])
    seeds = bench_rank.seeds_of(bench, options)
    assert set(DEFAULTS) <= set(seeds)
    found = summarize(bench, Truth.read(RESULTS / "ground_truth.json"), seeds)
    assert json.loads(json.dumps(found)) == summary
    for kind in COLUMNS:
        assert (RESULTS / f"{kind}.md").read_text(encoding="utf-8") == table(summary, kind)


@pytest.mark.parametrize(("kind", "column"), [("plain", "hits"), ("calibrated", "calibrated_hits")])
@pytest.mark.parametrize("part", PARTS)
def test_taus_are_scipys(part, kind, column):
    truth = committed("ground_truth.json")
    names = [name for name, entry in truth.items() if entry["split"] in PARTS[part]]
    for method, own in committed("summary.json")["methods"].items():
        if "sealed" in PARTS[part] and method not in FINALISTS:
            assert part not in own
            continue
        taus = []
        for seed in range(own["seeds"]):
            run = committed(f"runs/supernet-{method}-{seed}.json")["archs"]
            acc = [truth[name]["acc"] for name in names]
            taus.append(stats.kendalltau([run[name][column] for name in names], acc).statistic)
        assert own[part][kind]["kendall_tau_b"]["seeds"] == pytest.approx(taus), method


@pytest.mark.parametrize("readme", ["README.md", "README_ch.md"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_readme_shows_the_tables_and_the_plots(readme, kind):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert (RESULTS / f"{kind}.md").read_text(encoding="utf-8") in text
    assert f"(hnas/tools/results/rank/{kind}.png)" in text
