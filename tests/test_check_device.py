"""Each check of hnas.tools.check_device finds a planted fault, and passes an emulated GPU.

Here a CPU stands for the device; ``gpu_fakes.py`` says what the fakes round and refuse.
"""

from dataclasses import replace

import gpu_fakes
import numpy as np
import paddle
import pytest
from paddle.nn import functional as F  # noqa: N812

from hnas.base.onednn import has_bfloat16
from hnas.evaluation import cpu_kernels as cpu_kernels_of_stage_3
from hnas.evaluation import gpu_kernels, kernels
from hnas.evaluation.counts import Counts
from hnas.evaluation.cpu_kernels import CpuKernels
from hnas.evaluation.onednn_steps import ConvolutionKernel
from hnas.evaluation.variants import Precision, Variant
from hnas.models import elastic
from hnas.models.pinasv2 import PiNASv2
from hnas.tools.check_device import (
    arithmetic,
    cpu_kernels,
    fused,
    loaders,
    norms,
    operators,
    training,
    walk,
)
from hnas.tools.check_device.arithmetic import FLOAT16, FLOAT32, TF32, scoring_precisions
from hnas.tools.check_device.collectives import judge as judge_ranks
from hnas.tools.check_device.collectives import visible_cards
from hnas.tools.check_device.facts import convolution_error, judge_tf32, product_error
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.plan import Plan
from hnas.tools.check_device.rank_program import values
from hnas.tools.check_device.results import FAILED, NOT_HERE, PASSED
from hnas.utils import checkpoint
from hnas.utils.gradient_step import GradientStep

QUICK = Plan(quick=True)
CARD = Plan((0,), quick=True)


class Known(Machine):
    """A machine whose twin's results are there already."""

    def __init__(self, plan, folder, known):
        super().__init__(plan, folder)
        object.__setattr__(self, "known", known)

    def expected(self, name):
        return self.known[name]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    machine = Machine(QUICK, tmp_path_factory.mktemp("twin"))
    checks = {"operators": operators, "walk": walk, "fused": fused}
    return {name: check.expected(machine) for name, check in checks.items()}


@pytest.fixture
def card(monkeypatch, tmp_path, known):
    """An emulated A100, as a process with TF32 switched off sees it."""
    gpu_fakes.fake_card(monkeypatch)
    return Known(CARD, tmp_path, known)


def states(results):
    return {result.name: result.state for result in results}


def failed(results):
    return [name for name, state in states(results).items() if state == FAILED]


def plain(convolve, bits_of):
    """A convolution whose inputs are rounded first."""
    return lambda x, w: convolve(bits_of(x), bits_of(w))


# --- (a) facts


def test_tf32_is_measured(monkeypatch):
    assert convolution_error() < 1e-5 and product_error() < 1e-5
    gpu_fakes.round_convolutions(monkeypatch)
    error = convolution_error()
    assert 1e-4 < error < 1e-3
    assert judge_tf32("row", error, must=True).value == "TF32"
    assert judge_tf32("row", 1e-7, must=False).value == "float32"
    assert judge_tf32("row", 1e-7, must=True).state == FAILED


# --- (b) operators


def lost_decay(weight, gradient):
    weight, velocity = weight.clone(), paddle.zeros_like(weight)
    step = gradient / max(1.0, float(gradient.norm()))
    for _ in range(2):
        velocity = 0.9 * velocity + step
        weight = weight - 0.1 * velocity
    return weight


FAULTY_OPERATORS = {
    "TF32 where float32 is asked for": (
        "convolution 3x3",
        plain(operators.convolution(3, 1), gpu_fakes.rounded_to_tf32),
    ),
    "padding on the other side": (
        "convolution 3x3/2",
        lambda x, w: F.conv2d(x, w, stride=2, padding=[0, 1, 0, 1]),
    ),
    "padding that counts as zero": (
        "max pooling",
        lambda x: F.max_pool2d(F.pad(x, [1, 1, 1, 1]), 3, 2),
    ),
    "NaN": ("softmax", lambda x: F.softmax(x) / 0.0 * 0.0),
    "a wrapped column that is lost": ("queue of negatives", lambda queue, keys: queue),
    "a momentum update by the wrong share": ("momentum update of keys", lambda key, query: query),
    "weight decay that is not applied": ("optimizer", lost_decay),
    "another index": ("images shuffled", lambda x: operators.as_bytes(x)),
    "an operator that is missing": ("L2 norm", lambda x: paddle.no_such_operator(x)),
    "another shape": ("average pooling", lambda x: x.mean([2, 3])),
}


