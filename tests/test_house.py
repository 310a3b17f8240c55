"""The rooms of the package: imports go one way, and the package is what pyproject.toml says."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hnas

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LINTER = Path(sys.executable).with_name("lint-imports")
PACKAGES = {
    "cv2": "opencv-python",
    "PIL": "pillow",
    "paddle": "paddlepaddle",
    "sklearn": "scikit-learn",
}


def lint(folder):
    return subprocess.run(
        [LINTER, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def house(tmp_path):
    """A copy of the package and the contracts."""
    shutil.copytree(ROOT / "hnas", tmp_path / "hnas", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_go_one_way():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("base/files.py", "from hnas.search_space import RATIOS", "Imports go one way"),
        ("models/resnet.py", "import hnas.evaluation.counts", "Imports go one way"),
        (
            "utils/SampleMethod.py",
            "def f():\n    from hnas.tools import plan",
            "Imports go one way",
        ),
        ("tools/plan.py", "from hnas.bench import speed_training", "Imports go one way"),
        ("dataset/loader.py", "import hnas.parallel.rollcall", "Imports go one way"),
        ("tools/plan.py", "import train_supernet", "Nothing imports an entry script"),
        ("ranking/svg.py", "import paddle", "What works on codes alone starts without Paddle"),
    ],
)
def test_a_planted_import_is_found(house, module, line, contract):
    with open(house / "hnas" / module, "a") as file:
        file.write(f"\n{line}\n")
    done = lint(house)
    assert done.returncode == 1
    broken = re.findall(r"^(.+) BROKEN$", done.stdout, re.M)
    assert broken == [contract], done.stdout


def test_a_new_room_must_be_given_its_place(house):
    (house / "hnas/attic").mkdir()
    (house / "hnas/attic/__init__.py").write_text("")
    done = lint(house)
    assert done.returncode == 1 and "attic" in done.stdout


# --- the package


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def test_the_package_needs_what_is_installed_for_the_checkout():
    settings = project()["project"]
    for name, paddle in (
        ("requirements-cpu.txt", "paddlepaddle==3.3.1"),
        ("requirements.txt", "paddlepaddle-gpu==3.3.1"),
    ):
        assert requirements(name) == [paddle, *settings["dependencies"]]
    assert settings["optional-dependencies"]["cpu"] == ["paddlepaddle==3.3.1"]


def test_every_import_of_the_package_is_declared():
    imported = set()
    for path in (ROOT / "hnas").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"hnas"}
    assert {"paddle", "numpy", "matplotlib"} <= foreign
    optional = project()["project"]["optional-dependencies"]["onnx"]
    lines = [*requirements("requirements-cpu.txt"), *optional]
    declared = {re.match(r"[\w-]+", line)[0] for line in lines}
    # VisualDL is asked for only with --visualdl_dir, which says so where it is missing; ONNX comes
    # with paddle2onnx.
    undeclared = {"visualdl", "onnx"}
    assert {PACKAGES.get(name, name) for name in foreign} - undeclared <= declared


def test_the_package_is_hnas_with_its_shell_scripts_and_one_version():
    setuptools = project()["tool"]["setuptools"]
    assert setuptools["packages"]["find"]["include"] == ["hnas", "hnas.*"]
    assert all((path / "__init__.py").is_file() for path in packages(ROOT / "hnas"))
    scripts = {path.parent for path in (ROOT / "hnas").rglob("*.sh")}
    assert scripts == {ROOT / "hnas/tools"} and setuptools["package-data"]["hnas.tools"] == ["*.sh"]
    assert setuptools["dynamic"]["version"] == {"attr": "hnas.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", hnas.__version__)


def packages(root):
    """Folders with modules, which without an ``__init__.py`` would not be installed."""
    return {path.parent for path in root.rglob("*.py")}
