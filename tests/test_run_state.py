"""A run's state: place in the schedule, whose run a set is, measurements, forged states."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import logging
import math
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from entry_scripts import arrays_of, assert_same_bits

from hnas.base import files
from hnas.base.errors import UserError
from hnas.base.files import read_json, write_json
from hnas.dataset.image_folder import DataError
from hnas.evaluation.counts import LogitsError
from hnas.programs.flags import AUTO
from hnas.programs.options import Options
from hnas.utils import starting, training
from hnas.utils.hapi_wrapper import ResumableModel
from hnas.weights.checkpoint import OPTIMIZER, RUN_NOTE, STATES, noted_run
from hnas.weights.loading import file_digest, read_state, read_weights, write_state

IMAGES, EPOCHS, WARMUP, LR = 64, 4, 1, 0.5
PIXELS = "p" * 64


class Killed(Exception):  # noqa: N818 (as a signal is no error)
    """The end of a run that nobody asked for."""


class Loader:
    """As many steps an epoch as ``IMAGES`` give; ``kill_at`` is the (epoch, step) of the end."""

    def __init__(self, total_batch, kill_at=None):
        self.total_batch = total_batch
        self.kill_at = kill_at
        images = SimpleNamespace(digest=lambda: "digest", classes=["a", "b"])
        self.dataset = SimpleNamespace(images=images)

    def __len__(self):
        return IMAGES // self.total_batch

    def epoch(self, epoch, first):
        for step in range(first, len(self)):
            if (epoch, step) == self.kill_at:
                raise Killed
            yield paddle.full([2, 3], 0.1 * (epoch + step + 1))


class Recorder(ResumableModel):
    """Trains a layer; notes the learning rate that each step's optimizer really took."""

    def __init__(self):
        paddle.seed(1)
        super().__init__(paddle.nn.Linear(3, 2))
        self.rates = {}

    def train_batch(self, inputs):
        loss = self.network(inputs).square().mean()
        self.gradients.backward(loss)
        before, gradient = self.network.bias.numpy(), self.network.bias.grad.numpy()
        norm = self.update()
        # Without momentum and weight decay: w = w - lr g.
        moved = before - self.network.bias.numpy()
        self.rates[self.epoch, self.step] = float((moved / gradient)[0])
        self.claimed = self.optimizer.get_lr()
        logs = {"loss": loss.detach(), "top1": loss.detach(), "norm": norm, "arch": "code"}
        return {**logs, "parts": [("code", logs["loss"])]}


def train_to(folder, batch, processes=1, kill_at=None, measure=None, pixels=PIXELS, **flags):
    """Train ``EPOCHS`` epochs with a batch and processes; gives the model, killed or not."""
    flags = {"lr": LR, "warmup": WARMUP, "max_epoch": EPOCHS, "momentum": 0.0} | flags
    flags = {"save_dir": str(folder), "onednn": False, "weight_decay": 0.0, "save_steps": 0} | flags
    entering = flags.pop("entering", None)
    options = Options(batch_size=batch, **flags)
    with paddle.utils.unique_name.guard(), pytest.MonkeyPatch.context() as patch:
        # These tests kill no machine.
        patch.setattr(files, "_flush", lambda path: None)
        patch.setattr(starting, "sample_digest", lambda images: pixels)
        model = Recorder()
        loader = Loader(batch * processes, kill_at)
        with patch.context() as prepared:
            prepared.setattr(training, "world_size", lambda: processes)
            training.prepare(model, options, len(loader))
        try:
            model.measured = training.fit(model, options, loader, measure, entering)
        except Killed:
            assert kill_at or measure
    return model


