"""Which chunks of an evaluation are done, by any number of processes, now or in an earlier run.

The images are cut into chunks. A chunk's counts are integers over its own images, so it does not
matter which process finds them, or in which order. Kept in the folder of an evaluation:

- ``eval_state.npz``: the counts over the *prefix*, all chunks up to the first that is not done.
  Only the main process writes it.
- ``eval_chunk_*.npz``: the counts of a chunk that was done before the prefix had reached it, named
  by the position of its first image. The main process adds it to the prefix in its turn.

  Both say which images they hold, and what they say is checked: a file that was copied, renamed or
  changed is refused.
- ``estimates.json``: accuracy and standard error of every architecture over the prefix.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hnas.base.arrays import ArraysError, read_arrays
from hnas.base.errors import UserError
from hnas.base.files import replacing, write_json
from hnas.evaluation.hits import Counts
from hnas.parallel.distributed import (
    barrier,
    finished_before_stopping,
    from_main_process,
    rank,
    world_size,
)
from hnas.search_space import Architecture

logger = logging.getLogger(__name__)

STATE_FILE = "eval_state.npz"
CHUNK_FILES = "eval_chunk_*.npz"
CHUNK_NAME = re.compile(r"eval_chunk_(\d{8,18})\.npz")
ESTIMATES_FILE = "estimates.json"
FIELDS = ("top1", "top5", "near1", "near5")
POLL_SECONDS = 0.2
# A state of 45,000 architectures takes 1.5 MB.
MOST_BYTES = 2**28


class StateError(UserError):
    """A state file that is broken or belongs to another evaluation."""


class Ledger:
    """What is done of the evaluation of ``archs`` on ``images`` images.

    In this order, in every process: :meth:`begin`, then :meth:`add` for each of :meth:`chunks`,
    then :meth:`complete`.

    Args:
        folder: one for all processes.
        identity: what the files must belong to.
        archs: by name.
        images: how many in all.
        target_se: the prefix is enough when all its standard errors are below it; 0: never.
        is_main: whether this is the main process.

    Attributes:
        chunk: images of a chunk (the last has fewer); 0 until it is known.
        counts: over the prefix, as far as this process knows.

    Raises:
        StateError: a file is broken or of something else.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        archs: Mapping[str, Architecture],
        images: int,
        target_se: float = 0.0,
        is_main: bool = True,
    ):
        self._folder = folder
        self._identity = identity
        self._archs = archs
        self._images = images
        self._target = target_se
        self._is_main = is_main
        self._own: list[int] = []
        self.chunk, self.counts = 0, Counts.zeros(len(archs))
        self._reload()
        for path in folder.glob(CHUNK_FILES):
            chunk = self._load(path).chunk
            if self.chunk and chunk != self.chunk:
                raise StateError(
                    f"{path} has chunks of {chunk} images, not {self.chunk}; remove it"
                )
            self.chunk = chunk

    # --- the course of an evaluation

    def begin(self, chunk: int) -> None:
        """Take in what earlier runs left and share out the rest; all processes together.

        Args:
            chunk: images of a chunk, where no earlier run has settled it.
        """
        self.chunk = self.chunk or min(chunk, self._images)
        barrier()  # Before it, other processes may still read what is deleted here.
        if self._is_main:
            self._delete_chunks(before=self.counts.images)
            self.collect()
        (self.chunk,) = from_main_process([self.chunk])
        if not self._is_main:
            self._reload()
        starts = self.starts()
        undone = from_main_process([not self.is_done(start) for start in starts])
        own = share_out(np.array(undone), rank(), world_size())
        self._own = [starts[number] for number in own]

    def chunks(self) -> Iterator[range]:
        """The chunks that are this process's to do, as ranges of image positions.

        Ends early when the prefix, with the other processes' chunks, has become enough. A first
        SIGTERM or Ctrl-C during a chunk takes effect when the next one is asked for.
        """
        for start in self._own:
            if not self._is_main:
                self._reload()
            if self.enough:
                return
            with finished_before_stopping():
                yield range(start, min(start + self.chunk, self._images))

    def add(self, start: int, counts: Counts) -> None:
        """Keep the counts of the chunk whose first image is ``start``."""
        if self._is_main and start == self.counts.images:
            self._extend(counts)
            self.collect()
        else:
            save_state(self._path(start), self._identity, self.chunk, counts, start)

    def complete(self) -> Counts:
        """The counts over the final prefix: in the main process, which waits for the others."""
        if not self._is_main:
            return self.counts
        if not self.enough:
            logger.info("waiting for the other processes' chunks")
        while not self.enough:
            if self.collect():
                logger.info("%d images", self.counts.images)
            else:
                time.sleep(POLL_SECONDS)
        self._delete_chunks()
        if self.counts.images < self._images:
            logger.info("all standard errors are below %g: stopped early", self._target)
        return self.counts

    # --- what is done

    def starts(self) -> list[int]:
        """The position of each chunk's first image."""
        return list(self._starts(self.chunk))

    def is_done(self, start: int) -> bool:
        """Whether the chunk whose first image is ``start`` is done."""
        return start < self.counts.images or self._path(start).is_file()

    @property
    def enough(self) -> bool:
        """Whether the prefix is all images, or as exact as wanted."""
        if self.counts.images == self._images:
            return True
        return self.counts.images > 0 and self.largest_error < self._target

    @property
    def largest_error(self) -> float:
        """The largest standard error over the prefix."""
        return float(self.counts.standard_error().max())

    def collect(self) -> bool:
        """Extend the prefix by the chunk files that follow it; whether there were any.

        Stops where the prefix is enough, so that the result does not depend on who was faster.
        """
        before = self.counts.images
        while not self.enough and self._path(self.counts.images).is_file():
            path = self._path(self.counts.images)
            self._extend(self._load(path).counts)
            path.unlink()
        return self.counts.images > before

    def _extend(self, counts: Counts) -> None:
        """Add the prefix's next chunk, and write the prefix."""
        self.counts.add(counts)
        save_state(self._folder / STATE_FILE, self._identity, self.chunk, self.counts)
        write_json(self._folder / ESTIMATES_FILE, estimates(self._archs, self.counts))

    def _reload(self) -> None:
        """Read the prefix that the main process has written."""
        path = self._folder / STATE_FILE
        earlier = load_state(path, self._identity)
        if earlier is not None:
            whole = earlier.counts.images in (self._images, *self._starts(earlier.chunk))
            self._check(path, earlier, earlier.start == 0 and whole)
            self.chunk, self.counts = earlier.chunk, earlier.counts

    def _path(self, start: int) -> Path:
        return self._folder / CHUNK_FILES.replace("*", f"{start:08d}")

    def _load(self, path: Path) -> Saved:
        name = CHUNK_NAME.fullmatch(path.name)
        if name is None or path != self._path(int(name[1])):
            raise StateError(f"{path} is none of this program's names; move it elsewhere")
        found = load_state(path, self._identity)
        if found is None:
            raise StateError(f"{path} has vanished; is another evaluation running in this folder?")
        start = int(name[1])
        images = min(found.chunk, self._images - start)
        is_chunk = start in self._starts(found.chunk) and found.counts.images == images
        self._check(path, found, found.start == start and is_chunk)
        return found

    def _starts(self, chunk: int) -> range:
        return range(0, self._images, chunk)

    def _check(self, path: Path, found: Saved, is_right: bool) -> None:
        """Refuse counts of other architectures, or of images that ``path`` does not stand for."""
        if len(found.counts.top1) != len(self._archs):
            raise StateError(
                f"{path} holds {len(found.counts.top1)} architectures, not {len(self._archs)}; "
                "remove it to start anew"
            )
        if not is_right:
            raise StateError(
                f"{path} holds images {found.start} to {found.start + found.counts.images - 1} in "
                f"chunks of {found.chunk}, which it cannot of {self._images}; was it copied or "
                "renamed? Remove it"
            )

    def _delete_chunks(self, before: int | None = None) -> None:
        """Delete the chunk files, or only those of chunks that start before a position.

        A run that is killed after it has written a prefix leaves the file of its last chunk.
        """
        for path in self._folder.glob(CHUNK_FILES):
            name = CHUNK_NAME.fullmatch(path.name)
            if name and (before is None or int(name[1]) < before):
                with suppress(FileNotFoundError):
                    path.unlink()


