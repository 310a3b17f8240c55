"""Stage three: score every architecture of a file with the stage-two supernet.

    python3 -u train_supernet.py run --image_dir DIR --ckpt_dir checkpoint_files/stage2/0.pdparams \
        --modelarch_file CVPR_2022_NAS_Track1_test.json
"""

from __future__ import annotations

from hnas.base.signals import hold_signals

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import hashlib
import logging
import math
from itertools import islice
from pathlib import Path

import numpy as np
import paddle

from hnas.architecture_file import read_architectures
from hnas.base.device import Arithmetic, on_gpu
from hnas.base.errors import UserError, run_main
from hnas.base.files import file_digest, remove_leftovers
from hnas.dataset.image_folder import ImageList
from hnas.evaluation.counts import Counts
from hnas.evaluation.engine import (
    ScoringSettings,
    evaluate_one_by_one,
    evaluate_shared,
)
from hnas.evaluation.gpu_kernels import choose_variant
from hnas.evaluation.images import (
    DECODE_BATCH,
    DecodedImages,
    ImagesOnDemand,
    balanced_order,
    list_hash,
)
from hnas.evaluation.ledger import Targets
from hnas.evaluation.results import write_results
from hnas.evaluation.shard_files import ScoredShard, write_shard
from hnas.evaluation.shards import Shard
from hnas.evaluation.state import architectures_hash
from hnas.evaluation.variants import Precision, Variant
from hnas.models.elastic import ElasticResNet
from hnas.models.registry import build_network
from hnas.parallel.distributed import (
    agree,
    barrier,
    from_main_process,
    is_main_process,
    leave,
    world_size,
)
from hnas.search_space import Architecture, SearchSpace, find_backbone
from hnas.utils.memory_needs import check_cache, check_chunk, check_shared_memory
from hnas.utils.options import Options, Stage
from hnas.utils.parsing import parse_options
from hnas.utils.runtime import (
    calibration_images,
    require,
    space_of,
    start,
    validation_images,
    validation_loader,
)
from hnas.utils.training import start_from_checkpoint
from hnas.utils.weights import find_checkpoint

logger = logging.getLogger(__name__)


def main() -> None:
    options = parse_options(Stage.SCORE, about=__doc__.splitlines()[0])
    if find_backbone(options.backbone).contrastive:
        raise UserError(f"--backbone {options.backbone} is stage 1's; stage 3 takes resnet48")
    shard = wanted_shard(options)
    arithmetic = start(options)
    if world_size() > 1 and options.eval_engine == "reference":
        raise UserError("--eval_engine reference runs in one process; shared runs in several")
    if options.amp != "O0" and options.eval_engine == "reference":
        raise UserError(
            f"--eval_engine reference computes in float32; --amp {options.amp} is for shared"
        )
    require(options, "ckpt_dir")
    check_chunk(options)
    space = space_of(options)
    every = architectures(options, space)
    own = None if shard is None else shard.positions(space, every, options.image_size)
    archs = every if own is None else at_positions(every, own)
    images = validation_images(options)
    network = build_network(options.backbone, len(images.classes), space)
    checkpoint = start_from_checkpoint(network, options.ckpt_dir, images.classes)
    save_dir = Path(options.save_dir)
    if is_main_process():
        remove_leftovers(save_dir)
    barrier()
    calibration = calibration_images(options, checkpoint.freeze_bn, classes=images.classes)
    order = scoring_order(options, images)
    whole = None
    if shard is not None:
        # Before the scoring, during which files may be replaced.
        whole = shared_identity(options, every, images, order, calibration, arithmetic)
    counts = score(options, network, archs, images, order, calibration, arithmetic)
    if is_main_process() and shard is None:
        write_results(save_dir, archs, counts)
    elif is_main_process():
        path = write_shard(save_dir, ScoredShard(shard, len(every), whole, archs, own, counts))
        logger.info("scored shard %s; python -m hnas.tools.merge_scores joins all: %s", shard, path)
    leave()


def wanted_shard(options: Options) -> Shard | None:
    """The part of the list that is to be scored; None: all of it.

    Raises:
        UserError: it is no shard, or other flags contradict it or each other.
    """
    names = ("target_se", "target_tau", "arch_shard")
    given = [name for name in names if getattr(options, name)]
    if given and options.eval_engine == "reference":
        raise UserError(f"--{given[0]} is for --eval_engine shared, not for reference")
    if not options.arch_shard:
        return None
    if len(given) > 1:
        raise UserError(
            f"--{given[0]} would stop every shard elsewhere; with --arch_shard give --eval_images"
        )
    try:
        return Shard.read(options.arch_shard)
    except ValueError as error:
        raise UserError(f"--arch_shard {error}") from None


def scoring_order(options: Options, images: ImageList) -> np.ndarray:
    """Which images are scored, in which order.

    Raises:
        UserError: more images are asked for than there are.
    """
    if options.eval_images > len(images):
        raise UserError(
            f"--eval_images {options.eval_images}, but {images.folder} has {len(images)}; lower "
            "it, or give 0 for all"
        )
    return balanced_order(images.labels, options.seed)[: options.eval_images or None]


