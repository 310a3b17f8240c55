"""Export one sub-network as it was scored: weights, a Paddle Inference program, or ONNX.

    python -m hnas.tools.export --arch CODE --ckpt_dir F --image_dir DIR --format onnx --save_dir S

--arch may be a name in --modelarch_file. --ckpt_dir is a supernet, or what train_standalone wrote.
The network gets the BatchNorm statistics that scoring with the same flags uses, and is compared
with its source on the validation images before anything is written. S gets the network, card.json
(what it is, and how its images are prepared) and predict.py, which needs nothing of this project.
"""

from __future__ import annotations

import os

from hnas.base.errors import UserError, hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle's remarks on programs

import difflib
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import paddle
from tqdm import tqdm

import hnas
from hnas.architecture_file import ArchitectureFileError, read_accuracies, read_architectures
from hnas.base.files import (
    digest_path,
    file_digest,
    read_json,
    remove_leftovers,
    replacing,
    write_digest,
    write_json,
)
from hnas.base.settings import check_same_settings
from hnas.dataset.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize, shorter_side
from hnas.evaluation.counts import Counts, LogitsError, count_hits
from hnas.evaluation.images import balanced_order
from hnas.exporting.formats import FILES, INPUT, OUTPUT, check_format, read_network, write_network
from hnas.exporting.predict_program import program
from hnas.models.elastic import calibrated
from hnas.models.pinasv2 import build_network
from hnas.models.resnet import ResNet
from hnas.parallel.distributed import world_size
from hnas.programs.flags import AUTO, Stage
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.programs.runtime import (
    calibration_images,
    require,
    space_of,
    start,
    validation_images,
    validation_loader,
)
from hnas.search_space import Architecture, find_backbone
from hnas.utils.starting import start_from_checkpoint
from hnas.weights.loading import Checkpoint, find_checkpoint, read_checkpoint

logger = logging.getLogger(__name__)

CARD, PROGRAM = "card.json", "predict.py"
TOLERANCE = 0.01
"""Largest difference of logits, as a share of the largest one."""


def main(argv=None) -> None:
    options = parse_options(Stage.EXPORT, argv, about=__doc__.splitlines()[0])
    if world_size() > 1:
        raise UserError("export runs in one process")
    if find_backbone(options.backbone).contrastive:
        raise UserError(f"--backbone {options.backbone} is stage 1's; export takes resnet48")
    require(options, "ckpt_dir")
    check_format(options.format)
    start(options)
    checkpoint = read_checkpoint(options.ckpt_dir)
    wanted = find_architecture(options, checkpoint)
    folder, form, size = Path(options.save_dir), options.format, options.image_size
    identity = {
        "arch": wanted.arch.code,
        "format": form,
        "precision": "float32",  # earlier versions had others
        "image_size": size,
        "bn_calibration_images": options.bn_calibration_images,
        "seed": options.seed,
        "checkpoint": file_digest(find_checkpoint(options.ckpt_dir)),
    }
    if (folder / CARD).is_file():
        earlier = read_json(folder / CARD).get("identity")
        earlier = earlier if isinstance(earlier, dict) else {}
        remedy = "choose another --save_dir, or remove it"
        check_same_settings(folder / CARD, earlier, identity, remedy)
    images = validation_images(options)
    if options.eval_images > len(images):
        raise UserError(
            f"--eval_images {options.eval_images}, but {images.folder} has {len(images)}; lower "
            "it, or give 0 for all"
        )
    order = balanced_order(images.labels, options.seed)[: options.eval_images or None]
    loader = validation_loader(options, images, order)
    source = open_source(options, checkpoint, wanted.arch, images.classes)
    about = {
        "backbone": options.backbone,
        "arch": wanted.arch.code,
        "freeze_bn": checkpoint.freeze_bn,
        "classes": list(images.classes),
    }
    with tempfile.TemporaryDirectory(prefix="pinas-") as made:
        write_network(source.network, Path(made), form, size, about)
        blank = ResNet(space_of(options).plan(wanted.arch), len(images.classes))
        blank.eval()
        exported = read_network(Path(made), form, blank)
        with calibrated(source.shared, source.calibration):
            found = compare(source.shared, exported, loader)
        check(found, options, wanted)
        files = {name: Path(made) / name for name in FILES[form]}
        card = describe(options, wanted, source, found, images.classes)
        write(folder, files, program(form), {"identity": identity, **card})
    logger.info("%s of %s: %s, %s", form, wanted.arch.code, folder / CARD, PROGRAM)


