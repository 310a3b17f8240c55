"""Export one sub-network as it was scored: weights, a Paddle Inference program, or ONNX.

    python -m hnas.tools.export --arch CODE --ckpt_dir F --image_dir DIR --format onnx --save_dir S

--arch may be a name in --modelarch_file. --ckpt_dir is a supernet, or what train_standalone wrote.
The network gets the BatchNorm statistics that scoring with the same flags uses, and is compared
with its source on the validation images before anything is written. S gets the network, card.json
(what it is, and how its images are prepared) and predict.py, which needs nothing of this project.
"""

from __future__ import annotations

import os

from hnas.base.signals import hold_signals

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle's remarks on programs

import difflib
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import paddle

import hnas
from hnas.architecture_file import ArchitectureFileError, read_accuracies, read_architectures
from hnas.base.errors import UserError, run_main
from hnas.base.files import (
    digest_path,
    file_digest,
    read_json,
    remove_leftovers,
    replacing,
    write_digest,
    write_json,
)
from hnas.dataset.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize, shorter_side
from hnas.evaluation.comparison import Comparison, compare
from hnas.evaluation.images import balanced_order
from hnas.models.elastic import calibrated
from hnas.models.pinasv2 import build_network
from hnas.models.resnet import ResNet
from hnas.parallel.distributed import world_size
from hnas.search_space import Architecture, find_backbone
from hnas.utils.exporting import (
    FILES,
    INPUT,
    OUTPUT,
    check_format,
    read_network,
    write_network,
)
from hnas.utils.flags import AUTO, Stage
from hnas.utils.options import Options
from hnas.utils.parsing import parse_options
from hnas.utils.programs import program
from hnas.utils.runtime import (
    calibration_images,
    require,
    space_of,
    start,
    validation_images,
    validation_loader,
)
from hnas.utils.training import start_from_checkpoint
from hnas.utils.weights import (
    Checkpoint,
    check_classes,
    find_checkpoint,
    load_weights,
    read_checkpoint,
)

logger = logging.getLogger(__name__)

CARD, PROGRAM = "card.json", "predict.py"
TOLERANCE = {"float32": 0.01, "float16": 0.05}
"""Largest difference of logits by the precision, as a share of the largest logit."""


def main(argv=None) -> None:
    options = parse_options(Stage.EXPORT, argv, about=__doc__.splitlines()[0])
    if world_size() > 1:
        raise UserError("export runs in one process")
    if find_backbone(options.backbone).contrastive:
        raise UserError(f"--backbone {options.backbone} is stage 1's; export takes resnet48")
    require(options, "ckpt_dir")
    check_format(options.format, options.precision)
    start(options)
    checkpoint = read_checkpoint(options.ckpt_dir)
    wanted = find_architecture(options, checkpoint)
    folder = Path(options.save_dir)
    identity = {
        "arch": wanted.arch.code,
        "format": options.format,
        "precision": options.precision,
        "image_size": options.image_size,
        "bn_calibration_images": options.bn_calibration_images,
        "seed": options.seed,
        "checkpoint": file_digest(find_checkpoint(options.ckpt_dir)),
    }
    check_folder(folder, identity)
    images = validation_images(options)
    if options.eval_images > len(images):
        raise UserError(
            f"--eval_images {options.eval_images}, but {images.folder} has {len(images)}; lower "
            "it, or give 0 for all"
        )
    order = balanced_order(images.labels, options.seed)[: options.eval_images or None]
    loader = validation_loader(options, images, order)
    source = open_source(options, checkpoint, wanted.arch, images.classes)
    with tempfile.TemporaryDirectory(prefix="pinas-") as made:
        about = {
            "backbone": options.backbone,
            "arch": wanted.arch.code,
            "freeze_bn": checkpoint.freeze_bn,
            "classes": list(images.classes),
        }
        write_network(
            source.network, Path(made), options.format, options.precision, options.image_size, about
        )
        blank = ResNet(space_of(options).plan(wanted.arch), len(images.classes))
        blank.eval()
        exported = read_network(Path(made), options.format, blank)
        with calibrated(source.shared, source.calibration):
            found = compare(source.shared, exported, loader)
        check(found, options, wanted)
        files = {name: Path(made) / name for name in FILES[options.format]}
        card = describe(options, wanted, source, found, images.classes, identity, files)
        write(folder, files, program(options.format), card)
    logger.info("%s of %s: %s, %s", options.format, wanted.arch.code, folder / CARD, PROGRAM)


