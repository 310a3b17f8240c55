"""A second implementation of a sub-network for the tests, and supernets to compare with it.

The former shares no code with the project: it reads the digits of a code by position, slices a
supernet's state dict and calls Paddle's functional operators.
"""

import json

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812
from PIL import Image

from hnas.evaluation.counts import Counts
from hnas.models.pinasv2 import build_network
from hnas.ranking.agreement import FOLDS
from hnas.ranking.costs import all_parts
from hnas.search_space import RESNET48_MINI, Architecture

RATIO = {1: 1.0, 2: 0.95, 3: 0.9, 4: 0.85, 5: 0.8, 6: 0.75, 7: 0.7}
DEPTHS = (5, 5, 8, 5)


def nearest_multiple(value, divisor):
    """Nearest multiple of divisor to value (upward at a tie), not under nine tenths of it."""
    candidates = [k * divisor for k in range(1, int(value) + 2) if k * divisor >= 0.9 * value]
    return min(candidates, key=lambda c: (abs(c - value), -c))


def width(base, digit, divisor):
    return nearest_multiple(round(base * RATIO[digit], 6), divisor)


def layers(code, base_channels, divisor):
    """(stem channels, [(stage, block, mid, out, stride)]) of a 52-digit code."""
    depths = [int(d) for d in code[1:5]]
    position, blocks = 6, []
    for stage in range(4):
        for block in range(depths[stage]):
            mid, out = (
                width(base_channels[stage], int(code[position + 2 * block + conv]), divisor)
                for conv in (0, 1)
            )
            blocks.append((stage, block, mid, out, 2 if stage and not block else 1))
        position += 2 * DEPTHS[stage]
    return width(base_channels[0], int(code[5]), divisor), blocks


def forward(state, code, images, base_channels, divisor, training):
    """Logits of ``images`` under the sub-network ``code`` of a supernet's state dict."""
    x = features(state, code, images, base_channels, divisor, training)
    head = f"blocks.{1 + sum(DEPTHS)}.fc.fn"
    return x @ state[f"{head}.weight"][: x.shape[1]] + state[f"{head}.bias"]


def features(state, code, images, base_channels, divisor, training):
    """The averaged feature map [N, C] in front of the classifier."""

    def norm(x, name):
        c = x.shape[1]
        mean, variance = state[f"{name}._mean"][:c], state[f"{name}._variance"][:c]
        if training:
            mean, variance = x.mean([0, 2, 3]), x.var([0, 2, 3], unbiased=False)
        scale, shift = state[f"{name}.weight"][:c], state[f"{name}.bias"][:c]
        factor = scale / paddle.sqrt(variance + 1e-5)
        return x * factor.reshape([1, c, 1, 1]) + (shift - mean * factor).reshape([1, c, 1, 1])

    def conv(x, name, out, stride, padding):
        weight = state[f"{name}.fn.weight"][:out, : x.shape[1]]
        return F.conv2d(x, weight, stride=stride, padding=padding)

    stem, blocks = layers(code, base_channels, divisor)
    x = F.relu(norm(conv(images, "blocks.0.conv", stem, 2, 3), "blocks.0.bn"))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, block, mid, out, stride in blocks:
        name = f"blocks.{1 + sum(DEPTHS[:stage]) + block}"
        shortcut = x
        if stage and not block:
            shortcut = norm(conv(x, f"{name}.downsample.0", out, stride, 0), f"{name}.downsample.1")
        y = F.relu(norm(conv(x, f"{name}.conv1", mid, stride, 1), f"{name}.bn1"))
        x = F.relu(norm(conv(y, f"{name}.conv2", out, 1, 1), f"{name}.bn2") + shortcut)
    return x.mean([2, 3])


def normalized(images):
    """uint8 images [N, 3, H, W] by ImageNet's normalisation, in float32."""
    mean, std = np.float32([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 1, 3, 1, 1)
    return (images.astype("float32") / np.float32(255) - mean) / std


def first_place_size(code):
    """The first place's size, digit by digit, in exact arithmetic."""
    tenths = (640, 704, 1088, 1216)  # of a channel, in full widths

    def convolution(stage, digit):
        thousandths = tenths[stage] * (105 - 5 * digit)
        return -(-thousandths // 8000) * 8

    size, position = convolution(0, int(code[5])), 6
    for stage, deepest in enumerate(DEPTHS):
        digits = code[position : position + 2 * deepest]
        size += sum(convolution(stage, int(digit)) for digit in digits if digit != "0")
        position += 2 * deepest
    return size


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


@paddle.no_grad()
def calm(network):
    """Scale the last BatchNorm of every block down, as trained networks have it.

    With scales of 1 untrained blocks magnify differences of rounding some ten times a step.
    """
    for block in network.active_blocks():
        block.bn2.weight.scale_(0.1)


def images_for(size, number, classes=10, seed=1):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, 3, size, size), dtype=np.uint8)
    return paddle.to_tensor(images), paddle.to_tensor(rng.integers(0, classes, number))


def validation_images(root):
    """All images of ``root/val`` as networks see them, by Pillow and NumPy alone, and labels."""
    pixels, labels = [], []
    for path in sorted((root / "val").glob("*/*.png")):
        image = Image.open(path).convert("RGB")
        assert image.size == (40, 40)
        image = image.resize((37, 37), Image.Resampling.BILINEAR).crop((2, 2, 34, 34))
        pixels.append(np.asarray(image).transpose(2, 0, 1))
        labels.append(int(path.parent.name))
    return paddle.to_tensor(normalized(np.array(pixels))), np.array(labels)


class Images:
    """What the engine takes of :class:`hnas.evaluation.images.ScoredImages`: noise of 32 px."""

    size, copies = 32, ""

    def __init__(self, number, classes):
        self.batches = images_for(self.size, number, classes, seed=2)

    def __len__(self):
        return len(self.batches[1])

    def batch(self, start, stop):
        return tuple(part[start:stop] for part in self.batches)


def counts_of(right, top5=None, near1=None, near5=None):
    """Counts of architectures that are right about given images [architectures, N].

    Near ties are none unless given.
    """
    right = np.asarray(right, dtype=bool)
    images = right.shape[1]
    top1 = right.sum(axis=1)
    folds = np.stack([right[:, fold::FOLDS].sum(axis=1) for fold in range(FOLDS)], axis=1)
    none = np.zeros_like(top1)
    columns = (top1, top1 if top5 is None else top5, near1, near5)
    return Counts(*(np.array(none if c is None else c) for c in columns), images, folds)


def first_ones(numbers, images):
    """Right about the first so many images; bool [architectures, images]."""
    return np.arange(images) < np.reshape(numbers, [-1, 1])


def latency_file(folder, **changes):
    """A file of invented times, as hnas.tools.latency writes it but for the changes."""
    times = {part.name: round(0.1 + i / 1000, 6) for i, part in enumerate(all_parts(RESNET48_MINI))}
    content = {"format": 1, "backbone": "resnet48_mini", "sample_space": "released"}
    content |= {"image_size": 32, "num_classes": 10, "batch_size": 1, "threads": 1}
    content |= dict.fromkeys(("device", "processor", "engine", "paddle"), "some")
    path = folder / "latency.json"
    path.write_text(json.dumps(content | {"milliseconds": times} | changes))
    return path
