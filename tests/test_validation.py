"""What is measured while a supernet trains: ranking and curves; training stays as it is."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from entry_scripts import CLASSES, noise_images, run
from scipy import stats

import train_supernet
import train_supernet_pinas_stage2_simple as stage2
from hnas.base.errors import UserError
from hnas.evaluation.counts import Counts
from hnas.evaluation.reference import evaluate_reference
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI
from hnas.tools import pretrain, search, train_standalone
from hnas.utils import resuming, training, validation
from hnas.utils.callbacks import TrainLogger, VisualDLWriter
from hnas.utils.checkpoint import generators_state
from hnas.utils.hapi_wrapper import ResumableModel
from hnas.utils.options import Options
from hnas.utils.parsing import parse_options
from hnas.utils.validation import Extremes, Ranking, read_ranked, warn_if_broken
from hnas.utils.weights import load_weights, read_weights, write_state

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoint_files/demo_stage2.pdparams"
NUMBER, STEPS, EPOCHS = 8, 5, 3
FLAGS = """
--backbone resnet48_mini --image_size 32 --batch_size 10 --max_epoch 2 --lr 0.02 --warmup 0
--dyna_batch_size 1 --num_workers 0 --device cpu --log_freq 1
"""
REAL_VISUALDL = pytest.mark.skipif(
    importlib.util.find_spec("visualdl") is None,
    reason="VisualDL is not installed: pip install visualdl==2.5.3 'numpy<2'",
)


@pytest.fixture(scope="module")
def archs():
    drawn = RESNET48_MINI.sample_distinct(np.random.default_rng(3), NUMBER)
    return list(drawn.values())


@pytest.fixture(scope="module")
def truth(archs):
    """Stand-alone accuracies by invention, with two that are equal."""
    values = np.random.default_rng(4).uniform(0.5, 0.9, NUMBER)
    values[1] = values[0]
    return dict(zip(archs, values.tolist(), strict=True))


def write_truth(path, truth):
    entries = {
        f"a{i}": {"acc": acc, "arch": arch.code} for i, (arch, acc) in enumerate(truth.items())
    }
    path.write_text(json.dumps(entries))
    return path


# --- the ranking itself


@pytest.fixture(scope="module")
def supernet():
    network = build_network("resnet48_mini", len(CLASSES))
    load_weights(network, read_weights(DEMO), "demo")
    return network


def noise(number, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)
    return paddle.to_tensor(images), paddle.to_tensor(rng.integers(0, 10, number))


@pytest.mark.parametrize("calibrated", [False, True])
def test_figures_are_scipys_of_the_reference_engines_hits(supernet, truth, calibrated):
    loader = [noise(50, 0), noise(31, 1)]
    calibration = noise(16, 2)[0] if calibrated else None
    found = Ranking(supernet, truth, loader, 32, 20, calibration).measure()
    accuracy = evaluate_reference(supernet, list(truth), loader, calibration).accuracy()
    true = list(truth.values())
    assert found["kendall_tau_b"] == pytest.approx(stats.kendalltau(accuracy, true).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(accuracy, true)[0])


def test_processes_share_the_images_and_find_the_same(supernet, truth, tmp_path, monkeypatch):
    """Two processes, emulated one after the other: each scores its share, and the hits add up."""
    options = Options(rank_gt=str(write_truth(tmp_path / "gt.json", truth)), batch_size=7)
    options.image_size, options.num_workers = 32, 0
    pixels, labels = noise(41, 5)

    def share_loader(_, images, order):
        index = paddle.to_tensor(order)
        return [(pixels[index], labels[index])]

    whole = [(pixels, labels)]
    alone = Ranking.of_run(options, supernet, range(41), whole, None).measure()
    monkeypatch.setattr(validation, "validation_loader", share_loader)
    monkeypatch.setattr(validation, "world_size", lambda: 2)
    hits = []
    for number in range(2):
        monkeypatch.setattr(validation, "rank", lambda number=number: number)
        monkeypatch.setattr(validation, "sum_over_ranks", lambda own: hits.append(own) or sum(hits))
        together = Ranking.of_run(options, supernet, range(41), whole, None).measure()
    assert together == alone and int(hits[0].sum()) > 0 and int(hits[1].sum()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:2], "has 2 architectures; a ranking needs at least 3"),
        (lambda rows: [*rows[:3], (rows[3][0], 101)], "accuracy 101"),
        (lambda rows: [*rows[:3], ("12222" + rows[3][0][5:], 0.5)], "entry 4"),
        (lambda rows: [*rows[:3], (PROJECTED, 0.5)], "no projection"),
    ],
)
def test_wrong_files_are_refused(tmp_path, truth, change, message):
    rows = change([(arch.code, acc) for arch, acc in truth.items()])
    path = tmp_path / "gt.json"
    path.write_text(json.dumps({str(i): {"arch": c, "acc": a} for i, (c, a) in enumerate(rows)}))
    with pytest.raises(UserError, match=message) as error:
        read_ranked(str(path), RESNET48_MINI)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


PROJECTED = "122221" + "1111000000" + "1113000000" + "1111" + "0" * 12 + "1111000000"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rank_gt": "gt.json", "eval_freq": 0}, "--rank_gt scores every --eval_freq"),
        ({"in_place_distillation": True}, "needs --sample_method sandwich"),
        (
            {"in_place_distillation": True, "sample_method": "sandwich", "dyna_batch_size": 0},
            "at least 2 for --dyna_batch_size",
        ),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(UserError, match=message):
        stage2.check_flags(Options(**flags))


def test_flags_reach_the_model(tmp_path, monkeypatch):
    paddle.seed(0)
    network = build_network("resnet48_mini", len(CLASSES), elastic=False)
    paddle.save(network.state_dict(), str(tmp_path / "start.pdparams"))
    models = []
    monkeypatch.setattr(stage2, "fit", lambda model, *_: models.append(model))
    flags = {"backbone": "resnet48_mini", "pretrained": tmp_path / "start.pdparams"}
    flags |= {"sample_method": "sandwich", "eval_freq": 0, "label_smoothing": 0.2}
    images = noise_images(tmp_path / "images")
    for in_place in (False, True):
        more = {"in_place_distillation": in_place}
        run(stage2, monkeypatch, images, tmp_path / "out", **flags, **more)
    taught, alone = models
    assert taught.label_smoothing == alone.label_smoothing == 0.2
    assert taught.teacher is not None and not taught.in_place
    assert alone.teacher is None and alone.in_place


# --- scores that mean nothing


def blank_network():
    """Weights of zero, so every image is said to be of the first class."""
    network = build_network("resnet48_mini", len(CLASSES))
    for parameter in network.parameters():
        parameter.set_value(paddle.zeros_like(parameter))
    return network


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_largest_network_that_guesses_is_told(caplog):
    network = blank_network()
    images = paddle.zeros([40, 3, 32, 32], "uint8")
    for labels, top1 in ((np.arange(40) % 10, 0.1), (np.zeros(40, np.int64), 1.0)):
        caplog.clear()
        loader = [(images, paddle.to_tensor(labels, "int64"))]
        found = Extremes(network, loader, None, network).measure()
        assert found == {"largest_top1": top1, "smallest_top1": top1}
        told = warnings_of(caplog)
        assert len(told) == (top1 < 0.5)
        start = "the largest sub-network is right about 4 of 40 images, no more than guessing"
        assert all(line.startswith(f"{start} among 10 classes") for line in told)


@pytest.mark.parametrize(
    ("hits", "before", "images", "warned"),
    [
        (26, 81, 100, False),  # half of 81 and three standard deviations of 4.9 are 25.8
        (25, 81, 100, True),
        (2600, 8100, 10000, True),
        (3902, 8100, 10000, True),  # 4050 less three standard deviations of 49.1 are 3902.7
        (3903, 8100, 10000, False),
        (5, 20, 20, False),  # nothing to tell by
        (0, 20, 20, True),
        (0, 0, 20, False),
        (0, 10, 4000, False),
        (4000, 4000, 4000, False),
    ],
)
def test_a_supernet_that_broke_is_told(hits, before, images, warned, caplog):
    zeros = Counts.zeros(1)
    warn_if_broken(
        *(replace(zeros, top1=np.array([top1]), images=images) for top1 in (hits, before))
    )
    told = warnings_of(caplog)
    assert len(told) == warned
    start = f"the largest sub-network is right about {hits} of {images} images, the pretrained"
    assert all(line.startswith(f"{start} network about {before}: ") for line in told)


@pytest.mark.parametrize(("first", "warned"), [(40, "no more than guessing"), (60, "is worth")])
def test_stage_two_measures_the_network_that_it_started_from(first, warned, caplog):
    """All images are of two classes; the supernet says the first, the pretrained one the second."""
    plain = build_network("resnet48_mini", len(CLASSES), elastic=False)
    for parameter in plain.parameters():
        parameter.set_value(paddle.zeros_like(parameter))
    plain.head.fc.bias.set_value(paddle.to_tensor([0.0, 1.0] + [0.0] * 8))
    network, labels = blank_network(), np.ones(400, np.int64)
    labels[:first] = 0
    images = paddle.zeros([400, 3, 32, 32], "uint8")
    extremes = Extremes(network, [(images, paddle.to_tensor(labels))], None, plain)
    assert extremes.measure() == {"largest_top1": first / 400, "smallest_top1": first / 400}
    assert extremes.at_first.top1 == 400 - first
    (told,) = warnings_of(caplog)
    assert warned in told
    caplog.clear()
    half = [(images, paddle.to_tensor(np.arange(400) % 2, "int64"))]
    Extremes(network, half, None, plain).measure()
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("more", [{}, {"eval_engine": "reference"}, {"arch_shard": "1/2"}])
def test_stage_three_tells_where_all_guess(more, tmp_path, monkeypatch, caplog):
    weights = tmp_path / "blank.pdparams"
    write_state(weights, blank_network().state_dict(), {"freeze_bn": True})
    flags = {"backbone": "resnet48_mini", "eval_sample_num": 3, "ckpt_dir": weights, **more}
    images = noise_images(tmp_path / "images", number=3)
    run(train_supernet, monkeypatch, images, tmp_path / "out", **flags)
    (told,) = warnings_of(caplog)
    start = "the best sub-network is right about 3 of 30 images, no more than guessing"
    assert told.startswith(f"{start} among 10 classes: training broke")


@pytest.mark.parametrize(
    ("script", "who", "flags"),
    [
        (pretrain, "the network", {"pretrained": "largest.pdparams"}),
        (train_standalone, "the network", {"arch": RESNET48_MINI.smallest().code}),
        (search, "the best network", {"ckpt_dir": "blank.pdparams", "generations": 0}),
    ],
)
def test_other_programs_tell_it_too(script, who, flags, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_state(Path("blank.pdparams"), blank_network().state_dict(), {"freeze_bn": True})
    if script is not search:
        flags = {**flags, "max_epoch": 1, "warmup": 0, "lr": 0.0}
    else:
        flags = {**flags, "max_macs": "8e6", "population": 3, "children": 1, "tournament": 2}
    images = noise_images(tmp_path / "images", number=3)
    run(script, monkeypatch, images, "out", backbone="resnet48_mini", **flags)
    (told,) = warnings_of(caplog)
    assert told.startswith(f"{who} is right about ") and "no more than guessing among 10" in told


# --- stage two, whole


@pytest.fixture(scope="module")
def work(tmp_path_factory, truth):
    """Images, and stage two's folders: ``plain``, and ``ranked`` with ``--rank_gt``."""
    folder = tmp_path_factory.mktemp("validation")
    noise_images(folder / "images", number=4)
    write_truth(folder / "gt.json", truth)
    paddle.seed(0)
    network = build_network("resnet48_mini", len(CLASSES), elastic=False)
    network.start_as_shortcuts()
    paddle.save(network.state_dict(), str(folder / "pretrained.pdparams"))
    for name, more in (("plain", []), ("ranked", ["--rank_gt", folder / "gt.json"])):
        line = FLAGS.split()
        line += ["--image_dir", folder / "images", "--save_dir", folder / name]
        line += ["--pretrained", folder / "pretrained.pdparams", *more]
        subprocess.run(
            [sys.executable, "-W", "ignore", stage2.__file__, "run", *map(str, line)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=120,
            check=True,
        )
    return folder


def history(folder):
    return json.loads((folder / "history.json").read_text())


@pytest.mark.slow
def test_ranking_changes_no_bit_of_training(work):
    for name in ("0", "1", "final"):
        plain, ranked = (
            read_weights(work / run / f"{name}.pdparams") for run in ("plain", "ranked")
        )
        assert plain.keys() == ranked.keys()
        for key in plain:
            assert plain[key].tobytes() == ranked[key].tobytes(), (name, key)
    plain, ranked = history(work / "plain"), history(work / "ranked")
    assert plain["epoch_losses"] == ranked["epoch_losses"]
    for before, after in zip(plain["validation"], ranked["validation"], strict=True):
        assert before == {k: after[k] for k in ("epoch", "largest_top1", "smallest_top1")}


@pytest.mark.slow
def test_the_ranking_is_that_of_stage_threes_scores(work, truth, monkeypatch):
    found = {row["epoch"]: row for row in history(work / "ranked")["validation"]}
    assert list(found) == [0, 1]
    flags = {"backbone": "resnet48_mini", "ckpt_dir": work / "ranked/1.pdparams"}
    flags["modelarch_file"] = work / "gt.json"
    run(train_supernet, monkeypatch, work / "images", work / "stage3", **flags)
    scores = json.loads((work / "stage3/submission.json").read_text()).values()
    accuracy = [entry["acc"] for entry in scores]
    assert len(set(accuracy)) > 2
    tau = stats.kendalltau(accuracy, list(truth.values())).statistic
    assert found[1]["kendall_tau_b"] == pytest.approx(tau)


# --- how the loop measures, keeps and writes


class Killed(Exception):  # noqa: N818 (as a signal is no error)
    """The end of a run that nobody asked for."""


class Loader:
    total_batch = 8

    def __init__(self):
        images = SimpleNamespace(digest=lambda: "digest", classes=["a", "b"])
        self.dataset = SimpleNamespace(images=images)

    def __len__(self):
        return STEPS

    def epoch(self, epoch, first):
        return (paddle.full([2, 3], 0.1 * (epoch + step + 1)) for step in range(first, STEPS))


class Model(ResumableModel):
    """A layer whose loss is the number of the step."""

    def train_batch(self, inputs):
        self.gradients.backward((self.network(inputs) * 0).sum())
        self.gradients.step()
        loss = paddle.to_tensor(float(self.epoch * STEPS + self.step + 1))
        return {"loss": loss, "top1": loss / 100, "arch": "code", "parts": [("code", loss)]}


def train(folder, measure, **flags):
    line = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    required = ["--save_dir", str(folder), "--batch_size", "8", "--max_epoch", str(EPOCHS)]
    options = parse_options(stage2.Stage.DISTILL, ["run", *required, "--onednn", "False", *line])
    with paddle.utils.unique_name.guard():
        model = Model(paddle.nn.Linear(3, 2))
        training.prepare(model, options, STEPS)
        training.fit(model, options, Loader(), measure)


def measures(*values):
    """Gives the values in turn; one that is an exception is raised."""
    rows = iter(values)

    def measure():
        value = next(rows)
        if isinstance(value, Exception):
            raise value
        return {"tau": value}

    return measure


def rows_of(folder):
    return [(row["epoch"], row["tau"]) for row in history(folder)["validation"]]


def test_figures_are_in_the_log_and_in_history(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path, measures(0.5, None, -0.25))
    assert rows_of(tmp_path) == [(0, 0.5), (1, None), (2, -0.25)]
    lines = [r.message for r in caplog.records if "validation" in r.message]
    assert lines == [
        "epoch 1 validation: tau 0.5000",
        "epoch 2 validation: tau not defined",
        "epoch 3 validation: tau -0.2500",
    ]
    train(tmp_path / "every_other", measures(0.5), eval_freq=2)
    assert rows_of(tmp_path / "every_other") == [(1, 0.5)]
    train(tmp_path / "never", measures(), eval_freq=0)
    assert "validation" not in history(tmp_path / "never")


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_what_a_kill_in_a_measurement_loses_is_measured_again(tmp_path, killed):
    values = [0.5, 0.25, 0.125]
    with pytest.raises(Killed):
        train(tmp_path, measures(*values[:killed], Killed()))
    train(tmp_path, measures(*values[killed:]), resume="auto")
    assert rows_of(tmp_path) == list(enumerate(values))
    # The last epoch's checkpoint was written before its measurement.
    train(tmp_path, measures(values[-1]), resume="auto")
    assert rows_of(tmp_path) == list(enumerate(values))


def test_a_measurement_leaves_the_generators_alone(tmp_path):
    states = []

    def measure():
        states.append(str(generators_state()))
        paddle.randn([3])
        np.random.rand()
        return {"tau": 0.5}

    paddle.seed(5)
    train(tmp_path, measure)
    assert len(states) == EPOCHS and len({*states, str(generators_state())}) == 1


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [1],
        [{"tau": 0.5}],
        [{"epoch": 2, "tau": 0.5}],
        [{"epoch": -1, "tau": 0.5}],
        [{"epoch": True, "tau": 0.5}],
        [{"epoch": 0, "tau": float("nan")}],
        [{"epoch": 0, "tau": "high"}],
    ],
)
def test_a_checkpoints_figures_are_checked(rows):
    with pytest.raises(resuming.NONSENSE):
        resuming.check_validation(rows, 2)
    resuming.check_validation([{"epoch": 1, "tau": 0.5}, {"epoch": 0, "tau": None}], 2)


