"""Evaluating many sub-networks on a chunk of images in one walk over their prefix tree."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import paddle

from hnas.base.device import on_gpu
from hnas.dataset.transforms import normalize
from hnas.evaluation import gpu_kernels
from hnas.evaluation.counts import Counts, LogitsError, count_hits
from hnas.evaluation.kernels import STEM, Kernels, SlicedWeights
from hnas.evaluation.tree import Child, Group, PrefixTree
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
        network, archs, calibration, variant: as given, or as they are now.
        calibration_images: at the front of every batch.
        kernels, weights: what computes, of what.
        tree: the prefix tree of ``archs``.
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
        self.network, self.calibration = network, calibration
        self.calibration_images = 0 if calibration is None else len(calibration)
        self.take(archs)
        self.compute(variant or (usual_variant(Precision.FLOAT32) if on_gpu() else on_cpus()))

    def compute(self, variant: Variant) -> None:
        """Compute in ``variant`` from now on; weights are prepared anew."""
        self.variant = variant
        fused = gpu_kernels.fused_convolution if variant.fused else None
        self.kernels = Kernels(variant, self.calibration_images, fused)
        self.weights = SlicedWeights(self.network, self.kernels)

    def take(self, archs: Sequence[Architecture]) -> None:
        """Score ``archs`` from now on; weights stay prepared."""
        self.archs = list(archs)
        self.tree = PrefixTree(self.network.space, archs)

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
        if self.calibration is not None:
            images = paddle.concat([self.calibration, images])
        walk.run(normalize(images))
        counts.images += len(labels)
        return walk.watched


def on_cpus() -> Variant:
    """With oneDNN's convolutions; with Paddle's where they cannot be trusted, which is logged."""
    if fault := onednn_fault():
        logger.warning("scoring by Paddle's operators, several times slower: %s", fault)
    return Variant() if fault else CPU_VARIANT


@dataclass
class _Walk:
    """One depth-first walk: at any time one path of activations is alive."""

    evaluator: SharedEvaluator
    labels: paddle.Tensor
    counts: Counts
    progress: Callable[[int], None]
    watch: int | None
    watched: paddle.Tensor | None = None
    features: dict[int, list] = field(default_factory=dict)

    def run(self, x) -> None:
        """Walk from the stem; ``x`` are float images [N, 3, H, W]."""
        kernels, tree = self.evaluator.kernels, self.evaluator.tree
        conv = self.evaluator.weights.get(STEM, 3, tree.stem_channels)
        stem = kernels.max_pool(kernels.conv_norm(kernels.accept(x), conv, stride=2))
        for root in tree.roots():
            self._visit(kernels.narrow(stem, root.cout), root)
        for channels in list(self.features):
            self._multiply_heads(channels)

    def _visit(self, x, child: Child) -> None:
        """Everything below a block; ``x`` is its activation."""
        leaves, groups = self.evaluator.tree.node(child)
        if leaves:
            self._collect(x, child.cout, leaves)
        for group in groups:
            self._siblings(x, group)

    def _siblings(self, x, group: Group) -> None:
        """Blocks with the same input: conv1 once at the largest width, conv2 once a width."""
        kernels = self.evaluator.kernels
        conv1 = self._conv(group, "conv1", group.cin, group.widest_mid)
        y = kernels.conv_norm(x, conv1, group.stride)
        shortcut = x
        if group.projects:
            conv = self._conv(group, "project", group.cin, group.widest_out)
            shortcut = kernels.conv_norm(x, conv, group.stride, relu=False)
        for mid, widest, children in group.by_mid:
            conv2 = self._conv(group, "conv2", mid, widest)
            z = kernels.conv_norm(kernels.narrow(y, mid), conv2, shortcut=shortcut)
            if mid == group.widest_mid:
                y = shortcut = None  # the last: nothing below needs them
            for child in children:
                self._visit(kernels.narrow(z, child.cout), child)

    def _conv(self, group: Group, name: str, cin: int, cout: int):
        return self.evaluator.weights.get((group.stage, group.block, name), cin, cout)

    def _collect(self, x, channels: int, leaves: range) -> None:
        """Keep a leaf's pooled features until enough are there for one matrix product."""
        rows = self.features.setdefault(channels, [])
        rows.append((leaves, self.evaluator.kernels.pooled(x)))
        if len(rows) * len(self.labels) >= HEAD_ROWS:
            self._multiply_heads(channels)

    def _multiply_heads(self, channels: int) -> None:
        """Count the hits of all sub-networks whose features [N, ``channels``] were collected."""
        rows = self.features.pop(channels)
        features = paddle.concat([features for _, features in rows])
        head = self.evaluator.network.head.fc.fn
        logits = features @ head.weight[:channels] + head.bias
        logits = logits.reshape([len(rows), len(self.labels), -1])
        hits, bad = count_hits(logits, self.labels, self.counts.images)
        for index, (leaves, _) in enumerate(rows):
            archs = self.evaluator.tree.order[leaves.start : leaves.stop]
            if self.watch in archs:
                self.watched = logits[index]
            if bad[index]:
                code = self.evaluator.archs[archs[0]].code
                raise LogitsError(f"architecture {code}", bad[index], len(self.labels))
            for column, found in zip(self.counts.columns(), hits.columns(), strict=True):
                column[archs] += found[index]
            self.counts.folds[archs] += hits.folds[index]
            self.progress(len(leaves))
