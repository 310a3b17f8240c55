"""Stage one: contrastive training of the supernet from official pretrained weights.

python3 -u train_supernet_pinas_stage1.py run --image_dir DIR --pretrained FILE
"""

from __future__ import annotations

from hnas.base.errors import UserError, hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import logging

from hnas.dataset.transforms import StrongTransform, TrainTransform, TwoViews
from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import build_network
from hnas.parallel.distributed import world_size
from hnas.programs.flags import AUTO, Stage
from hnas.programs.memory_needs import IN_TRAINING, check_queue
from hnas.programs.parsing import parse_options
from hnas.programs.runtime import require, start, training_images, training_loader
from hnas.search_space import find_backbone
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel, scaled_key_momentum
from hnas.utils.SampleMethod import FixedSampler, RandomSampler
from hnas.utils.starting import (
    pretrained_network,
    start_contrast_from_checkpoint,
    start_from_pretrained,
)
from hnas.utils.training import fit, prepare
from hnas.utils.validation import measurement_of_largest

logger = logging.getLogger(__name__)


def main() -> None:
    options = parse_options(Stage.CONTRAST, about=__doc__.splitlines()[0])
    if not find_backbone(options.backbone).contrastive:
        raise UserError(f"--backbone {options.backbone} has no neck; stage 1 takes resnet48pinasv2")
    if options.queue_size % (options.batch_size * world_size()):
        times = f" times {world_size()} processes" if world_size() > 1 else ""
        raise UserError(
            f"--queue_size {options.queue_size} is not a multiple of "
            f"--batch_size {options.batch_size}{times}"
        )
    start(options)
    check_queue(options)
    if options.key_momentum == AUTO:
        options.key_momentum = scaled_key_momentum(options.batch_size * world_size())
    images = training_images(options)
    if options.queue_size > len(images):
        logger.warning(
            "--queue_size %d, but %d training images: the keys of an image's own earlier views "
            "are among its negatives; give a third of the images at most",
            *(options.queue_size, len(images)),
        )
    space = options.space
    network = build_network(
        options.backbone,
        len(images.classes),
        space,
        queue_size=options.queue_size,
        key_momentum=options.key_momentum,
        temperature=options.temperature,
    )
    measure = None
    if options.initial_weights:
        digest = start_contrast_from_checkpoint(network, options.initial_weights, images.classes)
    else:
        require(options, "pretrained")
        teacher, digest = pretrained_network(options, images.classes, space)
        measure = measurement_of_largest(options, network.backbone, teacher, images)
        start_from_pretrained(network.backbone, teacher, reorder=options.recipe == "own")
        network.reset_key_encoder()
    if options.freeze_bn:
        freeze_statistics(network)
    elif not options.largest_net_in_stage1:
        measure = None  # its running statistics will be a mixture of all paths'

    sampler = FixedSampler(space.largest(), number=2)
    if not options.largest_net_in_stage1:
        sampler = RandomSampler(space, options.seed, number=2)
    model = ContrastiveModel(network, sampler)
    crop = TrainTransform(options.image_size, options.crop_scale_min, options.flip_prob)
    strong = StrongTransform(options.image_size, options.crop_scale_min, options.flip_prob)
    views = {
        "two_kinds": TwoViews(strong, crop),
        "one_kind": TwoViews(crop, crop),
        "same": TwoViews(crop),
    }[options.stage1_views]
    loader = training_loader(options, images, views)
    prepare(model, options, len(loader))
    fit(model, options, loader, measure, {"initial_weights": digest})


if __name__ == "__main__":
    run_main(main, IN_TRAINING)
