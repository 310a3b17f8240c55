"""The weight-sharing supernet: a ResNet on PaddleSlim's elastic layers, and cutting one out."""

from __future__ import annotations

import logging

import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812
from paddleslim.nas.ofa.convert_super import supernet
from paddleslim.nas.ofa.layers import SuperBatchNorm2D, SuperConv2D
from paddleslim.nas.ofa.layers_base import Block

from hnas.dataset.transforms import normalize
from hnas.models.calibration import recalibrate
from hnas.models.convolution import onednn_conv2d, onednn_takes
from hnas.models.resnet import ResNet
from hnas.search_space import RATIOS, Architecture, SearchSpace

logger = logging.getLogger(__name__)


class ElasticBatchNorm2D(SuperBatchNorm2D):
    """BatchNorm over the first C channels: [N, C, H, W] -> [N, C, H, W].

    Scale, shift and running statistics are slices of shared ones. In training the active slice of
    the statistics is updated in place, unless they are ``frozen``: then training normalises by
    them, as evaluation does, and never changes them; scale and shift train in either case.

    PaddleSlim's own forward decides at its first call which of the two it does for ever. Whoever
    traces or evaluates a supernet before training it has frozen it without saying so; the public
    code of CVPR 2022 Track 1 does, its winners' included. Here it is a choice.
    """

    frozen = False

    def forward(self, x):
        channels = x.shape[1]
        mean, variance = self._mean[:channels], self._variance[:channels]
        moving = self.training and not self.frozen
        y = F.batch_norm(
            x,
            mean,
            variance,
            self.weight[:channels],
            self.bias[:channels],
            training=moving,
            momentum=self._momentum,
            epsilon=self._epsilon,
            data_format=self._data_format,
        )
        if moving and not shares_storage(mean, self._mean):
            self._mean[:channels] = mean
            self._variance[:channels] = variance
        return y


def freeze_statistics(network: nn.Layer) -> None:
    """Let all elastic BatchNorms of ``network`` train at the running statistics that they have."""
    for layer in network.sublayers():
        if isinstance(layer, ElasticBatchNorm2D):
            layer.frozen = True


def shares_storage(part: paddle.Tensor, whole: paddle.Tensor) -> bool:
    """Whether a leading slice is a view of ``whole``, as by Paddle's default, or a copy."""
    return part.data_ptr() == whole.data_ptr()


