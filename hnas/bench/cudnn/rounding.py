"""How far each precision's logits are from float64's, and these from Paddle's on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import torch

from hnas.bench.cudnn.network import (
    DEVICE,
    HALVES,
    TF32,
    SubNetwork,
    Way,
    normalised,
    supernet_state,
)
from hnas.search_space import find_backbone
from hnas.tools.check_device.subjects import images

SUBJECTS = {
    "mini": ("resnet48_mini", 10, 48, 32),
    "full width": ("resnet48", 3, 16, 64),
    "full width, 224 px": ("resnet48", 8, 48, 224),
}
"""Backbone, architectures, images and px of the ``walk`` rows of ``hnas.tools.check_device``; the
last is that of a full run."""
CALIBRATIONS = (0, 64)


def ways(calibration: int) -> list[Way]:
    """Those whose rounding is looked at."""
    found = [Way("float64"), Way("float32"), Way(TF32), *map(Way, HALVES)]
    found += [Way(name, emulated=True) for name in (TF32, *HALVES)]
    if DEVICE == "cuda" and not calibration:
        found += [Way(name, fused=True) for name in ("float32", TF32, *HALVES)]
    return found


def rounding(reference: dict[str, np.ndarray]) -> Iterator[dict]:
    """Each way's logits against float64's, and these against the reference engine's.

    Both are the largest difference in standard deviations of the logits, over all architectures,
    as the ``walk`` rows of ``hnas.tools.check_device`` have it. ``moved`` is the share of images
    whose class differs from float64's.
    """
    for (name, (backbone, archs, scored, size)), calibration in product(
        SUBJECTS.items(), CALIBRATIONS
    ):
        space = find_backbone(backbone).space
        state = supernet_state(space)
        pixels = images(scored, size)
        if calibration:
            pixels = np.concatenate([images(calibration, size, seed=1), pixels])
        x = normalised(pixels)
        rng = np.random.default_rng(1)
        chosen = [space.sample(rng) for _ in range(archs - 2)]
        chosen = [space.largest(), space.smallest(), *chosen]
        exact = None
        for way in ways(calibration):
            found = torch.stack([SubNetwork(state, space, a, calibration, way)(x) for a in chosen])
            found = found.double().cpu().numpy()
            row = {"network": name, "calibration_images": calibration, "way": str(way)}
            if exact is None:
                exact = found
                expected = reference.get(f"{name}|{calibration}")
                row["from_reference"] = None if expected is None else apart(expected, exact)
            row["apart"] = apart(found, exact)
            row["moved"] = float((found.argmax(2) != exact.argmax(2)).mean())
            yield row


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of logits [architectures, N, classes] in an architecture's
    deviations."""
    spread = expected.reshape(len(expected), -1).astype(np.float64).std(1)
    return float((np.abs(found - expected).reshape(len(found), -1).max(1) / spread).max())
