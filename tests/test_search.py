"""The search tool: what evolution proposes, generations by the shared walk, resumed exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import option_ranks
from hypothesis import given
from hypothesis import strategies as st
from independent import latency_file

from hnas.architecture_file import read_accuracies
from hnas.base.errors import UserError
from hnas.dataset.image_folder import scan_images
from hnas.evaluation.evolution import Budget, Evolution, crossed, mutated
from hnas.evaluation.images import ScoredImages, balanced_order
from hnas.evaluation.reference import evaluate_network
from hnas.evaluation.shared import SharedEvaluator
from hnas.models.pinasv2 import build_network
from hnas.ranking.costs import all_parts, parts_of
from hnas.search_space import FULL_DIGITS, RELEASED_DIGITS, RESNET48, search_space
from hnas.tools import choose, search
from hnas.tools.digits_folder import write_digits
from hnas.utils.starting import start_from_checkpoint

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoint_files/demo_stage2.pdparams"
SPACE = search_space("resnet48_mini")
MAX_MACS = 4_900_000
ANY = Budget(SPACE, 32, 10, {})
IMAGES = 40


def evolution(budget=ANY, seed=0, population=20, children=10, tournament=5):
    return Evolution(budget, seed, population, children, tournament)


def choices_of(arch, digits):
    """Every choice of a code by its name, read by position."""
    ranks = option_ranks([arch.code], digits)
    return {name: int(chosen[0]) for name, (_, chosen) in ranks.items() if len(chosen)}


@given(
    seed=st.integers(0, 2**32 - 1),
    full=st.booleans(),
    backbone=st.sampled_from(["resnet48", "resnet48_mini"]),
)
def test_a_mutation_changes_one_choice(seed, full, backbone):
    space = search_space(backbone, "full" if full else "released")
    digits = FULL_DIGITS if full else RELEASED_DIGITS
    rng = np.random.default_rng(seed)
    parent = space.sample(rng)
    child = mutated(space, parent, rng)
    space.shared_plan(child)  # it is one of the space
    before, after = choices_of(parent, digits), choices_of(child, digits)
    changed = [name for name in before if name in after and before[name] != after[name]]
    assert len(changed) == 1
    for name, (options, chosen) in option_ranks([child.code], digits).items():
        assert ((chosen >= 0) & (chosen < options)).all(), name
    # Blocks come and go with the depth only.
    if set(before) != set(after):
        assert changed[0].startswith("depth")


def test_every_choice_and_option_is_reached():
    rng = np.random.default_rng(0)
    parent = SPACE.largest()
    found = [mutated(SPACE, parent, rng).code for _ in range(4000)]
    ranks = option_ranks(found, RELEASED_DIGITS)
    for name, (options, chosen) in ranks.items():
        assert set(chosen.tolist()) == set(range(options)), name
    # 4 depths, 4 outputs and 23 inner widths, all as likely.
    depths = sum(
        int((chosen != options - 1).sum())
        for name, (options, chosen) in ranks.items()
        if name.startswith("depth")
    )
    assert depths / 4000 == pytest.approx(4 / 31, abs=4 * (4 / 31 / 4000) ** 0.5)


def test_proposals_are_new_within_the_budget_and_the_seeds():
    macs = [SPACE.macs(SPACE.sample(np.random.default_rng(i)), 32, 10) for i in range(50)]
    budget = Budget(SPACE, 32, 10, {"macs": np.quantile(macs, 0.2), "params": 1.2e6})
    runs = []
    for seed in (0, 0, 1):
        scored = []
        for generation in range(4):
            accuracy = np.array([SPACE.params(arch, 10) for arch in scored], float)
            scored += evolution(budget, seed).propose(scored, accuracy, generation)
        runs.append(scored)
    assert runs[0] == runs[1] != runs[2]
    for scored in runs:
        assert len(scored) == 20 + 3 * 10
        assert len({SPACE.plan(arch) for arch in scored}) == len(scored)
        for arch in scored:
            assert SPACE.macs(arch, 32, 10) <= np.quantile(macs, 0.2)
            assert SPACE.params(arch, 10) <= 1.2e6
    # Of 64 channels, 1.0 and 0.95 are both 64 in multiples of 8: networks that are scored once.
    archs = evolution(Budget(RESNET48, 224, 1000, {}), population=200).propose([], np.zeros(0), 0)
    assert len({RESNET48.plan(arch) for arch in archs}) == 200


@given(seed=st.integers(0, 2**32 - 1))
def test_a_child_of_two_has_every_choice_from_one_of_them(seed):
    rng = np.random.default_rng(seed)
    one, other = SPACE.sample(rng), SPACE.sample(rng)
    child = crossed(SPACE, one, other, rng)
    SPACE.shared_plan(child)
    parents = [choices_of(arch, RELEASED_DIGITS) for arch in (one, other)]
    for name, option in choices_of(child, RELEASED_DIGITS).items():
        assert option in [own[name] for own in parents if name in own], name
    assert crossed(SPACE, one, one, rng) == one


def test_parents_are_the_best_of_the_living_only():
    rng = np.random.default_rng(3)
    old = [SPACE.sample(rng) for _ in range(30)]
    scored = [*old, *(SPACE.sample(rng) for _ in range(20))]
    # Of 50, the last 20 live; all are drawn for the tournament; number 41 is the best of them.
    accuracy = np.concatenate([np.full(30, 0.9), np.full(20, 0.1)])
    accuracy[41] = 0.5
    for child in evolution(tournament=20).propose(scored, accuracy, 1):
        before = choices_of(scored[41], RELEASED_DIGITS)
        after = choices_of(child, RELEASED_DIGITS)
        assert sum(before[n] != after[n] for n in before if n in after) == 1


def test_a_budget_that_leaves_few_or_none():
    smallest = SPACE.smallest()
    macs = SPACE.macs(smallest, 32, 10)
    tight = evolution(Budget(SPACE, 32, 10, {"macs": macs}), population=5)
    assert tight.propose([], np.zeros(0), 0) == [smallest]
    assert tight.propose([smallest], np.ones(1), 1) == []
    with pytest.raises(UserError, match="no architecture is within 1,000 MACs, 50 parameters"):
        evolution(Budget(SPACE, 32, 10, {"macs": 1e3, "params": 50})).propose([], np.zeros(0), 0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def flags(digits, folder, line=""):
    """A small search, and what else is given, which wins."""
    small = (
        f"--backbone resnet48_mini --ckpt_dir {CHECKPOINT} --image_size 32 --image_dir {digits} "
        f"--num_workers 0 --bn_calibration_images 8 --eval_images {IMAGES} --chunk_size 25 "
        f"--population 6 --children 3 --generations 3 --tournament 3 --max_macs {MAX_MACS} "
        f"--device cpu --save_dir {folder} "
    )
    return (small + line).split()


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """An uninterrupted search."""
    folder = tmp_path_factory.mktemp("whole")
    search.main(flags(digits, folder))
    return folder


RESULTS = ("submission.json", "submission_top5.json", "estimates.json", "search.json")


def same_results(one, other):
    return [name for name in RESULTS if (one / name).read_bytes() != (other / name).read_bytes()]


def test_accuracies_are_the_reference_engines(whole, digits):
    archs, accuracies = read_accuracies(whole / "submission.json")
    assert len(archs) == 6 + 3 * 3 and list(archs)[:2] == ["arch1", "arch2"]
    network = build_network("resnet48_mini", 10, SPACE)
    start_from_checkpoint(network, str(CHECKPOINT), [str(label) for label in range(10)])
    images = scan_images(digits, "val")
    order = balanced_order(images.labels, 0)[:IMAGES]
    batch = ScoredImages(images, order, 32).batch(0, IMAGES)
    options = search.parse_options(search.Stage.SEARCH, flags(digits, whole))
    calibration = search.calibration_images(options, False)
    for (name, arch), accuracy in list(zip(archs.items(), accuracies, strict=True))[::4]:
        network.activate(arch)
        counts = evaluate_network(network, [batch], calibration)
        assert abs(counts.accuracy()[0] - accuracy) <= counts.near1[0] / IMAGES, name


def test_what_is_written(whole, tmp_path):
    archs, accuracies = read_accuracies(whole / "submission.json")
    macs = [SPACE.macs(arch, 32, 10) for arch in archs.values()]
    assert max(macs) <= MAX_MACS
    content = json.loads((whole / "search.json").read_text())
    assert content["best"]["acc"] == max(accuracies) == content["course"][-1]["best"]
    assert [row["scored"] for row in content["course"]] == [6, 9, 12, 15]
    choose.main(
        f"--submission {whole / 'submission.json'} --backbone resnet48_mini --image_size 32 "
        f"--num_classes 10 --max_macs {MAX_MACS} --out {tmp_path}".split()
    )
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["networks"][0] == content["best"]
    front = sorted(row["macs"] for row in choice["networks"] if row["front"])
    assert [row["macs"] for row in content["front"]] == front


def test_a_killed_search_ends_in_the_same_files(whole, digits, tmp_path, monkeypatch):
    search.main(flags(digits, tmp_path, "--generations 1"))
    assert len(read_accuracies(tmp_path / "submission.json")[0]) == 9
    walks, evaluate = [], SharedEvaluator.evaluate

    def watched(self, images, *arguments, **named):
        walks.append([arch.code for arch in self.archs])
        if len(walks) == 2:
            raise KeyboardInterrupt
        return evaluate(self, images, *arguments, **named)

    monkeypatch.setattr(SharedEvaluator, "evaluate", watched)
    with pytest.raises(KeyboardInterrupt):
        search.main(flags(digits, tmp_path))  # in the second chunk of the third generation
    # Another size of chunks is asked for: the first run's stays.
    search.main(flags(digits, tmp_path, "--chunk_size 40"))
    assert same_results(whole, tmp_path) == []
    # Of 2 more generations of 2 chunks nothing was scored twice but what was interrupted.
    assert len(walks) == 1 + 4 and len({code for codes in walks for code in codes}) == 6
    # Done already: nothing is scored, and the result is the same.
    search.main(flags(digits, tmp_path))
    assert len(walks) == 5 and same_results(whole, tmp_path) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        # Other settings than those of the search in the folder.
        ("--population 7", "population"),
        ("--seed 1", "image list"),
        ("--max_macs 5e6", "budget"),
        ("--bn_calibration_images 9", "calibration"),
        ("--ckpt_dir checkpoint_files/demo_stage1.pdparams", "checkpoint"),
        # Wrong ones.
        ("--backbone resnet48pinasv2_mini", "stage 1's"),
        ("--max_macs 1000", "no architecture is within 1,000 MACs"),
        ("--max_latency_ms 3", "--max_latency_ms takes --latency FILE"),
        ("--ckpt_dir None", "--ckpt_dir"),
        ("--eval_images 1000", "--eval_images 1000, but"),
    ],
)
def test_wrong_and_other_settings_are_one_line(whole, digits, line, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = {name: (whole / name).read_bytes() for name in RESULTS}
    with pytest.raises(UserError) as error:
        search.main(flags(digits, whole, line))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert all((whole / name).read_bytes() == content for name, content in before.items())


def test_latency_limits(digits, tmp_path):
    """By a table in which only the blocks of stage 3 take time."""
    times = {part.name: float(part.stage == 2) for part in all_parts(SPACE)}
    file = latency_file(tmp_path, milliseconds=times)
    line = f"--latency {file} --max_latency_ms 3 --max_macs 0 --generations 1"
    search.main(flags(digits, tmp_path / "out", line))
    archs, _ = read_accuracies(tmp_path / "out/submission.json")
    assert {arch.depths[2] for arch in archs.values()} <= {2, 3}
    best = json.loads((tmp_path / "out/search.json").read_text())["best"]
    parts = parts_of(SPACE.plan(archs[best["name"]]))
    assert best["latency"] == sum(times[part.name] for part in parts)
    with pytest.raises(UserError, match="sample space released instead of full; measure again"):
        search.main(flags(digits, tmp_path / "full", f"--latency {file} --sample_space full"))
    latency_file(tmp_path, num_classes=100)
    with pytest.raises(UserError, match="num classes 100 instead of 10; measure again"):
        search.main(flags(digits, tmp_path / "classes", f"--latency {file}"))


@pytest.mark.slow
def test_two_processes_find_the_same(whole, digits, tmp_path):
    launcher = ["-m", "hnas.parallel.launcher", "--nproc_per_node", "2"]
    launcher += ["--log_dir", str(tmp_path / "log"), str(ROOT / "hnas/tools/search.py"), "run"]
    command = [sys.executable, *launcher, *flags(digits, tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PADDLE_DISTRI_BACKEND": "gloo"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert same_results(whole, tmp_path / "out") == []
