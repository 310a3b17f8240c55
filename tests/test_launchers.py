"""The three launchers, what they set, and the page that lists their variables and all flags."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hnas.tools import flag_tables
from hnas.tools.flag_tables import LAUNCHERS, PAGE, SHARED, launcher_variables, main, page
from hnas.utils.flags import Stage
from hnas.utils.options import Options
from hnas.utils.parsing import parse_options

ROOT = Path(__file__).parents[1]
OWN_WORDS = {
    "pretrain",
    "stage 1",
    "stage 2",
    "stage 3",
    "train_standalone",
    "export",
    "search",
}
# What the launchers give that a program alone does not: the paths of the recipe.
PATHS = {"image_dir", "pretrained", "ckpt_dir", "modelarch_file"}


def environment(**changes):
    """This one without the variables that the launchers set themselves."""
    own = ("PINAS_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    return {**kept, "python": sys.executable, **changes}


def run(*command, **changes):
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=120,
    )


def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


# --- what launchers hand on


@pytest.mark.parametrize("stage", LAUNCHERS, ids=str)
def test_launchers_have_the_programs_defaults(stage):
    text = text_of(LAUNCHERS[stage])
    variables = launcher_variables(text)
    assert len(variables) == len(re.findall(r"^\w+=\$\{", text, re.M)) > 10
    line = []
    for name, (default, _) in variables.items():
        assert f'"${name}"' in text
        line += [f"--{name}", default]
    given, alone = parse_options(stage, line), parse_options(stage, [])
    different = {
        option.name
        for option in dataclasses.fields(Options)
        if getattr(given, option.name) != getattr(alone, option.name)
    }
    # Stage 2's launcher goes on from stage 1.
    assert different == PATHS & set(variables) | ({"use_ckpt"} & set(variables))


@pytest.mark.parametrize("stage", LAUNCHERS, ids=str)
def test_launchers_pass_no_flag_without_effect(stage, caplog):
    passed = re.findall(r'--(\w+) "\$(\w+)"', text_of(LAUNCHERS[stage]))
    assert {name for _, name in passed} == set(launcher_variables(text_of(LAUNCHERS[stage])))
    options = {option.name: option for option in dataclasses.fields(Options)}
    assert [flag for flag, _ in passed if stage not in options[flag].metadata["stages"]] == []


@pytest.mark.parametrize("launcher", LAUNCHERS.values())
def test_wrong_flags_are_all_that_is_said(launcher):
    """Paddle and PaddleSlim, which are imported before, have nothing to say about threads."""
    done = run("sh", launcher, "--imgae_dir", "x", threads="2")
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
        "from hnas.utils.flags import Stage\n"
        "from hnas.utils.parsing import parse_options\n"
        "from hnas.utils.runtime import start\n"
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


# --- the page


def rows_after(head):
    """The cells of the table that follows a heading of the page."""
    part = page().split(f"## {head}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_is_current():
    """If not: python -m hnas.tools.flag_tables"""
    assert text_of(PAGE) == page()
    main(["--check"])


def test_a_page_of_other_flags_is_not_current(tmp_path, monkeypatch, capsys):
    for name in (*LAUNCHERS.values(), SHARED):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text_of(name))
    monkeypatch.setattr(flag_tables, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["--check"])
    assert end.value.code == 1 and not (tmp_path / PAGE).exists()
    main([])
    main(["--check"])
    launcher = tmp_path / LAUNCHERS[Stage.SCORE]
    launcher.write_text(launcher.read_text().replace("chunk_size:-0", "chunk_size:-7"))
    with pytest.raises(SystemExit) as end:
        main(["--check"])
    assert end.value.code == 1 and "python -m hnas.tools.flag_tables" in capsys.readouterr().err


def test_the_page_tells_every_flag_with_its_defaults_and_stages():
    rows = {cells[0].strip("`-"): cells[1:] for cells in rows_after("Flags of the programs")}
    assert list(rows) == [option.name for option in dataclasses.fields(Options)]
    alone = {stage: parse_options(stage, []) for stage in Stage}
    for option in dataclasses.fields(Options):
        meaning, unit, default, used = rows[option.name]
        assert meaning and unit == option.metadata["unit"]
        groups = {
            "all": OWN_WORDS,
            "all but export": OWN_WORDS - {"export"},
            "training": OWN_WORDS - {"stage 3", "export", "search"},
            "none": set(),
        }
        names = groups.get(used, set(used.split(", ")))
        assert names == {str(stage) for stage in option.metadata["stages"]}
        told = {}
        for part in default.split("; "):
            stages, _, value = part.rpartition(": ")
            told |= dict.fromkeys(stages.split(", ") if stages else [""], value.strip("`"))
        for name in names:
            value = getattr(alone[Stage(name)], option.name)
            assert told.get(name, told.get("")) == ("none" if value == "" else str(value))


def test_the_page_tells_every_variable_with_its_default():
    rows = {cells[0].strip("`"): cells[1:] for cells in rows_after("Variables of the launchers")}
    for column, launcher in enumerate(LAUNCHERS.values()):
        variables = launcher_variables(text_of(launcher))
        cells = {name: cells[column].strip("`") for name, cells in rows.items()}
        told = {name: cell for name, cell in cells.items() if cell != "–"}
        expected = {name: variable.default for name, variable in variables.items()}
        assert told == {name: {"None": "none"}.get(d, d) for name, d in expected.items()}
    shared = rows_after("Variables of all launchers: processes")
    assert [row[0].strip("`") for row in shared] == list(launcher_variables(text_of(SHARED)))
    assert all(meaning for *_, meaning in shared)
