"""python -m hnas.tools.choose: front, noise and group against independent computations."""

import json

import independent
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from independent import counts_of, first_ones
from scipy import stats

from hnas.base.errors import UserError
from hnas.evaluation.results import estimates
from hnas.ranking.costs import Network
from hnas.ranking.front import as_good_as_best, critical_value, pareto_front
from hnas.search_space import RESNET48_MINI
from hnas.tools.choose import Scores, choose, main

IMAGES = 355
MINI = ["--backbone", "resnet48_mini", "--image_size", "32", "--num_classes", "10"]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30))
def test_the_front_is_what_nothing_dominates(pairs):
    accuracy, cost = np.array(pairs).T
    found = pareto_front(accuracy, cost)
    undominated = {
        (a, c)
        for a, c in pairs
        if not any((x >= a and y <= c) and (x, y) != (a, c) for x, y in pairs)
    }
    assert [tuple(pairs[i]) for i in found] == sorted(undominated, key=lambda pair: pair[1])
    # Of equal networks the first.
    assert all(pairs.index(pairs[i]) == i for i in found)


def test_the_critical_value_is_dunnetts():
    # One-sided, 95 %, infinite degrees of freedom: Dunnett, JASA 50 (1955), table 1a.
    tabled = {2: 1.64, 3: 1.92, 5: 2.16, 10: 2.42}
    for networks, value in tabled.items():
        assert critical_value(networks) == pytest.approx(value, abs=0.0051)


def test_the_group_by_hand(monkeypatch):
    def group(accuracy, error):
        monkeypatch.setattr("hnas.ranking.front.difference_errors", lambda *_: np.array(error))
        return as_good_as_best(np.array(accuracy), None, 0).tolist()

    # Dunnett's 1.92 of a normal variable is as rare as 2.1 of Student's t of 15 degrees.
    assert group([0.90, 0.95, 0.93], [0.01, 0, 0.01]) == [False, True, True]
    assert group([0.90, 0.95, 0.93], [np.inf, 0, 0.009]) == [True, True, False]
    assert group([0.90], [0]) == [True]


def right_about(hits):
    """Which images each network is right about, at random; bool [networks, IMAGES]."""
    return np.random.default_rng(2).permuted(first_ones(hits, IMAGES), axis=1)


def paired_error(one, other):
    """Of the difference of two accuracies, from 16 folds of the images."""
    more = one.astype(int) - other
    folds = [more[fold::16] for fold in range(16)]
    off = [fold.sum() - more.mean() * len(fold) for fold in folds]
    return np.sqrt(16 / 15 * np.square(off).sum() + 1) / IMAGES if (one != other).any() else 0


@pytest.fixture
def scored(tmp_path):
    """Forty networks scored as stage 3 writes it: the folder, architectures and hits."""
    rng = np.random.default_rng(1)
    space = RESNET48_MINI
    archs = space.sample_distinct(rng, 40, (space.largest(), space.smallest()))
    macs = np.array([space.macs(arch, 32, 10) for arch in archs.values()])
    network = Network("resnet48_mini", 32, 10)
    hits = np.clip(300 + 8e-6 * (macs - macs.min()) + rng.normal(0, 6, 40), 0, IMAGES).astype(int)
    found = estimates(archs, counts_of(right_about(hits)), None, IMAGES, network)
    (tmp_path / "estimates.json").write_text(json.dumps(found))
    (tmp_path / "submission.json").write_text(json.dumps(found["architectures"]))
    return tmp_path, archs, hits


def run(folder, *arguments, capsys=None):
    main(["--submission", str(folder / "submission.json"), *map(str, arguments)])
    return capsys.readouterr().out if capsys else None