@dataclass(frozen=True)
class Wanted:
    """What to export.

    Attributes:
        arch: the architecture.
        name: its name in ``modelarch_file``, or empty.
        stated: its accuracy there, as a share of 1; None if the file says none.
    """

    arch: Architecture
    name: str = ""
    stated: float | None = None


def find_architecture(options: Options, checkpoint: Checkpoint) -> Wanted:
    """The architecture that ``--arch`` names; of a network that was trained alone, its own.

    Raises:
        UserError: it is none, or another one than the checkpoint's.
    """
    own = checkpoint.about.get("arch")
    if not options.arch:
        if own is None:
            require(options, "arch")
        return Wanted(Architecture.from_code(own))
    wanted = _named(options)
    if own is not None and Architecture.from_code(own) != wanted.arch:
        raise UserError(
            f"--arch {wanted.arch.code}, but {options.ckpt_dir} is the network {own}; give its "
            "own weights, or a supernet's"
        )
    return wanted


def _named(options: Options) -> Wanted:
    """What ``--arch`` names: a code, or an architecture of ``modelarch_file``.

    Raises:
        UserError: it is neither.
    """
    archs = read_architectures(options.modelarch_file) if options.modelarch_file else {}
    if options.arch not in archs and not options.arch.isdigit():
        if not archs:
            raise UserError(
                f"--arch {options.arch} is no code; to give a name, give --modelarch_file"
            )
        nearest = difflib.get_close_matches(options.arch, archs, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"--arch {options.arch} is not in {options.modelarch_file}{hint}")
    arch = archs.get(options.arch) or Architecture.from_code(options.arch)
    name = {own: name for name, own in archs.items()}.get(arch)
    if name is None:
        return Wanted(arch)
    stated = None
    with suppress(ArchitectureFileError):  # a list of codes alone
        accuracies = dict(zip(archs, read_accuracies(options.modelarch_file)[1], strict=True))
        stated = float(accuracies[name])
        # 0 stands for none in files that are still to be scored.
        stated = (stated if stated <= 1 else stated / 100) or None
    return Wanted(arch, name, stated)


def check_folder(folder: Path, identity: Mapping[str, object]) -> None:
    """An earlier export of something else is not to be overwritten.

    Raises:
        UserError: there is one.
    """
    if not (folder / CARD).is_file():
        return
    earlier = read_json(folder / CARD).get("identity")
    if earlier != identity:
        raise UserError(f"{folder} holds another export; choose another --save_dir, or remove it")


@dataclass(frozen=True)
class Source:
    """Where the network comes from.

    Attributes:
        network: what is exported, in eval mode.
        shared: what scoring runs: the supernet with the sub-network active, or ``network``.
        calibration: normalised images [N, 3, S, S] that scoring re-calibrates ``shared`` with.
        statistics: of BatchNorm, in words.
    """

    network: ResNet
    shared: paddle.nn.Layer
    calibration: paddle.Tensor | None
    statistics: str


def open_source(
    options: Options, checkpoint: Checkpoint, arch: Architecture, classes: Sequence[str]
) -> Source:
    """The network that ``ckpt_dir`` holds of ``arch``, with the statistics of scoring.

    Raises:
        UserError: it holds none, or images to re-calibrate with are asked for in vain.
    """
    space = space_of(options)
    if "arch" in checkpoint.about:
        if options.bn_calibration_images not in (AUTO, 0):
            raise UserError(
                f"--bn_calibration_images {options.bn_calibration_images}, but "
                f"{options.ckpt_dir} is no supernet: its statistics are its own; leave the flag out"
            )
        network = ResNet(space.plan(arch), len(classes))
        check_classes(checkpoint, classes, options.ckpt_dir)
        load_weights(network, checkpoint.weights, options.ckpt_dir)
        network.eval()
        return Source(network, network, None, "its own")
    supernet = build_network(options.backbone, len(classes), space)
    start_from_checkpoint(supernet, options.ckpt_dir, classes)
    supernet.eval()
    calibration = calibration_images(options, checkpoint.freeze_bn, classes=classes)
    if calibration is None:
        supernet.mixed = False  # whether that is right was just said
    network = supernet.extract(arch, calibration)
    supernet.activate(arch)
    if calibration is None:
        statistics = "frozen" if checkpoint.freeze_bn else "running"
        return Source(network, supernet, None, statistics)
    statistics = f"of {len(calibration)} training images, seed {options.seed}"
    return Source(network, supernet, normalize(calibration), statistics)


