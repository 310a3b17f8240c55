"""README, its Chinese twin and docs/ against the scripts, flags, files and figures they name."""

import ast
import dataclasses
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import entry_scripts
import numpy as np
import paddle
import pytest
from entry_scripts import LAUNCHERS, ROOT, text_of
from scipy.stats import kendalltau

from hnas.architecture_file import submission
from hnas.base.files import write_json
from hnas.bench.rank.__main__ import main as ranking_bench
from hnas.bench.rank.__main__ import parse as parse_bench
from hnas.models.pinasv2 import build_network
from hnas.programs.options import Options
from hnas.search_space import RESNET48, RESNET48_MINI
from hnas.weights.loading import write_state

RESULTS = ROOT / "docs/results"
TWINS = ("README.md", "README_ch.md")
DOCS = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*TWINS, "checkpoint_files/README.md", *DOCS]
# Of programs that are not ours.
FOREIGN_FLAGS = {"help", "shm-size", "logdir", "port", "nproc_per_node", "log_dir"}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
each_page = pytest.mark.parametrize("page", PAGES)


def prose_of(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def blocks(page, language):
    """The contents of a page's fenced blocks of a language."""
    return [
        textwrap.dedent(body) for kind, body in FENCE.findall(text_of(page)) if kind == language
    ]


def commands(script):
    """The commands of a shell script, continued lines joined, as lists of words."""
    lines = script.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def table_after(page, marker):
    """The rows of the table that follows an HTML comment, without its head."""
    rows = []
    for line in text_of(page).split(f"<!-- {marker} -->")[1].strip().splitlines():
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def anchors(page):
    """What links may name, as GitHub makes it of headings."""
    heads = re.findall(r"^#+ (.+)$", prose_of(page), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def launcher_variables(name):
    """The names of the variables of a launcher and of what it sources."""
    text = text_of(name)
    sourced = map(text_of, re.findall(r"^\. (\S+)$", text, re.M))
    return set(entry_scripts.launcher_variables("\n".join([text, *sourced])))


def option_names():
    return {option.name for option in dataclasses.fields(Options)}


def program(module):
    """The source that ``python -m module`` runs."""
    found = importlib.util.find_spec(module)
    assert found is not None, f"there is no {module}"
    if found.submodule_search_locations:
        found = importlib.util.find_spec(f"{module}.__main__")
        assert found is not None, f"{module} cannot be run"
    return Path(found.origin).read_text(encoding="utf-8")


def flags_of(source):
    """Flags that a program's parser adds, and the entry scripts' where it takes those."""
    own = set(re.findall(r'add_argument\(\s*"--(\w+)"', source))
    if "add_network_flags(" in source:
        own |= {"backbone", "image_size", "num_classes"}
    return own | option_names() if "parse_options(" in source else own


# --- links


@each_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    assert links or page.startswith("docs/")
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent.joinpath(path) if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), f"{page}: {link}"


def test_every_page_is_reached_from_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)[#)]", text_of("README.md")))
    assert linked == set(DOCS)


# --- commands, flags, variables


@each_page
def test_commands_fit_the_programs_they_call(page):
    for script in blocks(page, "sh"):
        exported = set()
        called = set()
        for words in commands(script):
            line = " ".join(words)
            if words[0] == "export":
                exported |= {re.fullmatch(r"(\w+)=.+", word)[1] for word in words[1:]}
                continue
            given = {word[2:].split("=")[0] for word in words if word.startswith("--")} - {"help"}
            scripts = [word for word in words if word.endswith((".sh", ".py"))]
            written = [name for name in scripts if name.startswith("output/")]  # by a command
            assert all((ROOT / name).is_file() for name in scripts if name not in written), line
            if scripts and scripts[0].startswith("local_"):
                before = words[: words.index("sh")]
                names = {re.fullmatch(r"(\w+)=.+", word)[1] for word in before}
                assert names <= launcher_variables(scripts[0]), line
                assert given <= option_names(), line
                called.add(scripts[0])
            elif scripts and scripts[0].startswith("train_"):
                assert "run" in words and given <= option_names(), line
            elif module := re.search(r"-m (hnas\.[\w.]+)", line):
                assert given <= flags_of(program(module[1])), line
                if module[1] == "hnas.bench.rank":
                    parse_bench(words[words.index(module[1]) + 1 :])
            elif not scripts:
                foreign = ("mkdir", "cp", ".venv/bin/visualdl")
                assert words[0] in foreign or re.search(r"-m (venv|pip)\b", line), line
        assert exported <= set().union(*map(launcher_variables, called)), script


@each_page
def test_what_the_prose_names_exists(page):
    """Modules, flags and launchers' variables."""
    text = text_of(page)
    for module in re.findall(r"\bhnas\.(?:tools|bench)\.[\w.]*\w", text):
        program(module)
    rooms = "tools", "bench", "exporting"
    programs = [path for room in rooms for path in (ROOT / "hnas" / room).rglob("*.py")]
    flags = option_names().union(*(flags_of(path.read_text()) for path in programs))
    text = re.sub(r"unknown flag --\w+", "", text)  # quoted messages
    assert set(re.findall(r"(?<![-\w])--([A-Za-z][\w-]*)", text)) <= flags | FOREIGN_FLAGS
    scripts = [*LAUNCHERS.values(), "local_own.sh"]
    settings = option_names().union(*map(launcher_variables, scripts))
    for code in re.findall(r"`([^`\n]+)`", prose_of(page)):
        if launcher := re.search(r" sh (local_\w+\.sh)", code):
            names = set(re.findall(r"(\w+)=", code.split(" sh ")[0]))
            assert names <= launcher_variables(launcher[1]), code
        elif setting := re.fullmatch(r"([a-z]\w*)=\S+", code):
            assert setting[1] in settings, code


# --- Python


def run_page(page, folder, monkeypatch):
    """Run a page's Python from top to bottom in ``folder``; gives its names."""
    monkeypatch.chdir(folder)
    names = {"__name__": "page"}
    for number, source in enumerate(blocks(page, "python")):
        exec(compile(source, f"{page} block {number}", "exec"), names)
    return names


def test_readmes_snippet_takes_the_best(tmp_path, monkeypatch):
    """Of what the demo leaves, here with random weights."""
    paddle.seed(0)
    demo = tmp_path / "output/demo"
    network = build_network("resnet48_mini", num_classes=10)
    write_state(demo / "stage2/final.pdparams", network.state_dict())
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(0), 6)
    write_json(demo / "stage3/submission.json", submission(archs, [0.5, 0.6, 0.9, 0.7, 0.8, 0.4]))
    names = run_page("README.md", tmp_path, monkeypatch)
    assert names["best"] == [*archs.values()][2]
    assert names["network"](paddle.zeros([1, 3, 32, 32])).shape == [1, 10]
    taken = sum(int(p.size) for p in names["network"].parameters() if not p.stop_gradient)
    assert taken == RESNET48_MINI.params(names["best"], 10)


