"""A step of training, from its batch to the optimizer; stage two's step, which labels teach.

Stage one's step is in ``hapi_wrapper_pinas.py``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812
from paddle.optimizer.lr import LambdaDecay, LRScheduler

from hnas.dataset.loader import EpochLoader
from hnas.dataset.transforms import normalize
from hnas.parallel.distributed import GradientExchange
from hnas.programs.flags import AUTO
from hnas.search_space import Architecture, SearchSpace, weighted_channels
from hnas.utils.SampleMethod import Sampler

logger = logging.getLogger(__name__)

CAREFUL = 1e-3
"""Of the norm of the weights when training starts: the most by which a step's gradients move them,
before momentum. docs/ranking-bench.md says what broke at more."""


class GradientStep:
    """How the gradients of a step are gathered and applied.

    A batch is split into ``accumulate`` parts of equal size, one after the other, so that only a
    part's activations are in memory at a time. ``amp`` is ``O0`` (float32) or ``O1``: forward
    passes in bfloat16 where the GPU has it, else in float16 with scaled losses.
    """

    def __init__(self, optimizer, accumulate: int = 1, amp: str = "O0"):
        self.optimizer, self.accumulate, self.amp = optimizer, accumulate, amp
        self.scaler = None
        if amp != "O0":
            self._dtype = "bfloat16" if paddle.amp.is_bfloat16_supported() else "float16"
            if self._dtype == "float16":
                self.scaler = paddle.amp.GradScaler()

    def autocast(self) -> AbstractContextManager:
        """Around forward passes and losses."""
        if self.amp == "O0":
            return nullcontext()
        return paddle.amp.auto_cast(level=self.amp, dtype=self._dtype)

    def parts(self, *tensors: paddle.Tensor) -> list[Sequence[paddle.Tensor]]:
        """Tensors [N, ...] in ``accumulate`` parts, which divide N; a tuple each."""
        if self.accumulate == 1:
            return [tensors]
        return list(zip(*(tensor.split(self.accumulate) for tensor in tensors), strict=True))

    def backward(self, loss: paddle.Tensor) -> None:
        """Add the gradients of a part's mean loss."""
        if self.accumulate > 1:
            loss = loss / self.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    @paddle.no_grad()
    def norm(self) -> paddle.Tensor:
        """The norm of all gradients together, a scalar: what ``clip_norm`` bounds.

        NaN where float16 overflowed, as it does now and then: the step is skipped, and its loss
        scaled less the next time.
        """
        grads = [p.grad for p in self.optimizer._parameter_list if p.grad is not None]
        norm = paddle.stack([grad.norm() for grad in grads]).norm()
        if self.scaler is None:
            return norm
        norm = norm / self.scaler.scale(paddle.ones([]))
        return paddle.where(norm.isfinite(), norm, paddle.full_like(norm, math.nan))

    def step(self) -> None:
        """One step of the optimizer on the gradients gathered; they are gone afterwards."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        # Not to zero: a block that no sub-network of a step ran must be left alone whether or not
        # an earlier step ran it, or a resumed run would differ.
        self.optimizer.clear_grad(set_to_zero=False)

    def state(self) -> dict:
        """The scale of the losses, for a checkpoint."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def restore(self, state: dict) -> None:
        """Go on from what :meth:`state` gave."""
        if state and self.scaler is not None:
            self.scaler.load_state_dict(state)


def momentum_optimizer(
    network: nn.Layer, schedule, momentum: float, weight_decay: float, clip_norm: float = 0.0
):
    """Momentum SGD on what trains, with an L2 penalty; ``clip_norm`` bounds the norm of all
    gradients together, before the penalty; 0: no bound; ``AUTO``: see :func:`careful_norm`."""
    trained = [p for p in network.parameters() if not p.stop_gradient]
    if clip_norm == AUTO:
        clip_norm = careful_norm(trained, schedule.base_lr)
        logger.info("clip_norm %.4g: gradients move weights by %g at most", clip_norm, CAREFUL)
    return paddle.optimizer.Momentum(
        schedule,
        momentum,
        parameters=trained,
        weight_decay=paddle.regularizer.L2Decay(weight_decay),
        grad_clip=nn.ClipGradByGlobalNorm(clip_norm) if clip_norm else None,
    )


def careful_norm(trained: Sequence[paddle.Tensor], peak_rate: float) -> float:
    """The norm of gradients that moves weights by ``CAREFUL`` at the learning rate's peak.

    So what a step can do depends neither on the rate nor on the batch that it is scaled by. With
    statistics that fit the largest network alone nothing else bounds the gradients of the others,
    and dead activations do not come back. Layers without normalisation are trained so, each with
    its own bound (Brock et al., 2021, https://arxiv.org/abs/2102.06171).
    """
    norm = math.sqrt(sum(float((own.astype("float64") ** 2).sum()) for own in trained))
    return CAREFUL * norm / peak_rate if peak_rate else 0.0


