"""Stage one's step: two passes of contrast with exchanged paths."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import paddle

from hnas.dataset.transforms import normalize
from hnas.models.pinasv2 import PiNASv2
from hnas.parallel.distributed import gather
from hnas.search_space import Architecture
from hnas.utils.hapi_wrapper import ResumableModel
from hnas.utils.SampleMethod import Sampler

logger = logging.getLogger(__name__)


class ContrastiveModel(ResumableModel):
    """Stage one: pull two views of an image together, push other images away.

    Batches hold the queries' view of each image, then the keys'. The sampler chooses two
    sub-networks a step, path A and path B.
    """

    def __init__(self, network: PiNASv2, sampler: Sampler):
        super().__init__(network)
        self.sampler = sampler
        # The queue starts with random keys, which are easily told from images'.
        self.guess_loss = math.log(network.queue.shape[1] + 1)

    def train_batch(self, inputs) -> dict:
        """One step: keys of both passes, queries against them, one optimizer step, new negatives.

        Of Pi-NAS's two passes the first has A's queries look for B's keys, the second B's for A's.
        Keys need no gradient and the queue stays as it is within a step, so all keys can be
        computed before the first query. The gradients of both passes add up.
        """
        self.network.train()
        paths = self.sampler.sample(self.epoch, self.step)
        parts = self.gradients.parts(*inputs[:2])
        keys = []
        for path in reversed(paths):
            self.network.update_key_encoder()
            keys.append([self.embed_keys(view, path) for _, view in parts])
        loss, hits = 0.0, 0.0
        for part, (view, _) in enumerate(parts):
            with self.gradients.autocast():
                queries = self.embed_queries(view, paths)
            found = [
                self.network.contrast(query, own[part][0])
                for query, own in zip(queries, keys, strict=True)
            ]
            self.gradients.backward(sum(one_loss for one_loss, _ in found))
            loss += sum(one_loss.detach() for one_loss, _ in found)
            hits += sum(one_hits for _, one_hits in found)
        norm = self.update()
        (first, second) = (paddle.concat([every for _, every in own]) for own in keys)
        self.network.enqueue((first + second) / 2)
        share, code = len(paths) * len(parts), paths[0].code
        logs = {"loss": loss / share, "top1": hits / share, "norm": norm, "arch": code}
        return {**logs, "parts": [(code, logs["loss"])]}

    def embed_queries(self, view, paths: Sequence[Architecture]) -> list[paddle.Tensor]:
        """Each pass's queries [N, D] of the view uint8 [N, 3, H, W].

        Where both paths are the same, as the largest network is by default, the passes share one
        computation and its gradient. Not without frozen statistics, which each pass would move.
        """
        if not self.network.backbone.frozen:
            return [self.network.embed_queries(normalize(view), path) for path in paths]
        found = {
            path: self.network.embed_queries(normalize(view), path) for path in dict.fromkeys(paths)
        }
        return [found[path] for path in paths]

    def embed_keys(self, view, path: Architecture) -> tuple[paddle.Tensor, paddle.Tensor]:
        """A pass's keys of a part of the step: of this rank's images [N, D], and of all ranks'."""
        with self.gradients.autocast():
            own = self.network.embed_keys(normalize(view), path)
        return own, gather(own)


def scaled_key_momentum(total_batch: int) -> float:
    """The key encoder's momentum that forgets as fast, by images, as 0.999 at batches of 256.

    A power of it, as Busbridge et al. derive (How to Scale Your EMA, NeurIPS 2023,
    https://arxiv.org/abs/2307.13813).
    """
    momentum = 0.999 ** (total_batch / 256)
    logger.info("key_momentum %.6f: 0.999 ** (%d / 256) by the batch", momentum, total_batch)
    return momentum
