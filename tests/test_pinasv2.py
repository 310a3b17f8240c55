"""Stage one's model and step against NumPy."""

import numpy as np
import paddle
import pytest

from hnas.base.errors import UserError
from hnas.models.pinasv2 import PiNASv2
from hnas.search_space import RESNET48_MINI
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import LargestSampler, RandomSampler

BATCH, QUEUE, DIM = 8, 32, 16
TEMPERATURE = 0.2


@pytest.fixture
def network():
    paddle.seed(3)
    return PiNASv2(
        RESNET48_MINI,
        num_classes=10,
        dim=DIM,
        queue_size=QUEUE,
        key_momentum=0.9,
        temperature=TEMPERATURE,
    )


def unit_rows(rng, rows):
    x = rng.normal(size=(rows, DIM)).astype("float32")
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def info_nce(queries, keys, queue):
    """Mean over rows of -log softmax at the own key, and how often that key is the first."""
    logits = np.concatenate([(queries * keys).sum(1, keepdims=True), queries @ queue], 1)
    logits = logits.astype("float64") / TEMPERATURE
    log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return (log_sum - logits[:, 0]).mean(), (logits.argmax(1) == 0).mean()


def test_contrast_is_info_nce(network):
    rng = np.random.default_rng(0)
    queries, keys = unit_rows(rng, BATCH), unit_rows(rng, BATCH)
    loss, hits = network.contrast(paddle.to_tensor(queries), paddle.to_tensor(keys))
    expected_loss, expected_hits = info_nce(queries, keys, network.queue.numpy())
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    assert float(hits) == pytest.approx(expected_hits)


def test_embeddings_are_unit_length_under_any_path(network):
    images = paddle.randn([BATCH, 3, 32, 32])
    for path in (RESNET48_MINI.largest(), RESNET48_MINI.smallest()):
        for embed in (network.embed_queries, network.embed_keys):
            embedding = embed(images, path)
            assert embedding.shape == [BATCH, DIM]
            np.testing.assert_allclose(np.linalg.norm(embedding.numpy(), axis=1), 1, rtol=1e-5)
    assert network.embed_keys(images, path).stop_gradient


def test_two_passes_swap_views_and_paths(network):
    network.eval()  # no statistics move, so that embeddings can be taken again
    views = paddle.randn([BATCH, 3, 32, 32]), paddle.randn([BATCH, 3, 32, 32])
    paths = RESNET48_MINI.largest(), RESNET48_MINI.smallest()
    output = network(*views, *paths)
    queries = [network.embed_queries(v, p).numpy() for v, p in zip(views, paths, strict=True)]
    keys = [network.embed_keys(v, p).numpy() for v, p in zip(views, paths, strict=True)]
    queue = network.queue.numpy()
    loss_0, hits_0 = info_nce(queries[0], keys[1], queue)
    loss_1, hits_1 = info_nce(queries[1], keys[0], queue)
    assert float(output.loss) == pytest.approx((loss_0 + loss_1) / 2, rel=1e-4)
    assert float(output.accuracy) == pytest.approx((hits_0 + hits_1) / 2)
    mean = (keys[0] + keys[1]) / 2
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(output.keys.numpy(), mean, atol=1e-5)


def test_queue_replaces_the_oldest_keys_and_wraps(network):
    rng = np.random.default_rng(1)
    expected = network.queue.numpy().copy()
    for step in range(QUEUE // BATCH + 1):
        keys = unit_rows(rng, BATCH)
        start = step * BATCH % QUEUE
        expected[:, start : start + BATCH] = keys.T
        network.enqueue(paddle.to_tensor(keys))
        np.testing.assert_array_equal(network.queue.numpy(), expected)
    assert int(network.queue_pointer) == BATCH
    with pytest.raises(UserError, match="multiple"):
        network.enqueue(paddle.zeros([5, DIM]))


def test_a_loaded_queue_goes_on_at_its_pointer(network):
    rng = np.random.default_rng(4)
    for _ in range(QUEUE // BATCH - 1):
        network.enqueue(paddle.to_tensor(unit_rows(rng, BATCH)))
    saved = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    assert saved["queue_pointer"].tolist() == [QUEUE - BATCH]
    network.enqueue(paddle.to_tensor(unit_rows(rng, BATCH)))  # now at 0, and loaded over
    network.set_state_dict({name: paddle.to_tensor(value) for name, value in saved.items()})
    expected, last = saved["queue"], QUEUE - BATCH
    for start in (last, 0):
        keys = unit_rows(rng, BATCH)
        expected[:, start : start + BATCH] = keys.T
        network.enqueue(paddle.to_tensor(keys))
        np.testing.assert_array_equal(network.queue.numpy(), expected)
    assert network.queue_pointer.numpy().tolist() == [BATCH]
    assert network.queue_pointer.dtype == paddle.int64


def test_enqueue_never_waits_for_the_device(network, monkeypatch):
    def refuse(*_):
        raise AssertionError("the host read a tensor")

    keys = paddle.to_tensor(unit_rows(np.random.default_rng(5), BATCH))
    for name in ("numpy", "item", "tolist", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(paddle.Tensor, name, refuse)
    network.enqueue(keys)


def test_key_encoder_follows_by_momentum(network):
    query = network.neck.project.weight
    before = network.key_neck.project.weight.numpy().copy()
    np.testing.assert_array_equal(before, query.numpy())
    query.set_value(query + 1.0)
    network.update_key_encoder()
    after = network.key_neck.project.weight.numpy()
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * query.numpy(), atol=1e-6)


def step_once(network, sampler, pairs):
    model = ContrastiveModel(network, sampler, pairs)
    trained = [p for p in network.parameters() if not p.stop_gradient]
    model.prepare(paddle.optimizer.Momentum(0.1, 0.9, parameters=trained))
    rng = np.random.default_rng(2)
    views = [
        paddle.to_tensor(rng.integers(0, 256, (BATCH, 3, 32, 32), dtype=np.uint8)) for _ in "ab"
    ]
    return model.train_batch([*views, paddle.zeros([BATCH], "int64")])


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_step_trains_queries_only_and_enqueues(network, pairs):
    before = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    logs = step_once(network, RandomSampler(RESNET48_MINI, seed=0), pairs)
    after = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    assert np.isfinite(float(logs["loss"]))
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    weights = {name for name in changed if not name.endswith(("_mean", "_variance"))}
    # The key encoder was equal to the query encoder when it was updated.
    assert not any(name.startswith("key_") for name in weights)
    assert {"queue", "queue_pointer", "neck.project.weight"} <= weights
    assert "backbone.blocks.24.fc.fn.weight" not in weights
    norms = np.linalg.norm(after["queue"], axis=0)
    np.testing.assert_allclose(norms, 1, rtol=1e-4)


def test_paths_depend_on_the_position_only(network):
    model = ContrastiveModel(network, RandomSampler(RESNET48_MINI, seed=5))
    model.epoch, model.step = 1, 7
    first = model.paths()
    assert first == model.paths() and len(set(first)) == 2
    model.step = 8
    assert first != model.paths()
    largest = ContrastiveModel(network, LargestSampler(RESNET48_MINI)).paths()
    assert largest == (RESNET48_MINI.largest(), RESNET48_MINI.largest())
