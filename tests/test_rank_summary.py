"""The ranking bench's figures, from made-up runs: what is compared, and what is not told early."""

import argparse
import json

import numpy as np
import pytest
from scipy import stats

from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.bench.rank import __main__ as bench_rank
from hnas.bench.rank import changes, tables, truth, tuning
from hnas.bench.rank import summary as rank_summary
from hnas.bench.rank.jobs import Bench, Job, Scale
from hnas.bench.rank.methods import LEARNING_RATES, LENGTHS, METHODS
from hnas.ranking.plots import Bar, curves_plot, estimates_plot

SCALE = Scale(architectures=22, selection=10, sealed=0, final=12, most_truth_seeds=3, most_seeds=4)
RATES = {"first_place": 0.02, "organisers": 0.0067, "fairnas": 0.06}
NOISE = {"first_place": 3, "organisers": 60, "fairnas": 4}


def put_supernet(bench, job, hits, calibrated=None):
    """A run of these hits; those re-calibrated are upside down unless they are given."""
    archs = bench.of_splits((job.kind,))
    calibrated = [4000 - own for own in hits] if calibrated is None else calibrated
    content = {
        name: {"arch": arch.code, "hits": int(own), "calibrated_hits": int(other)}
        for (name, arch), own, other in zip(archs.items(), hits, calibrated, strict=False)
    }
    result = {"steps": 9, "forwards": 48, "images": 4000, "archs": content}
    bench.runs.put(job.name, {"settings": bench.settings(job), **result})
    bench.times.put(job.name, {"seconds": 10.0 + job.seed})


@pytest.fixture
def bench(tmp_path):
    """A finished bench of three methods, and the qualities of its final architectures."""
    bench, rng = Bench(tmp_path, SCALE), np.random.default_rng(0)
    quality = {name: 40 * rng.standard_normal() for name in bench.archs}
    for job in truth.truth_jobs(bench, ("selection", "final")):
        hits = 3000 + int(quality[job.what] + 10 * rng.standard_normal())
        result = {"settings": bench.settings(job), "hits": hits, "images": 4000}
        bench.runs.put(job.name, result)
    final = np.array([quality[name] for name in bench.of_splits(("final",))])
    for name, entry in rank_summary.final_entries(bench, RATES).items():
        # fairnas is compared by its calibrated scores, which are upside down here.
        sign = -1 if name == "fairnas" else 1
        for job in entry.jobs:
            noise = NOISE[name] * rng.standard_normal(len(final))
            put_supernet(bench, job, 2000 + sign * (final + noise))
    return bench


def test_correlations_and_leads_are_scipys(bench):
    found = rank_summary.summarize(bench, RATES)["final"]
    acc = truth.Truth.of_bench(bench, ("final",)).mean
    taus = {}
    for name, rate in RATES.items():
        column = "calibrated_hits" if name == "fairnas" else "hits"
        runs = [
            bench.runs.get(Job.supernet("final", name, rate, seed).name)["archs"]
            for seed in range(4)
        ]
        scores = [[entry[column] for entry in run.values()] for run in runs]
        own = found["methods"][name]
        for key, of in (
            ("kendall_tau_b", stats.kendalltau),
            ("pearson", stats.pearsonr),
            ("spearman", stats.spearmanr),
        ):
            values = [of(row, acc).statistic for row in scores]
            assert own[key]["seed_values"] == pytest.approx(values)
            assert own[key]["value"] == pytest.approx(np.mean(values))
            assert own[key]["low"] < own[key]["value"] < own[key]["high"] < 1
            assert own[key]["corrected"]["value"] >= own[key]["value"]
        taus[name] = own["kendall_tau_b"]["value"]
        assert own["seeds"] == 4 and own["seconds"] == 11.5 and own["rate"] == rate
        assert own["score_sd"] == pytest.approx(
            np.mean([np.std(np.array(row) / 40, ddof=1) for row in scores])
        )
    for name in ("organisers", "fairnas"):
        lead = found["methods"][name]["reference_leads_by"]["kendall_tau_b"]
        assert lead["value"] == pytest.approx(taus["first_place"] - taus[name])
        assert lead["p_holm"] >= lead["p"]
    assert found["methods"]["organisers"]["reference_leads_by"]["kendall_tau_b"]["low"] > 0
    low, high = (
        found["methods"]["fairnas"]["reference_leads_by"]["kendall_tau_b"][end]
        for end in ("low", "high")
    )
    assert low < 0 < high
    # What needs no training has no seeds, and is no comparison that others are adjusted for.
    macs = found["methods"]["macs"]
    assert macs["seeds"] == 0 and "p_holm" not in macs["reference_leads_by"]["kendall_tau_b"]
    archs = bench.of_splits(("final",)).values()
    expected = stats.kendalltau([bench.space.macs(arch, 48, 100) for arch in archs], acc)
    assert macs["kendall_tau_b"]["value"] == pytest.approx(expected.statistic)


