"""What is measured while a supernet trains, and warnings of scores that mean nothing."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from entry_scripts import CLASSES, ROOT, noise_images, run, text_of
from independent import images_for
from scipy import stats

import train_supernet
import train_supernet_pinas_stage1 as stage1
import train_supernet_pinas_stage2_simple as stage2
from hnas.architecture_file import read_truth, submission
from hnas.base.errors import UserError
from hnas.base.files import read_json, write_json
from hnas.evaluation.counts import Counts
from hnas.evaluation.reference import evaluate_reference
from hnas.models.pinasv2 import build_network
from hnas.programs.options import Options
from hnas.search_space import RESNET48_MINI
from hnas.tools import pretrain, search, train_standalone
from hnas.utils import validation
from hnas.utils.validation import ranking, read_ranked, share_of, warn_if_broken
from hnas.weights.loading import load_weights, read_weights, write_state

DEMO = ROOT / "checkpoint_files/demo_stage2.pdparams"
NUMBER = 8
TWO = [RESNET48_MINI.smallest().code, RESNET48_MINI.largest().code]


@pytest.fixture(scope="module")
def truth():
    """Stand-alone accuracies by invention, with two that are equal."""
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(3), NUMBER).values()
    values = np.random.default_rng(4).uniform(0.5, 0.9, NUMBER)
    values[1] = values[0]
    return dict(zip(archs, values.tolist(), strict=True))


def write_truth(path, rows):
    path.write_text(json.dumps({f"a{i}": {"acc": a, "arch": c} for i, (c, a) in enumerate(rows)}))
    return path


@pytest.fixture(scope="module")
def supernet():
    network = build_network("resnet48_mini", len(CLASSES))
    load_weights(network, read_weights(DEMO), "demo")
    return network


@pytest.mark.parametrize("calibrated", [False, True])
def test_figures_are_scipys_of_the_reference_engines_hits(supernet, truth, calibrated):
    loader = [images_for(32, 50, seed=0), images_for(32, 31)]
    calibration = images_for(32, 16, seed=2)[0] if calibrated else None
    before = {name: tensor.numpy().tobytes() for name, tensor in supernet.state_dict().items()}
    found = ranking(supernet, truth, loader, 20, calibration)
    accuracy = evaluate_reference(supernet, list(truth), loader, calibration).accuracy()
    for name, tensor in supernet.state_dict().items():
        assert tensor.numpy().tobytes() == before[name], name
    true = list(truth.values())
    assert found["kendall_tau_b"] == pytest.approx(stats.kendalltau(accuracy, true).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(accuracy, true)[0])


def test_processes_share_the_images_and_find_the_same(supernet, truth, monkeypatch):
    """Two processes, emulated one after the other: each scores its share, and the hits add up."""
    pixels, labels = images_for(32, 41, seed=5)

    def share_loader(_, images, order):
        index = paddle.to_tensor(order)
        return [(pixels[index], labels[index])]

    monkeypatch.setattr(validation, "validation_loader", share_loader)
    alone = ranking(supernet, truth, share_of(Options(), range(41)), 7)
    monkeypatch.setattr(validation, "world_size", lambda: 2)
    hits = []
    for number in range(2):
        monkeypatch.setattr(validation, "rank", lambda number=number: number)
        monkeypatch.setattr(validation, "sum_over_ranks", lambda own: hits.append(own) or sum(hits))
        together = ranking(supernet, truth, share_of(Options(), range(41)), 7)
    assert together == alone and int(hits[0].sum()) > 0 and int(hits[1].sum()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:2], "has 2 architectures; a ranking needs at least 3"),
        (lambda rows: [*rows[:3], (PROJECTED, 0.5)], "no projection"),
    ],
)
def test_wrong_files_are_refused(supernet, tmp_path, truth, change, message):
    rows = change([(arch.code, acc) for arch, acc in truth.items()])
    path = write_truth(tmp_path / "gt.json", rows)
    with pytest.raises(UserError, match=message) as error:
        read_ranked(Options(rank_gt=str(path)), supernet)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_imagenets_thirty_come_with_their_noise(supernet, caplog):
    found = read_ranked(Options(rank_gt="imagenet30", backbone="resnet48_mini"), supernet)
    assert len(found) == 30 and min(found.values()) > 60
    (told,) = warnings_of(caplog)
    assert "each trained once" in told
    assert "resnet48_mini, 224 px, 10 classes, not resnet48, 224 px, 1000 classes" in told


def test_stage_three_scores_what_the_list_lacks(truth, tmp_path, monkeypatch, caplog):
    """Beside it: submission.json is the list's, and the same with and without."""
    images = noise_images(tmp_path / "images", number=3)
    listed = {"rank_gt1": next(iter(truth)), "b": RESNET48_MINI.largest()}
    write_json(tmp_path / "list.json", submission(listed, [0, 0]))
    gt = write_truth(tmp_path / "gt.json", [(arch.code, acc) for arch, acc in truth.items()])
    flags = {"backbone": "resnet48_mini", "ckpt_dir": DEMO, "bn_calibration_images": 4}
    caplog.set_level("INFO")
    for folder, lists in (("plain", {}), ("ranked", {"rank_gt": gt}), ("all", {})):
        lists["modelarch_file"] = gt if folder == "all" else tmp_path / "list.json"
        run(train_supernet, monkeypatch, images, tmp_path / folder, **flags, **lists)
    plain, ranked = (tmp_path / name / "submission.json" for name in ("plain", "ranked"))
    assert plain.read_bytes() == ranked.read_bytes()
    found = json.loads((tmp_path / "ranked/rank_gt.json").read_text())
    whole = json.loads((tmp_path / "all/submission.json").read_text())
    assert found == {row["arch"]: row["acc"] for row in whole.values()}
    tau = stats.kendalltau(list(found.values()), list(truth.values())).statistic
    assert f"tau-b with --rank_gt {gt}: value {tau:.4f}, low" in caplog.text


