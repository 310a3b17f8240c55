"""Reading ``estimates.json``, and how certain the difference of two accuracies is.

All architectures see the same images, so the difference of two accuracies is far more certain than
either of them. Its error comes from the folds (:mod:`hnas.ranking.agreement`): how much the
difference varies from one sixteenth of the images to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError
from hnas.base.files import read_json
from hnas.ranking.agreement import FEWEST_IMAGES, FOLDS, Agreement, fold_sizes

KEYS = frozenset({"acc", "se", "arch", "folds"})


@dataclass(frozen=True)
class Estimates:
    """What an evaluation knows after its first images.

    Attributes:
        names, codes: of the architectures, in the file's order.
        accuracy: top-1, 0 to 1; float64 [architectures].
        images: how many were scored.
        folds: top-1 hits by fold; int64 [architectures, FOLDS].
        agreement: with the ranking by all images; None where it is not defined.
    """

    names: tuple[str, ...]
    codes: tuple[str, ...]
    accuracy: np.ndarray
    images: int
    folds: np.ndarray
    agreement: Agreement | None


def difference_errors(folds: np.ndarray, images: int, index: int) -> np.ndarray:
    """Standard errors of accuracies less that of one architecture; float64 [architectures].

    As estimates for more such images, like the ``se`` of ``estimates.json``. The images of the
    folds are a random sample each, so the variance of the difference in hits is 16 / 15 times the
    sum of squares of the folds' deviations. One hit is added to it, so that few images on which
    two architectures never differ do not make their difference certain.

    Args:
        folds: hits by fold, int64 [architectures, FOLDS].
        images: how many were scored.
        index: the one; its own error is 0.

    Returns:
        Infinite with fewer than ``FEWEST_IMAGES`` images.
    """
    if images < FEWEST_IMAGES:
        errors = np.full(len(folds), math.inf)
    else:
        more = folds - folds[index]
        deviations = more - np.outer(more.sum(axis=1) / images, fold_sizes(images))
        variance = FOLDS / (FOLDS - 1) * (deviations**2).sum(axis=1)
        errors = np.sqrt(variance + 1) / images
    errors[index] = 0.0
    return errors


def fold_text(folds: Sequence[int]) -> str:
    """Hits by fold as ``estimates.json`` holds them: on one line, where a list would take 16."""
    return " ".join(map(str, folds))


def read_folds(text: object) -> list[int]:
    """The numbers that :func:`fold_text` wrote.

    Raises:
        ValueError: it wrote no such thing.
    """
    words = text.split(" ") if isinstance(text, str) else []
    # Of ASCII digits only, and few enough for an int64.
    if len(words) != FOLDS or not all(w.isascii() and w.isdigit() and len(w) < 19 for w in words):
        raise ValueError(f"folds are not {FOLDS} whole numbers")
    return [int(word) for word in words]


def read_estimates(path: str | Path) -> Estimates:
    """What stage 3 has written to ``estimates.json``.

    Raises:
        UserError: there is no such file, it is broken, or an earlier version wrote it.
    """
    content = read_json(path)
    try:
        return _estimates(content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} is not an estimates.json of this version ({reason}); give one that "
            "train_supernet.py has written"
        ) from None


def _estimates(content: Mapping) -> Estimates:
    images, entries = content["images"], content["architectures"]
    if type(images) is not int or not 0 < images < 2**53:
        raise ValueError("images is no number of images")
    if not isinstance(entries, dict) or not entries:
        raise ValueError("there are no architectures")
    folds = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not set(entry) >= KEYS or type(entry["arch"]) is not str:
            raise ValueError(f"architecture {name!r} is not of the form {sorted(KEYS)}")
        folds.append(read_folds(entry["folds"]))
    hits = np.array(folds)
    accuracy = hits.sum(axis=1) / images
    if (hits > fold_sizes(images)).any():
        raise ValueError("a fold has more hits than images")
    if any(entry["acc"] != value for entry, value in zip(entries.values(), accuracy, strict=True)):
        raise ValueError("folds do not add up to the accuracies")
    codes = tuple(entry["arch"] for entry in entries.values())
    return Estimates(tuple(entries), codes, accuracy, images, hits, _agreement(content))


def _agreement(content: Mapping) -> Agreement | None:
    ends = [content["agreement"][name] for name in ("tau", "low", "high")]
    if ends == [None] * 3:
        return None
    if not all(type(end) in (int, float) and -1 <= end <= 1 for end in ends):
        raise ValueError("agreement is not from -1 to 1")
    return Agreement(*map(float, ends))
