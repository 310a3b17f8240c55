"""python -m hnas.tools.rank_report, with a truth and without: figures, files, pages, refusals."""

import html
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from independent import counts_of, first_place_size
from scipy import stats
from test_readme import table_after

from hnas.architecture_file import read_truth
from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.evaluation.results import estimates
from hnas.programs.flags import Stage
from hnas.programs.parsing import parse_options
from hnas.ranking.agreement import Agreement, expected_agreement
from hnas.ranking.correlations import bootstrap_interval, kendall_tau_b
from hnas.ranking.costs import Network
from hnas.ranking.figures import Panel
from hnas.search_space import RESNET48, RESNET48_MINI
from hnas.tools import choose
from hnas.tools.rank_report import main

NUMBER, IMAGES = 60, 355
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MINI = ("--backbone", "resnet48_mini", "--image_size", 32, "--num_classes", 10)


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
    """Runs the tool; gives the printed object and ``report.json``."""

    def run(*arguments, resamples=50):
        more = ("--out", tmp_path / "out", "--resamples", resamples)
        main([str(word) for word in (*arguments, *more)])
        lines = capsys.readouterr().out.splitlines()
        page = (tmp_path / "out/report.html").read_text()
        assert len(lines) == 1 and not re.search(r"\b(nan|NaN|inf|None)\b", page)
        # JSON has no NaN.
        texts = (lines[0], (tmp_path / "out/report.json").read_text())
        return [json.loads(text, parse_constant=pytest.fail) for text in texts]

    return run


@pytest.fixture
def files(tmp_path, archs, truth, predicted):
    """Flags for predictions and truth in different order, names and digits."""
    order = np.random.default_rng(3).permutation(NUMBER)
    shuffled = [archs[i] for i in order]
    names = [f"net{i}" for i in range(NUMBER)]
    pred = write(tmp_path / "pred.json", shuffled, predicted[order], names, digits=51)
    return "--pred", pred, "--gt", write(tmp_path / "gt.json", archs, truth)


def told(table):
    """The fields in a table of the docs."""
    rows = table_after("docs/ranking-report.md", table)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}


# --- against a truth


def test_figures_are_those_of_scipy(report, files, tmp_path, archs, truth, predicted):
    found, _ = report(*files)
    assert told("rank_report fields") == set(found) - {"run", "pred", "gt", "seed", "report"}
    # Predictions have no bounds and no unit.
    own = write(tmp_path / "own.json", archs, 1000 * predicted - 900)
    percent = write(tmp_path / "percent.json", archs, truth * 100)
    again, _ = report("--pred", own, "--gt", percent)
    for name in ("regret", "kendall_tau_b", "tau_of_counts"):
        assert found[name] == again[name]
    assert found["architectures"] == NUMBER
    assert found["only_in_pred"] == found["only_in_gt"] == 0 and found["notes"] == []
    tau = stats.kendalltau(predicted, truth).statistic
    assert found["kendall_tau_b"]["value"] == pytest.approx(tau)
    assert found["pearson"]["value"] == pytest.approx(stats.pearsonr(predicted, truth)[0])
    low, high = bootstrap_interval(kendall_tau_b, predicted, truth * 100, 0, 50)
    assert (found["kendall_tau_b"]["low"], found["kendall_tau_b"]["high"]) == (low, high)
    lost = 100 * (truth.max() - truth[predicted.argmax()])
    assert found["regret"] == pytest.approx(lost, abs=1e-6)


def test_upside_down_is_said(report, files, tmp_path, archs, predicted):
    pred = write(tmp_path / "pred.json", archs, 1 - predicted)
    found, _ = report("--pred", pred, *files[2:])
    assert found["pearson"]["value"] < -0.5
    text = text_of((tmp_path / "out/report.html").read_text())
    assert "It ranks upside down: what it prefers is worse" in text
    assert f"Pearson\N{MINUS SIGN}{-found['pearson']['value']:.3f}" in text


