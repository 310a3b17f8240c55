"""The documentation against the scripts, flags and files that it describes."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from hnas.ranking.correlations import CORRELATIONS
from hnas.utils.options import Options

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    1: "local_train_pinas1_wholenet.sh",
    2: "local_train_pinas2_simple_wholenet_nof.sh",
    3: "local_eval.sh",
}
ABSENT = "–"
BOTH = pytest.mark.parametrize("readme", ["README.md", "README_ch.md"])
ALL = pytest.mark.parametrize("readme", ["README.md", "README_ch.md", "checkpoint_files/README.md"])


def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


def launcher_text(name):
    """A launcher with what it sources."""
    text = text_of(name)
    return "\n".join([text, *map(text_of, re.findall(r"^\. (\S+)$", text, re.M))])


def launcher_variables(name):
    """``name=${name:-default}  # comment`` lines as a dict from name to default."""
    return dict(re.findall(r"^(\w+)=\$\{\1:-(.*)\}(?: +#.*)?$", launcher_text(name), re.M))


def table_after(text, marker):
    """The rows of the table that follows an HTML comment, without its head."""
    rows = []
    for line in text.split(f"<!-- {marker} -->")[1].strip().splitlines():
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def code_blocks(text):
    """The contents of the fenced blocks."""
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)


