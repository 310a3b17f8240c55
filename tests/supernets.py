"""Supernets, sub-networks and images for tests of scoring."""

import numpy as np
import paddle

from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI, Architecture


def family(space, seed):
    """Architectures that share prefixes in every way the engine tells apart."""
    rng = np.random.default_rng(seed)
    first = space.sample(rng)
    archs = [first, space.largest(), space.smallest()]
    for _ in range(4):  # the same stages 1 to 3, other stages 4
        other = space.sample(rng)
        archs.append(
            Architecture(
                (*first.depths[:3], other.depths[3]),
                first.stem,
                (*first.widths[:3], other.widths[3]),
            )
        )
    for depth in (2, 3, 4, 5):  # one is the other's prefix
        widths = first.widths[3][:1] * depth
        archs.append(
            Architecture((*first.depths[:3], depth), first.stem, (*first.widths[:3], widths))
        )
    archs += [space.sample(rng) for _ in range(10)]
    return list(dict.fromkeys(archs))


def supernet(space, classes=10, size=32):
    paddle.seed(0)
    name = "resnet48_mini" if space is RESNET48_MINI else "resnet48"
    net = build_network(name, classes)
    net.train()
    with paddle.no_grad():
        for _ in range(10):  # running statistics that keep activations in range
            net(paddle.randn([16, 3, size, size]))
    net.eval()
    return net


def images_for(size, number, classes=10, seed=1):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, 3, size, size), dtype=np.uint8)
    return paddle.to_tensor(images), paddle.to_tensor(rng.integers(0, classes, number))
