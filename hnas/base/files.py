"""Files: written so that a kill or a full disk leaves the previous content, and their digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hnas.base.errors import UserError

DIGEST = ".sha256"
# Of temporary files: process number and, except in earlier versions, a random one.
TEMPORARY = re.compile(r"\..+\.\d+(-[0-9a-f]{16})?\.tmp")
ABANDONED_SECONDS = 3600


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` when the block ends.

    The content is on the disk before it does; if the block fails, ``path`` stays as it was. The
    temporary file is there, empty, and locked while the block runs, so that
    :func:`remove_leftovers` knows that its writer lives.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    lock = None
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _create_locked(temporary)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _temporary(path: Path) -> Path:
    # Containers that share a folder may use the same process number.
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.tmp")


def _create_locked(path: Path) -> int:
    """Create an empty file; gives a descriptor that holds its lock, where the disk has locks."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return descriptor
        # Deleted as a leftover, before it was locked.
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that killed processes left in ``folder``; not living ones'."""
    for path in Path(folder).glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            with _is_left(path) as is_left, suppress(OSError):
                if is_left:
                    path.unlink()


@contextmanager
def _is_left(path: Path) -> Iterator[bool]:
    """Within the context: whether nobody writes to a temporary file any more."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_left = True
    except BlockingIOError:
        is_left = False
    except OSError:
        # A disk without locks.
        is_left = time.time() - os.fstat(descriptor).st_mtime > ABANDONED_SECONDS
    try:
        yield is_left
    finally:
        os.close(descriptor)


def check_writable(folder: str | Path, flag: str) -> None:
    """Try a file in a folder that results will go to, before they are computed.

    Nothing is left there: a program that then refuses its input has not made the folder.

    Raises:
        UserError: it cannot be written; names the flag.
    """
    folder = Path(folder)
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(folder / "try")
        try:
            temporary.write_bytes(bytes(4096))
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {flag} {folder}: {error.strerror or error}; choose another folder"
        ) from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def check_output(path: str | Path, flag: str) -> None:
    """As :func:`check_writable`, for a file that a flag names.

    Raises:
        UserError: its folder cannot be written, or it is a folder itself.
    """
    if Path(path).is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file in it")
    check_writable(Path(path).parent, flag)


def digest_path(path: str | Path) -> Path:
    """Where the SHA-256 of a file stands: beside it."""
    return Path(f"{path}{DIGEST}")


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_digest(path: str | Path, digest: str = "") -> None:
    """Write the SHA-256 of a file beside it; ``digest`` if that is known already.

    Raises:
        UserError: it cannot be written.
    """
    with replacing(digest_path(path)) as temporary:
        line = f"{digest or file_digest(path)}  {Path(path).name}\n"
        temporary.write_text(line, encoding="utf-8")


def is_whole(path: str | Path) -> bool:
    """Whether a file is there, and its SHA-256 is the one that stands beside it."""
    recorded = digest_path(path)
    try:
        if not (Path(path).is_file() and recorded.is_file()):
            return False
        words = recorded.read_text(encoding="utf-8", errors="replace").split()
        return words[:1] == [file_digest(path)]
    except OSError:
        return False


def write_json(path: str | Path, content) -> None:
    """Write JSON by temporary file and rename, so that a kill leaves the previous file.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def read_json(path: str | Path) -> dict:
    """A JSON object that a program of this project wrote.

    Raises:
        UserError: it is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what this program saves; name another file or folder")
    return content


def check_regular(path: str | Path) -> None:
    """Refuse what is no file with an end: reading a pipe, socket or device may never return.

    Raises:
        OSError: it is of another kind, or not there; ``strerror`` says which.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a regular file", str(path))
