"""The ranking bench: its budget, methods, jobs and files, what it compares, and a run of it."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from scipy.stats import kendalltau

from hnas.base.errors import UserError
from hnas.bench.rank import __main__ as bench_rank
from hnas.bench.rank import runs, verdict, workers
from hnas.bench.rank.jobs import SPLITS, TUNING_SEED, Bench, Job, Scale
from hnas.bench.rank.methods import METHODS
from hnas.utils.SampleMethod import (
    FairSampler,
    FirstPlaceSampler,
    RandomSampler,
    SandwichSampler,
)

ROOT = Path(__file__).parents[1]
METHOD = "first_place"
RATES = {METHOD: 0.02, "organisers": 0.02, "bignas": 0.06}


def test_all_methods_cost_the_same():
    for scale in (Scale(), Scale.quick(), replace(Scale(), budget=2499, stage1_steps=7)):
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
        ("first_place", FirstPlaceSampler, (5, 4, 4), True, True, True, 0),
        ("first_place_no_stage1", FirstPlaceSampler, (5, 4, 4), True, False, True, 0),
        ("first_place_uniform", RandomSampler, (4, 4, 4), True, True, True, 0),
        ("first_place_clipped", FirstPlaceSampler, (5, 4, 4), True, True, True, 10),
        ("organisers", RandomSampler, (4, 4, 4), True, False, True, 0),
        ("bignas", SandwichSampler, (4, 4, 4), False, False, False, 0),
        ("fairnas", FairSampler, (7, 7, 7), False, False, False, 0),
        ("single_path", RandomSampler, (1, 1, 1), False, False, False, 0),
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
        "train": lambda *own, clip_norm: seen.update(model=own[2], lr=own[4], clip_norm=clip_norm),
        "score_supernet": lambda bench, job, network: [1, 2],
    }.items():
        monkeypatch.setattr(runs, function, substitute)
    result = runs.run_supernet(Bench(Path(), Scale()), Job("final", 5, name, 0.0067))
    model = seen["model"]
    assert type(model.sampler) is law
    assert tuple(len(model.sampler.sample(0, step)) for step in range(3)) == subnetworks
    assert model.network.frozen == frozen and (model.teacher is not None) == teaches
    assert seen.get("stage1") == ("stage1-5" if stage1 else None)
    # The same rates for all: not scaled by how many gradients a step adds up.
    assert (seen["lr"], seen["clip_norm"], result["hits"]) == (0.0067, clip_norm, [1, 2])


def test_only_final_jobs_score_final_architectures():
    bench = Bench(Path(), Scale())
    final = verdict.final_jobs(bench, dict.fromkeys(METHODS, 0.02))
    tuning = verdict.tuning_jobs(METHODS)
    # Whole seeds one after the other, and none that learning rates were chosen by.
    assert [(job.kind, job.seed) for job in final] == [
        ("final", seed) for seed in range(8) for _ in METHODS
    ]
    assert [(job.kind, job.seed) for job in tuning] == [("selection", 100)] * 3 * len(METHODS)
    splits = [list(bench.of_split(split)) for split in ("selection", "final")]
    assert splits == [[*bench.archs][:16], [*bench.archs][16:]] and len(bench.archs) == 48
    for job, number in ((final[0], 32), (tuning[0], 16)):
        assert bench.settings(job)["architectures"] == number
    quick = Bench(Path(), Scale.quick()).archs
    assert list(quick.items()) == list(bench.archs.items())[:11]


def test_a_job_comes_after_what_it_needs_and_before_the_next_seed(tmp_path):
    bench = Bench(tmp_path, Scale.quick())
    names = (METHOD, "organisers", "first_place_no_stage1")
    jobs = [Job("final", seed, name, 0.02) for seed in (0, 1) for name in names]
    needs = [[Job("pretrain", seed), Job("stage1", seed)] for seed in (0, 1)]
    expected = [*needs[0], *jobs[:3], *needs[1], *jobs[3:]]
    assert workers.with_needs(bench, jobs) == expected
    # What finished supernets started from is not needed again.
    bench.put(jobs[0], {"hits": []})
    assert workers.with_needs(bench, jobs[:2]) == [needs[0][0], jobs[1]]


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
    alone, supernet = Job("truth", 0, "arch1"), Job("selection", TUNING_SEED, METHOD, 0.02)
    for job in (alone, supernet):
        bench.put(job, {"hits": 4})
    # What a job does not depend on may differ; what it starts from may not.
    other = Bench(tmp_path, replace(Scale.quick(), stage1_lr=0.1))
    assert other.results([alone])
    with pytest.raises(UserError) as error:
        other.results([supernet])
    assert str(error.value) == (
        f"{bench.runs}: selection-first_place@0.02-100 is of other settings: stage1 lr 0.005 "
        "instead of 0.1; remove its line, or choose another --out"
    )


@pytest.fixture
def bench(tmp_path):
    """A finished comparison of three methods, of which one of two supernets broke twice."""
    bench, rng = Bench(tmp_path, replace(Scale.quick(), final=12)), np.random.default_rng(0)
    quality = {name: int(own) for name, own in zip(bench.archs, rng.permutation(90), strict=False)}
    for job in verdict.truth_jobs(bench, SPLITS):
        bench.put(job, {"hits": quality[job.what] + int(rng.integers(5)), "images": 100})
    for seed in (0, 1, TUNING_SEED):
        bench.put(Job("pretrain", seed), {"hits": 60, "images": 100})
    for job in (job for name in RATES for job in verdict.final_jobs(bench, {name: RATES[name]})):
        order = -1 if job.what == "bignas" else 1
        hits = [50 + order * quality[arch] // 4 for arch in bench.of_split("final")]
        hits = (hits + rng.integers(0, 6, len(hits))).tolist()
        bench.put(job, {"hits": hits, "images": 100})
    return bench


def test_taus_and_leads_are_scipys(bench):
    found = verdict.compare(bench, RATES)
    truth, taus = verdict.truth_of(bench, "final").mean(axis=0), {}
    for name, rate in RATES.items():
        results = bench.results(verdict.final_jobs(bench, {name: rate})).values()
        taus[name] = own = np.array([kendalltau(r["hits"], truth).statistic for r in results])
        method = found["methods"][name]
        assert method["tau"]["value"] == pytest.approx(own.mean())
        assert method["tau"]["low"] < own.mean() < method["tau"]["high"]
        assert method["broken"]["value"] == 0 and method["supernets"] == 2
    for name in ("organisers", "bignas"):
        lead = found["methods"][name]["reference_leads_by"]
        assert lead["value"] == pytest.approx((taus[METHOD] - taus[name]).mean())
    assert found["methods"]["bignas"]["reference_leads_by"]["p"] < 0.01
    macs = [bench.space.macs(arch, 48, 100) for arch in bench.of_split("final").values()]
    expected = kendalltau(macs, truth).statistic
    assert found["methods"]["macs"]["tau"]["value"] == pytest.approx(expected)


@pytest.mark.parametrize("hits", [[], [29] * 12])
def test_a_supernet_that_broke_is_counted_and_not_ranked(bench, hits):
    """It diverged, or scores below half of the network that it began with."""
    lost = Job("final", 1, "organisers", 0.02)
    bench.put(lost, {"hits": hits, "images": 100})
    found = verdict.compare(bench, RATES)["methods"]
    assert found["organisers"]["broken"]["value"] == 0.5 and found["organisers"]["supernets"] == 2
    (scores, none) = verdict.scores_of(bench, [Job("final", 0, "organisers", 0.02), lost])
    truth = verdict.truth_of(bench, "final").mean(axis=0)
    assert none is None
    assert found["organisers"]["tau"]["value"] == pytest.approx(kendalltau(scores, truth).statistic)
    # Compared over the seeds that both have.
    other = kendalltau(bench.entries()["final-first_place@0.02-0"]["hits"], truth).statistic
    lead = found["organisers"]["reference_leads_by"]["value"]
    assert lead == pytest.approx(other - found["organisers"]["tau"]["value"])
    bench.put(Job("final", 0, "organisers", 0.02), {"hits": [], "images": 100})
    found = verdict.compare(bench, RATES)["methods"]["organisers"]
    assert found["tau"] is None and "reference_leads_by" not in found


def test_a_part_of_a_comparison_is_not_told(bench):
    lines = bench.runs.read_text().splitlines(keepends=True)
    for missing in ("final-bignas@0.06-1", "truth-arch9-1"):
        bench.runs.write_text("".join(line for line in lines if f'"{missing}"' not in line))
        assert verdict.compare(bench, RATES) == {"unfinished": 1}
    assert verdict.choose_rates(bench, METHODS) == {}


def test_the_rate_that_ranks_best_is_chosen(bench):
    order = np.argsort(verdict.truth_of(bench, "selection").mean(axis=0)).argsort() + 50
    hits = {
        METHOD: [order[::-1], order, []],  # the last diverged
        "organisers": [order, order, order - 49],  # the last broke; of equal ones the lowest
        "bignas": [[50, 50, 50], order[::-1], []],  # scores that are all equal are worse
        "fairnas": [[], [], []],
    }
    for job in verdict.tuning_jobs(hits):
        rate = (0.0067, 0.02, 0.06).index(job.rate)
        bench.put(job, {"hits": [int(own) for own in hits[job.what][rate]], "images": 100})
    chosen = verdict.choose_rates(bench, [*hits, "single_path"])
    assert chosen == {METHOD: 0.02, "organisers": 0.0067, "bignas": 0.02}
    flags = ["--quick", "True", "--parts", "final", "--methods", "fairnas"]
    with pytest.raises(UserError, match="fairnas has no learning rate"):
        bench_rank.main(["--out", str(bench.folder), *flags])


def command(out, *arguments):
    program = [sys.executable, "-m", "hnas.bench.rank", "--out", str(out), "--quick", "True"]
    return {"args": [*program, *arguments], "cwd": ROOT}


@pytest.mark.slow
def test_a_killed_bench_goes_on_to_the_same_results(tmp_path):
    """Killed within its truth it loses no more than what was running."""
    path, flags = tmp_path / "runs.jsonl", ["--methods", METHOD]
    process = subprocess.Popen(**command(tmp_path, *flags), stderr=subprocess.DEVNULL)
    while not path.exists() or len(path.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = path.read_bytes()
    done = subprocess.run(**command(tmp_path, *flags), capture_output=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "summary.json").read_text())
    assert set(found["final"]["methods"]) == {METHOD, "macs", "params"}
    bench, entries = Bench(tmp_path, Scale.quick()), Bench(tmp_path, Scale.quick()).entries()
    final = verdict.final_jobs(bench, found["rates"])
    jobs = [*verdict.truth_jobs(bench, SPLITS), *verdict.tuning_jobs([METHOD]), *final]
    needed = [Job(kind, seed) for kind in ("pretrain", "stage1") for seed in (0, 1, TUNING_SEED)]
    assert path.read_bytes().startswith(kept)
    assert set(entries) == {job.name for job in (*jobs, *needed)}
    assert {own.name for own in (tmp_path / "weights").glob("*.pdparams")} == {
        bench.weights(job).name for job in needed
    }
    for entry in (entries[job.name] for job in final):
        assert len(entry["hits"]) == 8 and entry["steps"] == 4
        assert entry["seconds"] > 0 and entry["processor"]
    # What is lost is done again to the same result, with what it starts from.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if f'"{final[-1].name}"' not in line))
    bench.weights(Job("stage1", 1)).unlink()
    subprocess.run(**command(tmp_path, *flags), capture_output=True, check=True)
    again = bench.entries()
    assert again.keys() == entries.keys()
    for name, entry in again.items():
        assert entry | {"seconds": 0} == entries[name] | {"seconds": 0}, name


def test_a_learning_rate_that_diverges_is_a_result(tmp_path):
    bench = Bench(tmp_path, Scale.quick())
    runs.run_alone(bench, Job("pretrain", 0))
    result = runs.run_supernet(bench, Job("selection", 0, "organisers", 1e12))
    assert result["hits"] == [] and result["images"] == 100


def test_a_job_that_fails_ends_the_bench_with_one_line(tmp_path):
    (tmp_path / "weights").write_text("")  # where a folder should be
    asked = command(tmp_path, "--parts", "tune", "--methods", "single_path")
    done = subprocess.run(**asked, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write ")
