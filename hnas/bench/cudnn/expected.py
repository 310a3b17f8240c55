"""What the side with PyTorch starts from and must agree with, computed by Paddle on a CPU.

python -m hnas.bench.cudnn.expected FILE.npz
"""

from __future__ import annotations

import logging

import numpy as np
import paddle

from hnas.base.command_line import OneLineParser, read_path
from hnas.base.errors import run_main
from hnas.base.files import replacing
from hnas.models.elastic import plain_name
from hnas.tools.check_device import training, walk
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.plan import Plan

logger = logging.getLogger(__name__)


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.cudnn.expected", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=read_path, help="to write, compressed NumPy arrays")
    path = parser.parse_args(argv).file
    paddle.set_device("cpu")
    machine = Machine(Plan(), path.parent)
    found = walk.expected(machine)
    for name, value in training.expected(machine).items():
        found[name] = np.asarray(value)
    for stage, build in training.STAGES.items():
        found |= {f"{stage}|{name}": value for name, value in start(build()).items()}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **found)
    logger.info("%s: %d arrays", path, len(found))


def start(model) -> dict[str, np.ndarray]:
    """A model's weights, which of them train, in their order, and the codes of each step.

    The key encoder starts as a copy of the query encoder.
    """
    network = model.network
    state = {
        plain_name(name): value.numpy()
        for name, value in network.state_dict().items()
        if not name.startswith("key_")
    }
    names = {id(value): plain_name(name) for name, value in network.state_dict().items()}
    parameters = [
        f"{names[id(each)]} {'fixed' if each.stop_gradient else 'trained'}"
        for each in network.parameters()
    ]
    codes = [
        [arch.code for arch in model.sampler.sample(0, step)] for step in range(training.STEPS)
    ]
    if getattr(model, "teacher", None) is not None:
        teacher = model.teacher.state_dict().items()
        state |= {f"teacher.{name}": value.numpy() for name, value in teacher}
    return state | {
        "parameters": np.array(parameters),
        "codes": np.array([" ".join(each) for each in codes]),
    }


if __name__ == "__main__":
    run_main(main)
