"""Evaluating many sub-networks on a chunk of images in one walk over their prefix tree."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import paddle

from hnas.base.device import on_gpu
from hnas.dataset.transforms import normalize
from hnas.evaluation.counts import Counts
from hnas.evaluation.cpu_kernels import cpu_kernels
from hnas.evaluation.gpu_kernels import GpuKernels
from hnas.evaluation.hits import LogitsError, count_hits
from hnas.evaluation.kernels import DygraphKernels
from hnas.evaluation.tree import Group, Node, PrefixTree
from hnas.evaluation.variants import Precision, Variant, cpu_variant, usual_variant
from hnas.evaluation.weights import STEM, SlicedWeights
from hnas.models.elastic import ElasticResNet
from hnas.search_space import Architecture

HEAD_ROWS = 2048
"""Feature vectors that are collected before the classifier multiplies them."""


class SharedEvaluator:
    """Scores architectures of one supernet, sharing all that they have in common.

    Args:
        network: the supernet, not to be trained while this is in use.
        archs: what to score.
        calibration: uint8 images [N, 3, H, W] to re-calibrate every sub-network's BatchNorm
            with; None scores at the running statistics.
        variant: how to compute; None: in float32, as is usual on this device.

    Attributes:
        archs: as given.
        variant: how it computes.
        tree: their prefix tree.
        macs: multiply-accumulates executed so far, of convolutions, all images together.
        seconds: time spent in walks.
        kernel_seconds: of that in operators; the rest is Python.
    """

    def __init__(
        self,
        network: ElasticResNet,
        archs: Sequence[Architecture],
        calibration: paddle.Tensor | None = None,
        variant: Variant | None = None,
    ):
        self._space = network.space
        self.take(archs)
        self.macs = 0
        self.seconds = self.kernel_seconds = 0.0
        self._calibration = None if calibration is None else normalize(calibration)
        usual = usual_variant(Precision.FLOAT32) if on_gpu() else cpu_variant()
        self.variant = variant or usual
        make = cpu_kernels if self.variant.onednn else GpuKernels
        self.kernels: DygraphKernels = make(self.variant, self.calibration_images)
        fold = not self.calibration_images
        self._weights = SlicedWeights(network, fold, self.kernels.form())
        head = network.head.fc.fn
        self._logits = self.kernels.classifier(head.weight.detach(), head.bias.detach())

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
        return self.variant.precision

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
        began = time.perf_counter()
        walk = _Walk(self, labels, counts, progress, watch)
        x = normalize(images)
        if self._calibration is not None:
            x = paddle.concat([self._calibration, x])
        walk.run(x)
        counts.images += len(labels)
        self.seconds += time.perf_counter() - began
        return walk.watched

    @property
    def python_share(self) -> float:
        """Share of the walks' time outside of operators."""
        return 1 - self.kernel_seconds / self.seconds


class _Walk:
    """One depth-first walk: at any time one path of activations is alive."""

    def __init__(self, evaluator: SharedEvaluator, labels, counts: Counts, progress, watch):
        self._evaluator = evaluator
        self._tree = evaluator.tree
        self._kernels = evaluator.kernels
        self._weights = evaluator._weights
        self._labels = labels
        self._counts = counts
        self._progress = progress
        self._watch = watch
        self.watched: paddle.Tensor | None = None
        self._features: dict[int, list] = {}

    def run(self, x) -> None:
        """Walk from the stem; ``x`` are float images [N, 3, H, W]."""
        kernels = self._kernels
        conv = self._weights.get(STEM, 3, self._tree.stem_channels)
        size = (x.shape[2] + 1) // 2
        self._evaluator.macs += conv.macs * size * size * len(self._labels)
        stem = self._timed(kernels.stem, kernels.accept(x, _PIXELS), conv)
        for channels, low, high in self._tree.roots():
            node = self._tree.node(low, high, 0, channels)
            self._visit(self._timed(kernels.narrow, stem, channels), node, 0)
        for channels in list(self._features):
            self._multiply_heads(channels)

    def _visit(self, x, node: Node, level: int) -> None:
        """Everything below a node; ``x`` is its activation."""
        if node.leaves:
            self._collect(x, node)
        for group in node.groups:
            if len(group.children) == 1 and not group.projects:
                self._single(x, group, level)
            else:
                self._siblings(x, group, level)

    def _single(self, x, group: Group, level: int) -> None:
        """A block that continues its stage without alternatives."""
        (child,) = group.children
        conv1 = self._conv(group, "conv1", group.cin, child.mid)
        conv2 = self._conv(group, "conv2", child.mid, child.cout)
        y = self._timed(self._kernels.block, x, conv1, conv2)
        self._count(y, conv1, conv2)
        self._enter(y, child, level)

    def _siblings(self, x, group: Group, level: int) -> None:
        """Blocks with the same input: conv1 once at the largest width, conv2 once a width."""
        kernels = self._kernels
        conv1 = self._conv(group, "conv1", group.cin, group.widest_mid)
        y = self._timed(kernels.first, x, conv1, group.stride)
        self._count(y, conv1)
        shortcut = x
        if group.projects:
            conv = self._conv(group, "project", group.cin, group.widest_out)
            shortcut = self._timed(kernels.project, x, conv)
            self._count(shortcut, conv)
        for mid, children in group.by_mid.items():
            widest = max(child.cout for child in children)
            conv2 = self._conv(group, "conv2", mid, widest)
            z = self._timed(kernels.last, self._timed(kernels.narrow, y, mid), shortcut, conv2)
            self._count(z, conv2)
            for child in children:
                self._enter(self._timed(kernels.narrow, z, child.cout), child, level)

    def _enter(self, x, child, level: int) -> None:
        node = self._tree.node(child.low, child.high, level + 1, child.cout)
        self._visit(x, node, level + 1)

    def _collect(self, x, node: Node) -> None:
        """Keep a leaf's pooled features until enough are there for one matrix product."""
        rows = self._features.setdefault(node.channels, [])
        rows.append((node.leaves, self._timed(self._kernels.pooled, x)))
        if len(rows) * len(self._labels) >= HEAD_ROWS:
            self._multiply_heads(node.channels)

    def _multiply_heads(self, channels: int) -> None:
        rows = self._features.pop(channels)
        logits = self._timed(self._logits, [features for _, features in rows])
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

    def _logits(self, features: list) -> paddle.Tensor:
        """Of several sub-networks' features [N, C]: [sub-networks, N, classes]."""
        logits = self._evaluator._logits(paddle.concat(features))
        return logits.reshape([len(features), len(self._labels), -1])

    def _conv(self, group: Group, name: str, cin: int, cout: int):
        key = (group.stage, group.block, name)
        return self._timed(self._weights.get, key, cin, cout)

    def _count(self, y, *convolutions) -> None:
        positions = self._kernels.map_size(y) * len(self._labels)
        self._evaluator.macs += positions * sum(conv.macs for conv in convolutions)

    def _timed(self, operation, *arguments):
        began = time.perf_counter()
        result = operation(*arguments)
        self._evaluator.kernel_seconds += time.perf_counter() - began
        return result


_PIXELS = DygraphKernels()
"""The layout that images come in."""
