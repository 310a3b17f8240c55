"""What finished jobs leave: a file of JSON lines, which several processes add to at once."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hnas.base.errors import UserError
from hnas.base.files import replacing


class Records:
    """The entries of one file by the name of their job.

    Every line is a JSON object whose ``job`` is that name. A file that is not there has none. It
    only ever grows at its end or is replaced as a whole, so reading needs no lock. A process that
    is killed while it adds a line leaves the beginning of one; that is not read, and the next
    :meth:`put` removes it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._version: tuple[int, ...] | None = None
        self._entries: dict[str, dict] = {}

    def get(self, job: str) -> dict | None:
        """A job's entry, or None; not to be changed by the caller.

        Raises:
            UserError: the file cannot be read, or is not one of these.
        """
        return self._read().get(job)

    def put(self, job: str, entry: dict) -> None:
        """Add a job's entry, or replace it if there is another one.

        It is on the disk when this returns.

        Raises:
            UserError: the file cannot be written, or is not one of these.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                file.seek(0)
                content = file.read()
                entries = parse(content, self.path)
                if content.endswith(b"\n") and job not in entries:
                    file.write(line(job, entry))
                    file.flush()
                    os.fsync(file.fileno())
                elif entries.get(job) != entry:
                    self._rewrite(entries | {job: entry})
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _rewrite(self, entries: dict[str, dict]) -> None:
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(line(*item) for item in entries.items()))

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, open for reading and adding, while no other process writes to it."""
        while True:
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Whoever had the lock before may have put a new file in the place of this one.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    yield file
                    return

    def _read(self) -> dict[str, dict]:
        """All entries; parsed again only if the file has changed."""
        try:
            found = os.stat(self.path)
            version = (found.st_ino, found.st_size, found.st_mtime_ns)
            if version != self._version:
                self._entries = parse(self.path.read_bytes(), self.path)
                self._version = version
        except FileNotFoundError:
            self._entries, self._version = {}, None
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        return self._entries


def line(job: str, entry: dict) -> bytes:
    """An entry as it stands in the file."""
    return json.dumps({"job": job, **entry}, separators=(",", ":")).encode() + b"\n"


def parse(content: bytes, path: Path) -> dict[str, dict]:
    """Entries by job, in the order of the lines; a last line that is not whole is left out.

    Raises:
        UserError: another line is not whole, or a job stands there with two different entries.
    """
    entries: dict[str, dict] = {}
    places: dict[str, int] = {}
    *lines, last = content.split(b"\n")
    if _entry(last):
        lines.append(last)
    for number, text in enumerate(lines, 1):
        entry = _entry(text)
        if entry is None:
            raise UserError(
                f"{path}, line {number} is not a whole entry of a job; remove the line, and the "
                "job is done again"
            )
        job = entry.pop("job")
        if entries.setdefault(job, entry) != entry:
            raise UserError(
                f"{path} has two different entries of {job}, in lines {places[job]} and {number}; "
                "remove one of them"
            )
        places.setdefault(job, number)
    return entries


def _entry(text: bytes) -> dict | None:
    """A line's JSON object with the name of its job; None if it is something else."""
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    named = isinstance(entry, dict) and isinstance(entry.get("job"), str)
    return entry if named else None
