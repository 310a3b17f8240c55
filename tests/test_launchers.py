"""The launchers: what they set, hand on and refuse; the page of their variables and flags."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from entry_scripts import LAUNCHERS, ROOT, launcher_variables, text_of, write_inputs

from hnas.programs.flags import Stage
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.tools.flag_tables import PAGE, page

SHARED = "hnas/tools/launch.sh"
# What the launchers give that a program alone does not: the paths of the recipe.
PATHS = {"image_dir", "pretrained", "ckpt_dir", "modelarch_file"}


def run(*command, cwd=ROOT, **changes):
    """Run in this environment without the variables that the launchers set themselves."""
    own = ("PINAS_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    env = {**kept, "python": sys.executable, **changes}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


# --- what launchers hand on


STAGES = zip((Stage.CONTRAST, Stage.DISTILL, Stage.SCORE), LAUNCHERS.values(), strict=True)


@pytest.mark.parametrize(("stage", "launcher"), STAGES)
def test_launchers_have_the_programs_defaults(stage, launcher):
    text = text_of(launcher)
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


@pytest.mark.parametrize("paddle", [True, False])
def test_without_an_environment_python3_has_paddle_or_is_refused(paddle, tmp_path):
    program(tmp_path / "python3", f"exit {int(not paddle)}")
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = f". {ROOT / SHARED}; echo $python"
    done = run("sh", "-c", script, cwd=tmp_path, python="", PINAS_THREADS="1", PATH=path)
    assert (done.returncode, done.stdout) == ((0, "python3\n") if paddle else (2, ""))
    assert ("error: there is no .venv, and python3 has no Paddle" in done.stderr) != paddle


def test_wrong_flags_are_all_that_is_said():
    """Paddle and PaddleSlim, which are imported before, have nothing to say about threads."""
    done = run("sh", "local_train_pinas2_simple_wholenet_nof.sh", "--imgae_dir", "x", threads="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --imgae_dir; did you mean --image_dir?\n"


def test_warnings_of_users_choice_stay():
    script = f". {SHARED}; launch -c \"import warnings; warnings.warn('look')\""
    assert "UserWarning: look" in run("sh", "-c", script).stderr
    assert run("sh", "-c", script, PYTHONWARNINGS="ignore::UserWarning").stderr == ""


def test_programs_of_nested_launchers_compute_with_the_first_ones_threads():
    """As in run_demo.sh: nproc follows OMP_NUM_THREADS, which is 1 for the second."""
    program = (
        "import ctypes, paddle\n"
        "from pathlib import Path\n"
        "from hnas.programs.runtime import Options, start\n"
        "from hnas.base.device import cpu_threads\n"
        "start(Options(device='cpu'), writes=False)\n"
        "libraries = Path(paddle.__file__).parent / 'libs'\n"
        "openmp = ctypes.CDLL(str(libraries / 'libiomp5.so')).omp_get_max_threads()\n"
        "print(openmp, cpu_threads())"
    )
    inner = f'. {SHARED}; launch -c "$0"'
    outer = f'. {SHARED}; echo "$PINAS_THREADS"; sh -c "$1" "$0"'
    done = run("sh", "-c", outer, program, inner, OMP_NUM_THREADS="3")
    assert done.stdout == "3\n3 3\n", done.stderr


def program(path, line):
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def launch(folder, line, **changes):
    """Stage 3 with the variables of a line, where % is a space; nvidia-smi sees three cards.

    A line may begin with another launcher's name."""
    script, line = line.split(" ", 1) if line.startswith("local_") else ("local_eval.sh", line)
    program(folder / "nvidia-smi", "printf 'GPU 0: A\\n  MIG 1g.10gb\\nGPU 1: A\\nGPU 2: A\\n'")
    given = dict(setting.replace("%", " ").split("=", 1) for setting in line.split())
    usual = {"CUDA_VISIBLE_DEVICES": None, "PATH": f"{folder}:{os.environ['PATH']}"}
    return run("sh", script, **{**usual, **changes, **given})


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
def test_cards_are_counted_among_the_visible_and_mean_a_gpu(line, visible, device, tmp_path):
    program(tmp_path / "python", 'echo "$CUDA_VISIBLE_DEVICES" "$@"')
    home = {"save_dir": "~/out", "HOME": str(tmp_path)}
    done = launch(tmp_path, line, python=f"{tmp_path}/python", **home)
    assert re.fullmatch(rf"{visible} .* --device {device}\n", done.stdout), done.stderr
    assert (tmp_path / "out/log").is_dir() == ("," in visible)


# --- what they refuse

