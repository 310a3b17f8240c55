"""What settings need, looked at before it is taken: memory and /dev/shm.

Of memory these are lower bounds, so that nothing is refused that would run. Every check raises
UserError where its subject does not fit, and says what to lower.
"""

from __future__ import annotations

import math

import paddle

from hnas.base.device import available_bytes, gib, shared_bytes
from hnas.base.errors import UserError
from hnas.parallel.distributed import local_ranks
from hnas.programs.options import Options
from hnas.search_space import SearchSpace, convolution_outputs, find_backbone

FLOAT = 4  # bytes
EMBEDDING = 128  # numbers of a key
PREFETCHED = 2
"""Batches that Paddle's loader keeps under way for each of its processes."""

IN_TRAINING = (
    "halve --batch_size, or give --accumulate 2 to compute it in parts, or --amp O1 on a GPU"
)
IN_SCORING = (
    "give --chunk_size 128 or less (reference engine: --batch_size), --cache_gb 1 or --amp O1 on "
    "a GPU"
)
"""What to do where memory runs out all the same."""


def device_bytes() -> int:
    """Memory for this process: free of the machine's, or all of its GPU's."""
    if paddle.get_device() == "cpu":
        return available_bytes() // local_ranks()
    return paddle.device.cuda.get_device_properties().total_memory


def check_queue(options: Options) -> None:
    """The keys of stage one, which are drawn and then scaled."""
    need = 2 * FLOAT * EMBEDDING * options.queue_size
    refuse_too_much(need, device_bytes(), f"--queue_size {options.queue_size}", "lower it")


def check_batch(options: Options, space: SearchSpace) -> None:
    """A batch of training, of which a part is computed at a time.

    The outputs of all convolutions are kept for the backward pass, of the smallest sub-network at
    least; the batch itself is kept as uint8 and float32.
    """
    images = math.ceil(options.batch_size / options.accumulate)
    kept = images * convolution_outputs(space.plan(space.smallest()), options.image_size)
    batch = batch_bytes(options)
    need = batch + FLOAT * (batch // options.accumulate + kept)
    what = f"--batch_size {options.batch_size} at --image_size {options.image_size}"
    refuse_too_much(need, device_bytes(), what, "lower them, or raise --accumulate")


def batch_bytes(options: Options) -> int:
    """Of a training batch as loader processes hand it over, uint8; stage one takes two views."""
    views = 2 if find_backbone(options.backbone).contrastive else 1
    return views * 3 * options.image_size**2 * options.batch_size


def refuse_too_much(need: int, free: int, what: str, instead: str) -> None:
    """Refuse ``what`` that needs more bytes than are free, and say what to do ``instead``."""
    if need > free:
        raise UserError(f"{what} needs {gib(need)} at least, and {gib(free)} are free; {instead}")


def check_chunk(options: Options) -> None:
    """The images of a ``chunk_size`` of stage three, as float32."""
    need = FLOAT * options.chunk_size * 3 * options.image_size**2
    what = f"--chunk_size {options.chunk_size} at --image_size {options.image_size}"
    refuse_too_much(need, device_bytes(), what, "lower it, or give 0")


def check_shared_memory(size: int, batches: int, num_workers: int) -> None:
    """Loader processes, which die of a bus error where /dev/shm is too small, as Docker's 64 MiB.

    All processes of a machine share it. One hands over a batch of ``size`` bytes at a time, of so
    many ``batches`` in all.
    """
    free = shared_bytes()
    need = min(PREFETCHED * num_workers, batches) * size * local_ranks()
    if free is not None and need > free:
        raise UserError(
            f"--num_workers {num_workers} needs {gib(need)} of shared memory for batches under "
            f"way, and /dev/shm has {gib(free)} free; give the container more (docker run "
            f"--shm-size {math.ceil(need / 2**30) + 1}g), or --num_workers 0"
        )
