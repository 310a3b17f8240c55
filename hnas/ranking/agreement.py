"""How well a ranking by the first images agrees with the ranking by all images of the list.

What is estimated is tau-b between the accuracies over the first n images and those over all N
images of the list, of these architectures; docs/scoring.md tells what that is good for.

Hits are counted in 16 folds, by an image's position in the list modulo 16. The list's order is
drawn, so the folds are random samples, and so is what will follow. There are 15 ways of halving the
folds such that any two have half of each half in common: the rows of a Hadamard matrix (balanced
half-samples, McCarthy 1969). The differences between the halves are uncorrelated from way to way,
and with the images to come, so each is a draw of what the choice of images does to this ranking.
Each is corrected for length:

1. tau of the rankings by the two halves gives the correlation of their accuracies,
   r = sin(pi / 2 tau), as for bivariate normal scores.
2. An error model, accuracy over m images = true accuracy + error with variance v / m, gives the
   ratio x = v / (variance of the true accuracies) from r^2 = 1 / ((1 + x / m1) (1 + x / m2)). (With
   m1 = m2, n images would correlate with n others by Spearman's and Brown's 2 r / (1 + r).)
3. The first n images are among the N, so the correlation of both accuracies is
   sqrt((1 + x / N) / (1 + x / n)): 1 at the end, and sqrt(n / N) where images see no difference.
4. Back to tau = 2 / pi asin(correlation).
5. Of the pairs that differ in some fold a share is equal over the first n images, which tau-b
   leaves out: tau-b = tau / sqrt(1 - share).

The tau of step 1 is tau-a over the pairs that differ in some fold: a pair that is equal in a half
agrees and disagrees to equal parts. Where equal pairs are many, the estimate is a little small.

The estimate is the mean over the 15 ways. The interval is for a further draw, which is what the
images to come are: mean +- t sqrt(s^2 (2 + 1 / 15) + (2 / pairs)^2) with the ways' variance s^2 and
Student's t (0.975, 14 degrees of freedom). A draw has up to twice that variance: two halves
disagree about a pair when either is on the wrong side, the list only when the first images are, so
that half as many disagreements scatter more. The last term is one pair, for few architectures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
from scipy.linalg import hadamard

from hnas.base.errors import UserError
from hnas.base.files import read_json
from hnas.ranking.correlations import kendall_tau_b
from hnas.ranking.costs import Network
from hnas.search_space import Architecture

FOLDS = 16
"""Folds of the images; a power of two."""
FEWEST_IMAGES = 2 * FOLDS
"""With fewer, nothing is said."""
STUDENT = 2.1448
"""Student's t, two-sided 95 %, 14 degrees of freedom."""


@dataclass(frozen=True)
class Agreement:
    """Expected tau-b with the ranking by all images, and the ends of its 95 % interval."""

    tau: float
    low: float
    high: float


def fold_sizes(images: int) -> np.ndarray:
    """How many of the first ``images`` images are in each fold; int64 [FOLDS]."""
    return (images + FOLDS - 1 - np.arange(FOLDS)) // FOLDS


def expected_agreement(folds: np.ndarray, images: int, of_images: int) -> Agreement | None:
    """Expected tau-b of the ranking by the first images with that by all images.

    Args:
        folds: hits by fold, int64 [architectures, FOLDS].
        images: how many images have been seen.
        of_images: how many the list has.

    Returns:
        None where it is not defined: with fewer than ``FEWEST_IMAGES`` images, or where all
        accuracies are equal.
    """
    if images == of_images:
        return Agreement(1.0, 1.0, 1.0)
    if images < FEWEST_IMAGES:
        return None
    pairs, unequal = different_pairs(folds), different_pairs(folds.sum(axis=1))
    if not unequal:
        return None
    sizes = fold_sizes(images)
    taus = np.empty(FOLDS - 1)
    for way, first in enumerate(hadamard(FOLDS)[1:] < 0):  # the folds of one half
        excess = excess_pairs(folds[:, first].sum(axis=1), folds[:, ~first].sum(axis=1))
        halves = int(sizes[first].sum()), int(sizes[~first].sum())
        taus[way] = corrected_for_length(excess / pairs, halves, images, of_images)
    taus = np.minimum(1.0, taus * math.sqrt(pairs / unequal))
    tau, variance = taus.mean(), taus.var(ddof=1)
    width = STUDENT * math.sqrt(variance * (2 + 1 / len(taus)) + (2 / pairs) ** 2)
    return Agreement(float(tau), max(-1.0, float(tau - width)), min(1.0, float(tau + width)))


def different_pairs(rows: np.ndarray) -> int:
    """How many pairs of rows of an array are not the same."""
    _, same = np.unique(rows, axis=0, return_counts=True)
    return (len(rows) * (len(rows) - 1) - int((same * (same - 1)).sum())) // 2


def excess_pairs(one: np.ndarray, other: np.ndarray) -> int:
    """Concordant less discordant pairs of two lists [n]."""
    # Without rounding errors: the numerator of tau-b is whole.
    scale = math.sqrt(different_pairs(one) * different_pairs(other))
    return round(kendall_tau_b(one, other) * scale) if scale else 0