class Wanted(NamedTuple):
    """What to export; ``name`` and ``stated`` accuracy, a share of 1, by ``modelarch_file``."""

    arch: Architecture
    name: str = ""
    stated: float | None = None


def find_architecture(options: Options, checkpoint: Checkpoint) -> Wanted:
    """The architecture that ``--arch`` names; of a network that was trained alone, its own.

    Raises:
        UserError: it is none, or another one than the checkpoint's.
    """
    own, archs, stated = checkpoint.about.get("arch"), {}, {}
    if not options.arch:
        if own is None:
            require(options, "arch")
        return Wanted(Architecture.from_code(own))
    if options.modelarch_file:
        archs = read_architectures(options.modelarch_file)
        with suppress(ArchitectureFileError):  # a list of codes alone
            stated = dict(zip(archs, read_accuracies(options.modelarch_file)[1], strict=True))
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
    accuracy = float(stated.get(name, 0))
    # 0 stands for none in files that are still to be scored.
    return Wanted(arch, name, (accuracy if accuracy <= 1 else accuracy / 100) or None)


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
    space, is_alone = space_of(options), "arch" in checkpoint.about
    if is_alone and options.bn_calibration_images not in (AUTO, 0):
        raise UserError(
            f"--bn_calibration_images {options.bn_calibration_images}, but {options.ckpt_dir} is "
            "no supernet: its statistics are its own; leave the flag out"
        )
    if is_alone:
        shared = ResNet(space.plan(arch), len(classes))
    else:
        shared = build_network(options.backbone, len(classes), space)
    start_from_checkpoint(shared, options.ckpt_dir, classes)
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


class Found(NamedTuple):
    """The same images by the source and by what was exported."""

    counts: Counts  # of both, in this order
    difference: float  # the largest between their logits
    largest: float  # logit of the source, without its sign


@paddle.no_grad()
def compare(source, exported, loader) -> Found:
    """Run both on all images of ``loader``.

    Raises:
        LogitsError: a logit is NaN or infinite.
    """
    counts, difference, largest = Counts.zeros(2), 0.0, 0.0
    for images, labels in tqdm(loader, desc="checking", unit="batch", mininterval=1):
        x = normalize(images)
        logits = paddle.stack([source(x), exported(x)])
        hits = count_hits(logits, labels)
        for who, number in zip(("the source", "the exported network"), hits.bad, strict=True):
            if number:
                raise LogitsError(who, number, len(labels))
        counts.add(hits.counts(len(labels)))
        difference = max(difference, float((logits[0] - logits[1]).abs().max()))
        largest = max(largest, float(logits[0].abs().max()))
    return Found(counts, difference, largest)


def check(found: Found, options: Options, wanted: Wanted) -> None:
    """Log how both compare, and with what the file of scores says.

    Raises:
        UserError: their logits are too far apart, or on CPUs they count hits that nearly equal
            logits do not explain. (GPUs' convolutions may compute with fewer digits.)
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
    other_hits = paddle.get_device() == "cpu" and abs(scored - exported) > allowed
    if other_hits or found.difference > TOLERANCE * found.largest:
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
    options: Options, wanted: Wanted, source: Source, found: Found, classes: Sequence[str]
) -> dict:
    """For the card: what the network is, how good, and how its images are prepared."""
    space, size = space_of(options), options.image_size
    counts = found.counts
    return {
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
    }


def write(folder: Path, files: Mapping[str, Path], text: str, card: Mapping) -> None:
    """Write the network, its program and, last, the card.

    Raises:
        UserError: the folder cannot be written.
    """
    remove_leftovers(folder)
    digests = {name: file_digest(path) for name, path in files.items()}
    for name, path in files.items():
        with replacing(folder / name) as temporary:
            shutil.copyfile(path, temporary)
            digest_path(folder / name).unlink(missing_ok=True)
        write_digest(folder / name, digests[name])
    with replacing(folder / PROGRAM) as temporary:
        temporary.write_text(text, encoding="utf-8")
    versions = {"pinas": hnas.__version__, "paddle": paddle.__version__}
    write_json(folder / CARD, {**card, "files": digests, "versions": versions})


if __name__ == "__main__":
    run_main(main)
