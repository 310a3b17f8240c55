"""MACs and parameters of architectures, from their codes alone.

    python -m hnas.tools.flops --modelarch_file F [--backbone resnet48] [--image_size 224]

prints (or writes to --output) {"arch1": {"arch": code, "macs": per image, "params": count}, ...}.
"""

from __future__ import annotations

import json
import sys

from hnas.architecture_file import read_architectures
from hnas.base.command_line import LARGEST_SIDE, OneLineParser, path_text, whole_number
from hnas.base.errors import run_main
from hnas.base.files import check_output, write_json
from hnas.search_space import search_space


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--modelarch_file", type=path_text, required=True, help="architectures: JSON or text"
    )
    parser.add_argument("--backbone", default="resnet48", help="whose widths [default resnet48]")
    parser.add_argument(
        "--image_size", type=whole_number(32, LARGEST_SIDE), default=224, help="px [default 224]"
    )
    parser.add_argument(
        "--num_classes", type=whole_number(1, 1_000_000), default=1000, help="[default 1000]"
    )
    parser.add_argument("--output", type=path_text, help="file to write [default: standard output]")
    options = parser.parse_args(argv)
    if options.output:
        check_output(options.output, "--output")

    space = search_space(options.backbone)
    counts = {
        name: {
            "arch": arch.code,
            "macs": space.macs(arch, options.image_size, options.num_classes),
            "params": space.params(arch, options.num_classes),
        }
        for name, arch in read_architectures(options.modelarch_file).items()
    }
    if options.output:
        write_json(options.output, counts)
    else:
        json.dump(counts, sys.stdout, indent=1)
        sys.stdout.write("\n")


if __name__ == "__main__":
    run_main(main)
