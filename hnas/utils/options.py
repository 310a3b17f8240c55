"""All flags of the entry scripts: what they mean, who uses them, and their defaults and bounds."""

from __future__ import annotations

from dataclasses import dataclass

from hnas.base.command_line import (
    LARGEST,
    LARGEST_SIDE,
)
from hnas.base.errors import UserError
from hnas.utils.flags import (
    ALL,
    AUTO,
    CONTRAST,
    DISTILL,
    EXPORT,
    LARGEST_RATE,
    MOST_COST,
    MOST_EPOCHS,
    PRETRAIN,
    SCORE,
    SEARCH,
    STANDALONE,
    SUPERNET,
    TRAINING,
    Stage,
    flag,
)


@dataclass
class Options:
    """All flags. Every entry script accepts all of them, so that command lines can be shared;
    one that has no effect in a stage is named in the log. The defaults that stages have of their
    own come with :func:`parse_options`."""

    backbone: str = flag(
        "resnet48",
        "network: resnet48, resnet48_mini; in stage 1 resnet48pinasv2, resnet48pinasv2_mini",
        "name",
        own={Stage.CONTRAST: "resnet48pinasv2"},
    )
    image_size: int = flag(
        224, "height and width of the network's input", "px", low=32, high=LARGEST_SIDE
    )
    max_epoch: int = flag(
        5,
        "epochs to train",
        "epochs",
        stages=TRAINING,
        low=1,
        high=MOST_EPOCHS,
        own={Stage.PRETRAIN: 90, Stage.CONTRAST: 10, Stage.STANDALONE: 90},
    )
    lr: float = flag(
        0.0005,
        "base learning rate for a batch of 256",
        stages=TRAINING,
        low=0,
        high=LARGEST_RATE,
        own={Stage.PRETRAIN: 0.1, Stage.CONTRAST: 0.0008, Stage.STANDALONE: 0.1},
    )
    weight_decay: float = flag(
        1e-4, "L2 penalty", stages=TRAINING, low=0, high=1000, own={Stage.DISTILL: 3e-5}
    )
    momentum: float = flag(0.9, "of the optimizer", stages=TRAINING, low=0, high=1)
    nesterov: bool = flag(False, "Nesterov's momentum", stages=TRAINING)
    no_norm_decay: bool = flag(
        False, "no L2 penalty on BatchNorm's scales and shifts and on biases", stages=TRAINING
    )
    label_smoothing: float = flag(
        0.0,
        "share of a label that is spread evenly over all classes",
        stages=TRAINING - CONTRAST,
        low=0,
        high=1,
    )
    batch_size: int = flag(256, "images a step and device", "images", low=1, high=1_000_000)
    dyna_batch_size: int = flag(
        4,
        "sub-networks a step; 0: the largest network only",
        "sub-networks",
        stages=DISTILL,
        low=0,
        high=1000,
        own={Stage.CONTRAST: 0},
    )
    warmup: int = flag(
        5,
        "linear warm-up of the learning rate",
        "epochs",
        stages=TRAINING,
        low=0,
        high=MOST_EPOCHS,
        own={Stage.CONTRAST: 1},
    )
    sample_method: str = flag("random", "random, tilted, sandwich or fair", "name", stages=DISTILL)
    bias_sample_flag: bool = flag(
        False,
        "with sample_method random: train the largest of stage1_sample_num candidates, the first "
        "place's law",
        stages=DISTILL,
        own={Stage.DISTILL: True},
    )
    stage1_sample_num: int = flag(
        400,
        "uniform candidates of a step, of which bias_sample_flag trains the largest",
        "sub-networks",
        stages=DISTILL,
        low=1,
        high=100_000,
    )
    extra_random_every: int = flag(
        3,
        "with bias_sample_flag: steps from one that trains a further, uniform sub-network to the "
        "next; 0: never",
        "steps",
        stages=DISTILL,
        low=0,
        high=LARGEST,
    )
    bias_strength: float = flag(
        2.0,
        "tilt b of sample_method tilted: the largest option is exp(b) times as likely as the "
        "smallest",
        stages=DISTILL,
        low=-100,
        high=100,
    )
    sample_space: str = flag(
        "released",
        "width digits to sample: released (those of the 45,000) or full (1 to 7)",
        "name",
        stages=SUPERNET | SCORE | SEARCH,
    )
    largest_net_in_stage1: bool = flag(
        True, "both paths of stage 1 are the largest network, else uniform draws", stages=CONTRAST
    )
    stage1_views: str = flag(
        "two_kinds",
        "two_kinds: the query's view has colour jitter, grey and blur besides crop and flip; "
        "one_kind: both are crop and flip",
        "name",
        stages=CONTRAST,
    )
    exchange_views: bool = flag(
        False, "exchange the views in the second pass, as the paths are", stages=CONTRAST
    )
    freeze_bn: bool = flag(
        False,
        "normalise in training by the running statistics that it starts from, and keep them",
        stages=SUPERNET,
        own={Stage.CONTRAST: True, Stage.DISTILL: True},
    )
    lr_schedule: str = flag(
        "cosine",
        "cosine: warm-up, then one cosine over all steps; swing: the full rate to zero and back "
        "every 2 * max_epoch steps",
        "name",
        stages=CONTRAST,
    )
    use_loss_expand: bool = flag(
        False,
        "weight each sub-network's loss by its size over the largest network's",
        stages=DISTILL,
    )
    distill_temperature: float = flag(
        1.0, "of the teacher's soft targets", stages=DISTILL, low=0.001, high=1000
    )
    in_place_distillation: bool = flag(
        False,
        "with sample_method sandwich: a step's largest network learns from labels, and the others "
        "from it alone; none from the pretrained one",
        stages=DISTILL,
    )
    train_flag: bool = flag(True, "False: evaluate what was loaded and stop", stages=DISTILL)
    use_ckpt: bool = flag(False, "start from the weights in ckpt_dir", stages=SUPERNET)
    ckpt_dir: str = flag(
        "",
        "weights to start from (stages 1, 2), to score (3, search), or to export from",
        "file",
        stages=SUPERNET | SCORE | EXPORT | SEARCH,
    )
    pretrained: str = flag(
        "",
        "official weights of the largest network: start of stage 1, teacher of 2; pretrain "
        "writes them",
        "file",
        stages=PRETRAIN | SUPERNET,
    )
    image_dir: str = flag("", "images: train/CLASS/* and val/CLASS/*", "folder")
    save_dir: str = flag(
        "checkpoint_files/output",
        "where results go",
        "folder",
        own={
            Stage.PRETRAIN: "checkpoint_files/pretrain",
            Stage.CONTRAST: "checkpoint_files/stage1",
            Stage.DISTILL: "checkpoint_files/stage2",
            Stage.SCORE: "checkpoint_files/stage3",
            Stage.STANDALONE: "checkpoint_files/standalone",
            Stage.EXPORT: "checkpoint_files/export",
            Stage.SEARCH: "checkpoint_files/search",
        },
    )
    save_dir_new: str = flag(
        "", "stage 1's name for save_dir, which it overrides", "folder", stages=CONTRAST
    )
    save_freq: int = flag(
        1, "epochs between checkpoints", "epochs", stages=TRAINING, low=1, high=MOST_EPOCHS
    )
    save_steps: int = flag(
        500,
        "steps between checkpoints within an epoch; 0: at the ends only",
        "steps",
        stages=TRAINING,
        low=0,
        high=LARGEST,
    )
    keep: int = flag(
        0,
        "newest epochs' checkpoints to keep, besides epoch 0's; 0: all",
        "epochs",
        stages=TRAINING,
        low=0,
        high=MOST_EPOCHS,
        own={Stage.STANDALONE: 1},
    )
    log_freq: int = flag(
        50, "steps between log lines", "steps", stages=TRAINING, low=1, high=LARGEST
    )
    eval_freq: int = flag(
        1,
        "epochs between evaluations of the largest and smallest, and of rank_gt's; 0: never",
        "epochs",
        stages=DISTILL,
        low=0,
        high=MOST_EPOCHS,
    )
    rank_gt: str = flag(
        "",
        "architectures with stand-alone accuracies, to score whenever eval_freq says: for the log, "
        "history.json and the curves only",
        "file",
        stages=DISTILL,
    )
    bn_calibration_images: int = flag(
        AUTO,
        "training images to re-calibrate BatchNorm with when evaluating; 0: running statistics; "
        "auto: 0 for weights that were trained with freeze_bn, else 64",
        "images",
        stages=DISTILL | SCORE | EXPORT | SEARCH,
        low=0,
        high=100_000,
        auto=True,
    )
    num_workers: int = flag(
        8, "loader processes; 0: load in the main one", "processes", low=0, high=1024
    )
    use_tensor_dataset: bool = flag(
        False,
        "decode all images once; training keeps them in a file, evaluation in memory",
        own={Stage.SCORE: True},
    )
    verify_images: bool = flag(
        False, "decode every image before the start and list those that cannot be"
    )
    bad_images: str = flag(
        "fatal", "images that cannot be decoded: fatal, or skip (implies verify_images)", "name"
    )
    crop_scale_min: float = flag(
        0.08,
        "smallest random crop in training",
        "share of the image",
        stages=TRAINING,
        low=0.01,
        high=1,
    )
    flip_prob: float = flag(
        0.5, "of mirroring in training", "probability", stages=TRAINING, low=0, high=1
    )
    queue_size: int = flag(
        40960,
        "negatives of stage 1; a multiple of the batch",
        "keys",
        stages=CONTRAST,
        low=1,
        high=2**24,
    )
    key_momentum: float = flag(0.999, "of the key encoder", stages=CONTRAST, low=0, high=1)
    temperature: float = flag(0.1, "of the contrastive loss", stages=CONTRAST, low=0.001, high=1000)
    resume: str = flag(
        "",
        "continue from a folder's newest checkpoint; auto: from save_dir's",
        "folder",
        stages=TRAINING - STANDALONE,
    )
    seed: int = flag(
        0, "of data order, augmentations, sub-networks and new weights", low=0, high=LARGEST
    )
    device: str = flag("auto", "auto, cpu or gpu", "name")
    arch: str = flag(
        "",
        "architecture to train stand-alone or to export: 52 or 51 digits; to export, also a name "
        "in modelarch_file",
        "code",
        stages=STANDALONE | EXPORT,
    )
    modelarch_file: str = flag(
        "",
        "architectures to score (3) or to train stand-alone, or to find arch's name in: JSON or "
        "text",
        "file",
        stages=SCORE | STANDALONE | EXPORT,
    )
    init: str = flag(
        "",
        "weights of arch to start from: what export wrote, its folder or the .pdparams in it",
        "file",
        stages=STANDALONE,
    )
    format: str = flag(
        "pdparams",
        "pdparams: weights; inference: program and weights for Paddle Inference; onnx",
        "name",
        stages=EXPORT,
    )
    eval_engine: str = flag("shared", "shared, or reference: one by one", "name", stages=SCORE)
    eval_images: int = flag(
        0,
        "validation images to score or check on, the classes in equal shares; 0: all",
        "images",
        stages=SCORE | EXPORT | SEARCH,
        low=0,
        high=LARGEST,
    )
    chunk_size: int = flag(
        0,
        "images a walk over all architectures; 0: by the free memory",
        "images",
        stages=SCORE | SEARCH,
        low=0,
        high=1_000_000,
    )
    target_se: float = flag(
        0.0,
        "stop when every accuracy's standard error is below; 0: never",
        stages=SCORE,
        low=0,
        high=1,
    )
    target_tau: float = flag(
        0.0,
        "stop when the ranking's tau with that by all images is at least this, at the lower end of "
        "its interval; 0: never",
        stages=SCORE,
        low=0,
        high=1,
    )
    images_part: str = flag(
        "",
        "score one of several parts of the images, as 2/8, whose chunks are gathered later; "
        "none: all",
        "part",
        stages=SCORE,
    )
    cache_gb: float = flag(
        8.0,
        "most memory for decoded images; more go to a file in save_dir",
        "GiB",
        stages=SCORE | SEARCH,
        low=0,
        high=1_000_000,
    )
    amp: str = flag(
        "O0",
        "half precision: O0 (none), O1; stage 3 and search take O2 for O1; on CPUs only they, in "
        "bfloat16, if the processor has AVX512_BF16 or AMX",
        "name",
        stages=ALL - EXPORT,
    )
    tf32: str = flag(
        "auto",
        "float32 on GPUs with 10 bits of mantissa in convolutions and matrix products: on or off; "
        "auto: as Paddle has it, convolutions only",
        "name",
    )
    deterministic: bool = flag(
        False,
        "cuDNN's deterministic algorithms only, slower: convolutions and pooling give the same "
        "bits on the same kind of card, Paddle and cuDNN; CPUs do anyway",
    )
    accumulate: int = flag(
        1,
        "parts that a batch is split into, one after the other, to save memory",
        stages=TRAINING,
        low=1,
        high=1_000_000,
    )
    clip_norm: float = flag(
        0.0, "largest norm of all gradients; 0: any", stages=TRAINING, low=0, high=LARGEST_RATE
    )
    onednn: bool = flag(
        True, "training's convolutions by oneDNN on CPUs, if it works", stages=TRAINING
    )
    storage_size: int = flag(
        0,
        "shorter side of cached images; 0: 8/7 of image_size",
        "px",
        stages=TRAINING,
        low=0,
        high=LARGEST_SIDE,
    )
    cache_dir: str = flag(
        "",
        "where the images of use_tensor_dataset are kept; none: ~/.cache/pinas",
        "folder",
        stages=TRAINING,
    )
    visualdl_dir: str = flag("", "write curves for VisualDL to it", "folder", stages=TRAINING)
    eval_sample_num: int = flag(
        0,
        "score the first N architectures of the file, or draw N without one; 0: the whole file",
        "architectures",
        stages=SCORE,
        low=0,
        high=1_000_000,
    )
    max_macs: float = flag(
        0.0,
        "most multiply-accumulates an image; 0: any",
        "MACs",
        stages=SEARCH,
        low=0,
        high=MOST_COST,
    )
    max_params: float = flag(
        0.0, "most parameters; 0: any", "parameters", stages=SEARCH, low=0, high=MOST_COST
    )
    max_latency_ms: float = flag(
        0.0,
        "most time for a batch, as the file latency says; 0: any",
        "ms",
        stages=SEARCH,
        low=0,
        high=MOST_COST,
    )
    latency: str = flag(
        "", "measured blocks, which hnas.tools.latency wrote", "file", stages=SEARCH
    )
    population: int = flag(
        100,
        "first sub-networks, uniform, and living ones in each generation",
        "sub-networks",
        stages=SEARCH,
        low=2,
        high=100_000,
    )
    children: int = flag(
        50, "new ones of a generation", "sub-networks", stages=SEARCH, low=1, high=100_000
    )
    generations: int = flag(
        20, "after the first population", "generations", stages=SEARCH, low=0, high=100_000
    )
    tournament: int = flag(
        25,
        "living ones that are drawn to take the best of as parent",
        "sub-networks",
        stages=SEARCH,
        low=1,
        high=100_000,
    )

    @property
    def initial_weights(self) -> str:
        """``ckpt_dir`` if ``use_ckpt`` says so, else empty.

        Raises:
            UserError: ``use_ckpt`` without a ``ckpt_dir``.
        """
        if self.use_ckpt and not self.ckpt_dir:
            raise UserError("--use_ckpt True, but --ckpt_dir is missing")
        return self.ckpt_dir if self.use_ckpt else ""
