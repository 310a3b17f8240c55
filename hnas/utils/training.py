"""A run of training: the optimizer that flags describe, the loop, its log and checkpoints."""

from __future__ import annotations

import datetime
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import numpy as np
import paddle

from hnas.base.device import peak_memory
from hnas.base.errors import Stopped, UserError
from hnas.base.files import remove_leftovers, write_json
from hnas.dataset.loader import EpochLoader
from hnas.models.convolution import use_onednn
from hnas.parallel.distributed import (
    GradientExchange,
    StopSignals,
    agree,
    barrier,
    copy_from_main_process,
    is_main_process,
    leave,
    sum_over_ranks,
    world_size,
)
from hnas.programs.options import Options
from hnas.search_space import RESNET48
from hnas.utils.hapi_wrapper import (
    GradientStep,
    ResumableModel,
    learning_rate,
    momentum_optimizer,
    swinging_rate,
)
from hnas.utils.starting import describe_run, resume
from hnas.utils.validation import Figures, figures_text
from hnas.weights.checkpoint import (
    RUN_NOTE,
    SET_NAME,
    generators_state,
    remove_set,
    restore_generators,
    save_training,
)
from hnas.weights.loading import PARAMS, NotFiniteError, write_state

logger = logging.getLogger(__name__)

LARGEST = RESNET48.largest().code
"""Of every search space; log lines of steps that train it alone leave it out."""

LARGEST_RISE = np.array([2.0, np.inf, 10.0])
"""Of loss, top-1 and gradient norm since the first step, in a run that does not break."""


def prepare(model: ResumableModel, options: Options, steps_per_epoch: int) -> None:
    """Give a model the optimizer and learning rate that the flags describe.

    Raises:
        UserError: the batch cannot be split as ``--accumulate`` says, or ``--amp O2``.
    """
    if options.batch_size % options.accumulate:
        raise UserError(
            f"--batch_size {options.batch_size} is not a multiple of "
            f"--accumulate {options.accumulate}"
        )
    if options.amp == "O2":
        raise UserError("--amp O2 is for stage 3; train with O1, which keeps float32 weights")
    total_batch = options.batch_size * world_size()
    if options.lr_schedule == "swing":
        schedule = swinging_rate(options.lr, total_batch, options.max_epoch)
    else:
        schedule = learning_rate(
            options.lr,
            total_batch,
            options.warmup * steps_per_epoch,
            options.max_epoch * steps_per_epoch,
        )
    optimizer = momentum_optimizer(
        model.network, schedule, options.momentum, options.weight_decay, options.clip_norm
    )
    if options.onednn:
        teacher = getattr(model, "teacher", None)
        use_onednn(model.network, *([teacher] if teacher is not None else []))
    model.prepare(optimizer, GradientStep(optimizer, options.accumulate, options.amp))


