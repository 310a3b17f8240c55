"""Kill training at random moments, resume it, and compare with a run that was left alone.

    python -m hnas.bench.chaos [--kills 20] [--stages 1 2] [--also scoring cache launcher]

Both stages train the mini networks on a few scans of digits, on the CPU. Each is killed (SIGKILL)
the given number of times, at moments drawn uniformly over the duration of training, and resumed
with --resume auto until it ends. The final weights, the first epoch's and the losses must be
those of the undisturbed run, bit for bit. --also kills stage 3; training that begins with building
a cache of pixels; and the launcher of two processes, which must end within a minute. The last line
printed is a JSON object; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from hnas.base.command_line import OneLineParser, whole_number
from hnas.base.errors import UserError, run_main
from hnas.base.files import write_json
from hnas.bench.speed_training_worker import calm
from hnas.dataset.image_folder import scan_images
from hnas.dataset.loader import EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform, normalize
from hnas.models.elastic import measure
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48_MINI
from hnas.tools.digits_folder import write_digits
from hnas.utils.weights import read_weights, write_state

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {1: "train_supernet_pinas_stage1.py", 2: "train_supernet_pinas_stage2_simple.py"}
BACKBONES = {1: "resnet48pinasv2_mini", 2: "resnet48_mini"}
COMPARED = ("0.pdparams", "final.pdparams")
LAUNCHERS = {2: "local_train_pinas2_simple_wholenet_nof.sh"}
POLL_SECONDS = 0.005
MOST_SECONDS = 60
"""In which processes must end when their launcher was killed."""
STEP_LINE = re.compile(r"epoch (\d+)/\d+ step (\d+)/(\d+) lr")
START_LINE = re.compile(r"training from epoch (\d+) step (\d+)")


def command(script: str, flags: dict) -> list[str]:
    """An entry script with its flags."""
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    return [sys.executable, "-u", str(ROOT / script), "run", *arguments]


@dataclass
class Training:
    """One stage on the inputs in ``work``; every start of it writes to the same ``save_dir``."""

    stage: int
    work: Path
    epochs: int
    save_steps: int
    kind: str = ""

    begins = START_LINE
    """The line from which on it may be killed."""

    @property
    def name(self) -> str:
        return self.kind or f"stage{self.stage}"

    @property
    def save_dir(self) -> Path:
        return self.work / self.name

    @property
    def log(self) -> str:
        """What the latest start has printed so far."""
        return (self.work / "log").read_text(encoding="utf-8")

    def flags(self) -> dict:
        """The program's flags; it resumes from what is in ``save_dir``."""
        return {
            "backbone": BACKBONES[self.stage],
            "image_dir": self.work / "images",
            "pretrained": self.work / "pretrained.pdparams",
            "save_dir": self.save_dir,
            "resume": "auto",
            "max_epoch": self.epochs,
            "save_steps": self.save_steps,
            "image_size": 32,
            "batch_size": 8,
            "queue_size": 64,
            "dyna_batch_size": 2,
            "lr": 0.03,
            "warmup": 1,
            "eval_freq": 0,
            "log_freq": 1,
            "num_workers": 0,
            "device": "cpu",
        }

    def command(self) -> list[str]:
        """The program with its flags."""
        return command(SCRIPTS[self.stage], self.flags())

    def variables(self) -> dict:
        """Environment variables besides the usual ones."""
        return {}

    def start(self) -> subprocess.Popen:
        """Start the program."""
        environment = {
            "OMP_NUM_THREADS": "2",
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(self.work / "cache"),
            **{name: str(value) for name, value in self.variables().items()},
        }
        with open(self.work / "log", "w", encoding="utf-8") as log:
            return subprocess.Popen(
                self.command(),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def run(self, kill_after: float | None = None) -> tuple[bool, float]:
        """Run to the end, or kill so many seconds after training began.

        Returns:
            Whether it was killed, and the seconds from the beginning of training.

        Raises:
            UserError: the program failed by itself.
        """
        process = self.start()
        began = None
        while process.poll() is None:
            if began is None and self.begins.search(self.log):
                began = time.perf_counter()
            if None not in (began, kill_after) and time.perf_counter() - began >= kill_after:
                self.kill(process)
                return True, kill_after
            time.sleep(POLL_SECONDS)
        if process.returncode:
            last = (self.log.splitlines() or ["nothing printed"])[-1]
            raise UserError(f"{self.name} ended with {process.returncode}: {last}")
        return False, time.perf_counter() - (began or time.perf_counter())

    def kill(self, process: subprocess.Popen) -> None:
        """End the program without a warning."""
        process.kill()
        process.wait()

    def steps_done(self) -> int:
        """Steps from the first epoch's start that the log of the latest start has seen."""
        lines = STEP_LINE.findall(self.log)
        if not lines:
            return self.steps_resumed()
        epoch, step, steps = map(int, lines[-1])
        return (epoch - 1) * steps + step

    def steps_resumed(self) -> int:
        """Steps that were done before the latest start."""
        epoch, step = map(int, START_LINE.search(self.log).groups())
        images = sum(1 for _ in (self.work / "images" / "train").glob("*/*"))
        return (epoch - 1) * (images // 8) + step - 1

    def result(self) -> dict:
        """All that must not depend on kills: weights as bytes, and the losses."""
        weights = {
            (file, name): (array.dtype.str, array.shape, array.tobytes())
            for file in COMPARED
            for name, array in read_weights(self.save_dir / file).items()
        }
        history = json.loads((self.save_dir / "history.json").read_text(encoding="utf-8"))
        return {**weights, "epoch_losses": history["epoch_losses"]}

    def saving_was_cut(self) -> bool:
        """Whether ``save_dir`` holds a set that is not whole, or a temporary file."""
        names = [path.name for path in self.save_dir.glob("*")]
        weights = {name.removesuffix(".pdparams") for name in names if name.endswith(".pdparams")}
        states = {name.removesuffix(".pdstates") for name in names if name.endswith(".pdstates")}
        return any(name.endswith(".tmp") for name in names) or bool(weights - states - {"final"})


def write_inputs(work: Path, images_per_class: int) -> None:
    """The images and a network to start from: random weights, but fit to be trained frozen."""
    write_digits(work / "images")
    for folder in (work / "images").glob("*/*"):
        for path in sorted(folder.iterdir())[images_per_class:]:
            path.unlink()
    paddle.seed(0)
    network = build_network("resnet48_mini", num_classes=10, elastic=False)
    calm(network)
    measure_statistics(network, work / "images", image_size=32)
    write_state(work / "pretrained.pdparams", network.state_dict())


def measure_statistics(network: nn.Layer, image_dir: Path, image_size: int) -> None:
    """Give a new network the BatchNorm statistics of the training images.

    Training at frozen statistics needs some that fit the weights, as pretrained networks have.
    """
    images = scan_images(image_dir, "train")
    dataset = ImageDataset(images, EvalTransform(image_size), seed=0)
    ((pixels, _),) = EvalLoader(dataset, len(images))
    network.eval()
    norms = [layer for layer in network.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    measure(network, norms, normalize(pixels))


def torment(training: Training, kills: int, seed: int) -> dict:
    """Kill and resume ``training`` until it was killed ``kills`` times; what came of it."""
    rng = random.Random(seed)
    _, seconds = training.run()
    expected = training.result()
    report = {"kills": 0, "runs": 0, "identical": 0, "cut_while_saving": 0, "most_steps_lost": 0}
    while report["kills"] < kills:
        shutil.rmtree(training.save_dir)
        done = 0
        killed = True
        while killed:
            kill_after = rng.uniform(0, seconds) if report["kills"] < kills else None
            killed, _ = training.run(kill_after)
            lost = done - training.steps_resumed()
            report["most_steps_lost"] = max(report["most_steps_lost"], lost)
            done = training.steps_done()
            report["kills"] += killed
            report["cut_while_saving"] += killed and training.saving_was_cut()
        report["runs"] += 1
        result = training.result()
        report["identical"] += result == expected
        for key in expected:
            if result.get(key) != expected[key]:
                logger.warning("%s: %s differs", training.name, key)
        logger.info("%s: %s", training.name, report)
    return report


def passed(report: dict, save_steps: int) -> bool:
    """Whether nothing differed, and no more was lost than since the last checkpoint."""
    # A step may have been logged whose checkpoint was being written.
    return report["identical"] == report["runs"] and report["most_steps_lost"] <= save_steps


class Scoring(Training):
    """Stage 3; its steps are chunks."""

    begins = re.compile(r"images in chunks of")

    def command(self) -> list[str]:
        return command("train_supernet.py", self.flags())

    def flags(self) -> dict:
        return {
            "backbone": "resnet48_mini",
            "image_dir": self.work / "images",
            "ckpt_dir": self.work / "pretrained.pdparams",
            "modelarch_file": self.work / "archs.json",
            "save_dir": self.save_dir,
            "image_size": 32,
            "chunk_size": 2,
            "bn_calibration_images": 8,
            "num_workers": 0,
            "device": "cpu",
        }

    def steps_done(self) -> int:
        lines = re.findall(r"chunk \d+/\d+: (\d+) images", self.log)
        return int(lines[-1]) // 2 if lines else self.steps_resumed()

    def steps_resumed(self) -> int:
        line = re.search(r"continuing after (\d+) of", self.log)
        return int(line[1]) // 2 if line else 0

    def result(self) -> dict:
        names = ("submission.json", "submission_top5.json", "estimates.json")
        return {name: (self.save_dir / name).read_bytes() for name in names}

    def saving_was_cut(self) -> bool:
        return any(path.name.endswith(".tmp") for path in self.save_dir.glob(".*"))


class CacheBuild(Training):
    """Training that decodes all images first, anew whenever it starts; kills begin with that."""

    begins = re.compile(r"\d+ images, \d+ classes")

    @property
    def cache(self) -> Path:
        return self.work / "pixels"

    def flags(self) -> dict:
        return {**super().flags(), "use_tensor_dataset": True, "cache_dir": self.cache}

    def start(self) -> subprocess.Popen:
        for path in self.cache.glob("[!.]*"):
            path.unlink()
        return super().start()

    def steps_done(self) -> int:
        return 0  # others count these

    steps_resumed = steps_done

    def result(self) -> dict:
        left = sorted(path.name for path in self.cache.glob(".*"))
        return {**super().result(), "temporary files in the cache": left}

    def saving_was_cut(self) -> bool:
        return any(self.cache.glob(".*"))


class Launched(Training):
    """Two processes, whose launcher is killed."""

    def command(self) -> list[str]:
        return ["sh", LAUNCHERS[self.stage]]

    def variables(self) -> dict:
        own = {"processes": 2, "threads": 1, "batch_size": 4, "use_ckpt": False}
        return {**self.flags(), **own, "python": sys.executable, "PYTHONWARNINGS": "ignore"}

    def kill(self, process: subprocess.Popen) -> None:
        """Kill the launcher, and wait for its processes.

        Raises:
            UserError: they do not end.
        """
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        super().kill(process)
        began = time.perf_counter()
        while any(map(is_running, children)):
            if time.perf_counter() - began > MOST_SECONDS:
                raise UserError(f"processes {children} have outlived their launcher")
            time.sleep(POLL_SECONDS)


def is_running(process: str) -> bool:
    """Whether a process is there and not just waiting to be collected."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


OTHERS = {"scoring": (Scoring, 2), "cache": (CacheBuild, 2), "launcher": (Launched, 2)}
"""What else is killed: how, and the stage whose inputs it takes."""


def write_architectures(work: Path) -> None:
    """What stage 3 scores."""
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(0), 30)
    content = {name: {"acc": 0.0, "arch": arch.code} for name, arch in archs.items()}
    write_json(work / "archs.json", content)


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.chaos",
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--kills", type=whole_number(1), default=20, help="of each stage")
    parser.add_argument(
        "--stages", type=whole_number(1, 2), nargs="*", default=list(SCRIPTS), help="of training"
    )
    parser.add_argument(
        "--also", choices=OTHERS, nargs="+", default=[], help="what else is killed as often"
    )
    parser.add_argument("--images", type=whole_number(1), default=8, help="of each class")
    parser.add_argument("--epochs", type=whole_number(1), default=3, help="of a run")
    parser.add_argument("--save_steps", type=whole_number(1), default=2, help="steps a checkpoint")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the moments")
    options = parser.parse_args(argv)

    began = time.perf_counter()
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_inputs(work, options.images)
        write_architectures(work)
        for stage in options.stages:
            training = Training(stage, work, options.epochs, options.save_steps)
            reports[f"stage{stage}"] = torment(training, options.kills, options.seed + stage)
        for kind in options.also:
            how, stage = OTHERS[kind]
            training = how(stage, work, options.epochs, options.save_steps, kind)
            reports[kind] = torment(training, options.kills, options.seed)
    ok = all(passed(report, options.save_steps) for report in reports.values())
    seconds = round(time.perf_counter() - began, 1)
    sys.stdout.write(json.dumps({"ok": ok, **reports, "seconds": seconds}) + "\n")
    if not ok:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
