"""Which chunks of an evaluation are done, by any number of processes, now or in an earlier run.

The images are cut into chunks. A chunk's counts are integers over its own images, so it does not
matter which process finds them, where, or in which order. Kept in the folder of an evaluation:

- ``eval_state.npz``: the counts over the *prefix*, all chunks up to the first that is not done.
  Only the main process writes it.
- ``eval_chunk_*.npz``: the counts of a chunk that was done before the prefix had reached it, named
  by the position of its first image. The main process adds it to the prefix in its turn. A *part*
  of an evaluation leaves nothing else, wherever it is scored; a run of the whole takes them in.

  Both say which images they hold, and what they say is checked: a file that was copied, renamed or
  changed is refused.
- ``estimates.json``: accuracy and standard error of every architecture over the prefix, and how
  well it ranks them.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hnas.base.command_line import shown
from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.evaluation.counts import Counts
from hnas.evaluation.results import (
    CHUNK_FILES,
    ESTIMATES_FILE,
    STATE_FILE,
    Saved,
    estimates,
    load_state,
    save_state,
)
from hnas.parallel.distributed import (
    barrier,
    finished_before_stopping,
    from_main_process,
    rank,
    world_size,
)
from hnas.ranking.agreement import Agreement, expected_agreement
from hnas.ranking.costs import Network
from hnas.search_space import Architecture

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
NAMED = 10
"""Missing chunks that a message names at most."""


class Part(NamedTuple):
    """One of the parts that an evaluation's chunks are dealt to in turns; as text, ``2/8``."""

    number: int
    of: int

    @classmethod
    def read(cls, text: str) -> Part:
        """The part that ``--images_part`` names.

        Raises:
            UserError: it is not two whole numbers, of which the first is at least 1 and at most
                the second.
        """
        found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        part = cls(int(found[1]), int(found[2])) if found else None
        if part is None or not 1 <= part.number <= part.of:
            raise UserError(f"--images_part {shown(text)} is not a part as 2/8, from 1/8 to 8/8")
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(eq=False)
class Ledger:
    """What is done of the evaluation of ``archs`` on ``images`` images.

    In every process :meth:`begin`, :meth:`add` for each of :meth:`chunks`, :meth:`complete`.

    Args:
        folder: one for all processes.
        identity: what the files must belong to.
        archs: by name.
        images: how many in all.
        target_tau: the prefix is enough where its ranking's expected agreement with that by all
            images is, at the lower end of its interval, at least this; 0: never.
        is_main: whether this is the main process.
        part: to be done; None: all.
        copies: what parts have as ``image_list`` of the identity, and copies of the images too.
        network: what is scored, for ``estimates.json``.

    Attributes:
        chunk: images of a chunk (the last has fewer); 0 until it is known.
        counts: over the prefix, as far as this process knows.

    Raises:
        UserError: a file is broken or of something else.
    """

    folder: Path
    identity: Mapping[str, str]
    archs: Mapping[str, Architecture]
    images: int
    target_tau: float = 0.0
    is_main: bool = True
    part: Part | None = None
    copies: str = ""
    network: Network | None = None

    def __post_init__(self):
        self.chunk, self.counts = 0, Counts.zeros(len(self.archs))
        self._own: list[range] = []
        self._agreement: tuple[int, Agreement | None] = (0, None)
        self._reload()
        self._found: list[int] = []
        for path in self.folder.glob(CHUNK_FILES):
            found = self._load(path)
            if self.chunk not in (0, found.chunk):
                text = f"{path} has chunks of {found.chunk} images, not {self.chunk}; remove it"
                raise UserError(text)
            self.chunk = found.chunk
            self._found.append(found.start)

    # --- the course of an evaluation

    def begin(self, chunk: int) -> None:
        """Take in what earlier runs left and share out the rest; all processes together.

        Args:
            chunk: images of a chunk, where no earlier run has settled it.

        Raises:
            UserError: of a part, an earlier run has settled it otherwise, or it leaves too few.
        """
        chunk = min(chunk, self.images)
        if self.part and self.chunk not in (0, chunk):
            raise UserError(
                f"{self.folder} has chunks of {self.chunk} images: give --chunk_size "
                f"{self.chunk}, to all parts, or choose another save_dir"
            )
        self.chunk = self.chunk or chunk
        barrier()  # Before it, other processes may still read what is deleted here.
        if self.is_main:
            for start in self._found:
                if start < self.counts.images:  # of a run that was killed before it deleted it
                    self._path(start).unlink(missing_ok=True)
            self.collect()
        (self.chunk,) = from_main_process([self.chunk])
        if not self.is_main:
            self._reload()
        chunks = self.all_chunks()
        if self.part:
            if self.part.of > len(chunks):
                raise UserError(
                    f"--images_part {self.part} of {len(chunks)} chunks: lower --chunk_size "
                    f"{self.chunk}, or make fewer parts"
                )
            chunks = chunks[self.part.number - 1 :: self.part.of]
        done = from_main_process([self.is_done(chunk.start) for chunk in chunks])
        undone = [chunk for chunk, is_done in zip(chunks, done, strict=True) if not is_done]
        if undone and self._found and not (self.part or self.enough):
            logger.warning(
                "of %d chunks %d are missing, and scored now: those of images %s%s",
                len(chunks),
                len(undone),
                ", ".join(f"{chunk[0]} to {chunk[-1]}" for chunk in undone[:NAMED]),
                ", ..." if len(undone) > NAMED else "",
            )
        # In turns, so that together they extend the prefix, whose images are a balanced sample.
        self._own = undone[rank() :: world_size()]

    def chunks(self) -> Iterator[range]:
        """The chunks that are this process's to do, as ranges of image positions.

        Ends early when the prefix, with the other processes' chunks, has become enough. A first
        SIGTERM or Ctrl-C during a chunk takes effect when the next one is asked for.
        """
        for chunk in self._own:
            if not self.is_main:
                self._reload()
            if self.enough:
                return
            with finished_before_stopping():
                yield chunk

    def add(self, start: int, counts: Counts) -> None:
        """Keep the counts of the chunk whose first image is ``start``."""
        if self.is_main and start == self.counts.images and not self.part:
            self._extend(counts)
            self.collect()
        else:
            whose = {**self.identity, "image_list": self.copies} if self.part else self.identity
            save_state(self._path(start), whose, self.chunk, counts, start)

    def complete(self) -> Counts:
        """The counts over the final prefix: in the main process, which waits for the others.

        Of a part, nothing but chunk files is left when all processes are done.
        """
        if self.part:
            barrier()
            what = f"part {self.part} is scored: gather all parts' {CHUNK_FILES} in one folder"
            logger.info("%s, and give it as save_dir without images_part: %s", what, self.folder)
        if self.part or not self.is_main:
            return self.counts
        if not self.enough:
            logger.info("waiting for the other processes' chunks")
        while not self.enough:
            if self.collect():
                logger.info("%d images", self.counts.images)
            else:
                time.sleep(POLL_SECONDS)
        if self.counts.images < self.images:
            logger.info("stopped early: what was aimed at is reached")
        return self.counts

    # --- what is done

    def __str__(self) -> str:
        """How far the prefix is, for the log."""
        if self.part:
            return f"part {self.part}"
        text, found = "ranking's agreement not known yet", self.agreement
        if self.counts.images == self.images:
            text = "all that there are"  # which agree with themselves
        elif found is not None:
            text = f"ranking's agreement {found.tau:.3f} ({found.low:.3f} to {found.high:.3f})"
        error = f"largest standard error {self.counts.standard_error().max():.4f}"
        return f"{self.counts.images} images, {error}, {text}"

    def all_chunks(self) -> list[range]:
        """Image positions of each chunk."""
        starts = range(0, self.images, self.chunk)
        return [range(start, min(start + self.chunk, self.images)) for start in starts]

    def is_done(self, start: int) -> bool:
        """Whether the chunk whose first image is ``start`` is done."""
        return start < self.counts.images or self._path(start).is_file()

    def left(self) -> int:
        """Images of this process's chunks that are not done."""
        return sum(len(chunk) for chunk in self._own if not self.is_done(chunk.start))

    @property
    def enough(self) -> bool:
        """Whether the prefix is all images, or as exact as wanted."""
        if self.counts.images in (0, self.images):
            return self.counts.images > 0
        found = self.agreement if self.target_tau else None
        return found is not None and found.low >= self.target_tau

    @property
    def agreement(self) -> Agreement | None:
        """Of the prefix's ranking with that by all images; None where it is not defined."""
        images, found = self._agreement
        if images != self.counts.images:
            images = self.counts.images
            found = expected_agreement(self.counts.folds, images, self.images)
            self._agreement = images, found
        return found

    def collect(self) -> bool:
        """Extend the prefix by the chunk files that follow it; whether there were any.

        Stops where the prefix is enough, so that the result does not depend on who was faster.
        """
        before = self.counts.images
        while not (self.part or self.enough) and self._path(self.counts.images).is_file():
            path = self._path(self.counts.images)
            self._extend(self._load(path).counts)
            path.unlink()
        return self.counts.images > before

    def _extend(self, counts: Counts) -> None:
        """Add the prefix's next chunk, and write the prefix."""
        self.counts.add(counts)
        save_state(self.folder / STATE_FILE, self.identity, self.chunk, self.counts)
        found = self.counts, self.agreement, self.images
        content = estimates(self.archs, *found, self.network)
        write_json(self.folder / ESTIMATES_FILE, content)

    # --- files

    def _reload(self) -> None:
        """Read the prefix that the main process has written."""
        path = self.folder / STATE_FILE
        if path.exists():
            earlier = self._load(path)
            self.chunk, self.counts = earlier.chunk, earlier.counts

    def _path(self, start: int) -> Path:
        return self.folder / CHUNK_FILES.replace("*", f"{start:08d}")

    def _load(self, path: Path) -> Saved:
        """Counts of these architectures, and of the images that ``path`` stands for."""
        found = load_state(path, self.identity, self.copies)
        if len(found.counts.top1) != len(self.archs):
            raise UserError(
                f"{path} holds {len(found.counts.top1)} architectures, not {len(self.archs)}; "
                "remove it to start anew"
            )
        start, end, chunk = found.start, found.start + found.counts.images, found.chunk
        is_right = end == self.images or (end < self.images and end % chunk == 0)
        if path.name == STATE_FILE:
            is_right &= start == 0
        else:
            is_right &= start % chunk == 0 and end <= start + chunk and path == self._path(start)
        if not is_right:
            raise UserError(
                f"{path} holds images {start} to {end - 1} in chunks of {chunk}, which it cannot "
                f"of {self.images} or by its name; was it copied or renamed? Move it elsewhere"
            )
        return found
