"""The precisions that a process checks, and how far each may be off.

Which kernels cuDNN runs is settled at the first convolution of a shape, so TF32 is switched on or
off for a whole process: one checks TF32, another the rest.
"""

from __future__ import annotations

import paddle

from hnas.base.onednn import has_bfloat16
from hnas.evaluation.variants import Precision
from hnas.tools.check_device.machine import Machine

FLOAT32, TF32, FLOAT16, BFLOAT16 = Precision
NEEDED_CAPABILITY = {TF32: (8, 0), BFLOAT16: (8, 0), FLOAT16: (7, 0)}
"""Compute capabilities of the cards that have it."""
NOT_OFFERED = "needs a GPU of compute capability {}.{}"
NO_BFLOAT16 = "needs AVX512_BF16 or AMX"
"""Of a processor."""

LIMITS = {FLOAT32: 1e-4, TF32: 3e-3, BFLOAT16: 3e-2, FLOAT16: 5e-3}
"""Of an operator's largest error over its largest value. TF32 rounds factors to 11 bits, which
costs about 3e-4: float32 passes only where TF32 is really off."""


def precisions(machine: Machine) -> list[tuple[Precision, str]]:
    """What this process is to check, and why it cannot; an empty text: it can."""
    if not machine.has_gpu:
        return [(each, _missing(each, (0, 0))) for each in Precision]
    capability = paddle.device.cuda.get_device_capability()
    own = [TF32] if machine.plan.tf32 == "on" else [FLOAT32, BFLOAT16, FLOAT16]
    return [(each, _missing(each, capability)) for each in own]


def scoring_precisions(machine: Machine) -> list[tuple[Precision, str]]:
    """:func:`precisions` of a walk, for which processors, too, may have bfloat16."""
    found = dict(precisions(machine))
    if not machine.has_gpu:
        found[BFLOAT16] = "" if has_bfloat16() else NO_BFLOAT16
    return list(found.items())


def _missing(precision: Precision, capability: tuple[int, int]) -> str:
    needed = NEEDED_CAPABILITY.get(precision, (0, 0))
    return NOT_OFFERED.format(*needed) if capability < needed else ""