def check(found: Comparison, options: Options, wanted: Wanted) -> None:
    """Log how both compare, and with what the file of scores says.

    Raises:
        UserError: their logits are too far apart, or in float32 on CPUs they count hits that nearly
            equal logits do not explain. (GPUs' convolutions may compute with fewer digits.)
    """
    (scored, exported), images = found.counts.top1.tolist(), found.counts.images
    logger.info(
        "source %d, exported network %d top-1 hits of %d images; largest logit difference %.3g",
        scored,
        exported,
        images,
        found.difference,
    )
    allowed = int(found.counts.near1.max())
    exact = options.precision == "float32" and paddle.get_device() == "cpu"
    is_far = found.difference > TOLERANCE[options.precision] * found.largest
    if is_far or exact and abs(scored - exported) > allowed:
        raise UserError(
            f"the exported network has {exported} hits and its source {scored}, with logits up to "
            f"{found.difference:.3g} apart: nothing was written; please report this with your "
            "versions"
        )
    if wanted.stated is None:
        return
    if abs(wanted.stated * images - scored) <= allowed + 1e-6:
        logger.info("%s: %d of %d hits, as the scores say", wanted.name, scored, images)
    elif options.eval_images:
        logger.info("%s: the scores say %.4f, of other images", wanted.name, wanted.stated)
    else:
        logger.warning(
            "the scores say %.4f for %s, here it has %.4f: they are of other images, weights or "
            "statistics",
            wanted.stated,
            wanted.name,
            scored / images,
        )


def describe(
    options: Options,
    wanted: Wanted,
    source: Source,
    found: Comparison,
    classes: Sequence[str],
    identity: Mapping[str, object],
    files: Mapping[str, Path],
) -> dict:
    """The card: what the network is, how good, and how its images are prepared."""
    space, size = space_of(options), options.image_size
    counts = found.counts
    return {
        "identity": dict(identity),
        "arch": wanted.arch.code,
        "name": wanted.name,
        "backbone": options.backbone,
        "macs": space.macs(wanted.arch, size, len(classes)),
        "params": space.params(wanted.arch, len(classes)),
        "accuracy": {
            "top1": float(counts.accuracy()[1]),
            "top5": float(counts.top5_accuracy()[1]),
            "hits": int(counts.top1[1]),
            "hits_of_source": int(counts.top1[0]),
            "images": counts.images,
            "largest_logit_difference": found.difference,
        },
        "statistics": source.statistics,
        "input": {"name": INPUT, "shape": ["N", 3, size, size], "dtype": "float32"},
        "output": {"name": OUTPUT, "shape": ["N", len(classes)], "dtype": "float32"},
        "preprocessing": {
            "colours": "RGB, 8 bits, EXIF orientation ignored",
            "resize_shorter_side": shorter_side(size),
            "resize": "Pillow's bilinear; the longer side is cut to whole pixels",
            "crop": size,
            "crop_place": "centre; offsets round((side - crop) / 2), a half to the even number",
            "scale": "1/255",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
        "strides": [stride for *_, stride in space.plan(wanted.arch).blocks()],
        "classes": list(classes),
        "files": {name: file_digest(path) for name, path in files.items()},
        "versions": {"pinas": hnas.__version__, "paddle": paddle.__version__},
    }


def write(folder: Path, files: Mapping[str, Path], text: str, card: Mapping) -> None:
    """Write the network, its program and, last, the card.

    Raises:
        UserError: the folder cannot be written.
    """
    remove_leftovers(folder)
    for name, path in files.items():
        with replacing(folder / name) as temporary:
            shutil.copyfile(path, temporary)
            digest_path(folder / name).unlink(missing_ok=True)
        write_digest(folder / name, card["files"][name])
    with replacing(folder / PROGRAM) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(folder / CARD, card)


if __name__ == "__main__":
    run_main(main)
