"""Training on ``paddle.Model``'s conventions: the loop, and the steps that labels teach.

Stage one's step is in ``hapi_wrapper_pinas.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import paddle
from paddle import nn
from paddle.hapi.callbacks import CallbackList
from paddle.nn import functional as F  # noqa: N812
from paddle.optimizer.lr import LRScheduler

from hnas.dataset.loader import EpochLoader
from hnas.dataset.transforms import normalize
from hnas.parallel.distributed import GradientExchange, seen_alone
from hnas.search_space import Architecture, SearchSpace
from hnas.utils.gradient_step import GradientStep
from hnas.utils.SampleMethod import Sampler, weighted_channels


class ResumableModel(paddle.Model):
    """A ``paddle.Model`` whose training can start at any step and sees (epoch, step).

    Sub-classes give ``train_batch(inputs) -> logs``, one optimizer step on a batch: the scalar
    tensors ``loss`` and ``top1``, which are read only when a line is logged, ``parts``, the code
    and loss of each sub-network, and ``arch``, the last one's code. Batches hold uint8 images
    [N, 3, H, W].
    """

    epoch = 0
    step = 0
    gradients: GradientStep | None = None
    exchange: GradientExchange | None = None
    """With other ranks; None: there are none."""

    def __init__(self, *arguments):
        with seen_alone():
            super().__init__(*arguments)

    def prepare(self, optimizer=None, gradients: GradientStep | None = None):
        """As in ``paddle.Model``; ``gradients`` says how to step if not plainly."""
        with seen_alone():
            super().prepare(optimizer)
        self.gradients = gradients or GradientStep(optimizer)

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
        """Train from the (epoch, step) of ``start`` to ``epochs``."""
        callbacks = CallbackList([*callbacks])
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
                    self.set_rate(epoch * len(loader) + step)
                    lr = self._optimizer.get_lr()
                    if self.exchange is not None:
                        self.exchange.read_notices()
                    logs = {**self.train_batch(batch), "lr": lr}
                    callbacks.on_batch_end("train", step, logs)
            callbacks.on_epoch_end(epoch, logs)
        callbacks.on_end("train", logs)

    def set_rate(self, position: int) -> None:
        """Set the learning rate of the step at ``position``, the steps from the run's start.

        From where the run is, not from a count of the steps that were made: a run that is resumed
        with other batches, and so with other steps an epoch, is at its place in the schedule.
        """
        if isinstance(self._optimizer._learning_rate, LRScheduler):
            self._optimizer._learning_rate.step(position)


class DistillationModel(ResumableModel):
    """Stage two: several sub-networks a step, taught by labels and a frozen teacher.

    Args:
        network: the student, a supernet.
        teacher: called with float images [N, 3, H, W], gives logits [N, classes]; run in eval
            mode and without gradient. None: labels only.
        sampler: chooses the sub-networks of a step.
        loss_weights: weights of the losses of a step's sub-networks; None: 1.
        temperature: T of the soft targets: both sides are softened by it, and the loss grows by
            T squared, so that gradients keep their size (Hinton et al., 2015).
        label_smoothing: see :func:`distillation_loss`.
        in_place: a step's first sub-network alone learns from labels, and teaches the others (Yu
            et al., BigNAS, ECCV 2020), where there is no ``teacher``. The sampler should give the
            largest first, as :class:`hnas.utils.SampleMethod.SandwichSampler` does.
    """

    def __init__(
        self,
        network: nn.Layer,
        teacher: nn.Layer | None,
        sampler: Sampler,
        loss_weights: Callable[[Sequence[Architecture]], Sequence[float]] | None = None,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        in_place: bool = False,
    ):
        spec = [paddle.static.InputSpec([None, 3, None, None], "uint8", "image")]
        label = [paddle.static.InputSpec([None], "int64", "label")]
        super().__init__(network, spec, label)
        self.teacher = teacher
        self.sampler = sampler
        self.loss_weights = loss_weights or (lambda archs: [1.0] * len(archs))
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.in_place = in_place
        if teacher is not None:
            teacher.eval()

    def train_batch(self, inputs) -> dict:
        """One step. The gradients of the sub-networks add up, as in Once-for-all's training."""
        images, labels = inputs
        self.network.train()
        archs = self.sampler.sample(self.epoch, self.step)
        weights = self.loss_weights(archs)
        losses, hits = [0.0] * len(archs), 0.0
        for part, answers in self.gradients.parts(normalize(images), labels):
            targets = self.teach(part)
            for index, (arch, weight) in enumerate(zip(archs, weights, strict=True)):
                self.network.activate(arch)
                with self.gradients.autocast():
                    logits = self.network(part)
                    if self.in_place and targets is not None:
                        loss = weight * soft_loss(logits, targets, self.temperature)
                    else:
                        loss = weight * distillation_loss(
                            logits, answers, targets, self.temperature, self.label_smoothing
                        )
                if self.in_place and targets is None:
                    targets = F.softmax(logits.detach() / self.temperature)
                self.gradients.backward(loss)
                losses[index] += loss.detach() / self.gradients.accumulate
            hits += (logits.argmax(axis=1) == answers).astype("float32").sum()
        self.exchange_gradients()
        self.gradients.step()
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
        with self.gradients.autocast():
            return F.softmax(self.teacher(images) / self.temperature)


