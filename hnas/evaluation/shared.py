"""Evaluating many sub-networks on a chunk of images in one walk over their prefix tree."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

import paddle

from hnas.base.device import on_gpu
from hnas.dataset.transforms import normalize
from hnas.evaluation.counts import Counts, LogitsError, count_hits
from hnas.evaluation.gpu_kernels import kernels_of
from hnas.evaluation.kernels import STEM, SlicedWeights
from hnas.evaluation.tree import Child, Group, Node, PrefixTree
from hnas.evaluation.variants import CPU_VARIANT, Precision, Variant, usual_variant
from hnas.models.convolution import onednn_fault
from hnas.models.elastic import ElasticResNet
from hnas.search_space import Architecture

logger = logging.getLogger(__name__)

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
        kernels: what computes.
        tree: their prefix tree.
        most_images: that a walk should take, as far as memory has shown.
    """

    most_images = sys.maxsize

    def __init__(
        self,
        network: ElasticResNet,
        archs: Sequence[Architecture],
        calibration: paddle.Tensor | None = None,
        variant: Variant | None = None,
    ):
        self._space = network.space
        self.take(archs)
        self._calibration = None if calibration is None else normalize(calibration)
        self._network = network
        self.compute(variant or (usual_variant(Precision.FLOAT32) if on_gpu() else on_cpus()))

    def compute(self, variant: Variant) -> None:
        """Compute in ``variant`` from now on; programs and weights are prepared anew."""
        self.variant = variant
        self.kernels = kernels_of(variant, self.calibration_images)
        self.weights = SlicedWeights(self._network, self.kernels)
        head = self._network.head.fc.fn
        self.classifier = self.kernels.classifier(head.weight.detach(), head.bias.detach())

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
        walk = _Walk(self, labels, counts, progress, watch)
        x = normalize(images)
        if self._calibration is not None:
            x = paddle.concat([self._calibration, x])
        walk.run(x)
        counts.images += len(labels)
        return walk.watched


def on_cpus() -> Variant:
    """With oneDNN's convolutions; with Paddle's where they cannot be trusted, which is logged."""
    if fault := onednn_fault():
        logger.warning("scoring by Paddle's operators, several times slower: %s", fault)
    return Variant() if fault else CPU_VARIANT


class _Walk:
    """One depth-first walk: at any time one path of activations is alive."""

    def __init__(self, evaluator: SharedEvaluator, labels, counts: Counts, progress, watch):
        self._evaluator = evaluator
        self._tree = evaluator.tree
        self._kernels = evaluator.kernels
        self._labels = labels
        self._counts = counts
        self._progress = progress
        self._watch = watch
        self.watched: paddle.Tensor | None = None
        self._features: dict[int, list] = {}

    def run(self, x) -> None:
        """Walk from the stem; ``x`` are float images [N, 3, H, W]."""
        kernels = self._kernels
        conv = self._evaluator.weights.get(STEM, 3, self._tree.stem_channels)
        stem = kernels.stem(kernels.accept(x), conv)
        for channels, low, high in self._tree.roots():
            node = self._tree.node(low, high, 0, channels)
            self._visit(kernels.narrow(stem, channels), node, 0)
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
        """A block without alternatives, whose inner activation need not be kept."""
        (child,) = group.children
        conv1 = self._conv(group, "conv1", group.cin, child.mid)
        y = self._kernels.first(x, conv1, group.stride)
        y = self._kernels.last(y, x, self._conv(group, "conv2", child.mid, child.cout))
        self._enter(y, child, level)

    def _siblings(self, x, group: Group, level: int) -> None:
        """Blocks with the same input: conv1 once at the largest width, conv2 once a width."""
        kernels = self._kernels
        conv1 = self._conv(group, "conv1", group.cin, group.widest_mid)
        y = kernels.first(x, conv1, group.stride)
        shortcut = x
        if group.projects:
            conv = self._conv(group, "project", group.cin, group.widest_out)
            shortcut = kernels.project(x, conv)
        for mid, widest, children in group.by_mid:
            conv2 = self._conv(group, "conv2", mid, widest)
            z = kernels.last(kernels.narrow(y, mid), shortcut, conv2)
            for child in children:
                self._enter(kernels.narrow(z, child.cout), child, level)

    def _enter(self, x, child: Child, level: int) -> None:
        node = self._tree.node(child.low, child.high, level + 1, child.cout)
        self._visit(x, node, level + 1)

    def _conv(self, group: Group, name: str, cin: int, cout: int):
        return self._evaluator.weights.get((group.stage, group.block, name), cin, cout)

    def _collect(self, x, node: Node) -> None:
        """Keep a leaf's pooled features until enough are there for one matrix product."""
        rows = self._features.setdefault(node.channels, [])
        rows.append((node.leaves, self._kernels.pooled(x)))
        if len(rows) * len(self._labels) >= HEAD_ROWS:
            self._multiply_heads(node.channels)

    def _multiply_heads(self, channels: int) -> None:
        """Count the hits of all sub-networks whose features [N, ``channels``] were collected."""
        rows = self._features.pop(channels)
        features = paddle.concat([features for _, features in rows])
        logits = self._evaluator.classifier(features)
        logits = logits.reshape([len(rows), len(self._labels), -1])
        hits = count_hits(logits, self._labels, self._counts.images)
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
