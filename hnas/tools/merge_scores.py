"""Join the files of all shards of a list into the results of the whole list.

    python -m hnas.tools.merge_scores --out FOLDER SHARD...

SHARD is a file shard_2_of_8.json that train_supernet.py --arch_shard 2/8 wrote. FOLDER gets what a
run over the whole list would have written: submission.json, submission_top5.json,
channel_sample.txt and estimates.json.
"""

from __future__ import annotations

from hnas.base.command_line import OneLineParser, path_text, read_path
from hnas.base.errors import run_main
from hnas.base.files import check_writable, write_json
from hnas.evaluation.results import ESTIMATES_FILE, complete_estimates, write_results
from hnas.evaluation.shard_files import join


def main(argv=None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", metavar="SHARD", type=path_text, nargs="+", help="files to join")
    parser.add_argument("--out", type=read_path, required=True, help="folder to write to")
    options = parser.parse_args(argv)
    check_writable(options.out, "--out")

    archs, counts = join(options.shards)
    write_json(options.out / ESTIMATES_FILE, complete_estimates(archs, counts))
    write_results(options.out, archs, counts)


if __name__ == "__main__":
    run_main(main)
