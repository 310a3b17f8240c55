"""The weight-sharing supernet: a ResNet on PaddleSlim's layers, cutting out, re-calibrating."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812
from paddleslim.nas.ofa.convert_super import supernet
from paddleslim.nas.ofa.layers import SuperBatchNorm2D, SuperConv2D
from paddleslim.nas.ofa.layers_base import Block

from hnas.base.errors import UserError
from hnas.dataset.transforms import normalize
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
        # By Paddle's default the slices are views, which have been updated already.
        if moving and mean.data_ptr() != self._mean.data_ptr():
            self._mean[:channels] = mean
            self._variance[:channels] = variance
        return y


def freeze_statistics(network: nn.Layer) -> None:
    """Let all elastic BatchNorms of ``network`` train at the running statistics that they have."""
    for layer in network.sublayers():
        if isinstance(layer, ElasticBatchNorm2D):
            layer.frozen = True


class ElasticResNet(ResNet):
    """A supernet of ``space``: one set of weights, any sub-network active at a time.

    ``activate`` sets the sub-network; every forward until the next call runs it. Parameters
    are named as in :class:`ResNet` with PaddleSlim's ``.fn`` before the last part of the
    convolutions' and the classifier's names.

    Attributes:
        architecture: the active sub-network.
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
    def frozen(self) -> bool:
        """Whether BatchNorm trains at frozen statistics."""
        return self.stem.bn.frozen

    def activate(self, arch: Architecture) -> None:
        """Make ``arch`` the sub-network that forward runs.

        :class:`UserError` if it needs a projection that the shared weights do not hold.
        """
        plan = self.space.shared_plan(arch)
        self.architecture, self.active_depths = arch, arch.depths
        self._channels = {self.stem.conv.key: plan.stem}
        for stage, blocks in enumerate(plan.stages):
            for block, (mid, cout) in zip(self.stage_blocks(stage), blocks, strict=False):
                self._channels[block.conv1.key] = mid
                self._channels[block.conv2.key] = cout
                if block.downsample is not None:
                    self._channels[block.downsample[0].key] = cout
        self._channels[self.head.fc.key] = self.num_classes

    def layers_forward(self, block: Block, x: paddle.Tensor) -> paddle.Tensor:
        """Run an elastic layer at the active width; PaddleSlim's blocks call this."""
        layer, channels = block.fn, self._channels[block.key]
        if self.onednn and isinstance(layer, SuperConv2D) and onednn_takes(x):
            return onednn_conv2d(x, layer.weight, channels, layer._stride[0], layer._padding)
        return layer(x, channel=channels)

    def features(self, x):
        """Feature map of the active sub-network's last stage."""
        moves = self.training and not self.frozen and not self.mixed
        if moves and self.architecture != self.space.largest():
            self.mixed = True
        return super().features(x)

    @paddle.no_grad()
    def extract(self, arch: Architecture, calibration: paddle.Tensor | None = None) -> ResNet:
        """A stand-alone network of ``arch`` with copies of the shared weights' slices.

        ``calibration`` are uint8 images [N, 3, H, W] whose batch statistics BatchNorm gets, as in
        scoring with ``bn_calibration_images``; None takes the running statistics, with a warning
        where they are a mixture (see ``mixed``). Errors are those of :meth:`activate`.
        """
        net = ResNet(self.space.shared_plan(arch), self.num_classes)
        net.set_state_dict(self.sliced_state(arch, net))
        if calibration is not None:
            net.eval()
            measure(net, batch_norms(net), normalize(calibration))
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
        parts = [self.stem, *self.leading_blocks(arch.depths), self.head]
        state = {}
        for index, (part, shared_part) in enumerate(zip(net.blocks, parts, strict=True)):
            shared = {plain_name(n): tensor for n, tensor in shared_part.state_dict().items()}
            for name, tensor in part.state_dict().items():
                leading = tuple(slice(0, size) for size in tensor.shape)
                state[f"blocks.{index}.{name}"] = shared[name][leading].clone()
        return state


def plain_name(name: str) -> str:
    """A supernet's parameter name as the plain network has it: without PaddleSlim's ``.fn``."""
    return name.replace(".fn.", ".")


def _replace_batch_norms(network: nn.Layer) -> None:
    for layer in network.sublayers():
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.BatchNorm2D):
                norm = ElasticBatchNorm2D(
                    child.weight.shape[0], momentum=child._momentum, epsilon=child._epsilon
                )
                setattr(layer, name, norm)


# Re-calibration: statistics of one sub-network instead of a mixture of all. Shared running
# statistics that were updated in training average over every sub-network that was trained;
# recomputing them for the one at hand is usual for weight-sharing supernets (e.g. Yu & Huang,
# ICCV 2019). A supernet that was trained at frozen statistics is scored at them.


def batch_statistics(x: paddle.Tensor, axes: list[int]) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Mean and biased variance of each channel, over the ``axes`` of images and positions, which
    stay with length 1.

    Computed here for both engines: what BatchNorm itself keeps is the biased variance on CPUs and
    the unbiased one on GPUs (cuDNN's), which differ by much in small batches of small maps.
    """
    mean = x.mean(axes, keepdim=True)
    return mean, (x - mean).square().mean(axes, keepdim=True)


@contextmanager
def calibrated(network: nn.Layer, images: paddle.Tensor | None) -> Iterator[None]:
    """Within the context, running statistics are the batch statistics of ``images``.

    Those are float [N, 3, H, W], one batch; None leaves the running statistics as they are. Of a
    supernet the active sub-network is calibrated. On leaving, the earlier statistics are back, bit
    for bit; the network stays in eval mode.
    """
    network.eval()
    norms = [] if images is None else batch_norms(network)
    kept = [(norm._mean.clone(), norm._variance.clone()) for norm in norms]
    try:
        if norms:
            measure(network, norms, images)
        yield
    finally:
        for norm, (mean, variance) in zip(norms, kept, strict=True):
            norm._mean.set_value(mean)
            norm._variance.set_value(variance)


def batch_norms(network: nn.Layer) -> list[nn.BatchNorm2D]:
    """All BatchNorms of a network."""
    return [layer for layer in network.sublayers() if isinstance(layer, nn.BatchNorm2D)]


@paddle.no_grad()
def measure(network: nn.Layer, norms: Sequence[nn.BatchNorm2D], images: paddle.Tensor) -> None:
    """Overwrite the running statistics of ``norms`` by those of their inputs, front to back.

    A layer's are measured before it runs, so that the next one sees what it normalises by them.

    Raises:
        UserError: a variance is not finite, which would make every input the same.
    """

    def take(norm: nn.BatchNorm2D, inputs: tuple) -> None:
        (x,) = inputs
        mean, variance = batch_statistics(x, [0, 2, 3])
        norm._mean[: x.shape[1]] = mean.flatten()
        norm._variance[: x.shape[1]] = variance.flatten()

    with before_each(norms, take):
        network(images)
    for name, layer in network.named_sublayers():
        if layer in norms and not bool(paddle.isfinite(layer._variance).all()):
            raise UserError(f"{name} has variances that are not finite; use other weights")


@contextmanager
def before_each(layers: Iterable[nn.Layer], look: Callable[[nn.Layer, tuple], None]):
    """Within the context ``look`` is given every layer and its inputs, before it runs."""
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
