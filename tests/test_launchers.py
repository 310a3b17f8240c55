"""The three launchers: what they set, hand on and refuse; the page of their variables and flags."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import zipfile
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


def run(*command, cwd=ROOT, **changes):
    """Run in this environment without the variables that the launchers set themselves."""
    own = ("PINAS_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    env = {**kept, "python": sys.executable, **changes}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


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


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    """A folder with an nvidia-smi that sees three cards, and a Python that tells its arguments."""
    folder = tmp_path_factory.mktemp("fakes")
    cards = "GPU 0: A\\n  MIG 1g.10gb Device 0: B\\nGPU 1: A\\nGPU 2: A\\n"
    program(folder / "nvidia-smi", f"printf '{cards}'")
    program(folder / "python", 'echo "$CUDA_VISIBLE_DEVICES" "$@"')
    return folder


def program(path, line):
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def launch(fakes, line, **changes):
    """Stage 3 with the variables of a line; % stands for a space."""
    given = dict(setting.replace("%", " ").split("=", 1) for setting in line.split())
    usual = {"CUDA_VISIBLE_DEVICES": None, "PATH": f"{fakes}:{os.environ['PATH']}"}
    return run("sh", "local_eval.sh", **{**usual, **changes, **given})


@pytest.mark.parametrize(
    ("line", "visible", "device"),
    [
        ("CUDA_VISIBLE_DEVICES=0", "0", "auto"),
        # Paddle's launcher gives each process one, and ran out of them.
        ("processes=3 device=cpu CUDA_VISIBLE_DEVICES=0", "-1,-1,-1", "cpu"),
        ("gpus=2", "2", "gpu"),
        ("gpus=0 CUDA_VISIBLE_DEVICES=3", "3", "gpu"),
        ("gpus=1,0 CUDA_VISIBLE_DEVICES=GPU-8f,MIG-2e", "MIG-2e,GPU-8f", "gpu"),
        ("gpus=1 device=cpu CUDA_VISIBLE_DEVICES=5,%6,-1,7", "6", "cpu"),
    ],
)
def test_cards_are_counted_among_the_visible_and_mean_a_gpu(line, visible, device, fakes, tmp_path):
    done = launch(fakes, line, python=str(fakes / "python"), save_dir=str(tmp_path / "out"))
    assert re.fullmatch(rf"{visible} .* --device {device}\n", done.stdout), done.stderr


# --- what they refuse

NAME = "n" * 300
HOSTILE_VARIABLES = [
    ("gpus=,", "gpus=, is not a list of numbers as 0,1,2,3"),
    ("gpus=00", "gpus=00 is not a list"),
    ("gpus=0%1", "gpus=0 1 is not a list"),
    ("gpus=0,0", "gpus=0,0 names a GPU twice"),
    ("gpus=3", "gpus=3, but nvidia-smi finds 3 cards, counted from 0"),
    ("gpus=2 CUDA_VISIBLE_DEVICES=0,1", "gpus=2, but CUDA_VISIBLE_DEVICES=0,1 leaves 2 cards, "),
    ("gpus=0 CUDA_VISIBLE_DEVICES=", "gpus=0, but CUDA_VISIBLE_DEVICES= leaves 0 cards"),
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
    ("PADDLE_TRAINERS_NUM=", "PADDLE_TRAINERS_NUM= is left in the environment; unset it"),
    ("PADDLE_TRAINER_ID=x", "PADDLE_TRAINER_ID=x is left in the environment; unset it"),
    ("PADDLE_NNODES=2 processes=2", "PADDLE_NNODES=2 is left in the environment; unset it"),
    ("save_dir=None", "save_dir=None: results need a folder"),
    ("save_dir=None processes=2", "save_dir=None: results need a folder"),
    (f"save_dir={NAME} processes=2", f"cannot make the folder {NAME}/log; choose another"),
]


@pytest.mark.parametrize(("line", "words"), HOSTILE_VARIABLES)
def test_a_hostile_variable_is_one_line(line, words, fakes):
    runs = [launch(fakes, line, python="false")]
    if line.startswith("PADDLE_TRAINER"):
        runs.append(run(sys.executable, "train_supernet.py", **dict([line.split("=")])))
    for done in runs:
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


# --- setup_venv.sh, with toy wheels


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Wheels of two toy Paddles, and a Python whose venv is a copy, which is quick."""
    folder = tmp_path_factory.mktemp("toys")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    copy = f'cp -a {folder}/venv/. "$3"'
    program(folder / "python", f'[ "$2" = venv ] || exec {sys.executable} "$@"\n{copy}')
    for name, cuda in ("paddlepaddle", "False"), ("paddlepaddle-gpu", "12.6"):
        stem = f"{name.replace('-', '_')}-3.3.1"
        code = f"class version:\n    def cuda():\n        return '{cuda}'\n"
        code += "def is_compiled_with_cuda():\n    return version.cuda() != 'False'\n"
        about = {"METADATA": f"Name: {name}\nVersion: 3.3.1", "WHEEL": "Wheel-Version: 1.0"}
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("paddle.py", code)
            for part, text in {**about, "RECORD": ""}.items():
                wheel.writestr(f"{stem}.dist-info/{part}", text)
    return folder


