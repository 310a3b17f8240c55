"""MACs and parameters of architectures, from their codes alone.

    python -m hnas.tools.flops --modelarch_file F [--backbone resnet48] [--image_size 224]

prints (or writes to --output) {"arch1": {"arch": code, "macs": per image, "params": count}, ...}.
"""

from __future__ import annotations

import json

from hnas.architecture_file import read_architectures
from hnas.base.command_line import LARGEST_SIDE, OneLineParser, path_text, whole_number
from hnas.base.errors import run_main
from hnas.base.files import check_output, print_text, write_json
from hnas.ranking.costs import costs_of
from hnas.search_space import BACKBONES, search_space


def add_network_flags(parser: OneLineParser) -> None:
    """The flags of the network whose costs are told."""
    parser.add_argument(
        "--backbone", choices=BACKBONES, default="resnet48", help="whose widths [default resnet48]"
    )
    parser.add_argument(
        "--image_size", type=whole_number(32, LARGEST_SIDE), default=224, help="px [default 224]"
    )
    parser.add_argument(
        "--num_classes", type=whole_number(1, 1_000_000), default=1000, help="[default 1000]"
    )


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
    space = search_space(options.backbone)
    costs = costs_of(archs.values(), space, options.image_size, options.num_classes)
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
