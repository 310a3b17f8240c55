"""Train sub-networks from scratch, each as a network of its own: the ground truth of a ranking.

    python -m hnas.tools.train_standalone run --arch CODE --image_dir DIR
    python -m hnas.tools.train_standalone run --modelarch_file F --image_dir DIR --save_dir OUT

Takes the entry scripts' flags. OUT/results.json holds the accuracy of every architecture that is
finished, in the organisers' form, so it can be a --gt of hnas.tools.rank_report. The same command
continues after any kill.
"""

from __future__ import annotations

from hnas.base.errors import UserError, hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import paddle

from hnas.architecture_file import read_accuracies, read_architectures
from hnas.base.command_line import shown
from hnas.base.files import read_json, write_json
from hnas.base.settings import check_same_settings
from hnas.dataset.image_store import sample_digest
from hnas.dataset.loader import EpochLoader, EvalLoader
from hnas.dataset.transforms import TrainTransform
from hnas.evaluation.results import MOST_IMAGES
from hnas.models.resnet import ResNet
from hnas.parallel.distributed import world_size
from hnas.programs.flags import Stage, default_of
from hnas.programs.memory_needs import IN_TRAINING
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.programs.runtime import (
    seed_generators,
    start,
    training_images,
    training_loader,
    validation_images,
    validation_loader,
)
from hnas.search_space import Architecture
from hnas.utils.hapi_wrapper import DistillationModel
from hnas.utils.SampleMethod import FixedSampler
from hnas.utils.starting import describe_run
from hnas.utils.training import fit, prepare
from hnas.utils.validation import network_accuracy
from hnas.weights.checkpoint import RUN_NOTE, SET_NAME, STATES, remove_set

logger = logging.getLogger(__name__)


def main(argv=None) -> None:
    options = parse_options(Stage.STANDALONE, argv, about=__doc__.splitlines()[0])
    if world_size() > 1:
        raise UserError(
            "train_standalone runs in one process; to use more, give each a --modelarch_file and "
            "a --save_dir of its own"
        )
    archs = architectures(options)
    start(options)
    train = training_images(options)
    val = validation_images(options, train)
    crop = TrainTransform(options.image_size, options.crop_scale_min, options.flip_prob)
    loader = training_loader(options, train, crop)
    settings = {
        **describe_run(replace(options, arch=""), loader),
        "val_images": val.digest(),
        "val_pixels": sample_digest(val),
    }
    folder = Path(options.save_dir)
    results = Results(folder, archs, settings)
    val_loader = validation_loader(options, val)
    for number, (name, arch) in enumerate(archs.items(), 1):
        own = folder / replace(arch, image_digit=True).code
        if arch not in results.entries:
            logger.info("architecture %d of %d: %s (%s)", number, len(archs), name, arch.code)
            entry = train_one(options, arch, loader, val_loader, own)
            results.entries[arch] = entry
            results.write()
            logger.info("%s: validation top-1 %.4f", name, entry["acc"])
        remove_sets(own)
    # An architecture that was finished earlier may have another name or place now.
    results.write()
    logger.info("accuracies of %d architectures: %s", len(results.entries), results.path)


def architectures(options: Options) -> dict[str, Architecture]:
    """What to train: one code, which is its own name, or those of a file.

    Raises:
        UserError: neither or both are given.
    """
    if bool(options.arch) == bool(options.modelarch_file):
        raise UserError("give either --arch CODE or --modelarch_file FILE")
    if options.arch:
        return {options.arch: Architecture.from_code(options.arch)}
    return read_architectures(options.modelarch_file)


