"""Files of architectures: the organisers' JSON, scores by code, a JSON list, or text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from hnas.base.command_line import MOST_ARCHITECTURES
from hnas.base.errors import UserError
from hnas.base.files import check_regular
from hnas.search_space import Architecture

MAX_BYTES = 256 * 2**20
NEAR = 1e-9
"""A share of 1 that was worked out as a mean may be above 1 by less."""
MOST = 1e300
"""Of a prediction's size: sums and distances of such are finite."""
GAP, SLACK = 5, 1.25
"""Of what tells units apart; see :func:`check_accuracies`."""
PUBLISHED = Path(__file__).with_name("imagenet30.json")
"""Codes and ImageNet accuracies, in percent, that one competitor of the track published: a single
training each, measured on the same 2,500 validation images."""
IMAGENET30 = PUBLISHED.stem
"""Their name where a ground truth is asked for; a user's own file of that name is ./imagenet30."""
OF_IMAGENET30 = ("resnet48", 224, 1000)


def read_architectures(path: str | Path) -> dict[str, Architecture]:
    """Architectures by name, in the file's order.

    Reads ``{"arch1": {"acc": 0.0, "arch": "1252..."}, ...}``, ``{"1252...": 0.0, ...}``, whose
    names are the codes, a JSON list of codes, or text with codes separated by commas or white
    space; the latter two are named arch1, arch2, ...

    Raises:
        UserError: missing or broken file, wrong entry, a name or code twice.
    """
    return _read(Path(path), with_values=False)[0]


def read_accuracies(path: str | Path) -> tuple[dict[str, Architecture], np.ndarray]:
    """Architectures by name, in the file's order, and their accuracies, float64 [n].

    Reads the organisers' JSON, ``{"arch1": {"acc": 0.7, "arch": "1252..."}, ...}``.

    Raises:
        UserError: as :func:`read_architectures`, or an ``acc`` that is missing or is
            not a finite number; or scores by code, which need not be accuracies.
    """
    archs, accuracies, plain = _read(Path(path), with_values=True)
    if plain:
        raise UserError(
            f"{path} has scores by code, for rank_report with --gt; accuracies are needed here"
        )
    return archs, accuracies


def read_scores(path: str | Path) -> tuple[dict[str, Architecture], np.ndarray]:
    """As :func:`read_accuracies`, of accuracies in percent or, where all are at most 1, shares.

    Raises:
        UserError: a wrong file, an accuracy outside of 0 to 100, or some in percent and some not.
    """
    archs, accuracies = read_accuracies(path)
    check_accuracies(path, archs, accuracies)
    return archs, accuracies


def read_predictions(path: str | Path) -> tuple[dict[str, Architecture], np.ndarray]:
    """As :func:`read_accuracies`, of what orders architectures, also by code and of any scale.

    Raises:
        UserError: a wrong file, or what looks like accuracies, some in percent and some not.
    """
    archs, values, plain = _read(Path(path), with_values=True)
    if not plain and values.min() >= 0 and values.max() <= 100:
        check_accuracies(path, archs, values)
    return archs, values


def read_truth(name: str | Path) -> dict[Architecture, float]:
    """What is to be predicted: accuracies in percent, or a file's scores by code, of any scale.

    ``name`` is a file, of accuracies as for :func:`read_scores`, or ``IMAGENET30``.
    """
    path = PUBLISHED if name == IMAGENET30 else Path(name)
    archs, values, plain = _read(path, with_values=True)
    if not plain:
        check_accuracies(path, archs, values)
        values = in_percent(values)
    return dict(zip(archs.values(), values.tolist(), strict=True))


def check_accuracies(path: str | Path, names: Iterable[str], accuracies: np.ndarray) -> None:
    """Refuse accuracies [n] of which some are none, or some shares of 1 and others in percent.

    The latter have values on both sides of 1 with a ``GAP``-fold gap between; 0 is neither. Those
    below may be percents where they are few, and well below all others if they were shares: a
    network that broke, and guesses among many classes, has 0.4 % where others have 60.

    Raises:
        UserError: with the name and value, or with the two values next to the gap.
    """
    for name, value in zip(names, accuracies, strict=True):
        if not 0 <= value <= 100 * (1 + NEAR):
            raise UserError(
                f"{path}: entry {name!r}: accuracy {value:g}; accuracies are 0 to 1, or 0 to 100 "
                "in percent"
            )
    low = accuracies[(accuracies > 0) & (accuracies <= 1 + NEAR)]
    high = accuracies[accuracies > 1 + NEAR]
    most, least = low.max(initial=0), high.min(initial=np.inf)
    broke = len(low) < len(high) and least > SLACK * 100 * most
    if most and GAP * most < least < np.inf and not broke:
        raise UserError(
            f"{path} has accuracies of {most:.6g} and of {least:.6g}: are some shares of 1 and "
            "some percent? Give all as shares of 1"
        )