def distillation_loss(
    logits, labels, targets, temperature: float = 1.0, label_smoothing: float = 0.0
) -> paddle.Tensor:
    """Cross-entropy with labels [N] plus, if given, with the teacher's probabilities [N, C].

    ``label_smoothing`` is the share of a label that is spread evenly over the C classes, its own
    included (Szegedy et al., CVPR 2016); the teacher's probabilities stay as they are.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if targets is None:
        return loss
    return loss + soft_loss(logits, targets, temperature)


def soft_loss(logits, targets, temperature: float) -> paddle.Tensor:
    """Cross-entropy with the teacher's probabilities [N, C], softened and scaled back."""
    return temperature**2 * F.cross_entropy(logits / temperature, targets, soft_label=True)


def relative_sizes(space: SearchSpace) -> Callable[[Sequence[Architecture]], list[float]]:
    """``use_loss_expand``: each size over that of the largest network, so at most 1.

    The size is the one by which the first place samples, see :func:`weighted_channels`.
    """
    largest = weighted_channels(space.largest())
    return lambda archs: [weighted_channels(arch) / largest for arch in archs]


class StandaloneModel(ResumableModel):
    """One plain network, taught by labels; nothing to activate.

    Args:
        network: float images [N, 3, H, W] to logits [N, classes].
        code: of its architecture, for log lines.
        label_smoothing: see :func:`distillation_loss`.
    """

    def __init__(self, network: nn.Layer, code: str, label_smoothing: float = 0.0):
        super().__init__(network)
        self.code = code
        self.label_smoothing = label_smoothing

    def train_batch(self, inputs) -> dict:
        """One step of cross-entropy on uint8 images [N, 3, H, W] and labels [N]."""
        images, labels = inputs
        self.network.train()
        loss, hits = 0.0, 0.0
        for part, answers in self.gradients.parts(normalize(images), labels):
            with self.gradients.autocast():
                logits = self.network(part)
                part_loss = distillation_loss(
                    logits, answers, None, label_smoothing=self.label_smoothing
                )
            self.gradients.backward(part_loss)
            loss += part_loss.detach() / self.gradients.accumulate
            hits += (logits.argmax(axis=1) == answers).astype("float32").sum()
        self.exchange_gradients()
        self.gradients.step()
        top1 = hits / labels.shape[0]
        return {"loss": loss, "top1": top1, "arch": self.code, "parts": [(self.code, loss)]}
