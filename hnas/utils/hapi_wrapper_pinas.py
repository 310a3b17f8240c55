"""Stage one's step on ``paddle.Model``'s conventions."""

from __future__ import annotations

from collections.abc import Sequence

import paddle

from hnas.dataset.transforms import normalize
from hnas.models.pinasv2 import Pass, PiNASv2, ShuffledView, cross_path_passes
from hnas.parallel.distributed import gather, world_size
from hnas.utils.hapi_wrapper import ResumableModel
from hnas.utils.SampleMethod import Sampler


class ContrastiveModel(ResumableModel):
    """Stage one: pull two views of an image together, push other images away.

    Args:
        network: query and key encoder and the queue.
        sampler: chooses the two sub-networks of a step, path A and path B.
        exchange_views: exchange the views in the second pass, as the paths are.
        shuffle: shuffle the key encoder's images over ranks; needed where it normalises by the
            batch, see :class:`ShuffledView`.
        seed: of the shuffling.
    """

    def __init__(
        self,
        network: PiNASv2,
        sampler: Sampler,
        exchange_views: bool = False,
        shuffle: bool = False,
        seed: int = 0,
    ):
        views = [
            paddle.static.InputSpec([None, 3, None, None], "uint8", f"view_{name}") for name in "ab"
        ]
        super().__init__(network, views)
        self.sampler = sampler
        self.exchange_views = exchange_views
        self.shuffle = shuffle
        self.seed = seed

    def passes(self) -> tuple[Pass, Pass]:
        """The step's two passes."""
        path_a, path_b = self.sampler.sample(self.epoch, self.step)
        return cross_path_passes(path_a, path_b, self.exchange_views)

    def train_batch(self, inputs) -> dict:
        """One step: keys of both passes, queries against them, one optimizer step, new negatives.

        Keys need no gradient and the queue stays as it is within a step, so all keys can be
        computed before the first query. The gradients of both passes add up.
        """
        self.network.train()
        passes, parts = self.passes(), self.gradients.parts(*inputs[:2])
        keys = []
        for one in passes:
            self.network.update_key_encoder()
            keys.append([self.embed_keys(views, one, part) for part, views in enumerate(parts)])
        loss, hits = 0.0, 0.0
        for part, views in enumerate(parts):
            with self.gradients.autocast():
                queries = self.embed_queries(views, passes)
            found = [
                self.network.contrast(query, own[part][0])
                for query, own in zip(queries, keys, strict=True)
            ]
            self.gradients.backward(sum(one_loss for one_loss, _ in found))
            loss += sum(one_loss.detach() for one_loss, _ in found)
            hits += sum(one_hits for _, one_hits in found)
        self.exchange_gradients()
        self.gradients.step()
        (first, second) = (paddle.concat([every for _, every in own]) for own in keys)
        self.network.enqueue((first + second) / 2)
        share = len(passes) * len(parts)
        code = passes[0].query_path.code
        return {
            "loss": loss / share,
            "top1": hits / share,
            "arch": code,
            "parts": [(code, loss / share)],
        }

    def embed_queries(self, views, passes: Sequence[Pass]) -> list[paddle.Tensor]:
        """Queries [N, D] of each pass, of the views uint8 [N, 3, H, W].

        Passes that query with the same path and view, as they do when both paths are the largest
        network and the views are not exchanged, share one computation and its gradient. Not
        without frozen statistics, which each pass would move.
        """
        if not self.network.backbone.frozen:
            return [
                self.network.embed_queries(normalize(views[one.query_view]), one.query_path)
                for one in passes
            ]
        asked = [(one.query_view, one.query_path) for one in passes]
        found = {
            (view, path): self.network.embed_queries(normalize(views[view]), path)
            for view, path in dict.fromkeys(asked)
        }
        return [found[question] for question in asked]

    def embed_keys(self, views, one: Pass, part: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """A pass's keys of a part of the step: of this rank's images [N, D], and of all ranks'."""
        with self.gradients.autocast():
            if not self.shuffle or world_size() < 2:
                own = self.network.embed_keys(normalize(views[one.key_view]), one.key_path)
                return own, gather(own)
            draw = (self.seed, self.epoch, self.step, part)
            shuffled = ShuffledView(draw, views[one.key_view])
            keys = self.network.embed_keys(normalize(shuffled.images), one.key_path)
        keys = shuffled.restore(keys)
        return shuffled.own(keys), keys
