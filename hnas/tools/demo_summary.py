"""The demo's closing words: a table of what it scored, its files, and what to run next.

python -m hnas.tools.demo_summary --demo_dir output/demo
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hnas.architecture_file import in_shares, read_scores
from hnas.base.command_line import OneLineParser, read_path
from hnas.base.errors import UserError, run_main
from hnas.base.files import print_text
from hnas.search_space import search_space

BACKBONE, IMAGE_SIZE, CLASSES = "resnet48_mini", 32, 10


def table(demo: Path) -> str:
    """Accuracy of the largest, median and smallest sub-network by MACs, and times.

    Raises:
        UserError: the demo's folder is incomplete.
    """
    space = search_space(BACKBONE)
    try:
        archs, accuracy = read_scores(demo / "stage3/submission.json")
        words = (demo / "seconds.txt").read_text().split()
    except OSError as error:
        raise UserError(f"{error.filename} is missing; run sh run_demo.sh to the end") from error
    costs = [space.macs(arch, IMAGE_SIZE, CLASSES) for arch in archs.values()]
    by_macs = sorted(zip(costs, in_shares(accuracy).tolist(), strict=True))
    rows = [f"{'sub-network':<12}{'MACs':>12}{'top-1':>10}"]
    for name, index in (("largest", -1), ("median", len(by_macs) // 2), ("smallest", 0)):
        macs, accuracy = by_macs[index]
        rows.append(f"{name:<12}{macs:>12,}{accuracy:>10.2%}")
    rows += ["", f"{'step':<12}{'seconds':>12}"]
    rows += [f"{name:<12}{value:>12}" for name, value in zip(words[::2], words[1::2], strict=True)]
    return "\n".join(rows)


def next_steps(demo: Path) -> str:
    """The demo's files, and a command that goes on from them; paths from the project's root."""
    return f"""\
files
  {demo}/report/report.html       a page about these accuracies, for a browser
  {demo}/stage3/submission.json   accuracies of all architectures, as submitted
  {demo}/stage2/final.pdparams    the supernet that predicted them

next: the best within 5,000,000 MACs, and what is as good within the noise (README then exports it)
  {os.path.relpath(sys.executable)} -m hnas.tools.choose \\
      --submission {demo}/stage3/submission.json --max_macs 5e6"""


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--demo_dir", type=read_path, default=Path("output/demo"), help="demo's folder"
    )
    options = parser.parse_args(argv)
    print_text(f"{table(options.demo_dir)}\n\n{next_steps(options.demo_dir)}\n")


if __name__ == "__main__":
    run_main(main)
