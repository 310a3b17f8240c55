"""Which run a checkpoint is of: an id, in every set and, of the latest run, in its folder."""

from __future__ import annotations

import secrets
from pathlib import Path

from hnas.base.errors import UserError
from hnas.base.files import read_json, write_json

NOTE = "run_id.json"


def new_run_id() -> str:
    """An id that no other run has; no generator that training draws from is asked."""
    return secrets.token_hex(8)


def note_run(folder: str | Path, run_id: str) -> None:
    """Note in ``folder`` which run writes there from now on.

    Raises:
        UserError: the file cannot be written.
    """
    write_json(Path(folder) / NOTE, {"run_id": run_id})


def noted_run(folder: str | Path) -> str | None:
    """The run that began last in ``folder``; None: nobody noted any there.

    Raises:
        UserError: the note is not this program's.
    """
    path = Path(folder) / NOTE
    if not path.is_file():
        return None
    run_id = read_json(path).get("run_id")
    if not isinstance(run_id, str):
        raise UserError(f"{path} is not what this program saves; remove it to resume any run's set")
    return run_id
