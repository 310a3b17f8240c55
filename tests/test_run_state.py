"""A run's state: place in the schedule, whose run a set is, measurements, forged states."""

from __future__ import annotations

import copy
import functools
import logging
import math
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from hnas.base import files
from hnas.base.errors import UserError
from hnas.base.files import read_json, write_json
from hnas.base.safe_pickle import load_pickle
from hnas.utils import training
from hnas.utils.checkpoint import OPTIMIZER, RUN_NOTE, STATES, generators_state, noted_run
from hnas.utils.hapi_wrapper import (
    ResumableModel,
    learning_rate,
    momentum_optimizer,
    swinging_rate,
)
from hnas.utils.options import Options
from hnas.utils.weights import file_digest, write_state

IMAGES, EPOCHS, WARMUP, LR = 64, 4, 1, 0.5


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
        before, velocity = self.network.bias.numpy(), self.velocity()
        gradient = self.network.bias.grad.numpy()
        self.gradients.step()
        moved = before - self.network.bias.numpy()
        # Momentum without weight decay: v = m v + g, w = w - lr v.
        self.rates[self.epoch, self.step] = float((moved / (0.9 * velocity + gradient))[0])
        self.claimed = self.optimizer.get_lr()
        logs = {"loss": loss.detach(), "top1": loss.detach(), "arch": "code"}
        return {**logs, "parts": [("code", logs["loss"])]}

    def velocity(self):
        state = self.optimizer.state_dict()
        return state.get(f"{self.network.bias.name}_velocity_0", paddle.zeros([2])).numpy()


def train_to(folder, batch, processes=1, kill_at=None, measure=None, **flags):
    """Train ``EPOCHS`` epochs with a batch and processes; gives the model, killed or not."""
    flags = {"lr": LR, "weight_decay": 0.0, "warmup": WARMUP, "max_epoch": EPOCHS} | flags
    flags = {"save_dir": str(folder), "onednn": False, "save_steps": 0} | flags
    options = Options(batch_size=batch, **flags)
    with paddle.utils.unique_name.guard(), pytest.MonkeyPatch.context() as patch:
        # These tests kill no machine.
        patch.setattr(files, "_flush", lambda path: None)
        model = Recorder()
        loader = Loader(batch * processes, kill_at)
        with patch.context() as prepared:
            prepared.setattr(training, "world_size", lambda: processes)
            training.prepare(model, options, len(loader))
        try:
            training.fit(model, options, loader, measure)
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


def assert_rates(model, total_batch, first_epoch, **how):
    steps = IMAGES // total_batch
    wanted = {
        (epoch, step): expected_rate(total_batch, epoch, step, **how)
        for epoch in range(first_epoch, EPOCHS)
        for step in range(steps)
    }
    assert model.rates.keys() == wanted.keys()
    for place, rate in model.rates.items():
        # What a float32 weight shows of it.
        assert rate == pytest.approx(wanted[place], rel=2e-3, abs=2e-5), place
    last = expected_rate(total_batch, EPOCHS - 1, steps - 1, **how)
    assert model.claimed == pytest.approx(last, abs=1e-12)


# --- the learning rate


CHANGES = [
    # (batch, processes) before and after, epochs before, epochs of warm-up
    ((8, 1), (32, 1), 2, 1),
    ((8, 1), (8, 4), 2, 1),
    ((8, 4), (32, 1), 2, 1),
    ((32, 1), (8, 1), 1, 3),
    ((4, 2), (64, 1), 3, 0),
    ((8, 1), (16, 1), 2, 4),
]


@pytest.mark.parametrize("schedule", ["cosine", "swing"])
@pytest.mark.parametrize(("before", "after", "epochs", "warmup"), CHANGES)
def test_the_rate_follows_the_position_whatever_the_batches_were(
    train, schedule, before, after, epochs, warmup
):
    flags = {"lr_schedule": schedule, "warmup": warmup}
    train(*before, kill_at=(epochs, 0), **flags)
    model = train(*after, resume="auto", **flags)
    assert_rates(model, after[0] * after[1], epochs, schedule=schedule, warmup=warmup)


