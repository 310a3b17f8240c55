"""Draw architectures from the released space into a file that stage three reads.

    python -m hnas.tools.draw_architectures --number 200 --output F

The first is the largest network and the second the smallest; the others are uniform.
"""

from __future__ import annotations

import numpy as np

from hnas.architecture_file import submission
from hnas.base.command_line import MOST_ARCHITECTURES, OneLineParser, path_text, whole_number
from hnas.base.errors import run_main
from hnas.base.files import check_output, write_json
from hnas.search_space import SAMPLE_SPACES, search_space


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    number = whole_number(2, MOST_ARCHITECTURES)
    parser.add_argument("--number", type=number, default=200, help="[default 200]")
    parser.add_argument("--output", type=path_text, required=True, help="JSON file to write")
    parser.add_argument("--sample_space", choices=SAMPLE_SPACES, default="released", help="widths")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="[default 0]")
    options = parser.parse_args(argv)
    check_output(options.output, "--output")

    space = search_space("resnet48", options.sample_space)
    rng = np.random.default_rng(options.seed)
    archs = space.sample_distinct(rng, options.number, (space.largest(), space.smallest()))
    write_json(options.output, submission(archs, [0.0] * len(archs)))


if __name__ == "__main__":
    run_main(main)
