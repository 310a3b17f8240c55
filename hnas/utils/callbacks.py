"""Log lines and checkpoints of training, as callbacks of ``paddle.Model``."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable
from pathlib import Path

import paddle
from paddle.callbacks import Callback

from hnas.utils.checkpoint import save_training

logger = logging.getLogger(__name__)


def is_chief() -> bool:
    """Whether this process logs and saves: rank 0 of a distributed run."""
    return paddle.distributed.get_rank() == 0


class TrainLogger(Callback):
    """A line every ``log_freq`` steps and at an epoch's end; keeps the mean loss of each epoch."""

    def __init__(self, log_freq: int):
        super().__init__()
        self.log_freq = log_freq
        self.epoch_losses: list[float] = []

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._losses = []
        self._mark = time.perf_counter()
        self._since = self._data_time = 0

    def on_train_batch_begin(self, step, logs=None):
        self._data_time += time.perf_counter() - getattr(self, "_batch_end", self._mark)

    def on_train_batch_end(self, step, logs=None):
        self._losses.append(logs["loss"])
        self._since += 1
        last = step + 1 == self.params["steps"]
        if is_chief() and ((step + 1) % self.log_freq == 0 or last):
            self._log_line(step, logs)
        self._batch_end = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        # The next epoch's first wait starts a new clock.
        del self._batch_end
        losses = [float(loss) for loss in self._losses]
        self.epoch_losses.append(sum(losses) / len(losses))

    def _log_line(self, step, logs):
        loss, top1 = float(logs["loss"]), float(logs["top1"])
        elapsed = time.perf_counter() - self._mark
        steps, epochs = self.params["steps"], self.params["epochs"]
        left = (epochs - self._epoch) * steps - step - 1
        eta = datetime.timedelta(seconds=round(left * elapsed / self._since))
        logger.info(
            "epoch %d/%d step %d/%d lr %.6f loss %.4f top1 %.4f ips %.1f images/s "
            "data %.3f s/step eta %s arch %s",
            self._epoch + 1,
            epochs,
            step + 1,
            steps,
            logs["lr"],
            loss,
            top1,
            self._since * self.params["batch_size"] / elapsed,
            self._data_time / self._since,
            eta,
            logs["arch"],
        )
        self._mark = time.perf_counter()
        self._since = self._data_time = 0


class EpochCheckpoint(Callback):
    """``SAVE_DIR/0.pdparams``, ``1.pdparams``, ... with what a resumed run needs beside them."""

    def __init__(self, save_dir: str | Path, save_freq: int = 1):
        super().__init__()
        self.save_dir = Path(save_dir)
        self.save_freq = save_freq

    def on_epoch_end(self, epoch, logs=None):
        last = epoch + 1 == self.params["epochs"]
        if is_chief() and (epoch % self.save_freq == 0 or last):
            stem = self.save_dir / str(epoch)
            save_training(stem, self.model.network, self.model._optimizer, {"epoch": epoch + 1})
            logger.info("saved %s.pdparams", stem)


class EvaluateExtremes(Callback):
    """Validation accuracy of the largest and the smallest sub-network after epochs."""

    def __init__(self, evaluate: Callable[[], dict[str, float]], eval_freq: int):
        super().__init__()
        self.evaluate = evaluate
        self.eval_freq = eval_freq

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.eval_freq == 0:
            accuracies = self.evaluate()
            if is_chief():
                line = ", ".join(f"{name} {value:.4f}" for name, value in accuracies.items())
                logger.info("epoch %d validation top-1: %s", epoch + 1, line)