NAME = "n" * 300
HOSTILE_VARIABLES = [
    ("gpus=,", "gpus=, is not a list of numbers as 0,1,2,3"),
    ("gpus=00", "gpus=00 is not a list"),
    ("gpus=0,0", "gpus=0,0 names a GPU twice"),
    ("gpus=3", "gpus=3, but nvidia-smi finds 3 cards, counted from 0"),
    ("gpus=2 CUDA_VISIBLE_DEVICES=0,1", "gpus=2, but CUDA_VISIBLE_DEVICES=0,1 leaves 2 cards, "),
    ("gpus=0 CUDA_VISIBLE_DEVICES=", "gpus=0, but CUDA_VISIBLE_DEVICES= leaves 0 cards"),
    ("processes=0", "processes=0 is too small; the least is 1"),
    ("processes=08", "processes=08 is not a whole number from 1 to 9999"),
    ("threads=$(touch%/tmp/x)", "threads=$(touch /tmp/x) is not a whole number"),
    ("nnodes=2 master=host node_rank=0", "master=host is not HOST:PORT"),
    ("nnodes=2 master=host:1 node_rank=2", "node_rank=2 is not below nnodes=2"),
    ("python=/nope", "python=/nope cannot be run"),
    ("PADDLE_TRAINERS_NUM=", "PADDLE_TRAINERS_NUM= is left in the environment; unset it"),
    ("PADDLE_TRAINER_ID=x", "PADDLE_TRAINER_ID=x is left in the environment; unset it"),
    ("PADDLE_NNODES=2 processes=2", "PADDLE_NNODES=2 is left in the environment; unset it"),
    ("save_dir=None processes=2", "save_dir=None: results need a folder"),
    (f"save_dir={NAME} processes=2", f"cannot make the folder {NAME}/log; choose another"),
    ("max_epochs=3", "max_epochs is no variable of the launchers; did you mean max_epoch? If not,"),
    ("imagedir=x", "imagedir is no variable of the launchers; did you mean image_dir?"),
    ("bacth_size=8", "bacth_size is no variable of the launchers; did you mean batch_size?"),
    ("local_own.sh max_epoch=3", "max_epoch is not for local_own.sh: each step has its own, as "),
    ("local_own.sh backbone=resnet50", "backbone=resnet50 is neither resnet48 nor resnet48_mini"),
    ("local_own.sh nnodes=2", "nnodes=2: local_own.sh is for one machine"),
    ("local_own.sh save_dir=None", "save_dir=None: results need a folder"),
    ("local_own.sh images_part=1/2", "images_part is not for local_own.sh: give it to a launcher"),
    ("local_own.sh codes=2", "codes=2 is not a whole number of at least 3"),
    ("local_own.sh codes=all", "codes=all is not a whole number of at least 3"),
    ("local_own.sh modelarch_file=docs", "cannot read modelarch_file=docs"),  # a folder
    ("local_own.sh save_dir=/n batch_size=48", "queue_size=512 is no multiple of batch_size=48"),
    ("local_own.sh save_dir=/n processes=3", "queue_size=512 is no multiple of batch_size=32"),
]


@pytest.mark.parametrize(("line", "words"), HOSTILE_VARIABLES)
def test_a_hostile_variable_is_one_line(line, words, tmp_path):
    runs = [launch(tmp_path, line, python="false")]
    if line.startswith("PADDLE_TRAINER"):
        runs.append(run(sys.executable, "train_supernet.py", **dict([line.split("=")])))
    for done in runs:
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("image_dir=x imagedir=y", "imagedir is no variable of the launchers; did you mean image_"),
        ("gpu=0", "gpu is no variable of the launchers; did you mean gpus?"),
        ("verify_images=True", "verify_images is a flag, not a variable; give --verify_images be"),
        ("http_proxy=x format=y stage2_lr=1 IMAGE_DIRS=z PINAS_THREADS=1", ""),
        ("max_epochs=3 PINAS_THREADS=1", ""),  # another launcher looked before
    ],
)
def test_what_may_be_meant_for_another_program_is_told_only(line, told, tmp_path):
    done = launch(tmp_path, line, python="true")
    assert done.returncode == 0 and done.stderr.count("\n") == bool(told)
    assert done.stderr.startswith(told and f"warning: {told}")


# --- local_own.sh

STEPS = ["pretrain", "stage1", "stage2", "stage3"]
# Notes what it is called with, and leaves the files that the next step asks for.
TOY_STAGE = r"""echo "${PINAS_STEP-}" "$@" >>"$calls"
case "$*" in
    *"$fails"*) exit 2 ;;
    *draw_arch*) for last; do :; done; echo "$@" >"$last" ;;
    *\ run\ *) : >"$save_dir/0.pdstates"
        for weights in "$save_dir/0" "$save_dir/final" "$save_dir/../${save_dir##*/}ed"; do
            echo "$@" | cksum >"$weights.pdparams.sha256"
        done ;;
esac"""


