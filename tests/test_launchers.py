"""The three launchers: what they set, hand on and refuse; the page of their variables and flags."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hnas.programs.flags import Stage
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.tools import flag_tables
from hnas.tools.flag_tables import LAUNCHERS, PAGE, launcher_variables, main, page

ROOT = Path(__file__).parents[1]
SHARED = "hnas/tools/launch.sh"
# What the launchers give that a program alone does not: the paths of the recipe.
PATHS = {"image_dir", "pretrained", "ckpt_dir", "modelarch_file"}


def run(*command, **changes):
    """Run in this environment without the variables that the launchers set themselves."""
    own = ("PINAS_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    env = {**kept, "python": sys.executable, **changes}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


# --- what launchers hand on


@pytest.mark.parametrize("stage", LAUNCHERS, ids=str)
def test_launchers_have_the_programs_defaults(stage):
    text = text_of(LAUNCHERS[stage])
    variables = launcher_variables(text)
    assert len(variables) == len(re.findall(r"^\w+=\$\{", text, re.M)) > 10
    passed = re.findall(r'--(\w+) "\$(\w+)"', text)
    assert {name for _, name in passed} == set(variables)
    line = [f"--{name}={default}" for name, default in variables.items()]
    given, alone = (dataclasses.asdict(parse_options(stage, argv)) for argv in (line, []))
    # Stage 2's launcher goes on from stage 1.
    different = {name for name in given if given[name] != alone[name]}
    assert different == (PATHS | {"use_ckpt"}) & set(variables)
    with_effect = {o.name for o in dataclasses.fields(Options) if stage in o.metadata["stages"]}
    assert {flag for flag, _ in passed} <= with_effect


def test_wrong_flags_are_all_that_is_said():
    """Paddle and PaddleSlim, which are imported before, have nothing to say about threads."""
    done = run("sh", "local_train_pinas2_simple_wholenet_nof.sh", "--imgae_dir", "x", threads="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --imgae_dir; did you mean --image_dir?\n"


def test_warnings_of_users_choice_stay():
    script = f". {SHARED}; launch -c \"import warnings; warnings.warn('look')\""
    assert "UserWarning: look" in run("sh", "-c", script).stderr
    assert run("sh", "-c", script, PYTHONWARNINGS="ignore::UserWarning").stderr == ""


def test_programs_compute_with_the_launchers_threads():
    program = (
        "import ctypes, paddle\n"
        "from pathlib import Path\n"
        "from hnas.programs.flags import Stage\n"
        "from hnas.programs.parsing import parse_options\n"
        "from hnas.programs.runtime import start\n"
        "from hnas.base.device import cpu_threads\n"
        "start(parse_options(Stage.SCORE, ['--device', 'cpu']))\n"
        "libraries = Path(paddle.__file__).parent / 'libs'\n"
        "openmp = ctypes.CDLL(str(libraries / 'libiomp5.so')).omp_get_max_threads()\n"
        "print(openmp, cpu_threads())"
    )
    done = run("sh", "-c", f'. {SHARED}; launch -c "$0"', program, threads="3")
    assert done.stdout == "3 3\n", done.stderr


def test_a_launcher_of_a_script_that_sourced_it_has_the_same_threads():
    """As in run_demo.sh: nproc follows OMP_NUM_THREADS, which is 1 for the second."""
    report = 'echo "$PINAS_THREADS"'
    inner = f". {SHARED}; {report}"
    done = run("sh", "-c", f'. {SHARED}; {report}; sh -c "$0"', inner, OMP_NUM_THREADS="2")
    assert done.stdout == "2\n2\n", done.stderr


@pytest.mark.parametrize(("processes", "devices"), [(1, "0"), (3, "-1,-1,-1")])
def test_processes_on_cpus_have_no_gpu_each(processes, devices, tmp_path):
    """Paddle's launcher gives each a device of CUDA_VISIBLE_DEVICES, and ran out of them."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES"\n')
    fake.chmod(0o755)
    variables = {"CUDA_VISIBLE_DEVICES": "0", "processes": str(processes), "device": "cpu"}
    variables |= {"python": str(fake), "save_dir": "~/out", "HOME": str(tmp_path)}
    done = run("sh", "local_eval.sh", **variables)
    assert (done.returncode, done.stdout) == (0, f"{devices}\n"), done.stderr
    assert (tmp_path / "out/log").is_dir() == (processes > 1)


# --- what they refuse

NAME = "n" * 300
HOSTILE_VARIABLES = [
    ("gpus=,", "gpus=, is not a list of numbers as 0,1,2,3"),
    ("gpus=0%1", "gpus=0 1 is not a list"),
    ("gpus=0,0", "gpus=0,0 names a GPU twice"),
    ("processes=0", "processes=0 is too small; the least is 1"),
    ("processes=abc", "processes=abc is not a whole number from 1 to 9999"),
    ("processes=08", "processes=08 is not a whole number"),
    ("threads=abc", "threads=abc is not a whole number"),
    ("threads=$(touch%/tmp/x)", "threads=$(touch /tmp/x) is not a whole number"),
    ("nnodes=0", "nnodes=0 is too small"),
    ("nnodes=2 master=host node_rank=0", "master=host is not HOST:PORT"),
    ("nnodes=2 master=host:1 node_rank=2", "node_rank=2 is not below nnodes=2"),
    ("python=/nope", "python=/nope cannot be run"),
    ("PADDLE_TRAINERS_NUM=4", "PADDLE_TRAINERS_NUM=4 is left in the environment; unset it"),
    ("save_dir=None", "save_dir=None: results need a folder"),
    ("save_dir=None processes=2", "save_dir=None: results need a folder"),
    (f"save_dir={NAME} processes=2", f"cannot make the folder {NAME}/log; choose another"),
]


@pytest.mark.parametrize(("line", "words"), HOSTILE_VARIABLES)
def test_a_hostile_variable_is_one_line(line, words):
    variables = dict(setting.replace("%", " ").split("=", 1) for setting in line.split())
    done = run("sh", "local_eval.sh", **{"python": "false", **variables})
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


# --- the page


def rows_after(marker):
    """The cells of the table that follows a marker of the page."""
    lines = re.findall(r"^(?:\|.*\n)+", text_of(PAGE).split(f"<!-- {marker} -->")[1], re.M)[0]
    rows = [[c.strip() for c in line[1:-1].split(" | ")] for line in lines.splitlines()[2:]]
    return {cells[0].strip("`-"): cells[1:] for cells in rows}


def test_the_page_is_current(tmp_path, monkeypatch):
    """If not: python -m hnas.tools.flag_tables"""
    assert text_of(PAGE) == page(text_of(PAGE))
    for name in (*LAUNCHERS.values(), PAGE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text_of(name))
    launcher = tmp_path / LAUNCHERS[Stage.SCORE]
    launcher.write_text(launcher.read_text().replace("chunk_size:-0", "chunk_size:-7"))
    monkeypatch.setattr(flag_tables, "ROOT", tmp_path)
    main([])
    changed = (tmp_path / PAGE).read_text()
    assert changed != text_of(PAGE) and changed == page(changed)


def test_the_page_tells_every_variable_of_the_processes():
    rows, text = rows_after("processes"), text_of(SHARED)
    own = {name: default or "none" for name, default in launcher_variables(text).items()}
    assert {name: default.strip("`") for name, (default, _) in rows.items()} == own
    for name, (_, meaning) in rows.items():
        assert re.search(rf"^{name}=.*# {re.escape(meaning)}$", text, re.M)
