"""The command line that the three entry scripts share."""

import dataclasses
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hnas.base.errors import UserError
from hnas.utils.flags import AUTO, Stage, default_of
from hnas.utils.options import Options
from hnas.utils.parsing import parse_options
from hnas.utils.runtime import start

ROOT = Path(__file__).parents[1]
CONTRAST, DISTILL, SCORE = Stage.CONTRAST, Stage.DISTILL, Stage.SCORE
SCRIPTS = {
    CONTRAST: "train_supernet_pinas_stage1",
    DISTILL: "train_supernet_pinas_stage2_simple",
    SCORE: "train_supernet",
}
STAGES = pytest.mark.parametrize("stage", SCRIPTS, ids=str)

# Every flag that existing users' command lines may hold, a value, and what it must become.
DOCUMENTED = {
    "backbone": ("resnet48_mini", "resnet48_mini"),
    "image_size": ("192", 192),
    "max_epoch": ("3", 3),
    "lr": ("1e-3", 0.001),
    "weight_decay": ("3e-5", 0.00003),
    "momentum": ("0.8", 0.8),
    "batch_size": ("64", 64),
    "dyna_batch_size": ("2", 2),
    "warmup": ("1", 1),
    "sample_method": ("sandwich", "sandwich"),
    "bias_sample_flag": ("True", True),
    "stage1_sample_num": ("2", 2),
    "use_loss_expand": ("True", True),
    "train_flag": ("False", False),
    "use_ckpt": ("True", True),
    "ckpt_dir": ("weights/0.pdparams", "weights/0.pdparams"),
    "pretrained": ("resnet48.pdparams", "resnet48.pdparams"),
    "image_dir": ("a folder/images", "a folder/images"),
    "save_dir": ("out", "out"),
    "save_dir_new": ("out_new", "out_new"),
    "save_freq": ("2", 2),
    "log_freq": ("10", 10),
    "num_workers": ("0", 0),
    "use_tensor_dataset": ("True", True),
    "largest_net_in_stage1": ("False", False),
    "resume": ("auto", "auto"),
    "seed": ("5", 5),
    "modelarch_file": ("archs.json", "archs.json"),
    "eval_sample_num": ("20", 20),
}


def parse(stage, *arguments):
    return parse_options(stage, ["run", *arguments])


def refusal(*arguments, stage=DISTILL):
    """The one line that a user is told."""
    with pytest.raises(UserError) as error:
        parse(stage, *arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# --- what is accepted


@STAGES
@pytest.mark.parametrize("flag", DOCUMENTED)
def test_every_documented_flag_is_accepted(stage, flag):
    text, value = DOCUMENTED[flag]
    before = parse(stage)
    for arguments in ([f"--{flag}", text], [f"--{flag}={text}"]):
        options = parse(stage, *arguments)
        assert getattr(options, flag) == value
        changed = {
            name
            for name, old in dataclasses.asdict(before).items()
            if getattr(options, name) != old
        }
        # In stage 1 save_dir_new is a name for save_dir.
        extra = {"save_dir"} if stage is CONTRAST and flag == "save_dir_new" else set()
        assert changed - {flag} == extra


@STAGES
def test_all_documented_flags_together(stage):
    line = [part for flag, (text, _) in DOCUMENTED.items() for part in (f"--{flag}", text)]
    options = parse(stage, *line)
    expected = {flag: value for flag, (_, value) in DOCUMENTED.items()}
    if stage is CONTRAST:
        expected["save_dir"] = "out_new"
    assert {flag: getattr(options, flag) for flag in DOCUMENTED} == expected


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (CONTRAST, ("resnet48pinasv2", 10, 256, 0.0008, 1, 0)),
        (DISTILL, ("resnet48", 5, 256, 0.0005, 5, 4)),
    ],
)
def test_defaults_are_the_recipes(stage, expected):
    options = parse(stage)
    assert expected == (
        options.backbone,
        options.max_epoch,
        options.batch_size,
        options.lr,
        options.warmup,
        options.dyna_batch_size,
    )
    assert options.momentum == 0.9 and options.image_size == 224


