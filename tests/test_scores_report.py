"""python -m hnas.tools.rank_report without a truth: figures, files, and the pages in a browser."""

import html
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.ranking.figures import bin_edges, option_panels
from hnas.ranking.scores import budgets
from hnas.ranking.svg import Axis, Panel, round_ticks
from hnas.search_space import RESNET48_MINI
from hnas.tools.rank_report import main

NUMBER, IMAGES = 80, 355
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def archs():
    return RESNET48_MINI.sample_distinct(np.random.default_rng(0), NUMBER)


@pytest.fixture(scope="module")
def hits(archs):
    """That grow with the MACs."""
    rng = np.random.default_rng(1)
    macs = np.array([RESNET48_MINI.macs(arch, 32, 10) for arch in archs.values()])
    return rng.binomial(IMAGES, 0.85 + 0.1 * macs / macs.max())


@pytest.fixture
def stage3(tmp_path, archs, hits):
    """What stage 3 leaves."""
    folder = tmp_path / "stage3"
    folder.mkdir()
    rows = zip(archs.items(), (hits / IMAGES).tolist(), errors_of(hits).tolist(), strict=True)
    entries = {name: {"acc": acc, "se": se, "arch": arch.code} for (name, arch), acc, se in rows}
    write_json(folder / "estimates.json", {"images": IMAGES, "architectures": entries})
    accuracies = {n: {"acc": row["acc"], "arch": row["arch"]} for n, row in entries.items()}
    write_json(folder / "submission.json", accuracies)
    return folder


def errors_of(hits):
    """Standard errors of accuracies by Laplace's estimate."""
    rate = (hits + 1) / (IMAGES + 2)
    return np.sqrt(rate * (1 - rate) / IMAGES)


@pytest.fixture
def report(tmp_path, capsys):
    """Runs the tool on a file of scores; gives the printed object and ``report.json``."""

    def run(pred, *flags):
        mini = ("--backbone", "resnet48_mini", "--image_size", 32, "--num_classes", 10)
        arguments = ("--pred", pred, "--out", tmp_path / "out", *mini, *flags)
        main([str(argument) for argument in arguments])
        printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        content = (tmp_path / "out/report.json").read_text()
        return printed, json.loads(content, parse_constant=pytest.fail)

    return run


# --- figures


def test_figures_are_those_of_numpy(report, stage3, archs, hits):
    printed, found = report(stage3 / "submission.json")
    accuracy = hits / IMAGES * 100
    macs = np.array([RESNET48_MINI.macs(arch, 32, 10) for arch in archs.values()])
    assert printed["architectures"] == NUMBER and printed["images"] == IMAGES
    assert printed["accuracy"] == {
        "lowest": accuracy.min(),
        "median": pytest.approx(np.median(accuracy)),
        "highest": accuracy.max(),
        "standard_deviation": pytest.approx(accuracy.std(ddof=1)),
    }
    error = pytest.approx(100 * np.median(errors_of(hits)))
    assert printed["standard_error"] == error
    assert printed["tau_of_macs"] == pytest.approx(stats.kendalltau(macs, accuracy).statistic)
    best = np.sort(accuracy)[::-1]
    assert [row["accuracy"] for row in found["best"]] == best[:10].tolist()
    for budget in found["budgets"]:
        within = macs <= budget["macs"]
        assert budget["best"]["accuracy"] == accuracy[within].max()
        assert budget["best"]["macs"] <= budget["macs"]
    assert found["budgets"][-1]["macs"] >= macs.max()
    rows = found["by_option"]["depth 3"]
    depths = np.array([arch.depths[2] for arch in archs.values()])
    means = [accuracy[depths == depth].mean() for depth in range(2, 9)]
    assert [row["mean"] for row in rows] == pytest.approx(means)


def test_budgets_are_round_and_reach_the_dearest():
    assert budgets(np.array([2_476_272, 8_190_208])) == pytest.approx(
        [3.2e6, 4.0e6, 4.7e6, 5.4e6, 6.1e6, 6.8e6, 7.5e6, 8.2e6]
    )
    assert budgets(np.array([5_000_000])) == [5_000_000]


# --- what is beside the scores