def test_a_part_of_a_comparison_is_not_told(bench):
    missing = Job.supernet("final", "organisers", 0.0067, 3)
    lines = bench.runs.path.read_text().splitlines(keepends=True)
    bench.runs.path.write_text("".join(x for x in lines if f'"{missing.name}"' not in x))
    found = rank_summary.summarize(bench, RATES)
    assert found["final"] == {"unfinished": 1}
    assert rank_summary.headline(found)["final"] == {"unfinished": 1}
    found = rank_summary.summarize(bench, {})
    assert found["final"] == {"unfinished": "learning rates"}
    lines = [x for x in lines if '"truth-arch15-2"' not in x]
    bench.runs.path.write_text("".join(lines))
    assert rank_summary.summarize(bench, RATES)["final"] == {"unfinished": "ground truth"}


def test_a_method_whose_supernet_diverged_is_not_compared(bench):
    job = Job.supernet("final", "fairnas", 0.06, 2)
    put_supernet(bench, job, [])
    found = rank_summary.summarize(bench, RATES)["final"]
    assert found["methods"]["fairnas"]["diverged"] == 1
    assert "kendall_tau_b" not in found["methods"]["fairnas"]
    assert "| 1 of 4 diverged | – |" in tables.table(found)
    assert tables.plot(found, "final").startswith(b"\x89PNG")


def test_scores_of_other_architectures_are_told(bench):
    job = Job.supernet("final", "fairnas", 0.06, 2)
    put_supernet(bench, job, range(5))
    with pytest.raises(UserError, match="did not score 7 architectures"):
        rank_summary.summarize(bench, RATES)


def test_the_tables_mark_the_default_and_show_intervals(bench, tmp_path):
    found = rank_summary.summarize(bench, RATES)
    tables.write_summary(found, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(found))
    rows = [row.split(" | ") for row in (tmp_path / "final.md").read_text().splitlines()]
    assert rows[2][0] == "| first place **(the default)**"
    tau = found["final"]["methods"]["organisers"]["kendall_tau_b"]
    shown = f"{tau['value']:.3f} [{tau['low']:.3f}, {tau['high']:.3f}]"
    assert rows[3][:2] == ["| organisers' baseline", shown]
    assert {len(row) for row in rows[2:]} == {len(rows[0])}
    headline = rank_summary.headline(found)["final"]
    assert list(headline["tau"])[-1] != "first_place"
    assert set(headline["first_place leads by"]) == {"organisers", "fairnas", "macs", "params"}


def test_a_figure_takes_what_is_not_defined():
    bars = [Bar("one", 0.5, 0.4, 0.6, (0.45, None), True), Bar("two", None, None, None, (), False)]
    assert estimates_plot(bars, None, "tau").startswith(b"\x89PNG")
    assert estimates_plot(bars, 0.8, "tau") != estimates_plot(bars, None, "tau")


# --- the improved recipe


@pytest.fixture
def changed(bench):
    """Runs of all changes that rank upside down, but for first place's, and what ranks best."""
    acc = truth.Truth.of_bench(bench, ("selection",)).mean
    best = 3000 + np.argsort(np.argsort(acc))
    good = best.copy()
    good[[0, 3]] = good[[3, 0]]
    for entry in changes.change_entries(0.02).values():
        for job in entry.jobs:
            put_supernet(bench, job, 6000 - best, 6000 - best)
    for job in changes.change_entries(0.02)["as it ran"].jobs:
        put_supernet(bench, job, good, 6000 - best)
    return bench, best


def jobs_of(title):
    return changes.change_entries(0.02)[title].jobs


