"""Stage three's shared engine against the reference engine, its parts, and what is written."""

import json

import independent
import numpy as np
import paddle
import pytest
from independent import counts_of, family, first_ones, images_for, supernet

from hnas.architecture_file import read_architectures
from hnas.evaluation.counts import Counts, count_hits
from hnas.evaluation.kernels import Kernels
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.results import warn_if_guessing, write_results
from hnas.evaluation.shared import SharedEvaluator
from hnas.search_space import RESNET48, RESNET48_MINI


def test_a_trees_cost_is_what_its_walk_computes(monkeypatch):
    convolve, parts = Kernels.convolve, []

    def counting(self, x, conv, stride):
        y = convolve(self, x, conv, stride)
        inputs, kernel = x.shape[self.layout.index("C")], conv.filters.shape[2]
        parts.append((y.size * inputs * kernel**2, y.size))
        return y

    monkeypatch.setattr(Kernels, "convolve", counting)
    net, archs = supernet(RESNET48_MINI), family(RESNET48_MINI, 0)
    evaluator = SharedEvaluator(net, archs)
    evaluator.evaluate(*images_for(64, 1), Counts.zeros(len(archs)))
    assert evaluator.tree.cost(64) == tuple(map(sum, zip(*parts, strict=True)))
    assert sorted(evaluator.tree.order.tolist()) == list(range(len(archs)))
    assert evaluator.tree.cost(64)[0] < 0.9 * sum(RESNET48_MINI.macs(a, 64, 0) for a in archs)


@pytest.mark.parametrize(
    ("space", "size", "calibration"),
    [
        *((RESNET48_MINI, *case) for case in ((32, 0), (96, 0), (32, 24), (64, 24))),
        # Widths that are multiples of 8 coincide between blocks: stale filters would show up.
        pytest.param(RESNET48, 64, 0, marks=pytest.mark.slow),
    ],
)
def test_shared_engine_equals_reference(space, size, calibration):
    net = supernet(space, size=size)
    archs = family(space, 3)
    images, labels = images_for(size, 12)
    extra = images_for(size, calibration, seed=2)[0] if calibration else None
    evaluator = SharedEvaluator(net, archs, extra)
    logits = {}
    for index in (0, 3, len(archs) - 1):
        counts, done = Counts.zeros(len(archs)), []
        logits[index] = evaluator.evaluate(images, labels, counts, done.append, watch=index)
        assert sum(done) == len(archs)
    net.train()
    before = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    parts = [(images[part], labels[part]) for part in (slice(5), slice(5, 6), slice(6, None))]
    expected = evaluate_reference(net, archs, parts, extra)
    # Evaluating leaves no trace but the mode.
    assert not any(layer.training for layer in net.sublayers(include_self=True))
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])
    assert 0 < expected.top5.sum() < 12 * len(archs)
    assert np.all(np.abs(counts.top1 - expected.top1) <= counts.near1)
    assert np.all(np.abs(counts.top5 - expected.top5) <= counts.near5)
    assert counts.near1.sum() + counts.near5.sum() < 5
    assert counts.images == expected.images == 12
    # Every sub-network on its own, extracted, and calibrated on its own.
    for index, found in logits.items():
        alone = net.extract(archs[index])
        batch = images if extra is None else paddle.concat([extra, images])
        x = paddle.to_tensor(independent.normalized(batch.numpy()))
        with paddle.no_grad():
            if extra is not None:
                for layer in alone.sublayers():
                    if isinstance(layer, paddle.nn.BatchNorm2D):
                        layer._momentum = 0.0
                alone.train()
                alone(x[:calibration])
            alone.eval()
            own = alone(x[calibration:]).numpy()
        np.testing.assert_allclose(found.numpy(), own, atol=1e-4 * np.abs(own).max())
        right = np.argsort(-own, axis=1) == labels.numpy()[:, None]
        hits = right[:, :1].sum(), right[:, :5].sum()
        assert abs(expected.top1[index] - hits[0]) <= expected.near1[index]
        assert abs(expected.top5[index] - hits[1]) <= expected.near5[index]


