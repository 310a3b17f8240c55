"""The files of an evaluation: what it goes on from, and what its users get."""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle
from scipy.special import ndtri

from hnas.architecture_file import submission
from hnas.base.device import Arithmetic
from hnas.base.errors import UserError
from hnas.base.files import ArraysError, read_arrays, read_json, replacing, write_json
from hnas.base.settings import check_same_settings
from hnas.evaluation.counts import Counts
from hnas.evaluation.images import ScoredImages
from hnas.parallel.distributed import agree, from_main_process
from hnas.ranking.agreement import FOLDS, Agreement, agreement_record, fold_sizes
from hnas.ranking.costs import Network
from hnas.search_space import Architecture

logger = logging.getLogger(__name__)

ESTIMATES_FILE = "estimates.json"
STATE_FILE = "eval_state.npz"
CHUNK_FILES = "eval_chunk_*.npz"
FIELDS = ("top1", "top5", "near1", "near5")
# A state of 45,000 architectures takes 7.2 MB.
MOST_BYTES = 2**28
MOST_IMAGES = 2**53


# --- what it goes on from


def evaluation_identity(
    checkpoint: str,
    images: ScoredImages,
    backbone: str,
    arithmetic: Arithmetic,
    calibration: paddle.Tensor | None,
) -> dict[str, str]:
    """What counts belong to: whatever they depend on besides their architectures.

    All processes compute with the same ``backbone`` and ``arithmetic``. The hash of ``images`` is
    the main process's: modification times may differ where every machine has its own copy, but
    names, sizes and pixels must be the same. ``checkpoint`` is the SHA-256 of the supernet's file,
    ``calibration`` uint8 images for BatchNorm re-calibration, or None.
    """
    same = images.copies, images.sample
    agree([int(digest[:15], 16) for digest in same], "the validation images")
    setting = f"{backbone}, {arithmetic}"
    agree([int(hashlib.sha256(setting.encode()).hexdigest()[:15], 16)], "device or Paddle")
    pixels = None if calibration is None else calibration.numpy().tobytes()
    return {
        "checkpoint": checkpoint,
        "image_list": bytes(from_main_process(list(bytes.fromhex(images.hash)))).hex(),
        "image_pixels": images.sample,
        "setting": setting,
        "calibration": "none" if pixels is None else hashlib.sha256(pixels).hexdigest(),
    }


