"""MACs and parameters of architectures, from their codes alone.

    python -m hnas.tools.flops --modelarch_file F [--backbone resnet48] [--image_size 224]

prints (or writes to --output) {"arch1": {"arch": code, "macs": per image, "params": count}, ...}.
"""

from __future__ import annotations

import json
import logging

from hnas.architecture_file import read_architectures
from hnas.base.command_line import LARGEST_SIDE, OneLineParser, path_text, whole_number
from hnas.base.errors import run_main
from hnas.base.files import check_output, print_text, write_json
from hnas.base.settings import check_same_settings
from hnas.ranking.costs import Network, costs_of
from hnas.search_space import BACKBONES, search_space

logger = logging.getLogger(__name__)


def add_network_flags(parser: OneLineParser) -> None:
    """The flags of the network whose costs are told, which :func:`network_of` reads."""
    sizes, classes = whole_number(32, LARGEST_SIDE), whole_number(1, 1_000_000)
    told = "[where no file says it: {}]".format
    parser.add_argument("--backbone", choices=BACKBONES, help=f"whose widths {told('resnet48')}")
    parser.add_argument("--image_size", type=sizes, help=f"px {told(224)}")
    parser.add_argument("--num_classes", type=classes, help=told(1000))


def network_of(options, scored: Network | None, path: str) -> Network:
    """The network whose costs are told: what ``path`` says was ``scored``, or the flags.

    Where neither says all, the competition's is taken, and a line on stderr says so.

    Raises:
        UserError: the flags say otherwise.
    """
    values = {name: getattr(options, name) for name in Network._fields}
    given = {name: value for name, value in values.items() if value is not None}
    if scored is not None:
        check_same_settings(path, scored._asdict(), given, "leave out the flags that differ")
        return scored
    network = Network(**given)
    if len(given) < len(values):
        taken = " ".join(f"--{name} {value}" for name, value in network._asdict().items())
        logger.warning("%s does not say of which network it is; taken: %s", path, taken)
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
    network = network_of(options, None, options.modelarch_file)
    costs = costs_of(archs.values(), search_space(network.backbone), *network[1:])
    rows = zip(archs.items(), costs["macs"].tolist(), costs["params"].tolist(), strict=True)
    counts = {
        name: {"arch": arch.code, "macs": macs, "params": params}
        for (name, arch), macs, params in rows
    }
    if options.output:
        write_json(options.output, counts)
    else:
        print_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
