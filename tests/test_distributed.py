"""Several gloo processes against one: gradients, queues, resuming, deaths, scores."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from entry_scripts import ROOT, TIMEOUT, Runs, write_inputs

from hnas.architecture_file import submission
from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.parallel.rollcall import RollCall
from hnas.search_space import RESNET48_MINI

WORKER = Path(__file__).with_name("distributed_worker.py")
STATISTICS = ("._mean", "._variance")
KILLED = "rank 1 was killed by SIGKILL; what is saved can be resumed\n"


# --- steps


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process of the worker wrote, and what each of four did that share its batches."""
    work = tmp_path_factory.mktemp("worker")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "4"]
    launcher += ["--log_dir", str(work / "log")]
    for how in ([], launcher):
        command = [sys.executable, *how, str(WORKER), str(work)]
        kept = {"capture_output": True, "text": True, "timeout": TIMEOUT}
        done = subprocess.run(command, env=environment, **kept)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    whole = dict(np.load(work / "0of1.npz"))
    return whole, [dict(np.load(work / f"{rank}of4.npz")) for rank in range(4)]


def of(results, prefix):
    return {key: value for key, value in results.items() if key.startswith(prefix)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage 1", "accumulated", "stage 2"])
def test_frozen_ranks_train_as_one_process_on_the_joined_batch(found, name):
    """Also if each rank splits its share in two, which the one process does not."""
    whole, ranks = found
    right = whole[f"{name} gradient"]
    assert right.size > 1e6 and np.abs(right).max() > 0.1
    state = of(whole, f"{name} state")
    assert len(state) > 200
    if name == "accumulated":  # keys come part by part
        state.pop(f"{name} state queue")
    for results in ranks:
        np.testing.assert_allclose(results[f"{name} gradient"], right, rtol=1e-5, atol=1e-5)
        for key, value in state.items():
            assert np.isfinite(value).all()
            np.testing.assert_allclose(results[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    moved = {key for key in of(whole, f"{name} moved") if whole[key]}
    contrastive = {f"{name} moved {key}" for key in ("queue", "key_neck.project.weight")}
    assert name == "stage 2" or contrastive <= moved
    assert not [key for key in moved if key.endswith(STATISTICS)]


@pytest.mark.slow
def test_weights_queue_and_key_encoder_stay_equal_bit_for_bit(found):
    whole, (first, *others) = found
    kept = {key: value for key, value in first.items() if " state " in key}
    for other, (key, value) in itertools.product(others, kept.items()):
        if key.endswith(STATISTICS) and key.startswith("statistics"):
            continue
        assert other[key].tobytes() == value.tobytes(), key
    for key in ("queue", "key_neck.project.weight", "key_backbone.blocks.0.conv.fn.weight"):
        assert first[f"statistics moved {key}"]
    # Statistics are each rank's own: the comparison above is not one of equal inputs.
    name = "statistics state key_backbone.blocks.0.bn._mean"
    assert first[name].tobytes() != others[0][name].tobytes()
    # A step reduces gradients once.
    for name, calls in of(first, "").items():
        if name.endswith("calls"):
            assert set(calls.tolist()) == {1} and set(whole[name].tolist()) == {0}


# --- runs


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images and a network to start from."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, 4)
    return folder


class LoggedRuns(Runs):
    """Their ranks write logs."""

    def wait_for(self, name: str, text: str) -> None:
        """Until rank 0's log holds a text."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.log(name):
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.01)

    def log(self, name: str) -> str:
        logs = sorted((self.work / name).glob("log*/workerlog.0"))
        return "".join(path.read_text(errors="replace") for path in logs)


@pytest.fixture
def runs(work):
    return LoggedRuns(work, {"max_epoch": 6, "queue_size": 32, "bn_calibration_images": 8})


def kill_last_rank(process: subprocess.Popen) -> None:
    """SIGKILL the launcher's youngest child."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(max(map(int, children)), signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "machines"), [(1, 1), (2, 2)])
def test_a_dead_rank_ends_the_run_which_resumes_exactly(runs, stage, machines):
    """Two ranks under one launcher, or each under its own, as on two machines."""
    whole, parts = f"whole{stage}", f"parts{stage}"
    runs.run(stage, whole, 2)
    shared = {"save_steps": 2, "nnodes": machines, "master": f"127.0.0.1:{free_port()}"}
    launchers = [
        runs.start(stage, parts, 2 // machines, node_rank=number, **shared)
        for number in range(machines)
    ]
    runs.wait_for(parts, "epoch 2/6 step 1/5")
    kill_last_rank(launchers[-1])
    began = time.monotonic()
    output = "".join(launcher.communicate(timeout=60)[0] for launcher in launchers)
    assert time.monotonic() - began < 60
    assert all(launcher.returncode for launcher in launchers)
    assert launchers[-1].returncode == 1 and output.endswith(KILLED)
    # The launcher tells of the dead one, or of the other, which says why it ends.
    told = output + runs.log(parts)
    assert "Container failed" in output and "Traceback" not in told
    assert "rank 1 is gone" in told or "lost another process" in told
    runs.run(stage, parts, 2, resume="auto", save_steps=2)
    assert "training from epoch 2" in runs.log(parts)
    runs.assert_same(parts, whole)


@pytest.mark.slow
def test_machines_of_other_settings_do_not_begin(runs):
    shared = {"nnodes": 2, "master": f"127.0.0.1:{free_port()}"}
    launchers = [runs.start(1, "o", 1, node_rank=n, lr=f"0.{n + 1}", **shared) for n in range(2)]
    for number, launcher in enumerate(launchers):
        output = launcher.communicate(timeout=TIMEOUT)[0]
        assert f"error: the processes differ in lr (here: 0.{number + 1}): " in output
        assert launcher.returncode == 2


@pytest.mark.slow
def test_a_stopped_run_resumes_on_another_number_of_ranks(runs):
    process = runs.start(2, "stopped", 2, save_steps=0)
    runs.wait_for("stopped", "epoch 2/6 step 1/5")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    log = runs.log("stopped")
    stopped = log[log.index("stopped by SIGTERM after epoch") :].split()
    epoch, step = int(stopped[5]), int(stopped[7].rstrip(";"))
    # Another total batch within an epoch would see some images twice and others never.
    output = runs.run(2, "stopped", 1, code=2, resume="auto", batch_size=4)
    assert "total_batch differ" in output.splitlines()[-1]
    output = runs.run(2, "stopped", 1, resume="auto", batch_size=8)
    assert f"training from epoch {epoch} step {step + 1}" in output
    assert len(runs.losses("stopped")) == 6


@pytest.mark.slow
def test_scores_are_one_processs_byte_for_byte(runs, work):
    rng = np.random.default_rng(0)
    archs = {f"n{i}": RESNET48_MINI.sample(rng) for i in range(30)}
    write_json(work / "archs.json", submission(archs, [0.0] * 30))
    variables = {"ckpt_dir": work / "pretrained.pdparams", "modelarch_file": work / "archs.json"}
    variables |= {"chunk_size": 3, "eval_images": 37}
    runs.run(3, "scores1", 1, **variables)
    process = runs.start(3, "scores", 2, **variables)
    deadline = time.monotonic() + TIMEOUT
    while not (work / "scores/estimates.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_last_rank(process)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output[-3000:]
    assert output.endswith(KILLED)
    assert not (work / "scores/submission.json").is_file()
    runs.run(3, "scores", 3, **variables)
    assert "continuing after" in runs.log("scores")
    for name in ("submission.json", "estimates.json"):
        whole = (work / "scores1" / name).read_bytes()
        assert (work / "scores" / name).read_bytes() == whole
    assert not list((work / "scores").glob("eval_chunk_*"))


# --- the roll call


def roll_calls(ranks):
    """One for each rank, all in this process."""
    box, ready = [], threading.Event()

    def share(numbers):
        if numbers[0]:
            # A stranger at the door, before anyone else knows where it is, is turned away.
            with socket.create_connection(("127.0.0.1", numbers[0])) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            box.extend(numbers)
            ready.set()
        assert ready.wait(10)
        return box

    with ThreadPoolExecutor(ranks) as pool:
        return list(
            pool.map(lambda rank: RollCall.connect(rank, ranks, "127.0.0.1", share), range(ranks))
        )


def test_roll_call_waits_for_the_last():
    calls = roll_calls(3)
    arrived, left = [], []

    def come(rank):
        for turn in range(2):
            time.sleep(0.1 * rank)
            arrived.append(turn)
            calls[rank].wait()
            left.append((turn, arrived.count(turn)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(come, range(3)))
    assert len(left) == 6 and all(number == 3 for _, number in left)
    calls[2].leave()
    with pytest.raises(UserError, match="rank 2 has ended"):
        calls[0].wait()
    for call in calls[:2]:
        call.leave()
