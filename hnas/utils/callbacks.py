"""Log lines, curves and checkpoints of training, as callbacks of ``paddle.Model``."""

from __future__ import annotations

import datetime
import logging
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import paddle
from paddle.callbacks import Callback

from hnas.base.device import peak_memory
from hnas.base.errors import UserError
from hnas.base.files import remove_leftovers, write_json
from hnas.base.signals import Stopped
from hnas.parallel.distributed import (
    StopSignals,
    barrier,
    is_main_process,
    leave,
    mean_over_ranks,
    world_size,
)
from hnas.search_space import RESNET48
from hnas.utils.checkpoint import SET_NAME, generators_state, note_run, remove_set, save_training
from hnas.utils.options import Options
from hnas.utils.weights import NotFiniteError

logger = logging.getLogger(__name__)

HISTORY = "history.json"
LARGEST = RESNET48.largest().code
"""Of every search space; log lines of steps that train it alone leave it out."""


class DivergedError(UserError):
    """The loss is not finite any more; no checkpoint was written since it was."""


class TrainLogger(Callback):
    """A line every ``log_freq`` steps and at an epoch's end; keeps the mean loss of each epoch.

    Losses are read from the device when a line is due or a checkpoint is about to be written,
    and checked then, so a step never waits for its loss and no checkpoint follows a bad one.

    Attributes:
        validation: what was measured after epochs, from 0: figures by name.
    """

    def __init__(self, log_freq: int):
        super().__init__()
        self.log_freq = log_freq
        self.epoch_losses: list[float] = []
        self.validation: dict[int, dict[str, float | None]] = {}
        self._losses: list[float] = []
        self._unread: list[tuple[int, dict]] = []
        self._epoch = 0
        self._earlier_seconds = 0.0
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time spent on this run, the parts before resuming included."""
        return self._earlier_seconds + time.perf_counter() - self._began

    def state(self) -> dict:
        """The losses and figures so far, for a checkpoint."""
        self.read_losses()
        return {
            "epoch_losses": np.array(self.epoch_losses, np.float64),
            "step_losses": np.array(self._losses, np.float64),
            "best_epoch": self.history()["best_epoch"],
            "seconds": self.seconds,
            "validation": self._validation_rows(),
        }

    def restore(self, state: Mapping) -> None:
        """Go on from what :meth:`state` gave."""
        self.epoch_losses = state["epoch_losses"].tolist()
        self._losses = state["step_losses"].tolist()
        self._earlier_seconds = state["seconds"]
        # Checkpoints of earlier versions have none.
        rows = [dict(row) for row in state.get("validation", [])]
        self.validation = {row.pop("epoch"): row for row in rows}

    @property
    def epochs_done(self) -> int:
        """How many epochs are done if none is under way; else 0."""
        return 0 if self._losses or self._unread else len(self.epoch_losses)

    def history(self) -> dict:
        """What ``history.json`` holds; epochs count from 0, as the names of checkpoints do."""
        losses = self.epoch_losses
        best = int(np.argmin(losses)) if losses else None
        found = {"epoch_losses": losses, "best_epoch": best, "seconds": round(self.seconds, 1)}
        if self.validation:
            found["validation"] = self._validation_rows()
        return found

    def _validation_rows(self) -> list[dict]:
        rows = sorted(self.validation.items())
        return [{"epoch": epoch, **figures} for epoch, figures in rows]

    def is_due(self, step: int) -> bool:
        """Whether there is a line after ``step``, from 0: every ``log_freq``, and the last."""
        return (step + 1) % self.log_freq == 0 or step + 1 == self.params["steps"]

    def read_losses(self) -> None:
        """Fetch the losses since the last call, means over all ranks, which call this together.

        Raises:
            DivergedError: one is not finite; names its step, sub-network and learning rate.
        """
        self._average()
        for step, logs in self._unread:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise self.diverged(f"loss is {loss}", step, logs)
            self._losses.append(loss)
        self._unread.clear()

    def _average(self) -> None:
        """Replace what the unread steps logged on this rank by its mean over ranks."""
        if world_size() < 2 or not self._unread:
            return
        figures = [
            [logs["loss"], logs["top1"], *(part for _, part in logs["parts"])]
            for _, logs in self._unread
        ]
        flat = paddle.stack([tensor.astype("float32") for row in figures for tensor in row])
        means = iter(mean_over_ranks(flat).tolist())
        for _, logs in self._unread:
            logs["loss"], logs["top1"] = next(means), next(means)
            logs["parts"] = [(code, next(means)) for code, _ in logs["parts"]]

    def diverged(self, what: str, step: int, logs: Mapping) -> DivergedError:
        """The error that says where it happened: step, sub-network and learning rate."""
        codes = [code for code, part in logs["parts"] if not math.isfinite(float(part))]
        code = (codes or [logs["arch"]])[0]
        return DivergedError(
            f"{what} at epoch {self._epoch + 1} step {step + 1}, learning rate {logs['lr']:.6g}, "
            f"sub-network {code}; earlier checkpoints are good: resume from them, lower lr"
        )

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._mark = self._batch_end = time.perf_counter()
        self._since = self._data_time = 0

    def on_train_batch_begin(self, step, logs=None):
        self._data_time += time.perf_counter() - self._batch_end

    def on_train_batch_end(self, step, logs=None):
        self._unread.append((step, logs))
        self._since += 1
        if self.is_due(step):
            self.read_losses()
            if is_main_process():
                self._log_line(step, logs)
            self._mark = time.perf_counter()
            self._since = self._data_time = 0
        self._batch_end = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.epoch_losses.append(sum(self._losses) / len(self._losses))
        self._losses = []
        if is_main_process():
            logger.info("epoch %d: peak memory %s", epoch + 1, peak_memory())

    def _log_line(self, step, logs):
        elapsed = time.perf_counter() - self._mark
        steps, epochs = self.params["steps"], self.params["epochs"]
        left = (epochs - self._epoch) * steps - step - 1
        eta = datetime.timedelta(seconds=round(left * elapsed / self._since))
        logger.info(
            "epoch %d/%d step %d/%d lr %.6f loss %.4f top1 %.4f ips %.1f images/s "
            "data %.3f s/step eta %s%s",
            self._epoch + 1,
            epochs,
            step + 1,
            steps,
            logs["lr"],
            float(logs["loss"]),
            float(logs["top1"]),
            self._since * self.params["batch_size"] / elapsed,
            self._data_time / self._since,
            eta,
            "" if logs["arch"] == LARGEST else f" arch {logs['arch']}",
        )


class Checkpoints(Callback):
    """``SAVE_DIR/0.pdparams``, ``1.pdparams``, ... with what a resumed run needs beside them.

    Between them, every ``save_steps`` steps, sets named ``EPOCH-STEP``, of which only the newest
    stays. On a signal the step under way is finished and saved, and the program ends.

    Args:
        options: ``save_dir``, ``save_freq``, ``save_steps`` and ``keep`` are used.
        log: whose losses are checked before a checkpoint and kept in it.
        stop: the signals to end on.
        run: what the run's result depends on, to be compared when resuming.
        run_id: whose sets these are; noted in the folder when training begins.
        about: what the weights' files say of themselves.
    """

    def __init__(
        self,
        options: Options,
        log: TrainLogger,
        stop: StopSignals,
        run: Mapping,
        run_id: str,
        about: Mapping,
    ):
        super().__init__()
        self.options = options
        self.folder = Path(options.save_dir)
        self.log = log
        self.stop = stop
        self.run = run
        self.run_id = run_id
        self.about = about

    def on_train_begin(self, logs=None):
        if is_main_process():
            remove_leftovers(self.folder)
            note_run(self.folder, self.run_id)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, step, logs=None):
        epoch, done, steps = self._epoch, step + 1, self.params["steps"]
        if done == steps and self._epoch_is_due(epoch):
            return
        stopped_by, every = self.stop.received, self.options.save_steps
        if (every and (epoch * steps + done) % every == 0) or stopped_by:
            self.save(f"{epoch}-{done}", epoch, done, logs)
        if stopped_by:
            self._end(stopped_by, f"after epoch {epoch + 1} step {done}")

    def on_epoch_end(self, epoch, logs=None):
        stopped_by = self.stop.received
        if self._epoch_is_due(epoch):
            self.save(str(epoch), epoch + 1, 0, logs)
        elif stopped_by:
            self.save(f"{epoch + 1}-0", epoch + 1, 0, logs)
        if is_main_process():
            write_json(self.folder / HISTORY, self.log.history())
        if stopped_by and epoch + 1 < self.params["epochs"]:
            self._end(stopped_by, f"after epoch {epoch + 1}")

    def _epoch_is_due(self, epoch: int) -> bool:
        return epoch % self.options.save_freq == 0 or epoch + 1 == self.params["epochs"]

    def save(self, name: str, epoch: int, step: int, logs: Mapping) -> None:
        """Write the set ``name``; the next step is ``step`` (from 0) of ``epoch`` (from 0).

        Raises:
            DivergedError: losses or weights are not finite; nothing is written.
        """
        losses = self.log.state()
        if not is_main_process():
            return
        progress = {
            "epoch": epoch,
            "step": step,
            "losses": losses,
            "generators": generators_state(),
            "scaler": self.model.gradients.state(),
            "run": self.run,
            "run_id": self.run_id,
        }
        try:
            save_training(
                self.folder / name,
                self.model.network,
                self.model._optimizer,
                progress,
                self.about,
            )
        except NotFiniteError as error:
            raise self.log.diverged(str(error), self.model.step, logs) from None
        logger.info("saved %s.pdparams", self.folder / name)
        self._remove_older(name)

    def _remove_older(self, newest: str) -> None:
        """Delete other sets within epochs and, beyond ``keep``, of whole epochs but the first.

        Epochs after the newest are of an earlier run in the same folder, and are left alone.
        """
        names = {path.name.partition(".")[0] for path in self.folder.iterdir()}
        sets = [match for match in map(SET_NAME.fullmatch, names) if match]
        old = [match[0] for match in sets if match[2] and match[0] != newest]
        if self.options.keep and newest.isdigit():
            epochs = sorted(int(match[1]) for match in sets if not match[2])
            whole = [epoch for epoch in epochs if 0 < epoch <= int(newest)]
            old += map(str, whole[: -self.options.keep])
        for name in old:
            remove_set(self.folder / name)

    def _end(self, number: int, where: str) -> None:
        name = signal.Signals(number).name
        # The launcher ends the others soon after the first: let rank 0 save before.
        barrier()
        if is_main_process():
            logger.warning("stopped by %s %s; continue with --resume auto", name, where)
        leave()
        raise Stopped(number)


class VisualDLWriter(Callback):
    """Writes curves: of training at every log line, of validation after epochs.

    Args:
        folder: where they go.
        log: which has averaged a step's loss over ranks before this is called, and holds what was
            measured after epochs.

    Raises:
        UserError: VisualDL is not installed.
    """

    def __init__(self, folder: str, log: TrainLogger):
        super().__init__()
        try:
            from visualdl import LogWriter
        except ImportError as error:
            raise UserError(
                f"--visualdl_dir needs VisualDL ({error}): pip install visualdl 'numpy<2', or "
                "leave it out"
            ) from None
        self.log = log
        self._writer = LogWriter(folder)
        self._written: set[int] = set()

    def on_train_begin(self, logs=None):
        # Of a resumed run, too: it writes to a new file, and VisualDL shows the newest.
        self._write_validation()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._mark, self._since = time.perf_counter(), 0

    def on_train_batch_end(self, step, logs=None):
        self._since += 1
        if not self.log.is_due(step):
            return
        done = self._epoch * self.params["steps"] + step + 1
        loss, top1 = float(logs["loss"]), float(logs["top1"])
        ips = self._since * self.params["batch_size"] / (time.perf_counter() - self._mark)
        points = {"loss": loss, "top1": top1, "lr": logs["lr"], "ips": ips}
        for name, value in points.items():
            self._writer.add_scalar(f"train/{name}", value, done)
        self._mark, self._since = time.perf_counter(), 0

    def on_epoch_end(self, epoch, logs=None):
        self._write_validation()

    def _write_validation(self) -> None:
        """Write what was measured since the last call, at the step after which it was."""
        for epoch, figures in self.log.validation.items():
            if epoch in self._written:
                continue
            self._written.add(epoch)
            for name, value in figures.items():
                if value is not None:
                    self._writer.add_scalar(
                        f"validation/{name}", value, (epoch + 1) * self.params["steps"]
                    )

    def close(self) -> None:
        """Write out what VisualDL holds back, up to two minutes' points."""
        self._writer.close()