# --- sharing chunks


def even_chunk(limit: int, images: int, processes: int) -> int:
    """The largest chunk of at most ``limit`` images that gives every process as many chunks.

    A walk's multiply-accumulates are those of its tree times its images, so equal chunks are
    equal work. One process takes ``limit``.
    """
    if processes == 1:
        return min(limit, images)
    rounds = -(-images // (limit * processes))
    return -(-images // (rounds * processes))


def share_out(undone: np.ndarray, process: int, processes: int) -> list[int]:
    """The chunks that one of several processes takes.

    In turns, so that together they extend the prefix, whose images are a balanced sample.

    Args:
        undone: of each chunk [chunks], bool.
        process: its rank.
        processes: the world size.

    Returns:
        The chunks' numbers, from 0.
    """
    return np.flatnonzero(undone)[process::processes].tolist()


# --- files


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
        np.savez(file, **position, **columns, **whose)


def load_state(path: Path, identity: Mapping[str, str]) -> Saved | None:
    """What :func:`save_state` wrote, or None if there is no file.

    Raises:
        StateError: it is broken, of another checkpoint, image list, architecture list, ..., or
            holds hits that no images can have given.
    """
    try:
        state = read_arrays(path, MOST_BYTES)
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


def _check_identity(path: Path, found: Mapping[str, str], identity: Mapping[str, str]) -> None:
    for name, value in identity.items():
        if found[name] != value:
            raise StateError(
                f"{path} is of another {name.replace('_', ' ')} ({_shown(found[name])} instead of "
                f"{_shown(value)}); remove it to start anew, or choose another save_dir"
            )


def _shown(value: str) -> str:
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
    shapes = {column.shape for column in columns}
    if set(state) != {"start", "chunk", "images", *FIELDS}:
        raise ArraysError("unknown arrays")
    if any(part.dtype != np.int64 for part in (*numbers, *columns)):
        raise ArraysError("numbers that are not int64")
    if any(number.shape for number in numbers) or len(shapes) > 1 or columns[0].ndim != 1:
        raise ArraysError("arrays of wrong shapes")
    start, chunk, images = map(int, numbers)
    if start < 0 or chunk < 1 or images < 1:
        raise ArraysError(f"start {start}, chunk {chunk}, images {images}")
    top1, top5, near1, near5 = columns
    if any((column < 0).any() or (column > images).any() for column in columns):
        raise ArraysError(f"hits below 0 or above the {images} images")
    if (top1 > top5).any():
        raise ArraysError("more top-1 than top-5 hits")
    return Saved(chunk, Counts(top1, top5, near1, near5, images), start)


def estimates(archs: Mapping[str, Architecture], counts: Counts) -> dict:
    """Accuracy and standard error of every architecture over the images of ``counts``."""
    accuracy, error = counts.accuracy().tolist(), counts.standard_error().tolist()
    return {
        "images": counts.images,
        "architectures": {
            name: {"acc": acc, "se": round(se, 6), "arch": arch.code}
            for (name, arch), acc, se in zip(archs.items(), accuracy, error, strict=True)
        },
    }
