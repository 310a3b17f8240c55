"""Which chunks of an evaluation are done, by any number of processes, now or in an earlier run.

A chunk's counts are integers over its own images, so it does not matter who found them, or in
which order. ``eval_state.npz`` holds the counts over the beginning that is done without gaps; a
chunk that was finished out of turn is a file of its own until the beginning has reached it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from hnas.base.files import write_json
from hnas.evaluation.hits import Counts
from hnas.evaluation.state import StateError, estimates, load_state, save_state
from hnas.search_space import Architecture

STATE_FILE = "eval_state.npz"
CHUNK_FILES = "eval_chunk_*.npz"


class Ledger:
    """What is done of the evaluation of ``archs`` on ``images`` images in ``folder``.

    Args:
        folder: shared by all processes.
        identity: what the files must belong to.
        target_se: the beginning is enough when all its standard errors are below it; 0: never.
        keeps: whether this process, one of them all, writes the state. The others only add files.

    Attributes:
        chunk: images of a chunk (the last has fewer); 0 until it is known.
        counts: over the beginning.

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
        keeps: bool = True,
    ):
        self._folder = folder
        self._identity = identity
        self._archs = archs
        self._images = images
        self._target = target_se
        self._keeps = keeps
        self.chunk, self.counts = 0, Counts.zeros(len(archs))
        self.reload()
        for path in folder.glob(CHUNK_FILES):
            chunk, _ = self._load(path)
            if self.chunk and chunk != self.chunk:
                raise StateError(
                    f"{path} has chunks of {chunk} images, not {self.chunk}; remove it"
                )
            self.chunk = chunk

    def begin(self, chunk: int) -> None:
        """Take in what earlier runs left; ``chunk`` is its size where they left nothing."""
        self.chunk = self.chunk or chunk
        if not self._keeps:
            return
        for path in self._folder.glob(CHUNK_FILES):
            if int(path.stem.rpartition("_")[2]) < self.counts.images:
                path.unlink()  # killed after the state was written
        self.collect()

    def starts(self) -> list[int]:
        """Where each chunk begins."""
        return list(range(0, self._images, self.chunk))

    def is_done(self, start: int) -> bool:
        """Whether the chunk that begins at ``start`` is."""
        return start < self.counts.images or self._path(start).is_file()

    @property
    def enough(self) -> bool:
        """Whether all images are done, or the beginning is as exact as wanted."""
        if self.counts.images == self._images:
            return True
        return self.counts.images > 0 and self.largest_error < self._target

    @property
    def largest_error(self) -> float:
        """The largest standard error over the beginning."""
        return float(self.counts.standard_error().max())

    def add(self, start: int, counts: Counts) -> None:
        """Keep a finished chunk's counts."""
        if self._keeps and start == self.counts.images:
            self.counts.add(counts)
            self._write()
            self.collect()
        else:
            save_state(self._path(start), self._identity, self.chunk, counts)

    def collect(self) -> bool:
        """Move files that continue the beginning into the state; whether there were any.

        Stops where the beginning is enough, so that the result does not depend on who was faster.
        """
        before = self.counts.images
        while not self.enough and self._path(self.counts.images).is_file():
            path = self._path(self.counts.images)
            self.counts.add(self._load(path)[1])
            self._write()
            path.unlink()
        return self.counts.images > before

    def reload(self) -> None:
        """Read the state that another process keeps."""
        earlier = load_state(self._folder / STATE_FILE, self._identity)
        if earlier is not None:
            self.chunk, self.counts = earlier

    def remove_rest(self) -> None:
        """Delete chunks beyond a beginning that was enough."""
        for path in self._folder.glob(CHUNK_FILES):
            with suppress(FileNotFoundError):
                path.unlink()

    def _path(self, start: int) -> Path:
        return self._folder / CHUNK_FILES.replace("*", f"{start:08d}")

    def _load(self, path: Path) -> tuple[int, Counts]:
        found = load_state(path, self._identity)
        if found is None:
            raise StateError(f"{path} has vanished; is another evaluation running in this folder?")
        return found

    def _write(self) -> None:
        save_state(self._folder / STATE_FILE, self._identity, self.chunk, self.counts)
        write_json(self._folder / "estimates.json", estimates(self._archs, self.counts))


def even_chunk(limit: int, images: int, processes: int) -> int:
    """The largest chunk of at most ``limit`` images that gives every process as many chunks.

    A walk's multiply-accumulates are those of its tree times its images, so equal chunks are
    equal work. One process takes ``limit``.
    """
    if processes == 1:
        return min(limit, images)
    rounds = -(-images // (limit * processes))
    return -(-images // (rounds * processes))


def share_out(undone: np.ndarray, rank: int, world_size: int) -> list[int]:
    """The chunks (by number, of a mask of undone ones) that ``rank`` takes.

    In turns, so that those of all ranks together grow from the beginning, whose images are a
    balanced sample.
    """
    return np.flatnonzero(undone)[rank::world_size].tolist()
