"""oneDNN's convolutions against sums written out in numpy."""

import hypothesis.strategies as st
import numpy as np
import paddle
import pytest
from hypothesis import given, settings

from hnas.base.onednn import OneDNNError
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
    assert use_onednn(teacher) and teacher.stem.onednn
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
