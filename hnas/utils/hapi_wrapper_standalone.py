"""The step of a network that is trained alone, on ``paddle.Model``'s conventions."""

from __future__ import annotations

from paddle import nn
from paddle.nn import functional as F  # noqa: N812

from hnas.dataset.transforms import normalize
from hnas.utils.hapi_wrapper import SupernetModel


class StandaloneModel(SupernetModel):
    """One plain network, taught by labels; nothing to activate.

    Args:
        network: float images [N, 3, H, W] to logits [N, classes].
        code: of its architecture, for log lines.
    """

    def __init__(self, network: nn.Layer, code: str):
        super().__init__(network)
        self.code = code

    def train_batch(self, inputs, labels=None, update=True) -> dict:
        """One step of cross-entropy on uint8 images [N, 3, H, W] and labels [N]."""
        images, labels = inputs
        self.network.train()
        loss, hits = 0.0, 0.0
        for part, answers in self.update.parts(normalize(images), labels):
            with self.update.autocast():
                logits = self.network(part)
                part_loss = F.cross_entropy(logits, answers)
            self.update.backward(part_loss)
            loss += part_loss.detach() / self.update.accumulate
            hits += (logits.argmax(axis=1) == answers).astype("float32").sum()
        self.update.step()
        top1 = hits / labels.shape[0]
        return {"loss": loss, "top1": top1, "arch": self.code, "parts": [(self.code, loss)]}