@pytest.mark.parametrize("scale", [1e-12, 0.3, 1e9])
def test_scores_by_code_are_of_any_scale_and_no_percents(report, files, tmp_path, scale):
    """Proxies: as predictions and as truths, in the order of another file."""
    expected, _ = report(*files)
    for path in files[1], files[3]:
        plain = {arch.code: (value - 66) * scale for arch, value in read_truth(path).items()}
        path.write_text(json.dumps(plain))
    found, _ = report(*files)
    assert found["kendall_tau_b"] == expected["kendall_tau_b"]
    assert found["regret"] == pytest.approx(expected["regret"] * scale)
    text = text_of((tmp_path / "out/report.html").read_text())
    assert "predicted score" in text and "accuracy" not in text and "score, %" not in text


def test_imagenets_thirty_are_a_truth_by_name(report, tmp_path, monkeypatch, caplog):
    found, _ = report("--pred", "size", "--gt", "imagenet30")
    assert found["kendall_tau_b"]["value"] == pytest.approx(0.689, abs=5e-4)
    taus = {"macs": 0.589, "params": 0.617, "depth": 0.636}  # as the page says
    assert found["tau_of_counts"] == pytest.approx(taus, abs=5e-4)
    assert "thirty networks, each trained once" in found["notes"][0] and len(found["notes"]) == 1
    assert not caplog.text  # its network is known
    with pytest.raises(UserError, match="imagenet30 is of other settings: backbone resnet48"):
        report("--pred", "size", "--gt", "imagenet30", *MINI)
    # Scores of another network, as estimates.json says, and a user's own file of that name.
    archs = dict(zip("abc", read_truth("imagenet30"), strict=False))
    counts, network = counts_of(np.eye(3, IMAGES)), Network("resnet48_mini", 32, 10)
    content = estimates(archs, counts, None, IMAGES, network)
    write_json(tmp_path / "estimates.json", content)
    write_json(tmp_path / "imagenet30", content["architectures"])
    monkeypatch.chdir(tmp_path)
    found, _ = report("--pred", "./imagenet30", "--gt", "imagenet30")
    assert "resnet48_mini, 32 px, 10 classes, not resnet48, 224 px" in found["notes"][-1]
    assert report("--pred", "size", "--gt", "./imagenet30")[0]["architectures"] == 3


@pytest.mark.parametrize("flags", [(), MINI])
def test_what_needs_no_training(report, files, tmp_path, archs, truth, flags):
    """As a prediction, and beside one."""
    space, sizes = (RESNET48_MINI, (32, 10)) if flags else (RESNET48, (224, 1000))
    counts = {
        "macs": [space.macs(arch, *sizes) for arch in archs],
        "params": [space.params(arch, sizes[1]) for arch in archs],
        "size": [first_place_size(arch.code) for arch in archs],
        "depth": [sum(arch.depths) for arch in archs],
    }
    taus = {kind: stats.kendalltau(own, truth).statistic for kind, own in counts.items()}
    noise = write(tmp_path / "noise.json", archs, np.random.default_rng(0).random(NUMBER))
    for pred, beats in ((noise, False), (files[3], True)):
        found, page = report("--pred", pred, *files[2:], *flags)
        assert found["tau_of_counts"] == pytest.approx(taus)
        told = [line for line in page["interpretation"] if "It does not beat counting" in line]
        assert bool(told) != beats and all(f"tau-b of {max(taus.values()):.3f}" in t for t in told)
    for kind, tau in taus.items():
        found, _ = report("--pred", kind, *files[2:], *flags)
        assert found["pred"] == kind and found["kendall_tau_b"]["value"] == pytest.approx(tau)


def test_the_costs_are_of_the_network_that_was_scored(report, stage3, caplog):
    scores = stage3 / "submission.json"
    for arguments in (("--pred", scores), ("--pred", "macs", "--gt", scores)):
        found = [report(*arguments, *flags)[1] for flags in ((), MINI)]
        assert found[0] == found[1] and not caplog.text
        with pytest.raises(UserError, match="json is of other settings: image size 32 instead"):
            report(*arguments, "--image_size", 64)
    (stage3 / "estimates.json").unlink()
    report("--pred", scores, "--num_classes", 10)
    assert "taken: --backbone resnet48 --image_size 224 --num_classes 10" in caplog.text


