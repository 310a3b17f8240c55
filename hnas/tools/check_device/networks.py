"""What networks compute on the device, against a CPU: stage three's walk and training steps.

Networks, images and labels are the same on every device and need no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
from paddle import nn

from hnas.base.device import set_deterministic
from hnas.base.errors import PADDLE_ERRORS, is_out_of_memory, word_of
from hnas.dataset.loader import load_batches
from hnas.evaluation.counts import Counts
from hnas.evaluation.gpu_kernels import fused_fault, may_be_refusal
from hnas.evaluation.reference import network_logits
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.spot_check import compare
from hnas.evaluation.variants import CPU_VARIANT, Precision, Variant, usual_variant
from hnas.models.convolution import use_onednn
from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI
from hnas.tools.check_device import rows
from hnas.utils.hapi_wrapper import (
    DistillationModel,
    GradientStep,
    ResumableModel,
    momentum_optimizer,
)
from hnas.utils.hapi_wrapper_pinas import ContrastiveModel
from hnas.utils.SampleMethod import FirstPlaceSampler, RandomSampler
from hnas.weights.checkpoint import load_training, read_progress, save_training

FLOAT32, TF32, FLOAT16, BFLOAT16 = Precision
CLASSES = 10
QUIET = 0.3
"""Scale of the last BatchNorm of a block, below 1 as in trained networks: with 1, differences of
rounding would grow from block to block."""


def seed_weights(network: nn.Layer, seed: int = 0) -> None:
    """Set weights and statistics from NumPy's generator, as no two devices of Paddle draw alike."""
    rng = np.random.default_rng(seed)
    for name, tensor in network.state_dict().items():
        shape = tensor.shape
        values = rng.normal(size=shape)
        if len(shape) == 4:
            values *= np.sqrt(2 / (shape[0] * shape[2] * shape[3]))
        elif len(shape) == 2:
            values *= np.sqrt(1 / shape[0])
        elif name.endswith("_variance"):
            values = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("weight"):
            values = rng.uniform(0.8, 1.2, shape) * (QUIET if ".bn2." in name else 1)
        else:
            values *= 0.1
        if tensor.is_floating_point():
            tensor.set_value(values.astype(np.float32))