@pytest.fixture
def train(tmp_path):
    """:func:`train_to` a folder of the test's."""
    return functools.partial(train_to, tmp_path / "run")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The set of a run that was killed at epoch 3; only copies are changed."""
    folder = tmp_path_factory.mktemp("killed")
    train_to(folder, 8, kill_at=(2, 0), keep=1)
    for name in ("0.pdparams", "0.pdopt", "0.pdstates"):
        (folder / name).unlink()
    return folder


def expected_rate(total_batch, epoch, step, schedule="cosine", warmup=WARMUP, lr=LR):
    """From the definition, for any (epoch, step)."""
    steps = IMAGES // total_batch
    position, peak = epoch * steps + step, lr * total_batch / 256
    if schedule == "swing":
        return peak * (1 + math.cos(math.pi * position / EPOCHS)) / 2
    if position < warmup * steps:
        return peak * (position + 1) / (warmup * steps)
    done = (position - warmup * steps) / max(1, (EPOCHS - warmup) * steps)
    return peak * (1 + math.cos(math.pi * done)) / 2


def assert_rates(model, total_batch, first, **how):
    """At every place, (epoch, step), from the first on, and at no other."""
    places = itertools.product(range(EPOCHS), range(IMAGES // total_batch))
    wanted = {at: expected_rate(total_batch, *at, **how) for at in places if at >= first}
    # What a float32 weight shows of it.
    assert model.rates == pytest.approx(wanted, rel=2e-3, abs=2e-5)
    assert model.claimed == pytest.approx(wanted[max(wanted)], abs=1e-12)


# --- the learning rate


@pytest.mark.parametrize("schedule", ["cosine", "swing"])
@pytest.mark.parametrize(
    ("before", "after", "epochs", "warmup"),  # of batch and processes, epochs before
    [
        ((8, 4), (16, 1), 2, 1),
        ((32, 1), (8, 1), 1, 3),
        ((4, 2), (64, 1), 3, 0),
        ((8, 1), (16, 1), 2, 4),
    ],
)
def test_the_rate_follows_the_position_whatever_the_batches_were(
    train, schedule, before, after, epochs, warmup
):
    flags = {"lr_schedule": schedule, "warmup": warmup}
    train(*before, kill_at=(epochs, 0), **flags)
    model = train(*after, resume="auto", **flags)
    assert_rates(model, after[0] * after[1], (epochs, 0), schedule=schedule, warmup=warmup)


def test_a_run_that_was_killed_is_the_same_to_the_bit(train, tmp_path):
    """Also after an epoch that save_freq leaves out: within epochs a set is due at each end."""
    flags = {"momentum": 0.9, "save_freq": 3, "save_steps": 4}
    whole = train(8, save_dir=str(tmp_path / "whole"), **flags)
    train(8, kill_at=(0, 5), **flags)
    train(8, kill_at=(2, 1), resume="auto", **flags)
    resumed = train(8, resume="auto", **flags)
    assert min(resumed.rates) == (2, 0)
    assert_same_bits(arrays_of(resumed.network), arrays_of(whole.network))


def test_what_was_trained_before_a_bad_image_is_saved(train, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Killed", DataError)
    train(8, kill_at=(1, 2))
    names = {path.name for path in (tmp_path / "run").glob("*.pdparams")}
    assert names == {"0.pdparams", "1-2.pdparams"}
    found = train(8, resume="auto", kill_at=(2, 0))
    assert next(iter(found.rates)) == (1, 2)
    # Nothing is saved again where not even one step was made.
    assert not list((tmp_path / "run").glob("2-0.*"))


# --- whose run a set is


def test_a_new_run_that_saved_nothing_does_not_take_an_older_runs_set(train, tmp_path, caplog):
    folder = str(tmp_path / "run")
    train(8)
    older = noted_run(folder)
    train(8, kill_at=(0, 3), lr=LR / 2)
    assert noted_run(folder) not in (None, older)
    with caplog.at_level(logging.INFO):
        model = train(8, resume="auto", lr=LR / 2)
    assert_rates(model, 8, (0, 0), lr=LR / 2)
    (line,) = [line for line in caplog.messages if "earlier run's" in line]
    assert "starting anew" in line and f"--resume {folder}" in line
    # From now on the sets of this run are taken, though older ones lie beside them, which stay.
    caplog.clear()
    train(8, kill_at=(2, 3), lr=LR, save_steps=3)
    caplog.clear()
    train(8, kill_at=(1, 0), lr=LR, save_steps=1)
    assert f"stop now and give --resume {folder}/2-2" in caplog.text
    assert [path.name for path in (tmp_path / "run").glob("?-*.pdstates")] == ["2-2.pdstates"]
    caplog.clear()
    assert min(train(8, resume="auto", lr=LR).rates) == (1, 0)
    assert not [line for line in caplog.messages if "earlier run" in line]


def test_a_folders_name_asks_for_the_older_runs_set(train, tmp_path, caplog):
    train(8, kill_at=(2, 0))
    train(8, kill_at=(0, 3))
    caplog.clear()
    assert min(train(8, resume=str(tmp_path / "run")).rates) == (2, 0)
    assert [line for line in caplog.messages if "of an earlier run" in line]
    assert train(8, resume="auto").rates == {}


def test_a_finished_run_resumes_to_nothing_and_says_so(train, tmp_path, caplog):
    whole = train(8)
    final, history = tmp_path / "run/final.pdparams", tmp_path / "run/history.json"
    losses = read_json(history)["epoch_losses"]
    write_json(history, {"epoch_losses": losses[:1]})
    digest = file_digest(final)
    final.unlink()
    with caplog.at_level(logging.INFO):
        resumed = train(8, resume="auto")
    assert_same_bits(arrays_of(resumed.network), arrays_of(whole.network))
    assert f"all {EPOCHS} epochs are done already: nothing is left to train" in caplog.messages
    assert file_digest(final) == digest and read_json(history)["epoch_losses"] == losses


def test_within_an_epoch_other_batches_are_refused_and_another_rate_holds_at_once(train, caplog):
    train(8, kill_at=(1, 5), save_steps=5)
    with pytest.raises(UserError, match="and batch_size, total_batch differ now; .*1-2\\.\\*: "):
        train(16, resume="auto")
    with pytest.raises(UserError, match="middle of an epoch, and image_pixels differ now"):
        train(8, resume="auto", pixels="q" * 64)
    # The set knows of no teacher, as one that was trained in place.
    model = train(8, resume="auto", lr=LR / 3, entering={"teacher": "d" * 64})
    assert "resumed with other values than before: lr, teacher" in caplog.messages
    assert_rates(model, 8, (1, 2), lr=LR / 3)


SOUND, BROKEN = {"top1": 0.9}, {"top1": 0.1, "broken": 1.0}
ANEW = "no checkpoint of this run is known to be good: start anew"
GOOD = ".pdparams is this run's last good checkpoint (top1 0.9000): go on from it with --resume"


@pytest.mark.parametrize(
    ("measured", "flags", "advice"),
    [
        (None, {}, f"{ANEW} without --resume, with --clip_norm auto"),
        (None, {"resume": ""}, f"{ANEW} with --clip_norm auto"),
        ((BROKEN, BROKEN), {"clip_norm": 9.0}, f"{ANEW} without --resume, with --lr 3.3e+29"),
        ((SOUND, SOUND), {}, f"RUN/1{GOOD} RUN/1 --clip_norm auto"),
        ((SOUND, BROKEN), {"save_steps": 1}, f"RUN/0{GOOD} RUN/0 --clip_norm auto"),
        ((SOUND, SOUND), {"arch": "1"}, "start anew with --clip_norm auto and another --save_dir"),
    ],
)
def test_a_loss_that_is_not_finite_leaves_what_was_saved_and_says_how_to_go_on(
    train, tmp_path, measured, flags, advice
):
    train(8)  # an earlier run's sets, which no advice is of
    train(8, kill_at=(2, 0), measure=measured and measures(*measured))
    good = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pd*")}
    place = r" at epoch [13] step \d, learning rate .*, sub-network code; "
    advice = re.escape(advice.replace("RUN", str(tmp_path / "run")))
    again = measured and measures(measured[1])  # which the newest set does not have yet
    with pytest.raises(UserError, match=f"{place}{advice}$"):
        train(8, measure=again, **{"lr": 1e30, "resume": "auto", **flags})
    left = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {name: left[name] for name in good} == good
    for path in (tmp_path / "run").glob("*.pdparams"):
        assert all(np.isfinite(value).all() for value in read_weights(path).values())


@pytest.mark.parametrize(
    ("clip_norm", "step", "remedy"),
    [
        (0, "", "go on from .*run/0 --clip_norm auto"),
        (AUTO, "", r"go on from .*run/0 --clip_norm [\d.e-]+"),
        (0, "stage2", "remove .*run, and what came after it, and give stage2_clip_norm=auto"),
    ],
)
def test_logits_that_are_not_finite_are_told_in_the_same_way(
    train, clip_norm, step, remedy, monkeypatch
):
    monkeypatch.setenv("PINAS_STEP", step)  # local_own.sh's
    with pytest.raises(UserError, match=f"^after epoch 2 the network gives .*{remedy}$"):
        train(8, measure=measures(SOUND, LogitsError("the network", 3, 10)), clip_norm=clip_norm)


@pytest.mark.parametrize("ending", ["", ".pdparams"])
def test_a_set_that_resume_names_is_gone_on_from_also_after_a_kill(train, tmp_path, ending):
    """Though later sets of the run, of which it broke, lie beside it."""
    train(8, kill_at=(3, 0), measure=measures(SOUND, BROKEN, BROKEN))
    chosen, lower = f"{tmp_path / 'run/0'}{ending}", {"lr": LR / 3, "clip_norm": 10.0}
    assert train(8, resume=chosen, kill_at=(1, 3), **lower).rates.keys() == {(1, 0), (1, 1), (1, 2)}
    model = train(8, resume="auto", measure=measures(*[SOUND] * 4), **lower)
    assert_rates(model, 8, (1, 0), lr=LR / 3)
    rows = read_json(tmp_path / "run/history.json")["validation"]
    assert rows == [{"epoch": epoch, **SOUND} for epoch in range(4)]


def test_keep_leaves_the_first_and_the_newest_epochs(train, tmp_path):
    def names():
        return {path.stem for path in (tmp_path / "run").glob("*.pdparams")}

    train(8, keep=1, save_steps=2)
    assert names() == {"0", "3", "final"}
    # A new run in the same folder: epoch 3 is not its own.
    train(8, keep=1, max_epoch=3)
    assert names() == {"0", "2", "3", "final"}


def test_a_run_keeps_its_id_when_it_goes_on_elsewhere(train, tmp_path):
    train(8, kill_at=(2, 0))
    run_id = noted_run(tmp_path / "run")
    train(8, kill_at=(2, 1), resume=str(tmp_path / "run"), save_dir=str(tmp_path / "there"))
    assert noted_run(tmp_path / "there") == run_id


@pytest.mark.parametrize("content", [[], {}, {"run_id": 3}, "{"])
def test_a_broken_note_is_one_line(train, tmp_path, content):
    train(8, kill_at=(2, 0))
    note = tmp_path / "run" / RUN_NOTE
    note.write_text(content) if isinstance(content, str) else write_json(note, content)
    with pytest.raises(UserError, match=RUN_NOTE):
        train(8, resume="auto")


# --- what is measured after epochs


def measures(*values):
    """Gives the values in turn; one that is an exception is raised."""
    rows = iter(values)

    def measure():
        value = next(rows)
        if isinstance(value, Exception):
            raise value
        return value if isinstance(value, dict) else {"tau": value}

    return measure


def rows_of(folder):
    rows = read_json(folder / "history.json").get("validation", [])
    return [(row["epoch"], row["tau"]) for row in rows]


def test_figures_are_in_the_log_and_in_history(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(8, measure=measures(0.5, None, -0.25, 1.0))
    assert rows_of(tmp_path / "run") == [(0, 0.5), (1, None), (2, -0.25), (3, 1.0)]
    assert [line for line in caplog.messages if "validation" in line][:3] == [
        "epoch 1 validation: tau 0.5000",
        "epoch 2 validation: tau not defined",
        "epoch 3 validation: tau -0.2500",
    ]
    for every, rows in ((2, [(1, 0.5), (3, 0.25)]), (3, [(2, 0.5)]), (0, [])):
        model = train(8, measure=measures(0.5, 0.25), eval_freq=every)
        assert rows_of(tmp_path / "run") == rows
        assert model.measured == ({"tau": 0.25} if every == 2 else None)  # of the last weights


def test_the_best_epoch_is_the_best_on_validation_images():
    """Losses of training fall to the end, also where the ranking is best before."""
    log = training.TrainLogger(1, 3, 1, 1)
    tops = {0: {"largest_top1": 0.0}, 1: {"largest_top1": 0.7}, 2: {"largest_top1": 0.7}}
    taus = {0: {"kendall_tau_b": 0.25}, 1: {"kendall_tau_b": -0.5}, 2: {"kendall_tau_b": 0.125}}
    for losses, validation, best, by in (
        ([], {}, None, "epoch_losses"),
        ([3.0, 2.0, 1.0], {1: {"tau": 0.9}}, 2, "epoch_losses"),
        ([3.0, 2.0, 1.0], tops, 1, "largest_top1"),
        ([3.0, 2.0, 1.0], {0: {"top1": 0.5, "top5": 0.6}}, 0, "top1"),
        ([3.0, 2.0, 1.0], {e: taus[e] | tops[e] for e in tops}, 0, "kendall_tau_b"),
    ):
        log.epoch_losses, log.validation = losses, validation
        assert (log.history()["best_epoch"], log.history()["best_by"]) == (best, by)


@pytest.mark.parametrize("killed", range(EPOCHS))
def test_what_a_kill_in_a_measurement_loses_is_measured_again(train, tmp_path, killed, caplog):
    values = [0.5, 0.25, 0.125, 1.0]
    train(8, measure=measures(*values[:killed], Killed()))
    train(8, measure=measures(*values[killed:]), resume="auto")
    assert rows_of(tmp_path / "run") == list(enumerate(values))
    # The last epoch's checkpoint was written before its measurement.
    caplog.set_level(logging.INFO)
    train(8, measure=measures(values[-1]), resume="auto")
    assert rows_of(tmp_path / "run") == list(enumerate(values))
    assert "training from" not in caplog.text and "nothing is left to train" in caplog.text


@pytest.mark.skipif(
    importlib.util.find_spec("visualdl") is None,
    reason="VisualDL is not installed: pip install visualdl==2.5.3 'numpy<2'",
)
def test_visualdl_reads_back_curves(train, tmp_path):
    from visualdl import LogReader

    def read(tag):
        (path,) = (tmp_path / "a").iterdir()
        points = LogReader(file_path=str(path)).get_data("scalar", tag)
        return [(point.id, point.value) for point in points]

    found = measures(0.5, None, Killed())
    train(8, measure=found, visualdl_dir=str(tmp_path / "a"), log_freq=5)
    for name in ("lr", "loss", "top1", "ips"):
        # Every fifth step, and each epoch's last.
        assert [step for step, _ in read(f"train/{name}")] == [5, 8, 13, 16, 21, 24]
    assert read("train/lr")[0][1] == pytest.approx(expected_rate(8, 0, 4))
    assert read("validation/tau") == [(8, 0.5)]


def test_visualdl_that_is_not_installed_is_named(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "visualdl", None)
    # Without the bound pip takes a NumPy that PaddleSlim cannot use.
    with pytest.raises(UserError, match="pip install visualdl 'numpy<2'"):
        train(8, visualdl_dir="curves")


# --- forged states: every digest matches


MISSING, HUGE = object(), 10**40
FORGED_STATES = {
    "": [[1, 2], {}],
    "epoch": ["2", 2.0, None, -1, HUGE, 3, MISSING],
    "step": [-1, 1000, HUGE, MISSING],
    "losses": [[1.0], MISSING],
    "losses/epoch_losses": [np.ones(7), np.ones(0), np.ones((2, 2)), np.array([np.nan, 1]), "many"],
    "losses/step_losses": [np.ones(3)],
    "losses/seconds": ["long", math.nan, MISSING],
    "losses/validation": [
        None,
        [1],
        [{"tau": 0.5}],
        *([{"epoch": epoch, "tau": 0.5}] for epoch in (2, -1, True)),
        *([{"epoch": 0, "tau": tau}] for tau in (math.nan, "high")),
    ],
    "run": [["lr"], MISSING],
    "run/lr": [np.ones(3)],
    "run_id": [3, MISSING],
    "number": [2.0, MISSING],
    "digests": [["a"], MISSING],
}
VELOCITY, LIKE_IT = "weight@_velocity_0", np.zeros((3, 2), np.float32)
FORGED_OPTIMIZERS = {
    "": [[1.0], "velocity", {}],
    VELOCITY: [
        *(np.full((3, 2), value, np.float32) for value in (np.nan, np.inf)),
        *(LIKE_IT.T, LIKE_IT.astype(np.int64), LIKE_IT.astype(np.float64)),
        *(np.float32(1), "fast", None, HUGE, MISSING),
    ],
    "other@_velocity_0": [np.zeros(1, np.float32)],
    # another suffix, none, two of a parameter
    **{key: [LIKE_IT] for key in ("weight@_moment1_0", "weight", "weight@_velocity_7", 7)},
}


def cases(forged):
    return [(path, value) for path, values in forged.items() for value in values]


def put(content, path, value):
    """The content with another value, or none, at a path of keys; all of it for an empty path."""
    if path == "":
        return value
    found = content
    *parents, last = path.split("/") if isinstance(path, str) else [path]
    for key in parents:
        found = found[int(key) if isinstance(found, list) else key]
    if value is MISSING:
        del found[last]
    else:
        found[last] = copy.deepcopy(value)
    return content


def forge(folder, *changes, suffix=STATES):
    """Change what a file of the set holds, and the digests that vouch for it."""
    state, _ = read_state(folder / f"1{STATES}")
    content = state if suffix == STATES else read_state(folder / f"1{suffix}")[0]
    for path, value in changes:
        content = put(content, path, value)
    write_state(folder / f"1{suffix}", content)
    if suffix != STATES:
        state["digests"][suffix] = file_digest(folder / f"1{suffix}")
        write_state(folder / f"1{STATES}", state)


def refusal(train, **flags):
    """What resuming from the set is told: one line."""
    with pytest.raises(UserError) as error:
        train(8, **flags)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(("path", "value"), cases(FORGED_STATES))
def test_a_forged_state_is_one_line_and_nothing_of_it_is_kept(
    train, killed, tmp_path, caplog, path, value
):
    folder = shutil.copytree(killed, tmp_path / "run")
    forge(folder, (path, value))
    message = refusal(train, resume=str(folder))
    # Either the set was passed over as none of this program, and no other is there, or refused.
    assert "1.pdstates is not what" in message or "no whole set" in message
    passed = [line for line in caplog.messages if line.startswith("passed over")]
    assert bool(passed) == ("no whole set" in message)


@pytest.mark.parametrize(("path", "value"), cases(FORGED_OPTIMIZERS))
def test_a_forged_optimizer_is_one_line(train, killed, tmp_path, path, value):
    shutil.copytree(killed, tmp_path / "run")
    forge(tmp_path / "run", (path, value), suffix=OPTIMIZER)
    assert f"1{OPTIMIZER}" in refusal(train, resume="auto")