def note_on_imagenet30(network: tuple | None) -> str:
    """What to know before trusting a comparison with it.

    ``network`` is that of the scores: backbone, image size and classes, None where not known.
    """
    told = (
        f"{IMAGENET30} is of thirty networks, each trained once and measured on the same 2,500 "
        "images: at 70 % with a standard error of 0.9 points, so that no score agrees with it fully"
    )
    if network in (None, OF_IMAGENET30):
        return f"{told}."
    own, theirs = ("{}, {} px, {} classes".format(*one) for one in (network, OF_IMAGENET30))
    return f"{told}. And these scores are of another network: {own}, not {theirs}."


def in_percent(accuracies: np.ndarray) -> np.ndarray:
    """Accuracies in percent, of accuracies in percent or as shares of 1."""
    return accuracies * 100 if accuracies.max() <= 1 + NEAR else accuracies


def in_shares(accuracies: np.ndarray) -> np.ndarray:
    """Accuracies as shares of 1, of accuracies in percent or as shares of 1."""
    return accuracies if accuracies.max() <= 1 + NEAR else accuracies / 100


def _read(path: Path, with_values: bool) -> tuple[dict[str, Architecture], np.ndarray, bool]:
    """Architectures by name, their values [n] if asked for, and whether these stand by code."""
    archs: dict[str, Architecture] = {}
    names: dict[Architecture, str] = {}
    values = []
    entries, plain = _entries(path)
    for position, (name, code, found) in enumerate(entries, 1):
        where = f"{path}: entry {position} ({name!r})"
        try:
            arch = Architecture.from_code(code)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if name in archs:
            raise UserError(f"{where}: the name stands twice")
        if arch in names:
            raise UserError(f"{where}: the same architecture as {names[arch]!r}")
        archs[name], names[arch] = arch, name
        if with_values:
            values.append(_value(where, found))
    return archs, np.array(values), plain


def _value(where: str, found: Sequence[object]) -> float:
    if len(found) != 1:
        raise UserError(
            f"{where}: one accuracy is needed, and {len(found)} are there; "
            'the form is {"acc": 0.7, "arch": "1252..."}'
        )
    value = found[0]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Whole numbers may be too large for a float; comparing them is exact.
    if not is_number or not abs(value) <= MOST:
        raise UserError(f"{where}: {json.dumps(value):.30} is no number within +-{MOST:g}")
    return float(value)


def _entries(path: Path) -> tuple[list[tuple[str, object, Sequence[object]]], bool]:
    """Name, code and every value of each architecture, as they stand in the file.

    And whether the file has these values by code, for names.
    """
    text, plain = _read_text(path), False
    if text.lstrip()[:1] in ("{", "["):
        entries, plain = _json_entries(path, text)
    else:
        words = islice(re.finditer(r"[^\s,]+", text), MOST_ARCHITECTURES + 1)
        entries = _named(word[0] for word in words)
        _check_number(path, len(entries))
    if not entries:
        raise UserError(f"{path} holds no architectures")
    return entries, plain


def _check_number(path: Path, entries: int) -> None:
    if entries > MOST_ARCHITECTURES:
        raise UserError(f"{path} holds more than {MOST_ARCHITECTURES:,} entries")


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


def _json_entries(path: Path, text: str) -> tuple[list[tuple], bool]:
    # Counted before anything is built of them. An entry has two values at most.
    _check_number(path, max(text.count("{"), text.count("["), text.count(",") // 2) - 1)
    try:
        # Pairs, since a dict would drop all but the last of a name that stands twice.
        content = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, _Pairs):
        return _named(content), False
    if not any(isinstance(value, list) for _, value in content):
        _check_number(path, len(content))
        return [(code, code, [score]) for code, score in content], True
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
    return entries, False


class _Pairs(list):
    """A JSON object as (name, value) pairs; an array is a plain list."""


def submission(archs: Mapping[str, Architecture], accuracies: Sequence[float]) -> dict:
    """The organisers' form, every code written as it was read."""
    return {
        name: {"acc": accuracy, "arch": arch.code}
        for (name, arch), accuracy in zip(archs.items(), accuracies, strict=True)
    }