# --- curves


def test_visualdl_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "visualdl", None)
    # Without the bound pip takes a NumPy that PaddleSlim cannot use.
    with pytest.raises(UserError, match="pip install visualdl 'numpy<2'"):
        VisualDLWriter("curves", TrainLogger(1))


class Writer:
    """VisualDL's, as far as it is used."""

    def __init__(self, folder):
        self.points, self.closed = [], False
        Writer.made.append(self)

    def add_scalar(self, tag, value, step):
        assert not self.closed
        self.points.append((tag, step, value))

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    Writer.made = []
    monkeypatch.setitem(sys.modules, "visualdl", SimpleNamespace(LogWriter=Writer))
    return Writer.made


def curve(points, tag):
    return [(step, value) for name, step, value in points if name == tag]


@pytest.mark.parametrize(
    ("log_freq", "steps"),
    [(50, [5, 10, 15]), (2, [2, 4, 5, 7, 9, 10, 12, 14, 15]), (5, [5, 10, 15])],
)
def test_curves_have_every_log_line_and_each_epochs_last_step(tmp_path, writers, log_freq, steps):
    train(tmp_path, measures(0.5, None, 0.25), visualdl_dir=tmp_path / "c", log_freq=log_freq)
    (writer,) = writers
    assert curve(writer.points, "train/loss") == [(step, float(step)) for step in steps]
    assert [step for step, _ in curve(writer.points, "train/ips")] == steps
    assert curve(writer.points, "validation/tau") == [(5, 0.5), (15, 0.25)]
    assert writer.closed


