"""Is the shared engine right? Logits of one architecture a chunk against the reference engine's.

The walk rests on what Paddle does, not on what it promises: slices that stay valid, an operator
for its inference engine. So every chunk is checked before its counts are kept. How much may differ
follows from how it rounds, and is measured.
"""

from __future__ import annotations

import numpy as np
import paddle

from hnas.base.device import on_gpu
from hnas.base.errors import UserError
from hnas.evaluation.counts import count_hits
from hnas.evaluation.reference import LARGEST, network_logits
from hnas.evaluation.variants import Precision
from hnas.models.elastic import ElasticResNet
from hnas.search_space import Architecture

HALF_LARGEST = float(np.finfo(np.float16).max)
FEW = 16
"""Images that tell whether a network overflows inside."""


def compare(
    found: paddle.Tensor,
    expected: paddle.Tensor,
    labels: paddle.Tensor,
    counted: tuple[int, int],
    precision: Precision,
) -> tuple[float, str]:
    """Compare an engine's logits with the reference engine's.

    Args:
        found, expected: logits [N, classes], finite.
        labels: int64 [N].
        counted: top-1 and top-5 hits that the engine has counted. They must be the expected ones
            but for images whose hit or miss hangs on at most twice the largest difference.
        precision: of ``found``.

    Returns:
        The largest difference in standard deviations of the reference's logits; and what rounding
        does not explain, in words; empty: nothing.
    """
    right, _ = count_hits(expected.unsqueeze(0), labels)
    logits = expected.numpy().astype(np.float64)
    largest, spread = float(np.abs(found.numpy() - logits).max()), float(logits.std())
    relative, allowed = largest / spread if spread else np.inf * largest, precision.tolerance
    if not largest <= allowed * spread:
        return relative, (
            f"logits differ by up to {largest:.3g}, {relative:.2g} of their standard deviation, "
            f"where {precision.value} explains {allowed:g}"
        )
    for k, own, (wanted,) in zip((1, 5), counted, (right.top1, right.top5), strict=True):
        uncertain = (margins(logits, labels.numpy(), k) <= 2 * largest).sum()
        if abs(own - wanted) > uncertain:
            return relative, (
                f"{own} top{k} hits instead of {wanted}, where differences of up to "
                f"{largest:.3g} explain {uncertain}"
            )
    return relative, ""


def margins(logits: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """By how much each image's top-k hit or miss is one: [N], of logits [N, classes].

    The distance of the label's logit from the k-th largest of the others; infinite if there are
    fewer.
    """
    images, classes = logits.shape
    if classes <= k:
        return np.full(images, np.inf)
    rows = np.arange(images)
    others = logits.copy()
    others[rows, labels] = -np.inf
    rival = np.partition(others, classes - k, axis=1)[:, classes - k]
    return np.abs(logits[rows, labels] - rival)


def spot_check(
    network: ElasticResNet,
    named: tuple[str, Architecture],
    batch: tuple[paddle.Tensor, paddle.Tensor],
    calibration: paddle.Tensor | None,
    found: paddle.Tensor,
    counted: tuple[int, int],
    precision: Precision,
) -> None:
    """Compare what the shared engine has of one architecture on a chunk with the reference's.

    Args:
        network: the supernet; the architecture is its active sub-network afterwards.
        named: the architecture with its name.
        batch: the chunk's images and labels.
        calibration: as in :class:`SharedEvaluator`.
        found, counted: the shared engine's logits [N, classes], and top-1 and top-5 hits.
        precision: of the walk.

    Raises:
        UserError: they differ by more than rounding explains.
        LogitsError: the reference engine's logits are not finite, or on the way to them is what
            is not in ``precision``, or in the largest sub-network, which has all filters.
    """
    name, arch = named
    images, labels = batch
    network.activate(network.space.largest())
    network_logits(network, images[:FEW], calibration, "the largest sub-network")
    network.activate(arch)
    largest = HALF_LARGEST if precision is Precision.FLOAT16 else LARGEST
    expected = network_logits(network, images, calibration, f"architecture {name}", largest)
    _, fault = compare(found, expected, labels, counted, precision)
    if fault:
        raise UserError(
            f"architecture {name}, shared engine against reference engine: {fault}; "
            f"{advice(precision, calibration)}; --eval_engine reference does without"
        )


def advice(precision: Precision, calibration: paddle.Tensor | None) -> str:
    """What a user can do where the engines differ."""
    text = "please report this with your Paddle version"
    if calibration is not None:
        # No fault of the engine's: statistics of few values.
        text = (
            f"re-calibration by {len(calibration)} images amplifies rounding where a channel has "
            f"few values: raise --bn_calibration_images; {text}"
        )
    if on_gpu():
        text += " and what python -m hnas.tools.check_device prints"
        if precision is not Precision.FLOAT32:
            flag = "--tf32 off" if precision is Precision.TF32 else "--amp O0"
            text += f"; {flag} rounds less"
    return text
