"""MACs and parameters of architectures, from their codes alone.

    python -m hnas.tools.flops --modelarch_file F [--backbone resnet48] [--image_size 224]

prints (or writes to --output) {"arch1": {"arch": code, "macs": per image, "params": count}, ...}.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, fields

from hnas.architecture_file import read_architectures
from hnas.base.command_line import LARGEST_SIDE, OneLineParser, path_text, whole_number
from hnas.base.errors import run_main
from hnas.base.files import check_output, write_json
from hnas.base.settings import check_same_settings
from hnas.ranking.costs import Network
from hnas.search_space import BACKBONES

logger = logging.getLogger(__name__)


def add_network_flags(parser: OneLineParser, known: str = "") -> None:
    """The flags of the network whose costs are told; ``known`` is what else may say it."""
    sizes, classes = whole_number(32, LARGEST_SIDE), whole_number(1, 1_000_000)
    default = f"default: {known}else" if known else "default"
    parser.add_argument("--backbone", choices=BACKBONES, help=f"whose widths [{default} resnet48]")
    parser.add_argument("--image_size", type=sizes, help=f"px [{default} 224]")
    parser.add_argument("--num_classes", type=classes, help=f"[{default} 1000]")


def network_of(options, scored: Network | None, path: str) -> Network:
    """The network whose costs are told: what was ``scored``, or what the flags say.

    Where neither says all, the competition's is assumed, and a line on stderr says so.

    Args:
        options: with what :func:`add_network_flags` adds.
        scored: what ``path`` is of, where that is known.

    Raises:
        UserError: the flags say otherwise.
    """
    values = {field.name: getattr(options, field.name) for field in fields(Network)}
    given = {name: value for name, value in values.items() if value is not None}
    if scored is not None:
        remedy = "leave out the flags that differ, which stage 3 has noted beside it"
        check_same_settings(path, asdict(scored), given, remedy)
        return scored
    network = Network(**given)
    if len(given) < len(values):
        assumed = (f"--{name} {value}" for name, value in asdict(network).items())
        logger.warning("%s does not say what it is of; taken: %s", path, " ".join(assumed))
    return network


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--modelarch_file", type=path_text, required=True, help="architectures: JSON or text"
    )
    add_network_flags(parser)
    parser.add_argument("--output", type=path_text, help="file to write [default: standard output]")
    options = parser.parse_args(argv)
    if options.output:
        check_output(options.output, "--output")

    archs = read_architectures(options.modelarch_file)
    costs = network_of(options, None, options.modelarch_file).costs(archs.values())
    rows = zip(archs.items(), costs["macs"].tolist(), costs["params"].tolist(), strict=True)
    counts = {
        name: {"arch": arch.code, "macs": macs, "params": params}
        for (name, arch), macs, params in rows
    }
    if options.output:
        write_json(options.output, counts)
    else:
        json.dump(counts, sys.stdout, indent=1)
        sys.stdout.write("\n")


if __name__ == "__main__":
    run_main(main)
