"""Stage three: score every architecture of a file with the stage-two supernet.

    python3 -u train_supernet.py run --image_dir DIR --ckpt_dir checkpoint_files/stage2/0.pdparams \
        --modelarch_file CVPR_2022_NAS_Track1_test.json
"""

from __future__ import annotations

from hnas.base.signals import hold_signals

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import logging
from itertools import islice
from pathlib import Path

import numpy as np
import paddle

from hnas.architecture_file import read_architectures
from hnas.base.device import Arithmetic
from hnas.base.errors import UserError, run_main
from hnas.base.files import remove_leftovers
from hnas.dataset.image_folder import ImageList
from hnas.evaluation.counts import Counts
from hnas.evaluation.engine import (
    ScoringSettings,
    evaluate_one_by_one,
    evaluate_shared,
)
from hnas.evaluation.images import list_hash
from hnas.evaluation.ledger import Targets
from hnas.evaluation.results import warn_if_guessing, write_results
from hnas.evaluation.shard_files import ScoredShard, write_shard
from hnas.evaluation.shards import Shard
from hnas.evaluation.state import architectures_hash
from hnas.models.elastic import ElasticResNet
from hnas.models.pinasv2 import build_network
from hnas.parallel.distributed import (
    barrier,
    is_main_process,
    leave,
    world_size,
)
from hnas.search_space import Architecture, SearchSpace, find_backbone
from hnas.utils.flags import Stage
from hnas.utils.memory_needs import check_chunk
from hnas.utils.options import Options
from hnas.utils.parsing import parse_options
from hnas.utils.runtime import (
    calibration_images,
    require,
    space_of,
    start,
    validation_images,
    validation_loader,
)
from hnas.utils.scoring import decoded_images, identity, scored_order, shared_hash, variant
from hnas.utils.training import start_from_checkpoint

logger = logging.getLogger(__name__)


def main() -> None:
    options = parse_options(Stage.SCORE, about=__doc__.splitlines()[0])
    if find_backbone(options.backbone).contrastive:
        raise UserError(f"--backbone {options.backbone} is stage 1's; stage 3 takes resnet48")
    shard = wanted_shard(options)
    arithmetic = start(options, scores=True)
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
    order = scored_order(options, images)
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
    if is_main_process():
        warn_if_guessing(counts, len(images.classes), "the best sub-network")
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
    names = shared_hash(decoded.hash, images.select(order))
    return evaluate_shared(
        network,
        archs,
        decoded,
        Path(options.save_dir),
        {
            **identity(options, names, calibration, arithmetic),
            "architecture_list": architectures_hash(archs),
        },
        ScoringSettings(
            calibration,
            options.chunk_size,
            Targets(options.target_se, options.target_tau),
            variant(arithmetic, calibration),
        ),
    )


def shared_identity(
    options: Options,
    archs: dict,
    images: ImageList,
    order: np.ndarray,
    calibration: paddle.Tensor | None,
    arithmetic: Arithmetic,
) -> dict[str, str]:
    """What accuracies belong to: the same for all shards of ``archs``, wherever they are scored."""
    names = list_hash(images, order, options.image_size, times=False)
    return {
        **identity(options, names, calibration, arithmetic),
        "architecture_list": architectures_hash(archs),
    }


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