def fit(
    model: ResumableModel,
    options: Options,
    loader: EpochLoader,
    measure: Callable[[], Figures] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Train from the start or from where ``--resume`` says, save, and record the losses.

    ``SAVE_DIR/final.pdparams`` holds the last weights, ``SAVE_DIR/history.json`` the mean loss of
    each epoch and what ``measure`` found after it, which all processes call. ``files`` has the
    digests of the weights that enter training: ``teacher`` and ``initial_weights``.

    Raises:
        Stopped: by a signal, after saving.
        UserError: the loss is not finite any more.
    """
    run = Run(model, options, loader, measure, files)
    folder = options.visualdl_dir if is_main_process() else ""
    with StopSignals() as run.stop, curves_in(folder) as run.log.curves:
        if world_size() > 1:
            agree((run.begun, run.first), "the epoch and step to start from")
            digests = [int(run.settings[name][:15], 16) for name in files or ()]
            agree(digests, "the weights that are given")
            copy_from_main_process([*model.network.state_dict().values()])
            trained = [p for p in model.network.parameters() if not p.stop_gradient]
            run.stop = model.exchange = GradientExchange(trained, run.stop)
        run.train()
    if is_main_process():
        # Also when nothing was left to train: a kill may have come just before either.
        run.write_history()
        write_state(run.folder / f"final{PARAMS}", model.network.state_dict(), run.about)
    barrier()
    leave()


class Run:
    """The loop over epochs, and the sets of files that it can be resumed from.

    ``SAVE_DIR/0.pdparams``, ``1.pdparams``, ... are whole epochs'. Between them sets are named
    ``EPOCH-STEP``, and only the newest stays. On a signal (``stop``) the step under way is finished
    and saved, and the program ends.
    """

    stop: StopSignals | GradientExchange

    def __init__(self, model, options, loader, measure, files):
        self.model, self.options, self.loader, self.measure = model, options, loader, measure
        self.folder = Path(options.save_dir)
        self.about = about_weights(options, loader)
        self.settings = {**describe_run(options, loader), **(files or {})}
        self.log = TrainLogger(options.log_freq, options.max_epoch, len(loader), loader.total_batch)
        self.log.guess_loss = model.guess_loss
        found = resume(model, options, self.settings, len(loader))
        self.begun, self.first, self.run_id, losses = found
        if losses is not None:
            self.log.restore(losses)

    def train(self) -> None:
        """Make all steps that are left."""
        begun, first, epochs = self.begun, self.first, self.options.max_epoch
        if begun >= epochs:
            logger.info("all %d epochs are done already: nothing is left to train", epochs)
        else:
            logger.info("training from epoch %d step %d", begun + 1, first + 1)
        if is_main_process():
            remove_leftovers(self.folder)
            write_json(self.folder / RUN_NOTE, {"run_id": self.run_id})
        self.log.draw_validation(self.log.validation)
        if begun and not first and begun - 1 not in self.log.validation:
            # A kill came between the epoch's checkpoint and the end of its measurement.
            self.validate(begun - 1)
        logs = {}
        for epoch in range(begun, epochs):
            self.log.begin_epoch(epoch)
            with closing(self.model.train_epoch(self.loader, epoch, first)) as steps:
                for step, logs in steps:
                    self.log.end_step(step, logs)
                    if step + 1 < len(self.loader):
                        self.save_if_due(epoch, step + 1, logs)
            self.log.end_epoch()
            self.save_if_due(epoch + 1, 0, logs)
            self.validate(epoch)
            first = 0

    def save_if_due(self, epoch: int, step: int, logs: Mapping) -> None:
        """Save, where the next step is ``step`` of ``epoch``, both from 0; end if told to."""
        options, stopped_by = self.options, self.stop.received
        whole = not step and ((epoch - 1) % options.save_freq == 0 or epoch == options.max_epoch)
        every = options.save_steps
        if whole or stopped_by or (every and (epoch * len(self.loader) + step) % every == 0):
            self.save(str(epoch - 1) if whole else f"{epoch}-{step}", epoch, step, logs)
        if not step:
            self.write_history()
        if stopped_by and epoch < options.max_epoch:
            name = signal.Signals(stopped_by).name
            where = f"epoch {epoch + 1} step {step}" if step else f"epoch {epoch}"
            # The launcher ends the others soon after the first: let rank 0 save before.
            barrier()
            if is_main_process():
                again = "the same command" if options.arch else "--resume auto"
                logger.warning("stopped by %s after %s; continue with %s", name, where, again)
            leave()
            raise Stopped(stopped_by)

    def save(self, name: str, epoch: int, step: int, logs: Mapping) -> None:
        """Write the set ``name``; nothing, where losses or weights are not finite."""
        losses = self.log.state()
        if not is_main_process():
            return
        stem, model = self.folder / name, self.model
        progress = {
            "epoch": epoch,
            "step": step,
            "losses": losses,
            "generators": generators_state(),
            "scaler": model.gradients.state(),
            "run": self.settings,
            "run_id": self.run_id,
        }
        try:
            save_training(stem, model.network, model.optimizer, progress, self.about)
        except NotFiniteError as error:
            raise self.log.diverged(str(error), model.step, logs) from None
        logger.info("saved %s.pdparams", stem)
        self._remove_older(name)

    def validate(self, epoch: int) -> None:
        """Measure after ``epoch``, from 0, if it is due; what is drawn meanwhile is taken back."""
        every = self.options.eval_freq
        if self.measure is None or not every or (epoch + 1) % every:
            return
        generators = generators_state()
        figures = self.log.validation[epoch] = self.measure()
        restore_generators(generators)
        self.log.draw_validation([epoch])
        if is_main_process():
            logger.info("epoch %d validation: %s", epoch + 1, figures_text(figures))
        self.write_history()
        barrier()

    def write_history(self) -> None:
        """Write ``history.json``: losses and figures so far."""
        if is_main_process():
            write_json(self.folder / "history.json", self.log.history())

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


class TrainLogger:
    """A line every ``log_freq`` steps and at an epoch's end; keeps the mean loss of each epoch.

    Losses are read from the device when a line is due or a checkpoint is about to be written,
    and checked then, so a step never waits for its loss and no checkpoint follows a bad one.
    A run has ``epochs`` of ``steps`` on ``batch`` images. ``curves``, if any, get points at every
    line and after epochs' validation.
    """

    curves = None
    guess_loss = 0.0
    """As :class:`ResumableModel` has it."""

    def __init__(self, log_freq: int, epochs: int, steps: int, batch: int):
        self.log_freq, self.epochs, self.steps, self.batch = log_freq, epochs, steps, batch
        self.epoch_losses: list[float] = []
        self.epoch_norms: list[float] = []
        """Mean norms of epochs' gradients; NaN: of an earlier version, which did not know them."""
        self.validation: dict[int, Figures] = {}
        """What was measured after epochs, from 0."""
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._first: np.ndarray | None = None
        """Loss, top-1 and gradient norm of the first step of this process."""
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
            "epoch_norms": np.array(self.epoch_norms, np.float64),
            "step_norms": np.array(self._norms, np.float64),
            "seconds": self._seconds(),
            "validation": self._validation_rows(),
        }

    def restore(self, state: Mapping) -> None:
        """Go on from what :meth:`state` gave."""
        self.epoch_losses = state["epoch_losses"].tolist()
        self._losses = state["step_losses"].tolist()
        self._earlier_seconds = state["seconds"]
        # Checkpoints of earlier versions have no norms and no figures.
        losses = {"epoch_norms": self.epoch_losses, "step_norms": self._losses}
        self.epoch_norms, self._norms = (
            state.get(name, np.full(len(values), np.nan)).tolist()
            for name, values in losses.items()
        )
        rows = [dict(row) for row in state.get("validation", [])]
        self.validation = {row.pop("epoch"): row for row in rows}

    def history(self) -> dict:
        """What ``history.json`` holds; epochs count from 0, as the names of checkpoints do."""
        losses, by = self.epoch_losses, "epoch_losses"
        best = int(np.argmin(losses)) if losses else None
        # Validation images tell more than losses, and their ranking tells most.
        for name in ("largest_top1", "kendall_tau_b"):
            figures = [(row.get(name), -epoch) for epoch, row in self.validation.items()]
            known = [figure for figure in figures if figure[0] is not None]
            if known:
                best, by = -max(known)[1], name
        norms = [None if math.isnan(norm) else norm for norm in self.epoch_norms]
        found = {"epoch_losses": losses, "epoch_gradient_norms": norms, "best_epoch": best}
        found["best_by"] = by
        found["seconds"] = round(self._seconds(), 1)
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
        # A loss scaled for half precision skips steps whose gradients are not finite.
        finite = [norm for norm in self._norms if math.isfinite(norm)]
        self.epoch_norms.append(sum(finite) / len(finite) if finite else math.nan)
        self._losses, self._norms = [], []
        if is_main_process():
            logger.info("epoch %d: peak memory %s", self.epoch + 1, peak_memory())

    def read_losses(self) -> None:
        """Fetch and check the losses since the last call, means over ranks, which all call this."""
        self._average()
        for step, logs in self._unread:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise self.diverged(f"loss is {loss}", step, logs)
            norm = float(logs["norm"])
            self._losses.append(loss)
            self._norms.append(norm)
            self._line.append((loss, float(logs["top1"]), norm))
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
            f"sub-network {code}; earlier checkpoints are good: resume from them, lower lr"
        )

    def _log_line(self, step: int, logs: Mapping) -> None:
        elapsed = time.perf_counter() - self._mark
        done = self.epoch * self.steps + step + 1
        left = self.epochs * self.steps - done
        since = len(self._line)
        loss, top1, norm = np.mean(self._line, axis=0).tolist()
        ips = since * self.batch / elapsed
        figures = {"loss": loss, "top1": top1, "gradient_norm": norm, "lr": logs["lr"], "ips": ips}
        self._draw("train", figures, done)
        logger.info(
            "epoch %d/%d step %d/%d lr %.6f loss %.4f top1 %.4f norm %.3g ips %.1f images/s "
            "data %.3f s/step eta %s%s",
            self.epoch + 1,
            self.epochs,
            step + 1,
            self.steps,
            logs["lr"],
            loss,
            top1,
            norm,
            ips,
            self._waited / since,
            datetime.timedelta(seconds=round(left * elapsed / since)),
            "" if logs["arch"] == LARGEST else f" arch {logs['arch']}",
        )

    def _warn_if_breaking(self) -> None:
        """Once an epoch: loss or gradients are far above those of this process's first step."""
        means = np.mean(self._line, axis=0)
        if self._first is None:
            self._first = np.array(self._line[0])
        # One more than the multiple: near zero a multiple is soon reached.
        most = np.maximum(LARGEST_RISE * self._first + 1, [self.guess_loss, 0, 0])
        if self._warned < self.epoch and (means > most).any():
            self._warned = self.epoch
            logger.warning(
                "training is breaking: loss %.3g and gradient norm %.3g after %.3g and %.3g at the "
                "first step; start anew with clip_norm 10, a longer warmup or a lower lr",
                *(*means[[0, 2]], *self._first[[0, 2]]),
            )

    def draw_validation(self, epochs: Iterable[int]) -> None:
        """Points of what was measured after these epochs, at the step after which it was."""
        for epoch in epochs:
            self._draw("validation", self.validation[epoch], (epoch + 1) * self.steps)

    def _draw(self, group: str, figures: Figures, done: int) -> None:
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


def about_weights(options: Options, loader: EpochLoader) -> dict:
    """What a file of weights says of how they were trained; see :class:`Checkpoint`."""
    classes = list(loader.dataset.images.classes)
    about = {"backbone": options.backbone, "freeze_bn": options.freeze_bn, "classes": classes}
    return {**about, "arch": options.arch} if options.arch else about
