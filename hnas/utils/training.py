"""A run of training: the optimizer that flags describe, the loop, its log and checkpoints."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from shlex import quote
from zlib import crc32

from hnas.base.errors import Stopped, UserError
from hnas.base.files import remove_leftovers, write_json
from hnas.dataset.image_folder import DataError
from hnas.dataset.loader import EpochLoader
from hnas.evaluation.counts import LogitsError
from hnas.models.convolution import use_onednn
from hnas.parallel.distributed import (
    GradientExchange,
    StopSignals,
    agree,
    barrier,
    copy_from_main_process,
    is_main_process,
    leave,
    world_size,
)
from hnas.programs.flags import AUTO
from hnas.programs.options import Options
from hnas.utils.hapi_wrapper import (
    GradientStep,
    ResumableModel,
    learning_rate,
    momentum_optimizer,
    swinging_rate,
)
from hnas.utils.starting import describe_run, named_set, resume
from hnas.utils.train_log import TrainLogger, curves_in
from hnas.utils.validation import Figures, figures_text
from hnas.weights.checkpoint import (
    RUN_NOTE,
    SET_NAME,
    newest_set,
    remove_set,
    save_training,
    sets_in,
)
from hnas.weights.loading import PARAMS, NotFiniteError, write_state

logger = logging.getLogger(__name__)


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
) -> Figures | None:
    """Train from the start or from where ``--resume`` says, save, and record the losses.

    Gives what ``measure`` found of the last weights, None where nothing was measured now.

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
            for name, value in run.settings.items():
                if name != "image_pixels":  # which another Pillow may decode a little differently
                    agree([crc32(repr(value).encode())], f"{name} (here: {value})")
            copy_from_main_process([*model.network.state_dict().values()])
            trained = [p for p in model.network.parameters() if not p.stop_gradient]
            run.stop = model.exchange = GradientExchange(trained, run.stop)
        found = run.train()
    if is_main_process():
        # Also when nothing was left to train: a kill may have come just before either.
        run.write_history()
        write_state(run.folder / f"final{PARAMS}", model.network.state_dict(), run.about)
    barrier()
    leave()
    return found


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
        self.log.guess_loss, self.log.advice = model.guess_loss, self.advice
        found = resume(model, options, self.settings, len(loader))
        self.begun, self.first, self.run_id, losses = found
        if losses is not None:
            self.log.restore(losses)

    def train(self) -> Figures | None:
        """Make all steps that are left; gives what was measured after the last."""
        begun, first, epochs = self.begun, self.first, self.options.max_epoch
        found = None
        if begun >= epochs:
            logger.info("all %d epochs are done already: nothing is left to train", epochs)
        else:
            logger.info("training from epoch %d step %d", begun + 1, first + 1)
        if is_main_process():
            remove_leftovers(self.folder)
            write_json(self.folder / RUN_NOTE, {"run_id": self.run_id})
        if named_set(self.options) is not None:
            # As the newest: else --resume auto would go on from what this run leaves behind.
            self.save(f"{begun}-{first}" if first else str(begun - 1), begun, first, {})
        if begun and not first and begun - 1 not in self.log.validation:
            # A kill came between the epoch's checkpoint and the end of its measurement.
            found = self.validate(begun - 1)
        logs = {}
        for epoch in range(begun, epochs):
            self.log.begin_epoch(epoch)
            done = first
            try:
                with closing(self.model.train_epoch(self.loader, epoch, first)) as steps:
                    for step, logs in steps:
                        self.log.end_step(step, logs)
                        done = step + 1
                        if done < len(self.loader):
                            self.save_if_due(epoch, done, logs)
            except DataError:
                # What was trained before a bad image is whole; of several ranks one cannot save.
                if done > first and world_size() == 1:
                    self.save(f"{epoch}-{done}", epoch, done, logs)
                raise
            self.log.end_epoch()
            self.save_if_due(epoch + 1, 0, logs)
            found = self.validate(epoch)
            self.log.tell_progress()
            first = 0
        return found

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
                same = options.arch or os.environ.get("PINAS_STEP")
                again = "the same command" if same else "--resume auto"
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

    def validate(self, epoch: int) -> Figures | None:
        """Measure after ``epoch``, from 0, if it is due."""
        every = self.options.eval_freq
        if self.measure is None or not every or (epoch + 1) % every:
            return None
        try:
            figures = self.log.validation[epoch] = self.measure()
        except LogitsError as error:
            told = str(error).partition(";")[0]
            raise UserError(f"after epoch {epoch + 1} {told}; {self.advice()}") from None
        self.log.draw("validation", figures, (epoch + 1) * len(self.loader))
        logger.info("epoch %d validation: %s", epoch + 1, figures_text(figures))
        self.write_history()
        barrier()
        return figures

    def advice(self) -> str:
        """What to do where training broke: which checkpoint to go on from, if any, and how."""
        options, validation = self.options, self.log.validation
        remedy = f"--lr {options.lr / 3:.2g}"
        if options.clip_norm == AUTO:  # which follows the rate
            remedy = f"--clip_norm {self.model.optimizer._grad_clip.clip_norm / 3:.2g}"
        elif not options.clip_norm:
            remedy = "--clip_norm auto"
        if not is_main_process():
            return "the first process says what to do"  # it alone has measured
        if options.arch:
            return f"start anew with {remedy} and another --save_dir"
        if step := os.environ.get("PINAS_STEP"):  # of local_own.sh, which has variables of its own
            variable = f"{step}_{remedy.removeprefix('--').replace(' ', '=')}"
            return f"remove {self.folder}, and what came after it, and give {variable}"
        good = {str(e): row for e, row in validation.items() if row and "broken" not in row}
        found = newest_set(self.folder, self.run_id, good)
        if found is None:
            anew = " without --resume," if options.resume else ""
            return f"no checkpoint of this run is known to be good: start anew{anew} with {remedy}"
        found_good = figures_text(good[found.name])
        known = f"{found}.pdparams is this run's last good checkpoint ({found_good})"
        return f"{known}: go on from it with --resume {quote(str(found))} {remedy}"

    def write_history(self) -> None:
        """Write ``history.json``: losses and figures so far."""
        if is_main_process():
            write_json(self.folder / "history.json", self.log.history())

    def _remove_older(self, newest: str) -> None:
        """Delete other sets within epochs and, beyond ``keep``, of whole epochs but the first.

        An earlier run's in the same folder, and epochs after the newest, are left alone.
        """
        names = {path.name.partition(".")[0] for path in self.folder.iterdir()}
        names -= {s.name for s, kept in sets_in(self.folder) if kept["run_id"] != self.run_id}
        sets = [match for match in map(SET_NAME.fullmatch, names) if match]
        old = [match[0] for match in sets if match[2] and match[0] != newest]
        if self.options.keep and newest.isdigit():
            epochs = sorted(int(match[1]) for match in sets if not match[2])
            whole = [epoch for epoch in epochs if 0 < epoch <= int(newest)]
            old += map(str, whole[: -self.options.keep])
        for name in old:
            remove_set(self.folder / name)


def about_weights(options: Options, loader: EpochLoader) -> dict:
    """What a file of weights says of how they were trained; see :class:`Checkpoint`."""
    classes = list(loader.dataset.images.classes)
    about = {"backbone": options.backbone, "freeze_bn": options.freeze_bn, "classes": classes}
    return {**about, "arch": options.arch} if options.arch else about
