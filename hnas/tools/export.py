"""Export one sub-network as it was scored: weights, a Paddle Inference program, or ONNX.

    python -m hnas.tools.export --arch CODE --ckpt_dir F --image_dir DIR --format onnx --save_dir S

--arch may be a name in --modelarch_file. --ckpt_dir is a supernet, or what train_standalone wrote.
The network gets the BatchNorm statistics that scoring with the same flags uses, and is compared
with its source on the validation images before anything is written. S gets the network, card.json
(what it is, and how its images are prepared) and predict.py, which needs nothing of this project.
--quantize int8 makes ONNX of 8 bits by onnxruntime; what that costs in accuracy is told.
"""

from __future__ import annotations

from hnas.base.errors import UserError, hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import difflib
import logging
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import paddle

from hnas.architecture_file import in_shares, read_architectures, read_scores
from hnas.base.files import read_json
from hnas.base.settings import check_same_settings
from hnas.dataset.transforms import normalize
from hnas.evaluation.reference import watched_logits
from hnas.exporting.export_folder import CARD, PROGRAM, describe, write_folder
from hnas.exporting.formats import (
    check,
    check_format,
    compare,
    compare_with_scores,
    quantize_onnx,
    read_network,
    tell_loss,
    write_network,
)
from hnas.models.elastic import calibrated
from hnas.models.pinasv2 import build_network
from hnas.models.resnet import ResNet
from hnas.parallel.distributed import world_size
from hnas.programs.flags import AUTO, Stage
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.programs.runtime import (
    calibration_images,
    note_run,
    require,
    scored_order,
    start,
    training_crops,
    validation_images,
    validation_loader,
)
from hnas.search_space import Architecture
from hnas.utils.starting import start_from_checkpoint
from hnas.weights.loading import Checkpoint, read_checkpoint

logger = logging.getLogger(__name__)


def main(argv=None) -> None:
    options = parse_options(Stage.EXPORT, argv, about=__doc__.splitlines()[0])
    if world_size() > 1:
        raise UserError("export runs in one process")
    require(options, "ckpt_dir")
    quantizes = options.quantize != "none"
    check_format(options.format, options.quantize)
    arithmetic = start(options, notes=False)
    checkpoint = read_checkpoint(options.ckpt_dir)
    arch, name, stated = find_architecture(options, checkpoint)
    form, size, space = options.format, options.image_size, options.space
    card_path = Path(options.save_dir) / CARD
    identity = {
        "arch": arch.code,
        "format": form,
        "precision": options.quantize if quantizes else "float32",  # earlier versions had float16
        "image_size": size,
        "bn_calibration_images": options.bn_calibration_images,
        "seed": options.seed,
        "checkpoint": checkpoint.digest,
    }
    identity |= {"quantize_images": options.quantize_images} if quantizes else {}
    if card_path.is_file():
        earlier = read_json(card_path).get("identity")
        earlier = earlier if isinstance(earlier, dict) else {}
        remedy = "choose another --save_dir, or remove it"
        check_same_settings(card_path, earlier, identity, remedy)
    images = validation_images(options)
    loader = validation_loader(options, images, scored_order(options, images))
    if quantizes:
        number = options.quantize_images
        wanted = f"--quantize_images {number}", "--quantize none"
        crops = training_crops(options, number, *wanted, images.classes, at_most=True)
    source = open_source(options, checkpoint, arch, images.classes)
    of_weights = {"backbone": options.backbone, "arch": arch.code}
    of_weights |= {"freeze_bn": checkpoint.freeze_bn, "classes": list(images.classes)}
    with tempfile.TemporaryDirectory(prefix="pinas-") as made:
        write_network(source.network, Path(made), form, size, of_weights)
        strides = [stride for *_, stride in space.plan(arch).blocks()]
        exported = read_network(Path(made), form, strides)
        with calibrated(source.shared, source.calibration):
            watched = partial(watched_logits, source.shared, who="the source")
            found = compare(watched, exported, loader)
        check(found)
        if stated is not None:
            compare_with_scores(found, name, stated, on_some=options.eval_images > 0)
        if quantizes:
            quantize_onnx(Path(made), crops)
            found = compare(exported, read_network(Path(made), form, strides), loader)
            tell_loss(found)
        card = {"identity": identity, "arch": arch.code, "name": name}
        card |= {"backbone": options.backbone, "strides": strides}
        card |= describe(space, arch, size, images.classes, found, source.statistics)
        note_run(options, arithmetic)
        write_folder(card_path.parent, Path(made), form, card)
    logger.info("%s of %s: %s, %s", form, arch.code, card_path, PROGRAM)


