"""Steps of both training stages: against a CPU, in parts, in half precision, saved and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import paddle

from hnas.base.device import set_deterministic
from hnas.evaluation.variants import Precision
from hnas.models.convolution import use_onednn
from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI
from hnas.tools.check_device.arithmetic import BFLOAT16, FLOAT16, FLOAT32, TF32, precisions
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.results import (
    Result,
    at_most,
    differing,
    guarded,
    holds,
    not_here,
    relative_error,
)
from hnas.tools.check_device.subjects import CLASSES, images, labels, seed_weights
from hnas.utils.checkpoint import load_training, save_training
from hnas.utils.gradient_step import GradientStep, momentum_optimizer
from hnas.utils.hapi_wrapper import DistillationModel, ResumableModel
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FirstPlaceSampler, RandomSampler

STEPS, QUICK_STEPS, REPEATED = 20, 4, 4
BATCH, SIZE = 8, 32
RATE = 0.002
SCALE = 1024.0
"""Of losses in float16: low enough that no step is passed over for an overflow."""
FIRST_LOSS = {FLOAT32: 1e-5, TF32: 1e-3, BFLOAT16: 1e-2, FLOAT16: 2e-3}
"""Relative difference of the first step's loss. These limits are some ten times what rounding all
convolutions' inputs and outputs does on a CPU."""
DIRECTION = {FLOAT32: 1e-6, TF32: 1e-3, BFLOAT16: 2e-2, FLOAT16: 3e-3}
"""One minus the cosine between the first step's gradients."""
LENGTH = {FLOAT32: 1e-4, TF32: 5e-3, BFLOAT16: 5e-2, FLOAT16: 1e-2}
"""Relative difference of their lengths."""
CURVE = {FLOAT32: 5e-3, TF32: 5e-2}
"""Relative difference of any of the losses."""
ACCUMULATED = 1e-3
"""Difference of two gradients in float32, over their largest value."""


class RecordedStep(GradientStep):
    """Keeps the gradients of the first step, as the optimizer gets them.

    Args:
        network: whose.
        optimizer, accumulate, amp: as in :class:`GradientStep`.
        half: the type of mixed precision; None: as usual.
    """

    def __init__(self, network, optimizer, accumulate=1, amp="O0", half: str | None = None):
        super().__init__(optimizer, accumulate, amp)
        if half:
            self._dtype = half
            scaled = half == "float16"
            self.scaler = paddle.amp.GradScaler(init_loss_scaling=SCALE) if scaled else None
        self._network = network
        self.gradient: np.ndarray | None = None
        """Of all parameters, flat; zero where there is none."""

    def step(self) -> None:
        if self.gradient is None:
            parts = [
                np.zeros(p.size, np.float32) if p.grad is None else p.grad.numpy().ravel()
                for p in self._network.parameters()
            ]
            scale = float(np.asarray(self.state().get("scale", 1.0)).item())
            self.gradient = np.concatenate(parts) / scale
        super().step()


def stage1(frozen: bool = True) -> ResumableModel:
    """Contrastive, two sub-networks a step."""
    network = build_network("resnet48pinasv2_mini", CLASSES, queue_size=4 * BATCH, temperature=0.2)
    seed_weights(network, 1)
    network.reset_key_encoder()
    if frozen:
        freeze_statistics(network)
    return ContrastiveModel(network, RandomSampler(RESNET48_MINI, 1, 2))


def stage2(frozen: bool = True) -> ResumableModel:
    """Distillation, two or three sub-networks a step."""
    network = build_network("resnet48_mini", CLASSES)
    teacher = build_network("resnet48_mini", CLASSES, elastic=False)
    seed_weights(network, 2)
    seed_weights(teacher, 3)
    if frozen:
        freeze_statistics(network)
    return DistillationModel(network, teacher, FirstPlaceSampler(RESNET48_MINI, 1, 2, 40))


STAGES: dict[str, Callable[..., ResumableModel]] = {"stage 1": stage1, "stage 2": stage2}
"""By default at frozen statistics, as the recipe has it: by those of so small batches and maps
gradients would depend on the last bits."""


def prepared(model: ResumableModel, onednn: bool, **how) -> ResumableModel:
    """A model with its optimizer; ``how`` are :class:`RecordedStep`'s."""
    optimizer = momentum_optimizer(model.network, RATE, 0.9, 1e-4)
    if onednn:
        use_onednn(model.network)
    model.prepare(optimizer, RecordedStep(model.network, optimizer, **how))
    return model


def run(model: ResumableModel, first: int, last: int) -> np.ndarray:
    """Train the steps from ``first`` to before ``last``; their losses."""
    losses = []
    for step in range(first, last):
        model.epoch, model.step = 0, step
        views = [images(BATCH, SIZE, 2 * step + view) for view in range(2)]
        parts = views if isinstance(model, ContrastiveModel) else [views[0], labels(BATCH, step)]
        losses.append(float(model.train_batch([paddle.to_tensor(part) for part in parts])["loss"]))
    return np.array(losses)