def test_what_is_chosen(scored, capsys):
    folder, archs, hits = scored
    budget = 5e6
    text = run(folder, "--max_macs", budget, "--top", 3, "--out", folder / "out", capsys=capsys)
    choice = json.loads((folder / "out/choice.json").read_text())
    assert choice["budget"] == {"macs": budget} and choice["scored"] == 40
    network = [choice[name] for name in ("backbone", "image_size", "num_classes")]
    assert network == ["resnet48_mini", 32, 10]
    found = choice["networks"]

    macs = {name: RESNET48_MINI.macs(arch, 32, 10) for name, arch in archs.items()}
    accuracy = dict(zip(archs, hits / IMAGES, strict=True))
    fits = [name for name in archs if macs[name] <= budget]
    assert 2 < len(fits) < 40
    order = sorted(fits, key=lambda name: (-accuracy[name], macs[name]))
    assert [row["name"] for row in found] == order
    best = max(accuracy[name] for name in fits)
    rate = {name: (accuracy[name] * IMAGES + 1) / (IMAGES + 2) for name in fits}
    noise = {name: np.sqrt(rate[name] * (1 - rate[name]) / IMAGES) for name in fits}
    first = found[0]["name"]
    right = dict(zip(archs, right_about(hits), strict=True))
    most = stats.t.isf(stats.norm.sf(critical_value(len(fits))), 15)
    assert choice["critical_value"] == pytest.approx(most, abs=1e-6)
    errors = {name: paired_error(right[name], right[first]) for name in fits}
    kept = {name for name in fits if best - accuracy[name] <= most * errors[name]}
    least = np.inf
    for row in found:
        name = row["name"]
        assert row["arch"] == archs[name].code and row["images"] == IMAGES
        assert row["acc"] == pytest.approx(accuracy[name], abs=1e-12)
        assert row["macs"] == macs[name]
        assert row["params"] == RESNET48_MINI.params(archs[name], 10)
        assert row["se"] == pytest.approx(noise[name], abs=1e-6)
        # Best first, so ever cheaper.
        assert row["front"] == (row["macs"] < least)
        least = row["macs"] if row["front"] else least
        assert row["group"] == (name in kept)
    assert {row["group"] for row in found} == {True, False}

    lines = text.splitlines()
    first_words = [line.split()[0] for line in lines[:4]]
    assert first_words == ["network", *(row["name"] for row in found[:3])]
    assert lines[1].split()[1] == f"{best:.2%}" and lines[4] == ""
    assert f"best     {first}: " in text and found[0]["arch"] in text
    cheapest = min((row for row in found if row["group"]), key=lambda row: row["macs"])
    assert f"cheapest {cheapest['name']}: " in text and cheapest["arch"] in text


def test_the_front_against_parameters(scored, capsys):
    folder, _, _ = scored
    run(folder, "--cost", "params", "--max_params", 2e6, "--out", folder / "out", capsys=capsys)
    found = json.loads((folder / "out/choice.json").read_text())["networks"]
    assert all(row["params"] <= 2e6 for row in found)
    # Best first, so ever cheaper.
    front = np.array([(row["params"], row["acc"]) for row in found if row["front"]])
    assert np.all(np.diff(front, axis=0) < 0)


def test_a_latency_budget(scored, capsys):
    folder, archs, _ = scored
    path = independent.latency_file(folder)
    times = json.loads(path.read_text())["milliseconds"]

    def milliseconds(code):
        stem, blocks = independent.layers(code, (20, 32, 64, 128), 1)
        total, cin = times[f"stem {stem}"], stem
        for stage, _, mid, out, stride in blocks:
            total += times[f"block {stage + 1} {cin}-{mid}-{out} /{stride}"]
            cin = out
        return total + times[f"head {cin}"]

    expected = {name: milliseconds(arch.code) for name, arch in archs.items()}
    limit = float(np.median(list(expected.values())))
    flags = ["--latency", path, "--max_latency_ms", limit, "--out", folder / "out"]
    text = run(folder, *flags, capsys=capsys)
    choice = json.loads((folder / "out/choice.json").read_text())
    assert choice["budget"] == {"latency": limit} and choice["cost"] == "latency"
    assert {row["name"] for row in choice["networks"]} == {
        name for name, value in expected.items() if value <= limit
    }
    for row in choice["networks"]:
        assert row["latency"] == pytest.approx(expected[row["name"]])
    front = [row["latency"] for row in choice["networks"] if row["front"]]
    assert len(front) > 1 and np.all(np.diff(front) < 0)
    assert f"{expected[choice['networks'][0]['name']]:.3f} ms" in text
    assert "accuracy and latency, ms (" in text and "batch 1, " in text
    run(folder, "--latency", path, "--cost", "macs", "--out", folder / "macs", capsys=capsys)
    assert json.loads((folder / "macs/choice.json").read_text())["cost"] == "macs"
    for changes, arguments, words in (
        ({"image_size": 64}, (), "image size 64 instead of 32; measure again"),
        ({"num_classes": 100}, (), "num classes 100 instead of 10; measure again"),
        ({}, ("--batch_size", 64), "batch size 1 instead of 64; measure again"),
    ):
        independent.latency_file(folder, **changes)
        with pytest.raises(UserError, match=words):
            run(folder, "--latency", path, *arguments)


