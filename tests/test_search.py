"""The search tool: generations by the shared walk, resumed exactly, refused, written."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hnas.architecture_file import read_accuracies
from hnas.base.errors import UserError
from hnas.bench import search as bench
from hnas.dataset.image_folder import scan_images
from hnas.evaluation.images import DecodedImages, balanced_order
from hnas.evaluation.reference import evaluate_network
from hnas.evaluation.shared import SharedEvaluator
from hnas.models.pinasv2 import build_network
from hnas.ranking.latency import all_parts, parts_of, read_latency
from hnas.search_space import search_space
from hnas.tools import choose, search
from hnas.tools.digits_folder import write_digits
from hnas.utils.training import load_backbone

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoint_files/demo_stage2.pdparams"
SPACE = search_space("resnet48_mini")
MAX_MACS = 4_900_000
KINDS = ("mean", "mean_absolute", "largest_absolute")
IMAGES = 40


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def flags(digits, folder, line=""):
    """A small search, and what else is given, which wins."""
    return [
        *("--backbone", "resnet48_mini", "--ckpt_dir", str(CHECKPOINT), "--image_size", "32"),
        *("--image_dir", str(digits), "--num_workers", "0", "--bn_calibration_images", "8"),
        *("--eval_images", str(IMAGES), "--chunk_size", "25", "--save_dir", str(folder)),
        *("--population", "6", "--children", "3", "--generations", "3", "--tournament", "3"),
        *("--max_macs", str(MAX_MACS), "--device", "cpu"),
        *line.split(),
    ]


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """An uninterrupted search."""
    folder = tmp_path_factory.mktemp("whole")
    search.main(flags(digits, folder))
    return folder


def rows_of(folder):
    with open(folder / "search.csv", newline="") as file:
        return list(csv.DictReader(file))


RESULTS = ("submission.json", "submission_top5.json", "estimates.json", "search.json", "search.csv")


def same_results(one, other):
    return [name for name in RESULTS if (one / name).read_bytes() != (other / name).read_bytes()]


def test_accuracies_are_the_reference_engines(whole, digits):
    archs, accuracies = read_accuracies(whole / "submission.json")
    assert len(archs) == 6 + 3 * 3 and list(archs)[:2] == ["arch1", "arch2"]
    network = build_network("resnet48_mini", 10, SPACE)
    load_backbone(network, str(CHECKPOINT), [str(label) for label in range(10)])
    images = scan_images(digits, "val")
    order = balanced_order(images.labels, 0)[:IMAGES]
    batch = DecodedImages(images, order, 32, 1.0, whole).batch(0, IMAGES)
    options = search.parse_options(search.Stage.SEARCH, flags(digits, whole))
    calibration = search.calibration_images(options, False)
    for (name, arch), accuracy in list(zip(archs.items(), accuracies, strict=True))[::4]:
        network.activate(arch)
        counts = evaluate_network(network, [batch], calibration)
        assert abs(counts.accuracy()[0] - accuracy) <= counts.near1[0] / IMAGES, name


def test_what_is_written(whole):
    rows = rows_of(whole)
    archs, accuracies = read_accuracies(whole / "submission.json")
    assert {row["name"] for row in rows} == set(archs)
    for row in rows:
        arch = archs[row["name"]]
        assert row["arch"] == arch.code
        assert float(row["acc"]) == accuracies[list(archs).index(row["name"])]
        assert int(row["macs"]) == SPACE.macs(arch, 32, 10) <= MAX_MACS
        assert int(row["params"]) == SPACE.params(arch, 10)
    assert sorted(int(row["generation"]) for row in rows) == [0] * 6 + [1] * 3 + [2] * 3 + [3] * 3
    content = json.loads((whole / "search.json").read_text())
    points = [(float(row["acc"]), int(row["macs"])) for row in rows]

    def beaten(acc, macs):
        return any(a >= acc and m <= macs and (a, m) != (acc, macs) for a, m in points)

    front = sorted(macs for acc, macs in set(points) if not beaten(acc, macs))
    assert [row["macs"] for row in content["front"]] == front
    assert content["best"]["acc"] == max(accuracies) == content["course"][-1]["best"]
    assert [row["scored"] for row in content["course"]] == [6, 9, 12, 15]
    assert (whole / "front.svg").read_text().startswith("<svg")


def test_choose_reads_it(whole, tmp_path, capsys):
    choose.main(
        f"--submission {whole / 'submission.json'} --backbone resnet48_mini --image_size 32 "
        f"--num_classes 10 --max_macs {MAX_MACS} --out {tmp_path}".split()
    )
    best = json.loads((tmp_path / "choice.json").read_text())["networks"][0]
    assert best == json.loads((whole / "search.json").read_text())["best"]


def test_a_killed_search_ends_in_the_same_files(whole, digits, tmp_path, monkeypatch):
    scored = []
    evaluate = SharedEvaluator.evaluate

    def counting(self, images, *arguments, **named):
        if len(scored) == 5:
            raise KeyboardInterrupt
        watched = evaluate(self, images, *arguments, **named)
        scored.append([arch.code for arch in self.archs])
        return watched

    monkeypatch.setattr(SharedEvaluator, "evaluate", counting)
    with pytest.raises(KeyboardInterrupt):
        search.main(flags(digits, tmp_path))  # in the second chunk of the third generation
    assert not (tmp_path / "submission.json").exists()
    scored.append("killed")
    # Another size of chunks is asked for: the first run's stays.
    search.main(flags(digits, tmp_path, "--chunk_size 40"))
    assert same_results(whole, tmp_path) == []
    # 4 generations of 2 chunks; nothing was scored twice.
    walks = [codes for codes in scored if codes != "killed"]
    assert len(walks) == 8
    assert len({code for codes in walks for code in codes}) == 15
    # Done already: nothing is scored, and the result is the same.
    search.main(flags(digits, tmp_path))
    assert len(scored) == 9 and same_results(whole, tmp_path) == []


def test_more_generations_go_on(whole, digits, tmp_path):
    search.main(flags(digits, tmp_path, "--generations 1"))
    assert len(rows_of(tmp_path)) == 9
    search.main(flags(digits, tmp_path))
    assert same_results(whole, tmp_path) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--population 7", "another population (6 instead of 7)"),
        ("--children 2", "another children (3 instead of 2)"),
        ("--tournament 2", "another tournament (3 instead of 2)"),
        ("--seed 1", "another image list"),
        ("--max_macs 5e6", "another budget"),
        ("--max_params 1e9", "another budget"),
        ("--bn_calibration_images 9", "another calibration"),
        ("--ckpt_dir checkpoint_files/demo_stage1.pdparams", "another checkpoint"),
    ],
)
def test_other_settings_are_refused(whole, digits, line, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = {name: (whole / name).read_bytes() for name in RESULTS}
    with pytest.raises(UserError) as error:
        search.main(flags(digits, whole, line))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert all((whole / name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--backbone resnet48pinasv2_mini", "stage 1's"),
        ("--max_macs 1000", "no architecture is within 1,000 MACs"),
        ("--max_macs nan", "not a finite number"),
        ("--max_latency_ms 3", "--max_latency_ms needs --latency FILE"),
        ("--latency nowhere.json", "cannot read nowhere.json"),
        ("--ckpt_dir None", "--ckpt_dir"),
        ("--eval_images 1000", "--eval_images 1000, but"),
        ("--population 1", "--population 1 is too small"),
        ("--max_mac=3", "did you mean --max_macs?"),
    ],
)
def test_wrong_flags_are_one_line(digits, tmp_path, line, words):
    with pytest.raises(UserError) as error:
        search.main(flags(digits, tmp_path / "out", line))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.json"))


def test_latency_limits(digits, tmp_path, capsys):
    """By a table in which only the blocks of stage 3 take time."""
    times = {part.name: float(part.stage == 2) for part in all_parts(SPACE)}
    about = {
        "backbone": "resnet48_mini",
        "sample_space": "released",
        "image_size": 32,
        "device": "cpu",
        "processor": "a CPU",
        "engine": "none",
        "paddle": "3.3.1",
        "format": 1,
        "num_classes": 10,
        "batch_size": 1,
        "threads": 1,
    }
    file = tmp_path / "latency.json"
    file.write_text(json.dumps({**about, "milliseconds": times}))
    line = f"--latency {file} --max_latency_ms 3 --max_macs 0 --generations 1"
    search.main(flags(digits, tmp_path / "out", line))
    archs, _ = read_accuracies(tmp_path / "out/submission.json")
    assert {arch.depths[2] for arch in archs.values()} <= {2, 3}
    for row in rows_of(tmp_path / "out"):
        parts = parts_of(SPACE.plan(archs[row["name"]]))
        assert float(row["latency"]) == sum(times[part.name] for part in parts)
    with pytest.raises(UserError, match="measured for the released space"):
        search.main(flags(digits, tmp_path / "full", f"--latency {file} --sample_space full"))


@pytest.mark.slow
def test_two_processes_find_the_same(whole, digits, tmp_path):
    launcher = ["-m", "hnas.parallel.launcher", "--nproc_per_node", "2"]
    launcher += ["--log_dir", str(tmp_path / "log"), str(ROOT / "hnas/tools/search.py"), "run"]
    done = subprocess.run(
        [sys.executable, *launcher, *flags(digits, tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PADDLE_DISTRI_BACKEND": "gloo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert same_results(whole, tmp_path / "out") == []


# --- the bench


def test_the_benchs_test_is_a_paired_one():
    evolution, random = np.array([0.8, 0.81, 0.79, 0.83]), np.array([0.79, 0.78, 0.78, 0.80])
    runs = [
        {"evolution": {"acc": a}, "random": {"acc": b}}
        for a, b in zip(evolution, random, strict=True)
    ]
    found = bench.paired_test(runs, "acc")
    difference = evolution - random
    error = np.sqrt(((difference - difference.mean()) ** 2).sum() / 3 / 4)
    t = difference.mean() / error
    # The upper tail of Student's t with 3 degrees of freedom in closed form.
    x = t / np.sqrt(3)
    p = 0.5 - (np.arctan(x) + x / (1 + x * x)) / np.pi
    assert found["difference"] == pytest.approx(0.02, abs=1e-5)
    assert found["standard_error"] == pytest.approx(error, abs=1e-5)
    assert found["p"] == pytest.approx(p, abs=1e-6)


def test_the_benchs_images_are_of_the_demos_scans(digits, tmp_path):
    bench.write_task(tmp_path / "search", "search")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    bench.write_task(tmp_path / "search", "search")
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    for split in ("train", "val"):
        own = {
            (path.parent.name, path.stem.removesuffix("_0"))
            for path in (tmp_path / "search" / split).rglob("*.png")
        }
        demos = {(path.parent.name, path.stem) for path in (digits / split).rglob("*.png")}
        assert own == demos


# --- the page


def results(name):
    return json.loads((ROOT / "docs/results" / name).read_text())


def table_after(marker):
    text = (ROOT / "docs/search.md").read_text().split(f"<!-- {marker} -->")[1].strip()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split("\n\n")[0].splitlines()
    ]
    return rows[2:]


def test_the_pages_searches_are_the_result_files():
    found = results("search_resnet48_mini_32px.json")
    expected = [
        [str(seed), *(f"{100 * run[m][k]:.2f}" for k in ("acc", "fresh") for m in bench.METHODS)]
        for seed, run in enumerate(found["runs"])
    ]
    means = [f"{100 * found['test'][k][m]:.2f}" for k in ("acc", "fresh") for m in bench.METHODS]
    assert table_after("search table") == [*expected, ["mean", *means]]
    text = " ".join((ROOT / "docs/search.md").read_text().split())
    for kind, runs in itertools.product(("acc", "fresh"), (found["runs"][:5], found["runs"])):
        test = bench.paired_test(runs, kind)
        gain, error = 100 * test["difference"], 100 * test["standard_error"]
        assert f"{gain:.2f} +- {error:.2f} points, p = {test['p']:.2g}" in text
    listed = found["list"]
    assert f"{listed['drawn']:,} codes drawn from the list, {listed['within']:,} are within" in text
    assert f"the best has {100 * listed['acc']:.2f} %" in text
    assert ", ".join(f"{100 * value:.2f}" for value in listed["found"][:5]) in text
    assert f"{found['time']['ratio_cpu']:.1f} times" in text


def test_the_pages_latencies_are_the_result_files():
    found = results("latency_resnet48_224px.json")
    read_latency(ROOT / "docs/results/latency_resnet48_224px.json")
    check = found["check"]
    shown = [f"{100 * check[f'{kind}_error']:.1f} %" for kind in KINDS]
    measured = [row["measured"] for row in check["networks"]]
    assert table_after("latency table") == [
        [f"{min(measured):.1f} to {max(measured):.1f} ms", *shown]
    ]
    assert found["rounds"] == 2 and found["processor"].startswith("AMD EPYC")
    for backbone, *counts in table_after("latency blocks"):
        for sample_space, count in zip(("released", "full"), counts, strict=True):
            parts = all_parts(search_space(backbone, sample_space))
            assert int(count) == sum(part.kind == "block" for part in parts)
