"""Training a supernet on ``paddle.Model``'s conventions: the loop, and stage two's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import paddle
from paddle import nn
from paddle.callbacks import LRScheduler
from paddle.hapi.callbacks import CallbackList
from paddle.nn import functional as F  # noqa: N812

from hnas.dataset.loader import EpochLoader
from hnas.dataset.transforms import normalize
from hnas.evaluation.calibration import calibrated
from hnas.search_space import Architecture
from hnas.utils.distributed import GradientExchange, seen_alone
from hnas.utils.errors import UserError
from hnas.utils.SampleMethod import Sampler


class SupernetModel(paddle.Model):
    """A ``paddle.Model`` whose training can start at any step and sees (epoch, step).

    Sub-classes give ``train_batch(inputs) -> logs``, one optimizer step on a batch: the scalar
    tensors ``loss`` and ``top1``, which are read only when a line is logged, ``parts``, the code
    and loss of each sub-network, and ``arch``, the last one's code. Batches hold uint8 images
    [N, 3, H, W].
    """

    epoch = 0
    step = 0
    exchange: GradientExchange | None = None
    """With other ranks; None: there are none."""

    def __init__(self, *arguments):
        with seen_alone():
            super().__init__(*arguments)

    def prepare(self, *arguments, **more):
        with seen_alone():
            super().prepare(*arguments, **more)

    def exchange_gradients(self) -> None:
        """Average the step's gradients over ranks; between the backward passes and the step."""
        if self.exchange is not None:
            self.exchange.run()

    def fit(
        self,
        loader: EpochLoader,
        epochs: int,
        callbacks: Sequence = (),
        start: tuple[int, int] = (0, 0),
    ):
        """Train from the (epoch, step) of ``start`` to ``epochs``, one learning rate step a batch.

        The learning rate is already the next step's when the callbacks see a batch's end, so a
        checkpoint that one of them writes goes on as if nothing had been written.
        """
        callbacks = CallbackList([LRScheduler(by_step=True), *callbacks])
        callbacks.set_model(self)
        callbacks.set_params(
            {"epochs": epochs, "steps": len(loader), "batch_size": loader.total_batch}
        )
        callbacks.on_begin("train")
        logs = {}
        for epoch in range(start[0], epochs):
            first = start[1] if epoch == start[0] else 0
            callbacks.on_epoch_begin(epoch)
            with closing(loader.epoch(epoch, first)) as batches:
                for step, batch in enumerate(batches, first):
                    callbacks.on_batch_begin("train", step, logs)
                    self.epoch, self.step = epoch, step
                    lr = self._optimizer.get_lr()
                    logs = {**self.train_batch(batch), "lr": lr}
                    callbacks.on_batch_end("train", step, logs)
            callbacks.on_epoch_end(epoch, logs)
        callbacks.on_end("train", logs)

    def eval_batch(self, inputs, labels=None):
        """As in ``paddle.Model``, on uint8 images."""
        return super().eval_batch([normalize(images) for images in _as_list(inputs)], labels)

    def evaluate_architecture(
        self, loader, arch: Architecture, calibration: paddle.Tensor | None = None
    ) -> dict[str, float]:
        """Metrics of one sub-network over ``loader``.

        ``calibration`` holds uint8 images [N, 3, H, W] to re-calibrate its BatchNorm with; None
        evaluates at the running statistics.
        """
        self.network.activate(arch)
        with calibrated(self.network, None if calibration is None else normalize(calibration)):
            return self.evaluate(loader, verbose=0)


def _as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


class DistillationModel(SupernetModel):
    """Stage two: several sub-networks a step, taught by labels and a frozen teacher.

    Args:
        network: the student, a supernet.
        teacher: called with float images [N, 3, H, W], gives logits [N, classes]; run in eval
            mode and without gradient. None: labels only.
        sampler: chooses the sub-networks.
        subnetworks: how many a step.
        loss_weight: weights of the losses of a step's sub-networks, from the list of them.
    """

    def __init__(
        self,
        network: nn.Layer,
        teacher: nn.Layer | None,
        sampler: Sampler,
        subnetworks: int,
        loss_weight: Callable[[list[Architecture]], np.ndarray] | None = None,
    ):
        spec = [paddle.static.InputSpec([None, 3, None, None], "uint8", "image")]
        label = [paddle.static.InputSpec([None], "int64", "label")]
        super().__init__(network, spec, label)
        self.teacher = teacher
        self.sampler = sampler
        self.subnetworks = subnetworks
        self.loss_weight = loss_weight or (lambda archs: np.ones(len(archs)))
        if teacher is not None:
            teacher.eval()

    def train_batch(self, inputs, labels=None, update=True) -> dict:
        """One step. The gradients of the sub-networks add up, as in Once-for-all's training."""
        images, labels = inputs
        images = normalize(images)
        self.network.train()
        with paddle.no_grad():
            targets = None if self.teacher is None else F.softmax(self.teacher(images))
        archs = [self.sampler.sample(self.epoch, self.step, i) for i in range(self.subnetworks)]
        parts = []
        for arch, weight in zip(archs, self.loss_weight(archs), strict=True):
            self.network.activate(arch)
            logits = self.network(images)
            loss = float(weight) * distillation_loss(logits, labels, targets)
            loss.backward()
            parts.append((arch.code, loss.detach()))
        self.exchange_gradients()
        self._optimizer.step()
        # Not to zero: a block that no sub-network of a step ran must be left alone whether or not
        # an earlier step ran it, or a resumed run would differ.
        self._optimizer.clear_grad(set_to_zero=False)
        hits = (logits.argmax(axis=1) == labels).astype("float32").mean()
        loss = sum(loss for _, loss in parts) / len(parts)
        return {"loss": loss, "top1": hits, "arch": archs[-1].code, "parts": parts}


def distillation_loss(logits, labels, targets) -> paddle.Tensor:
    """Cross-entropy with labels [N] plus, if given, with the teacher's probabilities [N, C]."""
    loss = F.cross_entropy(logits, labels)
    if targets is None:
        return loss
    return loss + F.cross_entropy(logits, targets, soft_label=True)


def macs_weights(space, image_size: int) -> Callable[[list[Architecture]], np.ndarray]:
    """``use_loss_expand``: each sub-network's MACs over the mean MACs of the step's."""

    def weights(archs):
        macs = np.array([space.macs(arch, image_size) for arch in archs], dtype=np.float64)
        return macs / macs.mean()

    return weights


def learning_rate(
    base: float, total_batch: int, warmup_steps: int, total_steps: int
) -> paddle.optimizer.lr.LRScheduler:
    """Base times batch / 256; linear warm-up from one step's share, then cosine to zero."""
    if total_steps < 1:
        raise UserError("training has no steps; raise max_epoch or lower batch_size")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        decay = max(1, total_steps - warmup_steps)
        return 0.5 * (1 + np.cos(np.pi * min(1.0, (step - warmup_steps) / decay)))

    return paddle.optimizer.lr.LambdaDecay(base * total_batch / 256, factor)


def momentum_optimizer(network: nn.Layer, schedule, momentum: float, weight_decay: float):
    """Momentum SGD on the parameters that train."""
    return paddle.optimizer.Momentum(
        schedule,
        momentum,
        parameters=[p for p in network.parameters() if not p.stop_gradient],
        weight_decay=paddle.regularizer.L2Decay(weight_decay),
    )