EXAMPLE = re.search("```python\n(.*?)```", text_of("docs/scoring.md").split("## Try a")[1], re.S)[1]
OTHERS = """
import paddle
fails = lambda network, arch, *batch: 1 / 0 if sum(arch.depths) > 8 else 1.0
nan = lambda network, arch, *batch: float("nan" if sum(arch.depths) > 8 else -2)
text = lambda network, arch, *batch: "high" if sum(arch.depths) > 8 else paddle.to_tensor(3.0)
top1 = lambda network, arch, x, y: (network(x).argmax(1) == y).astype("float32").mean()
shapes = lambda network, arch, x, y: x.flatten(1).matmul(x.flatten(1))
number = 3
def spoils(network, arch, *batch):
    assert not network.training and [list(b.shape) for b in batch] == [[7, 3, 32, 32], [7]]
    for tensor in (*network.parameters(), *batch):
        tensor.set_value(paddle.zeros_like(tensor))
    return paddle.rand([1])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Scores the smallest and the largest network by a function of a name."""
    (tmp_path / "own.py").write_text(EXAMPLE + OTHERS)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "list.txt").write_text(" ".join(TWO))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    images = noise_images(tmp_path / "images")
    common = {"backbone": "resnet48_mini", "ckpt_dir": DEMO, "bn_calibration_images": 4}
    common |= {"modelarch_file": tmp_path / "list.txt", "batch_size": 7}

    def score(name, script=train_supernet, **flags):
        flags = {**common, "score_function": name, **flags}
        run(script, monkeypatch, images, tmp_path / "out", **flags)
        return json.loads((tmp_path / "out/scores.json").read_text())

    return score


def test_an_own_score_of_the_page(own, tmp_path, caplog):
    with caplog.at_level("INFO"):
        found = own("own.saliency", rank_gt="imagenet30")
    assert list(found)[:2] == TWO and len(found) == 32 and min(found.values()) > 0
    truth = read_truth("imagenet30")
    tau = stats.kendalltau([found[arch.code] for arch in truth], list(truth.values())).statistic
    assert f"tau-b with --rank_gt imagenet30: value {tau:.4f}, low" in caplog.text
    with pytest.raises(UserError):
        own("own.fails")
    assert read_json(tmp_path / "out/scores.json") == found
    # The same networks, images and labels as those whose hits stage 3 counts.
    caplog.clear()
    found = own("own.top1", bn_calibration_images=0)
    assert caplog.text.count("mixture") == 1  # not once for each network
    own("None", eval_images=7, bn_calibration_images=0)
    scored = json.loads((tmp_path / "out/submission.json").read_text()).values()
    assert found == {row["arch"]: pytest.approx(row["acc"]) for row in scored}
    # What is more, or finished, is not lost to a trial.
    assert len(json.loads((tmp_path / "out/scores_of_32.json").read_text())) == 32
    for _ in range(2):
        with pytest.raises(UserError):
            own("own.fails")
    ends = ("", "_unfinished", "_unfinished_of_1")
    kept = [read_json(tmp_path / f"out/scores{end}.json") for end in ends]
    assert [len(each) for each in kept] == [2, 1, 1]