def test_defaults_of_single_stages():
    stage1, stage2, stage3 = (parse(stage) for stage in SCRIPTS)
    assert stage1.largest_net_in_stage1 is True
    assert (stage1.queue_size, stage1.key_momentum, stage1.temperature) == (40960, 0.999, 0.1)
    assert (stage1.weight_decay, stage2.weight_decay) == (1e-4, 3e-5)
    assert (stage1.freeze_bn, stage2.freeze_bn) == (True, True)
    assert (stage1.stage1_views, stage1.lr_schedule) == ("two_kinds", "cosine")
    assert stage1.crop_scale_min == 0.08
    assert (stage2.sample_method, stage2.bias_sample_flag) == ("random", True)
    assert (stage2.stage1_sample_num, stage2.extra_random_every) == (400, 3)
    assert stage2.bn_calibration_images == stage3.bn_calibration_images == AUTO
    assert (stage3.backbone, stage3.batch_size) == ("resnet48", 256)


def test_defaults_of_the_tools():
    pretrain, standalone = (parse(stage) for stage in (Stage.PRETRAIN, Stage.STANDALONE))
    assert (pretrain.max_epoch, pretrain.lr, pretrain.keep) == (90, 0.1, 0)
    assert (standalone.max_epoch, standalone.lr, standalone.keep) == (90, 0.1, 1)
    assert pretrain.freeze_bn is standalone.freeze_bn is False


def test_results_of_stages_go_to_folders_of_their_own():
    folders = {parse(stage).save_dir for stage in Stage}
    assert len(folders) == len(Stage) and Options().save_dir not in folders


def test_own_defaults_are_of_the_flags_type_and_within_its_bounds():
    for stage in Stage:
        line = []
        for option in dataclasses.fields(Options):
            default = default_of(option, stage)
            is_auto = option.metadata["auto"] and default == AUTO
            line.append(f"--{option.name}={'auto' if is_auto else default}")
        assert parse(stage, *line) == parse(stage)


def test_the_word_run_may_be_missing():
    assert parse_options(DISTILL, ["--lr", "0.25"]).lr == 0.25
    assert parse_options(DISTILL, []) == parse(DISTILL)


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("true", True), ("1", True), ("False", False), ("FALSE", False), ("0", False)],
)
def test_booleans(text, value):
    options = parse(DISTILL, "--train_flag", text, "--use_ckpt", text)
    assert options.train_flag is value and options.use_ckpt is value


@pytest.mark.parametrize("flag", ["resume", "pretrained", "ckpt_dir", "image_dir"])
@pytest.mark.parametrize("text", ["None", "False", ""])
def test_a_path_that_is_not_there(flag, text):
    assert getattr(parse(DISTILL, f"--{flag}", text), flag) == ""


def test_ckpt_dir_starts_training_only_with_use_ckpt():
    assert parse(DISTILL, "--ckpt_dir", "w", "--use_ckpt", "True").initial_weights == "w"
    assert parse(DISTILL, "--ckpt_dir", "w", "--use_ckpt", "False").initial_weights == ""


def test_a_flag_without_effect_is_named_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        parse(SCORE, "--lr", "1", "--momentum=0.5", "--batch_size", "8")
    assert caplog.messages == [
        "--lr has no effect in stage 3",
        "--momentum has no effect in stage 3",
    ]


def test_what_every_training_uses_is_not_said_to_have_no_effect(caplog):
    used = ["--accumulate=2", "--clip_norm=1", "--onednn=False", "--storage_size=40"]
    used += ["--cache_dir=x", "--amp=O1"]
    with caplog.at_level(logging.INFO):
        for stage in set(Stage) - {SCORE, Stage.EXPORT, Stage.SEARCH}:
            parse(stage, *used)
    assert caplog.messages == []


@pytest.mark.parametrize("stage", Stage, ids=str)
def test_the_number_of_candidates_has_an_effect_where_it_is_used(stage, caplog):
    with caplog.at_level(logging.INFO):
        assert parse(stage, "--stage1_sample_num", "1").stage1_sample_num == 1
    idle = [f"--stage1_sample_num has no effect in {stage}"]
    assert caplog.messages == ([] if stage is DISTILL else idle)
    assert parse(stage).stage1_sample_num == 400


# --- what is refused


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("--imgae_dir", "image_dir"),
        ("--batchsize", "batch_size"),
        ("--max_epochs", "max_epoch"),
        ("--momentums", "momentum"),
        ("--cktp_dir", "ckpt_dir"),
        ("--largest_net_in_stage", "largest_net_in_stage1"),
    ],
)
@STAGES
def test_unknown_flag_suggests_the_nearest(stage, wrong, nearest):
    expected = f"unknown flag {wrong}; did you mean --{nearest}?"
    assert refusal(wrong, "1", stage=stage) == expected
    assert refusal("--lr", "1", f"{wrong}=1", stage=stage) == expected


