"""From losses to one optimizer step: gradient accumulation, mixed precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import paddle

from hnas.base.errors import UserError


class Update:
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