def test_a_resumed_run_has_the_whole_validation_curve(tmp_path, writers):
    with pytest.raises(Killed):
        train(tmp_path, measures(0.5, Killed()), visualdl_dir=tmp_path / "c")
    train(tmp_path, measures(0.25, 0.125), visualdl_dir=tmp_path / "c", resume="auto")
    before, after = writers
    assert before.closed and curve(before.points, "validation/tau") == [(5, 0.5)]
    expected = [(5, 0.5), (10, 0.25), (15, 0.125)]
    assert curve(after.points, "validation/tau") == expected
    assert [step for step, _ in curve(after.points, "train/loss")] == [15]


@REAL_VISUALDL
def test_visualdl_reads_back_what_was_written(tmp_path):
    from visualdl import LogReader

    train(tmp_path, measures(0.5, None, 0.25), visualdl_dir=tmp_path / "curves")
    (path,) = (tmp_path / "curves").iterdir()
    reader = LogReader(file_path=str(path))
    assert set(reader.get_tags()["scalar"]) >= {"train/loss", "validation/tau"}

    def read(tag):
        return [(point.id, point.value) for point in reader.get_data("scalar", tag)]

    assert read("train/loss") == [(5, 5.0), (10, 10.0), (15, 15.0)]
    assert read("validation/tau") == [(5, 0.5), (15, 0.25)]
