"""What every program does before its own work: device, seeds, data."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import paddle
from paddle.base.core import set_num_threads

import hnas
from hnas.base.device import (
    Arithmetic,
    available_bytes,
    choose_device,
    cpu_threads,
    device_name,
    on_gpu,
    processor,
    set_deterministic,
    set_tf32,
    visible_gpus,
)
from hnas.base.errors import LINES, UserError
from hnas.base.files import (
    check_regular,
    check_writable,
    claim_folder,
    read_json,
    remove_leftovers,
    write_json,
)
from hnas.dataset.image_folder import (
    DataError,
    ImageList,
    cache_folder,
    check_class_names,
    decode_image,
    scan_images,
)
from hnas.dataset.image_store import STORED, ImageStore
from hnas.dataset.loader import EpochLoader, EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform, Shrink, shorter_side
from hnas.evaluation.images import ScoredImages, balanced_order
from hnas.parallel.distributed import (
    barrier,
    is_main_process,
    join_processes,
    local_ranks,
    rank,
    world_size,
)
from hnas.programs.flags import AUTO
from hnas.programs.memory_needs import batch_bytes, check_batch, check_shared_memory
from hnas.programs.options import Options

logger = logging.getLogger(__name__)


def start(options: Options, writes: bool = True, part: str = "", notes: bool = True) -> Arithmetic:
    """Choose the device and how it rounds, meet the run's other processes, seed every generator.

    Args:
        options: of the run.
        writes: whether there will be results, for which ``save_dir`` is tried now.
        part: of stage 3's images; each may have a process of its own in the folder.
        notes: whether :func:`note_run` writes into the folder now.

    Raises:
        UserError: a GPU is asked for and Paddle has none, or fewer than processes; the device
            cannot round as asked for; other processes cannot be reached; or ``save_dir`` cannot be
            written, or is in use.
    """
    if not is_main_process():
        logging.getLogger().setLevel(logging.WARNING)
    if options.device != "cpu" and 0 < visible_gpus() < local_ranks():
        raise UserError(f"{local_ranks()} processes, but {visible_gpus()} visible GPUs; lower gpus")
    choose_device(options.device)
    if options.amp != "O0" and not on_gpu():
        raise UserError(f"--amp {options.amp} needs a GPU; CPUs compute in float32")
    tf32 = set_tf32(options.tf32)
    if options.deterministic:
        set_deterministic()
    arithmetic = Arithmetic(device_name(), tf32, options.amp, options.deterministic)
    if "PINAS_THREADS" in os.environ:
        set_num_threads(cpu_threads())
    if writes:
        check_writable(options.save_dir, "--save_dir")
        if options.visualdl_dir:
            check_writable(options.visualdl_dir, "--visualdl_dir")
    join_processes(cpu=not on_gpu())
    if writes and is_main_process():
        claim_folder(options.save_dir, "--save_dir", part)
        remove_leftovers(options.save_dir)
        if notes:
            note_run(options, arithmetic, part)
    seed_generators(options.seed)
    logger.info("device %s (%s), seed %d", paddle.get_device(), arithmetic, options.seed)
    if world_size() > 1:
        logger.info("%d processes, %d of them on this machine", world_size(), local_ranks())
    return arithmetic


class _LogFile(logging.FileHandler):
    """A log; where the disk takes no more of it, a line says so, and the run goes on."""

    def handleError(self, record):  # noqa: N802 (logging's name)
        logging.getLogger().removeHandler(self)
        logger.warning("%s ends here: %s", self.baseFilename, sys.exc_info()[1])


def note_run(options: Options, arithmetic: Arithmetic, part: str = "") -> None:
    """Write ``settings.json`` into ``save_dir``, and append to ``log.txt`` what is logged from now.

    The settings are all values, the command, and what computes; those of runs before, also of
    refused ones, stay under ``earlier``. A ``part`` has files of its own.

    Raises:
        UserError: the settings cannot be written.
    """
    own = f"_part_{part.replace('/', '_of_')}" if part else ""
    path, log = (Path(options.save_dir, name) for name in (f"settings{own}.json", f"log{own}.txt"))
    earlier = []
    if path.is_file():
        try:
            before = read_json(path)
            earlier = [*before.pop("earlier"), before]
        except (UserError, LookupError, TypeError) as error:
            logger.warning("%s begins anew: %s", path, error)
    values = dataclasses.asdict(options)
    for option in dataclasses.fields(options):
        if option.metadata["auto"] and values[option.name] == AUTO:
            values[option.name] = "auto"
    command = shlex.join(sys.argv)
    about = {"command": command, "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    about |= {"version": hnas.__version__, "commit": _commit(), "host": socket.gethostname()}
    about |= {"processor": processor(), "device": str(arithmetic), "processes": world_size()}
    write_json(path, {**about, "options": values, "earlier": earlier})

    for handler in [own for own in logging.getLogger().handlers if isinstance(own, _LogFile)]:
        logging.getLogger().removeHandler(handler)  # of a run before in this process
    try:
        if log.exists():
            check_regular(log)
        handler = _LogFile(log, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        logger.warning("no log is kept in %s: %s", log, error.strerror or error)
        return
    handler.setFormatter(LINES)
    logging.getLogger().addHandler(handler)
    handler.handle(logging.makeLogRecord({"msg": command}))


def _commit() -> str:
    """Of the checkout that runs, with ``-dirty`` where files are changed; empty if it is none."""
    root = Path(hnas.__file__).parents[1]
    command = ["git", "--no-optional-locks", "-C", root, "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists():
            return subprocess.run(command, capture_output=True, text=True, timeout=9).stdout.strip()
    return ""


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and Paddle's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    paddle.seed(seed)


def require(options: Options, *names: str) -> None:
    """Refuse empty values of flags that a stage cannot do without.

    Raises:
        UserError: naming the flag.
    """
    for name in names:
        if not getattr(options, name):
            raise UserError(f"--{name} is missing")


def training_images(options: Options) -> ImageList:
    """The images of ``image_dir/train``.

    Raises:
        UserError: they cannot be used, or ``cache_dir`` cannot be written where it will be.
    """
    require(options, "image_dir")
    stored = options.use_tensor_dataset and options.cache_dir
    # A folder with images may be for reading only.
    if stored and not any(Path(options.cache_dir).glob(f"*{STORED}")):
        check_writable(options.cache_dir, "--cache_dir")
    return _scanned(options, "train")


def validation_images(options: Options, train: ImageList | None = None) -> ImageList:
    """The images of ``image_dir/val``, whose classes must be those of ``train``.

    Where there is none, of ``val_slim``, the public code's name for it.
    """
    require(options, "image_dir")
    root = Path(options.image_dir)
    slim = not (root / "val").is_dir() and (root / "val_slim").is_dir()
    images = _scanned(options, "val_slim" if slim else "val")
    if train is not None:
        check_class_names(train.classes, train.folder, images.classes, images.folder)
    return images


def _scanned(options: Options, split: str) -> ImageList:
    images = scan_images(options.image_dir, split, options.verify_images, options.bad_images)
    logger.info("%s: %d images, %d classes", images.folder, len(images), len(images.classes))
    return images


def training_loader(options: Options, images: ImageList, transform: Callable) -> EpochLoader:
    """Augmented batches of ``images``, decoded once if ``use_tensor_dataset`` says so.

    Raises:
        UserError: a batch takes more memory than there is.
    """
    check_batch(options, options.space)
    steps = len(images) // (options.batch_size * world_size())
    check_shared_memory(batch_bytes(options), steps, options.num_workers)
    pixels = _stored(options, images) if options.use_tensor_dataset else None
    dataset = ImageDataset(images, transform, options.seed, pixels)
    processes = (options.num_workers, rank(), world_size())
    return EpochLoader(dataset, options.batch_size, *processes, options.shuffle)


def _stored(options: Options, images: ImageList) -> ImageStore:
    """Decoded images; of the processes of a machine one decodes, and the others wait for it."""
    shrink = Shrink(options.storage_size or shorter_side(options.image_size))
    decodes = rank() % local_ranks() == 0
    if not decodes:
        barrier()
    store = ImageStore(images, shrink, Path(options.cache_dir or cache_folder()))
    if decodes:
        barrier()
    return store


CALIBRATION_IMAGES = 64


def calibration_number(options: Options, freeze_bn: bool) -> int:
    """How many images to re-calibrate with: what ``bn_calibration_images`` says or, if that is
    ``auto``, none for weights that were trained at frozen statistics."""
    number = options.bn_calibration_images
    if number == AUTO:
        number = 0 if freeze_bn else CALIBRATION_IMAGES
        told = "bn_calibration_images %d: the weights are %sknown to be trained with freeze_bn"
        logger.info(told, number, "" if freeze_bn else "not ")
    elif number and freeze_bn:
        logger.warning(
            "--bn_calibration_images %d, but the weights were trained with freeze_bn: the ranking "
            "suffers; give 0 or auto",
            number,
        )
    elif not number and not freeze_bn:
        logger.warning(
            "--bn_calibration_images 0, but the weights are not known to be trained with "
            "freeze_bn: their running statistics may be a mixture of all sub-networks'"
        )
    return number


def calibration_images(
    options: Options,
    freeze_bn: bool,
    images: ImageList | None = None,
    classes: Sequence[str] | None = None,
) -> paddle.Tensor | None:
    """Training images to re-calibrate with, uint8 [N, 3, H, W], drawn by the seed; None: none.

    Their number is :func:`calibration_number`'s. ``images`` is the training split, where it was
    scanned already; where it was not, its classes must be ``classes``, those of val. With
    ``bad_images=skip`` others are drawn in place of those that cannot be decoded.

    Raises:
        DataError: the training split holds fewer or other classes, or one of them cannot be
            decoded.
    """
    number = calibration_number(options, freeze_bn)
    if not number:
        return None
    wanted = f"--bn_calibration_images {number}", "0 for running statistics"
    return training_crops(options, number, *wanted, classes, images)


def training_crops(
    options: Options,
    number: int,
    wanted: str,
    instead: str,
    classes: Sequence[str] | None,
    images: ImageList | None = None,
    at_most: bool = False,
) -> paddle.Tensor:
    """So many training images, as :func:`calibration_images` gives them.

    Args:
        wanted, instead: the flag that asks for them, and what to give in its place, for messages.
        at_most: whether fewer will do, where there are no more, and classes have equal shares.
    """
    root = Path(options.image_dir)
    if root.is_dir() and not (root / "train").is_dir():
        raise DataError(f"{wanted} takes training images, but {root} has no train/; give {instead}")
    # Only what is drawn gets decoded, whatever verify_images says: these are few of many.
    if images is None:
        images = scan_images(root, "train")
        if classes is not None:
            check_class_names(images.classes, images.folder, classes, root / "val")
    if number > len(images) and not at_most:
        has = f"{images.folder} has {len(images)}"
        raise DataError(f"{wanted}, but {has}; lower it, or give {instead}")
    drawn = np.random.default_rng(options.seed).permutation(len(images))
    drawn = balanced_order(images.labels, options.seed) if at_most else drawn
    crops, transform = [], EvalTransform(options.image_size)
    for index in drawn:
        if len(crops) == number:
            break
        try:
            crops.append(transform(decode_image(images.paths[index])))
        except DataError as error:
            if options.bad_images != "skip":
                raise
            logger.warning("%s", error)
    if len(crops) < number:
        told = f"{wanted}, but only {len(crops)} images of {images.folder} can be decoded"
        if not (at_most and crops):
            raise DataError(f"{told}; lower it, or give {instead}")
        logger.info("%s: these are taken", told)
    return paddle.to_tensor(np.stack(crops))


def validation_loader(
    options: Options, images: ImageList, order: np.ndarray | None = None
) -> EvalLoader:
    """Batches of centre crops, of all ``images`` or those that ``order`` names.

    Raises:
        UserError: loader processes would find too little shared memory.
    """
    batch = min(options.batch_size, len(images))
    batches = math.ceil(len(images) / batch)
    check_shared_memory(batch * 3 * options.image_size**2, batches, options.num_workers)
    images = images if order is None else images.select(order)
    dataset = ImageDataset(images, EvalTransform(options.image_size), options.seed)
    return EvalLoader(dataset, options.batch_size, options.num_workers)


def scored_order(options: Options, images: ImageList) -> np.ndarray:
    """Which images to score on, in the order in which that is done.

    Raises:
        UserError: more are asked for than there are.
    """
    if options.eval_images > len(images):
        raise UserError(
            f"--eval_images {options.eval_images}, but {images.folder} has {len(images)}; lower "
            "it, or give 0 for all"
        )
    return balanced_order(images.labels, options.seed)[: options.eval_images or None]


def decoded_images(options: Options, images: ImageList, order: np.ndarray) -> ScoredImages:
    """The images in that order; who scores a part of them decodes those of its chunks only.

    What memory has no room for goes to a file, whatever ``cache_gb`` says.
    """
    if world_size() > 1 or options.images_part:
        return ScoredImages(images, order, options.image_size)
    limit_gb = min(options.cache_gb, available_bytes() / 2**30)
    return ScoredImages(images, order, options.image_size, Path(options.save_dir), limit_gb)