def test_the_breakdown_names_the_choice_that_is_missing(report, files):
    _, found = report(*files)
    effects = {name: row["effect"] for name, row in found["attribution"]["choices"].items()}
    assert min(effects, key=effects.get) == "depth 3" and effects["depth 3"] < -20
    told = found["interpretation"][-1]
    assert told.startswith("Its largest systematic error: the depth of stage 3 is underrated.")
    share = f"{100 * found['attribution']['explained']:.0f} % of the errors' variance"
    assert f"All choices together explain {share}" in told
    assert found["attribution"]["choices"]["depth 3"]["p_value"] < 0.001


def test_what_does_not_match_is_reported(report, tmp_path, archs, truth):
    pred = write(tmp_path / "pred.json", archs[:50], truth[:50], digits=51)
    printed, _ = report("--pred", pred, "--gt", write(tmp_path / "gt", archs[10:], truth[10:]))
    assert printed["architectures"] == 40
    assert (printed["only_in_pred"], printed["only_in_gt"]) == (10, 10)
    assert "10 only in --pred, 10 only in --gt" in printed["notes"][0]
    assert printed["kendall_tau_b"]["value"] == pytest.approx(1)


@pytest.mark.parametrize("which", ["pred", "gt", "both"])
def test_constant_values_are_null_and_noted(report, tmp_path, archs, truth, which):
    constant = np.full(NUMBER, 0.5)
    pred = write(tmp_path / "pred.json", archs, truth if which == "gt" else constant)
    gt = write(tmp_path / "gt.json", archs, truth if which == "pred" else constant)
    found, _ = report("--pred", pred, "--gt", gt)
    for name in ("kendall_tau_b", "pearson"):
        assert found[name] == {"value": None, "low": None, "high": None}
    assert any("are equal" in note for note in found["notes"])
    assert "are equal" in text_of((tmp_path / "out/report.html").read_text())


def test_few_or_tied_architectures_are_not_told_more_of_than_they_carry(
    report, files, tmp_path, archs, truth
):
    few = write(tmp_path / "few.json", archs[:7], truth[:7])
    found, page = report("--pred", few, "--gt", few)
    assert found["kendall_tau_b"] == {"value": pytest.approx(1), "low": None, "high": None}
    assert page["interpretation"][0].startswith("Kendall's tau-b is 1.000. The architectures are")
    # Pairs that are equal in truth cannot be put in the right order.
    tied = write(tmp_path / "tied.json", archs, np.floor(truth * 50) / 50)
    _, page = report("--pred", files[3], "--gt", tied)
    assert "it puts about 100 in 100 pairs in the right order" in page["interpretation"][0]
    # Hardly better than the blocks' number.
    nearly = np.array([sum(arch.depths) for arch in archs]) + 0.1 * truth
    _, page = report("--pred", write(tmp_path / "near", archs, nearly), *files[2:])
    told = [line for line in page["interpretation"] if "do not show that it beats counting" in line]
    assert len(told) == 1


def test_no_resample_that_ranks_leaves_no_interval(report, tmp_path, archs):
    # Of 60 architectures one differs; with this seed neither resample draws it.
    path = write(tmp_path / "one.json", archs, np.where(np.arange(NUMBER) == 30, 0.6, 0.5))
    found, _ = report("--pred", path, "--gt", path, "--seed", 3, resamples=2)
    assert found["kendall_tau_b"] == {"value": pytest.approx(1), "low": None, "high": None}
    text = (tmp_path / "out/report.html").read_text()
    assert "to tell how far that can be trusted" in text


# --- scores alone


@pytest.fixture(scope="module")
def hits(archs):
    """That grow with the MACs."""
    macs = np.array([RESNET48_MINI.macs(arch, 32, 10) for arch in archs])
    chance = 0.85 + 0.1 * macs / macs.max()
    return np.random.default_rng(1).random((NUMBER, IMAGES)) < chance[:, None]


