"""Two networks that ought to be the same, on the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import paddle
from tqdm import tqdm

from hnas.dataset.transforms import normalize
from hnas.evaluation.counts import Counts, LogitsError, count_hits

Logits = Callable[[paddle.Tensor], paddle.Tensor]
"""From normalised images [N, 3, S, S] to logits [N, classes], both float32."""


@dataclass
class Comparison:
    """The same images by the source and by what was exported.

    Attributes:
        counts: of the source (0) and of the exported network (1).
        difference: largest one between their logits.
        largest: largest logit of the source, without its sign.
    """

    counts: Counts
    difference: float = 0.0
    largest: float = 0.0


@paddle.no_grad()
def compare(source: Logits, exported: Logits, loader) -> Comparison:
    """Run both on all images of ``loader``.

    Raises:
        LogitsError: a logit is NaN or infinite.
    """
    found = Comparison(Counts.zeros(2))
    for images, labels in tqdm(loader, desc="checking", unit="batch", mininterval=1):
        x = normalize(images)
        logits = paddle.stack([source(x), exported(x)])
        hits = count_hits(logits, labels)
        for who, number in zip(("the source", "the exported network"), hits.bad, strict=True):
            if number:
                raise LogitsError(who, number, len(labels))
        found.counts.add(hits.counts(len(labels)))
        found.difference = max(found.difference, float((logits[0] - logits[1]).abs().max()))
        found.largest = max(found.largest, float(logits[0].abs().max()))
    return found
