"""Curves of training for VisualDL, which is optional."""

from __future__ import annotations

import time

from paddle.callbacks import Callback

from hnas.base.errors import UserError


class VisualDLWriter(Callback):
    """Writes loss, top-1, learning rate and images a second every ``log_freq`` steps.

    Args:
        folder: where the log goes.
        log_freq: steps between points; only then losses are read from the device.

    Raises:
        UserError: VisualDL is not installed.
    """

    def __init__(self, folder: str, log_freq: int):
        super().__init__()
        try:
            from visualdl import LogWriter
        except ImportError as error:
            raise UserError(
                f"--visualdl_dir needs VisualDL ({error}): pip install visualdl, or leave it out"
            ) from None
        self.log_freq = log_freq
        self._writer = LogWriter(folder)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._mark, self._since = time.perf_counter(), 0

    def on_train_batch_end(self, step, logs=None):
        self._since += 1
        if (step + 1) % self.log_freq:
            return
        done = self._epoch * self.params["steps"] + step + 1
        loss, top1 = float(logs["loss"]), float(logs["top1"])
        ips = self._since * self.params["batch_size"] / (time.perf_counter() - self._mark)
        points = {"loss": loss, "top1": top1, "lr": logs["lr"], "ips": ips}
        for name, value in points.items():
            self._writer.add_scalar(f"train/{name}", value, done)
        self._mark, self._since = time.perf_counter(), 0

    def on_train_end(self, logs=None):
        self._writer.close()
