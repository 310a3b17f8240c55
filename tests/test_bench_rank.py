"""The ranking bench from end to end: its budget, its files, and what it prints."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from scipy import stats

from hnas.base.errors import UserError
from hnas.bench.rank import __main__ as bench_rank
from hnas.bench.rank.jobs import LOOKED_AT, Bench, Job, Scale
from hnas.bench.rank.methods import DEFAULTS, FINALISTS, METHODS, RECIPE, STAGE1_FORWARDS
from hnas.bench.rank.runs import run_job, train_alone
from hnas.search_space import RESNET48_MINI, Architecture
from hnas.tools import rank_report
from hnas.utils.weights import NotFiniteError

ROOT = Path(__file__).parents[1]
QUICK = ("uniform_distill", "sandwich_inplace", "seed_recipe")


def run(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "hnas.bench.rank", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


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
    """A folder after ground_truth, supernets and report, and what the last one printed."""
    out = tmp_path_factory.mktemp("rank")
    common = ("--out", out, "--quick", True, "--splits", ",".join(LOOKED_AT), "--workers", 2)
    run("ground_truth", *common)
    run("supernets", *common)
    return out, run("report", *common).stdout


# --- the budget


def test_all_methods_cost_the_same():
    assert set(DEFAULTS) < set(METHODS)
    for scale in (Scale(), Scale.quick(), replace(Scale(), budget=2499, stage1_steps=7)):
        for name, method in METHODS.items():
            # Passes of a step: the sub-networks', and the teacher's if it is a network apart.
            step = method.subnetworks + {"pretrained": 1, "in place": 0, "none": 0}[method.teacher]
            # The first place's law trains one sub-network more in every third step.
            step += 1 / 3 if name == "first_place" else 0
            spent = scale.steps(method) * step
            spent += {"none": 0}.get(method.stage1, 4 * scale.stage1_steps)
            stage1 = scale.stage1_forwards(method)
            assert spent == pytest.approx(scale.steps(method) * method.forwards + stage1)
            assert scale.budget - step < spent <= scale.budget + 1e-6, name
    assert STAGE1_FORWARDS == 4


def test_a_budget_without_a_step_is_refused():
    with pytest.raises(UserError, match="no step of stage 2"):
        replace(Scale(), budget=402).steps(METHODS["seed_recipe"])


def test_splits_are_disjoint_and_smaller_benches_begin_alike():
    bench = Bench(Path(), Scale())
    splits = [bench.split(name) for name in bench.archs]
    assert splits == ["selection"] * 16 + ["seen"] * 24 + ["sealed"] * 24 + ["final"] * 32
    quick = Bench(Path(), Scale.quick()).archs
    assert list(quick.items()) == list(bench.archs.items())[:7]
    for arch in bench.archs.values():
        RESNET48_MINI.shared_plan(arch)
    assert len({RESNET48_MINI.plan(arch) for arch in bench.archs.values()}) == 96


def test_only_finalists_are_scored_on_sealed_architectures():
    assert RECIPE in FINALISTS and "uniform_distill" in FINALISTS
    for scale in (Scale(), Scale.quick()):
        bench = Bench(Path(), scale)
        for name in METHODS:
            own = bench.scored(name)
            splits = {bench.split(arch) for arch in own}
            assert own.items() <= bench.archs.items()
            assert splits == {"selection", "seen", *(["sealed"] if name in FINALISTS else [])}
            settings = bench.settings(Job("supernet", name, 0))
            assert settings["architectures"] == len(own)
        assert len(bench.scored(RECIPE)) - len(bench.scored("bias_4")) == scale.sealed > 0
        assert len(bench.archs) - len(bench.scored(RECIPE)) == scale.final > 0


def test_finalists_have_more_seeds_where_the_sealed_are_compared_unless_told():
    bench = Bench(Path(), Scale())
    options = bench_rank.parse(["supernets", "--out", "x"])
    seeds = bench_rank.seeds_of(bench, options)
    assert set(seeds) == set(DEFAULTS) and set(seeds.values()) == {range(3)}
    sealed = ["--splits", "sealed,seen,selection"]
    seeds = bench_rank.seeds_of(bench, bench_rank.parse(["supernets", "--out", "x", *sealed]))
    assert seeds["fair"] == seeds[RECIPE] == range(bench.scale.finalist_seeds)
    assert bench.scale.finalist_seeds > 3 and seeds["single_path"] == range(3)
    options = bench_rank.parse(["supernets", "--out", "x", "--seeds", "2", *sealed])
    assert set(bench_rank.seeds_of(bench, options).values()) == {range(2)}


def test_a_run_that_diverges_is_no_result(tmp_path):
    bench = Bench(tmp_path, Scale.quick())
    paddle.seed(0)
    with pytest.raises(NotFiniteError):
        train_alone(bench, Job("truth", "arch1", 0), RESNET48_MINI.smallest(), 4, 1e12)


# --- end to end


def test_every_job_leaves_one_line(finished):
    out, _ = finished
    runs, seconds = records(out / "runs.jsonl"), records(out / "seconds.jsonl")
    expected = {f"truth-arch{i}-0" for i in range(1, 6)} | {"pretrain-0", "stage1-largest-0"}
    expected |= {f"supernet-{name}-0" for name in QUICK}
    assert set(runs) == set(seconds) == expected
    assert len((out / "runs.jsonl").read_text().splitlines()) == len(expected)
    weights = {path.stem for path in (out / "weights").glob("*.pdparams")}
    assert weights == {"pretrain-0", "stage1-largest-0"}
    for job in expected:
        assert Job.from_name(job).name == job
        assert 0 < Bench(out, Scale.quick()).seconds(Job.from_name(job)) == seconds[job]["seconds"]
        settings = runs[job]["settings"]
        assert settings["batch_size"] == 16 and settings["task"]["train_scans"] == 1200
    for name in QUICK:
        result = runs[f"supernet-{name}-0"]
        forwards = {"uniform_distill": 5, "sandwich_inplace": 4, "seed_recipe": 5}[name]
        before = 12 if name == "seed_recipe" else 0
        assert result["forwards"] == before + result["steps"] * forwards
        assert 40 - forwards < result["forwards"] <= 40 and result["images"] == 200
        for entry in result["archs"].values():
            assert 0 <= entry["hits"] <= 200 and 0 <= entry["calibrated_hits"] <= 200
    assert list(out.rglob("*.tmp")) == []


@pytest.mark.parametrize("part", ["held_out", "seen"])
def test_the_figures_are_scipys(finished, part):
    out, printed = finished
    truth = json.loads((out / "ground_truth.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    runs = records(out / "runs.jsonl")
    splits = {"held_out": ["seen", "seen", "sealed"], "seen": ["seen", "seen"]}[part]
    chosen = [name for name, entry in truth.items() if entry["split"] in splits]
    assert [truth[name]["split"] for name in chosen] == splits
    acc = [truth[name]["acc"] for name in chosen]
    for name in QUICK:
        if part == "held_out" and name not in FINALISTS:
            assert part not in summary["methods"][name]
            continue
        archs = runs[f"supernet-{name}-0"]["archs"]
        for kind, column in (("plain", "hits"), ("calibrated", "calibrated_hits")):
            scores = [archs[arch][column] for arch in chosen]
            expected = stats.kendalltau(scores, acc).statistic
            found = summary["methods"][name][part][kind]["kendall_tau_b"]
            if np.isnan(expected):
                assert found["mean"] is None
            else:
                assert found["mean"] == pytest.approx(expected)
                assert found["seeds"] == [pytest.approx(expected)] and found["se"] is None
        assert summary["methods"][name]["seconds"] > 0
    macs = [RESNET48_MINI.macs(Architecture.from_code(truth[a]["arch"]), 48, 100) for a in chosen]
    tau = stats.kendalltau(macs, acc).statistic
    assert summary["baselines"]["macs"][part]["kendall_tau_b"] == pytest.approx(tau)
    headline = json.loads(printed.splitlines()[-1])
    assert headline[f"{part}_tau"]["macs"] == pytest.approx(tau)
    assert ("sandwich_inplace plain" in headline[f"{part}_tau"]) == (part == "seen")
    assert headline["architectures"] == 3 and headline["ceiling"] is None


@pytest.mark.parametrize(
    ("kind", "methods"),
    [("finalists", [name for name in QUICK if name in FINALISTS]), ("methods", QUICK)],
)
def test_tables_and_plots_hold_their_methods(finished, kind, methods):
    out, _ = finished
    rows = (out / f"{kind}.md").read_text().splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert [row.split("|")[1].strip(" `") for row in rows[2:]] == [
        *methods,
        "macs",
        "params",
        "ceiling",
    ]
    assert (out / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_rank_report_reads_the_ground_truth(finished, tmp_path, capsys):
    out, _ = finished
    truth = out / "ground_truth.json"
    size = ["--image_size", "48", "--num_classes", "100", "--backbone", "resnet48_mini"]
    rank_report.main(["--pred", "params", "--gt", str(truth), "--out", str(tmp_path), *size])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["architectures"] == 5
    about = json.loads((out / "ground_truth_settings.json").read_text())
    assert about["scale"]["truth_steps"] == 12
    words = about["command"].replace("OUT", "x").split()[3:]
    assert bench_rank.parse(words).command == "ground_truth"


def test_what_is_missing_is_done_again_to_the_same_bytes(finished):
    out, _ = finished
    before, runs, seconds = contents(out), records(out / "runs.jsonl"), out / "seconds.jsonl"
    kept_weights = out / "weights" / "pretrain-0.pdparams"
    stamp = kept_weights.stat().st_mtime_ns
    lost = {"supernet-seed_recipe-0", "stage1-largest-0", "truth-arch2-0"}
    kept = without(out / "runs.jsonl", lost)
    kept_seconds = without(seconds, lost)
    # A killed process left half a line.
    (out / "runs.jsonl").write_bytes(kept + line_of(runs["truth-arch2-0"])[:70])
    (out / "weights" / "stage1-largest-0.pdparams").unlink()
    common = ("--out", out, "--quick", True, "--splits", ",".join(LOOKED_AT), "--workers", 2)
    run("report", *common, "--methods", "uniform_distill")
    error = run("report", *common, "--methods", "seed_recipe", code=2).stderr
    assert "no method with all of its seeds" in error.splitlines()[-1]
    done = "".join(run(command, *common).stderr for command in ("ground_truth", "supernets"))
    assert {job for job in runs if f"] {job}: " in done} == lost
    run("report", *common)
    after = contents(out)
    assert set(after) == set(before)
    assert records(out / "runs.jsonl") == runs
    assert after[Path("runs.jsonl")].startswith(kept)
    # Those of what was done again have taken the place of the earlier ones.
    assert without(seconds, lost) == kept_seconds and len(records(seconds)) == len(runs)
    assert kept_weights.stat().st_mtime_ns == stamp
    timed = ("summary.json", "finalists.md", "methods.md")
    for path, content in before.items():
        assert after[path] == content or path.suffix == ".jsonl" or path.name in timed, path


def test_weights_that_are_missing_are_trained_again_and_their_line_replaced(finished, tmp_path):
    """As when committed runs are copied: another machine's last digits may differ."""
    out, _ = finished
    runs = records(out / "runs.jsonl")
    other = line_of(runs["pretrain-0"] | {"hits": -1})
    (tmp_path / "runs.jsonl").write_bytes(other + without(out / "runs.jsonl", {"pretrain-0"}))
    bench, job = Bench(tmp_path, Scale.quick()), Job("pretrain", "", 0)
    assert bench.result(job) is None and bench.seconds(job) is None
    assert bench.result(Job("stage1", "largest", 0)) is None
    assert bench.result(Job("supernet", "seed_recipe", 0))["images"] == 200
    run_job(bench, job)
    assert 0 <= bench.result(job)["hits"] <= 200 and bench.seconds(job) > 0
    after = records(tmp_path / "runs.jsonl")
    assert after.pop("pretrain-0") | {"hits": 0} == runs.pop("pretrain-0") | {"hits": 0}
    assert after == runs