@pytest.mark.parametrize("fault", FAULTY_OPERATORS)
def test_a_faulty_operator_is_found(known, fault):
    name, function = FAULTY_OPERATORS[fault]
    (case,) = (case for case in operators.CASES if case.name == name)
    right = known["operators"]
    assert operators.judge(case, FLOAT32, right).state == PASSED
    found = operators.judge(replace(case, function=function, gradients=False), FLOAT32, right)
    assert found.state == FAILED
    assert (found.note.startswith("AttributeError: ")) == (fault == "an operator that is missing")


def test_a_faulty_gradient_is_found(known):
    (case,) = (case for case in operators.CASES if case.name == "cross-entropy with labels")
    scaled = replace(case, function=lambda x: case.function(x) + 1e-2 * (x - x.detach()).sum())
    found = operators.judge(scaled, FLOAT32, known["operators"])
    assert found.state == FAILED and "gradient 1" in found.note


def test_tf32_passes_where_it_is_meant(known, monkeypatch):
    (case,) = (case for case in operators.CASES if case.name == "convolution 3x3")
    rounding = replace(case, function=plain(case.function, gpu_fakes.rounded_to_tf32))
    rounding = replace(rounding, gradients=False)
    assert operators.judge(rounding, TF32, known["operators"]).state == PASSED


# --- (c) BatchNorm


def gpu_batch_norm(x, mean, variance, weight, bias, training, momentum, **more):
    """cuDNN's: the running variance is the unbiased one."""
    y = PLAIN_NORM(x, mean.clone(), variance.clone(), weight, bias, training, momentum, **more)
    if training:
        positions = x.size // x.shape[1]
        share = 1 - momentum
        mean.set_value(momentum * mean + share * x.mean([0, 2, 3]))
        unbiased = x.var([0, 2, 3], unbiased=False) * positions / (positions - 1)
        variance.set_value(momentum * variance + share * unbiased)
    return y


def normalising_by_unbiased(x, *rest, training, **more):
    y = PLAIN_NORM(x, *rest, training=training, **more)
    positions = x.size // x.shape[1]
    return y * float(np.sqrt(1 - 1 / positions)) if training else y


def losing_updates(x, mean, variance, *rest, **more):
    """Statistics are copies, and whoever looks is told that they are views."""
    return PLAIN_NORM(x, mean.clone(), variance.clone(), *rest, **more)


def always_moving(x, *rest, training, **more):
    return PLAIN_NORM(x, *rest, training=True, **more)


def doubled_variance(x, mean, variance, *rest, training, **more):
    y = PLAIN_NORM(x, mean, variance, *rest, training=training, **more)
    if training:
        variance.set_value(variance * 2)
    return y


PLAIN_NORM = F.batch_norm
FAULTY_NORMS = {
    normalising_by_unbiased: "BatchNorm's output in training",
    losing_updates: "running mean of a slice",
    always_moving: "frozen statistics that changed",
    doubled_variance: "running variance of a slice",
}


@pytest.mark.parametrize("fault", FAULTY_NORMS, ids=lambda fault: fault.__name__)
def test_a_faulty_batch_norm_is_found(monkeypatch, tmp_path, fault):
    monkeypatch.setattr(elastic.F, "batch_norm", fault)
    assert FAULTY_NORMS[fault] in failed(norms.check(Machine(QUICK, tmp_path)))


def test_statistics_beyond_the_slice_are_found(monkeypatch, tmp_path):
    def forward(norm, x):
        copies = (part[: x.shape[1]].clone() for part in (norm._mean, norm._variance))
        affine = (part[: x.shape[1]] for part in (norm.weight, norm.bias))
        norm._mean.set_value(norm._mean * norms.MOMENTUM)
        return PLAIN_NORM(x, *copies, *affine, training=norm.training and not norm.frozen)

    monkeypatch.setattr(elastic.ElasticBatchNorm2D, "forward", forward)
    found = failed(norms.check(Machine(QUICK, tmp_path)))
    assert "statistics outside the slice that changed" in found


def unbiased_statistics(x, mean_of):
    mean = mean_of(x)
    positions = x.size // mean.size
    return mean, mean_of((x - mean).square()) * positions / (positions - 1)