def test_scores_without_estimates(report, stage3):
    (stage3 / "estimates.json").unlink()
    printed, found = report(stage3 / "submission.json")
    assert printed["images"] is printed["standard_error"] is None
    assert "there is no estimates.json" in printed["notes"][-1]
    assert all(row["standard_error"] is None for row in found["best"])


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(images="many"),
        lambda content: content["architectures"].pop("arch3"),
        lambda content: content["architectures"]["arch3"].update(acc=0.5),
        lambda content: content["architectures"]["arch3"].update(se=None),
        lambda content: content.update(architectures=[]),
    ],
)
def test_estimates_of_other_scores_are_said_to_be(report, stage3, change):
    content = json.loads((stage3 / "estimates.json").read_text())
    change(content)
    (stage3 / "estimates.json").write_text(json.dumps(content))
    printed, _ = report(stage3 / "submission.json")
    assert printed["standard_error"] is None and "of other scores" in printed["notes"][-1]


def test_the_rankings_agreement_is_shown_where_stage_three_tells_it(report, stage3, tmp_path):
    content = json.loads((stage3 / "estimates.json").read_text())
    content["agreement"] = {"images": 5000, "tau": 0.875, "low": 0.8125, "high": 0.9375}
    (stage3 / "estimates.json").write_text(json.dumps(content))
    printed, _ = report(stage3 / "submission.json")
    assert printed["agreement"] == content["agreement"]
    text = (tmp_path / "out/report.html").read_text()
    assert "with that by all 5,000 at a tau-b of 0.875 (0.812 to 0.938)" in text
    # Of all images, or not defined: nothing is said of it.
    for more in ({"images": IMAGES}, {"tau": None}):
        content["agreement"] |= more
        write_json(stage3 / "estimates.json", content)
        printed, _ = report(stage3 / "submission.json")
        assert printed["standard_error"] is not None
        assert "expected to agree" not in (tmp_path / "out/report.html").read_text()
    assert printed["agreement"] is None


# --- what is refused, and what is odd


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        ("macs", "--pred macs needs --gt"),
        ("none.json", "none.json: No such file"),
        ("two.json", "has 2 architectures; a report needs at least 3"),
        ("wild.json", "accuracy 101"),
    ],
)
def test_what_is_refused(report, archs, tmp_path, monkeypatch, pred, message):
    monkeypatch.chdir(tmp_path)
    codes = [arch.code for arch in archs.values()]
    for name, values in (("two.json", [0.5, 0.6]), ("wild.json", [5, 50, 101])):
        rows = {str(i): {"arch": codes[i], "acc": acc} for i, acc in enumerate(values)}
        (tmp_path / name).write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message) as error:
        report(pred)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.5, 0.6, 0.7], [0, 0, 1]])
def test_few_or_equal_scores(report, archs, tmp_path, values):
    codes = [arch.code for arch in archs.values()]
    rows = {f"<b>{i}": {"arch": codes[i], "acc": acc} for i, acc in enumerate(values)}
    (tmp_path / "few.json").write_text(json.dumps(rows))
    printed, _ = report(tmp_path / "few.json")
    text = (tmp_path / "out/report.html").read_text()
    assert not re.search(r"\b(nan|inf|None)\b", text) and "<b>" not in text
    assert ("they rank nothing" in " ".join(printed["notes"])) == (len(set(values)) == 1)


def test_a_page_of_45_000_is_small(archs):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 45_000))
    panel = Panel(Axis.around(x, "x"), Axis.around(y, "y"))
    panel.points(x, y)
    assert len(panel.svg()) < 40_000


# --- drawing


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (-1.04, 1.04, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0.9412, 0.9431, ["0.9415", "0.9420", "0.9425", "0.9430"]),
        (1200, 5300, ["2,000", "3,000", "4,000", "5,000"]),
        (-3e-17, 3e-17, None),
        (1e-12, 2e-12, None),
    ],
)
def test_ticks_are_round_and_short(low, high, labels):
    ticks = round_ticks(low, high)
    if labels is not None:
        assert [label for _, label in ticks] == labels
    assert 2 <= len(ticks) <= 6 and all(low - 1e-9 <= value <= high + 1e-9 for value, _ in ticks)


@pytest.mark.parametrize("values", [[0.0], [0, 1e-17, -1e-17], [94.3, 94.3], [1e-300, 1e-300]])
def test_equal_values_have_ticks_that_can_be_read(values):
    """Of a few architectures the labels once were 0.000000000000000000."""
    axis = Axis.around(np.array(values), "rank error, %")
    assert axis.low < min(values) and axis.high > max(values)
    labels = [label for _, label in axis.ticks]
    assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 9