@pytest.fixture
def own(tmp_path):
    """Run local_own.sh with a toy instead of Python; gives how it ended, and the toy's calls."""
    program(tmp_path / "python", TOY_STAGE)
    calls, usual = tmp_path / "calls", {"fails": "none", "save_dir": str(tmp_path / "a b")}
    usual |= {"python": f"{tmp_path}/python", "calls": str(calls)}

    def act(*flags, **changes):
        calls.write_text("")
        done = run("sh", "local_own.sh", *flags, **{**usual, **changes})
        return done, calls.read_text().splitlines()

    return act


def test_one_block_of_settings_reaches_every_step(own):
    block = {"image_dir": "I", "image_size": "64", "batch_size": "8", "bad_images": "skip"}
    done, calls = own(**block, device="cpu", amp="O1", seed="3", stage2_clip_norm="7", codes="9")
    stages = [call for call in calls if " run " in call]
    assert (done.returncode, done.stderr, len(stages)) == (0, "", 4)
    assert done.stdout.splitlines() == [f"== {name}" for name in STEPS]
    for step, call in zip(STEPS, stages, strict=True):
        assert call.startswith(f"{step} ")
        assert all(f" --{flag} {value} " in f"{call} " for flag, value in block.items())
        assert {"--device cpu", "--amp O1", "--seed 3"} <= set(re.findall(r"--\w+ \w+", call))
    assert "--backbone resnet48pinasv2_mini" in stages[1] and "--clip_norm 7 " in stages[2]
    assert "--clip_norm auto " in stages[1] and "/stage2/final.pdparams" in stages[3]
    assert "--number 9 --seed 3" in calls[3] and "rank_report" in calls[5]
    done, calls = own("--tf32", "off")
    assert (done.returncode, calls) == (2, [])
    assert done.stderr == "error: local_own.sh takes variables, no flags as --tf32; see its top\n"


def test_what_is_finished_is_not_done_again_and_the_rest_goes_on(own, tmp_path):
    def stages(**changes):
        done, calls = own(**{"stage2_lr": "0.1", **changes})
        return done, [call for call in calls if " run " in call]

    done, calls = stages(fails="_stage2_simple", stage2_lr="0.5")
    assert (done.returncode, len(calls)) == (2, 3)
    # It had saved nothing: any settings will do. Where and how it is computed is of no matter.
    done, calls = stages(num_workers="0", device="cpu", accumulate="2")
    assert (done.returncode, len(calls)) == (0, 2)
    assert re.search("_stage2_simple.py .* --lr 0.1 .* --resume None ", calls[0])
    done, calls = stages()
    assert calls == [] and done.stdout.count("finished before") == 4
    changes = zip(STEPS, ["image_dir=x", "temperature=1", "stage2_lr=2", "codes=8"], strict=True)
    for name, line in changes:
        done, calls = stages(**dict([line.split("=")]))
        assert (done.returncode, calls) == (2, [])
        told = f"error: {tmp_path}/a b/{name} is of other settings or files ("
        assert done.stderr.startswith(told) and done.stderr.count("\n") == 1
    (tmp_path / "a b/stage1/finished.txt").rename(tmp_path / "a b/stage1/begun.txt")
    assert "now lr=0.3" in stages(stage1_lr="0.3")[0].stderr
    # Made anew it has other weights, which stage 2 was not made of.
    done, _ = stages(stage1_lr="0.3", resume="None")
    assert "/stage2 is of other settings or files (ckpt_" in done.stderr


@pytest.mark.slow
def test_local_own_goes_on_after_a_kill(tmp_path):
    write_inputs(tmp_path, 4)
    settings = "codes=5 batch_size=8 queue_size=16 pretrain_epochs=1 pretrain_warmup=0 device=cpu"
    settings += f" stage1_epochs=1 stage1_warmup=0 num_workers=0 image_dir={tmp_path}/images"
    settings += f" save_dir={tmp_path}/own python={sys.executable}"
    given = dict(setting.split("=") for setting in settings.split())
    env = {**os.environ, **given}
    process = subprocess.Popen(["sh", "local_own.sh"], cwd=ROOT, env=env, start_new_session=True)
    while not (tmp_path / "own/stage2/0.pdstates.sha256").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = run("sh", "local_own.sh", **given)
    steps = [f"{name}: finished before, in {tmp_path}/own/{name}" for name in STEPS[:2]]
    assert done.returncode == 0, done.stderr
    assert re.findall("^== (.*)$", done.stdout, re.M) == [*steps, "stage2", "stage3"]
    assert f"resumed from {tmp_path}/own/stage2/" in done.stderr and "hnas.tools.exp" in done.stdout