def test_a_new_rate_holds_from_the_first_step_after_resuming_within_an_epoch(train):
    train(8, kill_at=(1, 5), save_steps=5)
    model = train(8, resume="auto", lr=LR / 3)
    assert min(model.rates) == (1, 2)
    for place, rate in model.rates.items():
        assert rate == pytest.approx(expected_rate(8, *place, lr=LR / 3), rel=2e-3, abs=2e-5)


def test_a_run_that_was_killed_is_the_same_to_the_bit(train, tmp_path):
    whole = train(8, save_dir=str(tmp_path / "whole"))
    train(8, kill_at=(0, 5), save_steps=3)
    train(8, kill_at=(2, 1), save_steps=3, resume="auto")
    resumed = train(8, save_steps=3, resume="auto")
    for name, tensor in whole.network.state_dict().items():
        assert resumed.network.state_dict()[name].numpy().tobytes() == tensor.numpy().tobytes()
    for place, rate in resumed.rates.items():
        assert rate == whole.rates[place]


@pytest.mark.parametrize("make", [learning_rate, swinging_rate], ids=["cosine", "swing"])
def test_a_rate_by_position_is_the_counters_to_the_bit(make):
    """What every run before had, which counted its steps."""
    arguments = (0.0008, 512, 7, 30) if make is learning_rate else (0.0008, 512, 7)
    counted, placed = make(*arguments), make(*arguments)
    model = Recorder()
    model.prepare(momentum_optimizer(model.network, placed, 0.9, 0.0), None)
    for position in range(30):
        model.set_rate(position)
        assert model.optimizer.get_lr() == counted()
        counted.step()


# --- whose run a set is


def test_a_new_run_that_saved_nothing_does_not_take_an_older_runs_set(train, tmp_path, caplog):
    folder = str(tmp_path / "run")
    train(8)
    older = noted_run(folder)
    train(8, kill_at=(0, 3), lr=LR / 2)
    assert noted_run(folder) not in (None, older)
    with caplog.at_level(logging.INFO):
        model = train(8, resume="auto", lr=LR / 2)
    assert_rates(model, 8, 0, lr=LR / 2)
    (line,) = [line for line in caplog.messages if "earlier run's" in line]
    assert "starting anew" in line and f"--resume {folder}" in line
    # From now on the sets of this run are taken, though older ones lie beside them.
    caplog.clear()
    train(8, kill_at=(1, 0), lr=LR)
    assert min(train(8, resume="auto", lr=LR).rates) == (1, 0)
    assert not [line for line in caplog.messages if "earlier run" in line]


def test_a_folders_name_asks_for_the_older_runs_set(train, tmp_path, caplog):
    train(8, kill_at=(2, 0))
    train(8, kill_at=(0, 3))
    caplog.clear()
    assert min(train(8, resume=str(tmp_path / "run")).rates) == (2, 0)
    assert [line for line in caplog.messages if "of an earlier run" in line]
    assert train(8, resume="auto").rates == {}


def test_a_finished_run_says_so(train, caplog):
    train(8)
    with caplog.at_level(logging.INFO):
        train(8, resume="auto")
    assert f"all {EPOCHS} epochs are done already: nothing is left to train" in caplog.messages


def test_a_run_keeps_its_id_when_it_goes_on_elsewhere(train, tmp_path):
    train(8, kill_at=(2, 0))
    run_id = noted_run(tmp_path / "run")
    train(8, kill_at=(2, 1), resume=str(tmp_path / "run"), save_dir=str(tmp_path / "there"))
    assert noted_run(tmp_path / "there") == run_id


def test_sets_of_versions_without_ids_are_taken(train, tmp_path):
    train(8, kill_at=(2, 0))
    forge(tmp_path / "run", drop("run_id"))
    (tmp_path / "run" / RUN_NOTE).unlink()
    train(8, kill_at=(2, 1), resume="auto")
    assert min(train(8, resume="auto").rates) == (2, 0)


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
        return {"tau": value}

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
    for every, rows in ((2, [(1, 0.5), (3, 0.25)]), (0, [])):
        train(8, measure=measures(0.5, 0.25), eval_freq=every)
        assert rows_of(tmp_path / "run") == rows


