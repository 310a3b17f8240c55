"""Small tools: the demo's closing words, and what starts without Paddle."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from independent import counts_of, first_ones

from hnas.evaluation.results import estimates
from hnas.ranking.costs import Network
from hnas.search_space import RESNET48, RESNET48_MINI, Architecture
from hnas.tools import demo_summary

ROOT = Path(__file__).parents[1]
NUMBER, IMAGES = 21, 355
USED = {"ckpt_dir": "w", "backbone": "resnet48_mini", "image_dir": "my images", "image_size": 32}
USED |= {"bad_images": "skip", "seed": 3}


@pytest.fixture
def demo(tmp_path):
    """What a demo leaves that its summary reads: accuracies that grow with the MACs."""
    space = RESNET48_MINI
    archs = space.sample_distinct(
        np.random.default_rng(0), NUMBER, (space.largest(), space.smallest())
    )
    macs = np.array([space.macs(arch, 32, 10) for arch in archs.values()])
    counts = counts_of(np.arange(IMAGES) < macs[:, None] * IMAGES / 1e7)
    (tmp_path / "stage3").mkdir()
    found = estimates(archs, counts, None, IMAGES, Network("resnet48_mini", 32, 10))
    (tmp_path / "stage3/submission.json").write_text(json.dumps(found["architectures"]))
    (tmp_path / "stage3/estimates.json").write_text(json.dumps(found))
    (tmp_path / "stage3/settings.json").write_text(
        json.dumps({"options": demo_summary.MORE | USED})
    )
    (tmp_path / "seconds.txt").write_text("data 3\nstage1 20\n")
    return tmp_path


def test_the_table_is_right_and_what_is_next_works_as_printed(demo, capsys):
    demo_summary.main(["--demo_dir", str(demo)])
    text = capsys.readouterr().out
    entries = json.loads((demo / "stage3/submission.json").read_text()).values()
    every = sorted((macs_of(entry), entry["acc"]) for entry in entries)
    for name, (macs, top1) in zip(("smallest", "median", "largest"), every[::10], strict=True):
        assert re.search(rf"^{name} +{macs:,} +{top1:.2%}$", text, re.M)
    assert re.search("^data +3\nstage1 +20$", text, re.M)
    commands = text.split("as ONNX\n")[1].replace("\\\n", " ").splitlines()
    command, exported = map(shlex.split, commands)
    assert (ROOT / command[0]).resolve() == Path(sys.executable).resolve()
    given = dict(zip(exported[3::2], exported[4::2], strict=True))
    assert [given[f"--{name}"] for name in USED] == [str(value) for value in USED.values()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    most = int(command[-1])
    assert every[10][0] <= most <= 1.5 * every[10][0] and f"within {most:,} MACs" in text
    best = max(top1 for macs, top1 in every if macs <= most)
    name = given["--arch"]
    assert re.search(rf"^best +{name}: {best:.2%}, [\d,]+ MACs", done.stdout, re.M), done.stdout


def macs_of(entry):
    return RESNET48_MINI.macs(Architecture.from_code(entry["arch"]), 32, 10)


MOST_MIB = 200
# Runs a tool and tells what it loaded and took. The peak is the kernel's VmHWM: ru_maxrss would
# also count the memory of the process that this one was forked from.
RUN = """
import importlib, json, re, sys
tool, *arguments = sys.argv[1:]
importlib.import_module(f"hnas.tools.{tool}").main(arguments)
loaded = sorted({name.partition(".")[0] for name in sys.modules})
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
sys.stderr.write(json.dumps({"loaded": loaded, "mib": peak / 1024}))
"""


@pytest.fixture
def files(tmp_path):
    """A file of architectures with accuracies, estimates beside it, and a folder to write to."""
    archs = RESNET48.sample_distinct(np.random.default_rng(0), 50)
    archs = {f"{name}\ud800": arch for name, arch in archs.items()}  # no character
    content = estimates(archs, counts_of(first_ones(np.arange(50), 50)), None, 50)
    path = tmp_path / "archs.json"
    path.write_text(json.dumps(content["architectures"]))
    (tmp_path / "estimates.json").write_text(json.dumps(content))
    return path, tmp_path


@pytest.mark.parametrize(
    ("tool", "arguments", "light"),
    [
        ("plan", "--n_arch 500", {"scipy", "matplotlib"}),
        ("draw_architectures", "--number 50 --output FOLDER/drawn.json", {"scipy", "matplotlib"}),
        ("choose", "--submission FILE", {"matplotlib"}),
        ("choose", "--submission FILE --out FOLDER/out", set()),
        ("rank_report", "--pred macs --gt FILE --out FOLDER/out", set()),
        ("rank_report", "--pred FILE --out FOLDER/out", set()),
    ],
)
def test_without_paddle_and_in_little_memory(files, tool, arguments, light):
    path, folder = (str(file) for file in files)
    words = arguments.replace("FILE", path).replace("FOLDER", folder).split()
    command = [sys.executable, "-c", RUN, tool, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    found = json.loads(done.stderr.splitlines()[-1])  # others say what was taken
    assert not ({"paddle", "paddleslim", "sklearn", "cv2"} | light) & set(found["loaded"])
    assert found["mib"] < MOST_MIB