@pytest.fixture
def stage3(tmp_path, archs, hits):
    """What stage 3 leaves."""
    named = {f"arch{i}": arch for i, arch in enumerate(archs)}
    agreement, network = Agreement(0.875, 0.8125, 0.9375), Network("resnet48_mini", 32, 10)
    content = estimates(named, counts_of(hits), agreement, 5000, network)
    write_json(tmp_path / "stage3/estimates.json", content)
    write_json(tmp_path / "stage3/submission.json", content["architectures"])
    return tmp_path / "stage3"


def test_figures_are_those_of_numpy(report, stage3, archs, hits, tmp_path):
    printed, found = report("--pred", stage3 / "submission.json")
    network = {"backbone": "resnet48_mini", "image_size": 32, "num_classes": 10}
    assert told("scores fields") == set(printed) - {"run", "pred", "report", *network}
    assert {name: printed[name] for name in network} == network
    accuracy = hits.sum(axis=1) / IMAGES * 100
    macs = np.array([RESNET48_MINI.macs(arch, 32, 10) for arch in archs])
    assert printed["architectures"] == NUMBER and printed["images"] == IMAGES
    assert printed["accuracy"] == {
        "lowest": accuracy.min(),
        "median": pytest.approx(np.median(accuracy)),
        "highest": accuracy.max(),
        "standard_deviation": pytest.approx(accuracy.std(ddof=1)),
    }
    # By Laplace's estimate.
    rate = (hits.sum(axis=1) + 1) / (IMAGES + 2)
    error = 100 * np.median(np.sqrt(rate * (1 - rate) / IMAGES))
    assert printed["standard_error"] == pytest.approx(error, abs=1e-4)
    assert printed["tau_of_macs"] == pytest.approx(stats.kendalltau(macs, accuracy).statistic)
    best = np.sort(accuracy)[::-1]
    assert [row["accuracy"] for row in found["best"]] == best[:10].tolist()
    for row in found["budgets"]:
        assert row["accuracy"] == accuracy[macs <= row["macs"]].max()
    # From the cheapest to the best, each once.
    assert 2 < len(found["budgets"]) == len({row["name"] for row in found["budgets"]}) <= 8
    ends = found["budgets"][0]["macs"], found["budgets"][-1]["accuracy"]
    assert ends == (macs.min(), best[0])
    agreement = {"images": 5000, "tau": 0.875, "low": 0.8125, "high": 0.9375}
    assert printed["agreement"] == agreement
    text = (tmp_path / "out/report.html").read_text()
    assert "with that by all 5,000 at a tau-b of 0.875 (0.812 to 0.938)" in text
    # Of a part of them, that of this part.
    scores = json.loads((stage3 / "submission.json").read_text())
    rows = np.argsort(-accuracy, kind="stable")[:20]
    write_json(stage3 / "best.json", {f"arch{row}": scores[f"arch{row}"] for row in rows})
    part, _ = report("--pred", stage3 / "best.json")
    expected = expected_agreement(counts_of(hits).folds[rows], IMAGES, 5000)
    assert part["agreement"]["tau"] == pytest.approx(expected.tau)


def test_the_page_tells_chooses_group_and_what_is_next(report, stage3, tmp_path, capsys):
    scores = stage3 / "submission.json"
    printed, found = report("--pred", scores)
    choose.main(["--submission", str(scores), "--top", "60"])
    lines = capsys.readouterr().out.splitlines()
    group = {line.split()[0] for line in lines[1:61] if line.endswith("=")}
    assert 1 < printed["group"] == len(group) < NUMBER
    for row in (*found["best"], *found["budgets"]):
        assert row["group"] == (row["name"] in group)
    page = elements((tmp_path / "out/report.html").read_text())
    assert f"{len(group)} of them are not worse than the best by more" in "".join(page.itertext())
    run = f"{tmp_path.name}/stage3"
    assert page.find("head/title").text == page.find("body/h1").text == f"{run}: scores"
    # What follows can be run as it is, but for two words in capitals.
    chosen, *others = (shlex.split(line)[2:] for line in page.find(".//pre").text.splitlines())
    assert chosen[0] == "hnas.tools.choose"
    choose.main(chosen[1:])
    for words, tool in zip(others, ("export", "train_standalone"), strict=True):
        options = parse_options(Stage.EXPORT, words[1:])
        assert words[0] == f"hnas.tools.{tool}" and Path(options.save_dir).parent == stage3
        assert options.arch == found["best"][0]["arch"] and options.backbone == "resnet48_mini"
    # Whatever is wider than a phone scrolls in a box of its own, which keys reach.
    boxes = page.findall(".//div[@class='wide'][@tabindex='0']")
    wide = [child.tag for box in boxes for child in box]
    assert wide == [e.tag for e in page.iter() if e.tag in ("table", "pre")] and len(wide) == 4
    assert ".wide { overflow-x: auto;" in page.find("head/style").text


