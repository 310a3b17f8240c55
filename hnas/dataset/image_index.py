"""What earlier scans of an image folder found, kept in the user's cache folder.

Listing ImageNet means 1.28 million directory entries, and decoding it all to find the bad images
minutes of all cores. A class folder is listed again when its modification time changed, an image
decoded again when its size or modification time did. The cache holds no more than can be found
anew: a broken or missing one only costs time, and nothing is written beside the images. One whose
SHA-256 is not the one that stands beside it is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

from hnas.base.errors import UserError
from hnas.base.files import is_whole, write_digest, write_json

logger = logging.getLogger(__name__)

# A folder may change again within its clock's tick without a new modification time.
SETTLED_NS = 2 * 10**9


class ScanCache:
    """A JSON object on the disk: a key, the stamp that it was found at, and what was found.

    Args:
        folder: the split's folder that the entries are about.
        kind: of entries, each in a file of its own.
    """

    def __init__(self, folder: Path, kind: str):
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
        self.path = cache_folder() / f"{name}-{kind}.json"
        self._found = self._read()
        self._used: dict[str, list] = {}

    def _read(self) -> dict[str, list]:
        try:
            if not is_whole(self.path):
                return {}
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def get(self, key: str, stamp: list[int]):
        """What was found at ``key`` when its stamp was the same, or None."""
        match self._found.get(key):
            case [old, found] if old == stamp:
                self._used[key] = [stamp, found]
                return found
        return None

    def put(self, key: str, stamp: list[int], found) -> None:
        """Remember what was found, unless ``key`` changed just now."""
        if time.time_ns() - stamp[0] > SETTLED_NS:
            self._used[key] = [stamp, found]

    def save(self) -> None:
        """Write what :meth:`get` and :meth:`put` saw; entries that are gone are dropped."""
        if self._used == self._found:
            return
        try:
            write_json(self.path, self._used)
            write_digest(self.path)
        except UserError as error:
            logger.info("scan not cached: %s", error)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/pinas`` or ``~/.cache/pinas``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pinas"


def stamp_of(path: str | Path) -> list[int]:
    """Modification time (ns) and size (bytes), which change when a file or folder does."""
    status = os.stat(path)
    return [status.st_mtime_ns, status.st_size]