# --- setup_venv.sh, where pip and Paddle are toys

CPU, GPU = "paddlepaddle", "paddlepaddle-gpu"
TOY = """has=$(dirname "$0")/has  # packages; of the last one all files are there
for last; do :; done
case "$*" in
    "-m venv "*) mkdir -p "$last/bin" && cp "$0" "$last/bin/python" && : >"$last/bin/has" ;;
    *metadata*) sort "$has" | xargs ;;
    *uninstall*) : >"$has" ;;
    *install*) echo progress; grep -qxf "$has" "$last" || grep ^paddle "$last" >>"$has" ;;
    *compiled*) tail -n 1 "$has" | sed 's/.*gpu/gpu 12.6/; s/^paddle.*/cpu/; s/^/built for /' ;;
esac"""


@pytest.fixture
def set_up(tmp_path):
    """Set up an environment, as for a driver with a CUDA or for none; what is said, and there."""
    (tmp_path / "requirements-cpu.txt").write_text(f"{CPU}\n")
    (tmp_path / "requirements.txt").write_text(f"--extra-index-url https://x/cu126/\n{GPU}\n")
    program(tmp_path / "python", TOY)

    def act(cuda="", script='sh "$0"', **changes):
        program(tmp_path / "nvidia-smi", f"echo 'CUDA Version: {cuda} |'" if cuda else "exit 9")
        paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": f"{tmp_path}/python"}
        command = ("sh", "-c", script, ROOT / "hnas/tools/setup_venv.sh")
        done, has = run(*command, cwd=tmp_path, **paths, **changes), tmp_path / ".venv/bin/has"
        return done.stdout, has.read_text().split() if has.exists() else [], done.stderr

    return act


def test_each_kind_of_machine_has_its_environment(set_up):
    steps = [("13.0", "auto", GPU), ("", "auto", CPU), ("12.4", "auto", GPU), ("12.6", "cpu", CPU)]
    for number, (cuda, device, package) in enumerate(steps):
        said, has, errors = set_up(cuda, device=device)
        assert (has, errors, "progress" in said) == ([package], "", number < 2)


def test_a_driver_that_is_too_old_is_told_before_anything_is_loaded(set_up):
    why = "error: requirements.txt has Paddle for CUDA 12.6, and this machine's driver has"
    advice = "write cu118 for cu126 in requirements.txt, and run again"
    for cuda in ("12.3", "11.0"):
        assert set_up(cuda) == ("", [], f"{why} {cuda}; {advice}\n")
    assert set_up("10.2") == ("", [], f"{why} 10.2; update the driver, or set device=cpu\n")


def test_two_set_ups_and_a_killed_one_leave_a_whole_environment(set_up, tmp_path):
    said, has, _ = set_up(script='sh "$0" & sh "$0" & wait')
    assert said.count("setting up") == 1 and has == [CPU]
    # Killed while half a package is there, which pip would take for a whole one.
    venv = tmp_path / ".venv-cpu"
    (venv / "installed-requirements.txt").rename(venv / "set-up-unfinished")
    assert "setting up" in set_up()[0]


def test_an_environment_of_ones_own_stays(set_up, tmp_path):
    set_up()
    link, own = tmp_path / ".venv", tmp_path / "own"
    link.unlink()
    (tmp_path / ".venv-cpu").rename(own)
    link.symlink_to(own)
    assert set_up() == ("", [CPU], "")
    assert "has paddlepaddle, and this machine needs paddlepaddle-gpu" in set_up("12.6")[2]
    # One package over the other, as earlier set-ups left them.
    (own / "bin/has").write_text(f"{GPU}\n{CPU}\n")
    assert set_up("12.6")[1:] == ([GPU], "") and link.readlink() == own
    own.rename(tmp_path / "away")
    assert "which is not there" in set_up()[2]


# --- the page


def test_the_page_is_current():
    """If not: python -m hnas.tools.flag_tables"""
    assert text_of(PAGE) == page(text_of(PAGE))


def test_the_page_tells_every_variable_of_the_processes():
    table, text = text_of(PAGE).split("<!-- processes -->")[1], text_of(SHARED)
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", table, re.M)
    own = {name: default or "none" for name, default in launcher_variables(text).items()}
    assert {name: default.strip("`") for name, default, _ in rows} == own
    for name, _, meaning in rows:
        assert re.search(rf"^{name}=.*# {re.escape(meaning)}$", text, re.M)