def test_an_own_score_leads_the_search(own, capsys):
    flags = {"population": 4, "children": 2, "generations": 2, "tournament": 2, "max_macs": 6e6}
    found = own("own.saliency", search, **flags)
    best = max(found, key=found.get)
    assert capsys.readouterr().out.splitlines()[0] == f"{best}  {found[best]:.6g}"
    assert len(found) == 8 and own("own.saliency", search, **flags) == found
    # Whatever a function does to what it is given, the next one gets it anew.
    assert len(set(own("own.spoils").values())) == 1


@pytest.mark.parametrize(
    ("name", "flags", "message", "kept"),
    [
        ("own.fails", {}, "LARGEST: ZeroDivisionError: division by zero (<lambda>, line ", 1),
        ("own.nan", {}, "LARGEST: ValueError: nan is no number within +-1e+300", -2),
        ("own.text", {}, "LARGEST: ValueError: could not convert string to float: 'high'", 3),
        ("own.shapes", {}, "dimension of Input(Y) is [7] (<lambda>, line ", None),
        ("own.number", {}, "TypeError: 'int' object is not callable", None),
        ("own.none", {}, "AttributeError: module 'own' has no attribute 'none'", None),
        ("x.score", {}, "give module.function, of a module that is installed or lies", None),
        ("broken.x", {}, "ZeroDivisionError: division by zero", None),
        ("x", {}, "ValueError: Empty module name", None),
        ("own.fails", {"target_tau": 0.9}, "leave out --amp, --target_tau and", None),
    ],
)
def test_an_own_score_that_fails_is_one_line(own, tmp_path, name, flags, message, kept):
    with pytest.raises(UserError) as error:
        own(name, **flags)
    assert str(error.value).startswith(f"--score_function {name}") and "\n" not in str(error.value)
    assert message.replace("LARGEST", f"architecture {TWO[1]}") in str(error.value)
    assert "(score_by_function" not in str(error.value)  # the line of theirs, or none
    if kept is not None:
        assert json.loads((tmp_path / "out/scores.json").read_text()) == {TWO[0]: kept}


PROJECTED = "122221" + "1111000000" + "1113000000" + "1111" + "0" * 12 + "1111000000"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rank_gt": "gt.json", "eval_freq": 0}, "--rank_gt scores every --eval_freq"),
        ({"in_place_distillation": True}, "needs --sample_method sandwich"),
        (
            {"in_place_distillation": True, "sample_method": "sandwich", "dyna_batch_size": 0},
            "at least 2 for --dyna_batch_size",
        ),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(UserError, match=message):
        stage2.check_flags(Options(**flags))


def test_in_place_there_is_no_other_teacher(begin):
    flags = {"sample_method": "sandwich", "eval_freq": 0, "in_place_distillation": True}
    (model,) = begin(stage2, fit=lambda model, *_: model, **flags)
    assert (model.in_place, model.teacher) == (True, None)


# --- scores that mean nothing


