"""That the numeric suite computes on the CPU where Paddle would take a GPU, and that `-m gpu` does.

No GPU is needed: a stand-in for Paddle claims two and, as CUDA does, hides them from a process
whose CUDA_VISIBLE_DEVICES begins with a number that is no card's.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_only_the_gpu_suite_and_what_it_starts_see_the_cards(tmp_path):
    conftest = tmp_path / "conftest.py"
    shutil.copy(Path(__file__).with_name("conftest.py"), conftest)
    (tmp_path / "paddle.py").write_text(PADDLE)
    (tmp_path / "test_devices.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs one\n    slow: is\n")
    shown = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "1"}

    def suite(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=shown, capture_output=True, text=True, timeout=60
        )
        return done.stdout.splitlines()[-1]

    assert "1 passed" in suite("-k", "numbers")
    assert "1 passed, 1 deselected" in suite("-m", "gpu")
    # Without what conftest.py does, the first of them fails.
    conftest.write_text(conftest.read_text().replace("CUDA_VISIBLE_DEVICES", "ANOTHER"))
    assert "1 failed" in suite("-k", "numbers")
