"""That the numeric suite computes on the CPU where Paddle would take a GPU, and that `-m gpu` does.

No GPU is needed: a stand-in for Paddle claims two and, as CUDA does, hides them from a process
whose CUDA_VISIBLE_DEVICES begins with a number that is no card's.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PADDLE = """
import itertools, os

def device_count():
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return len(list(itertools.takewhile(lambda card: card in ("0", "1"), visible)))

def get_device():
    return "gpu:0" if device_count() else "cpu"
"""
TESTS = """
import os, subprocess, sys
import paddle
import pytest

CHILD = "import paddle; print(paddle.get_device())"

def devices():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    return [paddle.get_device(), done.stdout.strip()]

def test_numbers():
    assert devices() == ["cpu", "cpu"]
    assert len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) >= 4

@pytest.mark.gpu
def test_gpu():
    assert devices() == ["gpu:0", "gpu:0"]
"""


@pytest.fixture
def suite(tmp_path):
    """Runs a suite of two tests under this suite's conftest.py; gives pytest's last line."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "paddle.py").write_text(PADDLE)
    (tmp_path / "test_devices.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs one\n    slow: is\n")

    def run(*arguments, **environment):
        shown = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=tmp_path,
            env={**shown, "PYTHONPATH": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.splitlines()[-1]

    return run


def test_the_suite_and_what_it_starts_compute_on_the_cpu(suite):
    assert "1 passed" in suite("-k", "numbers", CUDA_VISIBLE_DEVICES="1")


def test_the_gpu_suite_sees_the_cards(suite):
    assert "1 passed, 1 deselected" in suite("-m", "gpu")


def test_the_stand_in_would_be_taken_for_a_gpu(suite, tmp_path):
    """Without what conftest.py does, the first test above fails."""
    conftest = tmp_path / "conftest.py"
    conftest.write_text(conftest.read_text().replace("CUDA_VISIBLE_DEVICES", "ANOTHER"))
    assert "1 failed" in suite("-k", "numbers")
