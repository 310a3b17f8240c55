"""The ranking bench from end to end: its budget, its jobs and files, and what it prints."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest

from hnas.base.errors import UserError
from hnas.bench.rank import __main__ as bench_rank
from hnas.bench.rank import runs, workers
from hnas.bench.rank.jobs import DEVELOPMENT_SEEDS, Bench, Job, Scale
from hnas.bench.rank.methods import COMPARED, METHODS, STAGE1_FORWARDS
from hnas.bench.rank.runs import run_job, train_alone
from hnas.bench.rank.summary import final_entries
from hnas.bench.rank.truth import truth_jobs
from hnas.bench.rank.tuning import tuning_jobs
from hnas.search_space import RESNET48_MINI
from hnas.tools import rank_report
from hnas.utils.weights import NotFiniteError

ROOT = Path(__file__).parents[1]
METHOD = "first_place"
TUNED = [f"selection-{METHOD}@{rate}-8" for rate in ("0.0067", "0.02", "0.06")]


def run(command, out, *arguments):
    bench_rank.main([command, "--out", str(out), "--quick", "True", *arguments])


def records(path):
    """A file of results, read by the tests themselves: the lines' objects by job."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["job"]: line for line in lines}


def line_of(entry):
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def without(path, jobs):
    """A file of results without some jobs, as bytes."""
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if json.loads(line)["job"] not in jobs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder after all commands for one method."""
    out = tmp_path_factory.mktemp("rank")
    for command in ("ground_truth", "tune", "final"):
        run(command, out, "--methods", METHOD)
    return out


# --- the budget, and what is scored on what


def test_all_methods_cost_the_same():
    assert set(COMPARED) < set(METHODS)
    for scale in (Scale(), Scale.quick(), replace(Scale(), budget=2499, stage1_steps=7)):
        for name, method in METHODS.items():
            # Passes of a step: the sub-networks', and the teacher's if it is a network apart.
            step = method.subnetworks + {"pretrained": 1, "in place": 0, "none": 0}[method.teacher]
            # The first place's law trains one sub-network more in every third step.
            step += 1 / 3 if method.sampler == "first_place" else 0
            before = {"none": 0}.get(method.stage1, 4 * scale.stage1_steps)
            assert scale.stage1_forwards(method) == before
            budget = (scale.budget - before) * method.stage2
            spent = scale.steps(method) * step
            assert budget - step < spent <= budget + 1e-6, name
            assert name not in COMPARED or method.stage2 == 1
    assert STAGE1_FORWARDS == 4


def test_a_budget_without_a_step_is_refused():
    with pytest.raises(UserError, match="no step of stage 2"):
        replace(Scale(), budget=482).steps(METHODS[METHOD])


def test_splits_are_disjoint_and_smaller_benches_begin_alike():
    bench = Bench(Path(), Scale())
    splits = [bench.split(name) for name in bench.archs]
    assert splits == ["selection"] * 16 + ["seen"] * 24 + ["sealed"] * 24 + ["final"] * 32
    quick = Bench(Path(), Scale.quick()).archs
    assert list(quick.items()) == list(bench.archs.items())[:7]
    for arch in bench.archs.values():
        RESNET48_MINI.shared_plan(arch)
    assert len({RESNET48_MINI.plan(arch) for arch in bench.archs.values()}) == 96


def test_only_the_final_command_scores_final_architectures():
    bench = Bench(Path(), Scale())
    rates = dict.fromkeys(COMPARED, 0.02)
    final, tuning = bench_rank.jobs_of(final_entries(bench, rates)), tuning_jobs(COMPARED)
    assert {job.kind for job in final} == {"final"} and {job.kind for job in tuning} == {
        "selection"
    }
    # Whole seeds one after the other, and none that learning rates were chosen by.
    seeds = [job.seed for job in final]
    assert seeds == sorted(seeds) and not {*seeds} & {*DEVELOPMENT_SEEDS}
    number = {name: sum(job.method == METHODS[name] for job in final) for name in COMPARED}
    eight = ["first_place", "first_place_no_stage1", "first_place_uniform", "organisers"]
    assert number == dict.fromkeys(COMPARED, 5) | dict.fromkeys(eight, 8)
    assert len({job.rate for job in tuning}) == 3 and len(tuning) == 3 * len(COMPARED)
    for job, architectures in ((final[0], 32), (tuning[0], 16)):
        settings = bench.settings(job)
        assert settings["architectures"] == architectures == len(bench.of_splits((job.kind,)))
        assert settings["lr"] == job.rate and Job.from_name(job.name) == job
    truth = truth_jobs(bench, ("selection", "final"))
    assert len(truth) == 16 * 6 + 32 * 8 and truth[0].seed == 0 and truth[-1].seed == 7


def test_a_run_that_diverges_is_no_truth(tmp_path):
    bench = Bench(tmp_path, Scale.quick())
    paddle.seed(0)
    with pytest.raises(NotFiniteError):
        train_alone(bench, Job("truth", "arch1", 0), RESNET48_MINI.smallest(), 4, 1e12)


def test_a_learning_rate_that_diverges_is_a_result(finished):
    bench = Bench(finished, Scale.quick())
    job = Job.supernet("selection", "organisers", 1e12, 8)
    result = runs.run_supernet(bench, job)
    assert result["archs"] == {} and result["images"] == 100


# --- jobs and workers


@pytest.mark.parametrize(("method", "limit"), [("first_place", 0), ("first_place_clipped", 10)])
def test_gradients_of_stage_two_are_clipped_where_the_method_says_so(
    method, limit, finished, monkeypatch
):
    asked, build = [], runs.momentum_optimizer

    def recorded(network, schedule, momentum, weight_decay, clip_norm):
        asked.append(clip_norm)
        return build(network, schedule, momentum, weight_decay, clip_norm)

    monkeypatch.setattr(runs, "momentum_optimizer", recorded)
    job = Job.supernet("selection", method, 0.02, 8)
    assert runs.run_supernet(Bench(finished, Scale.quick()), job)["images"] == 100
    assert asked == [limit]


def test_a_job_comes_after_what_it_needs_and_before_the_next_seed(tmp_path):
    bench = Bench(tmp_path, Scale.quick())
    jobs = [
        Job.supernet("final", name, 0.02, seed)
        for seed in (0, 1)
        for name in (METHOD, "organisers", "first_place_no_stage1", "tilted")
    ]
    names = [job.name for job in workers.with_needs(bench, jobs)]
    assert names[:6] == [
        "pretrain-0",
        "stage1-frozen-0",
        "final-first_place@0.02-0",
        "final-organisers@0.02-0",
        "final-first_place_no_stage1@0.02-0",
        "stage1-largest-0",
    ]
    assert names[7] == "pretrain-1" and len(names) == 14
    # What finished supernets started from is not needed again.
    bench.runs.put(jobs[0].name, {"settings": bench.settings(jobs[0])})
    assert [job.name for job in workers.with_needs(bench, jobs[:2])] == [
        "pretrain-0",
        "final-organisers@0.02-0",
    ]


def test_a_worker_does_what_its_input_names_and_stops_with_it(monkeypatch):
    done = []
    monkeypatch.setattr(runs, "run_job", lambda bench, job: done.append(job))
    monkeypatch.setattr(sys, "stdin", io.StringIO("truth-arch1-0\nfinal-tilted@0.02-3\n"))
    reading, writing = os.pipe()
    workers.work(Bench(Path(), Scale.quick()), writing)
    os.close(writing)
    assert done == [Job("truth", "arch1", 0), Job.supernet("final", "tilted", 0.02, 3)]
    assert os.read(reading, 9) == b"++"
    os.close(reading)


def test_a_worker_whose_main_process_is_gone_ends_after_its_job(monkeypatch):
    done = []
    monkeypatch.setattr(runs, "run_job", lambda bench, job: done.append(job))
    monkeypatch.setattr(sys, "stdin", io.StringIO("truth-arch1-0\ntruth-arch2-0\n"))
    reading, writing = os.pipe()
    os.close(reading)
    workers.work(Bench(Path(), Scale.quick()), writing)
    os.close(writing)
    assert done == [Job("truth", "arch1", 0)]


def test_a_failing_worker_ends_the_bench_with_one_line(tmp_path):
    # A folder where the file of seconds should be made.
    (tmp_path / "seconds.jsonl").mkdir()
    command = [sys.executable, "-m", "hnas.bench.rank", "ground_truth", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--quick", "True", "--workers", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: cannot write {tmp_path}/seconds.jsonl" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the worker of truth-arch1-0 failed (exit code 2)")


# --- end to end


def test_every_job_leaves_one_line(finished):
    results, costs = records(finished / "runs.jsonl"), records(finished / "seconds.jsonl")
    expected = {f"truth-arch{i}-{seed}" for i in range(1, 8) for seed in (0, 1)}
    expected |= {f"{kind}-{seed}" for kind in ("pretrain", "stage1-frozen") for seed in (0, 8)}
    chosen = json.loads((finished / "learning_rates.json").read_text())["methods"][METHOD]
    assert set(chosen["taus"]) == {"0.0067", "0.02", "0.06"}
    expected |= {*TUNED, f"final-{METHOD}@{chosen['chosen']}-0"}
    assert set(results) == set(costs) == expected
    assert len((finished / "runs.jsonl").read_text().splitlines()) == len(expected)
    weights = {path.stem for path in (finished / "weights").glob("*.pdparams")}
    assert weights == {job for job in expected if job.startswith(("pretrain", "stage1"))}
    for job in expected:
        assert Job.from_name(job).name == job
        cost = costs[job]
        assert 0 < Bench(finished, Scale.quick()).seconds(Job.from_name(job)) == cost["seconds"]
        assert cost["cpu_seconds"] > 0 < cost["threads"] and cost["processor"]
        assert not {"processor", "threads"} & {*results[job], *results[job]["settings"]}
    for job in expected:
        if job.startswith(("selection", "final")):
            result = results[job]
            assert result["forwards"] == 4 + round(result["steps"] * 16 / 3) <= 26
            names = {"selection": ("arch1", "arch2", "arch3")}
            kept = names.get(job.split("-")[0], ("arch4", "arch5", "arch6", "arch7"))
            assert tuple(result["archs"]) == kept
            columns = ["hits", *(["calibrated_hits"] if job.startswith("selection") else [])]
            for entry in result["archs"].values():
                assert list(entry) == ["arch", *columns]
                assert all(0 <= entry[column] <= 100 for column in columns)
    assert list(finished.rglob("*.tmp")) == []


def test_the_report_compares_what_is_there(finished, capsys):
    run("report", finished)
    headline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(headline["final"]["tau"]) == {METHOD, "macs", "params"}
    # Of 26 supernets those that learning rates were chosen by are done.
    assert 20 < headline["changes"]["unfinished"] < 26
    rows = (finished / "final.md").read_text().splitlines()
    assert rows[2].startswith("| first place **(the default)** |")
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 5
    assert (finished / "final.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob("changes.*"))


def test_rank_report_reads_the_ground_truth(finished, tmp_path, capsys):
    truth = finished / "ground_truth.json"
    size = ["--image_size", "48", "--num_classes", "100", "--backbone", "resnet48_mini"]
    rank_report.main(["--pred", "params", "--gt", str(truth), "--out", str(tmp_path), *size])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["architectures"] == 7
    for entry in json.loads(truth.read_text()).values():
        assert entry["acc"] == pytest.approx(np.mean(entry["acc_seeds"]))
        assert entry["split"] in ("selection", "final")


def test_what_is_missing_is_done_again_to_the_same_bytes(finished, capsys):
    results, seconds = records(finished / "runs.jsonl"), finished / "seconds.jsonl"
    kept_weights = finished / "weights" / "pretrain-0.pdparams"
    stamp = kept_weights.stat().st_mtime_ns
    (last,) = [job for job in results if job.startswith("final")]
    lost = {last, "stage1-frozen-0", "truth-arch2-0"}
    kept, kept_seconds = without(finished / "runs.jsonl", lost), without(seconds, lost)
    # A killed process left half a line.
    (finished / "runs.jsonl").write_bytes(kept + line_of(results["truth-arch2-0"])[:70])
    (finished / "weights" / "stage1-frozen-0.pdparams").unlink()
    run("report", finished)
    headline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert headline["final"] == {"unfinished": 1}
    for command in ("ground_truth", "final"):
        run(command, finished, "--methods", METHOD)
    assert records(finished / "runs.jsonl") == results
    assert (finished / "runs.jsonl").read_bytes().startswith(kept)
    # Those of what was done again have taken the place of the earlier ones.
    assert without(seconds, lost) == kept_seconds and len(records(seconds)) == len(results)
    assert kept_weights.stat().st_mtime_ns == stamp


def test_weights_that_are_missing_are_trained_again_and_their_line_replaced(finished, tmp_path):
    """As when committed runs are copied: another machine's last digits may differ."""
    results = records(finished / "runs.jsonl")
    other = line_of(results["pretrain-0"] | {"hits": -1, "settings": {"pretrain_steps": 9}})
    (tmp_path / "runs.jsonl").write_bytes(other + without(finished / "runs.jsonl", {"pretrain-0"}))
    bench, job = Bench(tmp_path, Scale.quick()), Job("pretrain", "", 0)
    assert bench.result(job) is None and bench.seconds(job) is None
    assert bench.result(Job("stage1", "frozen", 0)) is None
    assert bench.result(Job.from_name(TUNED[0]))["images"] == 100
    run_job(bench, job)
    assert 0 <= bench.result(job)["hits"] <= 100 and bench.seconds(job) > 0
    after = records(tmp_path / "runs.jsonl")
    assert after.pop("pretrain-0") | {"hits": 0} == results.pop("pretrain-0") | {"hits": 0}
    assert after == results