@pytest.fixture
def set_up(toys, tmp_path):
    """Set up a folder's environment on a machine whose driver has that CUDA, or that has none."""
    wheels, index = f"--no-index\n--find-links {toys}", "--extra-index-url https://x/cu126/"
    (tmp_path / "requirements-cpu.txt").write_text(f"{wheels}\npaddlepaddle==3.3.1\n")
    (tmp_path / "requirements.txt").write_text(f"{wheels}\n{index}\npaddlepaddle-gpu==3.3.1\n")

    def act(cuda="", script='sh "$0"', **changes):
        program(tmp_path / "nvidia-smi", f"echo 'CUDA Version: {cuda} |'" if cuda else "exit 9")
        made = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": f"{toys}/python", **changes}
        return run("sh", "-c", script, ROOT / "hnas/tools/setup_venv.sh", cwd=tmp_path, **made)

    return act


def cuda_in(folder):
    """Of the Paddle in an environment."""
    code = "import paddle; print(paddle.version.cuda())"
    return run(folder / ".venv/bin/python", "-c", code).stdout.strip()


def test_each_kind_of_machine_has_its_environment(set_up, tmp_path):
    steps = [("13.0", "auto", "12.6"), ("", "auto", "False"), ("12.6", "auto", "12.6")]
    loaded = []
    for cuda, device, found in [*steps, ("12.6", "cpu", "False")]:
        done = set_up(cuda, device=device)
        assert (done.returncode, done.stderr, cuda_in(tmp_path)) == (0, "", found)
        loaded.append("Installing collected packages" in done.stdout)  # as pip tells it
    assert loaded == [True, True, False, False]


@pytest.mark.parametrize(
    ("cuda", "advice"),
    [
        ("12.5", "write cu118 for cu126 in requirements.txt, and run again"),
        ("11.7", "update the driver, or set device=cpu"),
    ],
)
def test_a_driver_that_is_too_old_is_told_before_anything_is_loaded(cuda, advice, set_up):
    done = set_up(cuda, PYTHON="false")
    why = f"requirements.txt has Paddle for CUDA 12.6, and this machine's driver has {cuda}"
    assert (done.returncode, done.stderr) == (2, f"error: {why}; {advice}\n")


def test_two_set_ups_and_a_killed_one_leave_a_whole_environment(set_up, tmp_path):
    done = set_up(script='sh "$0" & sh "$0" & wait')
    assert done.stdout.count("setting up") == 1 and cuda_in(tmp_path) == "False"
    # Killed while half a package is there, which pip takes for a whole one.
    venv = tmp_path / ".venv-cpu"
    (venv / "installed-requirements.txt").rename(venv / "set-up-unfinished")
    next(venv.glob("lib/*/site-packages/paddle.py")).unlink()
    assert set_up().returncode == 0 and cuda_in(tmp_path) == "False"


def test_an_environment_of_ones_own_stays(set_up, toys, tmp_path):
    set_up()
    link, own = tmp_path / ".venv", tmp_path / "own"
    link.unlink()
    (tmp_path / ".venv-cpu").rename(own)
    link.symlink_to(own)
    assert set_up().stdout == ""
    assert "has paddlepaddle, and this machine needs paddlepaddle-gpu" in set_up("12.6").stderr
    # One package over the other, as earlier set-ups left them.
    pip = (own / "bin/python", "-m", "pip", "install", "--no-index", "--find-links", toys)
    run(*pip, "paddlepaddle-gpu")
    assert set_up("12.6").returncode == 0
    assert (cuda_in(tmp_path), link.readlink()) == ("12.6", own)
    shutil.rmtree(own)
    assert "which is not there" in set_up().stderr


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
