"""Stage three: all architectures over all images, chunk by chunk, resumable at any moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import paddle
from tqdm import tqdm

from hnas.evaluation.architecture_file import submission, write_json
from hnas.evaluation.hits import Counts
from hnas.evaluation.images import DecodedImages
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.state import estimates, load_state, save_state
from hnas.evaluation.tree import naive_macs
from hnas.models.elastic import ElasticResNet
from hnas.search_space import Architecture, SearchSpace, feature_sizes
from hnas.utils.errors import UserError
from hnas.utils.memory import available_bytes, peak_gib

logger = logging.getLogger(__name__)


class EngineError(UserError):
    """The shared engine disagrees with the reference engine."""


STATE_FILE = "eval_state.npz"
MAX_CHUNK = 1024


def evaluate_shared(
    network: ElasticResNet,
    archs: Mapping[str, Architecture],
    images: DecodedImages,
    save_dir: Path,
    identity: Mapping[str, str],
    calibration: paddle.Tensor | None = None,
    chunk: int = 0,
    target_se: float = 0.0,
    amp: str = "O0",
) -> Counts:
    """Score ``archs`` on ``images``; continue where an earlier run in ``save_dir`` stopped.

    After every chunk ``save_dir`` holds the state, from which a killed run continues, and
    ``estimates.json`` with an accuracy and standard error of every architecture.

    Args:
        network: the supernet.
        archs: by name.
        images: in an order whose beginnings are samples (see ``balanced_order``).
        save_dir: for state and estimates.
        identity: what the state belongs to, e.g. hashes of checkpoint and lists.
        calibration: uint8 images [N, 3, H, W] for BatchNorm re-calibration, or None.
        chunk: images a walk; 0 chooses by the free memory. A resumed run keeps its first.
        target_se: stop when all standard errors are below it; 0: go through all images.
        amp: mixed precision on GPUs.

    Raises:
        StateError: the state in ``save_dir`` is of something else.
    """
    size = images.pixels.shape[2]
    evaluator = SharedEvaluator(network, list(archs.values()), size, calibration, amp)
    state = save_dir / STATE_FILE
    earlier = load_state(state, identity)
    if earlier is None:
        chunk = chunk or choose_chunk(network.space, size, evaluator.calibration_images)
        counts = Counts.zeros(len(archs))
    else:
        chunk, counts = earlier
        logger.info("continuing after %d of %d images", counts.images, len(images))
    chunk = min(chunk, len(images))
    if chunk < min(evaluator.calibration_images, len(images)):
        logger.warning(
            "every walk carries %d calibration images for %d scored ones: raise chunk_size, or "
            "lower bn_calibration_images",
            evaluator.calibration_images,
            chunk,
        )
    chunks = -(-len(images) // chunk)
    logger.info(
        "%d architectures, %d images in chunks of %d: %.1f GMAC an image instead of %.1f",
        len(archs),
        len(images),
        chunk,
        evaluator.tree.macs(size) / 1e9,
        naive_macs(network.space, archs.values(), size) / 1e9,
    )
    while counts.images < len(images):
        began = time.perf_counter()
        start = counts.images
        batch = images.batch(start, min(start + chunk, len(images)))
        title = f"chunk {start // chunk + 1}/{chunks}"
        with tqdm(total=len(archs), desc=title, unit="arch", mininterval=1) as progress:
            before = counts.copy()
            evaluator.evaluate(*batch, counts, progress.update)
        if amp == "O0":
            chosen = start % len(archs)
            spot_check(
                network, list(archs.items())[chosen], chosen, batch, calibration, before, counts
            )
        save_state(state, identity, chunk, counts)
        write_json(save_dir / "estimates.json", estimates(archs, counts))
        seconds = time.perf_counter() - began
        worst = float(counts.standard_error().max())
        logger.info(
            "chunk %d/%d: %d images, largest standard error %.4f, %.1f s, %.0f "
            "images x architectures/s, eta %.0f s, peak memory %.2f GiB",
            start // chunk + 1,
            chunks,
            counts.images,
            worst,
            seconds,
            len(batch[1]) * len(archs) / seconds,
            (len(images) - counts.images) / len(batch[1]) * seconds,
            peak_gib(),
        )
        if worst < target_se:
            logger.info("all standard errors are below %g: stopped early", target_se)
            break
    return counts


def spot_check(
    network: ElasticResNet,
    named: tuple[str, Architecture],
    index: int,
    batch: tuple[paddle.Tensor, paddle.Tensor],
    calibration: paddle.Tensor | None,
    before: Counts,
    after: Counts,
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
        found = getattr(after, hits)[index] - getattr(before, hits)[index]
        allowed = getattr(after, near)[index] - getattr(before, near)[index]
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
        free = available_bytes()
    else:
        properties = paddle.device.cuda.get_device_properties()
        free = properties.total_memory - paddle.device.cuda.memory_allocated()
    stem, sizes = feature_sizes(image_size)
    floats = 2 * stem * stem * space.base_channels[0]
    for stage, _, mid, cout, _ in space.plan(space.largest()).blocks():
        floats += 3 * sizes[stage] ** 2 * max(mid, cout)
    images = int(free / 4 / (4 * floats)) - calibration
    return max(1, min(MAX_CHUNK, images))