def test_hits_and_near_ties():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 40, 12)).astype("float32")
    labels = rng.integers(0, 12, 40)
    logits[0, 0] = 1.0  # a tie of all: the smaller index first
    labels[0] = 2
    logits[1, 1, labels[1]] = np.sort(logits[1, 1])[-1] + 5e-5  # wins by a hair
    found, bad = count_hits(paddle.to_tensor(logits), paddle.to_tensor(labels))
    assert not bad.any()
    for network in range(3):
        order = np.argsort(-logits[network], axis=1, kind="stable")
        rank = (order == labels[:, None]).argmax(1)
        assert (found.top1[network], found.top5[network]) == ((rank < 1).sum(), (rank < 5).sum())
        expected = [(rank[fold::16] < 1).sum() for fold in range(16)]
        assert found.folds[network].tolist() == expected
        later, _ = count_hits(paddle.to_tensor(logits), paddle.to_tensor(labels), first=19)
        assert later.folds[network].tolist() == np.roll(expected, 3).tolist()
    assert found.near1[:2].all() and found.near5[0]


def test_results_are_in_the_order_of_the_file(tmp_path, caplog):
    rng = np.random.default_rng(0)
    archs = {f"arch{index}": RESNET48.sample(rng) for index in (1, 30, 7)}
    counts = counts_of(first_ones([3, 0, 7], 7), [5, 1, 7], [0, 2, 1], [1, 0, 0])
    with caplog.at_level("INFO"):
        write_results(tmp_path, archs, counts)
    codes = [arch.code for arch in archs.values()]
    for name, hits in (("submission.json", (3, 0, 7)), ("submission_top5.json", (5, 1, 7))):
        content = json.loads((tmp_path / name).read_text())
        assert list(content) == ["arch1", "arch30", "arch7"]
        assert list(content.values()) == [
            {"acc": number / 7, "arch": code} for number, code in zip(hits, codes, strict=True)
        ]
    assert (tmp_path / "channel_sample.txt").read_text() == (
        f"{codes[0]} {3 / 7} {5 / 7}\n{codes[1]} 0.0 {1 / 7}\n{codes[2]} 1.0 1.0\n"
    )
    files = {"channel_sample.txt", "submission.json", "submission_top5.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert "3 top-1 and 1 top-5 hits of 21 hang on logits closer than 1e-4" in caplog.text
    # Both JSON files can be read as architectures again.
    for name in ("submission.json", "submission_top5.json"):
        assert read_architectures(tmp_path / name) == archs
    whole = (tmp_path / "submission.json").read_text()
    # Fewer replace neither more, nor what was set aside, nor what cannot be read.
    for last in (*archs, "arch1"):
        (tmp_path / "submission.json").write_text("[]" if last == "arch7" else whole)
        write_results(tmp_path, {last: archs[last]}, counts_of(first_ones([7], 7)))
    kept = [tmp_path / f"submission_of_3{again}.json" for again in ("", "_2", "_3")]
    assert [path.read_text() for path in kept] == 3 * [whole]
    assert len(read_architectures(tmp_path / "submission_top5_of_3.json")) == 3
    assert (tmp_path / "submission_of_inf.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("hits", "images", "classes", "warned"),
    [
        ([0], 4000, 100, True),
        ([31, 61, 40], 4000, 100, True),  # the best of three passes 40 and 3.4 times 6.3 so rarely
        ([31, 62, 40], 4000, 100, False),
        ([66] + 999 * [40], 4000, 100, True),  # of 1,000 it takes 4.75 times
        ([9], 40, 10, True),
        ([2], 2, 2, False),  # nothing to tell by
        ([47] + 499 * [45], 60, 2, False),  # the best may be luck, not all
        ([40], 40, 1, False),
    ],
)
def test_scores_of_guessing_are_told(hits, images, classes, warned, caplog):
    warn_if_guessing(counts_of(first_ones(hits, images)), classes, "the best sub-network")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    if warned:
        (line,) = caplog.messages
        assert "\n" not in line
        start = f"the best sub-network is right about {max(hits)} of {images} images, no more than"
        assert line.startswith(f"{start} guessing among {classes} classes: ")
