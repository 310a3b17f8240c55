"""Closing words of run_demo.sh and local_own.sh: what was scored, the files, and what to run next.

python -m hnas.tools.demo_summary --demo_dir output/demo
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from hnas.architecture_file import in_shares, read_scores
from hnas.base.command_line import OneLineParser, read_path
from hnas.base.errors import UserError, run_main
from hnas.base.files import print_text, read_json
from hnas.ranking.agreement import estimates_beside
from hnas.search_space import search_space

USED = "ckpt_dir", "backbone", "image_dir", "image_size", "bad_images"
"""Flags of stage 3 that export takes, too."""
MORE = {"seed": 0, "bn_calibration_images": "auto", "eval_images": 0}
"""Others with their defaults."""


def summary(demo: Path) -> str:
    """Accuracy of the largest, median and smallest sub-network by MACs; times, files, commands.

    Raises:
        UserError: the folder is incomplete.
    """
    scores = demo / "stage3/submission.json"
    used = read_json(scores.with_name("settings.json"))["options"]
    try:
        archs, accuracy = read_scores(scores)
        words = (demo / "seconds.txt").read_text().split()
    except OSError as error:
        raise UserError(f"{error.filename} is missing; run the script to its end") from error
    accuracy = in_shares(accuracy)
    network = estimates_beside(scores, list(archs.values()), accuracy)[0].network
    space = search_space(network.backbone)
    costs = [space.macs(arch, *network[1:]) for arch in archs.values()]
    by_macs = sorted(zip(costs, accuracy.tolist(), archs, strict=True))
    rows = [f"{'sub-network':<12}{'MACs':>15}{'top-1':>10}"]
    for name, index in (("largest", -1), ("median", len(by_macs) // 2), ("smallest", 0)):
        macs, top1, _ = by_macs[index]
        rows.append(f"{name:<12}{macs:>15,}{top1:>10.2%}")
    rows += ["", f"{'step':<12}{'seconds':>15}"]
    rows += [f"{name:<12}{value:>15}" for name, value in zip(words[::2], words[1::2], strict=True)]

    # The median, rounded up to one digit.
    median = by_macs[len(by_macs) // 2][0]
    most = (median // 10 ** (len(str(median)) - 1) + 1) * 10 ** (len(str(median)) - 1)
    best = max((top1, -macs, name) for macs, top1, name in by_macs if macs <= most)[2]
    names = [*USED, *(name for name, usual in MORE.items() if used[name] != usual)]
    given = shlex.join(part for name in names for part in (f"--{name}", str(used[name])))
    python, file = shlex.quote(os.path.relpath(sys.executable)), shlex.quote(str(scores))
    rows.append(f"""
files
  {demo}/report/report.html       a page about these accuracies, for a browser
  {scores}   accuracies of all architectures, as submitted
  {used["ckpt_dir"]}    the supernet that predicted them

next: the best within {most:,} MACs, and what is as good within the noise; then one of them as ONNX
  {python} -m hnas.tools.choose \\
      --submission {file} --max_macs {most}
  {python} -m hnas.tools.export --arch {shlex.quote(best)} \\
      --modelarch_file {file} \\
      {given} \\
      --num_workers 0 --format onnx --save_dir {shlex.quote(f"{demo}/onnx")}
""")
    return "\n".join(rows)


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    folder = Path("output/demo")
    parser.add_argument("--demo_dir", type=read_path, default=folder, help="the script's folder")
    print_text(summary(parser.parse_args(argv).demo_dir))


if __name__ == "__main__":
    run_main(main)
