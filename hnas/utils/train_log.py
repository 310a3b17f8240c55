"""What a run of training says of itself: log lines, losses of epochs, curves."""

from __future__ import annotations

import datetime
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import paddle

from hnas.base.device import peak_memory
from hnas.base.errors import UserError
from hnas.parallel.distributed import is_main_process, sum_over_ranks, world_size
from hnas.search_space import RESNET48
from hnas.utils.validation import Figures

logger = logging.getLogger(__name__)

LARGEST = RESNET48.largest().code
"""Of every search space; log lines of steps that train it alone leave it out."""

LARGEST_RISE = np.array([2.0, 10.0])
"""Of loss and gradient norm since the first step, in a run that does not break."""


class TrainLogger:
    """A line every ``log_freq`` steps, two at an epoch's end; keeps the mean loss of each epoch.

    Losses are read from the device when a line is due or a checkpoint is about to be written,
    and checked then, so a step never waits for its loss and no checkpoint follows a bad one.
    A run has ``epochs`` of ``steps`` on ``batch`` images. ``curves``, if any, get points at every
    line and after epochs' validation.
    """

    curves = None
    guess_loss = 0.0
    """As :class:`ResumableModel` has it."""
    advice: Callable[[], str] = str
    """What to do where training broke, for the end of an error."""

    def __init__(self, log_freq: int, epochs: int, steps: int, batch: int):
        self.log_freq, self.epochs, self.steps, self.batch = log_freq, epochs, steps, batch
        self.epoch_losses: list[float] = []
        self.validation: dict[int, Figures] = {}
        """What was measured after epochs, from 0."""
        self._losses: list[float] = []
        self._first: np.ndarray | None = None
        """Loss and gradient norm of the first step of this process."""
        self._warned = -1
        """The epoch that was warned of."""
        self._unread: list[tuple[int, dict]] = []
        self._earlier_seconds = 0.0
        self._began = time.perf_counter()

    def state(self) -> dict:
        """The losses and figures so far, for a checkpoint."""
        self.read_losses()
        return {
            "epoch_losses": np.array(self.epoch_losses, np.float64),
            "step_losses": np.array(self._losses, np.float64),
            "seconds": self._seconds(),
            "validation": self._validation_rows(),
        }

    def restore(self, state: Mapping) -> None:
        """Go on from what :meth:`state` gave."""
        self.epoch_losses = state["epoch_losses"].tolist()
        self._losses = state["step_losses"].tolist()
        self._earlier_seconds = state["seconds"]
        # Checkpoints of earlier versions have no figures.
        rows = [dict(row) for row in state.get("validation", [])]
        self.validation = {row.pop("epoch"): row for row in rows}

    def history(self) -> dict:
        """What ``history.json`` holds; epochs count from 0, as the names of checkpoints do."""
        losses, by = self.epoch_losses, "epoch_losses"
        best = int(np.argmin(losses)) if losses else None
        # Validation images tell more than losses, and their ranking tells most.
        for name in ("top1", "largest_top1", "kendall_tau_b"):
            figures = [(row.get(name), -epoch) for epoch, row in self.validation.items()]
            known = [figure for figure in figures if figure[0] is not None]
            if known:
                best, by = -max(known)[1], name
        seconds = round(self._seconds(), 1)
        found = {"epoch_losses": losses, "best_epoch": best, "best_by": by, "seconds": seconds}
        return {**found, "validation": self._validation_rows()} if self.validation else found

    def _seconds(self) -> float:
        """Time spent on this run, the parts before resuming included."""
        return self._earlier_seconds + time.perf_counter() - self._began

    def _validation_rows(self) -> list[dict]:
        return [{"epoch": epoch, **row} for epoch, row in sorted(self.validation.items())]

    def begin_epoch(self, epoch: int) -> None:
        """The steps that follow are of ``epoch``, from 0."""
        self.epoch = epoch
        self._begin_line()

    def _begin_line(self) -> None:
        self._mark, self._waited = time.perf_counter(), 0.0
        self._line: list[tuple[float, float, float]] = []

    def end_step(self, step: int, logs: dict) -> None:
        """Take what step number ``step``, from 0, has logged; see :class:`ResumableModel`."""
        self._unread.append((step, logs))
        self._waited += logs["waited"]
        if (step + 1) % self.log_freq == 0 or step + 1 == self.steps:
            self.read_losses()
            if is_main_process():
                self._log_line(step, logs)
                self._warn_if_breaking()
            self._begin_line()

    def end_epoch(self) -> None:
        """Keep the epoch's mean loss."""
        self.epoch_losses.append(sum(self._losses) / len(self._losses))
        self._losses = []

    def tell_progress(self) -> None:
        """Say how far the run is, and when it will end at the pace that it had until now."""
        done, gone = self.epoch + 1, self._seconds()
        left = gone / done * (self.epochs - done)
        told = "run: epoch %d of %d done, %s gone, about %s left; peak memory %s"
        times = (datetime.timedelta(seconds=round(seconds)) for seconds in (gone, left))
        logger.info(told, done, self.epochs, *times, peak_memory())

    def read_losses(self) -> None:
        """Fetch and check the losses since the last call, means over ranks, which all call this."""
        self._average()
        for step, logs in self._unread:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise self.diverged(f"loss is {loss}", step, logs)
            self._losses.append(loss)
            self._line.append((loss, float(logs["top1"]), float(logs["norm"])))
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
        means = iter((sum_over_ranks(flat) / world_size()).tolist())
        for _, logs in self._unread:
            logs["loss"], logs["top1"] = next(means), next(means)
            logs["parts"] = [(code, next(means)) for code, _ in logs["parts"]]

    def diverged(self, what: str, step: int, logs: Mapping) -> UserError:
        """The error that says where it happened: step, sub-network and learning rate."""
        codes = [code for code, part in logs["parts"] if not math.isfinite(float(part))]
        code = (codes or [logs["arch"]])[0]
        return UserError(
            f"{what} at epoch {self.epoch + 1} step {step + 1}, learning rate {logs['lr']:.6g}, "
            f"sub-network {code}; {self.advice()}"
        )

    def _log_line(self, step: int, logs: Mapping) -> None:
        elapsed = time.perf_counter() - self._mark
        done = self.epoch * self.steps + step + 1
        left = self.epochs * self.steps - done
        since = len(self._line)
        loss, top1, norm = self._means()
        ips = since * self.batch / elapsed
        figures = {"loss": loss, "top1": top1, "gradient_norm": norm, "lr": logs["lr"], "ips": ips}
        self.draw("train", figures, done)
        eta = datetime.timedelta(seconds=round(left * elapsed / since))
        arch = "" if logs["arch"] == LARGEST else f" arch {logs['arch']}"
        logger.info(
            f"epoch {self.epoch + 1}/{self.epochs} step {step + 1}/{self.steps} "
            f"lr {logs['lr']:.6f} loss {loss:.4f} top1 {top1:.4f} norm {norm:.3g} "
            f"ips {ips:.1f} images/s data {self._waited / since:.3f} s/step eta {eta}{arch}"
        )

    def _means(self) -> tuple[float, float, float]:
        """Of loss, top-1 and gradient norm since the last line; of norms without skipped steps."""
        loss, top1, norms = np.array(self._line).T
        norms = norms[~np.isnan(norms)]
        return loss.mean(), top1.mean(), norms.mean() if norms.size else math.nan

    def _warn_if_breaking(self) -> None:
        """Once an epoch: loss or gradients are far above those of this process's first step."""
        loss, _, norm = self._means()
        if self._first is None:
            made = [(own, each) for own, _, each in self._line if not math.isnan(each)]
            if not made:
                return
            self._first = np.array(made[0])
        means = np.array([loss, norm])
        # One more than the multiple: near zero a multiple is soon reached.
        most = np.maximum(LARGEST_RISE * self._first + 1, [self.guess_loss, 0])
        if self._warned < self.epoch and (means > most).any():
            self._warned = self.epoch
            logger.warning(
                "training is breaking: loss %.3g and gradient norm %.3g after %.3g and %.3g at the "
                "first step; %s",
                *(*means, *self._first, self.advice()),
            )

    def draw(self, group: str, figures: Figures, done: int) -> None:
        """A point of each figure, at the step after which it was found."""
        if self.curves is not None:
            for name, value in figures.items():
                if value is not None:
                    self.curves.add_scalar(f"{group}/{name}", value, done)


def curves_in(folder: str) -> AbstractContextManager:
    """VisualDL's writer of curves to a folder; without one None.

    Raises:
        UserError: VisualDL is not installed.
    """
    if not folder:
        return nullcontext()
    try:
        from visualdl import LogWriter
    except ImportError as error:
        raise UserError(
            f"--visualdl_dir needs VisualDL ({error}): pip install visualdl 'numpy<2', or leave it "
            "out"
        ) from None
    return LogWriter(folder)
