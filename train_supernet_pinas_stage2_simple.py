"""Stage two: distillation from the pretrained teacher, several sub-networks a batch.

    python3 -u train_supernet_pinas_stage2_simple.py run --image_dir DIR --pretrained FILE \
        --use_ckpt True --ckpt_dir checkpoint_files/stage1/0.pdparams
"""

from __future__ import annotations

from hnas.base.errors import UserError, hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import logging

from hnas.dataset.transforms import TrainTransform
from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import build_network
from hnas.parallel.distributed import leave
from hnas.programs.flags import Stage
from hnas.programs.memory_needs import IN_TRAINING
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.programs.runtime import require, start, training_images, training_loader
from hnas.utils.hapi_wrapper import DistillationModel, relative_sizes
from hnas.utils.SampleMethod import FixedSampler, build_sampler
from hnas.utils.starting import pretrained_network, start_from_checkpoint, start_from_pretrained
from hnas.utils.training import fit, prepare
from hnas.utils.validation import figures_text, measurement, measurement_of_largest

logger = logging.getLogger(__name__)


def main() -> None:
    options = parse_options(Stage.DISTILL, about=__doc__.splitlines()[0])
    check_flags(options)
    start(options, writes=options.train_flag)
    require(options, "pretrained")
    images = training_images(options)
    space = options.space
    network = build_network(options.backbone, len(images.classes), space)
    teacher, digest = pretrained_network(options, images.classes, space)
    files = {"initial_weights": digest, "teacher": digest}
    frozen = False
    if options.initial_weights:
        initial = start_from_checkpoint(network, options.initial_weights, images.classes)
        frozen, files["initial_weights"] = initial.freeze_bn, initial.digest
    else:
        start_from_pretrained(network, teacher)
    if options.train_flag:
        frozen = options.freeze_bn
    if frozen:
        freeze_statistics(network)

    sampler = FixedSampler(space.largest())
    if options.dyna_batch_size:
        sampler = build_sampler(options, space, options.seed)
    model = DistillationModel(
        network,
        None if options.in_place_distillation else teacher,
        sampler,
        loss_weights=relative_sizes(space) if options.use_loss_expand else None,
        in_place=options.in_place_distillation,
    )
    crop = TrainTransform(options.image_size, options.crop_scale_min, options.flip_prob)
    loader = training_loader(options, images, crop)
    prepare(model, options, len(loader))

    if options.eval_freq or not options.train_flag:
        measure = measurement(options, network, teacher, frozen, images)
    else:
        measure = measurement_of_largest(options, network, teacher, images)
    if options.train_flag:
        if options.in_place_distillation:
            del files["teacher"]
        fit(model, options, loader, measure, files)
    else:
        logger.info("validation: %s", figures_text(measure()))
    leave()


def check_flags(options: Options) -> None:
    """Refuse flags that do not go together.

    Raises:
        UserError: naming them.
    """
    if options.in_place_distillation and (
        options.sample_method != "sandwich" or not options.dyna_batch_size
    ):
        raise UserError(
            "--in_place_distillation True needs --sample_method sandwich and at least 2 for "
            "--dyna_batch_size: the largest network teaches the others"
        )
    if options.rank_gt and options.train_flag and not options.eval_freq:
        raise UserError("--rank_gt scores every --eval_freq epochs; give 1 instead of 0")


if __name__ == "__main__":
    run_main(main, IN_TRAINING)