def test_without_the_sealed_all_methods_are_compared_on_the_rest(finished, tmp_path):
    out, _ = finished
    sealed = "truth-arch5-0"
    (tmp_path / "runs.jsonl").write_bytes(without(out / "runs.jsonl", {sealed}))
    common = ("--out", tmp_path, "--quick", True)
    # Weights are not there, but nothing starts from them any more.
    for command in ("ground_truth", "supernets"):
        run(command, *common)
    assert sealed not in records(tmp_path / "runs.jsonl")
    assert not (tmp_path / "weights").exists()
    headline = json.loads(run("report", *common).stdout.splitlines()[-1])
    assert headline["architectures"] == 2 and set(headline["verdict"]) == {"seen"}
    assert headline["held_out_tau"] == {} and "seed_recipe plain" in headline["seen_tau"]
    assert {path.name for path in tmp_path.glob("*.md")} == {"methods.md"}
    error = run("report", *common, "--splits", "selection,sealed", code=2).stderr
    assert "has no architectures of the split 'sealed'" in error.splitlines()[-1]
    # A ground truth that has them gives the same comparison without them.
    again = run("report", *common, "--ground_truth", out / "ground_truth.json").stdout
    assert json.loads(again.splitlines()[-1]) == headline


def test_results_of_other_settings_are_refused_in_one_line(finished, tmp_path, monkeypatch):
    out, _ = finished
    error = run("supernets", "--out", out, code=2).stderr
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert (
        len(lines) == 1
        and "runs.jsonl: supernet-uniform_distill-0 is of other settings (" in lines[0]
    )
    # What a job does not depend on may differ; what it starts from may not.
    recipe, alone = Job("supernet", "seed_recipe", 0), Job("truth", "arch1", 0)
    other = Bench(out, replace(Scale.quick(), stage1_lr=0.1))
    assert other.result(alone) and other.result(Job("pretrain", "", 0))
    with pytest.raises(UserError, match=r"other settings \(stage1_lr\)"):
        other.result(recipe)
    monkeypatch.setitem(METHODS, "seed_recipe", replace(METHODS["seed_recipe"], tilt=1.0))
    with pytest.raises(UserError, match=r"other settings \(method\)"):
        Bench(out, Scale.quick()).result(recipe)
    monkeypatch.undo()
    assert Bench(out, Scale.quick()).result(recipe)


def test_a_failing_worker_ends_the_bench_with_one_line(tmp_path):
    # A folder where the file of seconds should be made.
    (tmp_path / "seconds.jsonl").mkdir()
    error = run("ground_truth", "--out", tmp_path, "--quick", True, "--workers", 1, code=2).stderr
    assert "Traceback" not in error
    assert f"error: cannot write {tmp_path}/seconds.jsonl" in error
    assert "1 of 1 workers failed" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "seed_recipe,evolution"], "unknown method 'evolution'"),
        (["--seeds", "0"], "out of bounds"),
        (["--workers", "none"], "not a whole number"),
        (["--splits", "seen,held_out"], "no split is called 'held_out'"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        bench_rank.main(["supernets", "--out", str(tmp_path), *arguments])
