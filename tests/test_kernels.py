"""Convolutions of training and of the walk against sums written out, and when oneDNN's go."""

import hypothesis.strategies as st
import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from independent import family, images_for, supernet

from hnas.evaluation.counts import Counts
from hnas.evaluation.kernels import Convolution, Kernels
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.variants import CPU_VARIANT, Variant
from hnas.models import convolution
from hnas.models.convolution import channels_last_conv2d, onednn_conv2d, use_onednn
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI

SPARE = 3
"""Channels of a whole convolution's filters that are not in use."""


def padded(x, padding):
    """[N, C, H, W] in float64, with zeros around."""
    return np.pad(x.astype("float64"), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))


def windows_of(x, kernel, stride, padding):
    """[N, C, H, W] -> [N, C, H', W', K, K]."""
    window = np.lib.stride_tricks.sliding_window_view
    whole = window(padded(x, padding), (kernel, kernel), axis=(2, 3))
    return whole[:, :, ::stride, ::stride]


def convolved(x, w, stride, padding):
    windows = windows_of(x, w.shape[2], stride, padding)
    return np.einsum("nchwij,ocij->nohw", windows, w, optimize=True)


def gradients(x, w, stride, padding, dy):
    """Of input and weight."""
    windows = windows_of(x, w.shape[2], stride, padding)
    dx = np.zeros_like(padded(x, padding))
    for row, column in np.ndindex(dy.shape[2:]):
        rows, columns = (slice(k * stride, k * stride + w.shape[2]) for k in (row, column))
        dx[:, :, rows, columns] += np.einsum("no,ockl->nckl", dy[:, :, row, column], w)
    inner = slice(padding, -padding or None)
    return dx[:, :, inner, inner], np.einsum("nchwij,nohw->ocij", windows, dy)


@settings(max_examples=25)
@given(
    n=st.integers(1, 5),
    channels=st.tuples(*[st.integers(1, 40)] * 2),
    spare=st.tuples(*[st.integers(0, 9)] * 2),
    size=st.tuples(*[st.integers(1, 9)] * 2),
    window=st.sampled_from([(3, 1), (3, 2), (1, 1), (1, 2), (7, 2)]),
    seed=st.integers(0, 99),
)
def test_convolution_and_gradients_are_those_by_hand(n, channels, spare, size, window, seed):
    (cin, cout), (kernel, stride), padding = channels, window, window[0] // 2
    rng = np.random.default_rng(seed)
    whole = rng.normal(size=(cout + spare[0], cin + spare[1], kernel, kernel)).astype("float32")
    x = paddle.to_tensor(rng.normal(size=(n, cin, *size)).astype("float32"), stop_gradient=False)
    w = paddle.to_tensor(whole, stop_gradient=False)
    y = onednn_conv2d(x, w, cout, stride, padding)
    dy = rng.normal(size=y.shape).astype("float32")
    y.backward(paddle.to_tensor(dy))
    exact = x.numpy(), whole[:cout, :cin], stride, padding
    expected = convolved(*exact), *gradients(*exact, dy)
    assert y.shape == list(expected[0].shape)
    scale = kernel * kernel * max(cin, cout, n * dy.shape[2] * dy.shape[3]) ** 0.5
    for found, right in zip((y, x.grad, w.grad[:cout, :cin]), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), right, rtol=0, atol=3e-6 * scale)
    rest = w.grad.numpy().copy()
    rest[:cout, :cin] = 0
    assert not rest.any()
    with paddle.no_grad():
        view = x.transpose([0, 2, 3, 1]).contiguous()
        last = channels_last_conv2d(view, w, cout, stride, padding)
        # An input that is not dense.
        again = onednn_conv2d(view.transpose([0, 3, 1, 2]), w, cout, stride, padding)
    for found in (again, last.transpose([0, 3, 1, 2])):
        np.testing.assert_array_equal(found.numpy(), y.numpy())


def test_a_supernet_computes_the_same_with_both():
    paddle.seed(3)
    network = build_network("resnet48_mini", 10)
    teacher = build_network("resnet48_mini", 10, elastic=False)
    rng = np.random.default_rng(4)
    images = paddle.to_tensor(rng.normal(size=(16, 3, 32, 32)).astype("float32"))
    for arch in (RESNET48_MINI.largest(), RESNET48_MINI.sample(rng), RESNET48_MINI.smallest()):
        network.activate(arch)
        results = []
        for on in (False, True):
            network.onednn = on
            network.train()
            logits = network(images)
            logits.sum().backward()
            grads = {n: p.grad.numpy() for n, p in network.named_parameters() if p.grad is not None}
            network.clear_gradients(set_to_zero=False)
            results.append((logits.numpy(), grads))
        (plain, plain_grads), (fast, fast_grads) = results
        # BatchNorm over the 16 values of the last stage's maps magnifies the rounding.
        np.testing.assert_allclose(fast, plain, atol=1e-3)
        assert plain_grads.keys() == fast_grads.keys()
        for name, value in plain_grads.items():
            near = 1e-2 * max(1e-3, np.abs(value).max())
            np.testing.assert_allclose(fast_grads[name], value, atol=near, err_msg=name)
    teacher.eval()
    before = teacher(images).numpy()
    assert use_onednn(teacher) and teacher.stem.onednn
    np.testing.assert_allclose(teacher(images).numpy(), before, atol=1e-5 * np.abs(before).max())