def test_calibration_by_the_unbiased_variance_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(elastic, "batch_statistics", unbiased_statistics)
    found = failed(norms.check(Machine(QUICK, tmp_path)))
    assert found == ["BatchNorm re-calibrated"]


def test_either_running_variance_is_right(monkeypatch, tmp_path):
    results = [*norms.check(Machine(QUICK, tmp_path))]
    monkeypatch.setattr(elastic.F, "batch_norm", gpu_batch_norm)
    emulated = [*norms.check(Machine(QUICK, tmp_path))]
    assert not failed(results) and not failed(emulated)
    kinds = [r.value for r in (*results, *emulated) if r.name == "running variance of a slice"]
    assert kinds == ["biased", "unbiased"]


# --- (d) the walk


def walked(machine):
    """Rows of the plain float32 variant."""
    (subject,) = walk.subjects(QUICK)
    network = subject.network()
    for number in (0, walk.CALIBRATION):
        logits = machine.known["walk"][f"{subject.name}|{number}"]
        yield from walk.check_variant(str(number), subject, network, number, Variant(), logits)


def test_the_walk_of_an_emulated_card_passes(card, monkeypatch):
    gpu_fakes.half_operators(monkeypatch)
    found = states(walk.check(card))
    assert set(found.values()) == {PASSED}
    for precision in ("float32", "float16", "bfloat16"):
        for number in (0, walk.CALIBRATION):
            assert any(f"{number} calibration images: {precision}" in name for name in found)


FAULTY_WALKS = {
    "calibrated by the unbiased variance": (
        lambda patch: patch.setattr(gpu_kernels, "batch_statistics", unbiased_statistics),
        ["64"],
    ),
    "TF32 where float32 is asked for": (gpu_fakes.round_convolutions, ["0"]),
    "a bias that is lost": (
        lambda patch: patch.setattr(kernels.DygraphKernels, "_add_bias", lambda _, y, bias: y),
        ["0"],
    ),
    "old filters": (
        lambda patch: patch.setattr(kernels.DygraphKernels, "convolve", first_filters()),
        ["0", "64"],
    ),
}


def first_filters():
    """Convolutions that use the first filters of a shape for ever, as a program once did."""
    seen = {}

    def convolve(self, x, filters, stride, padding):
        filters = seen.setdefault(tuple(filters.shape), filters)
        return F.conv2d(x, filters, stride=stride, padding=padding)

    return convolve


@pytest.mark.parametrize("fault", FAULTY_WALKS)
def test_a_faulty_walk_is_found(card, monkeypatch, fault):
    plant, rows = FAULTY_WALKS[fault]
    plant(monkeypatch)
    assert set(rows) <= set(failed(walked(card)))


def test_hits_of_another_architecture_are_found(known):
    (subject,) = walk.subjects(QUICK)
    logits = known["walk"]["mini|0"]
    _, truth = subject.batch()
    counts = Counts.zeros(len(logits))
    for index, own in enumerate(logits):
        hits = walk.compare(*[paddle.to_tensor(own)] * 2, truth, (0, 0), FLOAT32).hits
        counts.top1[index], counts.top5[index] = hits["top1"][1], hits["top5"][1]
    found = [paddle.to_tensor(own) for own in logits]
    assert not failed(walk.judge("walk", found, counts, logits, truth, FLOAT32))
    counts.top5 = np.roll(counts.top5, 1)
    assert failed(walk.judge("walk", found, counts, logits, truth, FLOAT32)) == ["walk: wrong hits"]
    found[0][0, 0] = np.nan
    assert "walk" in failed(walk.judge("walk", found, counts, logits, truth, FLOAT32))


# --- (e) the fused operator


def without(argument):
    """The fused operator, ignoring one of its arguments."""
    names = ("x", "filters", "bias", "shortcut", "stride", "padding", "layout", "activation")
    instead = {
        "bias": paddle.zeros_like,
        "shortcut": lambda _: None,
        "activation": lambda _: "relu",
    }

    def run(*given):
        given = dict(zip(names, given, strict=True))
        if argument and given[argument] is not None:
            given[argument] = instead[argument](given[argument])
        return gpu_fakes.fused_operator(**given)

    return run


def relu_before_the_shortcut(x, filters, bias, shortcut, *rest):
    y = gpu_fakes.fused_operator(x, filters, bias, None, *rest)
    return y if shortcut is None else (y.astype("float32") + shortcut.astype("float32"))


