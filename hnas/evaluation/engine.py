"""Stage three: all architectures over all images, chunk by chunk, resumable at any moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import paddle
from tqdm import tqdm

from hnas.architecture_file import submission
from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.base.memory import available_bytes, peak_gib
from hnas.evaluation.hits import Counts
from hnas.evaluation.images import DecodedImages, ImagesOnDemand
from hnas.evaluation.ledger import Ledger, even_chunk, share_out
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.tree import naive_macs
from hnas.models.elastic import ElasticResNet
from hnas.parallel.distributed import (
    barrier,
    from_main_process,
    is_main_process,
    local_ranks,
    rank,
    world_size,
)
from hnas.search_space import Architecture, SearchSpace, feature_sizes

logger = logging.getLogger(__name__)


class EngineError(UserError):
    """The shared engine disagrees with the reference engine."""


POLL_SECONDS = 0.2
MAX_CHUNK = 1024


def evaluate_shared(
    network: ElasticResNet,
    archs: Mapping[str, Architecture],
    images: DecodedImages | ImagesOnDemand,
    save_dir: Path,
    identity: Mapping[str, str],
    calibration: paddle.Tensor | None = None,
    chunk: int = 0,
    target_se: float = 0.0,
    amp: str = "O0",
) -> Counts:
    """Score ``archs`` on ``images``; continue where earlier runs in ``save_dir`` stopped.

    After every chunk ``save_dir`` holds the state, from which a killed run continues, and
    ``estimates.json`` with an accuracy and standard error of every architecture. Several
    processes call this together, with the same ``save_dir``, and take the chunks in turns; the
    result is complete at rank 0. An earlier run may have had another number of processes.

    Args:
        network: the supernet.
        archs: by name.
        images: in an order whose beginnings are samples (see ``balanced_order``).
        save_dir: for state and estimates.
        identity: what the state belongs to, e.g. hashes of checkpoint and lists.
        calibration: uint8 images [N, 3, H, W] for BatchNorm re-calibration, or None.
        chunk: images a walk; 0 chooses by the free memory, and such that every process gets as
            many chunks. A resumed run keeps its first.
        target_se: stop when all standard errors are below it; 0: go through all images.
        amp: mixed precision on GPUs.

    Raises:
        StateError: the state in ``save_dir`` is of something else.
    """
    evaluator = SharedEvaluator(network, list(archs.values()), images.size, calibration, amp)
    ledger = Ledger(save_dir, identity, archs, len(images), target_se, keeps=is_main_process())
    if not chunk and not ledger.chunk:
        free = choose_chunk(network.space, images.size, evaluator.calibration_images)
        chunk = even_chunk(free, len(images), world_size())
    # When all have read what earlier runs left, rank 0 tidies it up and decides.
    barrier()
    if is_main_process():
        ledger.begin(min(chunk, len(images)) if chunk else 0)
    (chunk,) = from_main_process([ledger.chunk])
    if not is_main_process():
        ledger.reload()
        ledger.chunk = chunk
    starts = ledger.starts()
    undone = from_main_process([not ledger.is_done(start) for start in starts])
    own = share_out(np.array(undone), rank(), world_size())
    describe(evaluator, network.space, archs, images, chunk, ledger)
    for number in own:
        if not is_main_process():
            ledger.reload()
        if ledger.enough:
            break
        began = time.perf_counter()
        batch = images.batch(starts[number], min(starts[number] + chunk, len(images)))
        counts = Counts.zeros(len(archs))
        title = f"chunk {number + 1}/{len(starts)}"
        with tqdm(total=len(archs), desc=title, unit="arch", mininterval=1) as progress:
            evaluator.evaluate(*batch, counts, progress.update)
        if amp == "O0":
            chosen = starts[number] % len(archs)
            spot_check(network, list(archs.items())[chosen], chosen, batch, calibration, counts)
        ledger.add(starts[number], counts)
        seconds = time.perf_counter() - began
        logger.info(
            "%s: %d images, largest standard error %.4f, %.1f s, %.0f "
            "images x architectures/s, eta %.0f s, peak memory %.2f GiB",
            title,
            ledger.counts.images,
            ledger.largest_error,
            seconds,
            world_size() * counts.images * len(archs) / seconds,
            (len(images) - ledger.counts.images) / counts.images * seconds / world_size(),
            peak_gib(),
        )
    if is_main_process():
        wait_for_rest(ledger)
        if ledger.counts.images < len(images):
            logger.info("all standard errors are below %g: stopped early", target_se)
    return ledger.counts


def wait_for_rest(ledger: Ledger) -> None:
    """Collect the other ranks' chunks until there are enough."""
    if not ledger.enough:
        logger.info("waiting for the other processes' chunks")
    while not ledger.enough:
        if ledger.collect():
            logger.info("%d images", ledger.counts.images)
        else:
            time.sleep(POLL_SECONDS)
    ledger.remove_rest()


