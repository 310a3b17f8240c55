"""Evaluating many sub-networks on a chunk of images in one walk over their prefix tree."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import paddle

from hnas.base.device import on_gpu
from hnas.base.memory import keep_freed_memory
from hnas.dataset.transforms import normalize
from hnas.evaluation.counts import Counts
from hnas.evaluation.cpu.inference import InferenceKernels, cpu_threads, filters_are_fresh
from hnas.evaluation.cpu.matmul import MatmulKernels
from hnas.evaluation.cpu.winograd import WinogradKernels
from hnas.evaluation.gpu_kernels import GpuKernels
from hnas.evaluation.hits import LogitsError, count_hits
from hnas.evaluation.kernels import DygraphKernels
from hnas.evaluation.tree import Group, Node, PrefixTree
from hnas.evaluation.variants import Precision, Variant, usual_variant
from hnas.evaluation.weights import STEM, SlicedWeights, leading_channels
from hnas.models.elastic import ElasticResNet
from hnas.search_space import Architecture, feature_sizes

logger = logging.getLogger(__name__)

TINY_MAP = 3
"""Feature maps of at most this height are multiplied as matrices on CPUs."""
WINOGRAD_MAP = 7
"""Larger maps up to this height go through Winograd's transforms there."""
HEAD_ROWS = 2048
"""Feature vectors that are collected before the classifier multiplies them."""


class SharedEvaluator:
    """Scores architectures of one supernet, sharing all that they have in common.

    Args:
        network: the supernet, not to be trained while this is in use.
        archs: what to score.
        image_size: height and width of the images.
        calibration: uint8 images [N, 3, H, W] to re-calibrate every sub-network's BatchNorm
            with; None scores at the running statistics.
        variant: how to compute; None: on CPUs by the kernels that suit the size of the maps, on
            GPUs in float32.

    Attributes:
        archs: as given.
        variant: how it computes; None: by the CPU's kernels.
        tree: their prefix tree.
        macs: multiply-accumulates executed so far, of convolutions, all images together.
        kernel_seconds: time spent in operators; the rest of a walk is Python.
    """

    def __init__(
        self,
        network: ElasticResNet,
        archs: Sequence[Architecture],
        image_size: int,
        calibration: paddle.Tensor | None = None,
        variant: Variant | None = None,
    ):
        self._space = network.space
        self.take(archs)
        self.macs = 0
        self.kernel_seconds = 0.0
        self._calibration = None if calibration is None else normalize(calibration)
        self.variant = variant
        if variant is None and on_gpu():
            self.variant = usual_variant(Precision.FLOAT32)
        _, sizes = feature_sizes(image_size)
        kernels = self._choose_kernels(sizes)
        self._kernels = kernels
        self._weights = SlicedWeights(
            network,
            fold=not self.calibration_images,
            form=lambda stage, stride: kernels[stage].form(sizes[stage], stride),
        )
        self._classifier = (
            network.head.fc.fn.weight.detach(),
            network.head.fc.fn.bias.detach(),
        )

    def take(self, archs: Sequence[Architecture]) -> None:
        """Score ``archs`` from now on; programs and weights stay prepared."""
        self.archs = list(archs)
        self.tree = PrefixTree(self._space, archs)

    @property
    def calibration_images(self) -> int:
        """Images at the front of every batch."""
        return 0 if self._calibration is None else len(self._calibration)

    @property
    def precision(self) -> Precision:
        """How the walk rounds."""
        return self.variant.precision if self.variant else Precision.FLOAT32

    def _choose_kernels(self, sizes: Sequence[int]) -> dict[int, DygraphKernels]:
        """The kernels of the stem (-1) and of each stage (0 to 3), by the size of its maps."""
        number = self.calibration_images
        if self.variant is not None:
            return dict.fromkeys(range(-1, len(sizes)), GpuKernels(self.variant, number))
        wide = cpu_kernels(number)
        small, tiny = WinogradKernels(wide), MatmulKernels(number)
        chosen = {
            stage: tiny if size <= TINY_MAP else small if size <= WINOGRAD_MAP else wide
            for stage, size in enumerate(sizes)
        }
        return {-1: wide, **chosen}

    @paddle.no_grad()
    def evaluate(
        self,
        images: paddle.Tensor,
        labels: paddle.Tensor,
        counts: Counts,
        progress: Callable[[int], None] = lambda _: None,
        watch: int | None = None,
    ) -> paddle.Tensor | None:
        """Add the hits on a chunk of images to ``counts``.

        Args:
            images: uint8 [N, 3, H, W].
            labels: int64 [N].
            progress: called with the number of architectures that were just finished.
            watch: the position of an architecture whose logits are wanted.

        Returns:
            Its logits, float32 [N, classes].

        Raises:
            LogitsError: a logit is NaN or infinite; names the architecture.
        """
        walk = _Walk(self, labels, counts, progress, watch)
        x = normalize(images)
        if self._calibration is not None:
            x = paddle.concat([self._calibration, x])
        walk.run(x)
        counts.images += len(labels)
        return walk.watched


def cpu_kernels(calibration: int) -> DygraphKernels:
    """Paddle Inference with oneDNN, or dygraph where that cannot be trusted, which is logged."""
    keep_freed_memory()
    kernels = InferenceKernels(cpu_threads(), calibration)
    if filters_are_fresh(kernels):
        return kernels
    logger.warning(
        "Paddle Inference of this version keeps old filters; using dygraph, several times slower"
    )
    return DygraphKernels(calibration)


