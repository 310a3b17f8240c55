"""Distillation within a step: its losses and gradients against an independent network's."""

import independent
import numpy as np
import paddle
import pytest
from independent import log_softmax, normalized

from hnas.bench.rank.in_place import InPlaceDistillationModel
from hnas.models.registry import build_network
from hnas.search_space import RESNET48_MINI
from hnas.utils.SampleMethod import SandwichSampler

CLASSES = 10


def batch(seed, size=16):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, size)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_only_the_first_subnetwork_sees_labels_and_it_teaches_the_others(temperature):
    paddle.seed(9)
    net = build_network("resnet48_mini", CLASSES)
    # In float64, since new networks amplify rounding; normalisation gives float32 images.
    net.to(dtype="float64")
    net.forward = lambda x, run=net.forward: run(x.astype("float64"))
    sampler = SandwichSampler(RESNET48_MINI, seed=2, number=3)
    model = InPlaceDistillationModel(net, sampler, temperature=temperature)
    model.prepare(paddle.optimizer.SGD(0.1, parameters=net.parameters()))
    images, labels = batch(11)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = paddle.to_tensor(normalized(images)).astype("float64")
    expected, teacher = [], None
    with paddle.no_grad():
        for arch in sampler.sample(0, 0):
            logits = independent.forward(state, arch.code, x, (20, 32, 64, 128), 1, True).numpy()
            softened = log_softmax(logits / temperature)
            if teacher is None:
                loss = -log_softmax(logits)[np.arange(16), labels].mean()
                teacher = np.exp(softened)
            else:
                loss = -(temperature**2) * (teacher * softened).sum(1).mean()
            expected.append(loss)
    logs = model.train_batch([paddle.to_tensor(images), paddle.to_tensor(labels)])
    codes = [code for code, _ in logs["parts"]]
    assert codes[:2] == [RESNET48_MINI.largest().code, RESNET48_MINI.smallest().code]
    np.testing.assert_allclose([float(loss) for _, loss in logs["parts"]], expected, rtol=1e-5)


def test_a_teacher_in_place_gets_no_gradient_from_its_pupils():
    """With a pupil or without, what only the largest network has gets the same gradient."""
    gradients = []
    for subnetworks in (1, 2):
        paddle.seed(12)
        net = build_network("resnet48_mini", CLASSES)
        model = InPlaceDistillationModel(net, SandwichSampler(RESNET48_MINI, 0, subnetworks))
        before = {name: p.numpy().copy() for name, p in net.named_parameters()}
        model.prepare(paddle.optimizer.SGD(0.1, parameters=net.parameters()))
        model.train_batch([paddle.to_tensor(part) for part in batch(13)])
        gradients.append({name: p.numpy() - before[name] for name, p in net.named_parameters()})
    # Of a filter [out, in, 3, 3] the smallest network has the first 70 to 90 % each way.
    own, shared = 0, 0
    for name, alone in gradients[0].items():
        if alone.ndim == 4 and name.startswith("blocks.") and alone.shape[0] > 90:
            corner = np.s_[-1, -1]
            np.testing.assert_allclose(gradients[1][name][corner], alone[corner], atol=1e-6)
            own += np.abs(alone[corner]).max() > 1e-6
            shared += np.abs(gradients[1][name][0, 0] - alone[0, 0]).max() > 1e-6
    assert own > 3 and shared > 1
