"""What a check is given: the device, how thorough to be, and what a CPU computed for the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from hnas.base.files import read_arrays, replacing
from hnas.tools.check_device.plan import TWIN_ENDED, Plan

LARGEST_RESULT = 2**30
"""Bytes of a twin's file."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Machine:
    """The device that is checked, which is Paddle's current one.

    Attributes:
        plan: how thorough to be.
        folder: for files of this run; the twin's results come there.
    """

    plan: Plan
    folder: Path

    @property
    def has_gpu(self) -> bool:
        return bool(self.plan.gpus)

    @property
    def device(self) -> str:
        """As Paddle names it."""
        return f"gpu:{self.plan.gpus[0]}" if self.has_gpu else "cpu"

    def expected(self, name: str) -> dict[str, np.ndarray]:
        """What the twin, a process on the CPU of this machine, computed under ``name``.

        Waits until it has.

        Raises:
            RuntimeError: it failed, or is gone.
        """
        path, failed = self.folder / f"{name}.npz", self.folder / f"{name}.failed"
        while not path.exists():
            # First whether it has ended: what it wrote before, is there then.
            ended = (self.folder / TWIN_ENDED).exists()
            if failed.exists():
                raise RuntimeError(f"on the CPU: {failed.read_text(encoding='utf-8')}")
            if ended and not path.exists():
                raise RuntimeError("the process that computes on the CPU has ended")
            time.sleep(POLL_SECONDS)
        return read_arrays(path, LARGEST_RESULT)

    def healthy(self) -> bool:
        """Whether the device still computes: after some errors a GPU gives no more answers."""
        try:
            return float(paddle.ones([2]).sum()) == 2.0
        except Exception:
            return False


def write_expected(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Let :meth:`Machine.expected` find what was computed."""
    with replacing(folder / f"{name}.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
