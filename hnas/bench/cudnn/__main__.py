from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hnas.base.command_line import OneLineParser, path_text, read_bool
from hnas.base.errors import UserError, run_main
from hnas.base.files import write_json
from hnas.bench import cudnn

logger = logging.getLogger(__name__)


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.cudnn", description=cudnn.__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--expected", type=path_text, required=True, help="file of hnas.bench.cudnn.expected"
    )
    parser.add_argument("--output", type=path_text, required=True, help="JSON file to write")
    parser.add_argument(
        "--search",
        type=read_bool,
        default=False,
        help="let cuDNN try its algorithms, and time only [default False]",
    )
    options = parser.parse_args(argv)
    if find_spec("torch") is None:
        raise UserError("this bench needs PyTorch, which is not installed: pip install torch")
    if not Path(options.expected).is_file():
        raise UserError(f"{options.expected} is no file; hnas.bench.cudnn.expected writes it")
    measure(options)


def measure(options) -> None:
    """All that the card can tell; without one, what PyTorch's operators for CPUs do."""
    import torch

    from hnas.bench.cudnn.rates import all_rates
    from hnas.bench.cudnn.rounding import rounding
    from hnas.bench.cudnn.training import training

    torch.backends.cudnn.benchmark = options.search
    result: dict = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        result["card"] = torch.cuda.get_device_name()
        result["cudnn"] = torch.backends.cudnn.version()
    if not options.search:
        given = dict(np.load(options.expected))
        write(options.output, result, "rounding", rounding(given))
        write(options.output, result, "training", training(given))
    if torch.cuda.is_available():
        write(options.output, result, "rates", all_rates())


def write(path: str, result: dict, name: str, rows: Iterable[dict]) -> None:
    """Add rows to the file as they come."""
    result[name] = []
    for row in rows:
        logger.info(json.dumps(row))
        result[name].append(row)
        write_json(path, result)


if __name__ == "__main__":
    run_main(main)
