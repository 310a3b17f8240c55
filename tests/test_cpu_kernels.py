"""Stage three's kernels on CPUs against sums written out, and when they are not trusted."""

import gpu_fakes
import numpy as np
import paddle
import pytest
from independent import family, images_for, supernet

from hnas.base.onednn import OneDNNError
from hnas.evaluation.counts import Counts
from hnas.evaluation.kernels import Convolution, Kernels, SlicedWeights
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.variants import CPU_VARIANT, Variant
from hnas.search_space import RESNET48_MINI

SPARE = 3
"""Channels of a whole convolution's filters that are not in use."""
FINE = 1e-5
"""Of rounding, relative to the largest value."""


class ByHand:
    """The operations of kernels in float64, on NumPy's [N, C, H, W] and whole filters."""

    sliced = False

    def __init__(self, seen):
        self.calibration = seen

    def accept(self, x):
        return x.numpy().astype("float64")

    arranged = accept

    def vector(self, values, is_bias):
        return self.accept(values)

    def conv_norm(self, x, conv, stride, padding, relu=False, shortcut=None):
        filters = conv.filters[: conv.outputs, : x.shape[1]]
        windows = windows_of(x, filters.shape[2], stride, padding)
        y = np.einsum("nchwij,ocij->nohw", windows, filters, optimize=True)
        rest = [part.reshape(-1, 1, 1) for part in conv.rest]
        if self.calibration:
            front = y[: self.calibration]
            deviation = np.sqrt(front.var((0, 2, 3), keepdims=True) + 1e-5)
            y = (y - front.mean((0, 2, 3), keepdims=True)) / deviation * rest[0]
        y = y + rest[-1]
        if shortcut is not None:
            y = y + shortcut[:, : conv.outputs]
        return np.maximum(y, 0) if relu else y

    def max_pool(self, x):
        return windows_of(x, 3, 2, 1).max((4, 5))

    def narrow(self, x, channels):
        return x[:, :channels]

    def pooled(self, x):
        return x[self.calibration :].mean((2, 3))

    def classifier(self, weight, bias):
        return lambda features: (
            features.numpy() @ weight.numpy()[: features.shape[1]] + bias.numpy()
        )


def windows_of(x, kernel, stride, padding):
    """[N, C, H, W] -> [N, C, H', W', K, K], with zeros around."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    whole = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))
    return whole[:, :, ::stride, ::stride]


def drawn(rng, *shape, scale=1.0):
    """Of float32, rounded to bfloat16, which is exact in every precision."""
    values = (scale * rng.normal(size=shape)).astype("float32")
    return paddle.to_tensor(values).astype("bfloat16").astype("float32")


def drawn_convolution(kernels, rng, outputs, inputs, size):
    """Of whole filters, or the part in use, and what follows them, as the kernels want them."""
    shape = outputs + SPARE, inputs + SPARE, size, size
    filters = drawn(rng, *shape, scale=1 / (size * inputs**0.5))
    if kernels.sliced:
        filters = filters[:outputs, :inputs].contiguous()
    parts = [drawn(rng, outputs) for _ in range(2 if kernels.calibration else 1)]
    rest = tuple(kernels.vector(part, is_bias=len(parts) == 1) for part in parts)
    return Convolution(kernels.arranged(filters), rest, outputs)


def taken(kernels, found):
    """NumPy's, with activations as [N, C, H, W]."""
    if isinstance(found, np.ndarray):
        return found
    found = Kernels().accept(found, kernels.layout) if found.ndim == 4 else found
    return found.astype("float32").numpy()