@pytest.mark.parametrize("killed", range(EPOCHS))
def test_what_a_kill_in_a_measurement_loses_is_measured_again(train, tmp_path, killed):
    values = [0.5, 0.25, 0.125, 1.0]
    train(8, measure=measures(*values[:killed], Killed()))
    train(8, measure=measures(*values[killed:]), resume="auto")
    assert rows_of(tmp_path / "run") == list(enumerate(values))
    # The last epoch's checkpoint was written before its measurement.
    train(8, measure=measures(values[-1]), resume="auto")
    assert rows_of(tmp_path / "run") == list(enumerate(values))


def test_a_measurement_leaves_the_generators_alone(train):
    states = []

    def measure():
        states.append(str(generators_state()))
        paddle.randn([3])
        np.random.rand()
        return {"tau": 0.5}

    train(8, measure=measure)
    assert len(states) == EPOCHS and len({*states, str(generators_state())}) == 1


# --- forged states: every digest matches


def forge(folder, change, suffix=STATES, stem="1"):
    """Change what a file of the set holds, and the digests that vouch for it."""
    state = load_pickle(folder / f"{stem}{STATES}")
    content = state if suffix == STATES else load_pickle(folder / f"{stem}{suffix}")
    replaced = change(content)
    content = content if replaced is None else replaced
    if suffix == STATES:
        state = content
    else:
        write_state(folder / f"{stem}{suffix}", content)
        state["digests"][suffix] = file_digest(folder / f"{stem}{suffix}")
    write_state(folder / f"{stem}{STATES}", state)


MISSING = object()


