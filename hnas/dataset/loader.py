"""Batches of augmented images in an order that depends on (seed, epoch) only."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue

import numpy as np
import paddle
from paddle.base import core
from paddle.io import DataLoader
from PIL import Image

from hnas.dataset.image_folder import DataError, ImageList, decode_image

WORKER_GRACE_SECONDS = 20
PARENT_CHECK_SECONDS = 2
NOTED_CHECK_SECONDS = 0.001


@dataclass
class ImageDataset:
    """Images of a list under a transform.

    An item is the transform's arrays followed by the label. The transform's generator is seeded
    by (seed, epoch, index), so worker processes and resumed runs augment alike.
    """

    images: ImageList
    transform: Callable  # of a PIL image and a generator; gives an array or a tuple of them
    seed: int
    pixels: Sequence[np.ndarray] | None = None  # decoded [H, W, 3], instead of the files
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        if self.pixels is None:
            image = decode_image(self.images.paths[index])
        else:
            image = Image.fromarray(self.pixels[index])
        rng = np.random.default_rng((self.seed, self.epoch, int(index)))
        arrays = self.transform(image, rng)
        arrays = arrays if isinstance(arrays, tuple) else (arrays,)
        return (*arrays, self.images.labels[index])

    def load(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The items at ``indices``, each of their parts stacked."""
        items = [self[index] for index in indices]
        return [np.stack(part) for part in zip(*items, strict=True)]


@dataclass
class EpochLoader:
    """Whole batches of a dataset, an epoch at a time; the last, incomplete one is left out.

    Each of ``world_size`` processes loads its consecutive share of every batch, so that R of them
    see together what one with batches of R times the size sees.

    Raises:
        DataError: fewer images than one batch.
    """

    dataset: ImageDataset
    batch_size: int  # of each process
    num_workers: int = 0  # loader processes; 0 loads in this one
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True  # a new order in every epoch, by the dataset's seed; else the dataset's

    def __post_init__(self):
        if len(self.dataset) < self.total_batch:
            raise DataError(
                f"{self.dataset.images.folder} holds {len(self.dataset)} images, fewer than one "
                f"batch of {self.total_batch}; lower batch_size"
            )

    @property
    def total_batch(self) -> int:
        """Images that all processes load together for a step."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self.dataset) // self.total_batch

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The image indices of each step of ``epoch``, this rank's share."""
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng((self.dataset.seed, epoch)).permutation(order)
        whole = np.split(order[: len(self) * self.total_batch], len(self))
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [batch[own] for batch in whole]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[paddle.Tensor]]:
        """The batches of ``epoch`` from ``start_step`` on."""
        self.dataset.epoch = epoch
        return load_batches(self.dataset, self.batches(epoch)[start_step:], self.num_workers)


@dataclass(frozen=True)
class EvalLoader:
    """All images of a dataset in their order, as often as it is iterated."""

    dataset: ImageDataset
    batch_size: int
    num_workers: int = 0

    def __iter__(self) -> Iterator[list[paddle.Tensor]]:
        starts = range(self.batch_size, len(self.dataset), self.batch_size)
        batches = np.split(np.arange(len(self.dataset)), starts)
        return load_batches(self.dataset, batches, self.num_workers)


def load_batches(
    dataset: ImageDataset, batches: Sequence[np.ndarray], num_workers: int
) -> Iterator[list[paddle.Tensor]]:
    """Yield the items of each batch of indices, stacked, in order.

    Without workers the items are read here: Paddle's loader would read them in a thread, and
    wait for ever when that one fails.

    Raises:
        DataError: an image cannot be read, or a loader process died.
    """
    if not num_workers:
        for batch in batches:
            yield [paddle.to_tensor(part) for part in dataset.load(batch)]
        return
    left = deque(range(len(batches)))
    noted, leaving = RawValue("q", 0), RawValue("b", 0)
    # Whole batches are read where they are collated: what is collated is a batch's number.
    loader = DataLoader(
        range(len(batches)),
        batch_sampler=_taken(left),
        collate_fn=functools.partial(_load_or_message, dataset, batches, noted, leaving),
        num_workers=num_workers,
        worker_init_fn=functools.partial(_obey_main_only, leaving),
    )
    iterator = iter(loader)
    workers = multiprocessing.active_children()
    # Paddle's handler would raise wherever the step under way is; its iterator notices as well.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        noted.value = len(batches) - len(left)
        while parts := _next_batch(iterator, workers):
            noted.value = len(batches) - len(left)
            try:
                if len(parts) == 1:
                    raise DataError(os.fsdecode(parts[0].numpy().tobytes()))
                yield parts
            except BaseException:
                # Nobody wants the rest. The workers only end when theirs does.
                left.clear()
                while _next_batch(iterator, workers):
                    pass
                raise
    finally:
        # Also when a signal has interrupted the iterator itself, which may not be used any more.
        leaving.value = 1


def _next_batch(iterator: Iterator, workers: Sequence[multiprocessing.Process]) -> list | None:
    """The next batch of Paddle's loader, None after the last; an error that says how one died."""
    try:
        return next(iterator, None)
    except Exception:
        ended = [worker.exitcode for worker in workers if worker.exitcode]
        if not ended:
            raise
        for worker in workers:
            worker.kill()  # else one might wait for what the dead one held
        code = ended[0]
        how = f"ended with {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
        raise DataError(
            f"a loader process {how}; where memory is short, lower --num_workers; what is saved "
            "can be resumed"
        ) from None


def _load_or_message(
    dataset: ImageDataset, batches: Sequence[np.ndarray], noted, leaving, number: list[int]
) -> list[np.ndarray]:
    """A worker's batch; or, of a failed one, the message as bytes.

    Paddle would end in a traceback. It gives a worker its task before it notes who has it, and
    waits for ever if another than the next batch comes between the two. So none comes before the
    main process has said, by ``noted``, how many tasks it has noted.
    """
    try:
        parts = dataset.load(batches[number[0]])
    except DataError as error:
        # A path may hold bytes that are no UTF-8.
        parts = [np.frombuffer(os.fsencode(str(error)), dtype=np.uint8)]
    while number[0] >= noted.value and not leaving.value:
        time.sleep(NOTED_CHECK_SECONDS)
    return parts


def _taken(left: deque[int]) -> Iterator[list[int]]:
    """The numbers of batches, as long as any are left."""
    while left:
        yield [left.popleft()]


def _obey_main_only(leaving, worker: int) -> None:
    """Set up a loader process: it ends when the main process says so or is gone.

    That is when ``leaving.value`` is 1. Ctrl-C, hang-ups and cluster managers signal a whole
    process group; the main process finishes and saves its step then, and may need its loaders for
    it, so they outlast SIGTERM for a while.
    """

    def end(*_):
        if leaving.value:
            os._exit(0)
        signal.alarm(WORKER_GRACE_SECONDS)

    # Else a worker that collects what the main process left may end an earlier iterator here, and
    # wait for that one's workers for ever.
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    # Paddle's workers look for their parent only between batches, which never come when it is
    # killed.
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    core._cleanup_mmap_fds()  # else the batches under way stay in /dev/shm
    os._exit(1)
