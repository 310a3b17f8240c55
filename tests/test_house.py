"""The rooms of the package: imports go one way, and the package is what pyproject.toml says."""

import ast
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hnas
from hnas.architecture_file import PUBLISHED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LINTER = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
PACKAGES = {"PIL": "pillow", "paddle": "paddlepaddle", "sklearn": "scikit-learn"}


def lint(folder):
    return subprocess.run(LINTER, cwd=folder, capture_output=True, text=True, timeout=60)


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


PLANTED = {  # by contract: where, and what
    "Imports go one way": [
        ("base.files", "from hnas.search_space import RATIOS", "search_space"),
        ("models.resnet", "import hnas.evaluation.engine", "evaluation.engine"),
        ("utils.SampleMethod", "def f():\n    from hnas.tools import plan", "tools.plan"),
        ("tools.plan", "from hnas.bench import rank", "bench.rank"),
        ("dataset.loader", "import hnas.parallel.rollcall", "parallel.rollcall"),
    ],
    "Nothing imports an entry script": [("tools.plan", "import train_supernet", "")],
    "What works on codes alone starts without Paddle": [("ranking.figures", "import paddle", "")],
}


def test_planted_imports_are_found(house):
    for module, line, _ in itertools.chain(*PLANTED.values()):
        with open(house / "hnas" / f"{module.replace('.', '/')}.py", "a") as file:
            file.write(f"\n{line}\n")
    done = lint(house)
    assert done.returncode == 1
    assert re.findall(r"^(.+) BROKEN$", done.stdout, re.M) == list(PLANTED), done.stdout
    for module, _, imported in PLANTED["Imports go one way"]:
        assert f"hnas.{module} -> hnas.{imported} " in done.stdout


def test_a_new_room_must_be_given_its_place(house):
    (house / "hnas/attic").mkdir()
    (house / "hnas/attic/__init__.py").write_text("")
    done = lint(house)
    assert done.returncode == 1 and "attic" in done.stdout


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
    [index] = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("-")]
    assert "https://www.paddlepaddle.org.cn/packages/stable/" in index
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
    assert PUBLISHED.parent == ROOT / "hnas" and setuptools["package-data"]["hnas"] == ["*.json"]
    assert setuptools["dynamic"]["version"] == {"attr": "hnas.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", hnas.__version__)


def test_no_two_modules_have_one_name():
    names = [path.name for path in (ROOT / "hnas").rglob("*.py") if path.name[:2] != "__"]
    assert len(names) == len(set(names))


def packages(root):
    """Folders with modules, which without an ``__init__.py`` would not be installed."""
    return {path.parent for path in root.rglob("*.py")}


def test_the_page_names_files_and_what_is_in_them():
    """docs/development.md: where is what, how a score comes about, how a step runs."""
    page = (ROOT / "docs/development.md").read_text()
    told = page[page.index("## Where is what") : page.index("## Layout")]
    for row in told.splitlines()[4:-1]:
        files, names = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[2:4])
        text = "".join((ROOT / file).read_text() for file in files)
        assert files and names
        for name in re.findall(r"\w+", " ".join(names)):
            assert re.search(rf"^ *(def|class) {name}\b", text, re.M), name
    for path in re.findall(r"`(?:hnas/)?(\w+/\w+\.py)`", page):
        assert (ROOT / "hnas" / path).is_file() or (ROOT / path).is_file(), path
