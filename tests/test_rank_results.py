"""The committed comparison of the ranking bench: what its runs give, and what its page shows."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hnas.bench.rank import __main__ as bench_rank
from hnas.bench.rank import records, tables
from hnas.bench.rank.coverage import WORLDS
from hnas.bench.rank.jobs import Bench, Job, Scale
from hnas.bench.rank.methods import COMPARED, FORMER, FORMER_FINALISTS
from hnas.bench.rank.summary import summarize
from hnas.bench.rank.truth import truth_file, truth_jobs
from hnas.bench.rank.tuning import read_rates

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results/rank"
PAGE = ROOT / "docs/ranking-bench.md"
LOOKED_AT = ("selection", "seen", "sealed")
COLUMNS = {"plain": "hits", "calibrated": "calibrated_hits"}


def committed(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def page():
    return PAGE.read_text(encoding="utf-8")


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
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-10)
    else:
        assert found == expected


def test_ground_truth_is_of_the_committed_runs(runs):
    truth, bench = committed("ground_truth.json"), Bench(RESULTS, Scale())
    finished = [split for split in (*LOOKED_AT, "final") if bench.of_splits((split,))]
    splits = tuple(dict.fromkeys(entry["split"] for entry in truth.values()))
    assert set(LOOKED_AT) <= set(splits) <= set(finished)
    assert truth == truth_file(bench, truth_jobs(bench, splits))
    for name, entry in truth.items():
        own = [runs[f"truth-{name}-{seed}"] for seed in range(len(entry["acc_seeds"]))]
        assert {run["settings"]["arch"] for run in own} == {entry["arch"]}
        assert entry["acc"] == pytest.approx(np.mean([run["hits"] / 4000 for run in own]))


def test_summary_and_tables_are_of_the_committed_runs():
    summary = committed("summary.json")
    rates = RESULTS / "learning_rates.json"
    found = summarize(Bench(RESULTS, Scale()), read_rates(rates) if rates.is_file() else {})
    assert_same(json.loads(json.dumps(found)), summary)
    shown = {name: own for name, own, _ in tables.comparisons(summary)}
    assert set(shown) >= {"former", "former_seen", "former_selection"}
    for name, own in shown.items():
        assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == tables.table(own)
        assert (RESULTS / f"{name}.png").is_file()


def test_runs_of_former_methods_are_read_as_they_were_trained(runs):
    """What a bench of today checks of their settings is what they say."""
    bench = Bench(RESULTS, Scale())
    for name in FORMER:
        number = sum(job.startswith(f"supernet-{name}-") for job in runs)
        assert number >= (8 if name in FORMER_FINALISTS else 2)
        assert number == sum(
            bench.result(Job("supernet", name, seed)) is not None for seed in range(10)
        )
    settings = runs["supernet-seed_recipe-0"]["settings"]
    assert settings["method"]["tilt"] == 2.0 and settings["budget"] == 6000


@pytest.mark.parametrize("scores", COLUMNS)
@pytest.mark.parametrize(
    ("part", "splits", "names"),
    [
        ("held_out", ("seen", "sealed"), FORMER_FINALISTS),
        ("seen", ("seen",), [name for name in FORMER if name not in ("first_place", "tilted")]),
        ("selection", ("selection",), ("first_place", "tilted")),
    ],
)
def test_former_taus_are_scipys(part, splits, names, scores, runs):
    truth = committed("ground_truth.json")
    archs = [name for name, entry in truth.items() if entry["split"] in splits]
    acc = [truth[name]["acc"] for name in archs]
    methods = committed("summary.json")["former"][part]["methods"]
    assert set(methods) == {f"{name} {own}" for name in names for own in COLUMNS} | {
        "macs",
        "params",
    }
    for name in names:
        found = methods[f"{name} {scores}"]["kendall_tau_b"]["seed_values"]
        scored = [runs[f"supernet-{name}-{seed}"]["archs"] for seed in range(len(found))]
        taus = [
            stats.kendalltau([own[arch][COLUMNS[scores]] for arch in archs], acc).statistic
            for own in scored
        ]
        assert found == pytest.approx(taus), name


CHANGES = {
    "as it ran": ("hits", "first_place@0.02"),
    "re-calibrated": ("calibrated_hits", "first_place@0.02"),
    "batch statistics in stage 2": ("hits", "first_place_batch@0.02"),
    "batch statistics, re-calibrated": ("calibrated_hits", "first_place_batch@0.02"),
    "tilt 2": ("hits", "first_place_tilted@0.02"),
    "uniform": ("hits", "first_place_uniform@0.02"),
    "no stage 1": ("hits", "first_place_no_stage1@0.02"),
    "two kinds of views": ("hits", "first_place_two_kinds@0.02"),
    "stage 2 / 4": ("hits", "first_place_quarter@0.02"),
    "stage 2 / 2": ("hits", "first_place_half@0.02"),
    "stage 2 x 2": ("hits", "first_place_double@0.02"),
    "stage 2 x 4": ("hits", "first_place_quadruple@0.02"),
    "learning rate / 3": ("hits", "first_place@0.0067"),
    "learning rate x 3": ("hits", "first_place@0.06"),
    "temperature 4": ("hits", "first_place_temperature_4@0.02"),
}
"""Of each change the scores, and the jobs that it is measured by."""


def final_parts():
    """Of each compared method the same."""
    frozen = ("first_place", "first_place_no_stage1", "first_place_uniform", "organisers")
    return {
        name: ("hits" if name in frozen else "calibrated_hits", f"{name}@{own['chosen']:g}")
        for name, own in committed("learning_rates.json")["methods"].items()
    }


def changes_at(rate, third, thrice):
    """:data:`CHANGES` from another rate of first place than 0.02."""
    rates = {"0.0067": third, "0.02": rate, "0.06": thrice}
    return {
        title: (column, f"{name}@{rates[old]}")
        for title, (column, job) in CHANGES.items()
        for name, _, old in [job.partition("@")]
    }


def parts():
    """Every comparison of methods of today that is finished, and what it is made of."""
    summary, announced = committed("summary.json"), final_parts()
    yield summary["final"], "final", announced
    yield summary["changes"], "selection", CHANGES
    for rate, own in summary["changes_at"].items():
        others = {"0.0067": ("0.0022", "0.02")}[rate]
        yield own, "selection", changes_at(rate, *others)
    improved = {"improved": ("hits", "first_place@0.0067")}
    yield summary["improved"], "final", improved | announced


@pytest.mark.parametrize(("summary", "split", "expected"), parts())
def test_taus_are_scipys(summary, split, expected, runs):
    truth = committed("ground_truth.json")
    archs = [name for name, entry in truth.items() if entry["split"] == split]
    acc = [truth[name]["acc"] for name in archs]
    assert set(summary["methods"]) == {*expected, "macs", "params"}
    for name, (column, job) in expected.items():
        found = summary["methods"][name]
        if split == "selection":
            seeds = (8, 9)
        else:
            seeds = range(8 if name == "improved" else Scale().seeds(name))
        own = [runs[f"{split}-{job}-{seed}"]["archs"] for seed in seeds]
        assert found["seeds"] == len(own)
        assert found.get("diverged", 0) == sum(not scored for scored in own), name
        if "diverged" not in found:
            taus = [
                stats.kendalltau([scored[arch][column] for arch in archs], acc).statistic
                for scored in own
            ]
            assert found["kendall_tau_b"]["seed_values"] == pytest.approx(taus), name
            assert found["kendall_tau_b"]["value"] == pytest.approx(np.mean(taus)), name


# --- docs/ranking-bench.md


def shown_on_the_page(name):
    (shown,) = re.findall(rf"<!-- {name} -->\n+(.*?)\n*<!-- /{name} -->", page(), re.S)
    return shown + "\n"


def test_the_page_shows_the_tables_and_the_plots():
    summary = committed("summary.json")
    for name, own, _ in tables.comparisons(summary):
        assert shown_on_the_page(f"{name}.md") == tables.table(own)
        assert f"](results/rank/{name}.png)" in page()
    assert "](results/rank/length.png)" in page()
    if summary["tuning"]:
        assert shown_on_the_page("tuning.md") == tables.tuning_table(summary["tuning"])


def test_what_the_page_says_of_former_results_is_so(runs):
    former, text = committed("summary.json")["former"], re.sub(r"\s+", " ", page())
    for part, name in (
        ("held_out", "uniform_distill calibrated"),
        ("selection", "tilted calibrated"),
    ):
        lead = former[part]["methods"][name]["reference_leads_by"]["kendall_tau_b"]
        assert lead["low"] < 0 < lead["high"] and lead["p_holm"] > 0.05
        assert f"{lead['value']:.3f} [{lead['low']:.3f}, {lead['high']:.3f}]" in text
    for name in ("seed_recipe", "uniform_distill", "fair"):
        lead = former["held_out"]["methods"][f"{name} plain"]["reference_leads_by"]
        assert lead["kendall_tau_b"]["p_holm"] < 0.05
        assert 0.145 < lead["kendall_tau_b"]["value"] < 0.185
    for name, own in former["seen"]["methods"].items():
        if own["seeds"] and name != former["seen"]["reference"]:
            assert own["reference_leads_by"]["kendall_tau_b"]["p_holm"] > 0.05
    # Against single truth seeds, and of scores that are averaged over supernets.
    truth = committed("ground_truth.json")
    archs = [name for name, entry in truth.items() if entry["split"] in ("seen", "sealed")]
    acc = np.array([truth[name]["acc_seeds"] for name in archs]).T
    scores = {
        name: np.array(
            [
                [
                    runs[f"supernet-{name}-{seed}"]["archs"][arch]["calibrated_hits"]
                    for arch in archs
                ]
                for seed in range(8)
            ]
        )
        for name in FORMER_FINALISTS
    }

    def tau(one, other):
        return stats.kendalltau(one, other).statistic

    ours, theirs = scores["seed_recipe"], scores["uniform_distill"]
    pairs = list(zip(ours, theirs, strict=True))
    margins = [np.mean([tau(one, own) - tau(other, own) for one, other in pairs]) for own in acc]
    shown = [f"{margin:.3f}" for margin in margins]
    assert f"is {shown[0]}, {shown[1]} and {shown[2]}" in text
    mean = acc.mean(axis=0)
    paired = [tau(one, mean) - tau(other, mean) for one, other in pairs]
    assert f"p {stats.ttest_1samp(paired, 0).pvalue:.3f}, and" in text
    averaged = {name: tau(own.mean(axis=0), mean) for name, own in scores.items()}
    shown = {name: f"{value:.3f}" for name, value in averaged.items()}
    ours, theirs, fair = (shown[name] for name in FORMER_FINALISTS)
    assert f"uniform {theirs}, yesterday's default {ours}, fair {fair}" in text


def test_what_the_page_says_of_the_comparison_is_so(runs):
    final, text = committed("summary.json")["final"], re.sub(r"\s+", " ", page())
    methods = final["methods"]
    leads = {
        name: own["reference_leads_by"]["kendall_tau_b"]
        for name, own in methods.items()
        if own["seeds"] and "reference_leads_by" in own
    }
    primary = leads["organisers"]
    shown = "{value:.3f} [{low:.3f}, {high:.3f}], p {p:.3f}.".format(**primary)
    assert f"`first_place` less `organisers` is {shown}" in text
    # What would let anybody say "leads" of one of them; the page says it of none.
    assert all(lead["p_holm"] > 0.78 and lead["low"] < 0 < lead["high"] for lead in leads.values())
    assert len(leads) == 7 and methods["first_place_uniform"]["diverged"] == 2
    halves = [(lead["high"] - lead["low"]) / 2 for lead in leads.values()]
    assert f"half an interval is {min(halves):.2f} to {max(halves):.2f}" in text
    taus = [methods[name]["kendall_tau_b"]["value"] for name in leads]
    assert f"a tau-b of {min(taus):.2f} to {max(taus):.2f}, with" in text
    ours = methods["first_place"]["kendall_tau_b"]["seed_values"]
    assert f"tau-b from {min(ours):.3f} to {max(ours):.3f}" in text
    assert f"reliability of their means is {final['truth']['reliability']:.2f}" in text


def mean_top1(run):
    return float(np.mean([100 * own["hits"] / run["images"] for own in run["archs"].values()]))


def test_what_the_page_says_of_training_that_broke_is_so(runs):
    text = re.sub(r"\s+", " ", page())
    top1 = [mean_top1(runs[f"final-first_place@0.02-{seed}"]) for seed in range(8)]
    *most, last = [f"{value:.0f}" for value in top1]
    assert f"by seed: {', '.join(most)} and {last} %" in text
    uniform = [runs[f"final-first_place_uniform@0.02-{seed}"] for seed in range(8)]
    left = sorted(mean_top1(run) for run in uniform if run["archs"])
    assert len(left) == 6 and left[0] < 1.5
    assert f"the other five score {left[1]:.0f} to {left[-1]:.0f} %" in text
    slow = [f"first_place_no_stage1@0.0067-{seed}" for seed in range(8)]
    slow += [f"organisers@0.0067-{seed}" for seed in range(8)]
    low, *high = sorted(mean_top1(runs[f"final-{name}"]) for name in slow)
    assert (
        f"one scores {low:.0f} % where the others score {high[0]:.0f} to {high[-1]:.0f} %" in text
    )
    tuned = [mean_top1(runs[f"selection-first_place@{rate}-8"]) for rate in ("0.0067", "0.02")]
    assert f"mean top-1 fell from {tuned[0]:.1f} to {tuned[1]:.1f} %" in text


def broken(run):
    """How a supernet of changes ended, if not well."""
    if not run["archs"]:
        return "not finite"
    return "at chance" if mean_top1(run) < 2 else ""


def test_what_the_page_says_of_changes_is_so(runs):
    summary, text = committed("summary.json"), re.sub(r"\s+", " ", page())
    ended = {
        job: [broken(runs[f"selection-{job}-{seed}"]) for seed in (8, 9)]
        for job in dict.fromkeys(job for _, job in CHANGES.values())
    }
    assert ended.pop("first_place@0.02") == ["", "at chance"]
    lost = [job for job, own in ended.items() if "not finite" in own]
    rest = [job for job, own in ended.items() if own in (["", "at chance"], ["at chance", ""])]
    assert (len(ended), len(lost), rest) == (12, 6, ["first_place_double@0.02"])
    assert "Of the 12 changes that were trained anew, six lost one seed" in text
    well = {job.partition("@")[0] for job, own in ended.items() if own == ["", ""]}
    assert well == {
        *(f"first_place{what}" for what in ("", "_batch", "_tilted", "_uniform", "_quadruple"))
    }
    assert all(ended[f"first_place_{what}@0.02"].count("") == 0 for what in ("quarter", "half"))
    first = [mean_top1(runs[f"selection-first_place@0.02-{seed}"]) for seed in (9, 8)]
    assert "top-1 {:.1f} %, {:.1f} % with seed 8".format(*first) in text
    # The rule's choice, by hand: of the usual length, not broken, the highest tau-b.
    taus = {
        title: own["kendall_tau_b"]["value"]
        for title, own in summary["changes"]["methods"].items()
        if "kendall_tau_b" in own and own["seeds"]
    }
    assert taus["as it ran"] < 0.5
    ranked = sorted(taus, key=taus.get, reverse=True)
    assert ranked[:3] == ["stage 2 x 4", "learning rate / 3", "batch statistics, re-calibrated"]
    assert summary["improved"]["chosen"] == ranked[1]
    assert f"tau-b on the selection is {taus[ranked[1]]:.3f}" in text
    assert f"come next with {taus[ranked[2]]:.3f}" in text
    slow = [mean_top1(runs[f"selection-first_place@0.0067-{seed}"]) for seed in (8, 9)]
    assert "mean top-1 {:.1f} and {:.1f} %".format(*slow) in text


def test_what_the_page_says_of_changes_from_the_lower_rate_is_so(runs):
    methods = committed("summary.json")["changes_at"]["0.0067"]["methods"]
    text = re.sub(r"\s+", " ", page())
    taus = {
        title: own["kendall_tau_b"]["value"]
        for title, own in methods.items()
        if "kendall_tau_b" in own and own["seeds"] and title != "learning rate x 3"
    }
    assert f"the values lie between {min(taus.values()):.3f} and {max(taus.values()):.3f}" in text
    leads = [methods[t]["reference_leads_by"]["kendall_tau_b"] for t in taus if t != "as it ran"]
    assert len(leads) == 12 and all(lead["p_holm"] == 1 for lead in leads)
    lengths = {"stage 2 / 2": "_half", "as it ran": "", "stage 2 x 2": "_double"}
    lengths["stage 2 x 4"] = "_quadruple"
    top1 = [
        np.mean([mean_top1(runs[f"selection-first_place{own}@0.0067-{seed}"]) for seed in (8, 9)])
        for own in lengths.values()
    ]
    half, *more, most = [f"{own:.0f}" for own in top1]
    assert f"rises from {half} % at half" in text
    assert f"to {', '.join(more)} and {most} % at" in text
    half, *more, most = [f"{taus[title]:.3f}" for title in lengths]
    assert f"Tau-b goes from {half} to {', '.join(more)} and {most}, which" in text
    assert methods["stage 2 / 4"]["diverged"] == 1
    assert f"train here ({taus['temperature 4']:.3f})" in text
    apart = [np.ptp(methods[title]["kendall_tau_b"]["seed_values"]) for title in taus]
    assert f"of a change are up to {max(apart):.2f} apart" in text
    assert f"ranks no worse ({taus['learning rate / 3']:.3f})" in text


def test_what_the_page_says_of_what_breaks_is_so(runs):
    methods, text = committed("summary.json")["breaking"]["methods"], re.sub(r"\s+", " ", page())
    truth = committed("ground_truth.json")
    archs = [name for name, entry in truth.items() if entry["split"] == "selection"]
    acc = [truth[name]["acc"] for name in archs]
    top1, taus = {}, {}
    for name, title in (("", "as it ran"), ("_clipped", "gradients clipped")):
        own = [runs[f"selection-first_place{name}@0.02-{seed}"] for seed in range(10)]
        top1[title] = [mean_top1(run) for run in own]
        taus[title] = [
            stats.kendalltau([run["archs"][arch]["hits"] for arch in archs], acc).statistic
            for run in own
        ]
        assert methods[title]["kendall_tau_b"]["seed_values"] == pytest.approx(taus[title])
        assert methods[title]["broke"] == sum(value < 45 for value in top1[title])
    plain, clipped = top1.values()
    assert [methods[title]["broke"] for title in top1] == [5, 0]
    assert f"gives p {stats.binomtest(5, 5).pvalue:.4f}"[:-1] in text
    assert all(one < other for one, other in zip(plain, clipped, strict=True))
    assert f"p {stats.binomtest(10, 10).pvalue:.3f}." in text
    ends = (min(clipped), max(clipped), min(plain), max(plain))
    assert "({:.0f} to {:.0f} %; without it {:.0f} to {:.0f} %)".format(*ends) in text
    assert f"Tau-b is {np.mean(taus['gradients clipped']):.3f} with clipping" in text
    hits = [own["hits"] for own in runs["selection-first_place@0.02-2"]["archs"].values()]
    assert methods["as it ran"]["kendall_tau_b"]["low"] is None
    assert sorted(np.unique(hits, return_counts=True)[1]) == [1, 15]


def test_what_the_page_says_of_the_improved_recipe_is_so(runs):
    methods, text = committed("summary.json")["improved"]["methods"], re.sub(r"\s+", " ", page())
    leads = {
        name: own["reference_leads_by"]["kendall_tau_b"]
        for name, own in methods.items()
        if own["seeds"] and "reference_leads_by" in own
    }
    shown = "{value:.3f} [{low:.3f}, {high:.3f}], p {p:.3f}.".format(**leads["first_place"])
    assert f"The improved recipe less `first_place` is {shown}" in text
    assert len(leads) == 8 and all(lead["p_holm"] == 1 for lead in leads.values())
    assert all(lead["low"] < 0 < lead["high"] for lead in leads.values())
    top1 = [mean_top1(runs[f"final-first_place@0.0067-{seed}"]) for seed in range(8)]
    low, *high = sorted(top1)
    assert low == top1[2]
    assert f"top-1 {low:.1f} %, the others {high[0]:.0f} to {high[-1]:.0f} %" in text
    fast = [mean_top1(runs[f"final-first_place@0.02-{seed}"]) for seed in range(8)]
    assert sum(own < 2 for own in fast) == 2 and fast[2] < 2 and sum(own < 45 for own in fast) == 4
    names = ("first_place_no_stage1", "organisers")
    others = [mean_top1(runs[f"final-{name}@0.0067-2"]) for name in names]
    assert f"of the {others[0]:.0f} % of `first_place_no_stage1`" in text
    assert f"score {others[1]:.0f} %" in text


def test_the_page_announces_what_is_compared():
    assert shown_on_the_page("methods") == tables.methods_table()
    scale = Scale()
    for seeds in (8, 5):
        names = [f"`{name}`" for name in COMPARED if scale.seeds(name) == seeds]
        assert f"{seeds} seeds: {', '.join(names)}" in re.sub(r"\s+", " ", page())


def test_commands_of_the_page_are_understood():
    blocks = re.findall(r"^```sh\n(.*?)^```$", page(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if " -m " in line]
    asked = [
        bench_rank.parse(line.split(" -m hnas.bench.rank ")[1].split())
        for line in lines
        if " -m hnas.bench.rank " in line
    ]
    assert {options.command for options in asked} == set(bench_rank.COMMANDS)


def test_the_coverage_on_the_page_is_the_studys():
    study = committed("coverage.json")
    assert set(study["worlds"]) == set(WORLDS) and study["trials"] >= 1000
    for name, own in study["worlds"].items():
        cells = [f"{100 * own['kendall_tau_b'][kind]:.1f}" for kind in own["kendall_tau_b"]]
        cells += [f"{100 * own[key]['difference']:.1f}" for key in ("pearson", "spearman")]
        cells += [f"{100 * own['bootstrap']['difference']:.1f}"]
        assert f"| {name} | {' | '.join(cells)} |" in page()
        # What the comparison is announced by; two standard errors of a share are 1.4 %.
        assert 0.93 < own["kendall_tau_b"]["difference"] < 0.97, name
        assert all(0.93 < share < 0.99 for share in own["kendall_tau_b"].values()), name
        for key in ("pearson", "spearman"):
            assert all(0.89 < share < 0.99 for share in own[key].values()), (name, key)
            assert own[key]["difference"] > 0.93, (name, key)


def test_committed_commands_name_modules():
    found = 0
    for path in (ROOT / "docs/results").rglob("*.json"):
        for line in path.read_text(encoding="utf-8").splitlines():
            for module in re.findall(r"python -m ([\w.]+)", line):
                assert importlib.util.find_spec(module), path
                found += 1
    assert found >= 3