def score(
    options: Options,
    network: ElasticResNet,
    archs: dict[str, Architecture],
    images: ImageList,
    order: np.ndarray,
    calibration: paddle.Tensor | None,
    arithmetic: Arithmetic,
) -> Counts:
    """Hits of all architectures on the images of ``order``; complete in the main process."""
    if options.eval_engine == "reference":
        loader = validation_loader(options, images, order)
        return evaluate_one_by_one(network, archs, loader, calibration)
    decoded = decoded_images(options, images, order)
    return evaluate_shared(
        network,
        archs,
        decoded,
        Path(options.save_dir),
        identity(
            options,
            archs,
            shared_hash(decoded.hash, images.select(order)),
            calibration,
            arithmetic,
        ),
        ScoringSettings(
            calibration,
            options.chunk_size,
            Targets(options.target_se, options.target_tau),
            variant(arithmetic, calibration),
        ),
    )


def variant(arithmetic: Arithmetic, calibration: paddle.Tensor | None) -> Variant | None:
    """How the walk computes on a GPU; None: on CPUs the engine decides.

    Half precision is float16, eight times as fine as bfloat16. What overflows is found.
    """
    if not on_gpu():
        return None
    rounding = Precision.TF32 if arithmetic.tf32 else Precision.FLOAT32
    precision = rounding if arithmetic.amp == "O0" else Precision.FLOAT16
    return choose_variant(precision, 0 if calibration is None else len(calibration))


def decoded_images(
    options: Options, images: ImageList, order: np.ndarray
) -> DecodedImages | ImagesOnDemand:
    """The images in that order; one of several processes decodes those of its chunks only."""
    pixels = DECODE_BATCH * 3 * options.image_size**2
    check_shared_memory(pixels, math.ceil(len(order) / DECODE_BATCH), options.num_workers)
    if world_size() > 1:
        return ImagesOnDemand(images, order, options.image_size, options.num_workers)
    check_cache(options, len(order))
    return DecodedImages(
        images,
        order,
        options.image_size,
        options.cache_gb,
        Path(options.save_dir),
        options.num_workers,
    )


def shared_hash(own: str, images: ImageList) -> str:
    """The main process's hash of the images.

    It holds modification times, which may differ where every machine has its own copy of the
    images; names must be the same.
    """
    agree([int(images.digest()[:15], 16)], "the validation images")
    return bytes(from_main_process(list(bytes.fromhex(own)))).hex()


def identity(
    options: Options, archs: dict, images: str, calibration, arithmetic: Arithmetic
) -> dict[str, str]:
    """What a saved state belongs to: whatever the accuracies depend on.

    ``images`` is the hash of the images to score on. All processes compute with the same.
    """
    setting = f"{options.backbone}, {arithmetic}"
    agree([int(hashlib.sha256(setting.encode()).hexdigest()[:15], 16)], "device or Paddle")
    pixels = None if calibration is None else calibration.numpy().tobytes()
    return {
        "checkpoint": file_digest(find_checkpoint(options.ckpt_dir)),
        "image_list": images,
        "architecture_list": architectures_hash(archs),
        "setting": setting,
        "calibration": "none" if pixels is None else hashlib.sha256(pixels).hexdigest(),
    }


def shared_identity(
    options: Options,
    archs: dict,
    images: ImageList,
    order: np.ndarray,
    calibration,
    arithmetic: Arithmetic,
) -> dict[str, str]:
    """As :func:`identity`, the same for all shards of ``archs``, wherever they are scored."""
    names = list_hash(images, order, options.image_size, times=False)
    return identity(options, archs, names, calibration, arithmetic)


def at_positions(archs: dict[str, Architecture], positions: list[int]) -> dict[str, Architecture]:
    """Those that stand at the given positions of the list."""
    entries = list(archs.items())
    return dict(entries[position] for position in positions)


def architectures(options: Options, space: SearchSpace) -> dict[str, Architecture]:
    """What to score: a file's architectures, or ``eval_sample_num`` drawn ones.

    Raises:
        UserError: neither is given, or one of them does not fit into the supernet.
    """
    wanted = options.eval_sample_num
    if options.modelarch_file:
        archs = read_architectures(options.modelarch_file)
        if wanted > len(archs):
            raise UserError(
                f"--eval_sample_num {wanted}, but {options.modelarch_file} has {len(archs)} "
                "architectures; lower it, or give 0 for all"
            )
        archs = dict(islice(archs.items(), wanted or None))
    elif wanted:
        archs = space.sample_distinct(np.random.default_rng(options.seed), wanted)
    else:
        raise UserError("--modelarch_file is missing (or --eval_sample_num N to draw some)")
    for name, arch in archs.items():
        try:
            space.shared_plan(arch)
        except UserError as error:
            raise UserError(f"architecture {name}: {error}") from None
    return archs


if __name__ == "__main__":
    run_main(main)