@pytest.mark.slow
def test_the_python_page_runs(tmp_path, monkeypatch):
    names = run_page("docs/python-api.md", tmp_path, monkeypatch)
    assert names["logits"].shape == [4, 10]
    assert len(names["accuracies"]) == 20 and 0 <= names["top1"] <= 1
    assert np.isfinite(names["loss"]) and -1 <= names["tau"] <= 1


def test_the_page_on_development_shows_a_sampler_that_works(tmp_path, monkeypatch):
    sampler = run_page("docs/development.md", tmp_path, monkeypatch)["DeepSampler"](RESNET48, 0)
    drawn = [arch for step in range(50) for arch in sampler.sample(0, step)]
    assert len(drawn) == 200 and sampler.sample(0, 7) == sampler.sample(0, 7)
    # Uniform depths sum to 15.5 on average, the larger of two such sums to 16.9.
    assert np.mean([sum(arch.depths) for arch in drawn]) > 16.4


# --- the two languages


def test_twins_are_short_and_alike():
    """The same links, sections, commands and figures."""
    english, chinese = map(text_of, TWINS)
    assert len(english.splitlines()) <= 220
    assert "](README_ch.md)" in english[:200] and "](README.md)" in chinese[:200]
    parts = [
        {
            "links": re.findall(r"\]\((?!README)([^)#\s]+)", text_of(page)),
            "sections": re.findall(r"^(#+) ", prose_of(page), re.M),
            "kinds": [kind for kind, _ in FENCE.findall(text_of(page))],
            "commands": list(map(commands, blocks(page, "sh"))),
            "python": [ast.dump(ast.parse(block)) for block in blocks(page, "python")],
            "figures": sorted(re.findall(r"\d[\d,]*\.?\d+", prose_of(page))),
        }
        for page in TWINS
    ]
    assert parts[0] == parts[1] and set(parts[0]["kinds"]) == {"sh", "python"}