def blank_network(**kind):
    """Weights of zero, so every image is said to be of the first class."""
    network = build_network("resnet48_mini", len(CLASSES), **kind)
    for parameter in network.parameters():
        parameter.set_value(paddle.zeros_like(parameter))
    return network


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("hits", "before", "images", "warned"),
    [
        (26, 81, 100, False),  # half of 81 and three standard deviations of 4.9 are 25.8
        (25, 81, 100, True),
        (3902, 8100, 10000, True),  # 4050 less three standard deviations of 49.1 are 3902.7
        (3903, 8100, 10000, False),
        (5, 20, 20, False),  # nothing to tell by
        (0, 20, 20, True),
        (0, 0, 20, False),
    ],
)
def test_a_supernet_that_broke_is_told(hits, before, images, warned, caplog):
    largest, at_first = (
        replace(Counts.zeros(1), top1=np.array([times * top1]), images=times * images)
        for times, top1 in ((1, hits), (2, before))
    )
    assert warn_if_broken(largest, at_first, "start anew") == warned
    told = warnings_of(caplog)
    assert len(told) == warned
    start = f"the largest sub-network is right about {hits} of {images} images, the pretrained"
    assert all(line == f"{start} network about {before}: start anew" for line in told)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins a stage with a network that says the first class, on an image of each class and so
    many ``more`` of the first ones; gives what was found instead of training, each time."""
    found, plain, images = [], blank_network(elastic=False), tmp_path / "images"
    plain.head.fc.bias.set_value(paddle.eye(10)[0])
    write_state(tmp_path / "start.pdparams", plain.state_dict())
    common = {"pretrained": tmp_path / "start.pdparams", "queue_size": 10}
    noise_images(images, number=1)

    def begin(script, more=(), fit=lambda *_: None, **flags):
        flags["backbone"] = f"resnet48{'pinasv2' * (script is stage1)}_mini"
        for name, number in enumerate(more):
            for index in range(number):
                shutil.copy(images / f"val/{name}/0.png", images / f"val/{name}/more{index}.png")
        monkeypatch.setattr(script, "fit", lambda *own: found.append(fit(*own)))
        run(script, monkeypatch, images, tmp_path / "out", **common, **flags)
        return found

    return begin


@pytest.mark.parametrize("script", [stage1, stage2])
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (0, "is right about 1 of 10 images, no more than guessing among 10 classes"),
        (7, "is wrong about most images, so most of what it teaches is wrong: train it longer"),
        (8, ""),
    ],
)
def test_stages_tell_how_good_the_pretrained_network_is(
    script, more, told, begin, tmp_path, caplog
):
    caplog.set_level("INFO")
    begin(script, [more])
    who = f"the pretrained network {tmp_path / 'start.pdparams'}"
    assert f"{who} is right about {more + 1} of {more + 10} validation images" in caplog.text
    warned = [line for line in warnings_of(caplog) if line.startswith(who)]
    assert len(warned) == bool(told) and all(line.startswith(f"{who} {told}") for line in warned)


@pytest.mark.parametrize(("script", "flags"), [(stage1, {}), (stage2, {"eval_freq": 0})])
def test_what_needs_no_validation_images_takes_any(script, flags, begin, tmp_path, caplog):
    images = tmp_path / "images"
    (measure,) = begin(script, fit=lambda *own: own[3], **flags)
    assert measure is not None and "no measurement" not in caplog.text
    (images / "val/0/0.png").write_bytes(b"none")
    for number, bad in enumerate(("val/1/0.png", "val/1", "val"), 2):
        caplog.clear()
        assert begin(script, fit=lambda *own: own[3], **flags)[1:] == [None] * (number - 1)
        assert "no measurement will tell whether training breaks: " in caplog.text
        (images / bad).rename(tmp_path / bad.replace("/", "-"))


@pytest.mark.parametrize(
    ("script", "says", "found"),
    [
        (stage1, 0, {"largest_top1": 151 / 200}),
        (stage1, 1, {"largest_top1": 41 / 200, "broken": 1.0}),
        (stage2, 0, {"largest_top1": 181 / 230, "smallest_top1": 181 / 230}),
        (stage2, 1, {"largest_top1": 41 / 230, "smallest_top1": 41 / 230, "broken": 1.0}),
    ],
)
def test_stages_tell_after_an_epoch_where_training_broke(
    script, says, found, begin, caplog, monkeypatch
):
    """Of 230 images 181 are of the first class, of the 200 that stage 1 tries 151."""
    monkeypatch.setattr(validation, "TRIED", 200)

    def fit(model, options, loader, measure, files):
        supernet = getattr(model.network, "backbone", model.network)
        supernet.head.fc.fn.bias.set_value(paddle.eye(10)[says])
        return measure()

    assert begin(script, [180, 40], fit) == [found]
    told = warnings_of(caplog)
    before = 151 if script is stage1 else 173  # of 230, by what the 200 tell
    assert len(told) == says and all(f"network about {before}: a ranking" in own for own in told)


@pytest.mark.parametrize(("freeze_bn", "eval_freq"), [(True, 1), (True, 0), (False, 1)])
def test_stage_two_tells_of_weights_that_stage_one_broke(
    freeze_bn, eval_freq, begin, tmp_path, caplog
):
    """Not where statistics move: those that training left at first are no one's."""
    broken = blank_network()
    broken.head.fc.fn.bias.set_value(paddle.eye(10)[1])
    write_state(tmp_path / "0.pdparams", broken.state_dict(), {"freeze_bn": True})
    flags = {"freeze_bn": freeze_bn, "eval_freq": eval_freq, "bn_calibration_images": 0}
    begin(stage2, [30], use_ckpt=True, ckpt_dir=tmp_path / "0.pdparams", **flags)
    told = [line for line in warnings_of(caplog) if "such weights breaks easily" in line]
    assert len(told) == freeze_bn and all("1 of 40 images, the pretrained" in line for line in told)


