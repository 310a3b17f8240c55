"""The files that an evaluation keeps: counts with what they belong to. Without Paddle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError
from hnas.base.files import ArraysError, read_arrays, replacing
from hnas.evaluation.counts import Counts
from hnas.ranking.agreement import FOLDS, fold_sizes
from hnas.search_space import Architecture

STATE_FILE = "eval_state.npz"
CHUNK_FILES = "eval_chunk_*.npz"
FIELDS = ("top1", "top5", "near1", "near5")
# A state of 45,000 architectures takes 7.2 MB.
MOST_BYTES = 2**28


class StateError(UserError):
    """A state file that is broken or belongs to another evaluation."""


def architectures_hash(archs: Mapping[str, Architecture]) -> str:
    """SHA-256 of names and codes in their order."""
    digest = hashlib.sha256()
    for name, arch in archs.items():
        digest.update(f"{name} {arch.code}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Saved:
    """What a file of counts holds.

    Attributes:
        chunk: images of a chunk in that evaluation, at least 1.
        counts: over ``counts.images`` images.
        start: the position of the first of them.
    """

    chunk: int
    counts: Counts
    start: int


def save_state(
    path: Path, identity: Mapping[str, str], chunk: int, counts: Counts, start: int = 0
) -> None:
    """Write counts with what they belong to, in one step.

    Args:
        path: of the file.
        identity: what the counts belong to, e.g. hashes of the checkpoint and the lists.
        chunk: images of a chunk in this evaluation.
        counts: of the prefix or of one chunk.
        start: the position of their first image.

    Raises:
        UserError: the file cannot be written; the earlier one is intact.
    """
    columns = dict(zip(FIELDS, counts.columns(), strict=True))
    whose = {f"identity_{name}": np.array(value) for name, value in identity.items()}
    position = {"start": start, "chunk": chunk, "images": counts.images}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **position, **columns, folds=counts.folds, **whose)


def load_state(path: Path, identity: Mapping[str, str]) -> Saved | None:
    """What :func:`save_state` wrote, or None if there is no file.

    Raises:
        StateError: it is broken, of another checkpoint, image list, architecture list, ..., or
            holds hits that no images can have given.
    """
    try:
        state = read_arrays(path, MOST_BYTES)
        _check_version(path, state)
        found = {name: str(state.pop(f"identity_{name}")) for name in identity}
        _check_identity(path, found, identity)
        return _saved(state)
    except FileNotFoundError:
        return None
    except KeyError as error:
        raise StateError(
            f"{path} is broken ({error} is missing); remove it to start anew"
        ) from None
    except ArraysError as error:
        raise StateError(f"{path} is broken ({error}); remove it to start anew") from None


def _check_version(path: Path, state: Mapping[str, np.ndarray]) -> None:
    if set(FIELDS) < set(state) and "folds" not in state:
        raise StateError(
            f"{path} is of an earlier version, which did not count hits by fold; let that version "
            "finish, or remove it to start anew"
        )


def _check_identity(path: Path, found: Mapping[str, str], identity: Mapping[str, str]) -> None:
    for name, value in identity.items():
        if found[name] != value:
            raise StateError(
                f"{path} is of another {name.replace('_', ' ')} ({start_of(found[name])} instead "
                f"of {start_of(value)}); remove it to start anew, or choose another save_dir"
            )


def start_of(value: str) -> str:
    """A setting as it is; of a hash only the start."""
    return value if " " in value else value[:16]


def _saved(state: Mapping[str, np.ndarray]) -> Saved:
    """The content of a file, if it can be what an evaluation has counted.

    Raises:
        KeyError: an array is missing.
        ArraysError: it cannot.
    """
    numbers = [state[name] for name in ("start", "chunk", "images")]
    columns = [state[name] for name in FIELDS]
    folds = state["folds"]
    shapes = {column.shape for column in columns}
    if set(state) != {"start", "chunk", "images", "folds", *FIELDS}:
        raise ArraysError("unknown arrays")
    if any(part.dtype != np.int64 for part in (*numbers, *columns, folds)):
        raise ArraysError("numbers that are not int64")
    if any(number.shape for number in numbers) or len(shapes) > 1 or columns[0].ndim != 1:
        raise ArraysError("arrays of wrong shapes")
    if folds.shape != (*columns[0].shape, FOLDS):
        raise ArraysError("arrays of wrong shapes")
    start, chunk, images = map(int, numbers)
    if start < 0 or chunk < 1 or images < 1:
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
