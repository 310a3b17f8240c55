"""oneDNN's convolutions against sums written out in numpy; Winograd's of stage 3, too."""

import hypothesis.strategies as st
import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from paddle.nn import functional as F  # noqa: N812

from hnas.base.onednn import OneDNNError
from hnas.evaluation.winograd import (
    CACHE_BYTES,
    LARGEST_MAP,
    POINTS,
    SMALLEST_MAP,
    TILE,
    filters_to_points,
    map_matrices,
    parts_of,
    winograd,
    worth_it,
)
from hnas.models import convolution
from hnas.models.convolution import onednn_conv2d, use_onednn
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI


def by_hand(x, w, stride, padding, dy):
    """Output, input gradient and weight gradient in float64, position by position."""
    kernel = w.shape[2]
    padded = np.pad(x.astype(float), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    height, width = ((s - kernel) // stride + 1 for s in padded.shape[2:])
    y = np.zeros((len(x), len(w), height, width))
    dx, dw = np.zeros_like(padded), np.zeros(w.shape)
    for i in range(height):
        for j in range(width):
            rows = slice(i * stride, i * stride + kernel)
            columns = slice(j * stride, j * stride + kernel)
            window, out = padded[:, :, rows, columns], dy[:, :, i, j]
            y[:, :, i, j] = np.einsum("nckl,ockl->no", window, w)
            dx[:, :, rows, columns] += np.einsum("no,ockl->nckl", out, w)
            dw += np.einsum("no,nckl->ockl", out, window)
    inner = slice(padding, -padding or None)
    return y, dx[:, :, inner, inner], dw


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
    expected = by_hand(x.numpy(), whole[:cout, :cin], stride, padding, dy)
    assert y.shape == list(expected[0].shape)
    scale = kernel * kernel * max(cin, cout, n * dy.shape[2] * dy.shape[3]) ** 0.5
    for found, right in zip((y, x.grad, w.grad[:cout, :cin]), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), right, rtol=0, atol=3e-6 * scale)
    rest = w.grad.numpy().copy()
    rest[:cout, :cin] = 0
    assert not rest.any()
    with paddle.no_grad():
        again = onednn_conv2d(x, w, cout, stride, padding)
    np.testing.assert_array_equal(again.numpy(), y.numpy())


def test_gradients_add_up_over_uses_of_one_weight():
    paddle.seed(1)
    w = paddle.randn([6, 5, 3, 3])
    w.stop_gradient = False
    x = paddle.randn([2, 5, 4, 4])
    onednn_conv2d(x, w, 6, 1, 1).sum().backward()
    once = w.grad.numpy().copy()
    onednn_conv2d(x, w, 6, 1, 1).sum().backward()
    np.testing.assert_allclose(w.grad.numpy(), 2 * once, rtol=1e-6)


def test_inputs_that_are_not_dense():
    paddle.seed(2)
    x, w = paddle.randn([2, 4, 4, 5]), paddle.randn([6, 5, 3, 3])
    view = x.transpose([0, 3, 1, 2])
    expected = paddle.nn.functional.conv2d(view, w, padding=1)
    np.testing.assert_allclose(onednn_conv2d(view, w, 6, 1, 1).numpy(), expected.numpy(), atol=1e-5)


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
    assert use_onednn(teacher) and teacher.stem.conv.onednn
    np.testing.assert_allclose(teacher(images).numpy(), before, atol=1e-5 * np.abs(before).max())


def test_other_precisions_stay_with_paddle():
    network = build_network("resnet48_mini", 10)
    network.to(dtype="float64")
    assert use_onednn(network)
    assert network(paddle.zeros([1, 3, 32, 32], "float64")).dtype == paddle.float64


def test_a_library_that_differs_is_not_used(monkeypatch, caplog):
    network = build_network("resnet48_mini", 10)
    monkeypatch.setattr(convolution, "_largest_difference", lambda: float("nan"))
    assert not use_onednn(network) and not network.onednn
    assert "differ" in caplog.text

    def missing():
        raise OneDNNError("cannot use libdnnl.so.3: gone")

    monkeypatch.setattr(convolution, "_largest_difference", missing)
    assert not use_onednn(network)
    assert "gone" in caplog.text


def test_a_refused_call_is_an_error():
    with pytest.raises(OneDNNError, match="returned"):
        convolution.Convolution((1, 3, 4, 4), (8, 3, 9, 9), 8, 1, 0)


def test_convolutions_are_made_once_and_not_all_kept():
    shapes = [((1, 3, 4, 4), (c, 3, 1, 1), c, 1, 0) for c in (2, 3)]
    first, second = (convolution.convolution_of(*shape) for shape in shapes)
    assert first is not second and convolution.convolution_of(*shapes[0]) is first
    cache = convolution.convolution_of.cache_info()
    assert cache.maxsize == convolution.KEPT_CONVOLUTIONS


# --- Winograd's minimal filtering


def run(x, filters, outputs, bias=None, shortcut=None, relu=False):
    """[N, C, H, W] in and out; the shortcut, too."""
    last = [None if part is None else paddle.to_tensor(to_last(part)) for part in (x, shortcut)]
    y = paddle.full([len(x), *x.shape[2:], outputs], np.nan)
    points = filters_to_points(paddle.to_tensor(filters))
    winograd(last[0], points, outputs, bias, last[1], relu, y)
    return y.numpy().transpose(0, 3, 1, 2)


def to_last(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def exact(x, filters):
    tensors = (paddle.to_tensor(part.astype(np.float64)) for part in (x, filters))
    return F.conv2d(*tensors, padding=1).numpy()


@pytest.mark.parametrize("size", [1, 5, 14, 28])
@pytest.mark.parametrize(
    ("images", "widths", "bias", "added", "relu"),
    [
        (3, (20, 17), True, 0, True),
        (5, (6, 30), True, 33, True),
        (2, (17, 9), False, 9, True),
        (2, (16, 16), True, 16, False),
    ],
)
def test_a_transformed_convolution_is_that_of_float64(size, images, widths, bias, added, relu):
    (inputs, outputs), rng = widths, np.random.default_rng(size)
    x = np.maximum(rng.normal(size=(images, inputs, size, size)), 0).astype(np.float32)
    filters = rng.normal(size=(outputs + 3, inputs + 2, 3, 3)).astype(np.float32)
    offset = rng.normal(size=outputs).astype(np.float32) if bias else None
    shortcut = rng.normal(size=(images, added, size, size)).astype(np.float32) if added else None
    expected = exact(x, filters[:outputs, :inputs])
    if bias:
        expected += offset[:, None, None]
    if added:
        expected += shortcut[:, :outputs]
    if relu:
        expected = np.maximum(expected, 0)
    found = run(x, filters, outputs, offset, shortcut, relu)
    np.testing.assert_allclose(found, expected, atol=2e-6 * 3 * inputs**0.5 * 4)


def test_rounding_stays_small_thanks_to_the_points(monkeypatch):
    """Root mean square error of many channels, over the outputs' deviation."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(4, 512, 8, 8)), 0).astype(np.float32)
    filters = (rng.normal(size=(32, 512, 3, 3)) / 68).astype(np.float32)
    expected = exact(x, filters)

    def error():
        map_matrices.cache_clear()
        return float(np.sqrt(((run(x, filters, 32) - expected) ** 2).mean()) / expected.std())

    own = error()
    with monkeypatch.context() as patch:
        patch.setattr("hnas.evaluation.winograd.FINITE", (0.0, 1.0, -1.0, 2.0, -2.0))
        usual = error()
    map_matrices.cache_clear()
    assert own < 2.5e-6 < 1.25 * usual


def test_many_images_are_computed_in_parts(monkeypatch):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 5, 6, 6)).astype(np.float32)
    filters = rng.normal(size=(6, 5, 3, 3)).astype(np.float32)
    shortcut = rng.normal(size=(7, 8, 6, 6)).astype(np.float32)
    whole = run(x, filters, 6, shortcut=shortcut)
    monkeypatch.setattr("hnas.evaluation.winograd.CACHE_BYTES", 3 * POINTS**2 * 4 * 6 * 4)
    assert [len(part) for part in parts_of(7, 6, 6)] == [2, 2, 3]
    np.testing.assert_allclose(run(x, filters, 6, shortcut=shortcut), whole, atol=1e-5)


@settings(max_examples=50)
@given(st.integers(1, 1500), st.integers(1, 28), st.integers(1, 512))
def test_parts_are_all_images_and_fit_the_cache(images, size, channels):
    parts = parts_of(images, size, channels)
    assert [image for part in parts for image in part] == list(range(images))
    bytes_each = POINTS**2 * (-(-size // TILE)) ** 2 * channels * 4
    assert all(len(part) == 1 or len(part) * bytes_each <= CACHE_BYTES for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("images", "size", "inputs", "outputs", "pays"),
    [
        (16, 14, 256, 256, True),
        (16, 56, 64, 64, False),
        (16, SMALLEST_MAP - 1, 512, 512, False),
        (4, LARGEST_MAP, 128, 128, True),
        (2, 7, 512, 512, False),
        (16, 7, 512, 512, True),
        (2, 14, 208, 232, True),
        (600, 8, 16, 16, False),
        (355, 4, 32, 32, False),
        (64, 16, 56, 64, True),
        (64, 4, 208, 232, True),
    ],
)
def test_it_is_used_where_it_was_measured_to_pay(images, size, inputs, outputs, pays):
    assert worth_it(images, size, inputs, outputs) is pays
