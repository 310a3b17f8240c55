"""Files: written so that a kill or a full disk leaves the old content; locks; digests; reading."""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import stat
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError, word_of

DIGEST = ".sha256"
SHA256 = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
KINDS = "biufU"  # of arrays: booleans, whole numbers, floats and text
# Of temporary files: process number and a random one.
TEMPORARY = re.compile(r"\..+\.[0-9]+-[0-9a-f]{16}\.tmp")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` when the block ends.

    The content is on the disk before it does; if the block fails, ``path`` stays as it was. Where
    it is a link, what it leads to is written. The temporary file is there, empty, and locked while
    the block runs, so that :func:`remove_leftovers` knows that its writer lives.

    Raises:
        UserError: the file cannot be written, or is a pipe, socket or device.
    """
    real = Path(os.path.realpath(path))
    # Containers that share a folder may use the same process number.
    own = f"{os.getpid()}-{secrets.token_hex(8)}"
    temporary = real.with_name(f".{real.name}.{own}.tmp")
    with ExitStack() as stack:
        try:
            real.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                check_regular(real)
            stack.callback(os.close, _create_locked(temporary))
            yield temporary
            _flush(temporary)
            os.replace(temporary, real)
            with suppress(OSError):  # of disks that cannot flush folders; the file is in its place
                _flush(real.parent)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            # Without an errno it is Paddle's, of a device, and no disk's.
            if isinstance(error, OSError) and error.errno:
                raise UserError(f"cannot write {path}: {error.strerror or error}") from error
            raise


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
    """Delete the temporary files that killed processes left in ``folder``; not living ones'.

    They stay where the disk has no locks.
    """
    for path in Path(folder).glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            with suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def check_writable(folder: str | Path, flag: str) -> None:
    """Try a file where results will go, before they are computed; nothing is left there.

    The :class:`UserError` names the flag.
    """
    try:
        made = Path(folder)
        while not (made.exists() or made.is_symlink()):
            made = made.parent
        with tempfile.TemporaryFile(dir=made) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(
            f"cannot write to {flag} {folder}: {error.strerror or error}; choose another folder"
        ) from error


def check_output(path: str | Path, flag: str) -> None:
    """As :func:`check_writable`, for a file that a flag names; what is none is refused, too."""
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file():
        raise UserError(f"{flag} {path} is a folder, a pipe, socket or device; name a file")
    check_writable(real.parent, flag)


def claim_folder(folder: str | Path, flag: str, part: str = "") -> None:
    """Keep other runs out of a folder of results, which a flag names, until this process ends.

    Several ``part``s of an evaluation share it, each once. The lock, POSIX's, ends with its process
    however that ends; loader processes do not inherit it. A disk that refuses locks is logged.

    Raises:
        UserError: another run is there; tells which.
    """
    where, what = Path(os.path.realpath(folder)), f"{flag} {folder}"
    _claim(where / ".run.lock", what, fcntl.LOCK_SH if part else fcntl.LOCK_EX)
    if part:
        own = where / f".part_{part.replace('/', '_of_')}.lock"
        _claim(own, f"part {part} in {what}", fcntl.LOCK_EX)


def _claim(path: Path, what: str, kind: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = f"pid {os.getpid()} on {socket.gethostname()}, {Path(sys.argv[0]).name}, since {since}"
    descriptor, is_there, is_new = 0, False, not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not is_there:  # Who ends deletes the file, maybe just now.
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)  # closing it ends the lock
            fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
            is_there = path.exists() and os.path.samefile(path, descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, os.fsencode(owner))
        atexit.register(_give_up, path, descriptor, is_new)
    except OSError as error:
        if descriptor and error.errno in (errno.EACCES, errno.EAGAIN):
            told = os.read(descriptor, 500).decode(errors="replace") or "another run"
            told = f"{what} is in use: {told}; wait for its end, or choose another"
            raise UserError(told) from None
        told = "no lock on %s (%s): start no second run there"
        logging.getLogger(__name__).warning(told, what, error.strerror)


def _give_up(path: Path, descriptor: int, with_folder: bool) -> None:
    with suppress(OSError):  # Others share it, or there are results in the folder.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samefile(path, descriptor):
            path.unlink()
            if with_folder:
                path.parent.rmdir()


def digest_path(path: str | Path) -> Path:
    """Where the SHA-256 of a file stands: beside it; of a link, beside what it leads to."""
    return Path(f"{os.path.realpath(path)}{DIGEST}")


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_digest(path: str | Path, digest: str = "") -> None:
    """Write the SHA-256 of a file beside it; ``digest`` if that is known already."""
    beside = digest_path(path)
    write_text(beside, f"{digest or file_digest(path)}  {beside.stem}\n")


def recorded_digest(path: str | Path) -> str | None:
    """The SHA-256 that stands beside a file, or else beside a link to it; None: there is none."""
    recorded = digest_path(path)
    if not recorded.is_file():
        recorded = Path(f"{path}{DIGEST}")
    if not recorded.is_file():
        return None
    # Tools of Windows write upper case, in UTF-16 or after a byte order mark.
    found = SHA256.search(recorded.read_bytes().replace(b"\0", b"").lower())
    return found[0].decode() if found else ""


def is_whole(path: str | Path) -> bool:
    """Whether a file is there, and its SHA-256 is the one that stands beside it."""
    with suppress(OSError):
        recorded = recorded_digest(path)
        return recorded is not None and recorded == file_digest(path)
    return False


def plain_text(text: str, encoding: str = "utf-8") -> str:
    """Text that can be written: what is no character, as in names that are not UTF-8, escaped."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write_text(path: str | Path, text: str) -> None:
    """Write :func:`plain_text` as :func:`replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(plain_text(text), encoding="utf-8")


