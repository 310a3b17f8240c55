"""Stage three's walk, in every way the device has, against the reference engine on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import paddle

from hnas.evaluation.counts import Counts
from hnas.evaluation.fused import find_fused
from hnas.evaluation.reference import network_logits
from hnas.evaluation.shared import SharedEvaluator
from hnas.evaluation.spot_check import compare
from hnas.evaluation.variants import Precision, Variant, cpu_variant, usual_variant
from hnas.models.elastic import ElasticResNet
from hnas.models.pinasv2 import build_network
from hnas.search_space import Architecture
from hnas.tools.check_device.arithmetic import scoring_precisions
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.plan import Plan
from hnas.tools.check_device.results import Result, at_most, guarded, not_here
from hnas.tools.check_device.subjects import CLASSES, images, labels, seed_weights

CALIBRATION = 64
LIMITS = {each: each.tolerance for each in Precision} | {Precision.BFLOAT16: 0.5}
"""Of the largest difference of logits, in their standard deviations. Rounding to bfloat16 moves
these networks' logits by up to 0.03, and by 0.13 where 64 images of 32 px re-calibrate them, which
leave 64 values a channel in the last stage."""


@dataclass(frozen=True)
class Subject:
    """A supernet whose sub-networks are scored.

    Attributes:
        name: of the rows.
        backbone, archs, number, size: which, how many sub-networks and images, and their px.
    """

    name: str
    backbone: str
    archs: int
    number: int
    size: int

    def network(self) -> ElasticResNet:
        network = build_network(self.backbone, CLASSES)
        seed_weights(network)
        return network

    def architectures(self, network: ElasticResNet) -> list[Architecture]:
        """The largest, the smallest, and drawn ones."""
        rng = np.random.default_rng(1)
        drawn = [network.space.sample(rng) for _ in range(self.archs - 2)]
        return [network.space.largest(), network.space.smallest(), *drawn]

    def batch(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Images to score and labels."""
        return paddle.to_tensor(images(self.number, self.size)), paddle.to_tensor(
            labels(self.number)
        )

    def calibration(self, number: int) -> paddle.Tensor | None:
        """Images to re-calibrate with; None for 0."""
        return paddle.to_tensor(images(number, self.size, seed=1)) if number else None


def subjects(plan: Plan) -> list[Subject]:
    """Which supernets a run looks at."""
    if plan.quick:
        return [Subject("mini", "resnet48_mini", 3, 12, 32)]
    mini = Subject("mini", "resnet48_mini", 10, 48, 32)
    whole = Subject("full width", "resnet48", 8, 48, 224) if plan.full else None
    return [mini, whole or Subject("full width", "resnet48", 3, 16, 64)]


def expected(machine: Machine) -> dict[str, np.ndarray]:
    """For the twin: logits [architectures, N, classes] by the reference engine."""
    found = {}
    for subject in subjects(machine.plan):
        network = subject.network()
        pixels, _ = subject.batch()
        for number in (0, CALIBRATION):
            logits = []
            for arch in subject.architectures(network):
                network.activate(arch)
                logits.append(network_logits(network, pixels, subject.calibration(number)).numpy())
            found[f"{subject.name}|{number}"] = np.stack(logits)
    return found


def variants(machine: Machine, precision: Precision, calibration: int) -> list[Variant]:
    """The ways to walk in a precision."""
    if not machine.has_gpu:
        return [cpu_variant(precision)]
    usual = usual_variant(precision)
    operator, _ = find_fused(precision, usual.layout)
    fused = operator is not None and not calibration
    return [usual, usual_variant(precision, fused=True)] if fused else [usual]


def check(machine: Machine) -> Iterator[Result]:
    """(d) Logits and hits of every architecture."""
    for precision, missing in scoring_precisions(machine):
        if missing:
            yield not_here(f"the walk in {precision.value}", missing)
            continue
        right = machine.expected("walk")
        for subject in subjects(machine.plan):
            network = subject.network()
            for number in (0, CALIBRATION):
                logits = right[f"{subject.name}|{number}"]
                for variant in variants(machine, precision, number):
                    name = f"{subject.name}, {number} calibration images: {variant}"
                    yield from guarded(
                        name, check_variant, name, subject, network, number, variant, logits
                    )


def check_variant(
    name: str,
    subject: Subject,
    network: ElasticResNet,
    number: int,
    variant: Variant,
    logits: np.ndarray,
) -> Iterator[Result]:
    """One walk for each architecture, whose logits it watches."""
    archs = subject.architectures(network)
    evaluator = SharedEvaluator(network, archs, subject.calibration(number), variant)
    pixels, truth = subject.batch()
    found = []
    for index in range(len(archs)):
        counts = Counts.zeros(len(archs))
        found.append(evaluator.evaluate(pixels, truth, counts, watch=index))
    yield from judge(name, found, counts, logits, truth, evaluator.precision)


def judge(
    name: str,
    found: list[paddle.Tensor],
    counts: Counts,
    logits: np.ndarray,
    truth: paddle.Tensor,
    precision: Precision,
) -> Iterator[Result]:
    """Each architecture's logits [N, classes] and hits against the reference engine's."""
    comparisons = [
        compare(own, paddle.to_tensor(right), truth, hits, precision)
        for own, right, *hits in zip(found, logits, counts.top1, counts.top5, strict=True)
    ]
    worst = max(each.relative if each.relative == each.relative else np.inf for each in comparisons)
    note = "logits, in their standard deviations"
    yield at_most(name, worst, LIMITS[precision], note)
    wrong = [
        abs(counted - right) > uncertain
        for each in comparisons
        for counted, right, uncertain in each.hits.values()
    ]
    note = f"of {len(found)} architectures, that rounding does not explain"
    yield at_most(f"{name}: wrong hits", sum(wrong), 0, note)
