"""Several processes of one run: joining, exchanging, one gradient all-reduce a step.

Processes are started by ``hnas.parallel.launcher``; with one, everything here does nothing.
Rank r of R loads the r-th share of every batch, so that R processes with batches of B see in a
step what one process with batches of R * B sees.

Gloo as Paddle 3.3.1 has it (tried): sums, broadcasts and gathers work for float32, float64, int32,
int64 and uint8, and give the same bits on all ranks and in every run. Means, reduce_scatter and
all_to_all are missing, sums of float16 come out infinite, and whatever has to wait for a peer
fails after 30 seconds; after a peer's death it fails at once.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import paddle
import paddle.distributed as dist

from hnas.base.errors import (
    PADDLE_ERRORS,
    SIGNALS,
    Stopped,
    UserError,
    is_out_of_memory,
    say,
    word_of,
)
from hnas.parallel.rollcall import RollCall

logger = logging.getLogger(__name__)
_roll_call: RollCall | None = None

TOLD = (signal.SIGINT, signal.SIGTERM)
"""Of which signals ranks tell each other; of SIGHUP as of SIGTERM."""


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank()


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size()


def is_main_process() -> bool:
    """Whether this process logs and saves: rank 0."""
    return rank() == 0


def local_ranks() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("PADDLE_LOCAL_SIZE", 1))


def join_processes(cpu: bool) -> None:
    """Meet the other processes of the run, if there are any; :class:`UserError` if they are not
    reached. With ``cpu`` they exchange by gloo, even where Paddle sees GPUs."""
    global _roll_call
    if world_size() < 2 or _roll_call is not None:
        return
    if cpu:
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    try:
        dist.init_parallel_env()
    except PADDLE_ERRORS as error:
        raise UserError(f"rank {rank()} cannot join the others: {word_of(error)}") from error
    host = os.environ["PADDLE_MASTER"].rpartition(":")[0]
    _roll_call = RollCall.connect(rank(), world_size(), host, from_main_process)


def barrier() -> None:
    """Wait, however long, until all ranks are here."""
    if _roll_call is not None:
        _roll_call.wait()


def leave() -> None:
    """Say that this process has done its part of the run."""
    global _roll_call
    if _roll_call is not None:
        _roll_call.leave()
        _roll_call = None


class StopSignals:
    """Within the context the first signal is noted only; the next one ends the program at once.

    Of several processes later ones are noted only, too: Paddle's launcher sends SIGTERM several
    times within a second.
    """

    def __init__(self):
        self.received: int | None = None
        """The signal's number."""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received = number
            say(f"{name}: the program ends when it has saved what is under way; again: at once")
        elif world_size() < 2:
            # Not by an exception: Paddle, where it calls Python, would make another one of it.
            say(f"stopped by {name} at once, without saving")
            os._exit(128 + number)


@contextmanager
def finished_before_stopping() -> Iterator[None]:
    """Within the context the first signal is noted only; :class:`Stopped` after it.

    Of several processes the others go on: each ends its own piece of work on its own signal.
    """
    with StopSignals() as stop:
        yield
    if stop.received:
        name = signal.Signals(stop.received).name
        logger.warning("stopped by %s; run again to continue with what is saved", name)
        leave()
        raise Stopped(stop.received)


@contextmanager
def _collective() -> Iterator[None]:
    if dist.get_backend() == "GLOO":
        barrier()
    try:
        yield
    except PADDLE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"rank {rank()} has lost another process ({word_of(error)}); see the others' logs, "
            "then resume"
        ) from error


def from_main_process(numbers: Sequence[int]) -> list[int]:
    """Rank 0's whole numbers; all ranks give as many."""
    own = paddle.to_tensor(list(numbers), dtype="int64")
    copy_from_main_process([own])
    return own.tolist()


def gather(tensor: paddle.Tensor) -> paddle.Tensor:
    """All ranks' tensors [N, ...], of equal shapes, in their order: [world_size * N, ...]."""
    if world_size() < 2:
        return tensor
    parts: list[paddle.Tensor] = []
    with _collective():
        dist.all_gather(parts, tensor.contiguous())
    return paddle.concat(parts)


def sum_over_ranks(tensor: paddle.Tensor) -> paddle.Tensor:
    """The sum of all ranks' tensors; the same bits everywhere."""
    total = tensor.clone()
    if world_size() > 1:
        with _collective():
            dist.all_reduce(total)
    return total


def agree(numbers: Sequence[int], what: str) -> None:
    """Raise a :class:`UserError` where ranks have other whole numbers; ``what`` they are."""
    if not numbers:
        return  # Paddle's gather of no numbers kills the process
    own = paddle.to_tensor([list(numbers)], dtype="int64")
    found = {tuple(row) for row in gather(own).tolist()}
    if len(found) > 1:
        raise UserError(
            f"the processes differ in {what}: {sorted(found)}; save_dir and the inputs must be the "
            "same for all machines, e.g. on a shared disk"
        )


def copy_from_main_process(tensors: Sequence[paddle.Tensor]) -> None:
    """Give tensors rank 0's values."""
    for tensor in tensors if world_size() > 1 else ():
        with _collective():
            dist.broadcast(tensor, src=0)


class GradientExchange:
    """The one all-reduce of a step: mean gradients, and whether a rank was told to stop.

    All ranks run the same sub-networks in a step, so the same parameters have gradients on all.
    Losses are means over equal shares of the batch, so the mean of the gradients is that of all.
    One process may be signalled (``stop``) before another; all agree on what they exchange.
    """

    def __init__(self, parameters: Sequence[paddle.Tensor], stop: StopSignals):
        self._parameters = list(parameters)
        self._stop = stop
        self._notices: paddle.Tensor | None = None
        self.received: int | None = None
        """The signal that all ranks know of, as :class:`StopSignals` has it."""

    def read_notices(self) -> None:
        """To be called before a step's forward pass; within it the host would wait for the GPU."""
        if self._notices is not None and self.received is None:
            counts = zip(TOLD, self._notices.tolist(), strict=True)
            self.received = max((number for number, count in counts if count), default=None)
        self._notices = None

    @paddle.no_grad()
    def run(self) -> None:
        """To be called after the backward passes and before the optimizer's step."""
        if self._stop.received is None:
            own = paddle.zeros([len(TOLD)])  # filled on the device, not copied to it
        else:
            interrupt = float(self._stop.received == signal.SIGINT)
            own = paddle.to_tensor([interrupt, 1 - interrupt])
        parts = [own, *(p.grad for p in self._parameters if p.grad is not None)]
        flat = paddle.concat([part.flatten() for part in parts])
        with _collective():
            dist.all_reduce(flat)
        means = paddle.split(flat / world_size(), [part.size for part in parts])
        for part, mean in zip(parts, means, strict=True):
            paddle.assign(mean.reshape(part.shape), part)
        self._notices = own