@paddle.no_grad()
def results_of(kernels, images, size, channels):
    """Each operation's result; whatever the kernels, of the same numbers."""
    rng = np.random.default_rng(size)
    cin, mid, cout = channels
    images += kernels.calibration

    def draw(*shape):
        return kernels.accept(drawn(rng, *shape))

    shapes = (mid, 3, 7), (mid, cin, 3), (cout, cin, 1), (cout, mid, 3)
    stem, conv1, project, conv2 = (drawn_convolution(kernels, rng, *shape) for shape in shapes)
    x, y = draw(images, cin, size, size), draw(images, mid, size, size)
    classify = kernels.classifier(drawn(rng, cin + SPARE, 7), drawn(rng, 7))
    found = {
        "stem": kernels.conv_norm(draw(images, 3, 4 * size, 4 * size + 2), stem, 2, 3, True),
        "conv1": kernels.conv_norm(x, conv1, 1, 1, True),
        "conv1, stride 2": kernels.conv_norm(x, conv1, 2, 1, True),
        "projection": kernels.conv_norm(x, project, 2, 0),
        "conv2, with a wider shortcut": kernels.conv_norm(y, conv2, 1, 1, True, x),
        "pooling": kernels.max_pool(kernels.accept(drawn(rng, images, cin, size, size).abs())),
        "narrow": kernels.narrow(x, cout),
        "pooled": kernels.pooled(x),
        "classifier": classify(drawn(rng, images, cin)),
        "classifier of fewer features": classify(drawn(rng, images, min(cin, mid))),
    }
    return {name: taken(kernels, each) for name, each in found.items()}


# Size of the map, calibration images, others, and channels: of a block's input, conv1 and conv2.
SHAPES = [
    (1, 0, 5, (20, 17, 6)),
    (1, 24, 1, (17, 6, 17)),
    (2, 16, 3, (20, 17, 6)),
    (4, 6, 3, (18, 17, 17)),
    (7, 0, 3, (33, 16, 20)),
    (8, 2, 3, (17, 48, 16)),
    (11, 0, 3, (50, 57, 48)),
]


KINDS = [
    pytest.param(lambda seen: Kernels(Variant(), seen), id="Paddle, NCHW"),
    pytest.param(lambda seen: Kernels(Variant(layout="NHWC"), seen), id="Paddle, NHWC"),
    pytest.param(lambda seen: Kernels(CPU_VARIANT, seen), id="oneDNN"),
]


@pytest.mark.parametrize(("size", "seen", "images", "channels"), SHAPES)
@pytest.mark.parametrize("make", KINDS)
def test_kernels_compute_what_is_written_out(make, size, seen, images, channels):
    expected, found = (
        results_of(kernels, images, size, channels) for kernels in (ByHand(seen), make(seen))
    )
    for name, right in expected.items():
        near = FINE * np.abs(right).max()
        np.testing.assert_allclose(found[name], right, rtol=0, atol=near, err_msg=name)


# --- when oneDNN's kernels are not trusted


def missing():
    raise OneDNNError("cannot use libdnnl.so.3: gone")


REASONS = {"gone": missing, "differ by inf": lambda: float("inf")}


@pytest.mark.parametrize("reason", REASONS)
def test_without_onednn_paddle_scores_in_float32(reason, monkeypatch, caplog):
    net = supernet(RESNET48_MINI)
    archs = family(RESNET48_MINI, 8)[:5]
    batch = images_for(32, 9)
    right = evaluate_reference(net, archs, [batch])
    assert SharedEvaluator(net, archs).variant == CPU_VARIANT and not caplog.text
    monkeypatch.setattr("hnas.models.convolution._largest_difference", REASONS[reason])
    evaluator = SharedEvaluator(net, archs)
    assert evaluator.variant == Variant()
    assert "several times slower" in caplog.text and reason in caplog.text
    counts = Counts.zeros(len(archs))
    evaluator.evaluate(*batch, counts)
    assert np.all(np.abs(counts.top1 - right.top1) <= counts.near1)


# --- filters


def test_slices_are_the_same_with_little_memory(monkeypatch):
    """Whether copies are kept or made again does not show."""
    net = supernet(RESNET48_MINI)
    last = Kernels(Variant(layout="NHWC"), 1, fused=gpu_fakes.fused_operator)
    every = Kernels(calibration=1), last, Kernels(CPU_VARIANT, 1)
    for capacity in (0, 20_000):
        monkeypatch.setattr("hnas.evaluation.kernels.CACHE_BYTES", capacity)
        for kernels in every:
            weights = SlicedWeights(net, kernels)
            for cin, cout in [(60, 64), (64, 60), (50, 51), (60, 64)]:
                given = weights.get((2, 1, "conv1"), cin, cout)
                whole = net.stage_blocks(2)[1].conv1.fn.weight
                used = whole[:cout, :cin] if kernels.sliced else whole
                np.testing.assert_array_equal(given.filters.numpy(), kernels.arranged(used).numpy())
                assert given.outputs == cout
                assert [part.size for part in given.rest] == [cout] * 2
            assert weights._slices._used <= max(capacity, 64 * 60 * 9 * 4)
