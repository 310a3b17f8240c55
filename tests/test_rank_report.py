"""python -m hnas.tools.rank_report: matching, figures, files, and what it refuses."""

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from hnas.base.errors import UserError
from hnas.ranking.correlations import bootstrap_interval, kendall_tau_b
from hnas.search_space import RESNET48, RESNET48_MINI
from hnas.tools.rank_report import main

ROOT = Path(__file__).parents[1]
NUMBER = 60


@pytest.fixture(scope="module")
def archs():
    return list(RESNET48.sample_distinct(np.random.default_rng(0), NUMBER).values())


@pytest.fixture(scope="module")
def truth(archs):
    """Accuracies that grow with the MACs and with stage 3's depth, as shares of 1."""
    rng = np.random.default_rng(1)
    macs = np.array([RESNET48.macs(arch) for arch in archs]) / 1e9
    depth = np.array([arch.depths[2] for arch in archs])
    return 0.6 + 0.03 * macs + 0.01 * depth + rng.normal(scale=0.002, size=NUMBER)


@pytest.fixture(scope="module")
def predicted(archs, truth):
    """The truth without stage 3's depth."""
    depth = np.array([arch.depths[2] for arch in archs])
    noise = np.random.default_rng(2).normal(scale=0.005, size=NUMBER)
    return truth - 0.01 * depth + noise


def write(path, archs, values, names=None, digits=52):
    """The organisers' form."""
    names = names or [f"arch{i}" for i in range(1, len(archs) + 1)]
    entries = {
        name: {"acc": float(value), "arch": arch.code[52 - digits :]}
        for name, arch, value in zip(names, archs, values, strict=True)
    }
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def report(tmp_path, capsys):
    """Runs the tool; gives the printed object."""

    def run(pred, gt, *flags):
        arguments = ["--pred", pred, "--gt", gt, "--out", tmp_path / "out", "--resamples", 50]
        main([str(argument) for argument in (*arguments, *flags)])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        # JSON has no NaN.
        return json.loads(lines[0], parse_constant=pytest.fail)

    return run


@pytest.fixture
def files(tmp_path, archs, truth, predicted):
    """Predictions and truth of the same architectures, in different order, names and digits."""
    order = np.random.default_rng(3).permutation(NUMBER)
    shuffled = [archs[i] for i in order]
    names = [f"net{i}" for i in range(NUMBER)]
    pred = write(tmp_path / "pred.json", shuffled, predicted[order], names, digits=51)
    return pred, write(tmp_path / "gt.json", archs, truth)


def refusal(report, *arguments):
    with pytest.raises(UserError) as error:
        report(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- figures


def test_figures_are_those_of_scipy(report, files, truth, predicted):
    found = report(*files)
    assert found["architectures"] == NUMBER
    assert found["only_in_pred"] == found["only_in_gt"] == 0 and found["notes"] == []
    tau = stats.kendalltau(predicted, truth).statistic
    assert found["kendall_tau_b"]["value"] == pytest.approx(tau)
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(predicted, truth)[0])
    assert found["abs_pearson"]["value"] == pytest.approx(abs(stats.pearsonr(predicted, truth)[0]))
    low, high = bootstrap_interval(kendall_tau_b, predicted, truth * 100, 0, 50)
    assert (found["kendall_tau_b"]["low"], found["kendall_tau_b"]["high"]) == (low, high)
    errors = np.abs(stats.rankdata(predicted) - stats.rankdata(truth)).mean()
    assert found["mean_absolute_rank_error"] == pytest.approx(100 * errors / NUMBER)


def test_regret_is_in_percentage_points(report, files, truth, predicted):
    found = report(*files)
    assert [row["k"] for row in found["top_k"]] == [1, 5, 10, 20]
    for row in found["top_k"]:
        k = row["k"]
        chosen = np.argsort(-predicted, kind="stable")[:k]
        best = set(np.argsort(-truth, kind="stable")[:k])
        assert row["regret"] == pytest.approx(100 * (truth.max() - truth[chosen].max()), abs=1e-6)
        assert row["precision"] == pytest.approx(len(best & set(chosen)) / k)


