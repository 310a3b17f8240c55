"""Stage one's step on ``paddle.Model``'s conventions."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.dataset.transforms import normalize
from hnas.models.pinasv2 import PiNASv2, ShuffledViews
from hnas.parallel.distributed import world_size
from hnas.search_space import Architecture
from hnas.utils.hapi_wrapper import SupernetModel
from hnas.utils.SampleMethod import Sampler


class ContrastiveModel(SupernetModel):
    """Stage one: pull two views of an image together, push other images away.

    Args:
        network: query and key encoder and the queue.
        sampler: chooses the sub-networks of the two paths.
        pairs: pairs of paths a step. One is enough if the sampler always gives the largest
            network.
        seed: of the shuffling over ranks.
    """

    def __init__(self, network: PiNASv2, sampler: Sampler, pairs: int = 1, seed: int = 0):
        views = [
            paddle.static.InputSpec([None, 3, None, None], "uint8", f"view_{name}") for name in "ab"
        ]
        super().__init__(network, views)
        self.sampler = sampler
        self.pairs = pairs
        self.seed = seed

    def paths(self) -> list[tuple[Architecture, Architecture]]:
        """The step's pairs of sub-networks (path A, path B)."""
        draws = [self.sampler.sample(self.epoch, self.step, i) for i in range(2 * self.pairs)]
        return list(zip(draws[::2], draws[1::2], strict=True))

    def shuffled_views(self, views, part: int) -> ShuffledViews:
        """Images of a part of the step for the key encoder, shuffled over ranks and normalised."""
        shuffled = ShuffledViews((self.seed, self.epoch, self.step, part), *views)
        shuffled.views = [normalize(view) for view in shuffled.views]
        return shuffled

    def train_batch(self, inputs, labels=None, update=True) -> dict:
        """One step: update the key encoder, contrast both passes, step, enqueue the keys."""
        self.network.train()
        self.network.update_key_encoder()
        paths = self.paths()
        losses, hits, keys = [0.0] * len(paths), 0.0, []
        for number, views in enumerate(self.update.parts(*inputs[:2])):
            shuffled = self.shuffled_views(views, number) if world_size() > 1 else None
            views = [normalize(view) for view in views]
            found = 0.0
            for index, pair in enumerate(paths):
                with self.update.autocast():
                    output = self.network(*views, *pair, shuffled)
                self.update.backward(output.loss / self.pairs)
                losses[index] += output.loss.detach() / self.update.accumulate
                hits += output.accuracy / self.pairs / self.update.accumulate
                found += output.keys
            keys.append(found)
        self.exchange_gradients()
        self.update.step()
        self.network.enqueue(F.normalize(paddle.concat(keys), axis=1))
        codes = [path_a.code for path_a, _ in paths]
        return {
            "loss": sum(losses) / self.pairs,
            "top1": hits,
            "arch": codes[-1],
            "parts": list(zip(codes, losses, strict=True)),
        }
