"""Reading ``.npz`` files that somebody else may have written, damaged or swapped.

``numpy.load`` unpacks whatever a file claims to hold. Here nothing is taken but what
``numpy.savez`` writes: plain arrays, not compressed, which are no larger than their file.
"""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

KINDS = "biufU"
"""Booleans, whole numbers, floats and text; no objects, which would be unpickled."""


class ArraysError(Exception):
    """A file that is not what ``numpy.savez`` writes, or is too large; the message says why."""


def read_arrays(path: str | Path, most_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, by name.

    Args:
        path: of the file.
        most_bytes: a larger file is refused before it is read.

    Raises:
        FileNotFoundError: there is none.
        ArraysError: anything else that is wrong with it.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ArraysError("no plain file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most_bytes:
                raise ArraysError(f"{size} bytes, more than {most_bytes}")
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                names = [member.filename.removesuffix(".npy") for member in members]
                if len(set(names)) < len(names):
                    raise ArraysError("an array twice")
                # Members may overlap, so that a small file holds much.
                if sum(member.file_size for member in members) > size:
                    raise ArraysError("more content than bytes")
                arrays = (_read_member(archive, member) for member in members)
                return dict(zip(names, arrays, strict=True))
    except (FileNotFoundError, ArraysError):
        raise
    except Exception as error:
        # A broken file can make its reader fail in any way.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArraysError(reason) from None


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ArraysError(f"{member.filename} is compressed or encrypted")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        shape, fortran, dtype = read_header[version](file)
        if dtype.hasobject or dtype.kind not in KINDS:
            raise ArraysError(f"{member.filename} holds {dtype}")
        content = file.read()
        # The array is made of what was read, whatever shape it claims.
        flat = np.frombuffer(content, dtype) if content else np.empty(0, dtype)
        return flat.reshape(shape, order="F" if fortran else "C").copy()