@pytest.mark.parametrize("more", [{"images": IMAGES}, {"tau": None, "low": None, "high": None}])
def test_an_agreement_of_all_images_or_none_is_not_told(report, stage3, tmp_path, more):
    content = json.loads((stage3 / "estimates.json").read_text())
    content["agreement"] |= more
    content.pop("network")  # as earlier versions wrote it
    write_json(stage3 / "estimates.json", content)
    printed, _ = report("--pred", stage3 / "submission.json", *MINI)
    assert printed["standard_error"] is not None
    assert printed["agreement"] is None
    assert "expected to agree" not in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "there is no estimates.json beside"),
        (lambda content: content.update(images="many"), "not an estimates.json of this version"),
        (lambda content: content["architectures"].pop("arch3"), "is of other scores"),
    ],
)
def test_scores_without_estimates_of_their_own(report, stage3, change, words):
    content = json.loads((stage3 / "estimates.json").read_text())
    (stage3 / "estimates.json").unlink()
    if change:
        change(content)
        write_json(stage3 / "estimates.json", content)
    printed, found = report("--pred", stage3 / "submission.json", *MINI)
    assert printed["images"] is printed["standard_error"] is None
    assert words in printed["notes"][-1]
    assert all(row["standard_error"] is None for row in found["best"])


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.5, 0.6, 0.7], [0, 0, 1]])
def test_few_or_equal_scores(report, archs, tmp_path, values):
    names = [f"<b>{i}" for i in range(3)]
    printed, _ = report("--pred", write(tmp_path / "<b>&.json", archs[:3], values, names))
    text = (tmp_path / "out/report.html").read_text()
    assert "<b>" not in text and "&lt;b&gt;&amp;.json" in text
    assert ("they rank nothing" in " ".join(printed["notes"])) == (len(set(values)) == 1)


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--pred macs --gt none.json", "cannot read architectures from none.json: No such"),
        ("--pred flops --gt gt.json", "flops: No such file"),
        ("--pred codes.txt --gt gt.json", "0 are there"),
        ("--pred two.json --gt gt.json", "share 2 architectures (2 and 60 are in them)"),
        ("--pred macs --gt low.json", "entry 'arch3': accuracy -0.1"),
        ("--pred macs --gt high.json", "entry 'arch3': accuracy 100.5"),
        ("--pred macs --gt gt.json --backbone resnet84", "invalid choice: 'resnet84'"),
        ("--pred macs --gt gt.json --resamples 0", "--resamples"),
        ("--pred macs", "--pred macs needs --gt"),
        ("--pred two.json", "has 2 architectures; a report needs at least 3"),
        ("--pred high.json", "accuracy 100.5"),
        ("--pred plain.json", "plain.json has scores by code, for rank_report with --gt"),
        ("--pred twice.json --gt gt.json", "twice.json: entry 2"),
        ("--pred nan.json --gt gt.json", "NaN is no number within +-1e+300"),
        ("--pred gt.json --gt nan.json", "NaN is no number within +-1e+300"),
        ("--pred mixed.json", "are some shares of 1 and some percent? Give all as shares"),
        ("--pred mixed.json --gt gt.json", "are some shares of 1 and some percent?"),
        ("--pred gt.json --gt mixed.json", "are some shares of 1 and some percent?"),
    ],
)
def test_what_is_refused(report, tmp_path, monkeypatch, archs, truth, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "gt.json", archs, truth)
    write(tmp_path / "two.json", archs[:2], truth[:2])
    write(tmp_path / "low.json", archs[:3], [5, 50, -0.1])
    write(tmp_path / "high.json", archs[:3], [5, 50, 100.5])
    write(tmp_path / "mixed.json", archs, np.where(np.arange(NUMBER) == 9, 97.0, truth))
    Path("codes.txt").write_text(archs[0].code)
    Path("plain.json").write_text(json.dumps({arch.code: 0.5 for arch in archs}))
    Path("nan.json").write_text(f'{{"{archs[0].code}": NaN}}')
    Path("twice.json").write_text(f'{{"{archs[0].code}": 1, "{archs[0].code[1:]}": 2}}')
    with pytest.raises(UserError) as error:
        report(*arguments.split())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# --- the page


