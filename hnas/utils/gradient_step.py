"""From losses to one optimizer step: accumulation, mixed precision, optimizer, learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import paddle
from paddle import nn

from hnas.base.errors import UserError


class GradientStep:
    """How the gradients of a step are gathered and applied.

    Args:
        optimizer: whose parameters get the gradients.
        accumulate: parts of equal size that a batch is split into, one after the other, so that
            only a part's activations are in memory at a time.
        amp: ``O0`` (float32) or ``O1``: forward passes in bfloat16 where the GPU has it, else in
            float16 with scaled losses.
    """

    def __init__(self, optimizer, accumulate: int = 1, amp: str = "O0"):
        self.optimizer = optimizer
        self.accumulate = accumulate
        self.amp = amp
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
        """Tensors [N, ...] in ``accumulate`` parts: one tuple of tensors for each.

        Raises:
            UserError: N cannot be split so.
        """
        number = tensors[0].shape[0]
        if number % self.accumulate:
            raise UserError(
                f"a batch of {number} images is not a multiple of --accumulate {self.accumulate}"
            )
        if self.accumulate == 1:
            return [tensors]
        return list(zip(*(tensor.split(self.accumulate) for tensor in tensors), strict=True))

    def backward(self, loss: paddle.Tensor) -> None:
        """Add the gradients of a part's mean loss."""
        if self.accumulate > 1:
            loss = loss / self.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

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
        """What a resumed run needs: the scale of the losses."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def restore(self, state: dict) -> None:
        """Go on from what :meth:`state` gave."""
        if state and self.scaler is not None:
            self.scaler.load_state_dict(state)


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


def swinging_rate(
    base: float, total_batch: int, half_period: int
) -> paddle.optimizer.lr.LRScheduler:
    """A cosine from base times batch / 256 to zero in ``half_period`` steps, and back, and so on.

    The first place's schedule of stage 1, whose half period is the number of epochs, taken for
    steps; its mean is half the full rate.
    """
    return paddle.optimizer.lr.LambdaDecay(
        base * total_batch / 256, lambda step: 0.5 * (1 + np.cos(np.pi * step / half_period))
    )


def momentum_optimizer(
    network: nn.Layer,
    schedule,
    momentum: float,
    weight_decay: float,
    clip_norm: float = 0.0,
    nesterov: bool = False,
    no_norm_decay: bool = False,
):
    """Momentum SGD on the parameters that train.

    Args:
        network: whose parameters they are.
        schedule, momentum, weight_decay: rate, velocity's share that stays, and L2 penalty.
        clip_norm: largest norm of all gradients together; 0: any.
        nesterov: step by the gradient plus momentum times the new velocity (Sutskever et al.,
            ICML 2013).
        no_norm_decay: no penalty on vectors: BatchNorm's scales and shifts, and biases (He et al.,
            "Bag of tricks", CVPR 2019).
    """
    trained = [p for p in network.parameters() if not p.stop_gradient]
    if no_norm_decay:
        # A parameter's own penalty wins over the optimizer's. Groups of parameters would each have
        # their gradients clipped alone.
        for parameter in trained:
            if parameter.ndim == 1:
                parameter.regularizer = paddle.regularizer.L2Decay(0.0)
    return paddle.optimizer.Momentum(
        schedule,
        momentum,
        parameters=trained,
        use_nesterov=nesterov,
        weight_decay=paddle.regularizer.L2Decay(weight_decay),
        grad_clip=nn.ClipGradByGlobalNorm(clip_norm) if clip_norm else None,
    )