def describe(
    evaluator: SharedEvaluator,
    space: SearchSpace,
    archs: Mapping[str, Architecture],
    images: DecodedImages | ImagesOnDemand,
    chunk: int,
    ledger: Ledger,
) -> None:
    """Log what is going to be done, and what makes it slow."""
    if ledger.counts.images:
        logger.info("continuing after %d of %d images", ledger.counts.images, len(images))
    if chunk < min(evaluator.calibration_images, len(images)):
        logger.warning(
            "every walk carries %d calibration images for %d scored ones: raise chunk_size, or "
            "lower bn_calibration_images",
            evaluator.calibration_images,
            chunk,
        )
    if len(ledger.starts()) < world_size():
        logger.warning(
            "%d chunks for %d processes: lower chunk_size", len(ledger.starts()), world_size()
        )
    logger.info(
        "%d architectures, %d images in chunks of %d: %.1f GMAC an image instead of %.1f",
        len(archs),
        len(images),
        chunk,
        evaluator.tree.macs(images.size) / 1e9,
        naive_macs(space, archs.values(), images.size) / 1e9,
    )


def spot_check(
    network: ElasticResNet,
    named: tuple[str, Architecture],
    index: int,
    batch: tuple[paddle.Tensor, paddle.Tensor],
    calibration: paddle.Tensor | None,
    counts: Counts,
) -> None:
    """Compare one architecture's hits on a chunk with the reference engine's.

    The programs on CPUs rely on what Paddle does, not on what it promises, so every chunk is
    checked before its counts are kept.

    Raises:
        EngineError: they differ by more than nearly equal logits explain.
    """
    name, arch = named
    expected = evaluate_reference(network, [arch], [batch], calibration)
    for hits, near in (("top1", "near1"), ("top5", "near5")):
        found, allowed = getattr(counts, hits)[index], getattr(counts, near)[index]
        if abs(found - getattr(expected, hits)[0]) > allowed:
            raise EngineError(
                f"architecture {name}: the shared engine counts {found} {hits} hits in a chunk, "
                f"the reference {getattr(expected, hits)[0]}; use --eval_engine reference, and "
                "please report this with your Paddle version"
            )


def evaluate_one_by_one(
    network: ElasticResNet, archs: Mapping[str, Architecture], loader, calibration=None
) -> Counts:
    """The reference engine with a progress bar."""
    with tqdm(total=len(archs), desc="scoring", unit="arch", mininterval=1) as progress:
        return evaluate_reference(
            network, list(archs.values()), loader, calibration, progress.update
        )


def write_submission(path: Path, archs: Mapping[str, Architecture], counts: Counts) -> None:
    """Write the organisers' JSON and log how many hits hang on nearly equal logits."""
    write_json(path, submission(archs, counts.accuracy().tolist()))
    logger.info(
        "%d top-1 and %d top-5 hits of %d hang on logits closer than 1e-4",
        counts.near1.sum(),
        counts.near5.sum(),
        len(archs) * counts.images,
    )


def choose_chunk(space: SearchSpace, image_size: int, calibration: int) -> int:
    """Images a walk such that its activations take at most a quarter of the free memory.

    One path of activations is alive: every block may keep its output, conv1's output and the
    shortcut, all at full width and depth.
    """
    if paddle.get_device() == "cpu":
        free = available_bytes() / local_ranks()
    else:
        properties = paddle.device.cuda.get_device_properties()
        free = properties.total_memory - paddle.device.cuda.memory_allocated()
    stem, sizes = feature_sizes(image_size)
    floats = 2 * stem * stem * space.base_channels[0]
    for stage, _, mid, cout, _ in space.plan(space.largest()).blocks():
        floats += 3 * sizes[stage] ** 2 * max(mid, cout)
    images = int(free / 4 / (4 * floats)) - calibration
    return max(1, min(MAX_CHUNK, images))