@pytest.mark.parametrize(
    ("better", "chosen"),
    [
        ([], None),
        (["tilt 2"], "tilt 2"),
        (["learning rate / 3"], "learning rate / 3"),
        # What costs more or less than first place is no recipe at its price.
        (["stage 2 x 2", "stage 2 x 4", "stage 2 / 2"], None),
        (["stage 2 x 4", "two kinds of views"], "two kinds of views"),
    ],
)
def test_the_improved_recipe_is_the_change_that_ranks_best(changed, better, chosen):
    bench, best = changed
    for title in better:
        for job in jobs_of(title):
            put_supernet(bench, job, best)
    found = rank_summary.summarize(bench, RATES)
    assert found["improved"]["chosen"] == chosen
    # Its own supernets are not there yet, or none is asked for.
    assert found["improved"].get("unfinished") == (4 if chosen else None)
    told = rank_summary.headline(found)["improved"]
    assert told == {"chosen": chosen} | ({"unfinished": 4} if chosen else {})


@pytest.mark.parametrize("scores", ["plain", "calibrated"])
def test_a_change_is_chosen_by_its_own_scores(changed, scores):
    bench, best = changed
    for job in jobs_of("batch statistics, re-calibrated"):
        ranked = [6000 - best, best]
        put_supernet(bench, job, *(ranked[::-1] if scores == "plain" else ranked))
    titles = {"plain": "batch statistics in stage 2"}
    chosen = titles.get(scores, "batch statistics, re-calibrated")
    assert rank_summary.summarize(bench, RATES)["improved"]["chosen"] == chosen


@pytest.mark.parametrize("left", ["diverged", "broke", "just not"])
def test_a_change_that_broke_is_not_chosen(changed, left):
    bench, best = changed
    one, other = jobs_of("uniform")
    # 45 % of 4,000 images are 1,800.
    hits = {
        "diverged": [],
        "broke": best - best.mean() + 1799,
        "just not": best - best.min() + 1800,
    }
    put_supernet(bench, one, best)
    put_supernet(bench, other, hits[left])
    found = rank_summary.summarize(bench, RATES)["improved"]
    assert found["chosen"] == ("uniform" if left == "just not" else None)
    top1 = found["top1"]["uniform"]
    assert top1[0] == pytest.approx(best.mean() / 4000)
    assert (top1[1] is None) == (left == "diverged")


def test_the_improved_recipe_is_compared_with_first_place(changed, tmp_path):
    bench, best = changed
    for job in jobs_of("learning rate / 3"):
        put_supernet(bench, job, best)
    acc = truth.Truth.of_bench(bench, ("final",)).mean
    rng, taus = np.random.default_rng(1), []
    for seed in range(4):
        hits = 3000 + 5 * np.argsort(np.argsort(acc)) + rng.integers(0, 9, 12)
        put_supernet(bench, Job.supernet("final", "first_place", 0.0067, seed), hits)
        taus.append(stats.kendalltau(hits, acc).statistic)
    found = rank_summary.summarize(bench, RATES)
    own, reference = (found["improved"]["methods"][name] for name in ("improved", "first_place"))
    assert own["title"] == "first place, learning rate / 3" and own["rate"] == 0.0067
    assert own["kendall_tau_b"]["seed_values"] == pytest.approx(taus)
    first = found["final"]["methods"]["first_place"]
    lead = reference.pop("reference_leads_by")["kendall_tau_b"]
    assert reference == first
    assert lead["value"] == pytest.approx(np.mean(taus) - reference["kendall_tau_b"]["value"])
    assert lead["p_holm"] >= lead["p"]
    assert set(found["improved"]["methods"]) == {"improved", *RATES, "macs", "params"}
    # The comparison that was announced before does not know of it.
    assert set(found["final"]["methods"]) == {*RATES, "macs", "params"}
    tables.write_summary(found, tmp_path)
    assert "| first place **(the default)** |" in (tmp_path / "improved.md").read_text()
    assert (tmp_path / "improved.png").is_file()


@pytest.mark.parametrize("better", ["uniform", None])
def test_the_improved_recipe_is_trained_with_the_seeds_of_first_place(
    changed, better, monkeypatch, caplog
):
    bench, best = changed
    for job in jobs_of(better) if better else ():
        put_supernet(bench, job, best)
    asked = []
    monkeypatch.setattr(bench_rank, "do", lambda bench, options, jobs: asked.extend(jobs))
    rates = bench.folder / "rates.json"
    write_json(rates, {"methods": {"first_place": {"chosen": 0.02}}})
    options = argparse.Namespace(out=bench.folder, learning_rates=rates)
    with caplog.at_level("INFO"):
        bench_rank.improved(bench, options)
    trained = [Job.supernet("final", "first_place_uniform", 0.02, seed) for seed in range(4)]
    assert asked == (trained if better else [])
    told = "improved recipe: first place, uniform" if better else "no change may be tested"
    assert told in caplog.text