def learning_rate(
    base: float, total_batch: int, warmup_steps: int, total_steps: int
) -> LRScheduler:
    """Base times batch / 256; linear warm-up from one step's share, then cosine to zero."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        decay = max(1, total_steps - warmup_steps)
        return 0.5 * (1 + np.cos(np.pi * min(1.0, (step - warmup_steps) / decay)))

    return LambdaDecay(base * total_batch / 256, factor)


def swinging_rate(base: float, total_batch: int, half_period: int) -> LRScheduler:
    """A cosine from base times batch / 256 to zero in ``half_period`` steps, and back, and so on.

    The first place's schedule of stage 1, whose half period is the number of epochs, taken for
    steps; its mean is half the full rate.
    """
    return LambdaDecay(
        base * total_batch / 256, lambda step: 0.5 * (1 + np.cos(np.pi * step / half_period))
    )


class ResumableModel:
    """A network and its optimizer; training can start at any step and sees (epoch, step).

    Sub-classes give ``train_batch(inputs) -> logs``, one optimizer step on a batch: the scalar
    tensors ``loss``, ``top1`` and ``norm`` (of the gradients), which are read only when a line is
    logged, ``parts``, the code and loss of each sub-network, and ``arch``, the last one's code.
    Batches hold uint8 images [N, 3, H, W].
    """

    epoch = 0
    step = 0
    guess_loss = 0.0
    """Of a guess, where a loss that rises to it is no sign of breaking."""
    exchange: GradientExchange | None = None
    """With other ranks; None: there are none."""

    def __init__(self, network: nn.Layer):
        self.network = network

    def prepare(self, optimizer, gradients: GradientStep | None = None) -> None:
        """To be called before the first step; ``gradients`` says how to step if not plainly."""
        self.optimizer = optimizer
        self.gradients = gradients or GradientStep(optimizer)

    def train_epoch(
        self, loader: EpochLoader, epoch: int, first: int = 0
    ) -> Iterator[tuple[int, dict]]:
        """Make the steps of an epoch from ``first`` on; gives each one's number and logs.

        The logs also have its learning rate, ``lr``, and the seconds that it ``waited`` for data.
        """
        with closing(loader.epoch(epoch, first)) as batches:
            began = time.perf_counter()
            for step, batch in enumerate(batches, first):
                waited = time.perf_counter() - began
                self.epoch, self.step = epoch, step
                lr = self.set_rate(epoch * len(loader) + step)
                if self.exchange is not None:
                    self.exchange.read_notices()
                yield step, {**self.train_batch(batch), "lr": lr, "waited": waited}
                began = time.perf_counter()

    def set_rate(self, position: int) -> float:
        """Set the learning rate of the step at ``position``, the steps from the run's start.

        From where the run is, not from a count of the steps that were made: a run that is resumed
        with other batches, and so with other steps an epoch, is at its place in the schedule.
        """
        if isinstance(self.optimizer._learning_rate, LRScheduler):
            self.optimizer._learning_rate.step(position)
        return self.optimizer.get_lr()

    def update(self) -> paddle.Tensor:
        """Step on the gradients of the backward passes, averaged over ranks; gives their norm."""
        if self.exchange is not None:
            self.exchange.run()
        norm = self.gradients.norm()
        self.gradients.step()
        return norm


class DistillationModel(ResumableModel):
    """Stage two: several sub-networks a step, taught by labels and a frozen teacher.

    Args:
        teacher: float images [N, 3, H, W] to logits [N, classes]. None: labels only.
        loss_weights: of a step's sub-networks; None: 1.
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
        in_place: bool = False,
    ):
        super().__init__(network)
        self.teacher, self.sampler, self.in_place = teacher, sampler, in_place
        self.loss_weights = loss_weights or (lambda archs: [1.0] * len(archs))
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
                        loss = weight * soft_loss(logits, targets)
                    else:
                        loss = weight * distillation_loss(logits, answers, targets)
                    if self.in_place and targets is None:
                        targets = F.softmax(logits.detach())
                self.gradients.backward(loss)
                losses[index] += loss.detach() / self.gradients.accumulate
            hits += (logits.argmax(axis=1) == answers).astype("float32").sum()
        norm = self.update()
        codes = [arch.code for arch in archs]
        return {
            "loss": sum(losses) / len(losses),
            "top1": hits / labels.shape[0],
            "norm": norm,
            "arch": codes[-1],
            "parts": list(zip(codes, losses, strict=True)),
        }

    @paddle.no_grad()
    def teach(self, images) -> paddle.Tensor | None:
        """The teacher's probabilities [N, C], if there is one: once for all sub-networks."""
        if self.teacher is None:
            return None
        with self.gradients.autocast():
            return F.softmax(self.teacher(images))


def distillation_loss(logits, labels, targets) -> paddle.Tensor:
    """Cross-entropy with labels [N] plus, if given, with the teacher's probabilities [N, C]."""
    loss = F.cross_entropy(logits, labels)
    return loss if targets is None else loss + soft_loss(logits, targets)


def soft_loss(logits, targets) -> paddle.Tensor:
    """Cross-entropy with the teacher's probabilities [N, C] (Hinton et al., 2015)."""
    return F.cross_entropy(logits, targets, soft_label=True)


def relative_sizes(space: SearchSpace) -> Callable[[Sequence[Architecture]], list[float]]:
    """``use_loss_expand``: each size over that of the largest network, so at most 1.

    The size is the one by which the first place samples, see :func:`weighted_channels`.
    """
    largest = weighted_channels(space.largest())
    return lambda archs: [weighted_channels(arch) / largest for arch in archs]
