"""Stage one's model and step against NumPy."""

import numpy as np
import paddle
import pytest
from independent import features

from hnas.base.errors import UserError
from hnas.dataset.transforms import normalize
from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import PiNASv2
from hnas.search_space import RESNET48, RESNET48_MINI
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


def views_of(seed=2):
    rng = np.random.default_rng(seed)
    return [
        paddle.to_tensor(rng.integers(0, 256, (BATCH, 3, 32, 32), dtype=np.uint8)) for _ in "ab"
    ]


def step_once(network, sampler, **settings):
    """One step whose optimizer subtracts the gradients as they are."""
    model = ContrastiveModel(network, sampler, **settings)
    trained = [p for p in network.parameters() if not p.stop_gradient]
    model.prepare(paddle.optimizer.SGD(1.0, parameters=trained))
    return model.train_batch([*views_of(), paddle.zeros([BATCH], "int64")])


def state_of(network):
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


class Independent:
    """Stage one's step on a state dict, by functions that share no code with the project."""

    def __init__(self, state, training):
        self.training = training
        self.state = {name: paddle.to_tensor(value) for name, value in state.items()}
        for name, tensor in self.state.items():
            # Paddle's BatchNorm statistics are moved apart, and keys have no gradient.
            trained = name.startswith(("backbone.", "neck.")) and "blocks.24" not in name
            tensor.stop_gradient = not trained or name.endswith(("_mean", "_variance"))

    def embed(self, prefix, view, arch):
        part = {
            name.removeprefix(f"{prefix}backbone."): tensor
            for name, tensor in self.state.items()
            if name.startswith(f"{prefix}backbone.")
        }
        mean = paddle.to_tensor([0.485, 0.456, 0.406]).reshape([1, 3, 1, 1])
        deviation = paddle.to_tensor([0.229, 0.224, 0.225]).reshape([1, 3, 1, 1])
        images = (view.astype("float32") / 255 - mean) / deviation
        space = RESNET48_MINI
        x = features(part, arch.code, images, space.base_channels, space.divisor, self.training)
        hidden = self.state[f"{prefix}neck.hidden.weight"][: x.shape[1]]
        x = x @ hidden + self.state[f"{prefix}neck.hidden.bias"]
        x = paddle.maximum(x, paddle.zeros_like(x)) @ self.state[f"{prefix}neck.project.weight"]
        x = x + self.state[f"{prefix}neck.project.bias"]
        return x / (x * x).sum(1, keepdim=True).sqrt()

    def follow(self, momentum):
        """Move every tensor of the key encoder, BatchNorm's statistics included."""
        for name in list(self.state):
            if name.startswith("key_"):
                query = self.state[name.removeprefix("key_")].detach()
                self.state[name] = self.state[name] * momentum + query * (1 - momentum)

    def step(self, views, passes, momentum):
        """Losses, gradients by name, and the mean of both passes' keys."""
        queue, losses, keys = self.state["queue"], [], []
        for query_arch, key_arch in passes:
            self.follow(momentum)
            key = self.embed("key_", views[1], key_arch).detach()
            query = self.embed("", views[0], query_arch)
            logits = paddle.concat([(query * key).sum(1, keepdim=True), query @ queue], 1)
            logits = logits / TEMPERATURE
            loss = (paddle.logsumexp(logits, 1) - logits[:, 0]).mean()
            loss.backward()
            losses.append(float(loss))
            keys.append(key.numpy())
        gradients = {
            name: tensor.grad.numpy()
            for name, tensor in self.state.items()
            if tensor.grad is not None
        }
        return losses, gradients, (keys[0] + keys[1]) / 2


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("largest", [True, False])
def test_a_step_is_the_independent_computation(network, frozen, largest):
    rng = np.random.default_rng(6)
    for name, tensor in network.state_dict().items():
        if name.endswith("_variance"):
            tensor.set_value(rng.uniform(0.5, 1.5, tensor.shape).astype("float32"))
        elif not name.startswith("queue") and tensor.ndim == 1:
            moved = tensor.numpy() + rng.normal(0, 0.05, tensor.shape)
            tensor.set_value(moved.astype("float32"))
    if frozen:
        freeze_statistics(network)
    before = state_of(network)
    sampler = LargestSampler(RESNET48_MINI, 2) if largest else RandomSampler(RESNET48_MINI, 0, 2)
    path_a, path_b = sampler.sample(0, 0)
    other = Independent(before, training=not frozen)
    losses, gradients, keys = other.step(
        views_of(), [(path_a, path_b), (path_b, path_a)], momentum=0.9
    )
    logs = step_once(network, sampler)
    assert float(logs["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
    after = state_of(network)
    assert len(gradients) > 50 and "neck.project.weight" in gradients
    for name, gradient in gradients.items():
        scale = max(1e-3, np.abs(gradient).max())
        np.testing.assert_allclose(
            before[name] - after[name], gradient, atol=2e-3 * scale, err_msg=name
        )
    # Not normalised again: the mean of two unit vectors is shorter than they are.
    np.testing.assert_allclose(after["queue"][:, :BATCH].T, keys, atol=1e-4)
    statistics = [name for name in before if name.endswith(("_mean", "_variance"))]
    moved = [name for name in statistics if not np.array_equal(before[name], after[name])]
    if frozen:
        # The query encoder's never move; the key encoder's follow them, twice.
        assert not [name for name in moved if not name.startswith("key_")]
        for name in statistics:
            if name.startswith("key_"):
                query = before[name.removeprefix("key_")]
                np.testing.assert_allclose(
                    after[name] - query, 0.81 * (before[name] - query), atol=1e-6
                )
    else:
        assert any(name.startswith("backbone.") for name in moved)


def test_shared_queries_give_the_gradients_of_two_passes(network, monkeypatch):
    """Both passes ask the same here; computing them apart must train alike."""
    freeze_statistics(network)
    before = state_of(network)
    asked = []
    embed = PiNASv2.embed_queries
    monkeypatch.setattr(PiNASv2, "embed_queries", lambda *args: asked.append(args) or embed(*args))
    step_once(network, LargestSampler(RESNET48_MINI, 2))
    assert len(asked) == 1
    together = state_of(network)
    network.set_state_dict({name: paddle.to_tensor(value) for name, value in before.items()})

    def apart(self, view, paths):
        return [self.network.embed_queries(normalize(view), path) for path in paths]

    monkeypatch.setattr(ContrastiveModel, "embed_queries", apart)
    step_once(network, LargestSampler(RESNET48_MINI, 2))
    assert len(asked) == 3
    for name, value in state_of(network).items():
        np.testing.assert_allclose(value, together[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_a_step_trains_queries_only_and_enqueues(network):
    before = state_of(network)
    logs = step_once(network, RandomSampler(RESNET48_MINI, seed=0, number=2))
    after = state_of(network)
    assert np.isfinite(float(logs["loss"]))
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    weights = {name for name in changed if not name.endswith(("_mean", "_variance"))}
    # The key encoder was equal to the query encoder when it was updated.
    assert not any(name.startswith("key_") for name in weights)
    assert {"queue", "queue_pointer", "neck.project.weight"} <= weights
    assert "backbone.blocks.24.fc.fn.weight" not in weights


def test_the_neck_starts_as_the_recipe_says():
    paddle.seed(0)
    neck = PiNASv2(RESNET48, num_classes=10, queue_size=16).neck
    for layer in (neck.hidden, neck.project):
        inputs = layer.weight.shape[0]
        assert not layer.bias.numpy().any()
        assert float(layer.weight.std()) == pytest.approx((2 / inputs) ** 0.5, rel=0.03)


def test_half_precision_keys_are_contrasted_in_float32(network):
    rng = np.random.default_rng(8)
    queries, keys = (paddle.to_tensor(unit_rows(rng, BATCH)).astype("bfloat16") for _ in "ab")
    loss, _ = network.contrast(queries, keys)
    assert loss.dtype == paddle.float32
    rounded = [part.astype("float32").numpy() for part in (queries, keys)]
    assert float(loss) == pytest.approx(info_nce(*rounded, network.queue.numpy())[0], rel=1e-5)