def test_the_improved_recipe_waits_for_all_changes(changed):
    bench, _ = changed
    rates = bench.folder / "rates.json"
    write_json(rates, {"methods": {"first_place": {"chosen": 0.02}}})
    missing = jobs_of("stage 2 x 4")[1].name
    lines = bench.runs.path.read_text().splitlines(keepends=True)
    bench.runs.path.write_text("".join(x for x in lines if f'"{missing}"' not in x))
    assert rank_summary.summarize(bench, RATES)["improved"] == {"unfinished": "changes"}
    options = argparse.Namespace(out=bench.folder, learning_rates=rates)
    with pytest.raises(UserError, match="has not all runs of changes"):
        bench_rank.improved(bench, options)


def test_changes_from_another_rate_are_shown_beside_and_choose_nothing(changed, tmp_path):
    bench, best = changed
    for entry in changes.change_entries(0.0067).values():
        for job in entry.jobs:
            put_supernet(bench, job, best)
    for job in jobs_of("as it ran"):
        put_supernet(bench, job, best)
    found = rank_summary.summarize(bench, RATES)
    (rate,) = found["changes_at"]
    methods = found["changes_at"][rate]["methods"]
    assert rate == "0.0067" and methods["learning rate x 3"]["rate"] == 0.02
    assert methods["learning rate / 3"]["rate"] == 0.0022
    assert methods["stage 2 / 4"]["kendall_tau_b"]["seed_values"] == pytest.approx([1, 1])
    # As good as first place is not better.
    assert found["improved"]["chosen"] is None
    tables.write_summary(found, tmp_path)
    rows = (tmp_path / "changes_at_0.0067.md").read_text().splitlines()
    assert rows[2].startswith("| as it ran **(the default)** |") and len(rows) == 19
    assert (tmp_path / "length.png").read_bytes() == tables.length_plot(found)
    put_supernet(bench, changes.change_entries(0.0067)["stage 2 x 4"].jobs[0], [])
    without = rank_summary.summarize(bench, RATES)
    assert tables.length_plot(without) != tables.length_plot(found)


def test_the_lengths_are_all_that_differ_in_nothing_else():
    titles = [change.title for change in LENGTHS]
    assert titles == ["as it ran", "stage 2 / 4", "stage 2 / 2", "stage 2 x 2", "stage 2 x 4"]
    curves = {"one": {1.0: [0.5, 0.6], 2.0: [0.7]}, "other": {}}
    assert curves_plot(curves, None, "length", "tau") != curves_plot(curves, 0.8, "length", "tau")


# --- what breaks


def test_supernets_that_broke_are_counted_with_and_without_clipping(changed, tmp_path):
    bench, best = changed
    entries = changes.breaking_entries(bench, 0.02)
    clipped = entries["gradients clipped"].jobs
    assert [job.seed for job in clipped] == [0, 1, 2, 3, 8, 9]
    assert METHODS["first_place_clipped"].clip_norm == 10
    for entry in entries.values():
        for job in entry.jobs:
            put_supernet(bench, job, best)
    put_supernet(bench, clipped[0], best - best.mean() + 1799)
    for job in entries["as it ran"].jobs[:3]:
        put_supernet(bench, job, 2 * (best - best.min()))
    found = rank_summary.summarize(bench, RATES)["breaking"]["methods"]
    assert {title: found[title]["broke"] for title in entries} == {
        "as it ran": 3,
        "gradients clipped": 1,
    }
    assert found["gradients clipped"]["kendall_tau_b"]["value"] == pytest.approx(1)
    assert "reference_leads_by" in found["gradients clipped"]
    # One that diverged broke, too, and has no tau.
    put_supernet(bench, clipped[4], [])
    summary = rank_summary.summarize(bench, RATES)
    found = summary["breaking"]["methods"]["gradients clipped"]
    assert found["broke"] == 2 and found["top1"][4] is None and found["diverged"] == 1
    tables.write_summary(summary, tmp_path)
    assert "| gradients clipped | 1 of 6 diverged |" in (tmp_path / "breaking.md").read_text()