# --- figures and tables


def lines_of(name):
    """The JSON objects of a bench's result file."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def test_training_speeds_are_those_of_the_result_files():
    expected = [
        [
            f"{run['backbone']}, {run['image_size']} px, {run['batch_size']}; {run['stage']}",
            f"{run['ours_sample_forwards_per_s']:.1f}",
            f"{run['straightforward_sample_forwards_per_s']:.1f}",
            f"{run['ratio']:.2f} ({run['ratio_of_rounds'][0]:.2f}–{run['ratio_of_rounds'][1]:.2f})",
            f"{run['plain_sample_forwards_per_s']:.1f}",
        ]
        for run in lines_of("speed_training.json")
    ]
    rows = table_after("docs/speed.md", "speed_training table")
    assert sorted(rows) == sorted(expected)


def test_the_trials_of_small_tasks_are_those_of_their_log():
    expected = []
    for trial in lines_of("represent.jsonl"):
        probes = ("2222", "5222", "2522", "2282", "2225")
        acc = [trial["accuracies"].get(depths) for depths in probes]
        row = [trial["trial"], *("–" if own is None else f"{own:.0f}" for own in acc)]
        thirty, again = trial.get("published", {}), "–"
        of = trial.get("of", len(thirty))
        if thirty and "tau_b" in trial:
            archs = json.loads((ROOT / "hnas/imagenet30.json").read_text())
            imagenet = [archs[name]["acc"] for name in thirty]
            trained = np.atleast_2d(np.array([*thirty.values()]).T)
            found = np.mean([kendalltau(own, imagenet).statistic for own in trained])
            assert trial["tau_b"] == pytest.approx(found, abs=1e-3)
            if len(trained) == 2:
                again = f"{kendalltau(*trained).statistic:.2f}"
        row += [f"{trial['tau_b']:.2f} ({of})" if "tau_b" in trial else "–", again]
        expected.append(row)
    assert table_after("docs/ranking-bench.md", "trials") == expected


def test_what_broke_is_counted_from_its_runs():
    counted = {}
    for run in lines_of("breaking.jsonl"):
        key = (run["task"], f"{run['stage1']}, {run['stage2']}", run["warmup"], str(run["lr"]))
        counted.setdefault(key, []).append((run["largest"] or 0, run["pretrained"]))
    expected = []
    for key, runs in ((key, runs) for key, runs in counted.items() if len(runs) >= 4):
        broke = sum(largest < pretrained / 2 for largest, pretrained in runs)
        mean = 100 * np.mean([largest for largest, _ in runs])
        expected.append([*key, f"{broke} of {len(runs)}", f"{mean:.1f} %"])
    assert table_after("docs/ranking-bench.md", "breaking") == expected


def test_what_the_ranking_bench_found_is_what_its_runs_say(tmp_path, monkeypatch):
    """The bench's own commands make the summary anew; figures of the page are of it."""

    def read(folder):
        text = (folder / "summary.json").read_text()
        return json.loads(text, parse_float=lambda own: round(float(own), 9))

    summary, folder = read(RESULTS / "small_digit"), ["--out", str(tmp_path)]
    shutil.copy(RESULTS / "small_digit/runs.jsonl", tmp_path)
    monkeypatch.setattr("hnas.bench.rank.__main__.run_all", lambda *_: None)  # nothing is missing
    for part, found in summary.items():
        methods = [name for name in found if "@" in name]
        asked = ["supernets", "--split", part, "--methods", *methods] if methods else [part]
        ranking_bench([*asked, *folder])
    assert read(tmp_path) == summary
    found, taus = summary["represent"], table_after("docs/ranking-bench.md", "hangs on")
    figures = {name: [f"{own:.2f}" for own in both] for name, both in found["hangs_on"].items()}
    assert [row[1:] for row in (taus[2], taus[0])] == [
        *map(list, zip(*figures.values(), strict=True))
    ]
    bench, accuracy = text_of("docs/ranking-bench.md"), found["accuracy"]
    told = [found[name] for name in ("tau_b", "reliability", "pearson")]
    truth = summary["truth"]["reliability"]
    for one in (*told, truth, truth["ceiling"]):
        value, low, high = (f"{one[end]:.3f}" for end in ("value", "low", "high"))
        assert f"{value}** [{low}, {high}]" in bench
    chosen = summary["selection"]["chosen"].items()
    assert all(f"`{name}` {own['rate']:.2g}" in " ".join(bench.split()) for name, own in chosen)
    assert f"mean {accuracy['mean']:.1f} %, sd {accuracy['sd']:.1f};" in bench
    final = summary["final"]
    lead = [final["comparisons"][f"first_place - {other}"] for other in ("organisers", "fairnas")]
    first = final["first_place@0.02"]["tau_b"]
    for one, page in itertools.product((found["tau_b"], truth, first, *lead), TWINS):
        value, low, high = (f"{one[end]:.2f}" for end in ("value", "low", "high"))
        assert f" {value} [{low}, {high}]" in text_of(page)