def print_text(text: str) -> None:
    """Write results to the standard output at once; :class:`UserError` if it takes no more."""
    try:
        sys.stdout.write(plain_text(text, sys.stdout.encoding or "utf-8"))
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # Python tries again when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"cannot write to the standard output: {error.strerror}") from None


def write_json(path: str | Path, content) -> None:
    """Write JSON as :func:`replacing` does, so that a kill leaves the previous file."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: str | Path) -> dict:
    """A JSON object that a program of this project wrote; a :class:`UserError` otherwise."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=distinct)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what this program saves; name another file or folder")
    return content


def distinct(pairs: Sequence[tuple]) -> dict:
    """A JSON object of its pairs; a ValueError where a name stands twice: which is meant?"""
    content = dict(pairs)
    if len(content) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice[:60]!r} stands twice")
    return content


def check_regular(path: str | Path) -> None:
    """Refuse what is no file with an end: reading a pipe, socket or device may never return.

    The :class:`OSError`'s ``strerror`` says what it is.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a regular file", str(path))


class ArraysError(Exception):
    """A file that is not what ``numpy.savez`` writes, or is too large; the message says why."""


def read_arrays(path: str | Path, most_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, by name: whoever wrote it, no larger than their file.

    A file of more than ``most_bytes`` is refused before it is read.

    Raises:
        FileNotFoundError: there is none.
        ArraysError: anything else that is wrong with it.
    """
    try:
        check_regular(path)
        size = os.path.getsize(path)
        if size > most_bytes:
            raise ArraysError(f"{size} bytes, more than {most_bytes}")
        with zipfile.ZipFile(path) as archive:
            _check_members(archive.infolist(), size)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (FileNotFoundError, ArraysError):
        raise
    except Exception as error:
        # A broken file can make its reader fail in any way.
        raise ArraysError(word_of(error)) from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in KINDS:
            raise ArraysError(f"{name} holds something else than numbers or text")
    return arrays


def _check_members(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Refuse what unpacks to more than the archive's ``size``, which ``numpy.savez`` never does."""
    names = [member.filename.removesuffix(".npy") for member in members]
    if len(set(names)) < len(names):
        raise ArraysError("an array twice")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ArraysError(f"{member.filename} is compressed or encrypted")
    # Members may overlap, so that a small file holds much.
    if sum(member.file_size for member in members) > size:
        raise ArraysError("more content than bytes")
