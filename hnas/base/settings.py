"""Whether what lies in a file or folder belongs to this run: one comparison, one message."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hnas.base.errors import UserError

DIGEST = re.compile("[0-9a-f]{32,}")


def changed_settings(found: Mapping, wanted: Mapping) -> list[str]:
    """Names of the settings in ``wanted`` that ``found`` has otherwise, or lacks."""
    return [name for name in wanted if name not in found or found[name] != wanted[name]]


def check_same_settings(what: object, found: Mapping, wanted: Mapping, remedy: str) -> None:
    """Refuse results of other settings.

    Args:
        what: whose settings ``found`` are: a path, or a name within one.
        remedy: what to do, e.g. ``remove it, or choose another --out``.

    Raises:
        UserError: names every setting that differs, with both values.
    """
    changed = changed_settings(found, wanted)
    if changed:
        told = ", ".join(
            f"{name.replace('_', ' ')} {shown_value(found.get(name))} instead of "
            f"{shown_value(wanted[name])}"
            for name in changed
        )
        raise UserError(f"{what} is of other settings: {told}; {remedy}")


def shown_value(value: object) -> str:
    """A setting as a message shows it; of a digest only the start."""
    text = "none" if value is None or value == "" else str(value)
    return text[:16] if DIGEST.fullmatch(text) else text
