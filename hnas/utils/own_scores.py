"""``--score_function``: a user's own score of sub-networks in place of accuracy."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import paddle
from tqdm import tqdm

from hnas.architecture_file import MOST
from hnas.base.errors import UserError, word_of
from hnas.base.files import write_json
from hnas.dataset.transforms import normalize
from hnas.evaluation.images import ScoredImages
from hnas.evaluation.results import keep_more
from hnas.models.elastic import ElasticResNet
from hnas.parallel.distributed import world_size
from hnas.programs.options import Options
from hnas.search_space import Architecture


def score_by_function(
    options: Options,
    network: ElasticResNet,
    archs: Sequence[Architecture],
    images: ScoredImages,
    calibration: paddle.Tensor | None,
    scores: dict[str, float],
) -> None:
    """What ``score(network, arch, images, labels)`` gives for sub-networks of a supernet.

    Its network is the sub-network by itself, in eval mode; images are normalised float32 [N, 3, H,
    W], labels int64 [N]. ``calibration`` are uint8 images for BatchNorm re-calibration, or None.
    ``scores``, by code, get these in their order, and are in ``scores.json`` whatever ends this; or
    in ``scores_unfinished.json``, where earlier ones are there that this has not replaced yet.

    Raises:
        UserError: there is no such function, other flags contradict it, it fails, or it gives no
            finite number; the latter two name the architecture.
    """
    name = f"--score_function {options.score_function}"
    if options.amp != "O0" or options.target_tau or options.images_part or world_size() > 1:
        raise UserError(
            f"{name} runs in one process, in float32, on one batch; leave out --amp, --target_tau "
            "and --images_part"
        )
    module, _, function = options.score_function.rpartition(".")
    (pixels, labels), last = images.batch(0, len(images)), Path(options.save_dir) / "scores.json"
    earlier = last.exists() and not scores
    path = last.with_name("scores_unfinished.json") if earlier else last
    if earlier:
        keep_more(path, 0)  # of a function that was stopped
    place = "give module.function, of a module that is installed or lies beside the program"
    network.eval()
    network.mixed = False  # whether its statistics will do was just said, once
    try:
        score = getattr(import_module(module), function)
        for arch in tqdm(archs, desc="scoring", unit="arch", mininterval=1):
            place = f"architecture {arch.code}"
            own = network.extract(arch, calibration)
            paddle.seed(options.seed)  # for what it may draw
            value = float(score(own, arch, normalize(pixels), labels.clone()))
            if not abs(value) <= MOST:
                raise ValueError(f"{value} is no number within +-{MOST:g}")
            scores[arch.code] = value
            if len(scores) % 1000 == 0:  # what SIGKILL may cost
                write_json(path, scores)
    except Exception as error:  # a user's code may fail in any way
        file = module.rpartition(".")[2]
        lines = traceback.extract_tb(error.__traceback__)  # down into Paddle's; theirs is wanted
        own = [f" ({at.name}, line {at.lineno})" for at in lines if Path(at.filename).stem == file]
        told = f"{type(error).__name__}: {word_of(error)}{''.join(own[-1:])}"
        raise UserError(f"{name}: {place}: {told}") from None
    finally:
        if scores:
            write_json(path, scores)
    if earlier:
        keep_more(last, len(scores))
    path.replace(last)
