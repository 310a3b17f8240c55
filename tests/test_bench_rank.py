"""The ranking bench: its budget, methods, jobs and files, what it finds, and a run of it."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from scipy.stats import kendalltau, pearsonr

from hnas.base.errors import UserError
from hnas.bench.rank import runs, workers
from hnas.bench.rank.__main__ import parse
from hnas.bench.rank.jobs import (
    SPLITS,
    Bench,
    Job,
    Scale,
    published_jobs,
    second_jobs,
    supernet_jobs,
    truth_jobs,
)
from hnas.bench.rank.methods import METHODS
from hnas.bench.rank.represent import represent
from hnas.bench.rank.verdict import choose_rate, reliability, verdict
from hnas.evaluation.counts import Counts
from hnas.search_space import RESNET48
from hnas.utils.SampleMethod import FairSampler, FirstPlaceSampler, RandomSampler, SandwichSampler

ROOT = Path(__file__).parents[1]
METHOD = "first_place"
RATE = 0.02
NAMES = (METHOD, "organisers", "bignas")
WANTED = [(name, RATE) for name in NAMES]


def test_all_methods_cost_the_same():
    for scale in (Scale(), Scale.quick(), replace(Scale(), budget=1249, stage1_steps=7)):
        for name, method in METHODS.items():
            # Passes of a step: the sub-networks', and the teacher's if it is a network apart.
            step = method.subnetworks + {"pretrained": 1, "in place": 0, "none": 0}[method.teacher]
            # The first place's law trains one sub-network more in every third step.
            step += 1 / 3 if method.sampler == "first_place" else 0
            left = scale.budget - (4 * scale.stage1_steps if method.stage1 else 0)
            assert left - step < scale.steps(method) * step <= left + 1e-6, name


@pytest.mark.parametrize(
    ("name", "law", "subnetworks", "frozen", "stage1", "teaches", "clip_norm"),
    [
        ("first_place", FirstPlaceSampler, (5, 4, 4), True, "stage1-own-5", True, -1),
        ("no_stage1", FirstPlaceSampler, (5, 4, 4), True, None, True, -1),
        ("uniform", RandomSampler, (4, 4, 4), True, "stage1-own-5", True, -1),
        ("winners", FirstPlaceSampler, (5, 4, 4), True, "stage1-public-5", True, 0),
        ("organisers", RandomSampler, (4, 4, 4), True, None, True, 0),
        ("bignas", SandwichSampler, (4, 4, 4), False, None, False, 0),
        ("fairnas", FairSampler, (7, 7, 7), False, None, False, 0),
        ("single_path", RandomSampler, (1, 1, 1), False, None, False, 0),
    ],
)
def test_methods_train_as_they_are_called(
    name, law, subnetworks, frozen, stage1, teaches, clip_norm, monkeypatch
):
    """What ``run_supernet`` trains with, but for the training."""
    seen = {}
    for function, substitute in {
        "start": lambda bench, seed, network: paddle.nn.Linear(1, 1),
        "read_weights": lambda path: seen.update(stage1=path.stem),
        "load_weights": lambda *arguments: None,
        "train": lambda *own, clip_norm: seen.update(
            model=own[2], lr=own[3].base_lr, clip_norm=clip_norm
        ),
        "score_supernet": lambda bench, job, network: [1, 2],
    }.items():
        monkeypatch.setattr(runs, function, substitute)
    result = runs.run_supernet(Bench(Path(), Scale()), Job("final", 5, name, 0.0067))
    model = seen["model"]
    assert type(model.sampler) is law
    assert tuple(len(model.sampler.sample(0, step)) for step in range(3)) == subnetworks
    assert model.network.frozen == frozen and (model.teacher is not None) == teaches
    assert seen.get("stage1") == stage1
    # The same rates for all: not scaled by how many gradients a step adds up.
    assert (seen["lr"], seen["clip_norm"], result["hits"]) == (0.0067, clip_norm, [1, 2])


@pytest.mark.parametrize("recipe", ["own", "public"])
def test_the_winners_stage_one_swings_on_the_same_pixels(recipe, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(runs, "start", lambda *arguments: None)
    monkeypatch.setattr(runs, "write_state", lambda *arguments: None)
    monkeypatch.setattr(runs, "train", lambda *own, **views: seen.update(views, rate=own[3]))
    runs.run_stage1(
        Bench(tmp_path, replace(Scale.quick(), stage1_steps=20)), Job("stage1", 0, recipe)
    )
    rates = []
    for step in range(5):
        seen["rate"].step(step)
        rates.append(seen["rate"].get_lr() / 0.0025)
    swings = [1, 0.5, 0, 0.5, 1]
    assert rates == pytest.approx(
        swings if recipe == "public" else [0.5, 1, 1, 0.99, 0.97], abs=0.02
    )
    assert seen["views"] * seen.get("copies", 1) == 2 and ("copies" in seen) == (recipe == "public")


def test_supernets_come_in_whole_seeds_and_score_their_split():
    bench = Bench(Path(), Scale())
    splits = [list(bench.of_split(split)) for split in SPLITS]
    assert splits == [[*bench.archs][:48], [*bench.archs][48:]] and len(bench.archs) == 240
    # What is chosen by is not what is compared: other architectures, and other seeds.
    for split, number, seeds in (("selection", 48, (8, 9)), ("final", 192, range(8))):
        jobs = supernet_jobs(bench, WANTED, split)
        assert [(job.kind, job.seed) for job in jobs] == [
            (split, seed) for seed in seeds for _ in WANTED
        ]
        assert bench.settings(jobs[0])["architectures"] == number
    assert [job.what for job in second_jobs(bench)] == splits[1][:32]
    quick = Bench(Path(), Scale.quick()).archs
    assert list(quick.items()) == list(bench.archs.items())[:11]


def test_networks_trained_alone_start_from_slices_of_the_same_weights(tmp_path, monkeypatch):
    """Of all that are trained alone of a kind and seed; others start elsewhere."""
    starts = []
    monkeypatch.setattr(runs, "train", lambda *own: starts.append(own[2].network.parameters()[0]))
    monkeypatch.setattr(runs, "evaluate_network", lambda *_: Counts.zeros(1))
    bench = Bench(tmp_path, Scale.quick())
    first, other = list(bench.archs)[:2]
    jobs = [("truth", 0, first), ("truth", 0, other), ("truth", 1, first), ("published", 0, first)]
    for job in [*jobs, ("pretrain", 0, "")]:
        runs.run_job(bench, Job(*job))
    width = min(len(own) for own in starts)
    own, *others = (start.numpy()[:width] for start in starts)
    same = [np.array_equal(own[:, :3], other[:, :3]) for other in others]
    assert same == [True, False, False, False]


def test_a_job_comes_after_what_it_needs_and_before_the_next_seed(tmp_path):
    bench = Bench(tmp_path, Scale.quick())
    names = (METHOD, "organisers", "winners")
    jobs = [Job("final", seed, name, 0.02) for seed in (0, 1) for name in names]
    expected = []
    for seed in (0, 1):
        own, public = Job("stage1", seed, "own"), Job("stage1", seed, "public")
        ours = jobs[3 * seed :]
        expected += [Job("pretrain", seed), own, *ours[:2], public, ours[2]]
    assert workers.with_needs(bench, jobs) == expected
    # What finished supernets started from is not needed again.
    bench.put(jobs[0], {"hits": []})
    assert workers.with_needs(bench, jobs[:2]) == [expected[0], jobs[1]]


def test_results_are_lines_and_replaced_by_newer_ones(tmp_path):
    bench = Bench(tmp_path / "new", Scale.quick())
    jobs = [Job("truth", seed, "arch1") for seed in range(3)]
    assert bench.results(jobs) == {} and not bench.folder.exists()
    for job, hits in ((jobs[0], 0), (jobs[1], 1), (jobs[2], 2), (jobs[1], 9)):
        bench.put(job, {"hits": hits})
    lines = [json.loads(line) for line in bench.runs.read_text().splitlines()]
    assert [line["job"] for line in lines] == [f"truth-arch1-{seed}" for seed in range(3)]
    assert [own["hits"] for own in bench.results(jobs).values()] == [0, 9, 2]
    assert [path.name for path in bench.folder.iterdir()] == ["runs.jsonl"]


@pytest.mark.parametrize(
    "text", ['{"job":"truth-arch1-0","hits":4', '{"hits":4}', '{"job":[]}', "[]", "\xff"]
)
def test_a_damaged_line_is_told_and_left_alone(text, tmp_path):
    bench = Bench(tmp_path, Scale.quick())
    job = Job("truth", 0, "arch1")
    bench.put(job, {"hits": 4})
    bench.runs.write_bytes(bench.runs.read_bytes() + text.encode("latin-1") + b"\n")
    before = bench.runs.read_bytes()
    for action in (lambda: bench.results([job]), lambda: bench.put(job, {})):
        with pytest.raises(UserError, match=r"runs.jsonl, line 2 is not a whole entry"):
            action()
    assert bench.runs.read_bytes() == before


def test_results_of_other_settings_are_refused_in_one_line(tmp_path):
    bench = Bench(tmp_path, Scale.quick())
    alone, supernet = Job("truth", 0, "arch1"), Job("selection", 1, METHOD, 0.02)
    for job in (alone, supernet):
        bench.put(job, {"hits": 4})
    # What a job does not depend on may differ; what it starts from may not.
    other = Bench(tmp_path, replace(Scale.quick(), stage1_lr=0.1))
    assert other.results([alone])
    with pytest.raises(UserError) as error:
        other.results([supernet])
    assert str(error.value) == (
        f"{bench.runs}: selection-first_place@0.02-1 is of other settings: stage1 lr 0.005 "
        "instead of 0.1; remove its line, or choose another --out"
    )


@pytest.fixture
def bench(tmp_path):
    """Finished supernets of three methods, four each, and their truth."""
    scale = replace(Scale.quick(), selection=5, final=12, twice=9, seeds=4)
    bench, rng = Bench(tmp_path, scale), np.random.default_rng(0)
    quality = {name: int(own) for name, own in zip(bench.archs, rng.permutation(90), strict=False)}
    for job in (*truth_jobs(bench, "final"), *second_jobs(bench)):
        bench.put(job, {"hits": quality[job.what] + int(rng.integers(5)), "images": 100})
    for job in truth_jobs(bench, "selection"):  # by their parameters
        bench.put(job, {"hits": RESNET48.params(bench.archs[job.what]) // 10**6, "images": 100})
    for seed in range(4):
        bench.put(Job("pretrain", seed), {"hits": 60, "images": 100})
    for job in supernet_jobs(bench, WANTED, "final"):
        order = -1 if job.what == "bignas" else 1
        hits = [50 + order * quality[arch] // 4 for arch in bench.of_split("final")]
        hits = (hits + rng.integers(0, 6, len(hits))).tolist()
        bench.put(job, {"hits": hits, "images": 100})
    return bench


def hits_of(bench, jobs):
    return [bench.entries()[job.name]["hits"] for job in jobs]


def taus_of(bench, name):
    truth = hits_of(bench, truth_jobs(bench, "final"))
    supernets = hits_of(bench, supernet_jobs(bench, [(name, RATE)], "final"))
    return [kendalltau(own, truth).statistic if own else None for own in supernets]


def test_taus_and_their_differences_are_scipys(bench):
    found = verdict(bench, WANTED, "final")
    taus = {name: np.mean(taus_of(bench, name)) for name in NAMES}
    for name in NAMES:
        about = found[f"{name}@0.02"]
        assert about["tau_b"]["value"] == pytest.approx(taus[name])
        assert about["tau_b"]["low"] < taus[name] < about["tau_b"]["high"]
        assert about["broken"]["value"] == 0
    truth = hits_of(bench, truth_jobs(bench, "final"))
    params = [RESNET48.params(arch) for arch in bench.of_split("final").values()]
    taus["params"] = kendalltau(params, truth).statistic
    assert found["by_code"]["params"]["value"] == pytest.approx(taus["params"])
    compared = found["comparisons"]
    assert set(compared) == {
        *(f"{METHOD} - {name}" for name in NAMES[1:]),
        *(f"{name} - params" for name in NAMES),
    }
    for between, own in compared.items():
        first, other = between.split(" - ")
        assert own["value"] == pytest.approx(taus[first] - taus[other], abs=1e-6)
        assert own["low"] <= own["value"] <= own["high"] and 0 <= own["p"] <= 1
        assert own["seeds"] == 4 and ("p_holm" in own) == (other != "organisers")
    # The family is what was announced, whatever is known of it: the least p of fourteen.
    assert found["bignas@0.02"]["supernets"] == 4
    least = min(compared.values(), key=lambda own: own["p"] + ("p_holm" not in own))
    assert least["p_holm"] == pytest.approx(14 * least["p"])
    alone = verdict(bench, WANTED[:1], "final")["comparisons"][f"{METHOD} - params"]
    assert alone["p_holm"] == pytest.approx(min(1, 14 * alone["p"]))
    second = hits_of(bench, second_jobs(bench))
    expected = kendalltau(truth[:9], second).statistic
    told = reliability(bench)
    assert told["value"] == pytest.approx(expected, abs=1e-6)
    ceiling = told["ceiling"]["value"]  # of normal values, one without and two with error
    r = np.sin(np.pi / 2 * ceiling)
    assert 2 / np.pi * np.arcsin(r**2) == pytest.approx(expected) and ceiling > expected
    lines = bench.runs.read_text().splitlines(keepends=True)
    bench.runs.write_text("".join(line for line in lines if '"truth-arch9-0"' not in line))
    assert verdict(bench, WANTED, "final")[f"{METHOD}@0.02"].keys() == {"supernets", "broken"}


@pytest.mark.parametrize("hits", [[], [29] * 12])
def test_a_supernet_that_broke_is_counted_and_not_ranked(bench, hits):
    """It diverged, or has no score of half of what the network has that it began with."""
    lost, *_ = supernet_jobs(bench, [("organisers", RATE)], "final")
    bench.put(lost, {"hits": hits, "images": 100})
    found = verdict(bench, WANTED, "final")
    assert found["organisers@0.02"]["broken"]["value"] == 0.25
    taus = [np.mean(taus_of(bench, name)[1:]) for name in (METHOD, "organisers")]
    assert found["organisers@0.02"]["tau_b"]["value"] == pytest.approx(taus[1])
    primary = found["comparisons"][f"{METHOD} - organisers"]
    assert primary["value"] == pytest.approx(taus[0] - taus[1], abs=1e-6)
    # Two that trained do not tell how others would rank.
    _, lost, *_ = supernet_jobs(bench, [("organisers", RATE)], "final")
    bench.put(lost, {"hits": hits, "images": 100})
    found = verdict(bench, WANTED, "final")
    assert found["organisers@0.02"]["tau_b"] is None
    told = found["comparisons"][f"{METHOD} - organisers"]
    assert told.pop("seeds") == 2 and set(told.values()) == {None}


@pytest.mark.parametrize(
    ("tried", "rate", "further"),
    [
        ({0.02: (0, 0.3), 0.0022: (0, 0.1), 0.0067: (0, 0.2)}, 0.02, 0.06),
        ({0.0022: (0, 0.1), 0.0067: (0, 0.11), 0.02: (0.5, 0.3)}, 0.0067, None),
        ({0.02: (1, -1), 0.0022: (1, -1), 0.0067: (1, -1)}, 0.0022, 0.0022 / 3),
    ],
)
def test_the_rate_at_which_fewest_break_is_taken_and_then_the_best(tried, rate, further):
    assert choose_rate(tried) == {"rate": rate, "next": further}


def test_rates_are_chosen_by_the_selection(bench):
    """One supernet each: one ranks upside down, one as the truth does, one diverged."""
    truth = np.array(hits_of(bench, truth_jobs(bench, "selection")))
    bench.put(Job("pretrain", 4), {"hits": 60, "images": 100})
    rates = {0.1: (99 - truth).tolist(), 0.2: (40 + truth).tolist(), 0.4: []}
    wanted = [("bignas", rate) for rate in rates]
    for job in supernet_jobs(bench, wanted, "selection"):
        bench.put(job, {"hits": rates[job.rate], "images": 100})
    assert verdict(bench, wanted, "selection")["chosen"] == {"bignas": {"rate": 0.2, "next": None}}


def test_agreement_with_imagenet_is_scipys(tmp_path):
    bench, rng = Bench(tmp_path, Scale.quick()), np.random.default_rng(0)
    archs, imagenet = bench.published
    hits = (20 * (imagenet - 69) + rng.integers(0, 30, (2, 30))).astype(int)
    for job, own in zip(published_jobs(bench), hits.ravel().tolist(), strict=True):
        bench.put(job, {"hits": own, "images": 200})
    found = represent(bench)
    for name, expected in {
        "tau_b": np.mean([kendalltau(own, imagenet).statistic for own in hits]),
        "reliability": kendalltau(*hits).statistic,
        "pearson": pearsonr(hits.mean(axis=0), imagenet).statistic,
    }.items():
        assert found[name]["value"] == pytest.approx(expected)
        assert 0.4 < found[name]["low"] < expected < found[name]["high"] < 1
    hangs_on, depth = found["hangs_on"], [arch.depths[2] for arch in archs.values()]
    expected = np.mean([kendalltau(depth, own).statistic for own in hits])
    assert hangs_on["depth of stage 3"][0] == pytest.approx(expected)
    # What is known of the thirty.
    known = [-0.09, -0.02, 0.53, 0.52, 0.636, 0.591, 0.614]
    assert [taus[1] for taus in hangs_on.values()] == pytest.approx(known, abs=5e-3)
    assert found["accuracy"]["mean"] == pytest.approx(np.mean(hits) / 2)


def command(out, *arguments):
    program = [sys.executable, "-m", "hnas.bench.rank", *arguments]
    return {"args": [*program, "--out", str(out), "--quick", "True"], "cwd": ROOT}


@pytest.mark.slow
def test_a_killed_bench_goes_on_to_the_same_results(tmp_path):
    """Killed within its truth it loses no more than what was running."""
    flags = ["supernets", "--methods", f"{METHOD}@0.0067", "--split", "final"]
    path = tmp_path / "runs.jsonl"
    process = subprocess.Popen(**command(tmp_path, "truth"), stderr=subprocess.DEVNULL)
    while not path.exists() or len(path.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = path.read_bytes()
    for asked in (["truth"], flags):
        done = subprocess.run(**command(tmp_path, *asked), capture_output=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert found == summary["truth" if asked == ["truth"] else "final"]
    assert [*summary] == ["truth", "final"]
    assert set(found[f"{METHOD}@0.0067"]) == {"supernets", "broken", "tau_b"}
    bench, entries = Bench(tmp_path, Scale.quick()), Bench(tmp_path, Scale.quick()).entries()
    final = supernet_jobs(bench, [(METHOD, 0.0067)], "final")
    needed = [Job("pretrain", seed) for seed in (0, 1)]
    needed += [Job("stage1", seed, "own") for seed in (0, 1)]
    truth = [*truth_jobs(bench, "selection"), *truth_jobs(bench, "final"), *second_jobs(bench)]
    assert path.read_bytes().startswith(kept)
    assert set(entries) == {job.name for job in (*truth, *final, *needed)}
    assert {*(tmp_path / "weights").glob("*.pdparams")} == {bench.weights(job) for job in needed}
    for entry in (entries[job.name] for job in final):
        assert len(entry["hits"]) == 8 and entry["steps"] == 4
        assert entry["seconds"] > 0 and entry["processor"]
    # What is lost is done again to the same result, with what it starts from.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if f'"{final[-1].name}"' not in line))
    bench.weights(Job("stage1", 1, "own")).unlink()
    subprocess.run(**command(tmp_path, *flags), capture_output=True, check=True)
    again = bench.entries()
    assert again.keys() == entries.keys()
    for name, entry in again.items():
        assert entry | {"seconds": 0} == entries[name] | {"seconds": 0}, name


@pytest.mark.slow
def test_represent_trains_the_thirty(tmp_path):
    asked = command(tmp_path, "represent")
    done = subprocess.run(**asked, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["finished"] == 60


@pytest.mark.parametrize("methods", ["bignas@0.02 bignas@0.06", "bignas", "ofa@0.02"])
def test_methods_are_names_with_one_rate_each(methods):
    with pytest.raises(UserError, match="--methods"):
        parse(f"supernets --out x --split final --methods {methods}".split())


def test_a_learning_rate_that_diverges_is_a_result(tmp_path):
    bench = Bench(tmp_path, Scale.quick())
    runs.run_alone(bench, Job("pretrain", 0))
    result = runs.run_supernet(bench, Job("selection", 0, "organisers", 1e12))
    assert result["hits"] == [] and result["images"] == 50


def test_a_job_that_fails_ends_the_bench_with_one_line(tmp_path):
    (tmp_path / "weights").write_text("")  # where a folder should be
    asked = command(tmp_path, "supernets", "--methods", "single_path@0.02")
    done = subprocess.run(**asked, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write ")