def test_unknown_flag_without_a_near_one():
    assert refusal("--xyzzyqqq", "1") == "unknown flag --xyzzyqqq; see --help"


@pytest.mark.parametrize("arguments", [["x"], ["--lr", "1", "2"], ["run"]])
def test_a_word_too_many(arguments):
    assert repr(arguments[-1]) in refusal(*arguments)


def test_an_unknown_command():
    with pytest.raises(UserError, match="'train'"):
        parse_options(DISTILL, ["train", "--lr", "1"])


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("image_size", "31"),
        ("max_epoch", "0"),
        ("lr", "-0.1"),
        ("weight_decay", "-1"),
        ("momentum", "-0.1"),
        ("momentum", "1.1"),
        ("batch_size", "0"),
        ("batch_size", "-4"),
        ("dyna_batch_size", "-1"),
        ("warmup", "-1"),
        ("stage1_sample_num", "0"),
        ("save_freq", "0"),
        ("log_freq", "0"),
        ("eval_freq", "-1"),
        ("bn_calibration_images", "-2"),
        ("stage1_sample_num", "100001"),
        ("extra_random_every", "-1"),
        ("num_workers", "-1"),
        ("crop_scale_min", "0"),
        ("crop_scale_min", "1.5"),
        ("flip_prob", "1.5"),
        ("queue_size", "0"),
        ("key_momentum", "1.5"),
        ("temperature", "0"),
        ("seed", "-1"),
        ("eval_sample_num", "-1"),
    ],
)
def test_bounds(flag, text):
    message = refusal(f"--{flag}", text)
    assert message.startswith((f"--{flag} {text} is too ", f"--{flag} {float(text)} is too "))
    bound = re.fullmatch(r".* the (least|most) is (\S+)", message)
    # The bound itself is allowed.
    assert getattr(parse(DISTILL, f"--{flag}", bound[2]), flag) == float(bound[2])


@pytest.mark.parametrize("text", ["nan", "NaN", "-nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("flag", ["lr", "momentum", "temperature", "flip_prob"])
def test_numbers_are_finite(flag, text):
    # With "=", since argparse takes "-inf" alone for a flag.
    assert refusal(f"--{flag}={text}") == f"argument --{flag}: {text!r} is not a finite number"


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("batch_size", "1.5"),
        ("batch_size", "many"),
        ("seed", "1e3"),
        ("use_ckpt", "yes"),
        ("train_flag", ""),
        ("train_flag", "2"),
        ("device", "tpu"),
        ("sample_space", "all"),
        ("stage1_views", "three"),
        ("lr_schedule", "step"),
        ("freeze_bn", "maybe"),
    ],
)
def test_wrong_values_name_flag_and_value(flag, text):
    message = refusal(f"--{flag}", text)
    assert f"--{flag}" in message and repr(text) in message


@pytest.mark.parametrize("flag", DOCUMENTED)
def test_a_flag_without_its_value(flag):
    assert refusal(f"--{flag}") == f"argument --{flag}: expected one argument"


def test_a_word_for_a_number_is_refused_in_the_users_terms():
    message = refusal("--lr", "fast")
    assert "'fast'" in message and "_read" not in message


def test_a_huge_seed_is_refused_or_works():
    try:
        options = parse(DISTILL, "--device", "cpu", "--seed", str(2**32))
    except UserError as error:
        assert "--seed" in str(error)
    else:
        start(options)


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("json_path", "the architectures to score are given by --modelarch_file"),
        ("phase", "every stage is a script of its own: train_supernet_pinas_stage1.py, "),
        ("mode", "every stage is a script of its own: train_supernet_pinas_stage1.py, "),
    ],
)
@STAGES
def test_flags_of_public_code_say_what_stands_for_them(stage, flag, instead):
    for arguments in ([f"--{flag}", "x"], [f"--{flag}=x"]):
        message = refusal(*arguments, stage=stage)
        assert message.startswith(f"unknown flag --{flag}; {instead}")
    scripts = re.findall(r"\w+\.py", refusal("--mode", "x", stage=stage))
    assert scripts == [f"{SCRIPTS[own]}.py" for own in (CONTRAST, DISTILL, SCORE)]


@pytest.mark.parametrize("text", ["160,192,224", "224,"])
@STAGES
def test_several_image_sizes_are_refused(stage, text):
    message = refusal("--image_size", text, stage=stage)
    assert message.startswith(f"argument --image_size: {text}: ") and "one size" in message


