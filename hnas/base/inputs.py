"""Files that a user names for reading."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


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
