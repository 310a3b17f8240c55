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
from hnas.base.errors import UserError, run_main
from hnas.base.files import remove_leftovers
from hnas.dataset.image_folder import ImageList
from hnas.evaluation.engine import (
    ScoringSettings,
    evaluate_one_by_one,
    evaluate_shared,
    write_results,
)
from hnas.evaluation.hits import Counts
from hnas.evaluation.ledger import architectures_hash
from hnas.models.elastic import ElasticResNet
from hnas.models.registry import build_network
from hnas.parallel.distributed import (
    barrier,
    is_main_process,
    leave,
    world_size,
)
from hnas.search_space import Architecture, SearchSpace, find_backbone
from hnas.utils.memory_needs import check_chunk
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
from hnas.utils.scoring import decoded_images, identity, scored_order, shared_hash
from hnas.utils.training import start_from_checkpoint

logger = logging.getLogger(__name__)


def main() -> None:
    options = parse_options(Stage.SCORE, about=__doc__.splitlines()[0])
    if find_backbone(options.backbone).contrastive:
        raise UserError(f"--backbone {options.backbone} is stage 1's; stage 3 takes resnet48")
    start(options)
    if world_size() > 1 and options.eval_engine == "reference":
        raise UserError("--eval_engine reference runs in one process; shared runs in several")
    require(options, "ckpt_dir")
    check_chunk(options)
    space = space_of(options)
    archs = architectures(options, space)
    images = validation_images(options)
    network = build_network(options.backbone, len(images.classes), space)
    checkpoint = start_from_checkpoint(network, options.ckpt_dir, images.classes)
    save_dir = Path(options.save_dir)
    if is_main_process():
        remove_leftovers(save_dir)
    barrier()
    calibration = calibration_images(options, checkpoint.freeze_bn, classes=images.classes)
    counts = score(options, network, archs, images, calibration)
    if is_main_process():
        write_results(save_dir, archs, counts)
    leave()


def score(
    options: Options,
    network: ElasticResNet,
    archs: dict[str, Architecture],
    images: ImageList,
    calibration: paddle.Tensor | None,
) -> Counts:
    """Hits of all architectures, complete in the main process.

    Raises:
        UserError: more images are asked for than there are.
    """
    order = scored_order(options, images)
    if options.eval_engine == "reference":
        loader = validation_loader(options, images, order)
        return evaluate_one_by_one(network, archs, loader, calibration)
    decoded = decoded_images(options, images, order)
    return evaluate_shared(
        network,
        archs,
        decoded,
        Path(options.save_dir),
        {
            **identity(options, shared_hash(decoded.hash, images.select(order)), calibration),
            "architecture_list": architectures_hash(archs),
        },
        ScoringSettings(calibration, options.chunk_size, options.target_se, options.amp),
    )


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
