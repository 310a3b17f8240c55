"""Stage three: all architectures over all images, chunk by chunk, resumable at any moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import paddle
from tqdm import tqdm

from hnas.base.device import Arithmetic, free_bytes, on_gpu, peak_memory
from hnas.base.errors import PADDLE_ERRORS, UserError, is_out_of_memory, word_of
from hnas.evaluation.counts import Counts
from hnas.evaluation.gpu_kernels import fused_fault, may_be_refusal
from hnas.evaluation.images import ScoredImages
from hnas.evaluation.ledger import Ledger, Part
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.spot_check import spot_check
from hnas.evaluation.tree import CPU_SHARE, GPU_SHARE, choose_chunk, even_chunk
from hnas.evaluation.variants import Precision, Variant, usual_variant
from hnas.models.elastic import ElasticResNet
from hnas.parallel.distributed import is_main_process, local_ranks, world_size
from hnas.ranking.costs import Network
from hnas.search_space import Architecture, SearchSpace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringSettings:
    """How the shared engine scores.

    Attributes:
        calibration: uint8 images [N, 3, H, W] for BatchNorm re-calibration, or None.
        chunk: images a walk; 0 chooses by the free memory, and such that every process gets as
            many chunks. A resumed run keeps its first.
        target_tau: see :class:`Ledger`.
        variant: how the walk computes; None as in :class:`SharedEvaluator`.
        part: of the chunks, to be done without results; None: all.
        network: see :class:`Ledger`.
    """

    calibration: paddle.Tensor | None = None
    chunk: int = 0
    target_tau: float = 0.0
    variant: Variant | None = None
    part: Part | None = None
    network: Network | None = None


def evaluate_shared(
    network: ElasticResNet,
    archs: Mapping[str, Architecture],
    images: ScoredImages,
    save_dir: Path,
    identity: Mapping[str, str],
    settings: ScoringSettings,
    evaluator: SharedEvaluator | None = None,
) -> Counts:
    """Score ``archs`` on ``images``; continue where earlier runs in ``save_dir`` stopped.

    After every chunk ``save_dir`` holds the state, from which a killed run continues, and
    ``estimates.json`` with an accuracy and standard error of every architecture. Several
    processes call this together, with the same ``save_dir``, and take the chunks in turns; the
    result is complete in the main process. An earlier run may have had another number of
    processes.

    Args:
        network: the supernet.
        archs: by name.
        images: in an order of which any prefix is a sample (see ``balanced_order``).
        save_dir: for state and estimates.
        identity: what the state belongs to, e.g. hashes of checkpoint and lists.
        settings: how to score.
        evaluator: of ``network``, made for these settings, where one is at hand.

    Raises:
        UserError: the state in ``save_dir`` is of something else, or the reference engine finds
            other logits or hits.
    """
    if evaluator is None:
        how = settings.calibration, settings.variant
        evaluator = SharedEvaluator(network, list(archs.values()), *how)
    else:
        evaluator.take(list(archs.values()))
    how = settings.target_tau, is_main_process(), settings.part, images.copies
    ledger = Ledger(save_dir, identity, archs, len(images), *how, settings.network)
    ledger.begin(settings.chunk or default_chunk(network.space, images, evaluator))
    describe(evaluator, images, ledger)
    walks = Walks(evaluator, list(archs), images)
    for chunk in ledger.chunks():
        began = time.perf_counter()
        title = f"chunk {chunk.start // ledger.chunk + 1}/{len(ledger.all_chunks())}"
        counts = walks.score(chunk, title)
        ledger.add(chunk.start, counts)
        if is_main_process():
            report(title, ledger, counts, time.perf_counter() - began)
    return ledger.complete()


@dataclass
class Walks:
    """Scores chunks of images by walks, each of which is checked.

    A chunk is one walk; where the device cannot, it is several of fewer images, or in a plainer
    variant, from then on, and the log says so. Counts are sums over images: they stay the same.
    """

    evaluator: SharedEvaluator  # it keeps what the device can
    names: list[str]  # of its architectures
    images: ScoredImages

    def score(self, chunk: range, title: str) -> Counts:
        """The counts over a chunk, which the progress bar calls ``title``.

        Raises:
            UserError: out of memory with a single image.
        """
        counts = Counts.zeros(len(self.names))
        while counts.images < len(chunk):
            part = chunk[counts.images : counts.images + self.evaluator.most_images]
            try:
                counts.add(self._walk(part, chunk.start % len(self.names), title))
            except PADDLE_ERRORS as error:
                self._give_way(error, len(part))
        return counts

    def _walk(self, part: range, checked: int, title: str) -> Counts:
        """The counts over some images; the architecture numbered ``checked`` is checked."""
        evaluator, counts = self.evaluator, Counts.zeros(len(self.names))
        batch = self.images.batch(part.start, part.stop)
        with tqdm(total=len(self.names), desc=title, unit="arch", mininterval=1) as progress:
            logits = evaluator.evaluate(*batch, counts, progress.update, watch=checked)
        named = self.names[checked], evaluator.archs[checked]
        found = logits, (counts.top1[checked], counts.top5[checked]), evaluator.variant.precision
        spot_check(evaluator.network, named, batch, evaluator.calibration, *found)
        return counts

    def _give_way(self, error: Exception, images: int) -> None:
        """Try the next walk in another way than this one of so many images, or raise."""
        variant, is_memory = self.evaluator.variant, is_out_of_memory(error)
        if is_memory and images > 1:
            self.evaluator.most_images = images // 2
            how = f"{images // 2} images a walk, not {images}, and the same results"
        elif may_be_refusal(variant, error):
            self.evaluator.compute(usual_variant(variant.precision))
            how = f"the walk computes in {self.evaluator.variant}"
        elif is_memory:
            raise UserError(
                f"out of memory with one image a walk: {word_of(error)}; end what else takes "
                "memory, or give --amp O1 on a GPU or fewer --bn_calibration_images"
            ) from error
        else:
            raise error
        logger.warning("from here on %s: %s", how, word_of(error))


def wanted_variant(
    arithmetic: Arithmetic, calibration: paddle.Tensor | None, fuses: bool = True
) -> Variant | None:
    """The fastest way to walk that works on this GPU; the log says which, and why.

    None: on CPUs, by what works there. ``fuses`` says whether the fused operator may be used. Half
    precision is float16, eight times as fine as bfloat16. What overflows is found.
    """
    if not on_gpu():
        return None
    rounding = Precision.TF32 if arithmetic.tf32 else Precision.FLOAT32
    precision = rounding if arithmetic.amp == "O0" else Precision.FLOAT16
    chosen, reason = usual_variant(precision), "" if fuses else "--fused off"
    if calibration is not None:
        reason = "re-calibration needs each operator's output"
    reason = reason or fused_fault(precision, chosen.layout)
    chosen = chosen if reason else usual_variant(precision, fused=True)
    logger.info("the walk computes in %s%s", chosen, f": {reason}" if reason else "")
    return chosen


def default_chunk(space: SearchSpace, images: ScoredImages, evaluator: SharedEvaluator) -> int:
    """Images a walk: what the memory allows, in as many chunks for every process."""
    free = free_bytes() if on_gpu() else free_bytes() / local_ranks()
    memory = free * (GPU_SHARE if on_gpu() else CPU_SHARE)
    carried, number = evaluator.calibration_images, evaluator.variant.precision.bytes
    limit = choose_chunk(space, images.size, carried, memory, number)
    return even_chunk(limit, len(images), world_size())


def describe(evaluator: SharedEvaluator, images: ScoredImages, ledger: Ledger) -> None:
    """Log what is going to be done, and what makes it slow."""
    space, archs = evaluator.network.space, evaluator.archs
    chunks, carried = len(ledger.all_chunks()), evaluator.calibration_images
    if ledger.counts.images:
        logger.info("continuing after %d of %d images", ledger.counts.images, len(images))
    if ledger.chunk < min(carried, len(images)):
        logger.warning(
            "every walk carries %d calibration images for %d scored ones: raise chunk_size, or "
            "lower bn_calibration_images",
            carried,
            ledger.chunk,
        )
    if chunks < world_size():
        logger.warning("%d chunks for %d processes: lower chunk_size", chunks, world_size())
    if ledger.target_tau and chunks == 1:
        logger.warning("all images are one chunk, so there is nowhere to stop: lower chunk_size")
    naive = sum(space.macs(arch, images.size, num_classes=0) for arch in archs)
    shared, _ = evaluator.tree.cost(images.size)
    logger.info(
        "%d architectures, %d images in chunks of %d%s: %s MMAC an image%s",
        len(archs),
        len(images),
        ledger.chunk,
        f", of which part {ledger.part}" if ledger.part else "",
        f"{shared / 1e6:,.2f}",
        f" instead of {naive / 1e6:,.2f}" if naive != shared else "",
    )


def report(title: str, ledger: Ledger, counts: Counts, seconds: float) -> None:
    """Log how far the evaluation is, after a chunk of the main process."""
    logger.info(
        "%s: %s, %.1f s, %.0f images x architectures/s, eta %.0f s, peak memory %s",
        title,
        ledger,
        seconds,
        world_size() * counts.images * len(counts.top1) / seconds,
        ledger.left() / counts.images * seconds,
        peak_memory(),
    )