def images(number: int, size: int, seed: int = 0) -> np.ndarray:
    """Coloured patches under noise, uint8 [N, 3, S, S]: patches, so that images differ in mean."""
    rng = np.random.default_rng((seed, number, size))
    patches = rng.integers(40, 216, (number, 3, 4, 4))
    whole = np.kron(patches, np.ones((1, 1, -(-size // 4), -(-size // 4))))[..., :size, :size]
    return (whole + rng.integers(-40, 41, whole.shape)).astype(np.uint8)


def labels(number: int, seed: int = 0) -> np.ndarray:
    """int64 [N]."""
    return np.random.default_rng((seed, number)).integers(0, CLASSES, number)


def keep_expected(machine: rows.Machine) -> Iterator[rows.Result]:
    """On the CPU: what the checks below expect, by Paddle's plain operators; yields nothing."""
    found = {}
    for name, network, archs, (pixels, _), calibration in scenes(machine):
        logits = []
        for arch in archs:
            network.activate(arch)
            logits.append(network_logits(network, pixels, calibration).numpy())
        found[name] = np.stack(logits)
    np.savez(f"{machine.folder}/walk.npz", **found)
    found = {}
    for stage in STAGES:
        model = trainer(stage, onednn=False)
        found[f"{stage} losses"] = run(model, QUICK_STEPS if machine.quick else STEPS)
        found[f"{stage} gradient"] = model.gradients.gradient
    np.savez(f"{machine.folder}/steps.npz", **found)
    return iter(())


# --- the walk

CALIBRATION = 64
NOT_USED = "not used: "
"""Of the fused operator, where it is not there or refuses."""


def scenes(machine: rows.Machine) -> Iterator[tuple]:
    """What is scored: the largest, the smallest and drawn sub-networks, re-calibrated and not.

    A name, a supernet, architectures, images with labels, and images to re-calibrate with, or None.
    """
    mini, whole = ("mini", "resnet48_mini"), ("full width", "resnet48")
    # Architectures, images, px.
    sizes = {mini: (10, 48, 32), whole: (3, 16, 64)}
    if machine.quick:
        sizes = {mini: (3, 12, 32)}
    for (name, backbone), (number, count, size) in sizes.items():
        network = build_network(backbone, CLASSES)
        seed_weights(network)
        space, rng = network.space, np.random.default_rng(1)
        archs = [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(number - 2))]
        batch = paddle.to_tensor(images(count, size)), paddle.to_tensor(labels(count))
        yield f"{name}, 0 calibration images", network, archs, batch, None
        calibration = paddle.to_tensor(images(CALIBRATION, size, seed=1))
        yield f"{name}, {CALIBRATION} calibration images", network, archs, batch, calibration


def variants(machine: rows.Machine, calibrates: bool) -> Iterator[Variant]:
    """The ways to walk that stage three may choose between."""
    if not machine.gpus:
        yield CPU_VARIANT
        return
    for precision in (TF32,) if machine.tf32 == "on" else (FLOAT32, FLOAT16):
        yield usual_variant(precision)
        if not calibrates:
            yield usual_variant(precision, fused=True)


def check_walk(machine: rows.Machine) -> Iterator[rows.Result]:
    """Logits and hits of every architecture in every variant."""
    if not machine.gpus:
        yield rows.not_here("the fused convolution, float16 and TF32", "need a GPU")
    right = np.load(f"{machine.folder}/walk.npz")
    for scene in scenes(machine):
        for variant in variants(machine, calibrates=scene[-1] is not None):
            row = f"{scene[0]}: {variant}"
            yield from rows.guarded(row, compare_walk, row, scene, variant, right[scene[0]])


def compare_walk(
    row: str, scene: tuple, variant: Variant, right: np.ndarray
) -> Iterator[rows.Result]:
    """One walk for each architecture, its logits and hits against all of [archs, N, classes].

    Where the fused operator raises, stage three goes on without it, and so nothing has failed.
    """
    if variant.fused and (reason := fused_fault(variant.precision, variant.layout)):
        yield rows.not_here(row, NOT_USED + reason)
        return
    _, network, archs, batch, calibration = scene
    evaluator = SharedEvaluator(network, archs, calibration, variant)
    found = []
    for index in range(len(archs)):
        counts = Counts.zeros(len(archs))
        try:
            found.append(evaluator.evaluate(*batch, counts, watch=index))
        except PADDLE_ERRORS as error:
            if is_out_of_memory(error) or not may_be_refusal(variant, error):
                raise
            yield rows.not_here(row, NOT_USED + word_of(error))
            return
    comparisons = [
        compare(own, paddle.to_tensor(logits), batch[1], hits, evaluator.variant.precision)
        for own, logits, *hits in zip(found, right, counts.top1, counts.top5, strict=True)
    ]
    differences, faults = zip(*comparisons, strict=True)
    fault, worst = next(filter(None, faults), ""), float(np.max(differences))
    note = fault or "logits, in their standard deviations; hits as they explain"
    state = rows.FAILED if fault else rows.PASSED
    yield rows.Result(row, state, worst, evaluator.variant.precision.tolerance, note)


# --- training steps

STAGES = ("stage 1", "stage 2")
STEPS, QUICK_STEPS, REPEATED = range(20), range(4), range(4)
BATCH, SIZE, WORKERS = 8, 32, 4
SCALE = 1024.0
"""Of losses in float16: low enough that no step is passed over for an overflow."""
LIMITS = {
    FLOAT32: (5e-5, 5e-3),
    TF32: (8e-2, 5e-2),
    FLOAT16: (8e-2, 0.1),
    BFLOAT16: (0.2, 0.1),
}
"""Relative differences of the first step's gradient, by norms, and of any loss: some times what
rounding all convolutions' inputs and outputs does on a CPU, and did on an H100."""


class RecordedStep(GradientStep):
    """Keeps the gradients of the first step, flat, as the optimizer gets them."""

    gradient: np.ndarray | None = None

    def step(self) -> None:
        if self.gradient is None:
            parts = [
                np.zeros(p.size, np.float32) if p.grad is None else p.grad.numpy().ravel()
                for p in self.optimizer._parameter_list
            ]
            self.gradient = np.concatenate(parts) / (1 if self.scaler is None else SCALE)
        super().step()


def trainer(stage: str, batch: int = BATCH, onednn: bool = True, amp: str = "O0") -> ResumableModel:
    """A stage's model with its optimizer: contrastive, or distillation, two sub-networks or more.

    At frozen statistics, as the recipe has it: by those of so small batches and maps gradients
    would depend on the last bits.

    Args:
        batch: images of a step, of all ranks together.
        onednn: whether CPUs compute by its convolutions, as in training, or by Paddle's.
        amp: as in :class:`GradientStep`.
    """
    if stage == "stage 1":
        name = "resnet48pinasv2_mini"
        network = build_network(name, CLASSES, queue_size=4 * batch, temperature=0.2)
        seed_weights(network, 1)
        network.reset_key_encoder()
        model = ContrastiveModel(network, RandomSampler(RESNET48_MINI, 1, 2))
    else:
        network = build_network("resnet48_mini", CLASSES)
        teacher = build_network("resnet48_mini", CLASSES, elastic=False)
        seed_weights(network, 2)
        seed_weights(teacher, 3)
        model = DistillationModel(network, teacher, FirstPlaceSampler(RESNET48_MINI, 1, 2, 40))
    freeze_statistics(network)
    if onednn:
        use_onednn(network)
    optimizer = momentum_optimizer(network, 0.002, 0.9, 1e-4)
    gradients = RecordedStep(optimizer, amp=amp)
    if gradients.scaler is not None:
        gradients.scaler = paddle.amp.GradScaler(init_loss_scaling=SCALE)
    model.prepare(optimizer, gradients)
    return model


def run(
    model: ResumableModel,
    steps: range,
    batch: int = BATCH,
    share: slice = slice(None),
    workers: int = 0,
) -> np.ndarray:
    """Train the steps on a share of each batch, loaded by so many processes; their losses."""

    def load(one: Sequence[int]) -> list[np.ndarray]:
        (step,) = one
        views = [images(batch, SIZE, 2 * step + view)[share] for view in range(2)]
        contrasts = isinstance(model, ContrastiveModel)
        return views if contrasts else [views[0], labels(batch, step)[share]]

    losses, model.epoch = [], 0
    loaded = load_batches(SimpleNamespace(load=load), [[step] for step in steps], workers)
    for step, parts in zip(steps, loaded, strict=True):
        model.step = step
        losses.append(float(model.train_batch(parts)["loss"]))
    return np.array(losses)


def ways(machine: rows.Machine) -> Iterator[tuple[str, Precision, str]]:
    """Stages, what this process trains them in, and ``--amp`` for it."""
    half = BFLOAT16 if paddle.amp.is_bfloat16_supported() else FLOAT16
    found = [(TF32, "O0")] if machine.tf32 == "on" else [(FLOAT32, "O0"), (half, "O1")]
    for stage in STAGES:
        for precision, amp in found if machine.gpus else found[:1]:
            yield stage, precision, amp


def check_steps(machine: rows.Machine) -> Iterator[rows.Result]:
    """Training on the device: losses and the first gradient of both stages."""
    if not machine.gpus:
        yield rows.not_here("training in half precision and in TF32", "CPUs train in float32")
    right = np.load(f"{machine.folder}/steps.npz")
    for stage, precision, amp in ways(machine):
        row = f"{stage} in {precision.value}"
        yield from rows.guarded(row, compare_steps, stage, precision, amp, right)


def compare_steps(
    stage: str, precision: Precision, amp: str, right: Mapping[str, np.ndarray]
) -> Iterator[rows.Result]:
    """Losses and the first gradient of a stage, against those expected."""
    curve, expected = right[f"{stage} losses"], right[f"{stage} gradient"].astype(np.float64)
    model = trainer(stage, amp=amp)
    # Loader processes start after the device did: forking under a GPU's driver is delicate.
    errors = np.abs(run(model, range(len(curve)), workers=WORKERS) / curve - 1)
    difference = model.gradients.gradient.astype(np.float64) - expected
    turned = np.linalg.norm(difference) / np.linalg.norm(expected)
    gradient, any_loss = LIMITS[precision]
    how = f"in {precision.value}"
    yield rows.at_most(f"{stage}, first gradient {how}", turned, gradient, "relative, by norms")
    if precision is TF32:
        least, _ = LIMITS[FLOAT32]
        state = rows.PASSED if turned > least else rows.FAILED
        note = f"its gradient is more than {least:g} off, as float32's is not"
        yield rows.Result(f"{stage}, TF32 is used", state, turned, note=note)
    note = "largest relative difference"
    yield rows.at_most(f"{stage}, {len(curve)} losses {how}", errors.max(), any_loss, note)


def check_repeat(machine: rows.Machine) -> Iterator[rows.Result]:
    """Steps that are saved and resumed give the same bits, with ``--deterministic True``."""
    set_deterministic()
    saved = Path(machine.folder, "saved")
    for stage, precision, amp in ways(machine):
        whole, resumed = models = [trainer(stage, amp=amp) for _ in range(2)]
        run(whole, REPEATED[:2])
        progress = {"run_id": "", "scaler": whole.gradients.state()}
        save_training(saved, whole.network, whole.optimizer, progress)
        progress = read_progress(saved)
        load_training(saved, resumed.network, resumed.optimizer, progress)
        resumed.gradients.restore(progress["scaler"])
        for model in models:
            run(model, REPEATED[2:])
        states = [[part.numpy() for part in each.network.state_dict().values()] for each in models]
        different = rows.differing(*states)
        row = f"{stage} in {precision.value}, saved and resumed"
        yield rows.at_most(row, different, 0, "numbers that differ")
