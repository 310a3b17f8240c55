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
)
from hnas.dataset.image_folder import FORMATS, IMAGE_SUFFIXES
from hnas.dataset.transforms import IMAGENET_MEAN, IMAGENET_STD, shorter_side
from hnas.exporting.formats import FILES, INPUT, OUTPUT, Found
from hnas.search_space import Architecture, SearchSpace

CARD, PROGRAM = "card.json", "predict.py"


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
            "endings": sorted(IMAGE_SUFFIXES),
            "formats": list(FORMATS),
            "colours": "RGB, 8 bits, white behind what is transparent, EXIF orientation ignored",
            "resize_shorter_side": shorter_side(size),
            "resize": "Pillow's bilinear; the longer side is cut to whole pixels",
            "crop": size,
            "crop_place": "centre; offsets round((side - crop) / 2), a half to the even number",
            "scale": "1/255",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
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
    with replacing(folder / PROGRAM) as temporary:
        shutil.copyfile(Path(__file__).parent / PROGRAM, temporary)
    versions = {"pinas": hnas.__version__, "paddle": paddle.__version__}
    write_json(folder / CARD, {**card, "files": digests, "versions": versions})
