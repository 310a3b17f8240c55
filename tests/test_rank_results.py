"""The committed comparison of the ranking bench: what its runs give, and what its page shows."""

import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hnas.bench.rank import __main__ as bench_rank
from hnas.bench.rank import records
from hnas.bench.rank.jobs import LOOKED_AT, Bench, Scale
from hnas.bench.rank.methods import DEFAULTS, FINALISTS, RECIPE
from hnas.bench.rank.summary import summarize, verdict
from hnas.bench.rank.tables import COLUMNS, table
from hnas.bench.rank.truth import PARTS, Truth, tau_between_halves, truth_file
from hnas.search_space import RESNET48_MINI, Architecture

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results/rank"
PAGE = ROOT / "docs/ranking-bench.md"
SEEDS = range(3)


def committed(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs():
    """Results of all jobs by name, read without the bench."""
    lines = (RESULTS / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert len({entry["job"] for entry in entries}) == len(entries) > 300
    return {entry["job"]: entry for entry in entries}


@pytest.mark.parametrize("name", ["runs.jsonl", "seconds.jsonl"])
def test_lines_are_as_the_bench_writes_them(name, runs):
    lines = (RESULTS / name).read_bytes().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines]
    assert {entry["job"] for entry in entries} == set(runs)
    for written, entry in zip(lines, entries, strict=True):
        assert records.line(entry.pop("job"), entry) == written


def assert_same(found, expected):
    """Equal, floats but for what another processor's sums may differ by."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    else:
        assert found == expected


def test_ground_truth_is_of_the_committed_runs(runs):
    truth = committed("ground_truth.json")
    bench = Bench(RESULTS, Scale())
    archs = bench.of_splits(LOOKED_AT)
    assert truth == truth_file(bench, archs, SEEDS)
    assert len(truth) >= 40
    for name, entry in truth.items():
        own = [runs[f"truth-{name}-{seed}"] for seed in SEEDS]
        assert {run["settings"]["arch"] for run in own} == {entry["arch"]}
        assert entry["acc"] == pytest.approx(np.mean([run["hits"] / 4000 for run in own]))


def test_halves_of_six_seeds_agree_as_the_page_says():
    truth = committed("ground_truth_six_seeds.json")
    bench = Bench(RESULTS, Scale())
    assert truth == truth_file(bench, bench.of_splits(["selection"]), range(6))
    acc = np.array([entry["acc_seeds"] for entry in truth.values()]).T
    # The half with seed 0 names the other one.
    taus = [
        stats.kendalltau(
            acc[[0, *others]].mean(axis=0), np.delete(acc, [0, *others], axis=0).mean(axis=0)
        ).statistic
        for others in combinations(range(1, 6), 2)
    ]
    assert len(taus) == 10
    assert tau_between_halves(acc) == pytest.approx(np.mean(taus))
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if "](results/rank/ground_truth_six_seeds.json)" in line]
    assert f"{np.mean(taus):.2f}" in line


def test_summary_is_of_the_committed_runs():
    summary = committed("summary.json")
    bench = Bench(RESULTS, Scale())
    methods = ["--methods", ",".join(summary["methods"])]
    options = bench_rank.parse(["report", "--out", "x", "--splits", ",".join(LOOKED_AT), *methods])
    seeds = bench_rank.seeds_of(bench, options)
    assert set(DEFAULTS) <= set(seeds)
    found = summarize(bench, Truth.read(RESULTS / "ground_truth.json"), seeds)
    assert_same(json.loads(json.dumps(found)), summary)
    for kind in COLUMNS:
        assert (RESULTS / f"{kind}.md").read_text(encoding="utf-8") == table(summary, kind)


@pytest.mark.parametrize(("kind", "column"), [("plain", "hits"), ("calibrated", "calibrated_hits")])
@pytest.mark.parametrize("part", [part for part in PARTS if part != "final"])
def test_taus_are_scipys(part, kind, column, runs):
    truth = committed("ground_truth.json")
    names = [name for name, entry in truth.items() if entry["split"] in PARTS[part]]
    for method, own in committed("summary.json")["methods"].items():
        if "sealed" in PARTS[part] and method not in FINALISTS:
            assert part not in own
            continue
        taus = []
        for seed in range(own["seeds"]):
            run = runs[f"supernet-{method}-{seed}"]["archs"]
            acc = [truth[name]["acc"] for name in names]
            taus.append(stats.kendalltau([run[name][column] for name in names], acc).statistic)
        assert own[part][kind]["kendall_tau_b"]["seeds"] == pytest.approx(taus), method


@pytest.mark.parametrize("rival", ["uniform_distill calibrated", "fair plain", "macs"])
def test_errors_over_architectures_are_those_of_drawing_others(rival, runs):
    truth = committed("ground_truth.json")
    names = [name for name, entry in truth.items() if entry["split"] in PARTS["held_out"]]
    acc = np.array([truth[name]["acc"] for name in names])

    def scores(method, column):
        own = [runs[f"supernet-{method}-{seed}"]["archs"] for seed in range(8)]
        return np.array([[run[name][column] for name in names] for run in own])

    own = scores(RECIPE, "calibrated_hits")
    if rival == "macs":
        archs = [Architecture.from_code(truth[name]["arch"]) for name in names]
        other = np.array([[RESNET48_MINI.macs(arch, 48, 100) for arch in archs]])
    else:
        method, kind = rival.split()
        other = scores(method, {"plain": "hits", "calibrated": "calibrated_hits"}[kind])
    rng, margins = np.random.default_rng(1), []
    for _ in range(200):
        drawn = rng.integers(0, len(names), len(names))
        taus = [
            np.mean([stats.kendalltau(row[drawn], acc[drawn]).statistic for row in rows])
            for rows in (own, other)
        ]
        margins.append(taus[0] - taus[1])
    found = committed("summary.json")["margin_architectures_se"]["held_out"][rival]
    assert found == pytest.approx(np.std(margins), rel=0.2)


# --- docs/ranking-bench.md


@pytest.mark.parametrize("kind", COLUMNS)
def test_the_page_shows_the_table_and_the_plot(kind):
    text = PAGE.read_text(encoding="utf-8")
    (shown,) = re.findall(rf"<!-- {kind}.md -->\n+(.*?)\n*<!-- /{kind}.md -->", text, re.S)
    assert shown + "\n" == (RESULTS / f"{kind}.md").read_text(encoding="utf-8")
    assert f"](results/rank/{kind}.png)" in text and (RESULTS / f"{kind}.png").is_file()


def test_commands_of_the_page_are_understood():
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if " -m " in line]
    asked = [bench_rank.parse(line.split(" -m hnas.bench.rank ")[1].split()) for line in lines]
    assert {options.command for options in asked} == set(bench_rank.COMMANDS)
    # The one that shows how the committed tables come about.
    methods = list(committed("summary.json")["methods"])
    assert methods in [o.methods for o in asked if o.command == "report" and o.splits == LOOKED_AT]


def test_margins_on_the_page_are_the_summarys():
    text = PAGE.read_text(encoding="utf-8")
    summary = committed("summary.json")
    for part, reading in (
        ("held_out", "plain"),
        ("held_out", "either"),
        ("seen", "either"),
        ("sealed", "either"),
    ):
        lead = verdict(summary, part)[reading]
        rows = [row.strip(" |").split(" | ") for row in text.splitlines() if " | " in row]
        figures = [f"{lead[key]:.3f}" for key in ("margin", "margin_se", "paired_se")]
        assert figures in [[row[0], *row[2:]] for row in rows], part


def test_committed_commands_name_modules():
    found = 0
    for path in (ROOT / "docs/results").rglob("*.json"):
        for line in path.read_text(encoding="utf-8").splitlines():
            for module in re.findall(r"python -m ([\w.]+)", line):
                assert importlib.util.find_spec(module), path
                found += 1
    assert found >= 3


def test_the_page_gives_the_taus_of_the_first_places_recipe():
    truth, runs = committed("ground_truth.json"), Bench(RESULTS, Scale()).runs
    names = [name for name, entry in truth.items() if entry["split"] == "selection"]
    acc = [truth[name]["acc"] for name in names]
    for method in ("first_place", "tilted"):
        cells = []
        for column in ("hits", "calibrated_hits"):
            archs = [runs.get(f"supernet-{method}-{seed}")["archs"] for seed in (0, 1)]
            taus = [
                stats.kendalltau([own[n][column] for n in names], acc).statistic for own in archs
            ]
            cells.append(", ".join(f"{tau:.3f}" for tau in taus))
        assert f"| `{method}` | {' | '.join(cells)} |" in PAGE.read_text(encoding="utf-8")
