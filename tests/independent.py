"""A second implementation of a sub-network for the tests, sharing no code with the project.

It reads the digits of a code by position, slices a supernet's state dict and calls Paddle's
functional operators.
"""

import numpy as np
import paddle
from paddle.nn import functional as F  # noqa: N812

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


def log_softmax(logits):
    """Of NumPy logits [N, C], in their precision."""
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


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