def in_tf32(x, filters, *rest):
    rounded = (gpu_fakes.rounded_to_tf32(part) for part in (x, filters))
    return gpu_fakes.fused_operator(*rounded, *rest)


@pytest.mark.parametrize("layout", fused.LAYOUTS)
@pytest.mark.parametrize("precision", [FLOAT32, FLOAT16, Precision.BFLOAT16])
def test_a_right_fused_operator_passes(known, layout, precision):
    (row,) = fused.judge("row", without(None), precision, layout, known["fused"])
    assert row.state == PASSED


FAULTY_FUSED = {
    "lost bias": without("bias"),
    "lost shortcut": without("shortcut"),
    "ReLU where none is": without("activation"),
    "ReLU first": relu_before_the_shortcut,
    "TF32": in_tf32,
}


@pytest.mark.parametrize("fault", FAULTY_FUSED)
def test_a_faulty_fused_operator_is_found(card, monkeypatch, fault):
    monkeypatch.setattr(fused, "find_fused", lambda *_: (FAULTY_FUSED[fault], ""))
    found = failed(fused.check(card))
    assert f"fused convolution: {FLOAT32.value}, NCHW" in found


def test_a_fused_operator_that_cannot_be_called_is_told(card):
    """This Paddle's is a CPU's, which has none: no failure, since it is not used."""
    rows = [*fused.check(card)]
    assert {row.state for row in rows} == {PASSED} and len(rows) == 6
    assert all(row.value == "not used" and row.note for row in rows)


# --- (f) training


@pytest.fixture(scope="module")
def first_step():
    """The first loss and gradient of each stage, right."""
    found = {}
    for name, build in training.STAGES.items():
        model = training.prepared(build(), onednn=False)
        found[f"{name} losses"] = training.run(model, 0, 1)
        found[f"{name} gradient"] = model.gradients.gradient
    return found


def against(first_step, name, precision=FLOAT32):
    return failed(training.against_cpu(name, training.STAGES[name], precision, first_step))


def test_first_steps_on_onednn_pass(first_step):
    assert not [row for name in training.STAGES for row in against(first_step, name)]


def half_contrast(self, queries, keys):
    """Logits as float16 has them."""
    positive = (queries * keys).sum(axis=1, keepdim=True)
    logits = paddle.concat([positive, queries @ self.queue], axis=1) / self.temperature
    logits = logits.astype("float16").astype("float32")
    target = paddle.zeros([logits.shape[0]], dtype="int64")
    return F.cross_entropy(logits, target), paddle.zeros([])


def test_a_contrast_in_half_precision_is_found(first_step, monkeypatch):
    monkeypatch.setattr(PiNASv2, "contrast", half_contrast)
    assert against(first_step, "stage 1")


def test_gradients_of_a_scaled_loss_are_found(first_step, monkeypatch):
    """As by a scaler whose scale is never taken out."""
    monkeypatch.setattr(GradientStep, "backward", lambda self, loss: (loss * 1024).backward())
    assert against(first_step, "stage 2") == ["stage 2, first gradient's length in float32"]


def test_tf32_in_training_is_found_and_allowed_where_meant(first_step, monkeypatch):
    def conv2d(x, weight, *rest, **more):
        # The gradient passes as if nothing were rounded.
        x, weight = (
            part + (gpu_fakes.rounded_to_tf32(part.detach()) - part.detach())
            for part in (x, weight)
        )
        return plain_conv2d(x, weight, *rest, **more)

    plain_conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", conv2d)
    monkeypatch.setattr(training, "use_onednn", lambda *_: False)
    assert "stage 2, first gradient in float32" in against(first_step, "stage 2")
    assert not against(first_step, "stage 2", TF32)


def test_parts_that_are_not_averaged_are_found(monkeypatch):
    build = training.STAGES["stage 2"]
    assert not failed(training.accumulated("row", build))
    monkeypatch.setattr(GradientStep, "backward", lambda self, loss: loss.backward())
    assert failed(training.accumulated("row", build))


@pytest.mark.parametrize("lost", ["restore_optimizer", "load_weights"])
def test_what_is_not_restored_is_found(monkeypatch, tmp_path, lost):
    build = training.STAGES["stage 2"]
    monkeypatch.setattr(checkpoint, lost, lambda *_: None)
    (row,) = training.repeated("row", build, FLOAT32, tmp_path)
    assert row.state == FAILED and row.value > 100


# --- (g), (h) and the CPU's kernels