def test_what_methods_are_said_to_rank_is_of_the_summary():
    final = json.loads((RESULTS / "small_digit/summary.json").read_text())["final"]
    by_code, compared = final.pop("by_code"), final.pop("comparisons")

    def told(own):
        if own is None or own["value"] is None:
            return "–"
        p = own.get("p_holm", own.get("p"))
        text = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**own)
        return text if p is None else f"{text}, {'<0.001' if p < 1e-3 else f'{p:.3f}'}"

    expected = []
    for name, rate in (key.split("@") for key in final if "@" in key):
        own = final[f"{name}@{rate}"]
        leads = compared.get(f"first_place - {name}"), compared[f"{name} - later_depth"]
        broke = f"{own['broken']['value'] * own['supernets']:.0f} of {own['supernets']}"
        told_of = map(told, (own["tau_b"], *leads))
        expected.append([f"`{name}`", f"{float(rate):.2g}", broke, *told_of])
    expected += [[name, "–", "–", told(own), "–", "–"] for name, own in by_code.items()]
    assert table_after("docs/ranking-bench.md", "found") == expected


def test_widths_and_costs_are_the_search_spaces():
    rows = table_after("docs/codes.md", "channels")
    assert len(rows) == 4
    for stage, row in enumerate(rows):
        widths = [RESNET48.channels(stage, digit) for digit in range(1, 8)]
        assert list(map(int, row[1:])) == widths and row[0].startswith(f"{widths[0]} ")
    largest = RESNET48.largest()
    for figure in (f"{RESNET48.macs(largest):,}", f"{RESNET48.params(largest):,}", largest.code):
        assert figure in text_of("docs/codes.md")


def test_costs_of_the_demo_are_those_of_its_architectures():
    """As ``draw_architectures --number 200`` draws them."""
    extremes = (RESNET48_MINI.largest(), RESNET48_MINI.smallest())
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(0), 200, extremes).values()
    macs = sorted(RESNET48_MINI.macs(arch, 32, 10) for arch in archs)
    for page in TWINS:
        rows = re.findall(r"^\| [^|]+\| ([\d,]+) \| [\d.]+ % \|$", text_of(page), re.M)
        assert rows == [f"{value:,}" for value in (macs[-1], macs[100], macs[0])]
