"""Stage three: score every architecture of a file with the stage-two supernet.

    python3 -u train_supernet.py run --image_dir DIR --ckpt_dir checkpoint_files/stage2/0.pdparams \
        --modelarch_file CVPR_2022_NAS_Track1_test.json
"""

from __future__ import annotations

from hnas.base.errors import UserError, hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import logging
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path

import numpy as np
import paddle
from tqdm import tqdm

from hnas.architecture_file import read_architectures
from hnas.base.device import Arithmetic
from hnas.base.files import write_json
from hnas.evaluation.counts import Counts
from hnas.evaluation.engine import ScoringSettings, evaluate_shared, wanted_variant
from hnas.evaluation.images import Batches, ScoredImages
from hnas.evaluation.ledger import Part
from hnas.evaluation.reference import evaluate_reference
from hnas.evaluation.results import (
    architectures_hash,
    evaluation_identity,
    warn_if_guessing,
    write_results,
)
from hnas.models.elastic import ElasticResNet
from hnas.models.pinasv2 import build_network
from hnas.parallel.distributed import is_main_process, leave, world_size
from hnas.programs.flags import Stage
from hnas.programs.memory_needs import IN_SCORING, check_chunk
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.programs.runtime import (
    calibration_images,
    decoded_images,
    require,
    scored_order,
    start,
    validation_images,
)
from hnas.ranking.correlations import correlations
from hnas.ranking.costs import Network
from hnas.search_space import Architecture, SearchSpace
from hnas.utils.own_scores import score_by_function
from hnas.utils.starting import start_from_checkpoint
from hnas.utils.validation import figures_text, read_ranked

logger = logging.getLogger(__name__)

PUBLIC_LIST = "model_str.txt"
"""The public code's file of codes, in the folder that it is started in."""


def main() -> None:
    options = parse_options(Stage.SCORE, about=__doc__.splitlines()[0])
    part = wanted_part(options)
    arithmetic = start(options, part=options.images_part)
    if world_size() > 1 and options.eval_engine == "reference":
        raise UserError("--eval_engine reference runs in one process; shared runs in several")
    require(options, "ckpt_dir")
    check_chunk(options)
    space = options.space
    listed = architectures(options, space)
    images = validation_images(options)
    network = build_network(options.backbone, len(images.classes), space)
    truth = read_ranked(options, network) if options.rank_gt else {}
    archs = listed | besides(listed, truth)
    checkpoint = start_from_checkpoint(network, options.ckpt_dir, images.classes)
    calibration = calibration_images(options, checkpoint.freeze_bn, classes=images.classes)
    order = scored_order(options, images)
    if options.score_function:
        batch = decoded_images(options, images, order[: options.batch_size])
        scores = {}
        score_by_function(options, network, list(archs.values()), batch, calibration, scores)
        rank(options, truth, archs, list(scores.values()))
        return
    if options.eval_engine == "reference":
        batches = Batches(decoded_images(options, images, order), options.batch_size)
        with tqdm(total=len(archs), desc="scoring", unit="arch", mininterval=1) as progress:
            counts = evaluate_reference(
                network, list(archs.values()), batches, calibration, progress.update
            )
    else:
        decoded, digest = decoded_images(options, images, order), checkpoint.digest
        counts = score(options, network, archs, decoded, digest, calibration, arithmetic, part)
    if is_main_process() and part is None:
        write_results(Path(options.save_dir), listed, counts.first(len(listed)))
        rank(options, truth, archs, counts.accuracy().tolist())
        warn_if_guessing(counts, len(images.classes), "the best sub-network")
    leave()


def besides(archs: dict[str, Architecture], truth: dict) -> dict[str, Architecture]:
    """What ``--rank_gt`` has and the list has not, by names that the list has not either."""
    known = set(archs.values())
    names = (name for name in map("rank_gt{}".format, count(1)) if name not in archs)
    return {next(names): arch for arch in truth if arch not in known}


def rank(options: Options, truth: dict, archs: dict, scores: Sequence[float]) -> None:
    """Compare scores [n] with ``--rank_gt``, and write those of its architectures by code."""
    if truth:
        by_arch = dict(zip(archs.values(), scores, strict=True))
        found = {arch.code: by_arch[arch] for arch in truth}
        write_json(Path(options.save_dir) / "rank_gt.json", found)
        tau = correlations([*found.values()], [*truth.values()])["kendall_tau_b"]
        logger.info("tau-b with --rank_gt %s: %s", options.rank_gt, figures_text(tau))


def wanted_part(options: Options) -> Part | None:
    """The part of the images that is to be scored; None: all of them.

    Raises:
        UserError: it is no part, or other flags contradict it or each other.
    """
    names = ("target_tau", "images_part")
    given = [name for name in names if getattr(options, name)]
    if options.eval_engine == "reference":
        if given:
            raise UserError(f"--{given[0]} is for --eval_engine shared, not for reference")
        if options.amp != "O0":
            raise UserError(
                f"--eval_engine reference computes in float32; --amp {options.amp} is for shared"
            )
    if not options.images_part:
        return None
    if len(given) > 1:
        raise UserError(
            f"--{given[0]} would stop every part elsewhere; with --images_part give --eval_images"
        )
    if not options.chunk_size:
        raise UserError(
            "--images_part needs --chunk_size, the same for all parts: by their free memory they "
            "would cut the images in different places"
        )
    return Part.read(options.images_part)


def score(
    options: Options,
    network: ElasticResNet,
    archs: dict[str, Architecture],
    decoded: ScoredImages,
    digest: str,
    calibration: paddle.Tensor | None,
    arithmetic: Arithmetic,
    part: Part | None,
) -> Counts:
    """Hits of all architectures on the images; complete in the main process.

    ``digest`` is that of the file of ``network``'s weights."""
    whose = evaluation_identity(digest, decoded, options.backbone, arithmetic, calibration)
    settings = ScoringSettings(
        calibration,
        options.chunk_size,
        options.target_tau,
        wanted_variant(arithmetic, calibration, options.fused == "auto"),
        part,
        network=Network(options.backbone, options.image_size, network.num_classes),
    )
    whose["architecture_list"] = architectures_hash(archs)
    return evaluate_shared(network, archs, decoded, Path(options.save_dir), whose, settings)


def architectures(options: Options, space: SearchSpace) -> dict[str, Architecture]:
    """What to score: a file's architectures, or ``eval_sample_num`` drawn ones.

    Raises:
        UserError: neither is given, or one of them does not fit into the supernet.
    """
    wanted = options.eval_sample_num
    if not options.modelarch_file and not wanted and Path(PUBLIC_LIST).exists():
        options.modelarch_file = PUBLIC_LIST
        logger.info("--modelarch_file %s, as the public code takes it", PUBLIC_LIST)
    if options.modelarch_file:
        archs = read_architectures(options.modelarch_file)
        if wanted > len(archs):
            raise UserError(
                f"--eval_sample_num {wanted}, but {options.modelarch_file} has {len(archs)} "
                "architectures; lower it, or give 0 for all"
            )
        archs = dict(islice(archs.items(), wanted or None))
    elif wanted:
        archs = space.sample_distinct(np.random.default_rng(options.seed), wanted)
    else:
        raise UserError("--modelarch_file is missing (or --eval_sample_num N to draw some)")
    for name, arch in archs.items():
        try:
            space.shared_plan(arch)
        except UserError as error:
            raise UserError(f"architecture {name}: {error}") from None
    return archs


if __name__ == "__main__":
    run_main(main, IN_SCORING)