def architectures_hash(archs: Mapping[str, Architecture]) -> str:
    """SHA-256 of names and codes in their order."""
    digest = hashlib.sha256()
    for name, arch in archs.items():
        digest.update(f"{name} {arch.code}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


class Saved(NamedTuple):
    """What a file of counts holds."""

    chunk: int  # images of a chunk in that evaluation, at least 1
    counts: Counts
    start: int  # the position of the first of their images


def save_state(
    path: Path, identity: Mapping[str, str], chunk: int, counts: Counts, start: int = 0
) -> None:
    """Write counts, as in :class:`Saved`, with the ``identity`` that they belong to, in one step.

    Raises:
        UserError: the file cannot be written; the earlier one is intact.
    """
    columns = dict(zip(FIELDS, counts.columns(), strict=True))
    whose = {f"identity_{name}": np.array(value) for name, value in identity.items()}
    position = {"start": start, "chunk": chunk, "images": counts.images}
    # An archive that a full disk has cut off tries again when it is deleted: not one on the disk.
    content = io.BytesIO()
    np.savez(content, **position, **columns, folds=counts.folds, **whose)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_state(path: Path, identity: Mapping[str, str], copies: str = "") -> Saved:
    """What :func:`save_state` wrote; an ``image_list`` of ``copies`` is as good as the identity's.

    Raises:
        UserError: it is gone, broken, of another checkpoint, image list, ..., or
            holds hits that no images can have given.
    """
    what = path.with_name("eval_*.npz") if path.name == STATE_FILE else "it"
    anew = f"to start anew remove {what}"
    try:
        state = read_arrays(path, MOST_BYTES)
        found = {name: str(state.pop(f"identity_{name}")) for name in identity}
        if copies and found["image_list"] == copies:
            found["image_list"] = identity["image_list"]
        check_same_settings(path, found, identity, f"{anew}, or choose another save_dir")
        return _saved(state)
    except FileNotFoundError:
        raise UserError(f"{path} has vanished; is another run in this folder?") from None
    except (KeyError, ArraysError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is broken ({fault}); remove it") from None


def _saved(state: Mapping[str, np.ndarray]) -> Saved:
    """The content of a file, if it can be what an evaluation has counted.

    Raises:
        KeyError: an array is missing.
        ArraysError: it cannot.
    """
    numbers = [state[name] for name in ("start", "chunk", "images")]
    columns = [state[name] for name in FIELDS]
    folds = state["folds"]
    shapes, rows = {column.shape for column in columns}, (*columns[0].shape, FOLDS)
    if set(state) != {"start", "chunk", "images", "folds", *FIELDS}:
        raise ArraysError("unknown arrays")
    if any(part.dtype != np.int64 for part in (*numbers, *columns, folds)):
        raise ArraysError("numbers that are not int64")
    if any(number.shape for number in numbers) or shapes != {rows[:1]} or folds.shape != rows:
        raise ArraysError("arrays of wrong shapes")
    start, chunk, images = map(int, numbers)
    if start < 0 or chunk < 1 or images < 1 or max(start, chunk, images) >= MOST_IMAGES:
        raise ArraysError(f"start {start}, chunk {chunk}, images {images}")
    top1, top5, near1, near5 = columns
    if any((column < 0).any() or (column > images).any() for column in columns):
        raise ArraysError(f"hits below 0 or above the {images} images")
    if (top1 > top5).any():
        raise ArraysError("more top-1 than top-5 hits")
    if (folds < 0).any() or (folds > fold_sizes(images)).any():
        raise ArraysError("a fold with hits below 0 or above its images")
    if (folds.sum(axis=1) != top1).any():
        raise ArraysError("folds that do not add up to the top-1 hits")
    return Saved(chunk, Counts(top1, top5, near1, near5, images, folds), start)


# --- what its users get


def estimates(
    archs: Mapping[str, Architecture],
    counts: Counts,
    agreement: Agreement | None,
    of_images: int,
    network: Network | None = None,
) -> dict:
    """What ``estimates.json`` holds, which :func:`hnas.ranking.agreement.read_estimates` reads.

    ``agreement`` is that of the ranking so far with the one by all ``of_images`` images;
    ``network`` is what was scored, where that is known.
    """
    accuracy, error = counts.accuracy().tolist(), counts.standard_error().tolist()
    # On one line, where a list of the hits by fold would take 16.
    folds = [" ".join(map(str, own)) for own in counts.folds.tolist()]
    rows = zip(archs.items(), accuracy, error, folds, strict=True)
    return {
        "images": counts.images,
        **({"network": network._asdict()} if network else {}),
        "agreement": agreement_record(agreement, of_images),
        "architectures": {
            name: {"acc": acc, "se": round(se, 6), "arch": arch.code, "folds": own}
            for (name, arch), acc, se, own in rows
        },
    }


def keep_more(path: Path, number: int) -> None:
    """Set scores aside that those of ``number`` architectures, a trial's maybe, would replace,
    where they are more, or cannot be read."""
    try:
        before = len(read_json(path)) if path.exists() else 0
    except UserError as error:
        logger.warning("%s", error)
        before = math.inf
    if before > number:
        aside, number = path.with_stem(f"{path.stem}_of_{before}"), 2
        while aside.exists():
            aside, number = path.with_stem(f"{path.stem}_of_{before}_{number}"), number + 1
        path.replace(aside)
        logger.warning("%s, which holds more or cannot be read, is %s now", path, aside)


def write_results(folder: Path, archs: Mapping[str, Architecture], counts: Counts) -> None:
    """Write what was found, and log how many hits hang on nearly equal logits.

    ``submission.json`` holds top-1 accuracies in the organisers' form, ``submission_top5.json``
    top-5 ones; ``channel_sample.txt`` has a line ``CODE top1 top5`` for each architecture, which
    the helpers of public code read.
    """
    for name in ("submission.json", "submission_top5.json"):
        keep_more(folder / name, len(archs))
    top1, top5 = counts.accuracy().tolist(), counts.top5_accuracy().tolist()
    write_json(folder / "submission_top5.json", submission(archs, top5))
    with replacing(folder / "channel_sample.txt") as temporary:
        rows = zip(archs.values(), top1, top5, strict=True)
        temporary.write_text("".join(f"{arch.code} {one} {five}\n" for arch, one, five in rows))
    write_json(folder / "submission.json", submission(archs, top1))
    logger.info(
        "scored %d architectures on %d images: %s; %d top-1 and %d top-5 hits of %d hang on logits "
        "closer than 1e-4",
        len(archs),
        counts.images,
        folder / "submission.json",
        counts.near1.sum(),
        counts.near5.sum(),
        len(archs) * counts.images,
    )


def warn_if_guessing(counts: Counts, classes: int, what: str) -> bool:
    """Warn where not even the best of some networks is better than guessing.

    Such scores look like any other: training broke without a loss that is not finite, or weights
    and images do not belong together. Few images that tell nothing are passed over.
    The message calls the networks ``what``. Gives whether it warned.
    """
    guessed = counts.images / classes
    # What the best of so many passes once in a thousand times if all guess, on their own; as they
    # share weights, good ones are told by what most of them do.
    deviation = math.sqrt(guessed * (1 - 1 / classes))
    limit = guessed - ndtri(1e-3 / len(counts.top1)) * deviation
    best, most = int(counts.top1.max()), np.median(counts.top1)
    told = best <= limit < counts.images and most <= guessed + 3 * deviation
    if told:
        logger.warning(
            "%s is right about %d of %d images, no more than guessing among %d classes: too little "
            "trained, training broke (clip_norm auto, or a third of it), or weights, class names "
            "and images do not match",
            *(what, best, counts.images, classes),
        )
    return told