def test_a_point_is_drawn_where_it_belongs():
    panel = Panel(Axis(0, 10, [], "x"), Axis(0, 1, [], "y"), size=(300, 250))
    panel.points([2.5], [0.5])
    (path,) = [
        p
        for p in ElementTree.fromstring(panel.svg(alone=True)).iter(f"{SVG}path")
        if p.get("class") == "dots"
    ]
    # Without labels the axes are 28 px from the left, 10 from the right and top, 38 from below.
    assert path.get("d") == f"M{28 + 0.25 * 262:g} {250 - 38 - 0.5 * 202:g}h0"


def test_one_architecture_has_no_error_bar():
    rows = [
        {"option": 2.0, "mean": 1.0, "standard_error": None},
        {"option": 3.0, "mean": 2.0, "standard_error": 0.5},
    ]
    (panel,) = option_panels({"depth 1": rows}, "score")
    kinds = [
        p.get("class") for p in ElementTree.fromstring(panel.svg(alone=True)).iter(f"{SVG}path")
    ]
    assert kinds.count("ring") == 1 and kinds.count("dots") == 1
    assert kinds.count("line") == 2  # the line through both, one bar


@pytest.mark.parametrize("number", [3, 200, 45_000])
def test_bins_of_accuracies_hold_equally_many_values(number):
    values = np.random.default_rng(4).binomial(IMAGES, 0.9, number) / IMAGES * 100
    edges = bin_edges(values)
    assert edges[0] <= values.min() and values.max() <= edges[-1] and len(edges) < 70
    counts, _ = np.histogram(values, edges)
    assert counts.sum() == number
    steps = np.arange(IMAGES + 1) / IMAGES * 100
    held, _ = np.histogram(steps, edges)
    assert len(set(held.tolist())) == 1


# --- in a browser

# What a reader of the page has: how wide it is, and how large its text.
PROBE = """
<script>
const frames = [...document.querySelectorAll("iframe")];
onload = () => {
  const found = frames.map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const texts = [...page.querySelectorAll("svg text")].map(t => {
      const svg = t.ownerSVGElement, box = t.getBoundingClientRect();
      const frame = svg.getBoundingClientRect();
      return [11 * frame.width / svg.viewBox.baseVal.width, box.width * box.height,
              box.left >= frame.left - 1 && box.right <= frame.right + 1];
    });
    const columns = [...page.querySelectorAll(".many > div")].map(d => d.offsetLeft);
    return {width: root.clientWidth, needed: root.scrollWidth, texts: texts.length,
            smallest: Math.min(...texts.map(t => t[0])), drawn: texts.every(t => t[1] > 0),
            inside: texts.every(t => t[2]), columns: new Set(columns).size,
            ink: page.defaultView.getComputedStyle(page.body).color,
            paper: page.defaultView.getComputedStyle(page.body).backgroundColor};
  });
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
};
</script>
"""


def look_at(pages, folder, *flags):
    """What Chromium makes of pages: (text, width in px)."""
    frames = [
        f'<iframe style="border:0;width:{width}px;height:900px" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for text, width in pages
    ]
    (folder / "probe.html").write_text(f"<!DOCTYPE html><body>{''.join(frames)}{PROBE}")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", *flags]
    command += [f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'probe.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(re.search("FOUND(.*)END", done.stdout)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_pages_are_legible_at_any_width_in_light_and_dark(report, stage3, tmp_path, capsys):
    report(stage3 / "submission.json")
    scores = (tmp_path / "out/report.html").read_text()
    pred = stage3 / "submission.json"
    main(["--pred", "macs", "--gt", str(pred), "--out", str(tmp_path / "rank"), "--resamples", "9"])
    rank = (tmp_path / "rank/report.html").read_text()
    light = look_at([(page, width) for page in (scores, rank) for width in (1280, 390)], tmp_path)
    dark = look_at([(scores, 390)], tmp_path, "--blink-settings=preferredColorScheme=0")
    for found, width in zip(light, (1280, 390) * 2, strict=True):
        # A vertical scroll bar takes some of the width.
        assert width - 20 <= found["width"] <= width and found["needed"] <= found["width"], found
        assert found["texts"] > 80 and found["drawn"] and found["inside"], found
        assert found["smallest"] > 8.5, found
        assert found["columns"] == (4 if width == 1280 else 2)
        assert (found["ink"], found["paper"]) == ("rgb(29, 35, 48)", "rgb(255, 255, 255)")
    assert (dark[0]["ink"], dark[0]["paper"]) == ("rgb(232, 234, 239)", "rgb(21, 24, 30)")
