"""What every program does that scores sub-networks: its images, and what its results belong to."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import paddle

from hnas.base.device import Arithmetic, on_gpu
from hnas.base.errors import UserError
from hnas.base.files import file_digest
from hnas.dataset.image_folder import ImageList
from hnas.evaluation.gpu_kernels import choose_variant
from hnas.evaluation.images import DecodedImages, ImagesOnDemand, balanced_order
from hnas.evaluation.variants import Precision, Variant, cpu_variant
from hnas.parallel.distributed import agree, from_main_process, world_size
from hnas.utils.memory_needs import check_cache
from hnas.utils.options import Options
from hnas.utils.weights import find_checkpoint

logger = logging.getLogger(__name__)


def scored_order(options: Options, images: ImageList) -> np.ndarray:
    """Which images to score on, in the order in which that is done.

    Raises:
        UserError: more are asked for than there are.
    """
    if options.eval_images > len(images):
        raise UserError(
            f"--eval_images {options.eval_images}, but {images.folder} has {len(images)}; lower "
            "it, or give 0 for all"
        )
    return balanced_order(images.labels, options.seed)[: options.eval_images or None]


def decoded_images(
    options: Options, images: ImageList, order: np.ndarray
) -> DecodedImages | ImagesOnDemand:
    """The images in that order; one of several processes decodes those of its chunks only."""
    if world_size() > 1:
        return ImagesOnDemand(images, order, options.image_size)
    check_cache(options, len(order))
    folder = Path(options.save_dir)
    return DecodedImages(images, order, options.image_size, options.cache_gb, folder)


def shared_hash(own: str, images: ImageList) -> str:
    """The main process's hash of the images.

    It holds modification times, which may differ where every machine has its own copy of the
    images; names must be the same.
    """
    agree([int(images.digest()[:15], 16)], "the validation images")
    return bytes(from_main_process(list(bytes.fromhex(own)))).hex()


def identity(
    options: Options, images: str, calibration: paddle.Tensor | None, arithmetic: Arithmetic
) -> dict[str, str]:
    """What a saved state belongs to: whatever accuracies depend on besides their architectures.

    ``images`` is the hash of the images to score on. All processes compute with the same.
    """
    setting = f"{options.backbone}, {arithmetic}"
    agree([int(hashlib.sha256(setting.encode()).hexdigest()[:15], 16)], "device or Paddle")
    pixels = None if calibration is None else calibration.numpy().tobytes()
    return {
        "checkpoint": file_digest(find_checkpoint(options.ckpt_dir)),
        "image_list": images,
        "setting": setting,
        "calibration": "none" if pixels is None else hashlib.sha256(pixels).hexdigest(),
    }


def variant(arithmetic: Arithmetic, calibration: paddle.Tensor | None) -> Variant | None:
    """How the walk computes; None: on CPUs in float32, by what works there.

    Half precision is float16 on GPUs, eight times as fine as bfloat16, which CPUs have. What
    overflows is found.

    Raises:
        UserError: bfloat16 with re-calibration.
    """
    if not on_gpu():
        if arithmetic.amp == "O0":
            return None
        if calibration is not None:
            raise UserError(
                "--amp O1 on a CPU is bfloat16, whose rounding re-calibration magnifies; give "
                "--amp O0, or --bn_calibration_images 0 for weights trained with freeze_bn"
            )
        chosen = cpu_variant(Precision.BFLOAT16)
        logger.info("the walk computes in %s", chosen)
        return chosen
    rounding = Precision.TF32 if arithmetic.tf32 else Precision.FLOAT32
    precision = rounding if arithmetic.amp == "O0" else Precision.FLOAT16
    return choose_variant(precision, 0 if calibration is None else len(calibration))