def find_architecture(
    options: Options, checkpoint: Checkpoint
) -> tuple[Architecture, str, float | None]:
    """The architecture that ``--arch`` names, or that of a network that was trained alone.

    With its name and accuracy, a share of 1, in ``modelarch_file``, or "" and None.

    Raises:
        UserError: it is none, or another one than the checkpoint's.
    """
    own, archs, stated = checkpoint.about.get("arch"), {}, {}
    if not options.arch:
        if own is None:
            require(options, "arch")
        return Architecture.from_code(own), "", None
    if options.modelarch_file:
        archs = read_architectures(options.modelarch_file)
        try:
            accuracies = in_shares(read_scores(options.modelarch_file)[1])
            stated = dict(zip(archs, accuracies.tolist(), strict=True))
        except UserError as reason:  # a list of codes alone, among others
            logger.info("scores are not compared: %s", reason)
    if options.arch not in archs and not options.arch.isdigit():
        if not archs:
            raise UserError(
                f"--arch {options.arch} is no code; to give a name, give --modelarch_file"
            )
        nearest = difflib.get_close_matches(options.arch, archs, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"--arch {options.arch} is not in {options.modelarch_file}{hint}")
    arch = archs.get(options.arch) or Architecture.from_code(options.arch)
    if own is not None and Architecture.from_code(own) != arch:
        raise UserError(
            f"--arch {arch.code}, but {options.ckpt_dir} is the network {own}; give its own "
            "weights, or a supernet's"
        )
    name = next((name for name, each in archs.items() if each == arch), "")
    # 0 stands for none in files that are still to be scored.
    return arch, name, stated.get(name) or None


class Source(NamedTuple):
    """What is exported, and what scoring runs: the supernet with that sub-network active."""

    network: ResNet
    shared: paddle.nn.Layer
    calibration: paddle.Tensor | None  # normalised, which scoring re-calibrates ``shared`` with
    statistics: str  # of BatchNorm, in words


def open_source(
    options: Options, checkpoint: Checkpoint, arch: Architecture, classes: Sequence[str]
) -> Source:
    """The network that ``ckpt_dir`` holds of ``arch``, with the statistics of scoring.

    Raises:
        UserError: it holds none, or images to re-calibrate with are asked for in vain.
    """
    space, is_alone = options.space, "arch" in checkpoint.about
    if is_alone and options.bn_calibration_images not in (AUTO, 0):
        raise UserError(
            f"--bn_calibration_images {options.bn_calibration_images}, but {options.ckpt_dir} is "
            "no supernet: its statistics are its own; leave the flag out"
        )
    if is_alone:
        shared = ResNet(space.plan(arch), len(classes))
    else:
        shared = build_network(options.backbone, len(classes), space)
    start_from_checkpoint(shared, options.ckpt_dir, classes, checkpoint)
    shared.eval()
    if is_alone:
        return Source(shared, shared, None, "its own")
    calibration = calibration_images(options, checkpoint.freeze_bn, classes=classes)
    if calibration is None:
        shared.mixed = False  # whether that is right was just said
        statistics = "frozen" if checkpoint.freeze_bn else "running"
    else:
        statistics = f"of {len(calibration)} training images, seed {options.seed}"
    network = shared.extract(arch, calibration)
    shared.activate(arch)
    calibration = None if calibration is None else normalize(calibration)
    return Source(network, shared, calibration, statistics)


if __name__ == "__main__":
    run_main(main, "lower --batch_size, or end what else takes memory")
