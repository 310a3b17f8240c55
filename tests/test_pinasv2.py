"""Stage one's model and step against NumPy."""

import numpy as np
import paddle
import pytest
from independent import features, normalized

from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import PiNASv2
from hnas.search_space import RESNET48, RESNET48_MINI
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FixedSampler, RandomSampler

BATCH, QUEUE, DIM = 8, 32, 16
TEMPERATURE = 0.2


@pytest.fixture
def network():
    paddle.seed(3)
    sizes = {"num_classes": 10, "dim": DIM, "queue_size": QUEUE}
    return PiNASv2(RESNET48_MINI, key_momentum=0.9, temperature=TEMPERATURE, **sizes)


def unit_rows(rng, rows):
    x = rng.normal(size=(rows, DIM)).astype("float32")
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def info_nce(queries, keys, queue):
    """Mean over rows of -log softmax at the own key, and how often that key is the first."""
    logits = np.concatenate([(queries * keys).sum(1, keepdims=True), queries @ queue], 1)
    logits = logits.astype("float64") / TEMPERATURE
    log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return (log_sum - logits[:, 0]).mean(), (logits.argmax(1) == 0).mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contrast_is_info_nce_in_float32(dtype, network):
    rng = np.random.default_rng(0)
    parts = [paddle.to_tensor(unit_rows(rng, BATCH)).astype(dtype) for _ in "qk"]
    loss, hits = network.contrast(*parts)
    rounded = [part.astype("float32").numpy() for part in parts]
    expected_loss, expected_hits = info_nce(*rounded, network.queue.numpy())
    assert loss.dtype == paddle.float32
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    assert float(hits) == pytest.approx(expected_hits)


def test_queue_replaces_the_oldest_keys_and_wraps_also_when_loaded(network):
    rng = np.random.default_rng(1)
    expected = network.queue.numpy().copy()
    for step in range(2 * QUEUE // BATCH + 1):
        keys = unit_rows(rng, BATCH)
        start = step * BATCH % QUEUE
        expected[:, start : start + BATCH] = keys.T
        network.enqueue(paddle.to_tensor(keys))
        np.testing.assert_array_equal(network.queue.numpy(), expected)
        saved = state_of(network)
        assert saved["queue_pointer"].tolist() == [(start + BATCH) % QUEUE]
        if step % 2:
            # What comes after is loaded over.
            network.enqueue(paddle.to_tensor(unit_rows(rng, BATCH)))
            network.set_state_dict({name: paddle.to_tensor(v) for name, v in saved.items()})
    assert network.queue_pointer.dtype == paddle.int64


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
        own = f"{prefix}backbone."
        part = {n.removeprefix(own): t for n, t in self.state.items() if n.startswith(own)}
        images = paddle.to_tensor(normalized(view.numpy()))
        space = RESNET48_MINI
        training = self.training and not prefix  # keys are normalised by running statistics
        x = features(part, arch.code, images, space.base_channels, space.divisor, training)
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
        gradients = {n: t.grad.numpy() for n, t in self.state.items() if t.grad is not None}
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
    sampler = RandomSampler(RESNET48_MINI, 0, 2)
    if largest:
        sampler = FixedSampler(RESNET48_MINI.largest(), 2)
    path_a, path_b = sampler.sample(0, 0)
    views = [paddle.to_tensor(rng.integers(0, 256, (BATCH, 3, 32, 32), np.uint8)) for _ in "ab"]
    other = Independent(before, training=not frozen)
    losses, gradients, keys = other.step(views, [(path_a, path_b), (path_b, path_a)], momentum=0.9)
    # The optimizer subtracts the gradients as they are.
    model = ContrastiveModel(network, sampler)
    trained = [p for p in network.parameters() if not p.stop_gradient]
    model.prepare(paddle.optimizer.SGD(1.0, parameters=trained))
    logs = model.train_batch([*views, paddle.zeros([BATCH], "int64")])
    assert float(logs["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
    after = state_of(network)
    norm = np.sqrt(sum((gradient.astype(float) ** 2).sum() for gradient in gradients.values()))
    assert float(logs["norm"]) == pytest.approx(norm, rel=1e-3)
    assert len(gradients) > 50 and "neck.project.weight" in gradients
    for name, gradient in gradients.items():
        scale = max(1e-3, np.abs(gradient).max())
        np.testing.assert_allclose(
            before[name] - after[name], gradient, atol=2e-3 * scale, err_msg=name
        )
    # Nothing else trains: the key encoder follows by momentum, twice, and the classifier stays.
    for name in before.keys() - gradients.keys():
        if name.startswith("key_") and not name.endswith(("_mean", "_variance")):
            expected = other.state[name].numpy()
            np.testing.assert_allclose(after[name], expected, atol=1e-6, err_msg=name)
        elif name.startswith("backbone.blocks.24"):
            np.testing.assert_array_equal(after[name], before[name])
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


def test_the_neck_starts_as_the_recipe_says():
    paddle.seed(0)
    neck = PiNASv2(RESNET48, num_classes=10, queue_size=16).neck
    for layer in (neck.hidden, neck.project):
        inputs = layer.weight.shape[0]
        assert not layer.bias.numpy().any()
        assert float(layer.weight.std()) == pytest.approx((2 / inputs) ** 0.5, rel=0.03)