def test_the_group_does_not_hang_on_the_files_order(scored):
    """Several are the best; which of them comes first once decided who else is as good."""
    _, archs, hits = scored
    hits = np.minimum(hits, np.sort(hits)[-6])
    right, names = right_about(hits), np.array(list(archs))
    groups = []
    for order in (np.arange(40), np.arange(40)[::-1]):
        counts = counts_of(right[order])
        own = counts.accuracy(), counts.standard_error(), IMAGES, counts.folds
        scores = Scores({name: archs[name] for name in names[order]}, *own)
        rows = choose(scores, {"macs": np.arange(40)}, np.full(40, True), "macs")
        groups.append({row["name"] for row in rows if row["group"]})
    # Those that are not worse than any of the best.
    most = stats.t.isf(stats.norm.sf(critical_value(40)), 15)
    margins = [
        (hits.max() - hits) / IMAGES - most * np.array([paired_error(own, best) for own in right])
        for best in right[hits == hits.max()]
    ]
    assert groups[0] == groups[1] == set(names[np.max(margins, axis=0) <= 0])


@pytest.mark.parametrize("flags", [MINI, MINI[:2]])
def test_an_earlier_versions_estimates_name_no_network(scored, capsys, caplog, flags):
    folder, archs, _ = scored
    changed_estimates(lambda c: c.pop("network"))(folder)
    run(folder, *flags, "--out", folder / "out", capsys=capsys)
    taken = "taken: --backbone resnet48_mini --image_size 224 --num_classes 1000"
    assert (taken in caplog.text) == (flags is not MINI)
    best = json.loads((folder / "out/choice.json").read_text())["networks"][0]
    size = (32, 10) if flags is MINI else (224, 1000)
    assert best["macs"] == RESNET48_MINI.macs(archs[best["name"]], *size)


def test_some_networks_in_percent_are_found_in_the_estimates(scored, capsys):
    folder, _, _ = scored
    content = json.loads((folder / "submission.json").read_text())
    some = {name: row | {"acc": 100 * row["acc"]} for name, row in list(content.items())[5:]}
    (folder / "submission.json").write_text(json.dumps(some), encoding="utf-8-sig")
    run(folder, "--out", folder / "out", capsys=capsys)
    found = json.loads((folder / "out/choice.json").read_text())["networks"]
    expected = {name: content[name]["acc"] for name in some}
    assert {row["name"]: row["acc"] for row in found} == pytest.approx(expected)


def changed_estimates(change, name="estimates.json"):
    """A change of a file in the folder."""

    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def changed(change):
    """A change of the folder's submission, by name of the first entry."""
    return changed_estimates(lambda c: change(c, next(iter(c))), "submission.json")


@pytest.mark.parametrize(
    ("break_it", "arguments", "message"),
    [
        (changed(lambda c, n: c[n].update(acc=101)), "", "accuracy 101; accuracies are 0 to 1"),
        (changed(lambda c, n: c[n].pop("acc")), "", "one accuracy is needed"),
        (
            changed(lambda c, _: [c.update({c.pop(n)["arch"]: 0.5}) for n in [*c]]),
            "",
            "by code, for",
        ),
        (changed(lambda c, n: c[n].update(acc=0.5)), "", "is of other scores; take both files"),
        (changed(lambda c, n: c[n].update(acc=97.0)), "", "are some shares of 1 and some percent"),
        (changed(lambda c, n: [e.update(acc=0) for e in c.values()]), "", "0: nothing to choose"),
        (changed_estimates(dict.clear), "", "is not an estimates.json of this version"),
        (lambda f: (f / "estimates.json").unlink(), "", "no estimates.json beside .*; take both"),
        (None, "--backbone resnet48", "backbone resnet48_mini instead of resnet48; leave out"),
        (None, "--num_classes 11", "num classes 10 instead of 11; leave out the flags that"),
        (None, "--max_macs 1000", "none of 40 networks is within 1,000 MACs; .* [0-9,]+ MACs$"),
        (None, "--max_macs 9e6 --max_params 7", "within 9,000,000 MACs, 7 parameters"),
        (None, "--max_macs nan", "'nan' is not a finite number"),
        (None, "--top 0", "out of bounds"),
        (None, "--cost watts", "invalid choice"),
        (None, "--max_latency_ms 3", "--max_latency_ms takes --latency FILE, which python -m"),
        (None, "--cost latency", "--cost latency takes --latency FILE, which python -m"),
        (None, "--latency none.json", "cannot read none.json"),
        (None, "--out /proc/none", "cannot write to --out"),
    ],
)
def test_wrong_input_is_one_line(scored, capsys, break_it, arguments, message):
    folder, _, _ = scored
    if break_it:
        break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        run(folder, *arguments.split())
    assert "\n" not in str(caught.value)
    assert not capsys.readouterr().out