def commands(text):
    """Command lines of the shell blocks, continued lines joined, as lists of words."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def option_names():
    return {option.name for option in dataclasses.fields(Options)}


def tool_flags(tool):
    """Flags that a tool's parser adds, or the entry scripts' where it takes those."""
    source = text_of(f"hnas/tools/{tool}.py")
    own = set(re.findall(r'add_argument\(\s*"--(\w+)"', source))
    return own | option_names() if "parse_options(" in source else own


# --- launchers


def test_launchers_are_read_whole():
    for name in LAUNCHERS.values():
        lines = re.findall(r"^\w+=\$\{.*$", launcher_text(name), re.M)
        assert len(launcher_variables(name)) == len(lines) > 10


@BOTH
def test_table_lists_every_launcher_variable_with_its_default(readme):
    rows = table_after(text_of(readme), "launcher variables")
    documented = {row[0].strip("`"): row[1:4] for row in rows}
    assert len(documented) == len(rows)
    variables = {stage: launcher_variables(name) for stage, name in LAUNCHERS.items()}
    assert set(documented) == set().union(*variables.values())
    for name, cells in documented.items():
        for stage, cell in zip(LAUNCHERS, cells, strict=True):
            default = variables[stage].get(name)
            where = f"{readme}: {name}, stage {stage}"
            if default is None:
                assert cell == ABSENT, where
            elif default == "":
                assert cell in ("none", "无"), where
            elif default.startswith("$("):
                # Told in words; the programs it names must be those of the script.
                named = re.findall(r"`([^`]+)`", cell)
                assert named and all(word in default for word in named), where
            else:
                assert cell == f"`{default}`", where


@BOTH
def test_table_lists_every_flag_that_a_launcher_has_no_variable_for(readme):
    rows = table_after(text_of(readme), "flags without a variable")
    documented = {row[0].strip("`").removeprefix("--"): row[1:3] for row in rows}
    expected = {}
    for stage, launcher in LAUNCHERS.items():
        passed = set(re.findall(r"--(\w+)", text_of(launcher)))
        # Stage 1's launcher gives save_dir by its other name.
        passed |= {"save_dir"} if "save_dir_new" in passed else set()
        for option in dataclasses.fields(Options):
            if str(stage) in option.metadata["stages"] and option.name not in passed:
                expected.setdefault(option.name, []).append(str(stage))
    assert {name: stages.split(", ") for name, (stages, _) in documented.items()} == expected
    defaults = {option.name: option.default for option in dataclasses.fields(Options)}
    for name, (_, cell) in documented.items():
        if defaults[name] == "":
            assert cell in ("none", "无")
        else:
            assert cell == f"`{defaults[name]}`"


# --- flags and commands


@ALL
def test_every_flag_exists(readme):
    tools = (ROOT / "hnas/tools").glob("*.py")
    known = option_names().union({"help"}, *(tool_flags(tool.stem) for tool in tools))
    mentioned = set(re.findall(r"(?<![-\w])--([A-Za-z]\w*)", text_of(readme)))
    assert mentioned and mentioned <= known


@ALL
def test_commands_fit_the_programs_they_call(readme):
    called = 0
    for words in commands(text_of(readme)):
        line = " ".join(words)
        given = {word[2:].split("=")[0] for word in words if word.startswith("--")} - {"help"}
        scripts = [word for word in words if word.endswith((".sh", ".py"))]
        assert all((ROOT / script).is_file() for script in scripts), line
        if scripts and scripts[0] in LAUNCHERS.values():
            before = words[: words.index("sh")]
            names = {re.fullmatch(r"(\w+)=.+", word)[1] for word in before}
            assert names <= set(launcher_variables(scripts[0])), line
            assert given <= option_names(), line
        elif scripts and scripts[0].startswith("train_"):
            assert "run" in words and given <= option_names(), line
        elif tool := re.search(r"-m hnas\.tools\.(\w+)", line):
            assert given <= tool_flags(tool[1]), line
        elif not scripts:
            assert re.search(r"-m (venv|pip)\b", line), line
        called += 1
    assert called


@BOTH
def test_variables_before_an_inline_launcher_exist(readme):
    inline = re.findall(r"`([^`\n]*=[^`\n]* sh (local_\w+\.sh)[^`\n]*)`", text_of(readme))
    assert len(inline) > 1
    for line, launcher in inline:
        names = set(re.findall(r"(\w+)=", line.split(" sh ")[0]))
        assert names <= set(launcher_variables(launcher)), line


@BOTH
def test_fields_of_the_benchmark_exist(readme):
    rows = table_after(text_of(readme), "bench_eval fields")
    fields = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    known = set(re.findall(r'^ +"(\w+)": ', text_of("hnas/bench/speed_scoring.py"), re.M))
    assert fields and set(fields) <= known


@BOTH
def test_fields_of_the_ranking_report_are_all_told(readme):
    rows = table_after(text_of(readme), "rank_report fields")
    fields = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    source = text_of("hnas/tools/rank_report.py").split("def summary(")[1]
    printed = set(re.findall(r'^ +"(\w+)": ', source, re.M)) | set(CORRELATIONS)
    assert fields == printed - {"pred", "gt", "report"}


# --- files


@BOTH
def test_paths_of_the_layout_exist(readme):
    block = code_blocks(text_of(readme).split("<!-- layout -->")[1])[0]
    folders, paths = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        paths.append("".join([*folders, name]))
        if name.endswith("/"):
            folders.append(name)
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


@BOTH
def test_layout_names_every_file(readme):
    block = code_blocks(text_of(readme).split("<!-- layout -->")[1])[0]
    named = {line.split()[0] for line in block.splitlines()}
    files = {path.name for path in (ROOT / "hnas").rglob("*.py")} - {"__init__.py"}
    files |= {path.name for path in ROOT.glob("*") if path.suffix in (".py", ".sh")}
    assert files - named == set()


@ALL
def test_links_to_files_lead_somewhere(readme):
    text = text_of(readme)
    links = re.findall(r"\]\(([^)]+)\)", text)
    heads = {
        re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
        for head in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for link in links:
        if link.startswith("#"):
            assert link[1:] in heads, link
        elif not link.startswith("https://"):
            assert (ROOT / readme).parent.joinpath(link).exists(), link


# --- the two languages, and the two lists of packages


def test_both_languages_link_to_each_other_and_give_the_same_commands():
    english, chinese = text_of("README.md"), text_of("README_ch.md")
    assert "](README_ch.md)" in english[:200] and "](README.md)" in chinese[:200]
    assert commands(english) == commands(chinese)
    assert english.count("\n## ") == chinese.count("\n## ")
    for marker in (
        "launcher variables",
        "flags without a variable",
        "bench_eval fields",
        "rank_report fields",
    ):
        names = [[row[0] for row in table_after(text, marker)] for text in (english, chinese)]
        assert names[0] == names[1]


def test_both_languages_give_the_same_figures():
    figures = [
        sorted(re.findall(r"\d[\d,]*\.?\d+", text_of(name)))
        for name in ("README.md", "README_ch.md")
    ]
    assert figures[0] == figures[1]


def test_requirements_differ_in_paddle_only():
    def packages(name):
        lines = (line.split("#")[0].strip() for line in text_of(name).splitlines())
        return [line for line in lines if line]

    gpu, cpu = packages("requirements.txt"), packages("requirements-cpu.txt")
    index = [line for line in gpu if line.startswith("-")]
    paddle = [line for line in gpu if line.startswith("paddlepaddle")]
    assert len(index) == 1 and "https://www.paddlepaddle.org.cn/packages/stable/" in index[0]
    assert len(paddle) == 1 and paddle[0].startswith("paddlepaddle-gpu")
    assert [line for line in cpu if line.startswith("paddlepaddle")] == ["paddlepaddle==3.3.1"]
    assert [line for line in gpu if line not in index + paddle] == cpu[1:]


def test_licence_is_complete():
    text = text_of("LICENSE")
    assert "Apache License\n" in text and "Version 2.0, January 2004" in text
    for number in range(1, 10):
        assert re.search(rf"^   {number}\. ", text, re.M)
    assert "END OF TERMS AND CONDITIONS" in text and "APPENDIX: How to apply" in text
