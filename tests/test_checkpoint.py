"""Checkpoints: writing never loses one, and a set is loaded whole or not at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from entry_scripts import ROOT, arrays_of, assert_same_bits
from safetensors.numpy import load_file

from hnas.base.errors import UserError
from hnas.weights import loading
from hnas.weights.checkpoint import (
    load_training,
    newest_set,
    optimizer_state,
    read_progress,
    remove_set,
    save_training,
)
from hnas.weights.loading import NotFiniteError, read_state, read_weights, write_state


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_what_is_written_is_read_back_by_others(suffix, tmp_path):
    network, _ = trained(2)
    path = tmp_path / f"weights{suffix}"
    digest = write_state(path, network.state_dict())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_file(path) if suffix == ".safetensors" else paddle.load(str(path))
    found = {name: np.asarray(tensor) for name, tensor in loaded.items()}
    assert_same_bits(found, arrays_of(network))
    check = subprocess.run(
        ["sha256sum", "-c", f"{path.name}.sha256"], cwd=tmp_path, capture_output=True, check=False
    )
    assert check.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.sha256"]


# A process whose files may not grow beyond a limit sees the same as on a full disk.
FULL_DISK = """
import resource, sys
import numpy as np
from hnas.base.errors import UserError
from hnas.evaluation.counts import Counts
from hnas.evaluation.results import save_state
from hnas.weights.loading import write_state
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for path in sys.argv[1:]:
    try:
        if path.endswith(".npz"):
            save_state(path, {}, 1, Counts.zeros(100_000))
        write_state(path, {"a": np.zeros(1_000_000, np.float32)})
    except UserError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    paths = [tmp_path / f"0{suffix}" for suffix in (".pdparams", ".safetensors")]
    for path in paths:
        write_state(path, {"a": paddle.ones([3])})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    every = [*paths, tmp_path / "eval_state.npz"]
    command = [sys.executable, "-c", FULL_DISK, *map(str, every)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [f"cannot write {path}: File too large" for path in every]
    assert "Exception ignored" not in run.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for path in paths:
        np.testing.assert_array_equal(read_weights(path)["a"], np.ones(3, np.float32))


def trained(steps: int):
    """A small network and its optimizer after some steps."""
    paddle.seed(5)
    network = paddle.nn.Sequential(paddle.nn.Linear(4, 4), paddle.nn.Linear(4, 2))
    schedule = paddle.optimizer.lr.LambdaDecay(0.1, lambda step: 1 / (1 + step))
    optimizer = paddle.optimizer.Momentum(schedule, 0.9, parameters=network.parameters())
    for step in range(steps):
        network(paddle.full([3, 4], 0.1 * (step + 1))).square().sum().backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
    return network, optimizer


def test_a_set_restores_weights_and_velocity(tmp_path):
    network = save_at(tmp_path, "0-3", 3)
    other, optimizer = trained(0)
    progress = read_progress(tmp_path / "0-3")
    load_training(tmp_path / "0-3", other, optimizer, progress)
    assert progress["step"] == 3
    assert_same_bits(arrays_of(other), arrays_of(network))
    # The learning rate follows from the position, which fit sets.
    assert optimizer.get_lr() == 0.1
    optimizer._learning_rate.step(progress["step"])
    other(paddle.full([3, 4], 0.4)).square().sum().backward()
    optimizer.step()
    assert_same_bits(arrays_of(other), arrays_of(trained(4)[0]))
    # Velocities that no step has used since are kept.
    network, optimizer = trained(0)
    load_training(tmp_path / "0-3", network, optimizer, progress)
    network[0](paddle.ones([3, 4])).sum().backward()
    optimizer.step()
    save_training(tmp_path / "0-4", network, optimizer, progress)
    before, after = (read_state(tmp_path / f"{name}.pdopt")[0] for name in ("0-3", "0-4"))
    assert np.abs(before["1.weight@_velocity_0"]).max() > 0
    np.testing.assert_array_equal(after["1.weight@_velocity_0"], before["1.weight@_velocity_0"])
    assert (after["0.weight@_velocity_0"] != before["0.weight@_velocity_0"]).any()


def save_at(folder: Path, name: str, steps: int) -> paddle.nn.Layer:
    network, optimizer = trained(steps)
    save_training(folder / name, network, optimizer, {"step": steps, "run_id": "some"})
    return network


def test_the_set_that_was_saved_last_is_the_newest(tmp_path):
    """By their numbers, whatever the clock says: files are a day older with every set."""
    assert newest_set(tmp_path) is None
    assert newest_set(tmp_path / "none") is None
    for name in ("0-3", "0", "1-2"):
        save_at(tmp_path, name, 1)
        for path in tmp_path.glob(f"{name}.*"):
            os.utime(path, (0, path.stat().st_mtime - 86_400 * len(list(tmp_path.iterdir()))))
        assert newest_set(tmp_path) == tmp_path / name
    # Epoch 0 anew, after the others: theirs belong to an earlier run.
    save_at(tmp_path, "0", 2)
    assert newest_set(tmp_path) == tmp_path / "0"
    save_at(tmp_path, "unknown", 1)
    assert newest_set(tmp_path) == tmp_path / "0"


SUFFIXES = (".pdparams", ".pdopt", ".pdstates")
PIECES = [f"{suffix}{digest}" for suffix in SUFFIXES for digest in ("", ".sha256")]


@pytest.mark.parametrize("written", range(len(PIECES)))
def test_a_crash_between_the_files_never_mixes_sets(written, tmp_path):
    """Any number of a new set's files over those of an old set of the same name."""
    save_at(tmp_path / "old", "0", 1)
    save_at(tmp_path / "new", "0", 3)
    for number, piece in enumerate(PIECES):
        source = tmp_path / ("new" if number < written else "old") / f"0{piece}"
        (tmp_path / f"0{piece}").write_bytes(source.read_bytes())
    if written == 0:
        assert newest_set(tmp_path) == tmp_path / "0"
        return
    assert newest_set(tmp_path) is None
    network, optimizer = trained(0)
    before = arrays_of(network)
    with pytest.raises(UserError):
        load_training(tmp_path / "0", network, optimizer, read_progress(tmp_path / "0"))
    assert_same_bits(arrays_of(network), before)


def test_a_set_that_is_replaced_while_it_is_read_is_not_mixed(tmp_path, monkeypatch):
    save_at(tmp_path, "0", 1)
    load, progress = loading.load_pickle, read_progress(tmp_path / "0")

    def read(*args):
        if args[0] == Path(f"{tmp_path}/0.pdparams"):
            write_state(tmp_path / "0.pdopt", optimizer_state(*trained(3)))
        return load(*args)

    monkeypatch.setattr(loading, "load_pickle", read)
    with pytest.raises(UserError, match=r"0\.pdopt and .*0\.pdstates are not of one set"):
        load_training(tmp_path / "0", *trained(0), progress)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_set_is_passed_over(suffix, tmp_path, caplog):
    save_at(tmp_path, "0", 1)
    save_at(tmp_path, "1", 2)
    (tmp_path / f"1{suffix}").write_bytes(b"\x80\x04}.")
    assert newest_set(tmp_path) == tmp_path / "0"
    assert f"passed over {tmp_path}/1" in caplog.text
    for name in "01":
        remove_set(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_written(value, tmp_path):
    network, optimizer = trained(1)
    network[1].bias.set_value(np.array([0, value], np.float32))
    with pytest.raises(NotFiniteError, match=r"1\.bias is not finite"):
        save_training(tmp_path / "0", network, optimizer, {})
    assert list(tmp_path.iterdir()) == []
