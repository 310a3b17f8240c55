"""Train the largest network with labels: makes the weights that the recipe starts from.

    python -m hnas.tools.pretrain run --image_dir DIR --pretrained FILE_TO_WRITE

Takes the entry scripts' flags. Epochs are kept in --save_dir, and --resume continues them. Blocks
begin as their shortcuts; what trains on from here at frozen statistics stays stable so.
"""

from __future__ import annotations

from hnas.base.errors import UserError, hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import logging
import os
from functools import partial
from pathlib import Path

from hnas.base.files import check_output, recorded_digest
from hnas.dataset.transforms import TrainTransform
from hnas.models.pinasv2 import build_network
from hnas.parallel.distributed import is_main_process
from hnas.programs.flags import Stage
from hnas.programs.memory_needs import IN_TRAINING
from hnas.programs.parsing import parse_options
from hnas.programs.runtime import (
    require,
    start,
    training_images,
    training_loader,
    validation_images,
    validation_loader,
)
from hnas.utils.hapi_wrapper import DistillationModel
from hnas.utils.SampleMethod import FixedSampler
from hnas.utils.training import about_weights, fit, prepare
from hnas.utils.validation import network_accuracy
from hnas.weights.checkpoint import RUN_NOTE
from hnas.weights.loading import write_state

logger = logging.getLogger(__name__)


def main() -> None:
    options = parse_options(Stage.PRETRAIN, about=__doc__.splitlines()[0])
    start(options)
    require(options, "pretrained")
    check_output(options.pretrained, "--pretrained")
    made = recorded_digest(options.pretrained) is not None  # public files have none beside them
    ours = made and Path(options.save_dir, RUN_NOTE).exists() or "PINAS_STEP" in os.environ
    if Path(options.pretrained).exists() and not ours:
        raise UserError(
            f"--pretrained {options.pretrained} is there, and was not made from --save_dir "
            f"{options.save_dir}, or lacks its .sha256: remove it, or name another file to write"
        )
    images = training_images(options)
    val = validation_images(options, images)
    space = options.space
    network = build_network(options.backbone, len(images.classes), space)
    network.start_as_shortcuts()
    model = DistillationModel(network, teacher=None, sampler=FixedSampler(space.largest()))
    crop = TrainTransform(options.image_size, options.crop_scale_min, options.flip_prob)
    loader = training_loader(options, images, crop)
    prepare(model, options, len(loader))
    network.activate(space.largest())
    val_loader = validation_loader(options, val)
    measure = partial(network_accuracy, network, val_loader, len(images.classes))
    found = fit(model, options, loader, measure)
    if not is_main_process():
        return
    largest = network.extract(space.largest())
    write_state(options.pretrained, largest.state_dict(), about_weights(options, loader))
    top1 = (found or measure())["top1"]
    logger.info("validation top-1 %.4f, weights in %s", top1, options.pretrained)


if __name__ == "__main__":
    run_main(main, IN_TRAINING)