def test_percent_and_shares_are_the_same_truth(report, files, tmp_path, archs, truth):
    shares = report(*files)
    percent = report(files[0], write(tmp_path / "percent.json", archs, truth * 100))
    for name in ("top_k", "kendall_tau_b", "spearman"):
        assert shares[name] == percent[name]


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_counts_as_predictions(report, files, kind, archs, truth):
    counts = [getattr(RESNET48, kind)(arch) for arch in archs]
    found = report(kind, files[1])
    tau = stats.kendalltau(counts, truth).statistic
    assert found["pred"] == kind and found["kendall_tau_b"]["value"] == pytest.approx(tau)
    mini = [
        RESNET48_MINI.macs(arch, 64, 10) if kind == "macs" else RESNET48_MINI.params(arch, 10)
        for arch in archs
    ]
    flags = ("--backbone", "resnet48_mini", "--image_size", 64, "--num_classes", 10)
    tau = stats.kendalltau(mini, truth).statistic
    assert report(kind, files[1], *flags)["kendall_tau_b"]["value"] == pytest.approx(tau)


def test_the_breakdown_names_the_choice_that_is_missing(report, files, tmp_path):
    report(*files)
    found = json.loads((tmp_path / "out/report.json").read_text())
    effects = {name: row["effect"] for name, row in found["attribution"]["choices"].items()}
    assert min(effects, key=effects.get) == "depth 3" and effects["depth 3"] < -20
    shallow, *_, deep = found["by_option"]["depth 3"]
    assert (shallow["option"], deep["option"]) == (2, 8)
    assert shallow["mean"] > 10 and deep["mean"] < -10
    assert sum(row["architectures"] for row in found["by_option"]["depth 3"]) == NUMBER
    assert "the depth of stage 3 is underrated" in found["interpretation"][1]
    share = f"{100 * found['attribution']['explained']:.0f} % of the errors' variance"
    assert share in found["interpretation"][1]
    assert found["attribution"]["choices"]["depth 3"]["p_value"] < 0.001


def test_errors_of_chance_have_no_culprit(report, tmp_path, archs, truth):
    """The largest of these effects is 2.8 standard errors, as one of twelve well may be."""
    rng = np.random.default_rng(5)
    pred = write(tmp_path / "pred.json", archs, truth + rng.normal(scale=0.02, size=NUMBER))
    report(pred, write(tmp_path / "gt.json", archs, truth))
    found = json.loads((tmp_path / "out/report.json").read_text())
    effects = found["attribution"]["choices"].values()
    assert max(abs(row["effect"]) / row["standard_error"] for row in effects) > 2
    assert "No choice of depth or width stands out" in found["interpretation"][1]


# --- matching


def test_what_does_not_match_is_reported(report, tmp_path, archs, truth):
    pred = write(tmp_path / "pred.json", archs[:50], truth[:50], digits=51)
    gt = write(tmp_path / "gt.json", archs[10:], truth[10:])
    found = report(pred, gt)
    assert found["architectures"] == 40
    assert (found["only_in_pred"], found["only_in_gt"]) == (10, 10)
    assert "10 only in --pred, 10 only in --gt" in found["notes"][0]
    assert found["kendall_tau_b"]["value"] == pytest.approx(1)
    unmatched = json.loads((tmp_path / "out/report.json").read_text())["unmatched"]
    assert unmatched["pred"] == {"count": 10, "codes": [arch.code[1:] for arch in archs[:5]]}
    assert unmatched["gt"] == {"count": 10, "codes": [arch.code for arch in archs[50:55]]}
    text = (tmp_path / "out/report.html").read_text()
    assert all(arch.code[1:] in text for arch in (*archs[:5], *archs[50:55]))


@pytest.mark.parametrize("which", ["pred", "gt", "both"])
def test_constant_values_are_null_and_noted(report, tmp_path, archs, truth, which):
    constant = np.full(NUMBER, 0.5)
    pred = write(tmp_path / "pred.json", archs, truth if which == "gt" else constant)
    gt = write(tmp_path / "gt.json", archs, truth if which == "pred" else constant)
    found = report(pred, gt)
    for name in ("kendall_tau_b", "spearman", "abs_pearson"):
        assert found[name] == {"value": None, "low": None, "high": None}
    assert any("are equal" in note for note in found["notes"])
    text = Page((tmp_path / "out/report.html").read_text()).text
    assert "are equal" in text and not re.search(r"\bnan\b", text, re.I)


def test_no_resample_that_ranks_leaves_no_interval(report, tmp_path, archs):
    # Of 60 architectures one differs; with this seed neither resample draws it.
    values = np.where(np.arange(NUMBER) == 30, 0.6, 0.5)
    path = write(tmp_path / "one.json", archs, values)
    found = report(path, path, "--resamples", 2, "--seed", 3)
    assert found["kendall_tau_b"] == {"value": pytest.approx(1), "low": None, "high": None}
    text = (tmp_path / "out/report.html").read_text()
    assert "to tell how far that can be trusted" in text and not re.search(r"\bnan\b", text, re.I)