def steps(machine: Machine) -> int:
    """How many are compared."""
    return QUICK_STEPS if machine.plan.quick else STEPS


def expected(machine: Machine) -> dict[str, np.ndarray]:
    """For the twin: losses and first gradients of both stages by Paddle's plain operators."""
    found = {}
    for name, build in STAGES.items():
        model = prepared(build(), onednn=False)
        found[f"{name} losses"] = run(model, 0, steps(machine))
        found[f"{name} gradient"] = model.gradients.gradient
    return found


def check(machine: Machine) -> Iterator[Result]:
    """(f) Training on the device."""
    right = machine.expected("training")
    for name, build in STAGES.items():
        for precision, missing in precisions(machine):
            row = f"{name} in {precision.value}"
            if missing:
                yield not_here(row, missing)
            else:
                yield from guarded(row, against_cpu, name, build, precision, right)
        if machine.plan.tf32 == "off":
            row = f"{name}, a batch in two parts"
            yield from guarded(row, accumulated, row, build)


def check_repeat(machine: Machine) -> Iterator[Result]:
    """(f) Saved and resumed steps, with ``--deterministic True``."""
    set_deterministic()
    for name, build in STAGES.items():
        for precision, missing in precisions(machine):
            row = f"{name} in {precision.value}, saved and resumed"
            if missing:
                yield not_here(row, missing)
            else:
                yield from guarded(row, repeated, row, build, precision, machine.folder)


def against_cpu(
    name: str, build: Callable, precision: Precision, right: dict[str, np.ndarray]
) -> Iterator[Result]:
    """Losses and the first gradient in one precision; half precision is mixed, as ``amp`` says."""
    model = prepared(build(), onednn=True, **mixed(precision))
    losses = run(model, 0, len(right[f"{name} losses"]))
    yield from compare(name, precision, losses, model.gradients.gradient, right)
    if precision is FLOAT16:
        scaled = model.gradients.scaler.is_enable()
        yield holds(f"{name} in float16: losses are scaled", scaled)


def mixed(precision: Precision) -> dict[str, str]:
    """How :class:`RecordedStep` computes in a precision."""
    return {"amp": "O1", "half": precision.dtype} if precision.is_half else {}


def compare(
    name: str,
    precision: Precision,
    losses: np.ndarray,
    gradient: np.ndarray,
    right: dict[str, np.ndarray],
) -> Iterator[Result]:
    """Losses [steps] and the first gradient against the twin's."""
    kind, curve = precision.value, right[f"{name} losses"]
    errors = np.abs(losses / curve - 1)
    yield at_most(f"{name}, first loss in {kind}", errors[0], FIRST_LOSS[precision], "relative")
    one, other = (part.astype(np.float64) for part in (gradient, right[f"{name} gradient"]))
    sizes = [float(np.linalg.norm(part)) for part in (one, other)]
    turned = 1 - one @ other / (sizes[0] * sizes[1])
    yield at_most(
        f"{name}, first gradient in {kind}", turned, DIRECTION[precision], "1 minus the cosine"
    )
    yield at_most(
        f"{name}, first gradient's length in {kind}",
        abs(sizes[0] / sizes[1] - 1),
        LENGTH[precision],
        "relative",
    )
    if precision.is_half:
        yield holds(f"{name}, {len(curve)} losses in {kind} are finite", np.isfinite(losses).all())
    else:
        note = "largest relative difference"
        yield at_most(
            f"{name}, {len(curve)} losses in {kind}", errors.max(), CURVE[precision], note
        )


def accumulated(row: str, build: Callable) -> Iterator[Result]:
    """The gradient of a batch in two parts is that of the whole, at frozen statistics."""
    whole, parts = (prepared(build(), onednn=True, accumulate=number) for number in (1, 2))
    for model in (whole, parts):
        run(model, 0, 1)
    error = relative_error(parts.gradients.gradient, whole.gradients.gradient)
    yield at_most(row, error, ACCUMULATED, "gradient, over its largest value")


def repeated(row: str, build: Callable, precision: Precision, folder: Path) -> Iterator[Result]:
    """Steps that are interrupted by saving and loading give the same bits as without."""

    def model() -> ResumableModel:
        return prepared(build(frozen=False), onednn=True, **mixed(precision))

    whole, begun, resumed = model(), model(), model()
    run(whole, 0, REPEATED)
    run(begun, 0, REPEATED // 2)
    progress = {"run_id": "", "scaler": begun.gradients.state()}
    save_training(folder / "saved", begun.network, begun._optimizer, progress)
    progress = load_training(folder / "saved", resumed.network, resumed._optimizer)
    resumed.gradients.restore(progress["scaler"])
    run(resumed, REPEATED // 2, REPEATED)
    states = (each.network.state_dict().values() for each in (whole, resumed))
    different = sum(
        differing(*map(paddle.Tensor.numpy, pair)) for pair in zip(*states, strict=True)
    )
    yield at_most(row, different, 0, "numbers that differ")
