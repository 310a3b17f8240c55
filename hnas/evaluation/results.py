"""What an evaluation writes for its users. Without Paddle."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from hnas.architecture_file import submission
from hnas.base.files import replacing, write_json
from hnas.evaluation.counts import Counts
from hnas.ranking.agreement import Agreement, agreement_record, expected_agreement, fold_text
from hnas.search_space import Architecture

logger = logging.getLogger(__name__)

ESTIMATES_FILE = "estimates.json"


def warn_if_guessing(counts: Counts, classes: int, what: str) -> bool:
    """Warn where not even the best of some networks is better than guessing.

    Such scores look like any other: training broke without a loss that is not finite, or weights
    and images do not belong together. Few images that tell nothing are passed over.

    Args:
        counts: hits of the networks.
        classes: how many there are.
        what: the networks, for the message, such as "the largest sub-network".

    Returns:
        Whether it warned.
    """
    if not len(counts.top1):
        return False
    guessed = counts.images / classes
    # What guessing passes about once in a thousand times: three standard deviations.
    limit = guessed + 3 * math.sqrt(guessed * (1 - 1 / classes))
    best = int(counts.top1.max())
    told = best <= limit < counts.images
    if told:
        logger.warning(
            "%s is right about %d of %d images, no more than guessing among %d classes: training "
            "broke (lower --lr), or weights, class names and images do not belong together",
            what,
            best,
            counts.images,
            classes,
        )
    return told


def estimates(
    archs: Mapping[str, Architecture], counts: Counts, agreement: Agreement | None, of_images: int
) -> dict:
    """What ``estimates.json`` holds, which :func:`hnas.ranking.agreement.read_estimates` reads.

    Args:
        archs: by name.
        counts: of their hits so far.
        agreement: of their ranking with that by all images.
        of_images: how many these are.
    """
    accuracy, error = counts.accuracy().tolist(), counts.standard_error().tolist()
    rows = zip(archs.items(), accuracy, error, counts.folds.tolist(), strict=True)
    return {
        "images": counts.images,
        "agreement": agreement_record(agreement, of_images),
        "architectures": {
            name: {"acc": acc, "se": round(se, 6), "arch": arch.code, "folds": fold_text(folds)}
            for (name, arch), acc, se, folds in rows
        },
    }


def complete_estimates(archs: Mapping[str, Architecture], counts: Counts) -> dict:
    """What ``estimates.json`` holds after all images."""
    agreement = expected_agreement(counts.folds, counts.images, counts.images)
    return estimates(archs, counts, agreement, counts.images)


def write_results(folder: Path, archs: Mapping[str, Architecture], counts: Counts) -> None:
    """Write what was found, and log how many hits hang on nearly equal logits.

    ``submission.json`` holds top-1 accuracies in the organisers' form, ``submission_top5.json``
    top-5 ones; ``channel_sample.txt`` has a line ``CODE top1 top5`` for each architecture, which
    the helpers of public code read.
    """
    top1, top5 = counts.accuracy().tolist(), counts.top5_accuracy().tolist()
    write_json(folder / "submission_top5.json", submission(archs, top5))
    with replacing(folder / "channel_sample.txt") as temporary:
        rows = zip(archs.values(), top1, top5, strict=True)
        temporary.write_text("".join(f"{arch.code} {one} {five}\n" for arch, one, five in rows))
    write_json(folder / "submission.json", submission(archs, top1))
    logger.info(
        "%d top-1 and %d top-5 hits of %d hang on logits closer than 1e-4",
        counts.near1.sum(),
        counts.near5.sum(),
        len(archs) * counts.images,
    )
    logger.info(
        "scored %d architectures on %d images: %s",
        len(archs),
        counts.images,
        folder / "submission.json",
    )
