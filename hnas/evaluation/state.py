"""What an evaluation has found so far: saved after every chunk, resumed, and told as estimates."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError
from hnas.base.files import replacing
from hnas.evaluation.hits import Counts
from hnas.search_space import Architecture

FIELDS = ("top1", "top5", "near1", "near5")


class StateError(UserError):
    """A state file that is broken or belongs to another evaluation."""


def architectures_hash(archs: Mapping[str, Architecture]) -> str:
    """SHA-256 of names and codes in their order."""
    digest = hashlib.sha256()
    for name, arch in archs.items():
        digest.update(f"{name} {arch.code}\n".encode())
    return digest.hexdigest()


def save_state(path: Path, identity: Mapping[str, str], chunk: int, counts: Counts) -> None:
    """Write counts, the images that they are over, and whose they are, in one step.

    Raises:
        UserError: the file cannot be written; the earlier one is intact.
    """
    columns = dict(zip(FIELDS, counts.columns(), strict=True))
    whose = {f"identity_{name}": np.array(value) for name, value in identity.items()}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, chunk=chunk, images=counts.images, **columns, **whose)


def load_state(path: Path, identity: Mapping[str, str]) -> tuple[int, Counts] | None:
    """The chunk size and counts that :func:`save_state` wrote, or None if there is no file.

    Raises:
        StateError: it is broken, or of another checkpoint, image list, architecture list, ...
    """
    if not path.is_file():
        return None
    try:
        # No pickles: an array of objects in the file is refused.
        with np.load(path, allow_pickle=False) as content:
            state = {name: content[name] for name in content.files}
        counts = Counts(*(state[name].astype(np.int64) for name in FIELDS), int(state["images"]))
        chunk = int(state["chunk"])
        found = {name: str(state[f"identity_{name}"]) for name in identity}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StateError(f"{path} is broken ({error}); remove it to start anew") from error
    for name, value in identity.items():
        if found[name] != value:
            raise StateError(
                f"{path} is of another {name.replace('_', ' ')} ({found[name][:16]} instead of "
                f"{value[:16]}); remove it to start anew, or choose another save_dir"
            )
    return chunk, counts


def estimates(archs: Mapping[str, Architecture], counts: Counts) -> dict:
    """Accuracy and standard error of every architecture after the images seen so far."""
    accuracy, error = counts.accuracy().tolist(), counts.standard_error().tolist()
    return {
        "images": counts.images,
        "architectures": {
            name: {"acc": acc, "se": round(se, 6), "arch": arch.code}
            for (name, arch), acc, se in zip(archs.items(), accuracy, error, strict=True)
        },
    }