def elements(text):
    """The root of a page, which is XML but for what HTML has before it."""
    return ElementTree.fromstring(re.sub("<!DOCTYPE html>|<meta[^>]*>|xlink:", "", text))


def text_of(page):
    return "".join(elements(page).itertext())


def test_the_page_needs_nothing_else_and_is_the_same_again(report, files, tmp_path):
    out, contents = tmp_path / "out", []
    for _ in range(2):
        found, _ = report(*files)
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] and set(contents[0]) == {"report.html", "report.json"}
    assert found["report"] == str(out / "report.html")
    text = contents[0]["report.html"].decode()
    links = [element.get(name) for element in elements(text).iter() for name in ("src", "href")]
    assert all(link.startswith("#") for link in links if link)
    assert "http" not in text and "<script" not in text
    assert all(word.startswith("#") for word in re.findall(r"url\((.*?)\)", text))
    assert text.count("<svg") == 1 and "#2563a8" not in text.split("</style>", 1)[1]
    assert f"{found['kendall_tau_b']['value']:.3f}" in text_of(text)
    assert "stage 4: output width" in text_of(text)


def test_a_figure_of_45_000_is_small_and_whole():
    cost, accuracy = np.random.default_rng(3).normal(size=(2, 45_000))
    panel = Panel("<cost>", "score, %")
    panel.points(cost, accuracy)
    panel.front(np.sort(cost)[-3:], accuracy[:3])
    drawing = panel.svg()
    assert len(drawing) < 200_000 and drawing.rstrip().endswith("</svg>")


# --- in a browser

# How wide a page is, how large its texts are, and whether they lie within their figures.
PROBE = """
<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(({contentDocument: page}) => {
    const texts = [...page.querySelectorAll("svg text")].map(t => {
      const svg = t.ownerSVGElement, box = t.getBoundingClientRect();
      const frame = svg.getBoundingClientRect();
      return [11 * frame.width / svg.viewBox.baseVal.width,
              box.left >= frame.left - 1 && box.right <= frame.right + 1];
    });
    return {over: page.documentElement.scrollWidth - page.documentElement.clientWidth,
            smallest: Math.min(...texts.map(t => t[0])), inside: texts.every(t => t[1]),
            ink: page.defaultView.getComputedStyle(page.body).color};
  });
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
};
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_pages_are_legible_at_any_width_in_light_and_dark(report, stage3, tmp_path, dark):
    pages = []
    for arguments in ("--pred", "SCORES"), ("--pred", "macs", "--gt", "SCORES"):
        report(*(stage3 / "submission.json" if word == "SCORES" else word for word in arguments))
        text = html.escape((tmp_path / "out/report.html").read_text())
        style = "border:0;height:900px;width:"
        pages += [f'<iframe style="{style}{w}px" srcdoc="{text}"></iframe>' for w in (1280, 390)]
    (tmp_path / "probe.html").write_text(f"<!DOCTYPE html><body>{''.join(pages)}{PROBE}")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--blink-settings=preferredColorScheme=0"] * dark
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'probe.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for found in json.loads(re.search("FOUND(.*)END", done.stdout)[1]):
        assert found["over"] <= 0 and found["smallest"] > 8.5 and found["inside"], found
        assert found["ink"] == ("rgb(232, 234, 239)" if dark else "rgb(29, 35, 48)")
