"""Files of architectures: the organisers' JSON, a JSON list, or text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError
from hnas.base.files import check_regular
from hnas.search_space import Architecture, ArchitectureError

MAX_BYTES = 256 * 2**20
NEAR = 1e-9
"""A share of 1 that was worked out as a mean may be above 1 by less."""
MOST = 1e300
"""Of a prediction's size: sums and distances of such are finite."""
GAP, SLACK = 5, 1.25
"""Of what tells units apart; see :func:`check_one_unit`."""
MAX_ENTRIES = 500_000
"""Some ten times those of the competition's file; Python's lists need many times a file's bytes."""


def read_architectures(path: str | Path) -> dict[str, Architecture]:
    """Architectures by name, in the file's order.

    Reads ``{"arch1": {"acc": 0.0, "arch": "1252..."}, ...}``, a JSON list of codes, or text
    with codes separated by commas or white space; the latter two are named arch1, arch2, ...

    Raises:
        UserError: missing or broken file, wrong entry, a name or code twice.
    """
    return _read(Path(path), with_accuracies=False)[0]


def read_accuracies(path: str | Path) -> tuple[dict[str, Architecture], np.ndarray]:
    """Architectures by name, in the file's order, and their accuracies, float64 [n].

    Reads the organisers' JSON, ``{"arch1": {"acc": 0.7, "arch": "1252..."}, ...}``.

    Raises:
        UserError: as :func:`read_architectures`, or an ``acc`` that is missing or is
            not a finite number.
    """
    return _read(Path(path), with_accuracies=True)


def read_scores(path: str | Path) -> tuple[dict[str, Architecture], np.ndarray]:
    """As :func:`read_accuracies`, of accuracies in percent or, where all are at most 1, shares.

    Raises:
        UserError: a wrong file, an accuracy outside of 0 to 100, or some in percent and some not.
    """
    archs, accuracies = read_accuracies(path)
    for name, value in zip(archs, accuracies, strict=True):
        if not 0 <= value <= 100 * (1 + NEAR):
            raise UserError(
                f"{path}: entry {name!r}: accuracy {value:g}; accuracies are 0 to 1, or 0 to 100 "
                "in percent"
            )
    check_one_unit(path, accuracies)
    return archs, accuracies


def check_one_unit(path: str | Path, accuracies: np.ndarray) -> None:
    """Refuse accuracies [n] of which some are shares of 1 and the others in percent.

    There are values on both sides of 1 with a ``GAP``-fold gap between; 0 is neither. Those below
    may be percents where they are few, and well below all others if they were shares: a network
    that broke, and guesses among many classes, has 0.4 % where others have 60.

    Raises:
        UserError: with the two values next to the gap.
    """
    low = accuracies[(accuracies > 0) & (accuracies <= 1 + NEAR)]
    high = accuracies[accuracies > 1 + NEAR]
    most, least = low.max(initial=0), high.min(initial=np.inf)
    broke = len(low) < len(high) and least > SLACK * 100 * most
    if most and GAP * most < least < np.inf and not broke:
        raise UserError(
            f"{path} has accuracies of {most:.6g} and of {least:.6g}: are some shares of 1 and "
            "some percent? Give all as shares of 1"
        )


def read_truth(path: str | Path) -> dict[Architecture, float]:
    """Accuracies in percent by architecture; see :func:`read_scores`."""
    archs, accuracies = read_scores(path)
    return dict(zip(archs.values(), in_percent(accuracies).tolist(), strict=True))


def in_percent(accuracies: np.ndarray) -> np.ndarray:
    """Accuracies in percent, of accuracies in percent or as shares of 1."""
    return accuracies * 100 if accuracies.max() <= 1 + NEAR else accuracies


def in_shares(accuracies: np.ndarray) -> np.ndarray:
    """Accuracies as shares of 1, of accuracies in percent or as shares of 1."""
    return accuracies if accuracies.max() <= 1 + NEAR else accuracies / 100


def _read(path: Path, with_accuracies: bool) -> tuple[dict[str, Architecture], np.ndarray]:
    archs: dict[str, Architecture] = {}
    names: dict[Architecture, str] = {}
    values = []
    for position, (name, code, accuracies) in enumerate(_entries(path), 1):
        where = f"{path}: entry {position} ({name!r})"
        try:
            arch = Architecture.from_code(code)
        except ArchitectureError as error:
            raise UserError(f"{where}: {error}") from None
        if name in archs:
            raise UserError(f"{where}: the name stands twice")
        if arch in names:
            raise UserError(f"{where}: the same architecture as {names[arch]!r}")
        archs[name], names[arch] = arch, name
        if with_accuracies:
            values.append(_accuracy(where, accuracies))
    return archs, np.array(values)


def _accuracy(where: str, accuracies: Sequence[object]) -> float:
    if len(accuracies) != 1:
        raise UserError(
            f"{where}: one accuracy is needed, and {len(accuracies)} are there; "
            'the form is {"acc": 0.7, "arch": "1252..."}'
        )
    value = accuracies[0]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Whole numbers may be too large for a float; comparing them is exact.
    if not is_number or not abs(value) <= MOST:
        raise UserError(f'{where}: "acc" is {json.dumps(value):.30}, no number within +-{MOST:g}')
    return float(value)


def _entries(path: Path) -> list[tuple[str, object, Sequence[object]]]:
    """Name, code and every accuracy of each architecture, as they stand in the file."""
    text = _read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        entries = _json_entries(path, text)
    else:
        words = islice(re.finditer(r"[^\s,]+", text), MAX_ENTRIES + 1)
        entries = _named(word[0] for word in words)
        _check_number(path, len(entries))
    if not entries:
        raise UserError(f"{path} holds no architectures")
    return entries


def _check_number(path: Path, entries: int) -> None:
    if entries > MAX_ENTRIES:
        raise UserError(f"{path} holds more than {MAX_ENTRIES:,} entries")


def _named(codes: Iterable[object]) -> list[tuple]:
    return [(f"arch{i}", code, ()) for i, code in enumerate(codes, 1)]


def _read_text(path: Path) -> str:
    try:
        check_regular(path)
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES // 2**20} MiB")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read architectures from {path}: {reason}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file ({error.reason})") from error


def _json_entries(path: Path, text: str) -> list[tuple]:
    # Counted before anything is built of them. An entry has two values at most.
    _check_number(path, max(text.count("{"), text.count("["), text.count(",") // 2) - 1)
    try:
        # Pairs, since a dict would drop all but the last of a name that stands twice.
        content = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, _Pairs):
        return _named(content)
    entries = []
    for position, (name, value) in enumerate(content, 1):
        pairs = value if isinstance(value, _Pairs) else ()
        codes, accuracies = ([item for key, item in pairs if key == k] for k in ("arch", "acc"))
        if len(codes) != 1:
            raise UserError(
                f"{path}: entry {position} ({name!r}) is not of the form "
                '{"acc": 0.0, "arch": "1252..."}'
            )
        entries.append((name, codes[0], accuracies))
    return entries


class _Pairs(list):
    """A JSON object as (name, value) pairs; an array is a plain list."""


def submission(archs: Mapping[str, Architecture], accuracies: Sequence[float]) -> dict:
    """The organisers' form, every code written as it was read."""
    return {
        name: {"acc": accuracy, "arch": arch.code}
        for (name, arch), accuracy in zip(archs.items(), accuracies, strict=True)
    }
