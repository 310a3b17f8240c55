"""Entry scripts in the tests' own process, on images of noise; whole runs beside it, on digits."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
from independent import calm
from PIL import Image

from hnas.dataset.image_folder import scan_images
from hnas.dataset.loader import EvalLoader, ImageDataset
from hnas.dataset.transforms import EvalTransform, normalize
from hnas.models.elastic import batch_norms, measure
from hnas.models.pinasv2 import build_network
from hnas.tools.digits_folder import write_digits
from hnas.weights.loading import read_weights, write_state

ROOT = Path(__file__).resolve().parents[1]
CLASSES = list("0123456789")
TIMEOUT = 120
SCRIPTS = {1: "train_supernet_pinas_stage1.py", 2: "train_supernet_pinas_stage2_simple.py"}
LAUNCHERS = {
    1: "local_train_pinas1_wholenet.sh",
    2: "local_train_pinas2_simple_wholenet_nof.sh",
    3: "local_eval.sh",
}


def launcher_variables(text: str) -> dict[str, str]:
    """The defaults of the variables that a launcher's text takes from the environment."""
    return dict(re.findall(r"^(\w+)=\$\{\1:-(.*)\}(?: +#.*)?$", text, re.M))


def text_of(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def noise_images(
    root: Path, number: int = 2, seed: int = 0, suffix: str = ".png", classes=CLASSES
) -> Path:
    """So many training and validation images in each of ten or given classes, all of one time.

    Those of other seeds have the same names and, as ``.bmp``, the same sizes.
    """
    rng = np.random.default_rng(seed)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                path = root / split / name / f"{index}{suffix}"
                Image.fromarray(pixels).save(path)
                os.utime(path, (1_500_000_000, 1_500_000_000))
    return root


def run(script, monkeypatch, images, save_dir, **flags) -> None:
    """What ``python3 SCRIPT run --flag value ...`` does."""
    common = {"image_dir": images, "save_dir": save_dir, "image_size": 32, "num_workers": 0}
    flags = {**common, "device": "cpu", "batch_size": 10, **flags}
    line = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["script", "run", *line])
    script.main()


def arrays_of(network) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def assert_same_bits(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


def write_inputs(work: Path, images_per_class: int) -> None:
    """Digits, and a network to start from: random weights, but fit to be trained frozen."""
    write_digits(work / "images")
    for folder in (work / "images").glob("*/*"):
        for path in sorted(folder.iterdir())[images_per_class:]:
            path.unlink()
    paddle.seed(0)
    network = build_network("resnet48_mini", num_classes=10, elastic=False)
    calm(network)
    # Training at frozen statistics needs some that fit the weights, as pretrained networks have.
    images = scan_images(work / "images", "train")
    ((pixels, _),) = EvalLoader(ImageDataset(images, EvalTransform(32), seed=0), len(images))
    network.eval()
    measure(network, batch_norms(network), normalize(pixels))
    write_state(work / "pretrained.pdparams", network.state_dict())


SMALL = "image_size=32 batch_size=4 dyna_batch_size=2 lr=0.03 warmup=1 eval_freq=0 log_freq=1"
SMALL = dict(flag.split("=") for flag in f"{SMALL} num_workers=0 device=cpu".split())


@dataclass
class Runs:
    """Starts the stages on a few digits: the scripts or, on several processes, the launchers."""

    work: Path
    flags: dict = field(default_factory=dict)

    def start(self, stage: int, name: str, processes: int = 0, **flags) -> subprocess.Popen:
        own = {
            "backbone": "resnet48pinasv2_mini" if stage == 1 else "resnet48_mini",
            "image_dir": self.work / "images",
            "pretrained": self.work / "pretrained.pdparams",
            "save_dir": self.work / name,
        }
        flags = {**SMALL, **own, **self.flags, **flags}
        flags = {key: str(value) for key, value in flags.items()}
        environment = {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        if processes:
            command = ["sh", LAUNCHERS[stage]]
            environment |= {"processes": str(processes), "threads": "1", "python": sys.executable}
            environment |= {"use_ckpt": "False", **flags}
        else:
            line = [part for key, value in flags.items() for part in (f"--{key}", value)]
            command = [sys.executable, "-u", SCRIPTS[stage], "run", *line]
        told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = {**os.environ, **environment}
        return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=not processes, **told)

    def run(self, stage: int, name: str, processes: int = 0, code: int = 0, **flags) -> str:
        """Run to the end; gives what was printed."""
        process = self.start(stage, name, processes, **flags)
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code, output[-3000:]
        return output

    def weights(self, name: str, file: str = "final") -> dict[str, np.ndarray]:
        return read_weights(self.work / name / f"{file}.pdparams")

    def losses(self, name: str) -> list[float]:
        return json.loads((self.work / name / "history.json").read_text())["epoch_losses"]

    def assert_same(self, one: str, other: str) -> None:
        for file in ("0", "final"):
            assert_same_bits(self.weights(one, file), self.weights(other, file))
        assert self.losses(one) == self.losses(other)
