"""The ranking bench's figures of several seeds, against scipy's."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.bench.rank import summary as rank_summary
from hnas.bench.rank import truth as rank_truth
from hnas.bench.rank.jobs import OPEN_SPLITS, Bench, Scale
from hnas.search_space import RESNET48_MINI


def made_up(seed, archs, seeds):
    """A ground truth of random accuracies."""
    rng = np.random.default_rng(seed)
    acc = rng.random(archs) + 0.3 * rng.random((seeds, archs))
    codes = list(Bench(Path(), Scale()).archs.values())[:archs]
    third = archs // 3
    splits = ["selection"] * third + ["seen"] * third + ["sealed"] * (archs - 2 * third)
    return rank_truth.Truth(codes, splits, acc)


def test_ceiling_is_the_mean_tau_of_a_seed_against_the_others():
    truth = made_up(0, 12, 3)
    taus = []
    for seed, others in ((0, [1, 2]), (1, [0, 2]), (2, [0, 1])):
        rest = (truth.acc[others[0]] + truth.acc[others[1]]) / 2
        taus.append(stats.kendalltau(truth.acc[seed], rest).statistic)
    assert rank_truth.ceiling(truth.acc) == pytest.approx(np.mean(taus))
    figures = rank_truth.describe_truth(truth, RESNET48_MINI, 32)
    assert figures["ceiling"] == pytest.approx(np.mean(taus))
    pairs = [stats.kendalltau(truth.acc[a], truth.acc[b]).statistic for a, b in ((0, 1), (0, 2))]
    pairs.append(stats.kendalltau(truth.acc[1], truth.acc[2]).statistic)
    assert figures["tau_between_seeds"] == pytest.approx(np.mean(pairs))
    assert figures["highest"] == pytest.approx(truth.acc.mean(axis=0).max())
    rho = [stats.pearsonr(*pair).statistic for pair in combinations(truth.acc, 2)]
    assert figures["pearson_between_seeds"] == pytest.approx(np.mean(rho))
    expected = rank_truth.expected_tau(np.mean(rho), 3)
    assert figures["expected_tau_of_means"] == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 6])
def test_halves_of_the_seeds_are_compared_in_all_ways(seeds):
    acc = made_up(2, 12, seeds).acc
    ways = {
        1: [],
        2: [((0,), (1,))],
        3: [((0,), (1,)), ((0,), (2,)), ((1,), (2,))],
        4: [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))],
        6: [
            ((0, *pair), tuple({1, 2, 3, 4, 5} - set(pair)))
            for pair in combinations(range(1, 6), 2)
        ],
    }[seeds]
    taus = [
        stats.kendalltau(sum(acc[i] for i in one), sum(acc[i] for i in other)).statistic
        for one, other in ways
    ]
    found = rank_truth.tau_between_halves(acc)
    assert found == pytest.approx(np.mean(taus)) if taus else np.isnan(found)


@pytest.mark.parametrize(("noise", "seeds"), [(0.5, 1), (0.5, 3), (1.0, 3), (1.0, 5)])
def test_expected_tau_is_that_of_two_simulated_means(noise, seeds):
    rng = np.random.default_rng(3)
    skill = rng.standard_normal(4000)
    means = [(skill + noise * rng.standard_normal((seeds, 4000))).mean(axis=0) for _ in range(2)]
    found = rank_truth.expected_tau(1 / (1 + noise**2), seeds)
    # The standard error of the simulated tau is below 0.01.
    assert found == pytest.approx(stats.kendalltau(*means).statistic, abs=0.03)
    assert np.isnan(rank_truth.expected_tau(-0.1, seeds))


def test_spread_over_seeds_and_splits():
    truth = made_up(1, 12, 3)
    rng = np.random.default_rng(2)
    hits = rng.integers(0, 1000, (3, 12))
    runs = [
        {
            "images": 2000,
            "archs": {
                f"a{i}": {"arch": arch.code, "hits": int(row[i]), "calibrated_hits": -int(row[i])}
                for i, arch in reversed(list(enumerate(truth.archs)))
            },
        }
        for row in hits
    ]
    found = rank_summary.describe_method(truth, runs)
    parts = {"selection": (0, 4), "seen": (4, 8), "sealed": (8, 12), "held_out": (4, 12)}
    assert set(found) == set(parts)
    for split, bounds in parts.items():
        part = slice(*bounds)
        mean = truth.acc.mean(axis=0)[part]
        taus = [stats.kendalltau(row[part], mean).statistic for row in hits]
        own = found[split]["plain"]["kendall_tau_b"]
        assert own["seeds"] == pytest.approx(taus) and own["mean"] == pytest.approx(np.mean(taus))
        assert own["se"] == pytest.approx(stats.sem(taus))
        assert own["sd"] == pytest.approx(np.std(taus, ddof=1))
        turned = found[split]["calibrated"]
        assert turned["kendall_tau_b"]["mean"] == pytest.approx(-np.mean(taus))
        rho = [abs(stats.pearsonr(row[part], mean).statistic) for row in hits]
        assert turned["abs_pearson"]["seeds"] == pytest.approx(rho)
        shares = found[split]["plain"]
        assert shares["score_sd"] == pytest.approx(
            np.mean([np.std(row[part] / 20, ddof=1) for row in hits])
        )
        rho = [
            stats.pearsonr(one[part], other[part]).statistic for one, other in combinations(hits, 2)
        ]
        assert shares["pearson_between_seeds"] == pytest.approx(np.mean(rho))
    runs[0]["archs"].pop("a11")
    opened = rank_summary.describe_method(truth, runs, OPEN_SPLITS)
    assert opened == {part: found[part] for part in ("selection", "seen")}
    with pytest.raises(UserError, match="did not score 1 architectures"):
        rank_summary.describe_method(truth, runs)


def with_taus(taus, baselines, ceiling):
    """A summary of held-out taus: by method, plain and calibrated ones, a list over two seeds."""
    return {
        "methods": {
            name: {
                "held_out": {
                    kind: {"kendall_tau_b": rank_summary.spread(seeds)}
                    for kind, seeds in zip(("plain", "calibrated"), pair, strict=True)
                }
            }
            for name, pair in taus.items()
        },
        "baselines": {
            name: {"held_out": {"kendall_tau_b": tau}} for name, tau in baselines.items()
        },
        "truth": {"held_out": {"ceiling": ceiling}},
        "margin_architectures_se": {
            "held_out": {
                **{f"{name} {kind}": 0.5 for name in taus for kind in ("plain", "calibrated")},
                "fair calibrated": 0.25,
                **dict.fromkeys(baselines, 0.125),
            }
        },
    }


def test_verdict_takes_the_best_baseline_in_either_scoring(monkeypatch):
    monkeypatch.setattr(rank_summary, "RECIPE", "seed_recipe")
    monkeypatch.setattr(rank_summary, "RECIPE_SCORES", "calibrated")
    taus = {
        "seed_recipe": ([0.9, 0.9], [0.56, 0.64]),
        # An ablation is no rival.
        "bias_4": ([0.8, 0.8], [0.8, 0.8]),
        "fair": ([0.40, 0.46], [0.55, 0.53]),
        "single_path": ([0.1, 0.1], [0.4, 0.4]),
    }
    found = rank_summary.verdict(with_taus(taus, {"macs": 0.42, "params": None}, 0.75))
    assert found["tau"] == pytest.approx(0.6)
    assert found["share_of_ceiling"] == pytest.approx(0.8)
    either, plain = found["either"], found["plain"]
    assert either["best_baseline"] == "fair calibrated"
    assert either["margin"] == pytest.approx(0.06)
    # Standard errors of two values are half of their difference.
    assert either["margin_se"] == pytest.approx(np.hypot(0.04, 0.01))
    assert either["paired_se"] == pytest.approx((0.11 - 0.01) / 2)
    assert either["architectures_se"] == 0.25 and plain["architectures_se"] == 0.5
    assert plain["best_baseline"] == "fair plain" and plain["margin"] == pytest.approx(0.17)
    assert plain["paired_se"] == pytest.approx((0.18 - 0.16) / 2)

    found = rank_summary.verdict(with_taus(taus, {"macs": 0.7}, None))
    assert found["plain"] == found["either"] and found["share_of_ceiling"] is None
    assert found["plain"]["best_baseline"] == "macs"
    assert found["plain"]["architectures_se"] == 0.125
    assert found["plain"]["margin"] == pytest.approx(-0.1)
    assert found["plain"]["margin_se"] == found["plain"]["paired_se"] == pytest.approx(0.04)
    # A rival with more seeds is paired by those in common.
    more = taus | {"fair": ([0.1], [0.75, 0.79, 0.9, 0.9])}
    found = rank_summary.verdict(with_taus(more, {"macs": 0.7}, None))["either"]
    assert found["best_baseline_tau"] == pytest.approx(0.835) and found["pairs"] == 2
    assert found["paired_se"] == pytest.approx((0.19 - 0.15) / 2)
    # Only the finalists of a part are compared on it.
    summary = with_taus(taus, {"macs": 0.1}, None)
    summary["methods"]["fair"]["seen"] = summary["methods"]["fair"].pop("held_out")
    assert rank_summary.verdict(summary)["either"]["best_baseline"] == "single_path calibrated"
    taus["seed_recipe"] = ([0.9, 0.9], [0.6, float("nan")])
    assert rank_summary.verdict(with_taus(taus, {"macs": 0.7}, 0.7)) is None
    taus.pop("seed_recipe")
    assert rank_summary.verdict(with_taus(taus, {"macs": 0.7}, 0.7)) is None


def test_verdict_of_one_seed_has_no_error():
    taus = {rank_summary.RECIPE: ([0.6], [0.6])}
    found = rank_summary.verdict(with_taus(taus, {"macs": 0.5}, 0.7))
    assert found["either"]["margin"] == pytest.approx(0.1)
    assert found["either"]["margin_se"] is None and found["either"]["paired_se"] is None


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("split"),
        lambda entry: entry.update(split="held_out"),
        lambda entry: entry.pop("acc_seeds"),
        lambda entry: entry.update(acc_seeds=0.5),
        lambda entry: entry.update(acc_seeds=[0.5]),
        lambda entry: entry.update(acc_seeds=[0.5, None]),
    ],
)
def test_another_kind_of_file_is_no_ground_truth(change, tmp_path):
    archs = list(Bench(Path(), Scale.quick()).archs.values())
    content = {
        f"arch{i}": {"acc": 0.5, "arch": arch.code, "acc_seeds": [0.4, 0.6], "split": "sealed"}
        for i, arch in enumerate(archs)
    }
    write_json(tmp_path / "good.json", content)
    assert rank_truth.Truth.read(tmp_path / "good.json").acc.shape == (2, 7)
    change(content["arch3"])
    write_json(tmp_path / "bad.json", content)
    with pytest.raises(UserError, match="is no ground truth of this bench"):
        rank_truth.Truth.read(tmp_path / "bad.json")