@pytest.mark.parametrize("number", [3, 4])
def test_three_architectures_are_enough(report, tmp_path, archs, truth, number):
    pred = write(tmp_path / "pred.json", archs[:number], truth[:number])
    found = report(pred, pred)
    assert found["architectures"] == number and "few" in found["notes"][-1]
    assert [row["k"] for row in found["top_k"]] == [1]


# --- files


class Page(html.parser.HTMLParser):
    """Collects tags and checks that they are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


PANELS = {"scatter.svg", "ranks.svg", *(f"breakdown_{number}.svg" for number in range(1, 9))}


def test_the_page_needs_nothing_else(report, files, tmp_path):
    found = report(*files)
    out = tmp_path / "out"
    assert found["report"] == str(out / "report.html")
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json", *PANELS}
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not [value for _, name, value in page.attributes if name in ("src", "href")]
    assert "http" not in text and "<script" not in text and "url(" not in text
    assert text.count("<svg") == len(PANELS)
    for name in PANELS:
        drawing = ElementTree.parse(out / name).getroot()
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        body = (out / name).read_text().split("</style>")[1]
        assert body in text, name
    assert f"{found['kendall_tau_b']['value']:.3f}" in page.text
    assert "stage 4: output width" in page.text and "70 % (digit 7)" in page.text


def test_the_same_input_gives_the_same_files(report, files, tmp_path):
    contents = []
    for _ in range(2):
        report(*files)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1]


def test_names_from_outside_are_escaped(report, tmp_path, archs, truth):
    pred = write(tmp_path / "<b>&.json", archs, truth)
    report(pred, pred)
    text = (tmp_path / "out/report.html").read_text()
    assert "<b>" not in text and "&lt;b&gt;&amp;.json" in text


def test_thousands_of_architectures(report, tmp_path):
    """So many that the plots show densities."""
    rng = np.random.default_rng(0)
    many = list(RESNET48.sample_distinct(rng, 4000).values())
    macs = np.array([RESNET48.macs(arch) for arch in many]) / 1e9
    gt = write(tmp_path / "gt.json", many, 0.5 + 0.05 * macs + rng.normal(0, 0.02, len(many)))
    found = report("macs", gt)
    assert found["architectures"] == 4000 and found["top_k"][-1]["k"] == 1000
    assert found["kendall_tau_b"]["high"] - found["kendall_tau_b"]["low"] < 0.04


# --- what is refused


def test_fewer_than_three_matches(report, tmp_path, archs, truth):
    pred = write(tmp_path / "pred.json", archs[:2], truth[:2])
    gt = write(tmp_path / "gt.json", archs, truth)
    message = refusal(report, pred, gt)
    assert "share 2 architectures (2 and 60 are in them)" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [-0.1, 100.5])
def test_true_accuracies_have_bounds(report, tmp_path, archs, truth, value):
    gt = write(tmp_path / "gt.json", archs, [*truth[:-1], value])
    assert "entry 'arch60': accuracy" in refusal(report, "macs", gt)
    report(gt, write(tmp_path / "good.json", archs, truth))  # predictions have none


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        ("nowhere.json", "nowhere.json: No such file"),
        ("flops", "flops: No such file"),
        ("codes.txt", "0 are there"),
        ("twice.json", "the same architecture as"),
        ("text.json", '"acc" is "0.5", not a finite number'),
    ],
)
def test_wrong_predictions(report, files, tmp_path, monkeypatch, archs, pred, message):
    monkeypatch.chdir(tmp_path)
    code = archs[0].code
    Path("codes.txt").write_text(code)
    Path("twice.json").write_text(
        json.dumps({"a": {"acc": 1, "arch": code}, "b": {"acc": 1, "arch": code[1:]}})
    )
    Path("text.json").write_text(json.dumps({"a": {"acc": "0.5", "arch": code}}))
    assert message in refusal(report, pred, files[1])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--backbone", "resnet84"), ("--resamples", "0"), ("--image_size", "8"), ("--seed", "-1")],
)
def test_values_out_of_bounds(report, files, flag, value):
    refusal(report, "macs", files[1], flag, value)


def test_the_program_ends_with_one_line_and_exit_code_2(tmp_path):
    command = "import sys; from hnas.base.errors import run_main; "
    command += "from hnas.tools.rank_report import main; run_main(main)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command, "--pred", "macs", "--gt", "none.json"]
        + ["--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"error: cannot read architectures from none\.json: .+", last)