class _Walk:
    """One depth-first walk: at any time one path of activations is alive."""

    def __init__(self, evaluator: SharedEvaluator, labels, counts: Counts, progress, watch):
        self._evaluator = evaluator
        self._tree = evaluator.tree
        self._kernels = evaluator._kernels
        self._weights = evaluator._weights
        self._labels = labels
        self._counts = counts
        self._progress = progress
        self._watch = watch
        self.watched: paddle.Tensor | None = None
        self._features: dict[int, list] = {}

    def run(self, x) -> None:
        """Walk from the stem; ``x`` are float images [N, 3, H, W]."""
        kernels = self._kernels[-1]
        conv = self._weights.get(STEM, 3, self._tree.stem_channels)
        size = (x.shape[2] + 1) // 2
        self._evaluator.macs += conv.macs * size * size * len(self._labels)
        x = kernels.accept(x, _PIXELS)
        stem = self._timed(kernels.keep, self._timed(kernels.stem, x, conv))
        for channels, low, high in self._tree.roots():
            node = self._tree.node(low, high, 0, channels)
            self._visit(leading_channels(stem, channels, kernels.channel_axis), node, 0, kernels)
        for channels in list(self._features):
            self._multiply_heads(channels)

    def _visit(self, x, node: Node, level: int, kernels: DygraphKernels) -> None:
        """Everything below a node; ``x`` is its activation in the layout of ``kernels``."""
        if node.leaves:
            self._collect(x, node, kernels)
        for group in node.groups:
            own = self._kernels[group.stage]
            inputs = self._timed(own.accept, x, kernels, group.stride)
            if len(group.children) == 1 and not group.projects:
                self._single(inputs, group, level, own)
            else:
                self._siblings(inputs, group, level, own)

    def _single(self, x, group: Group, level: int, kernels: DygraphKernels) -> None:
        """A block that continues its stage without alternatives."""
        (child,) = group.children
        conv1 = self._conv(group, "conv1", group.cin, child.mid)
        conv2 = self._conv(group, "conv2", child.mid, child.cout)
        y = self._timed(kernels.block, x, conv1, conv2, level)
        self._count(kernels, y, conv1, conv2)
        self._enter(y, child, level, kernels)

    def _siblings(self, x, group: Group, level: int, kernels: DygraphKernels) -> None:
        """Blocks with the same input: conv1 once at the largest width, conv2 once a width."""
        axis = kernels.channel_axis
        several = len(group.by_mid) > 1
        conv1 = self._conv(group, "conv1", group.cin, group.widest_mid)
        y = self._timed(kernels.first, x, conv1, group.stride)
        self._count(kernels, y, conv1)
        shortcut = x
        if group.projects:
            conv = self._conv(group, "project", group.cin, group.widest_out)
            shortcut = self._timed(kernels.project, x, conv)
            self._count(kernels, shortcut, conv)
        if several:
            y = self._timed(kernels.keep, y)
            shortcut = self._timed(kernels.keep, shortcut) if group.projects else shortcut
        for mid, children in group.by_mid.items():
            widest = max(child.cout for child in children)
            conv2 = self._conv(group, "conv2", mid, widest)
            z = self._timed(
                kernels.last,
                self._timed(leading_channels, y, mid, axis),
                self._timed(leading_channels, shortcut, widest, axis),
                conv2,
            )
            self._count(kernels, z, conv2)
            if len(children) > 1:
                z = self._timed(kernels.keep, z)
            for child in children:
                self._enter(
                    self._timed(leading_channels, z, child.cout, axis), child, level, kernels
                )

    def _enter(self, x, child, level: int, kernels: DygraphKernels) -> None:
        node = self._tree.node(child.low, child.high, level + 1, child.cout)
        if node.reused:
            x = self._timed(kernels.keep, x)
        self._visit(x, node, level + 1, kernels)

    def _collect(self, x, node: Node, kernels: DygraphKernels) -> None:
        """Keep a leaf's pooled features until enough are there for one matrix product."""
        rows = self._features.setdefault(node.channels, [])
        rows.append((node.leaves, self._timed(kernels.pooled, x)))
        if len(rows) * len(self._labels) >= HEAD_ROWS:
            self._multiply_heads(node.channels)

    def _multiply_heads(self, channels: int) -> None:
        rows = self._features.pop(channels)
        logits = self._timed(self._logits, [features for _, features in rows], channels)
        hits = self._timed(count_hits, logits, self._labels, self._counts.images)
        for index, ((leaves, _), found, folds, bad) in enumerate(zip(rows, *hits, strict=True)):
            archs = self._tree.order[leaves.start : leaves.stop]
            if self._watch in archs:
                self.watched = logits[index]
            if bad:
                code = self._evaluator.archs[archs[0]].code
                raise LogitsError(f"architecture {code}", bad, len(self._labels))
            for column, value in zip(self._counts.columns(), found, strict=True):
                column[archs] += value
            self._counts.folds[archs] += folds
            self._progress(len(leaves))

    def _logits(self, features: list, channels: int) -> paddle.Tensor:
        weight, bias = self._evaluator._classifier
        return paddle.stack(features) @ weight[:channels] + bias

    def _conv(self, group: Group, name: str, cin: int, cout: int):
        key = (group.stage, group.block, name)
        return self._timed(self._weights.get, key, cin, cout)

    def _count(self, kernels: DygraphKernels, y, *convolutions) -> None:
        positions = kernels.map_size(y) * len(self._labels)
        self._evaluator.macs += positions * sum(conv.macs for conv in convolutions)

    def _timed(self, operation, *arguments):
        began = time.perf_counter()
        result = operation(*arguments)
        self._evaluator.kernel_seconds += time.perf_counter() - began
        return result


_PIXELS = DygraphKernels()
"""The layout that images come in."""