def test_clipping_is_named_by_the_runs_that_have_it():
    assert "clip_norm" not in METHODS["first_place"].settings()
    assert METHODS["first_place_clipped"].settings()["clip_norm"] == 10


# --- the truth


def test_the_truth_is_described_by_its_seeds(bench):
    own = truth.Truth.of_bench(bench, ("final",))
    assert own.acc.shape == (3, 12) and list(own.archs) == [f"arch{i}" for i in range(11, 23)]
    found = truth.describe_truth(own)
    pairs = [(0, 1), (0, 2), (1, 2)]
    rho = np.mean([stats.pearsonr(own.acc[a], own.acc[b]).statistic for a, b in pairs])
    assert found["pearson_between_seeds"] == pytest.approx(rho)
    # Spearman-Brown's formula for means of three.
    assert found["reliability"] == pytest.approx(3 * rho / (1 + 2 * rho), abs=0.02)
    assert found["highest"] == own.acc.mean(axis=0).max()
    assert truth.Truth.of_bench(bench, ("selection", "final")).acc.shape == (3, 22)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_true_order_reaches_what_is_said(noise):
    rng = np.random.default_rng(3)
    skill = rng.standard_normal(4000)
    means = (skill + noise * rng.standard_normal((4, 4000))).mean(axis=0)
    found = truth.expected_of_the_truth_itself(1 / (1 + noise**2 / 4))
    assert found == pytest.approx(stats.kendalltau(skill, means).statistic, abs=0.02)
    assert np.isnan(truth.expected_of_the_truth_itself(-0.1))


# --- learning rates


def test_the_rate_that_ranks_best_is_chosen(bench):
    acc = truth.Truth.of_bench(bench, ("selection",)).mean
    order = np.argsort(np.argsort(acc))
    worse = order.copy()
    worse[[0, 3, 7]] = worse[[7, 0, 3]]
    for job, hits in zip(tuning.tuning_jobs(["organisers"]), (worse, order, []), strict=True):
        put_supernet(bench, job, hits)
    # By calibrated scores, which are upside down here.
    for job, hits in zip(tuning.tuning_jobs(["fairnas"]), (order, -order, worse), strict=True):
        put_supernet(bench, job, hits)
    for job in tuning.tuning_jobs(["first_place"])[:2]:
        put_supernet(bench, job, order)
    found = tuning.choose(bench, ["first_place", "organisers", "fairnas"])
    tau = stats.kendalltau(worse, acc).statistic
    assert found["organisers"] == {
        "taus": {"0.0067": pytest.approx(tau), "0.02": pytest.approx(1), "0.06": None},
        "chosen": 0.02,
    }
    assert found["fairnas"]["chosen"] == 0.02 and set(found) == {"organisers", "fairnas"}
    assert "| `organisers` |" in tables.tuning_table(found) and "**1.000** | – |" in (
        tables.tuning_table(found)
    )
    write_json(bench.folder / "rates.json", {"methods": found})
    path = bench.folder / "rates.json"
    assert tuning.rates_of(path, ["fairnas"]) == {"fairnas": 0.02}
    with pytest.raises(UserError, match="no learning rate of bignas; run tune"):
        tuning.rates_of(path, ["fairnas", "bignas"])


def test_a_method_that_diverges_everywhere_has_no_rate(bench):
    for job in tuning.tuning_jobs(["bignas"]):
        put_supernet(bench, job, [])
    found = tuning.choose(bench, ["bignas"])
    assert found["bignas"]["chosen"] is None
    assert "| `bignas` | – | – | – |" in tables.tuning_table(found)
    write_json(bench.folder / "rates.json", {"methods": found})
    assert tuning.read_rates(bench.folder / "rates.json") == {}
    with pytest.raises(UserError, match="if it diverged, leave it out"):
        tuning.rates_of(bench.folder / "rates.json", ["bignas"])


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"methods": ["first_place"]},
        {"methods": {"first_place": 0.02}},
        {"methods": {"first_place": {"chosen": 0.03}}},
        {"methods": {"evolution": {"chosen": LEARNING_RATES[0]}}},
    ],
)
def test_another_kind_of_file_has_no_learning_rates(content, tmp_path):
    write_json(tmp_path / "rates.json", content)
    with pytest.raises(UserError, match="is no file of learning rates|is not what"):
        tuning.read_rates(tmp_path / "rates.json")
