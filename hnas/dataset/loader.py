"""Batches of augmented images in an order that depends on (seed, epoch) only."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import numpy as np
import paddle
from paddle.io import BatchSampler, DataLoader, Dataset
from PIL import Image
from tqdm import tqdm

from hnas.dataset.image_folder import DataError, ImageList, decode_image


class ImageDataset(Dataset):
    """Images of a list under a transform.

    An item is the transform's arrays followed by the label. The transform's generator is seeded
    by (seed, epoch, index), so worker processes and resumed runs augment alike.

    Args:
        images: what to load.
        transform: called with a PIL image and a generator.
        seed: of the augmentations.
        in_memory: decode every image once, now, and keep the pixels (uint8, full size).
    """

    def __init__(self, images: ImageList, transform: Callable, seed: int, in_memory: bool = False):
        super().__init__()
        self.images = images
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self._pixels = None
        if in_memory:
            progress = tqdm(images.paths, desc=f"decoding {images.folder}", unit="image")
            self._pixels = [np.asarray(decode_image(path)) for path in progress]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        rng = np.random.default_rng((self.seed, self.epoch, index))
        if self._pixels is None:
            image = decode_image(self.images.paths[index])
        else:
            image = Image.fromarray(self._pixels[index])
        arrays = self.transform(image, rng)
        arrays = arrays if isinstance(arrays, tuple) else (arrays,)
        return (*arrays, self.images.labels[index])


class EpochLoader:
    """Shuffled whole batches of a dataset, an epoch at a time.

    Args:
        dataset: to load from.
        batch_size: images a batch; the last, incomplete one is left out.
        num_workers: loader processes; 0 loads in this one.

    Raises:
        DataError: fewer images than one batch.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, num_workers: int = 0):
        if len(dataset) < batch_size:
            raise DataError(
                f"{dataset.images.folder} holds {len(dataset)} images, fewer than one batch of "
                f"{batch_size}; lower batch_size"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self.dataset) // self.batch_size

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The image indices of each step of ``epoch``."""
        order = np.random.default_rng((self.dataset.seed, epoch)).permutation(len(self.dataset))
        return np.split(order[: len(self) * self.batch_size], len(self))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[paddle.Tensor]]:
        """The batches of ``epoch`` from ``start_step`` on."""
        self.dataset.epoch = epoch
        batches = _FixedBatches(self.batches(epoch)[start_step:])
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            worker_init_fn=_leave_signals_to_main,
        )
        return iter(loader)


class _FixedBatches(BatchSampler):
    """Batches that were drawn beforehand."""

    def __init__(self, batches):
        self._batches = [batch.tolist() for batch in batches]

    def __iter__(self):
        return iter(self._batches)

    def __len__(self):
        return len(self._batches)


def _leave_signals_to_main(worker: int) -> None:
    """Ctrl-C and cluster managers signal a whole process group.

    The main process still needs its loader processes then, to finish its step; they end when it
    tells them to or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def eval_loader(dataset: ImageDataset, batch_size: int, num_workers: int = 0) -> DataLoader:
    """All images of ``dataset`` in their order."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_main,
    )
