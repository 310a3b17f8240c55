"""The folder of an exported network: its card, and a program that classifies images by them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import paddle

import hnas
from hnas.base.files import (
    digest_path,
    file_digest,
    remove_leftovers,
    replacing,
    write_digest,
    write_json,
    write_text,
)
from hnas.dataset.transforms import IMAGENET_MEAN, IMAGENET_STD, shorter_side
from hnas.exporting.formats import FILES, INPUT, OUTPUT, Found
from hnas.search_space import Architecture, SearchSpace

CARD, PROGRAM = "card.json", "predict.py"

HEAD = '''\
"""Classify images by the network beside this file: python predict.py IMAGE ...

Needs numpy, pillow and {package}; nothing else.
"""

import json
import sys
from pathlib import Path

import numpy as np
{imports}
from PIL import Image

here = Path(__file__).resolve().parent
card = json.loads((here / "card.json").read_text(encoding="utf-8"))
'''

LOADING = {
    "onnx": """\
session = onnxruntime.InferenceSession(here / "network.onnx")


def network(x):
    return session.run(None, {"image": x})[0]
""",
    "inference": """\
program = paddle.jit.load(str(here / "network"))


def network(x):
    return program(paddle.to_tensor(x)).numpy()
""",
    "pdparams": """\
state = paddle.load(str(here / "network.pdparams"))  # a pickle: load what you trust only
w = {name: part.astype("float32") for name, part in state.items() if "@" not in name}


def norm_of_conv(x, conv, norm, stride):
    filters = w[f"{conv}.weight"]
    x = F.conv2d(x, filters, stride=stride, padding=filters.shape[2] // 2)
    parts = ("_mean", "_variance", "weight", "bias")
    return F.batch_norm(x, *(w[f"{norm}.{part}"] for part in parts))


def network(x):
    x = F.relu(norm_of_conv(paddle.to_tensor(x), "blocks.0.conv", "blocks.0.bn", 2))
    x = F.max_pool2d(x, 3, 2, 1)
    for index, stride in enumerate(card["strides"], 1):
        block, shortcut = f"blocks.{index}", x
        if f"{block}.downsample.0.weight" in w:
            down = f"{block}.downsample"
            shortcut = norm_of_conv(x, f"{down}.0", f"{down}.1", stride)
        x = F.relu(norm_of_conv(x, f"{block}.conv1", f"{block}.bn1", stride))
        x = F.relu(norm_of_conv(x, f"{block}.conv2", f"{block}.bn2", 1) + shortcut)
    head = f"blocks.{len(card['strides']) + 1}.fc"
    return F.linear(x.mean([2, 3]), w[f"{head}.weight"], w[f"{head}.bias"]).numpy()
""",
}

TAIL = '''\


def prepare(path):
    """The image as float32 [1, 3, S, S]: shorter side, centre, mean and deviation of the card."""
    image, how = Image.open(path).convert("RGB"), card["preprocessing"]
    (w, h), short, size = image.size, how["resize_shorter_side"], how["crop"]
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    left, top = (round((side - size) / 2) for side in (w, h))
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + size, top + size))
    x = (np.float32(image) / np.float32(255) - np.float32(how["mean"])) / np.float32(how["std"])
    return x.transpose(2, 0, 1)[np.newaxis]


for path in sys.argv[1:]:
    print(path, card["classes"][network(prepare(path)).argmax()])
'''

IMPORTS = {
    "onnx": "import onnxruntime",
    "inference": "import paddle",
    "pdparams": "import paddle\nimport paddle.nn.functional as F",
}


def program(form: str) -> str:
    """The text of ``predict.py`` for a format: pdparams, inference or onnx."""
    package = "onnxruntime" if form == "onnx" else "paddlepaddle"
    return HEAD.format(package=package, imports=IMPORTS[form]) + LOADING[form] + TAIL


def describe(
    space: SearchSpace,
    arch: Architecture,
    size: int,
    classes: Sequence[str],
    found: Found,
    statistics: str,
) -> dict:
    """For the card: what the network is, how good, and how its images are prepared.

    Args:
        size: height and width of its images, px.
        found: on the validation images.
        statistics: of BatchNorm, in words.
    """
    counts = found.counts
    return {
        "macs": space.macs(arch, size, len(classes)),
        "params": space.params(arch, len(classes)),
        "accuracy": {
            "top1": float(counts.accuracy()[1]),
            "top5": float(counts.top5_accuracy()[1]),
            "hits": int(counts.top1[1]),
            "hits_of_source": int(counts.top1[0]),
            "images": counts.images,
            "largest_logit_difference": found.difference,
        },
        "statistics": statistics,
        "input": {"name": INPUT, "shape": ["N", 3, size, size], "dtype": "float32"},
        "output": {"name": OUTPUT, "shape": ["N", len(classes)], "dtype": "float32"},
        "preprocessing": {
            "colours": "RGB, 8 bits, EXIF orientation ignored",
            "resize_shorter_side": shorter_side(size),
            "resize": "Pillow's bilinear; the longer side is cut to whole pixels",
            "crop": size,
            "crop_place": "centre; offsets round((side - crop) / 2), a half to the even number",
            "scale": "1/255",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
        "strides": [stride for *_, stride in space.plan(arch).blocks()],
        "classes": list(classes),
    }


def write_folder(folder: Path, made: Path, form: str, card: Mapping) -> None:
    """Write the network, its program and, last, the card.

    Args:
        made: where the files of the network's format lie.

    Raises:
        UserError: the folder cannot be written.
    """
    remove_leftovers(folder)
    digests = {name: file_digest(made / name) for name in FILES[form]}
    for name in digests:
        with replacing(folder / name) as temporary:
            shutil.copyfile(made / name, temporary)
            digest_path(folder / name).unlink(missing_ok=True)
        write_digest(folder / name, digests[name])
    write_text(folder / PROGRAM, program(form))
    versions = {"pinas": hnas.__version__, "paddle": paddle.__version__}
    write_json(folder / CARD, {**card, "files": digests, "versions": versions})
