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

from hnas.base.errors import UserError
from hnas.dataset.loader import EpochLoader
from hnas.dataset.transforms import normalize
from hnas.evaluation.calibration import calibrated
from hnas.parallel.distributed import GradientExchange, seen_alone
from hnas.search_space import Architecture
from hnas.utils.gradient_step import Update
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
    update: Update | None = None
    exchange: GradientExchange | None = None
    """With other ranks; None: there are none."""

    def __init__(self, *arguments):
        with seen_alone():
            super().__init__(*arguments)

    def prepare(self, optimizer=None, *arguments, update: Update | None = None, **more):
        """As in ``paddle.Model``; ``update`` says how to step if not plainly."""
        with seen_alone():
            super().prepare(optimizer, *arguments, **more)
        self.update = update or Update(optimizer)

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
        temperature: T of the soft targets: both sides are softened by it, and the loss grows by
            T squared, so that gradients keep their size (Hinton et al., 2015).
    """

    def __init__(
        self,
        network: nn.Layer,
        teacher: nn.Layer | None,
        sampler: Sampler,
        subnetworks: int,
        loss_weight: Callable[[list[Architecture]], np.ndarray] | None = None,
        temperature: float = 1.0,
    ):
        spec = [paddle.static.InputSpec([None, 3, None, None], "uint8", "image")]
        label = [paddle.static.InputSpec([None], "int64", "label")]
        super().__init__(network, spec, label)
        self.teacher = teacher
        self.sampler = sampler
        self.subnetworks = subnetworks
        self.loss_weight = loss_weight or (lambda archs: np.ones(len(archs)))
        self.temperature = temperature
        if teacher is not None:
            teacher.eval()

    def train_batch(self, inputs, labels=None, update=True) -> dict:
        """One step. The gradients of the sub-networks add up, as in Once-for-all's training."""
        images, labels = inputs
        self.network.train()
        archs = [self.sampler.sample(self.epoch, self.step, i) for i in range(self.subnetworks)]
        weights = self.loss_weight(archs)
        losses, hits = [0.0] * len(archs), 0.0
        for part, answers in self.update.parts(normalize(images), labels):
            targets = self.teach(part)
            for index, (arch, weight) in enumerate(zip(archs, weights, strict=True)):
                self.network.activate(arch)
                with self.update.autocast():
                    logits = self.network(part)
                    loss = float(weight) * distillation_loss(
                        logits, answers, targets, self.temperature
                    )
                targets = self.next_targets(targets, logits)
                self.update.backward(loss)
                losses[index] += loss.detach() / self.update.accumulate
            hits += (logits.argmax(axis=1) == answers).astype("float32").sum()
        self.exchange_gradients()
        self.update.step()
        codes = [arch.code for arch in archs]
        return {
            "loss": sum(losses) / len(losses),
            "top1": hits / labels.shape[0],
            "arch": codes[-1],
            "parts": list(zip(codes, losses, strict=True)),
        }

    @paddle.no_grad()
    def teach(self, images) -> paddle.Tensor | None:
        """The teacher's probabilities [N, C], if there is one: once for all sub-networks."""
        if self.teacher is None:
            return None
        with self.update.autocast():
            return F.softmax(self.teacher(images) / self.temperature)

    def next_targets(self, targets, logits) -> paddle.Tensor | None:
        """What teaches a step's next sub-network; ``logits`` [N, C] are the last one's."""
        return targets


def distillation_loss(logits, labels, targets, temperature: float = 1.0) -> paddle.Tensor:
    """Cross-entropy with labels [N] plus, if given, with the teacher's probabilities [N, C]."""
    loss = F.cross_entropy(logits, labels)
    if targets is None:
        return loss
    soft = F.cross_entropy(logits / temperature, targets, soft_label=True)
    return loss + temperature**2 * soft


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


def momentum_optimizer(
    network: nn.Layer, schedule, momentum: float, weight_decay: float, clip_norm: float = 0.0
):
    """Momentum SGD on the parameters that train.

    ``clip_norm`` is the largest norm of all gradients together; 0: any.
    """
    return paddle.optimizer.Momentum(
        schedule,
        momentum,
        parameters=[p for p in network.parameters() if not p.stop_gradient],
        weight_decay=paddle.regularizer.L2Decay(weight_decay),
        grad_clip=nn.ClipGradByGlobalNorm(clip_norm) if clip_norm else None,
    )
