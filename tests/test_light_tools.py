"""The tools that count and rank from codes alone start without Paddle."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hnas.search_space import RESNET48

ROOT = Path(__file__).parents[1]
MOST_MIB = 150
# Runs a tool and tells what it loaded and took. The peak is the kernel's VmHWM: ru_maxrss would
# also count the memory of the process that this one was forked from.
RUN = """
import importlib, json, sys
tool, *arguments = sys.argv[1:]
importlib.import_module(f"hnas.tools.{tool}").main(arguments)
from hnas.base.memory import peak_gib
loaded = sorted({name.partition(".")[0] for name in sys.modules})
sys.stderr.write(json.dumps({"loaded": loaded, "mib": 1024 * peak_gib()}))
"""


@pytest.fixture
def files(tmp_path):
    """A file of architectures with accuracies, and a folder to write to."""
    archs = RESNET48.sample_distinct(np.random.default_rng(0), 50).values()
    entries = {f"a{i}": {"acc": i / 50, "arch": arch.code} for i, arch in enumerate(archs)}
    path = tmp_path / "archs.json"
    path.write_text(json.dumps(entries))
    return path, tmp_path


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("flops", ["--modelarch_file", "FILE"]),
        ("draw_architectures", ["--number", "50", "--output", "FOLDER/drawn.json"]),
        ("choose", ["--submission", "FILE", "--images", "99", "--out", "FOLDER/out"]),
        ("rank_report", ["--pred", "macs", "--gt", "FILE", "--out", "FOLDER/out"]),
        ("rank_report", ["--pred", "FILE", "--out", "FOLDER/out"]),
    ],
)
def test_without_paddle_and_in_little_memory(files, tool, arguments):
    path, folder = (str(file) for file in files)
    arguments = [word.replace("FILE", path).replace("FOLDER", folder) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", RUN, tool, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(done.stderr)
    heavy = {"paddle", "paddleslim", "scipy", "sklearn", "cv2", "PIL", "matplotlib"}
    assert not heavy & set(found["loaded"])
    assert found["mib"] < MOST_MIB