def put(*path, value):
    """A change: the value at a path of keys; a function finds the key in the content."""

    def change(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        last = last(content) if callable(last) else last
        if value is MISSING:
            del content[last]
        else:
            content[last] = copy.deepcopy(value)

    return change


def drop(*path):
    """A change: nothing at a path of keys."""
    return put(*path, value=MISSING)


HUGE = 10**40
FORGED_STATES = {
    "epoch: text": put("epoch", value="2"),
    "epoch: float": put("epoch", value=2.0),
    "epoch: none": put("epoch", value=None),
    "epoch: negative": put("epoch", value=-1),
    "epoch: huge": put("epoch", value=HUGE),
    "epoch: another": put("epoch", value=3),
    "epoch: missing": drop("epoch"),
    "step: negative": put("step", value=-1),
    "step: beyond the epoch": put("step", value=1000),
    "step: huge": put("step", value=HUGE),
    "step: missing": drop("step"),
    "losses: missing": drop("losses"),
    "losses: list": put("losses", value=[1.0]),
    "losses: too many": put("losses", "epoch_losses", value=np.ones(7)),
    "losses: none": put("losses", "epoch_losses", value=np.ones(0)),
    "losses: matrix": put("losses", "epoch_losses", value=np.ones((2, 2))),
    "losses: NaN": put("losses", "epoch_losses", value=np.array([np.nan, 1.0])),
    "losses: text": put("losses", "epoch_losses", value="many"),
    "losses: of steps": put("losses", "step_losses", value=np.ones(3)),
    "seconds: text": put("losses", "seconds", value="long"),
    "seconds: NaN": put("losses", "seconds", value=math.nan),
    "seconds: missing": drop("losses", "seconds"),
    "validation: none": put("losses", "validation", value=None),
    **{
        f"validation: {row}": put("losses", "validation", value=[row])
        for row in (
            1,
            {"tau": 0.5},
            {"epoch": 2, "tau": 0.5},
            {"epoch": -1, "tau": 0.5},
            {"epoch": True, "tau": 0.5},
            {"epoch": 0, "tau": math.nan},
            {"epoch": 0, "tau": "high"},
        )
    },
    "run: list": put("run", value=["lr"]),
    "run: missing": drop("run"),
    "run: of arrays": put("run", "lr", value=np.ones(3)),
    "run_id: number": put("run_id", value=3),
    "digests: missing": drop("digests"),
    "digests: list": put("digests", value=["a"]),
    "saved: text": put("saved", value="now"),
    "generators: missing": drop("generators"),
    "generators: text": put("generators", value="seed"),
    "python: words": put("generators", "python", "words", value=np.zeros(3, np.uint32)),
    "python: floats": put("generators", "python", "words", value=np.full(625, np.nan)),
    "python: version": put("generators", "python", "version", value=HUGE),
    "numpy: kind": put("generators", "numpy", "kind", value="PCG64"),
    "numpy: keys": put("generators", "numpy", "keys", value=np.zeros(5, np.uint32)),
    "numpy: position": put("generators", "numpy", "position", value=10**6),
    "numpy: negative": put("generators", "numpy", "position", value=-1),
    "paddle: none": put("generators", "paddle", value=None),
    "paddle: numbers": put("generators", "paddle", value=[1]),
    "paddle: engine": put("generators", "paddle", 0, "engine", value=np.zeros(4, np.uint8)),
    "paddle: seed": put("generators", "paddle", 0, "seed", value=HUGE),
    "all: list": lambda state: [1, 2],
    "all: empty": lambda state: {},
}


def refusal(train, caplog, **flags):
    """What resuming from the set is told: one line."""
    caplog.clear()
    with pytest.raises(UserError) as error:
        train(8, **flags)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("change", FORGED_STATES.values(), ids=FORGED_STATES)
def test_a_forged_state_is_one_line(train, killed, tmp_path, caplog, change):
    folder = shutil.copytree(killed, tmp_path / "run")
    forge(folder, change)
    message = refusal(train, caplog, resume=str(folder))
    # Either the set was passed over as none of this program, and no other is there, or refused.
    assert "1.pdstates is not what" in message or "no whole set" in message
    passed = [line for line in caplog.messages if line.startswith("passed over")]
    assert bool(passed) == ("no whole set" in message)


def velocity(state):
    return next(key for key in state if key.startswith("weight@"))


FORGED_OPTIMIZERS = {
    "all: list": lambda state: [1.0],
    "all: text": lambda state: "velocity",
    "all: empty": lambda state: {},
    "velocity: missing": drop(velocity),
    "velocity: NaN": put(velocity, value=np.full((3, 2), np.nan, np.float32)),
    "velocity: infinite": put(velocity, value=np.full((3, 2), np.inf, np.float32)),
    "velocity: shape": put(velocity, value=np.zeros((2, 3), np.float32)),
    "velocity: scalar": put(velocity, value=np.float32(1)),
    "velocity: whole numbers": put(velocity, value=np.zeros((3, 2), np.int64)),
    "velocity: float64": put(velocity, value=np.zeros((3, 2))),
    "velocity: text": put(velocity, value="fast"),
    "velocity: none": put(velocity, value=None),
    "velocity: number": put(velocity, value=HUGE),
    "another parameter": put("other@_velocity_0", value=np.zeros(1, np.float32)),
    "another suffix": put("weight@_moment1_0", value=np.zeros((3, 2), np.float32)),
    "a key without @": put("weight", value=np.zeros((3, 2), np.float32)),
    "a key that is a number": put(7, value=np.zeros((3, 2), np.float32)),
    "two of a parameter": put("weight@_velocity_7", value=np.zeros((3, 2), np.float32)),
}


@pytest.mark.parametrize("change", FORGED_OPTIMIZERS.values(), ids=FORGED_OPTIMIZERS)
def test_a_forged_optimizer_is_one_line(train, killed, tmp_path, caplog, change):
    shutil.copytree(killed, tmp_path / "run")
    forge(tmp_path / "run", change, OPTIMIZER)
    assert f"1{OPTIMIZER}" in refusal(train, caplog, resume="auto")


def test_an_optimizer_of_earlier_versions_is_taken(train, tmp_path):
    """They saved the learning rate's counter, and no velocity of what no step had trained."""
    train(8, kill_at=(2, 0))

    def as_before(state):
        state["LR_Scheduler"] = {"last_epoch": 10**6, "last_lr": "fast"}
        del state[velocity(state)]

    forge(tmp_path / "run", as_before, OPTIMIZER)
    assert_rates(train(8, resume="auto"), 8, 2)


def test_nothing_of_a_refused_set_is_kept(tmp_path, train):
    train(8, kill_at=(2, 0))
    forge(tmp_path / "run", put("epoch", value=-1))
    before = np.random.get_state()[1].tobytes()
    with pytest.raises(UserError):
        train(8, resume="auto")
    assert np.random.get_state()[1].tobytes() == before