def test_other_precisions_stay_with_paddle():
    network = build_network("resnet48_mini", 10)
    network.to(dtype="float64")
    assert use_onednn(network)
    assert network(paddle.zeros([1, 3, 32, 32], "float64")).dtype == paddle.float64


def test_a_refused_call_is_an_error():
    with pytest.raises(RuntimeError, match="returned"):
        convolution.Convolution((1, 3, 4, 4), (8, 3, 9, 9), 8, 1, 0)


def by_hand(x, filters, rest, seen, stride, relu, shortcut):
    """A convolution and its BatchNorm, by the statistics of ``seen`` images or folded into it."""
    y = convolved(x, filters, stride, filters.shape[2] // 2)
    *scale, shift = (part.reshape(-1, 1, 1) for part in rest)
    if seen:
        deviation = np.sqrt(y[:seen].var((0, 2, 3), keepdims=True) + 1e-5)
        y = (y - y[:seen].mean((0, 2, 3), keepdims=True)) / deviation * scale
    y = y + shift + (0 if shortcut is None else shortcut[:, : len(filters)])
    return np.maximum(y, 0) if relu else y


@pytest.mark.parametrize(
    ("size", "seen", "images", "cin", "mid", "cout"),
    [  # of the map; calibration images, others; channels of a block's input, conv1 and conv2
        (1, 0, 5, 20, 17, 6),
        (1, 24, 1, 17, 6, 17),
        (7, 0, 3, 33, 16, 20),
        (8, 2, 3, 17, 48, 16),
    ],
)
@pytest.mark.parametrize("variant", [Variant(), Variant(layout="NHWC"), CPU_VARIANT], ids=str)
@paddle.no_grad()
def test_kernels_compute_what_is_written_out(variant, size, seen, images, cin, mid, cout):
    kernels, rng = Kernels(variant, seen), np.random.default_rng(size)

    def drawn(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype("float32")

    def accepted(x):
        return kernels.accept(paddle.to_tensor(x))

    def check(found, right):
        found = Kernels().accept(found, kernels.layout) if found.ndim == 4 else found
        np.testing.assert_allclose(found.numpy(), right, rtol=0, atol=1e-5 * np.abs(right).max())

    x, y = (drawn(seen + images, channels, size, size) for channels in (cin, mid))
    pixels = drawn(seen + images, 3, 4 * size, 4 * size + 2)
    for taken, outputs, kernel, stride, relu, shortcut in (
        (pixels, mid, 7, 2, True, None),  # the stem
        (x, mid, 3, 1, True, None),  # conv1
        (x, mid, 3, 2, True, None),
        (x, cout, 1, 2, False, None),  # a projection
        (y, cout, 3, 1, True, x),  # conv2, with a wider shortcut
    ):
        inputs = taken.shape[1]
        shape = outputs + SPARE, inputs + SPARE, kernel, kernel
        whole = drawn(*shape, scale=1 / (kernel * inputs**0.5))
        used = np.ascontiguousarray(whole[:outputs, :inputs])
        rest = [drawn(outputs) for _ in range(2 if seen else 1)]
        vectors = [kernels.vector(paddle.to_tensor(part), is_bias=not seen) for part in rest]
        filters = kernels.arranged(paddle.to_tensor(used if kernels.sliced else whole))
        conv = Convolution(filters, tuple(vectors), outputs)
        added = None if shortcut is None else accepted(shortcut)
        found = kernels.conv_norm(accepted(taken), conv, stride, relu, added)
        check(found, by_hand(taken, used, rest, seen, stride, relu, shortcut))
    positive = np.abs(x)
    check(kernels.max_pool(accepted(positive)), windows_of(positive, 3, 2, 1).max((4, 5)))
    check(kernels.narrow(accepted(x), cout), x[:, :cout])
    check(kernels.pooled(accepted(x)), x[seen:].mean((2, 3)))


def missing(*_, **__):
    raise RuntimeError("cannot use libdnnl.so.3: gone")


def nan_at_last(*arguments, **named):
    return channels_last_conv2d(*arguments, **named) * float("nan")


REASONS = {"gone": missing, "differ by nan": nan_at_last}


@pytest.mark.parametrize("reason", REASONS)
def test_without_onednn_paddle_computes_and_the_log_says_why(reason, monkeypatch, caplog):
    net = supernet(RESNET48_MINI)
    archs = family(RESNET48_MINI, 8)[:5]
    batch = images_for(32, 9)
    right = evaluate_reference(net, archs, [batch])
    assert SharedEvaluator(net, archs).variant == CPU_VARIANT and not caplog.text
    monkeypatch.setattr(convolution, "channels_last_conv2d", REASONS[reason])
    evaluator = SharedEvaluator(net, archs)
    assert evaluator.variant == Variant()
    assert "several times slower" in caplog.text and reason in caplog.text
    counts = Counts.zeros(len(archs))
    evaluator.evaluate(*batch, counts)
    assert np.all(np.abs(counts.top1 - right.top1) <= counts.near1)
    caplog.clear()
    assert not use_onednn(net) and not net.onednn
    assert reason in caplog.text