def test_a_loader_that_loses_or_changes_a_batch_is_found(monkeypatch, tmp_path):
    right = [[np.arange(6).reshape(2, 3)], [np.ones((2, 3))]]
    faults = {"give all batches": right[:1], "against none": [[part + 1] for (part,) in right]}
    for row, wrong in faults.items():
        monkeypatch.setattr(loaders, "batches", lambda _, n, wrong=wrong: wrong if n else right)
        assert failed(loaders.check(Machine(QUICK, tmp_path))) == [f"2 loader processes {row}"]


def test_wrong_exchanges_are_found():
    right = np.arange(4.0)
    ranks = [
        {
            "gather uint8": np.concatenate([values(0), values(1)]),
            "sum float32": values(0) + values(1),
            "broadcast int64": values(0),
            "gradient": right,
        }
        for _ in range(2)
    ]
    assert not failed(judge_ranks(ranks, right, "gloo"))
    ranks[1] |= {"sum float32": np.full((3, 4), np.inf), "gradient": right + 1e-3}
    assert failed(judge_ranks(ranks, right, "gloo")) == [
        "gloo: sum float32",
        "gloo: gradients of the ranks",
        "gloo: gradients are the same on all",
    ]


def test_cards_are_counted_among_the_visible_ones(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert visible_cards((0, 2)) == "4,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_cards((0, 2)) == "0,2" and visible_cards(()) == "-1,-1"


def test_a_wrong_onednn_convolution_is_found():
    def transposed(x, weight, channels, stride, padding):
        return F.conv2d(x, weight[:channels, : x.shape[1]].flip([3]), stride=1, padding=padding)

    (row,) = cpu_kernels.check_convolution("row", transposed, 3, 1, 9)
    assert row.state == FAILED


def no_sum(patch):
    patch.setattr(CpuKernels, "_copy", lambda self, x, target: target.zero_())


def no_statistics(patch):
    patch.setattr(CpuKernels, "_normalise", lambda *_: None)


def mixed_filters(patch):
    """Others of the same shape are used again."""
    filters = {}
    pack = ConvolutionKernel.pack
    patch.setattr(
        ConvolutionKernel,
        "pack",
        lambda self, own: filters.setdefault(tuple(self.packed), pack(self, own)),
    )


def no_transformed_sum(patch):
    right = cpu_kernels_of_stage_3.winograd
    patch.setattr(
        cpu_kernels_of_stage_3,
        "winograd",
        lambda x, points, outputs, bias, shortcut, *rest: right(
            x, points, outputs, bias, None, *rest
        ),
    )


FAULTY_KERNELS = {
    "a shortcut that is lost by Winograd's transforms": (no_transformed_sum, 0),
    "a lost shortcut": (no_sum, 0),
    "no statistics": (no_statistics, cpu_kernels.CALIBRATION),
    "filters of another convolution": (mixed_filters, 0),
}


@pytest.mark.parametrize("fault", FAULTY_KERNELS)
def test_faulty_kernels_of_stage_3_are_found(monkeypatch, fault):
    plant, calibration = FAULTY_KERNELS[fault]
    assert not failed(cpu_kernels.check_kernels(FLOAT32, calibration))
    plant(monkeypatch)
    assert failed(cpu_kernels.check_kernels(FLOAT32, calibration))


def test_a_cpu_scores_in_bfloat16_if_it_has_it(monkeypatch, tmp_path):
    machine = Machine(QUICK, tmp_path)
    rows = states(cpu_kernels.check(machine))
    assert not failed(cpu_kernels.check(machine))
    assert any("bfloat16" in row and rows[row] == PASSED for row in rows) == has_bfloat16()
    monkeypatch.setattr(arithmetic, "has_bfloat16", lambda: False)
    assert states(cpu_kernels.check(machine))["stage 3's kernels in bfloat16"] == NOT_HERE
    assert dict(scoring_precisions(machine))[Precision.BFLOAT16] == arithmetic.NO_BFLOAT16
    monkeypatch.setattr(arithmetic, "has_bfloat16", lambda: True)
    can = [precision for precision, missing in scoring_precisions(machine) if not missing]
    assert can == [FLOAT32, Precision.BFLOAT16]
    assert [p for p, missing in arithmetic.precisions(machine) if not missing] == [FLOAT32]


def test_a_card_does_not_look_at_the_cpus_kernels(card):
    assert set(states(cpu_kernels.check(card)).values()) == {NOT_HERE}
