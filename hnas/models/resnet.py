"""ResNet48: the plain network, of any channel plan.

Parameters are named as in the organisers' pretrained weights: ``blocks.0`` is the stem, the
basic blocks follow, the last one is the head (``blocks.24.fc`` in the full network).
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import nn
from paddle.utils import unique_name

from hnas.models.convolution import convolve
from hnas.search_space import ChannelPlan


def conv_bn(cin: int, cout: int, kernel: int, stride: int) -> tuple[nn.Conv2D, nn.BatchNorm2D]:
    """A convolution without bias, padded to keep the size at stride 1, and its BatchNorm."""
    init = nn.initializer.KaimingNormal(fan_in=kernel * kernel * cout)
    conv = nn.Conv2D(
        cin,
        cout,
        kernel,
        stride=stride,
        padding=kernel // 2,
        weight_attr=paddle.ParamAttr(initializer=init),
        bias_attr=False,
    )
    # Files hold this name too, and stay the same to the bit.
    conv.weight.name = f"{unique_name.generate('plain_conv2d')}.w_0"
    return conv, nn.BatchNorm2D(cout)


class Stem(nn.Layer):
    """7x7/2 convolution, BatchNorm, ReLU, 3x3/2 max pooling: [N, 3, H, W] -> [N, C, H/4, W/4]."""

    onednn = False

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.bn = conv_bn(3, channels, kernel=7, stride=2)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2D(kernel_size=3, stride=2, padding=1)

    def forward(self, x):
        return self.maxpool(self.relu(self.bn(convolve(self.conv, x, self.onednn))))


class BasicBlock(nn.Layer):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016): [N, Cin, H, W] -> [N, Cout, ..].

    The shortcut is a 1x1 projection when the channel count changes, else the identity.
    """

    onednn = False

    def __init__(self, cin: int, mid: int, cout: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(cin, mid, kernel=3, stride=stride)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(mid, cout, kernel=3, stride=1)
        self.downsample = None
        if cin != cout:
            self.downsample = nn.Sequential(*conv_bn(cin, cout, kernel=1, stride=stride))

    def forward(self, x):
        shortcut = x
        for layer in self.downsample or ():
            shortcut = convolve(layer, shortcut, self.onednn)
        y = self.relu(self.bn1(convolve(self.conv1, x, self.onednn)))
        return self.relu(self.bn2(convolve(self.conv2, y, self.onednn)) + shortcut)

    def reorder(self) -> None:
        """Sort conv1's channels by the L1 norm of the conv2 slices that read them, descending.

        The block computes the same function, but slicing to fewer channels keeps the important.
        """
        importance = self.conv2.weight.abs().sum(axis=[0, 2, 3])
        order = paddle.argsort(importance, descending=True, stable=True)
        norm = self.bn1
        for tensor in (self.conv1.weight, norm.weight, norm.bias, norm._mean, norm._variance):
            tensor.set_value(paddle.index_select(tensor, order, axis=0))
        self.conv2.weight.set_value(paddle.index_select(self.conv2.weight, order, axis=1))


class Head(nn.Layer):
    """Global average pooling and the classifier: [N, C, H, W] -> [N, num_classes]."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        return self.fc(self.avgpool(x).flatten(1))


class ResNet(nn.Layer):
    """Stem, basic blocks and head of a channel plan: [N, 3, H, W] -> [N, num_classes] logits."""

    def __init__(self, plan: ChannelPlan, num_classes: int = 1000):
        super().__init__()
        self.num_classes = num_classes
        self.depths = self.active_depths = tuple(len(blocks) for blocks in plan.stages)
        self.blocks = nn.LayerList([Stem(plan.stem)])
        for _, cin, mid, cout, stride in plan.blocks():
            self.blocks.append(BasicBlock(cin, mid, cout, stride))
        self.blocks.append(Head(plan.out_channels, num_classes))

    @property
    def stem(self) -> Stem:
        return self.blocks[0]

    @property
    def head(self) -> Head:
        return self.blocks[-1]

    def stage_blocks(self, stage: int) -> list[BasicBlock]:
        """All basic blocks of ``stage`` (0..3)."""
        start = 1 + sum(self.depths[:stage])
        return [self.blocks[start + index] for index in range(self.depths[stage])]

    def active_blocks(self) -> list[BasicBlock]:
        """The basic blocks that ``forward`` runs, in order."""
        return self.leading_blocks(self.active_depths)

    def leading_blocks(self, depths: Sequence[int]) -> list[BasicBlock]:
        """So many blocks of each stage, in order."""
        return [b for stage, depth in enumerate(depths) for b in self.stage_blocks(stage)[:depth]]

    def activate(self, arch) -> None:
        """It has one architecture; of a supernet's the one that runs."""

    def features(self, x):
        """Feature map of the last stage: [N, 3, H, W] -> [N, C, H/32, W/32]."""
        x = self.stem(x)
        for block in self.active_blocks():
            x = block(x)
        return x

    def forward(self, x):
        return self.head(self.features(x))

    @paddle.no_grad()
    def start_as_shortcuts(self) -> None:
        """Scale every block's last BatchNorm by zero: a block begins as its shortcut.

        Deep networks then train from the first step on (Goyal et al., arXiv:1706.02677, 5.1).
        """
        for block in self.active_blocks():
            block.bn2.weight.set_value(paddle.zeros_like(block.bn2.weight))

    @paddle.no_grad()
    def reorder(self) -> None:
        """Sort every block's inner channels by importance; the network's function stays."""
        for block in self.active_blocks():
            block.reorder()