class Results:
    """``SAVE_DIR/results.json``: of the architectures asked for, then of earlier ones.

    ``run.json`` beside it notes what they are made with.

    Raises:
        UserError: they are of other settings or images, or a name means two architectures.
    """

    def __init__(self, folder: Path, archs: Mapping[str, Architecture], settings: Mapping):
        self.path, run = folder / "results.json", folder / "run.json"
        self.names = {arch: name for name, arch in archs.items()}
        self.entries: dict[Architecture, dict] = {}
        if run.is_file():
            # Flags that did not exist then were off, as they are by default.
            defaults = {flag.name: default_of(flag, Stage.STANDALONE) for flag in fields(Options)}
            found = {**defaults, **read_json(run)}
            remedy = "give the same as before, or choose another --save_dir"
            check_same_settings(self.path, found, settings, remedy)
        elif self.path.is_file():
            raise UserError(f"{self.path} is there without run.json; choose another --save_dir")
        else:
            write_json(run, settings)
        if self.path.is_file():
            content = read_json(self.path)
            for name, arch in read_accuracies(self.path)[0].items():
                if archs.get(name, arch) != arch:
                    raise UserError(
                        f"{self.path} has another architecture of the name {name!r}; choose "
                        "another --save_dir"
                    )
                check_finished(self.path, name, content[name])
                self.names.setdefault(arch, name)
                self.entries[arch] = content[name]

    def write(self) -> None:
        """Write what is finished, in one step."""
        content = {
            name: {**self.entries[arch], "arch": arch.code}
            for arch, name in self.names.items()
            if arch in self.entries
        }
        write_json(self.path, content)


def check_finished(path: Path, name: str, entry: Mapping) -> None:
    """Refuse an accuracy that no training gives; the :class:`UserError` names the entry."""
    acc, top5, images = (entry.get(key) for key in ("acc", "top5", "images"))
    numbers = type(images) is int and {type(acc), type(top5)} <= {int, float}
    possible = numbers and 0 <= acc <= top5 <= 1 and 0 < images < MOST_IMAGES
    if not possible or abs(acc * images - round(acc * images)) > 1e-6:
        raise UserError(
            f"{path}: entry {shown(name)} has acc {shown(acc)} and top5 {shown(top5)} of "
            f"{shown(images)} images, which no training gives; remove the entry to train it again, "
            "or choose another --save_dir"
        )


def train_one(
    options: Options, arch: Architecture, loader: EpochLoader, val: EvalLoader, folder: Path
) -> dict:
    """Train one architecture, from the newest checkpoint in ``folder``, named by its code.

    Without one, it starts from new weights. The result depends on the
    options and the images only, not on what was trained before.

    Returns:
        Its entry of ``results.json``.
    """
    classes = len(loader.dataset.images.classes)
    space = options.space
    code = folder.name
    begun = "auto" if any(folder.glob(f"*{STATES}")) else ""
    own = replace(options, arch=code, save_dir=str(folder), resume=begun)
    seed_generators(options.seed)
    # Paddle numbers the layers and velocities that a process makes and saves them by these
    # names; here they begin anew for every network.
    with paddle.utils.unique_name.guard():
        network = ResNet(space.plan(arch), classes)
        model = DistillationModel(network, None, FixedSampler(arch))
        prepare(model, own, len(loader))
        measure = partial(network_accuracy, network, val, classes)
        found = fit(model, own, loader, measure) or measure()
    return {
        "acc": found["top1"],
        "arch": arch.code,
        "seed": options.seed,
        "top5": found["top5"],
        "images": len(val.dataset),
        "epochs": options.max_epoch,
        "loss": read_json(folder / "history.json")["epoch_losses"][-1],
        "macs": space.macs(arch, options.image_size, classes),
        "params": space.params(arch, classes),
    }


def remove_sets(folder: Path) -> None:
    """Delete what a finished architecture would have been resumed from; ``final`` stays."""
    for stem in {path.name.partition(".")[0] for path in folder.glob("*")}:
        if SET_NAME.fullmatch(stem):
            remove_set(folder / stem)
    (folder / RUN_NOTE).unlink(missing_ok=True)


if __name__ == "__main__":
    run_main(main, IN_TRAINING)
