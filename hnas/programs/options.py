"""All flags of the entry scripts: what they mean, who uses them, and their defaults and bounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hnas.base.command_line import LARGEST_SIDE, MOST_ARCHITECTURES
from hnas.base.errors import UserError
from hnas.programs.flags import (
    ALL,
    AUTO,
    CONTRAST,
    DISTILL,
    EXPORT,
    PRETRAIN,
    SCORE,
    SEARCH,
    STANDALONE,
    SUPERNET,
    TRAINING,
    flag,
)
from hnas.search_space import SearchSpace, search_space

MOST_EPOCHS = 100_000
LARGEST_RATE = 1e30  # a float32 holds it, times any batch / 256
MOST_COST = 1e15  # of an architecture, in any unit
MANY = 1_000_000

files = partial(flag, group="Files and folders", stages=ALL)
network = partial(flag, group="The network", stages=ALL)
images = partial(flag, group="Images", stages=ALL)
training = partial(flag, group="Training", stages=TRAINING)
contrast = partial(flag, group="Stage 1", stages=CONTRAST)
distill = partial(flag, group="Stage 2", stages=DISTILL)
scoring = partial(flag, group="Scoring", stages=SCORE)
search = partial(flag, group="Search", stages=SEARCH)
single = partial(flag, group="One architecture", stages=STANDALONE | EXPORT)
machine = partial(flag, group="The machine", stages=ALL)


@dataclass
class Options:
    """All flags. Every entry script accepts all of them, so that command lines can be shared;
    one that has no effect in a stage is named in the log. The defaults that stages have of their
    own come with :func:`parse_options`."""

    # A table: default, meaning, unit, bounds, where it has an effect, defaults of single programs.
    # fmt: off
    image_dir: str = files("", "images: train/CLASS/* and val/CLASS/*", "folder")
    save_dir: str = files("checkpoint_files/output", "where results go", "folder",
        pretrain="checkpoint_files/pretrain", contrast="checkpoint_files/stage1",
        distill="checkpoint_files/stage2", score="checkpoint_files/stage3",
        standalone="checkpoint_files/standalone", export="checkpoint_files/export",
        search="checkpoint_files/search")
    save_dir_new: str = files("", "stage 1's name for save_dir, which it overrides", "folder",
        stages=CONTRAST)
    pretrained: str = files("",
        "official weights of the largest network: start of stage 1, teacher of 2; pretrain writes "
        "them", "file", stages=PRETRAIN | SUPERNET)
    use_ckpt: bool = files(False, "start from the weights in ckpt_dir", stages=SUPERNET)
    ckpt_dir: str = files("",
        "weights to start from (stages 1, 2), to score (3, search), or to export from", "file",
        stages=SUPERNET | SCORE | EXPORT | SEARCH)
    modelarch_file: str = files("",
        "architectures to score (3) or to train stand-alone, or to find arch's name in: JSON or "
        "text", "file", stages=SCORE | STANDALONE | EXPORT)
    resume: str = files("", "continue a folder's newest checkpoint, or FOLDER/N; auto: save_dir's",
        "folder", stages=TRAINING - STANDALONE)

    backbone: str = network("resnet48",
        "resnet48, resnet48_mini; in stage 1 resnet48pinasv2, resnet48pinasv2_mini", "name",
        contrast="resnet48pinasv2")
    image_size: int = network(224, "height and width of its input", "px", low=32, high=LARGEST_SIDE)
    sample_space: str = network("released",
        "width digits to sample: released (those of the 45,000) or full (1 to 7)", "name",
        choices=("released", "full"), stages=SUPERNET | SCORE | SEARCH)
    freeze_bn: bool = network(False,
        "normalise in training by the running statistics that it starts from, and keep them",
        stages=SUPERNET, contrast=True, distill=True)
    bn_calibration_images: int = network(AUTO,
        "training images to re-calibrate BatchNorm with when evaluating; 0: running statistics; "
        "auto: 0 for weights that were trained with freeze_bn, else 64", "images", high=100_000,
        auto=True, stages=DISTILL | SCORE | EXPORT | SEARCH)

    batch_size: int = images(256, "images a step and device", "images", low=1, high=MANY)
    num_workers: int = images(8, "loader processes; 0: load in the main one", "processes",
        high=1024, stages=TRAINING | EXPORT)
    verify_images: bool = images(False,
        "decode every image before the start and list those that cannot be")
    bad_images: str = images("fatal",
        "images that cannot be decoded: fatal, or skip (implies verify_images)", "name",
        choices=("fatal", "skip"))
    use_tensor_dataset: bool = images(False,
        "decode the training images once, to a file in cache_dir", stages=TRAINING)
    storage_size: int = images(0, "shorter side of those images; 0: 8/7 of image_size", "px",
        high=LARGEST_SIDE, stages=TRAINING)
    cache_dir: str = images("", "their folder; none: ~/.cache/pinas", "folder", stages=TRAINING)
    crop_scale_min: float = images(0.08, "smallest random crop", "share of the image", low=0.01,
        high=1, stages=TRAINING)
    flip_prob: float = images(0.5, "of mirroring", "probability", high=1, stages=TRAINING)
    shuffle: bool = images(True,
        "a new order in every epoch; False: the folder's, class after class", stages=TRAINING)

    max_epoch: int = training(5, "epochs to train", "epochs", low=1, high=MOST_EPOCHS, pretrain=90,
        contrast=10, standalone=90)
    lr: float = training(0.0005, "base learning rate for a batch of 256", high=LARGEST_RATE,
        pretrain=0.1, contrast=0.0008, standalone=0.1)
    warmup: int = training(5, "linear warm-up of the learning rate", "epochs", high=MOST_EPOCHS,
        contrast=1)
    weight_decay: float = training(1e-4, "L2 penalty", high=1000, distill=3e-5)
    momentum: float = training(0.9, "of the optimizer", high=1)
    clip_norm: float = training(0.0,
        "largest norm of all gradients; 0: any; auto: at which a step moves the weights by a "
        "thousandth at the rate's peak, before momentum", high=LARGEST_RATE, auto=True)
    accumulate: int = training(1,
        "parts that a batch is split into, one after the other, to save memory", low=1, high=MANY)
    save_freq: int = training(1, "epochs between checkpoints", "epochs", low=1, high=MOST_EPOCHS)
    save_steps: int = training(500,
        "steps between checkpoints within an epoch; 0: at the ends only", "steps")
    keep: int = training(0, "newest epochs' checkpoints to keep, besides epoch 0's; 0: all",
        "epochs", high=MOST_EPOCHS, standalone=1)
    log_freq: int = training(50, "steps between log lines", "steps", low=1)
    visualdl_dir: str = training("", "write curves for VisualDL to it", "folder")

    recipe: str = contrast("own",
        "public: as the public code runs it, but for flags that are given: lr_schedule swing, "
        "stage1_views same, shuffle False, and pretrained channels as they are", "name",
        choices=("own", "public"))
    lr_schedule: str = contrast("auto",
        "cosine: warm-up, then one cosine over all steps; swing: the full rate to zero and back "
        "every 2 * max_epoch steps; auto: cosine, or as recipe says", "name",
        choices=("auto", "cosine", "swing"))
    largest_net_in_stage1: bool = contrast(True,
        "both paths of stage 1 are the largest network, else uniform draws")
    stage1_views: str = contrast("auto",
        "two_kinds: the query's view has colour jitter, grey and blur besides crop and flip; "
        "one_kind: both are crop and flip; same: both are one crop and flip; auto: two_kinds, or "
        "as recipe says", "name", choices=("auto", "two_kinds", "one_kind", "same"))
    queue_size: int = contrast(40960, "negatives; a multiple of the batch", "keys", low=1,
        high=2**24)
    key_momentum: float = contrast(AUTO,
        "of the key encoder; auto: 0.999 to the power of the total batch over 256", high=1,
        auto=True)
    temperature: float = contrast(0.1, "of the contrastive loss", low=0.001, high=1000)

    train_flag: bool = distill(True, "False: evaluate what was loaded and stop")
    dyna_batch_size: int = distill(4, "sub-networks a step; 0: the largest network only",
        "sub-networks", high=1000, contrast=0)
    sample_method: str = distill("random", "random, sandwich or fair", "name")
    bias_sample_flag: bool = distill(False,
        "with sample_method random: train the largest of stage1_sample_num candidates, the first "
        "place's law", distill=True)
    stage1_sample_num: int = distill(400,
        "uniform candidates of a step, of which bias_sample_flag trains the largest",
        "sub-networks", low=1, high=100_000)
    extra_random_every: int = distill(3,
        "with bias_sample_flag: steps from one that trains a further, uniform sub-network to the "
        "next; 0: never", "steps")
    use_loss_expand: bool = distill(False,
        "weight each sub-network's loss by its size over the largest network's")
    in_place_distillation: bool = distill(False,
        "with sample_method sandwich: a step's largest network learns from labels, and the others "
        "from it alone; none from the pretrained one")
    eval_freq: int = distill(1,
        "epochs between evaluations on validation images: of stage 1's largest, of stage 2's "
        "largest and smallest, and of rank_gt's; of the one network in pretrain and "
        "train_standalone; 0: never", "epochs", high=MOST_EPOCHS, stages=TRAINING)

    eval_engine: str = scoring("shared", "shared, or reference: one by one", "name",
        choices=("shared", "reference"))
    rank_gt: str = scoring("",
        "stand-alone accuracies to compare with, whenever eval_freq says (stage 2) or at the end, "
        "besides the list (3): a file, or imagenet30, thirty published ones (a file of that name "
        "is ./imagenet30)", "file", stages=DISTILL | SCORE)
    score_function: str = scoring("",
        "module.function, an own score in place of accuracy, of one architecture at a time on the "
        "first batch_size images; none: accuracy", "name", stages=SCORE | SEARCH)
    eval_sample_num: int = scoring(0,
        "score the first N architectures of the file, or draw N without one; 0: the whole file",
        "architectures", high=MOST_ARCHITECTURES)
    eval_images: int = scoring(0,
        "validation images to score or check on, the classes in equal shares; 0: all", "images",
        stages=SCORE | EXPORT | SEARCH)
    images_part: str = scoring("",
        "score one of several parts of the images, as 2/8, whose chunks are gathered later; none: "
        "all", "part")
    chunk_size: int = scoring(0, "images a walk over all architectures; 0: by the free memory",
        "images", high=MANY, stages=SCORE | SEARCH)
    cache_gb: float = scoring(8.0, "most memory for decoded images; more go to a file in save_dir",
        "GiB", high=MANY, stages=SCORE | SEARCH)
    fused: str = scoring("auto",
        "convolution, bias, shortcut and ReLU as one operator on GPUs: auto, if it works, or off",
        "name", choices=("auto", "off"), stages=SCORE | SEARCH)
    target_tau: float = scoring(0.0,
        "stop when the ranking's tau with that by all images is at least this, at the lower end of "
        "its interval; 0: never", high=1)

    max_macs: float = search(0.0, "most multiply-accumulates an image; 0: any", "MACs",
        high=MOST_COST)
    max_params: float = search(0.0, "most parameters; 0: any", "parameters", high=MOST_COST)
    max_latency_ms: float = search(0.0, "most time for a batch, as the file latency says; 0: any",
        "ms", high=MOST_COST)
    latency: str = search("", "measured blocks, which hnas.tools.latency wrote", "file")
    population: int = search(100, "first sub-networks, uniform, and living ones in each generation",
        "sub-networks", low=2, high=100_000)
    children: int = search(50, "new ones of a generation", "sub-networks", low=1, high=100_000)
    generations: int = search(20, "after the first population", "generations", high=100_000)
    tournament: int = search(25, "living ones that are drawn to take the best of as parent",
        "sub-networks", low=1, high=100_000)

    arch: str = single("", "52 or 51 digits; to export, also a name in modelarch_file", "code")
    format: str = single("pdparams",
        "pdparams: weights; inference: program and weights for Paddle Inference; onnx", "name",
        choices=("pdparams", "inference", "onnx"), stages=EXPORT)
    quantize: str = single("none",
        "of onnx: int8 weights and activations, by onnxruntime's static quantizer", "name",
        choices=("none", "int8"), stages=EXPORT)
    quantize_images: int = single(256,
        "training images at most, the classes in equal shares, that int8 activations are scaled by",
        "images", low=1, high=100_000, stages=EXPORT)

    seed: int = machine(0, "of data order, augmentations, sub-networks and new weights")
    device: str = machine("auto", "auto, cpu or gpu", "name", choices=("auto", "cpu", "gpu"))
    amp: str = machine("O0",
        "half precision on GPUs: O0 (none), O1; stage 3 and search take O2 for O1", "name",
        choices=("O0", "O1", "O2"), stages=ALL - EXPORT)
    tf32: str = machine("auto",
        "float32 on GPUs with 10 bits of mantissa in convolutions and matrix products: on or off; "
        "auto: as Paddle has it, convolutions only", "name", choices=("auto", "on", "off"))
    deterministic: bool = machine(False,
        "cuDNN's deterministic algorithms only, slower: convolutions and pooling give the same "
        "bits on the same kind of card, Paddle and cuDNN; CPUs do anyway")
    onednn: bool = machine(True, "training's convolutions by oneDNN on CPUs, if it works",
        stages=TRAINING)
    # fmt: on

    @property
    def space(self) -> SearchSpace:
        """The search space that the flags describe."""
        return search_space(self.backbone, self.sample_space)

    @property
    def initial_weights(self) -> str:
        """``ckpt_dir`` if ``use_ckpt`` says so, else empty.

        Raises:
            UserError: ``use_ckpt`` without a ``ckpt_dir``.
        """
        if self.use_ckpt and not self.ckpt_dir:
            raise UserError("--use_ckpt True, but --ckpt_dir is missing")
        return self.ckpt_dir if self.use_ckpt else ""