@pytest.mark.parametrize(
    ("script", "who", "flags"),
    [
        (train_supernet, "the best sub-network", {"eval_sample_num": 3}),
        (pretrain, "the network", {"pretrained": "largest.pdparams"}),
        (train_standalone, "the network", {"arch": RESNET48_MINI.smallest().code}),
        (search, "the best network", {"max_macs": "8e6", "generations": 0, "population": 3}),
    ],
)
def test_programs_tell_where_all_guess(script, who, flags, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    write_state(Path("blank.pdparams"), blank_network().state_dict(), {"freeze_bn": True})
    if script in (train_supernet, search):
        flags = {**flags, "ckpt_dir": "blank.pdparams", "tournament": 2}
    else:
        flags = {**flags, "max_epoch": 1, "warmup": 0, "lr": 0.0}
    images = noise_images(tmp_path / "images", number=3)
    run(script, monkeypatch, images, "out", backbone="resnet48_mini", **flags)
    (told,) = warnings_of(caplog)
    if script is pretrain:  # by which some mean a file to start from
        for folder in ("other", "out"):
            with pytest.raises(UserError, match="largest.pdparams is there, and was not made from"):
                run(script, monkeypatch, images, folder, backbone="resnet48_mini", **flags)
            Path("largest.pdparams.sha256").unlink(missing_ok=True)  # as if it came from elsewhere
    for path in Path("out").rglob("history.json"):
        (row,) = read_json(path)["validation"]
        assert row["broken"] == 1 and f"about {30 * row['top1']:.0f} of 30 images" in told
    assert told.startswith(f"{who} is right about ")
    assert "of 30 images, no more than guessing among 10 classes: too little trained, " in told
    assert "broken 1" not in caplog.text


# --- stage two, whole


@pytest.mark.slow
def test_ranking_changes_no_bit_of_training_and_is_that_of_stage_threes_scores(
    tmp_path, truth, monkeypatch
):
    images = noise_images(tmp_path / "images", number=4)
    rows = [(arch.code, acc) for arch, acc in truth.items()]
    truth_file = write_truth(tmp_path / "gt.json", rows)
    paddle.seed(0)
    network = build_network("resnet48_mini", len(CLASSES), elastic=False)
    network.start_as_shortcuts()
    paddle.save(network.state_dict(), str(tmp_path / "pretrained.pdparams"))
    common = {"backbone": "resnet48_mini"}
    flags = {"max_epoch": 2, "lr": 0.02, "warmup": 0, "dyna_batch_size": 1, **common}
    flags["pretrained"] = tmp_path / "pretrained.pdparams"
    history = {}
    for name, more in (("plain", {}), ("ranked", {"rank_gt": truth_file})):
        run(stage2, monkeypatch, images, tmp_path / name, **flags, **more)
        history[name] = json.loads((tmp_path / name / "history.json").read_text())
    for name in ("0", "1", "final"):
        plain, ranked = (
            {key: value.tobytes() for key, value in read_weights(path).items()}
            for path in (tmp_path / folder / f"{name}.pdparams" for folder in history)
        )
        assert plain == ranked, name
    plain, ranked = history["plain"], history["ranked"]
    assert plain["epoch_losses"] == ranked["epoch_losses"]
    for before, after in zip(plain["validation"], ranked["validation"], strict=True):
        assert before == {name: after[name] for name in before}

    files = {"ckpt_dir": tmp_path / "ranked/1.pdparams", "modelarch_file": truth_file}
    run(train_supernet, monkeypatch, images, tmp_path / "stage3", **common, **files)
    scores = json.loads((tmp_path / "stage3/submission.json").read_text()).values()
    accuracy = [entry["acc"] for entry in scores]
    assert len(set(accuracy)) > 2
    assert [row["epoch"] for row in ranked["validation"]] == [0, 1]
    tau = stats.kendalltau(accuracy, list(truth.values())).statistic
    assert ranked["validation"][1]["kendall_tau_b"] == pytest.approx(tau)
