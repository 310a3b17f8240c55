"""Stage one's step on ``paddle.Model``'s conventions."""

from __future__ import annotations

import paddle
from paddle.nn import functional as F  # noqa: N812

from hnas.dataset.transforms import normalize
from hnas.models.pinasv2 import PiNASv2, ShuffledViews
from hnas.parallel.distributed import world_size
from hnas.search_space import Architecture
from hnas.utils.hapi_wrapper import ResumableModel
from hnas.utils.SampleMethod import Sampler


class ContrastiveModel(ResumableModel):
    """Stage one: pull two views of an image together, push other images away.

    Args:
        network: query and key encoder and the queue.
        sampler: chooses the sub-networks of a step's two paths, its draws 0 and 1.
        seed: of the shuffling over ranks.
    """

    def __init__(self, network: PiNASv2, sampler: Sampler, seed: int = 0):
        views = [
            paddle.static.InputSpec([None, 3, None, None], "uint8", f"view_{name}") for name in "ab"
        ]
        super().__init__(network, views)
        self.sampler = sampler
        self.seed = seed

    def paths(self) -> tuple[Architecture, Architecture]:
        """The step's sub-networks: path A and path B."""
        sample = self.sampler.sample
        return sample(self.epoch, self.step, 0), sample(self.epoch, self.step, 1)

    def shuffled_views(self, views, part: int) -> ShuffledViews:
        """Images of a part of the step for the key encoder, shuffled over ranks and normalised."""
        shuffled = ShuffledViews((self.seed, self.epoch, self.step, part), *views)
        shuffled.views = [normalize(view) for view in shuffled.views]
        return shuffled

    def train_batch(self, inputs) -> dict:
        """One step: update the key encoder, contrast both passes, step, enqueue the keys."""
        self.network.train()
        self.network.update_key_encoder()
        path_a, path_b = self.paths()
        loss, hits, keys = 0.0, 0.0, []
        for number, views in enumerate(self.gradients.parts(*inputs[:2])):
            shuffled = self.shuffled_views(views, number) if world_size() > 1 else None
            views = [normalize(view) for view in views]
            with self.gradients.autocast():
                output = self.network(*views, path_a, path_b, shuffled)
            self.gradients.backward(output.loss)
            loss += output.loss.detach() / self.gradients.accumulate
            hits += output.accuracy / self.gradients.accumulate
            keys.append(output.keys)
        self.exchange_gradients()
        self.gradients.step()
        self.network.enqueue(F.normalize(paddle.concat(keys), axis=1))
        code = path_a.code
        return {"loss": loss, "top1": hits, "arch": code, "parts": [(code, loss)]}