class ElasticResNet(ResNet):
    """A supernet of ``space``: one set of weights, any sub-network active at a time.

    ``activate`` sets the sub-network; every forward until the next call runs it. Parameters
    are named as in :class:`ResNet` with PaddleSlim's ``.fn`` before the last part of the
    convolutions' and the classifier's names.

    Attributes:
        mixed: whether the running statistics are, or may be, a mixture of several sub-networks',
            as training at batch statistics leaves them. Whoever loads weights says so.
    """

    onednn = False
    mixed = False

    def __init__(self, space: SearchSpace, num_classes: int = 1000):
        super().__init__(space.shared_plan(space.largest()), num_classes)
        self.space = space
        # With a largest ratio of 1 the layers keep their sizes; the channel counts of a
        # forward are given exactly, by layers_forward.
        with supernet(expand_ratio=list(RATIOS)) as converter:
            converter.convert(self)
        _replace_batch_norms(self)
        for layer in self.sublayers():
            if isinstance(layer, Block):
                layer.set_supernet(self)
        self._channels: dict[str, int] = {}
        self.activate(space.largest())

    @property
    def architecture(self) -> Architecture:
        """The active sub-network."""
        return self._architecture

    @property
    def frozen(self) -> bool:
        """Whether BatchNorm trains at frozen statistics."""
        return self.stem.bn.frozen

    def activate(self, arch: Architecture) -> None:
        """Make ``arch`` the sub-network that forward runs.

        Raises:
            ArchitectureError: ``arch`` needs a projection that the shared weights do not hold.
        """
        plan = self.space.shared_plan(arch)
        self._architecture = arch
        self._channels = {self.stem.conv.key: plan.stem}
        for stage, blocks in enumerate(plan.stages):
            for block, (mid, cout) in zip(self.stage_blocks(stage), blocks, strict=False):
                self._channels[block.conv1.key] = mid
                self._channels[block.conv2.key] = cout
                if block.downsample is not None:
                    self._channels[block.downsample[0].key] = cout
        self._channels[self.head.fc.key] = self.num_classes

    def active_blocks(self):
        """The basic blocks of the active sub-network, in order."""
        return [
            block
            for stage, depth in enumerate(self._architecture.depths)
            for block in self.stage_blocks(stage)[:depth]
        ]

    def layers_forward(self, block: Block, x: paddle.Tensor) -> paddle.Tensor:
        """Run an elastic layer at the active width; PaddleSlim's blocks call this."""
        layer, channels = block.fn, self._channels[block.key]
        if self.onednn and isinstance(layer, SuperConv2D) and onednn_takes(x):
            return onednn_conv2d(x, layer.weight, channels, layer._stride[0], layer._padding)
        return layer(x, channel=channels)

    def features(self, x):
        """Feature map of the active sub-network's last stage."""
        moves = self.training and not self.frozen and not self.mixed
        if moves and self._architecture != self.space.largest():
            self.mixed = True
        return super().features(x)

    @paddle.no_grad()
    def extract(self, arch: Architecture, calibration: paddle.Tensor | None = None) -> ResNet:
        """A stand-alone network of ``arch`` with copies of the shared weights' slices.

        Args:
            calibration: uint8 images [N, 3, H, W] whose batch statistics BatchNorm gets, as in
                scoring with ``bn_calibration_images``; None takes the running statistics, with a
                warning where they are a mixture (see ``mixed``).

        Raises:
            ArchitectureError: as :meth:`activate`.
        """
        net = ResNet(self.space.shared_plan(arch), self.num_classes)
        net.set_state_dict(self.sliced_state(arch, net))
        if calibration is not None:
            recalibrate(net, normalize(calibration))
        elif self.mixed:
            logger.warning(
                "extracted at running statistics that are, as far as is known, a mixture of many "
                "sub-networks': accuracy is lost; give the calibration images that it was scored "
                "with, or load the supernet by load_supernet, which knows of frozen statistics"
            )
        net.train() if self.training else net.eval()
        return net

    def sliced_state(self, arch: Architecture, net: ResNet) -> dict[str, paddle.Tensor]:
        """The shared weights of ``arch``, named as in the stand-alone ``net`` of that code."""
        pairs = [(net.stem, self.stem), (net.head, self.head)]
        for stage, depth in enumerate(arch.depths):
            pairs += zip(net.stage_blocks(stage), self.stage_blocks(stage)[:depth], strict=True)
        names = {id(tensor): name for name, tensor in net.state_dict().items()}
        state = {}
        for part, shared_part in pairs:
            shared = plain_state(shared_part)
            for name, tensor in part.state_dict().items():
                leading = tuple(slice(0, size) for size in tensor.shape)
                state[names[id(tensor)]] = shared[name][leading].clone()
        return state


def plain_name(name: str) -> str:
    """A supernet's parameter name as the plain network has it: without PaddleSlim's ``.fn``."""
    return name.replace(".fn.", ".")


def plain_state(layer: nn.Layer) -> dict[str, paddle.Tensor]:
    """State of a part of a supernet under the plain network's names."""
    return {plain_name(name): tensor for name, tensor in layer.state_dict().items()}


def _replace_batch_norms(layer: nn.Layer) -> None:
    for name, child in list(layer.named_children()):
        if isinstance(child, nn.BatchNorm2D):
            setattr(
                layer,
                name,
                ElasticBatchNorm2D(
                    child.weight.shape[0], momentum=child._momentum, epsilon=child._epsilon
                ),
            )
        else:
            _replace_batch_norms(child)
