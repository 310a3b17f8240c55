"""Files of architectures: the organisers' JSON, a JSON list, or text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hnas.search_space import Architecture, ArchitectureError
from hnas.utils.atomic import replacing
from hnas.utils.errors import UserError

MAX_BYTES = 256 * 2**20


class ArchitectureFileError(UserError):
    """A file of architectures that cannot be used; the message names file and entry."""


def read_architectures(path: str | Path) -> dict[str, Architecture]:
    """Architectures by name, in the file's order.

    Reads ``{"arch1": {"acc": 0.0, "arch": "1252..."}, ...}``, a JSON list of codes, or text
    with codes separated by commas or white space; the latter two are named arch1, arch2, ...

    Raises:
        ArchitectureFileError: missing or broken file, wrong entry, a name or code twice.
    """
    path = Path(path)
    text = _read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        entries = _json_entries(path, text)
    else:
        codes = [code for code in re.split(r"[\s,]+", text) if code]
        entries = [(f"arch{i}", code) for i, code in enumerate(codes, 1)]
    if not entries:
        raise ArchitectureFileError(f"{path} holds no architectures")
    return _parse_entries(path, entries)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArchitectureFileError(f"{path} is larger than {MAX_BYTES // 2**20} MiB")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise ArchitectureFileError(f"cannot read architectures from {path}: {reason}") from error
    except UnicodeDecodeError as error:
        raise ArchitectureFileError(f"{path} is not a text file ({error.reason})") from error


def _json_entries(path: Path, text: str) -> list[tuple[str, object]]:
    try:
        # Pairs, since a dict would drop all but the last of a name that stands twice.
        content = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise ArchitectureFileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, _Pairs):
        plain = (dict(item) if isinstance(item, _Pairs) else item for item in content)
        return [(f"arch{i}", code) for i, code in enumerate(plain, 1)]
    entries = []
    for position, (name, value) in enumerate(content, 1):
        codes = [item for key, item in value if key == "arch"] if isinstance(value, _Pairs) else []
        if len(codes) != 1:
            raise ArchitectureFileError(
                f"{path}: entry {position} ({name!r}) is not of the form "
                '{"acc": 0.0, "arch": "1252..."}'
            )
        entries.append((name, codes[0]))
    return entries


class _Pairs(list):
    """A JSON object as (name, value) pairs; an array is a plain list."""


def _parse_entries(path: Path, entries: Sequence[tuple[str, object]]) -> dict[str, Architecture]:
    archs: dict[str, Architecture] = {}
    names: dict[Architecture, str] = {}
    for position, (name, code) in enumerate(entries, 1):
        where = f"{path}: entry {position} ({name!r})"
        try:
            arch = Architecture.from_code(code)
        except ArchitectureError as error:
            raise ArchitectureFileError(f"{where}: {error}") from None
        if name in archs:
            raise ArchitectureFileError(f"{where}: the name stands twice")
        if arch in names:
            raise ArchitectureFileError(f"{where}: the same architecture as {names[arch]!r}")
        archs[name], names[arch] = arch, name
    return archs


def submission(archs: Mapping[str, Architecture], accuracies: Sequence[float]) -> dict:
    """The organisers' form, every code written as it was read."""
    return {
        name: {"acc": accuracy, "arch": arch.code}
        for (name, arch), accuracy in zip(archs.items(), accuracies, strict=True)
    }


def write_json(path: str | Path, content) -> None:
    """Write JSON by temporary file and rename, so that a kill leaves the previous file.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