def corrected_for_length(tau: float, halves: tuple[int, int], images: int, of_images: int) -> float:
    """tau-b of ``images`` images with the ``of_images`` that they are among.

    ``tau`` is that of the rankings by two halves of the former, of so many images.
    """
    correlation = max(math.sin(math.pi / 2 * tau), 1e-6)
    one, other = halves
    # The positive root of (1 + x / one) (1 + x / other) = 1 / correlation^2.
    square, linear = 1 / (one * other), 1 / one + 1 / other
    excess = 1 / correlation**2 - 1
    ratio = 2 * excess / (linear + math.sqrt(linear**2 + 4 * square * excess))
    shared = math.sqrt((1 + ratio / of_images) / (1 + ratio / images))
    return 2 / math.pi * math.asin(min(1.0, shared))


def agreement_record(agreement: Agreement | None, of_images: int) -> dict:
    """What ``estimates.json`` holds of it; null where it is not defined."""
    if agreement is None:
        return {"images": of_images, "tau": None, "low": None, "high": None}
    return {"images": of_images, **{end: round(v, 6) for end, v in asdict(agreement).items()}}


@dataclass(frozen=True)
class Estimates:
    """What an evaluation knows after its first images, in the file's order."""

    codes: tuple[str, ...]
    accuracy: np.ndarray  # top-1, 0 to 1; float64 [architectures]
    error: np.ndarray  # standard errors of these
    images: int  # how many were scored
    folds: np.ndarray  # top-1 hits by fold; int64 [architectures, FOLDS]
    agreement: Agreement | None  # with the ranking by all images; None where it is not defined
    of_images: int  # how many these are
    network: Network | None = None  # what was scored; None where an earlier version wrote it


def read_folds(text: str) -> list[int]:
    """The hits by fold that an entry of ``estimates.json`` has.

    Raises:
        ValueError: it wrote no such thing.
    """
    # Of ASCII digits only, and few enough for an int64.
    if not re.fullmatch(rf"[0-9]{{1,18}}( [0-9]{{1,18}}){{{FOLDS - 1}}}", text):
        raise ValueError(f"folds are not {FOLDS} whole numbers")
    return list(map(int, text.split()))


def read_estimates(path: str | Path) -> Estimates:
    """What stage 3 has written to ``estimates.json``.

    Raises:
        UserError: there is no such file, it is broken, or an earlier version wrote it.
    """
    content = read_json(path)
    try:
        return _estimates(content)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} is not an estimates.json of this version ({reason}); give one that "
            "train_supernet.py has written"
        ) from None


def _estimates(content: Mapping) -> Estimates:
    images, of_images = content["images"], content["agreement"]["images"]
    if not type(images) is type(of_images) is int or not 0 < images <= of_images < 2**53:
        raise ValueError("images is no number of images")
    entries = content["architectures"].values()
    if not entries:
        raise ValueError("there are no architectures")
    error, accuracy = (np.array([entry[name] for entry in entries]) for name in ("se", "acc"))
    if error.dtype.kind != "f" or not ((error >= 0) & (error <= 1)).all():
        raise ValueError("a standard error is not from 0 to 1")
    hits = np.array([read_folds(entry["folds"]) for entry in entries])
    if (hits > fold_sizes(images)).any():
        raise ValueError("a fold has more hits than images")
    if (accuracy != hits.sum(axis=1) / images).any():
        raise ValueError("folds do not add up to the accuracies")
    codes = tuple(str(entry["arch"]) for entry in entries)
    ends = [content["agreement"][name] for name in ("tau", "low", "high")]
    agreement = None
    if ends != [None] * 3:
        agreement = Agreement(*map(float, ends))
        if not all(-1 <= end <= 1 for end in astuple(agreement)):
            raise ValueError("agreement is not from -1 to 1")
    network = Network.read(content["network"]) if "network" in content else None
    return Estimates(codes, accuracy, error, images, hits, agreement, of_images, network)


def estimates_beside(
    path: str | Path, archs: Sequence[Architecture], accuracy: np.ndarray
) -> tuple[Estimates, list[int]]:
    """The ``estimates.json`` beside a file of scores, shares of 1 [n], and where they are in it.

    Raises:
        UserError: there is none, it cannot be used, or it is of other scores.
    """
    beside = Path(path).with_name("estimates.json")
    if not beside.is_file():
        raise UserError(
            f"there is no estimates.json beside {path}; take both from stage 3's save_dir"
        )
    found = read_estimates(beside)
    places = {code: place for place, code in enumerate(found.codes)}
    rows = [places.get(arch.code, -1) for arch in archs]
    # Of accuracies that were in percent the last digits may differ.
    if min(rows) < 0 or not np.allclose(found.accuracy[rows], accuracy, rtol=1e-12, atol=0):
        raise UserError(f"{beside} is of other scores; take both files from one save_dir")
    return found, rows
