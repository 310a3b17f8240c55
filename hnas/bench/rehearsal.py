"""Stage three as users run it, on few images: killed once, resumed, and timed part by part.

    OMP_NUM_THREADS=2 python -m hnas.bench.rehearsal --modelarch_file F --out output/rehearsal

Two chunks of a list of architectures at full size, by the entry script, in a process of its own
that is killed within the second chunk and started again. Images are smooth noise, one for each
class; weights are random, with the statistics of these images. The last line is JSON.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from pathlib import Path

import numpy as np
import paddle

from hnas.architecture_file import read_architectures
from hnas.base.command_line import LARGEST_SIDE, OneLineParser, path_text, whole_number
from hnas.base.device import cpu_threads, processor
from hnas.base.errors import UserError, run_main
from hnas.base.onednn import refuse_without_bfloat16
from hnas.bench.speed_scoring import Limit, smooth_noise
from hnas.dataset.image_folder import scan_images
from hnas.dataset.loader import EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform, normalize
from hnas.evaluation.tree import PrefixTree
from hnas.models.elastic import freeze_statistics
from hnas.models.pinasv2 import build_network
from hnas.utils.weights import write_state

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
CHUNKS = 2
CHUNK_LINE = re.compile(
    r"chunk \d+/\d+: \d+ images, .*, ([\d.]+) s, .*peak memory ([\d.]+) GiB, ([\d.]+) % outside"
)
START_LINE = re.compile(r"architectures, \d+ images in chunks of \d+")


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.rehearsal",
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--modelarch_file", type=path_text, required=True, default=SUPPRESS, help="what to score"
    )
    parser.add_argument("--out", default="output/rehearsal", help="folder of all files")
    parser.add_argument("--backbone", default="resnet48", help="supernet")
    parser.add_argument("--image_size", type=whole_number(32, LARGEST_SIDE), default=224, help="px")
    parser.add_argument("--chunk_size", type=whole_number(1, 1024), default=2, help="images")
    parser.add_argument(
        "--num_classes", type=whole_number(2, 10_000), default=1000, help="of the network"
    )
    parser.add_argument("--amp", choices=("O0", "O1"), default="O0", help="O1: bfloat16")
    parser.add_argument(
        "--kill_after",
        type=whole_number(0),
        default=30,
        help="seconds of the second chunk before the kill",
    )
    options = parser.parse_args(argv)
    if options.amp != "O0":
        refuse_without_bfloat16(f"--amp {options.amp}")
    work = Path(options.out)
    archs = list(read_architectures(options.modelarch_file).values())
    before = prepare(options, work, archs)
    result = rehearse(options, work) | before
    predicted = before["macs_shared"] * options.chunk_size / before["largest_macs_per_s"]
    result["predicted_chunk_s"] = round(predicted, 1)
    result["chunk_over_predicted"] = [
        round(chunk["seconds"] / predicted, 3) for chunk in result["chunks"]
    ]
    sys.stdout.write(json.dumps(result) + "\n")


@paddle.no_grad()
def prepare(options, work: Path, archs: list) -> dict:
    """Images, weights, and what the plan would take: the largest network's rate."""
    if (work / "stage3").is_dir():
        raise UserError(f"{work / 'stage3'} is of an earlier rehearsal; remove it")
    rng = np.random.default_rng(0)
    for label in range(options.num_classes):
        folder = work / "images" / "val" / f"n{label:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth_noise(rng, options.image_size * 8 // 7).save(folder / "0.png")
    network = build_network(options.backbone, options.num_classes)
    images = scan_images(work / "images", "val")
    dataset = ImageDataset(images, EvalTransform(options.image_size), 0)
    pixels, _ = next(iter(EvalLoader(dataset, 16)))
    network.train()
    for _ in range(20):
        network(normalize(pixels))
    freeze_statistics(network)
    network.eval()
    (work / "stage2").mkdir(exist_ok=True)
    write_state(work / "stage2" / "0.pdparams", network.state_dict())
    limit = Limit(network, options.image_size, options.chunk_size, work)
    limit.run(10)
    began = time.perf_counter()
    macs = PrefixTree(network.space, archs).macs(options.image_size)
    return {
        "processor": processor(),
        "threads": cpu_threads(),
        "n_arch": len(archs),
        "image_size": options.image_size,
        "chunk_size": options.chunk_size,
        "amp": options.amp,
        "macs_shared": macs,
        "counting_s": round(time.perf_counter() - began, 2),
        "largest_macs_per_s": round(limit.macs_per_second()),
    }


def rehearse(options, work: Path) -> dict:
    """Run, kill, run again; what the log and the saved state tell."""
    command = [
        *(sys.executable, str(ROOT / "train_supernet.py"), "run", "--device", "cpu"),
        *("--backbone", options.backbone, "--image_size", str(options.image_size)),
        *("--ckpt_dir", str(work / "stage2" / "0.pdparams"), "--image_dir", str(work / "images")),
        *("--modelarch_file", str(options.modelarch_file), "--save_dir", str(work / "stage3")),
        *("--eval_images", str(CHUNKS * options.chunk_size), "--amp", options.amp),
        *("--chunk_size", str(options.chunk_size), "--num_workers", "0"),
        *("--bn_calibration_images", "0"),
    ]
    first = follow(command, work, kill_after=options.kill_after)
    second = follow(command, work)
    if len(second["chunks"]) != 1 or len(first["chunks"]) != 1:
        raise UserError(
            f"not one chunk before the kill and one behind it; remove {work / 'stage3'}"
        )
    with np.load(work / "stage3" / "eval_state.npz") as state:
        columns = {name: state[name] for name in ("top1", "near1", "near5")}
    return {
        "start_s": [first["start_s"], second["start_s"]],
        "chunks": [*first["chunks"], *second["chunks"]],
        "killed_after_s": options.kill_after,
        "end_s": second["end_s"],
        "near_ties": int(columns["near1"].sum() + columns["near5"].sum()),
        "mean_top1": round(float(columns["top1"].mean()) / (CHUNKS * options.chunk_size), 4),
    }


def follow(command: list[str], work: Path, kill_after: int | None = None) -> dict:
    """What a run's log says; killed so many seconds after its first chunk, if that is given."""
    log = work / ("resumed.log" if kill_after is None else "killed.log")
    began = time.perf_counter()
    found: dict = {"chunks": []}
    last = began
    with log.open("w", encoding="utf-8") as kept:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        for line in process.stderr:
            kept.write(line)
            kept.flush()
            if START_LINE.search(line):
                found["start_s"] = round(time.perf_counter() - began, 1)
            elif match := CHUNK_LINE.search(line):
                seconds, peak, outside = match.groups()
                found["chunks"].append(
                    {
                        "seconds": float(seconds),
                        "peak_gib": float(peak),
                        "outside_operators": round(float(outside) / 100, 4),
                    }
                )
                last = time.perf_counter()
                logger.info("%s", line.strip())
                if kill_after is not None:
                    time.sleep(kill_after)
                    process.send_signal(signal.SIGKILL)
        code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise UserError(f"stage three failed (exit code {code}), see {log}")
    found["end_s"] = round(time.perf_counter() - last, 1)
    return found


if __name__ == "__main__":
    run_main(main)