def test_results_of_other_settings_are_refused_in_one_line(finished, monkeypatch):
    with pytest.raises(UserError, match=r"runs.jsonl: truth-arch1-0 is of other settings \("):
        bench_rank.main(["tune", "--out", str(finished)])
    # What a job does not depend on may differ; what it starts from may not.
    tuned, alone = Job.from_name(TUNED[0]), Job("truth", "arch1", 0)
    other = Bench(finished, replace(Scale.quick(), stage1_lr=0.1))
    assert other.result(alone) and other.result(Job("pretrain", "", 0))
    with pytest.raises(UserError, match=r"other settings \(stage1_lr\)"):
        other.result(tuned)
    monkeypatch.setitem(METHODS, METHOD, replace(METHODS[METHOD], tilt=1.0))
    with pytest.raises(UserError, match=r"other settings \(method\)"):
        Bench(finished, Scale.quick()).result(tuned)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("tune", ["--methods", "first_place,evolution"], "unknown method 'evolution'"),
        ("tune", [], "has not all of the selection's ground truth"),
        ("final", [], "has no learning rate of first_place; run tune"),
        ("changes", ["--learning_rates", "none.json"], "none.json has no learning rate"),
        ("changes", ["--rate", "0.5"], "invalid choice: 0.5"),
        ("improved", [], "has no learning rate of first_place; run tune"),
        ("breaking", [], "has no learning rate of first_place; run tune"),
        ("report", [], "has no ground truth yet"),
        ("ground_truth", ["--seeds", "0"], "out of bounds"),
        ("tune", ["--workers", "none"], "not a whole number"),
        ("ground_truth", ["--splits", "seen,held_out"], "no split is called 'held_out'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_trained(command, arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        bench_rank.main([command, "--out", str(tmp_path), *arguments])
    assert not (tmp_path / "runs.jsonl").exists()
