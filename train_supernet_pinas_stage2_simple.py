"""Stage two: distillation from the pretrained teacher, several sub-networks a batch.

    python3 -u train_supernet_pinas_stage2_simple.py run --image_dir DIR --pretrained FILE \
        --use_ckpt True --ckpt_dir checkpoint_files/stage1/0.pdparams
"""

from __future__ import annotations

from hnas.base.signals import hold_signals

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import logging

from hnas.base.errors import UserError, run_main
from hnas.dataset.transforms import TrainTransform
from hnas.evaluation.reference import evaluate_reference
from hnas.models.elastic import freeze_statistics
from hnas.models.registry import build_network
from hnas.parallel.distributed import is_main_process, leave
from hnas.search_space import find_backbone
from hnas.utils.callbacks import EvaluateExtremes
from hnas.utils.hapi_wrapper import DistillationModel, relative_sizes
from hnas.utils.options import Stage
from hnas.utils.parsing import parse_options
from hnas.utils.runtime import (
    calibration_images,
    require,
    space_of,
    start,
    training_images,
    training_loader,
    validation_images,
    validation_loader,
)
from hnas.utils.SampleMethod import LargestSampler, build_sampler
from hnas.utils.training import (
    fit,
    prepare,
    pretrained_network,
    start_from_checkpoint,
    start_from_pretrained,
)

logger = logging.getLogger(__name__)


def main() -> None:
    options = parse_options(Stage.DISTILL, about=__doc__.splitlines()[0])
    if find_backbone(options.backbone).contrastive:
        raise UserError(f"--backbone {options.backbone} is stage 1's; stage 2 takes resnet48")
    start(options, writes=options.train_flag)
    require(options, "pretrained")
    images = training_images(options)
    space = space_of(options)
    network = build_network(options.backbone, len(images.classes), space)
    teacher = pretrained_network(options, images.classes, space)
    frozen = False
    if options.initial_weights:
        frozen = start_from_checkpoint(network, options.initial_weights, images.classes).freeze_bn
    else:
        start_from_pretrained(network, teacher)
    if options.train_flag:
        frozen = options.freeze_bn
    if frozen:
        freeze_statistics(network)

    largest_only = not options.dyna_batch_size
    model = DistillationModel(
        network,
        teacher,
        LargestSampler(space) if largest_only else build_sampler(options, space, options.seed),
        loss_weights=relative_sizes(space) if options.use_loss_expand else None,
        temperature=options.distill_temperature,
    )
    crop = TrainTransform(options.image_size, options.crop_scale_min, options.flip_prob)
    loader = training_loader(options, images, crop)
    prepare(model, options, len(loader))

    callbacks = []
    if options.eval_freq or not options.train_flag:
        val = validation_loader(options, validation_images(options, images))
        calibration = calibration_images(options, frozen, images)
        extremes = {"largest": space.largest(), "smallest": space.smallest()}

        def evaluate() -> dict[str, float]:
            return {
                name: float(evaluate_reference(network, [arch], val, calibration).accuracy()[0])
                for name, arch in extremes.items()
            }

        callbacks.append(EvaluateExtremes(evaluate, options.eval_freq))
    if options.train_flag:
        fit(model, options, loader, callbacks)
    elif is_main_process():
        for name, accuracy in evaluate().items():
            logger.info("validation top-1 of the %s sub-network: %.4f", name, accuracy)
    leave()


if __name__ == "__main__":
    run_main(main)