@pytest.mark.parametrize("stage", [DISTILL, SCORE], ids=str)
def test_calibration_images_may_be_left_to_the_checkpoint(stage):
    assert parse(stage, "--bn_calibration_images", "auto") == parse(stage)
    assert parse(stage, "--bn_calibration_images=0").bn_calibration_images == 0
    assert "'Auto'" in refusal("--bn_calibration_images", "Auto", stage=stage)
    # Only there: other numbers stay numbers.
    assert "'auto'" in refusal("--batch_size", "auto", stage=stage)
    assert "too small; the least is 0" in refusal("--bn_calibration_images=-1", stage=stage)


# --- --help


def help_of(stage, capsys, monkeypatch):
    """``--help`` as a dict from flag to its text, in one line each."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as end:
        parse_options(stage, ["--help"], about="What it does.")
    assert end.value.code in (0, None)
    text = capsys.readouterr().out
    assert "What it does." in text
    parts = re.split(r"\n  --(\w+) ", text.split("options:")[1])
    return dict(zip(parts[1::2], parts[2::2], strict=True))


UNITS = {
    "image_size": "224 px",
    "batch_size": "256 images",
    "stage1_sample_num": "400 sub-networks",
    "save_freq": "1 epochs",
    "log_freq": "50 steps",
    "num_workers": "8 processes",
    "eval_sample_num": "0 architectures",
    "queue_size": "40960 keys",
    "bn_calibration_images": "auto images",
    "flip_prob": "0.5 probability",
    "image_dir": "none folder",
    "modelarch_file": "none file",
    "use_ckpt": "False",
    "seed": "0",
}
UNITS_OF_STAGE = {
    CONTRAST: {
        "backbone": "resnet48pinasv2 name",
        "max_epoch": "10 epochs",
        "warmup": "1 epochs",
        "dyna_batch_size": "0 sub-networks",
        "lr": "0.0008",
        "save_dir": "checkpoint_files/stage1 folder",
    },
    DISTILL: {
        "backbone": "resnet48 name",
        "max_epoch": "5 epochs",
        "warmup": "5 epochs",
        "dyna_batch_size": "4 sub-networks",
        "lr": "0.0005",
        "bias_sample_flag": "True",
    },
    SCORE: {"use_tensor_dataset": "True", "save_dir": "checkpoint_files/stage3 folder"},
}


@STAGES
def test_help_prints_every_flag_with_default_and_unit(stage, capsys, monkeypatch):
    printed = help_of(stage, capsys, monkeypatch)
    assert set(DOCUMENTED) <= set(printed)
    assert set(printed) == {option.name for option in dataclasses.fields(Options)}
    for flag, text in printed.items():
        assert re.search(r"\w.* \[(.*; )?default .+\]", text), flag
    for flag, documented in {**UNITS, **UNITS_OF_STAGE[stage]}.items():
        default, _, unit = documented.partition(" ")
        note = f"{unit}; default {default}" if unit else f"default {default}"
        assert re.search(rf"\[{re.escape(note)}(; no effect here)?\]", printed[flag])


def test_help_tells_which_flags_have_no_effect(capsys, monkeypatch):
    idle = {
        stage: {
            flag
            for flag, text in help_of(stage, capsys, monkeypatch).items()
            if text.rstrip().endswith("; no effect here]")
        }
        for stage in SCRIPTS
    }
    assert "queue_size" not in idle[CONTRAST] and "modelarch_file" in idle[CONTRAST]
    assert "stage1_sample_num" not in idle[DISTILL] and "queue_size" in idle[DISTILL]
    assert "modelarch_file" not in idle[SCORE] and {"lr", "max_epoch", "pretrained"} <= idle[SCORE]
    for flags in idle.values():
        assert not flags & {"image_dir", "save_dir", "batch_size", "seed", "device"}


# --- the scripts themselves


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        (SCORE, ["--imgae_dir", "x"], "error: unknown flag --imgae_dir; did you mean --image_dir?"),
        (CONTRAST, ["--queue_size", "1000"], "error: --queue_size 1000 is not a multiple of"),
        (
            DISTILL,
            ["--backbone", "resnet48pinasv2"],
            "error: --backbone resnet48pinasv2 is stage 1's",
        ),
    ],
)
def test_a_script_ends_with_one_line_and_exit_code_2(stage, arguments, message):
    # With one thread and no Python warnings Paddle itself has nothing to say.
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-u", f"{SCRIPTS[stage]}.py", "run", *arguments],
        cwd=ROOT,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(message)
