"""Stage one's step on ``paddle.Model``'s conventions."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.dataset.transforms import normalize
from hnas.models.pinasv2 import PiNASv2
from hnas.search_space import Architecture
from hnas.utils.distributed import ShuffledViews, ranks
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

    def shuffled_views(self, views) -> ShuffledViews:
        """The step's images for the key encoder, shuffled over ranks and normalised."""
        shuffled = ShuffledViews((self.seed, self.epoch, self.step), *views[:2])
        shuffled.views = [normalize(view) for view in shuffled.views]
        return shuffled

    def train_batch(self, inputs, labels=None, update=True) -> dict:
        """One step: update the key encoder, contrast both passes, step, enqueue the keys."""
        view_a, view_b = (normalize(view) for view in inputs[:2])
        self.network.train()
        self.network.update_key_encoder()
        shuffled = self.shuffled_views(inputs) if ranks() > 1 else None
        parts, hits, keys = [], 0.0, 0.0
        for path_a, path_b in self.paths():
            output = self.network(view_a, view_b, path_a, path_b, shuffled)
            (output.loss / self.pairs).backward()
            parts.append((path_a.code, output.loss.detach()))
            hits = hits + output.accuracy / self.pairs
            keys = keys + output.keys
        self.exchange_gradients()
        self._optimizer.step()
        # Not to zero, for the same reason as in stage two.
        self._optimizer.clear_grad(set_to_zero=False)
        self.network.enqueue(F.normalize(keys, axis=1))
        loss = sum(loss for _, loss in parts) / self.pairs
        return {"loss": loss, "top1": hits, "arch": path_a.code, "parts": parts}
