"""The command line that the programs share: what is taken, what is refused in one line, --help."""

import dataclasses
import importlib
import json
import logging
import os
import re
import resource
import sys

import pytest

import hnas
from hnas.base.errors import UserError
from hnas.programs import runtime
from hnas.programs.flags import AUTO, PATHS, Stage, default_of
from hnas.programs.options import Options
from hnas.programs.parsing import parse_options
from hnas.programs.runtime import start

CONTRAST, DISTILL, SCORE = Stage.CONTRAST, Stage.DISTILL, Stage.SCORE
SCRIPTS = {
    CONTRAST: "train_supernet_pinas_stage1",
    DISTILL: "train_supernet_pinas_stage2_simple",
    SCORE: "train_supernet",
}
FIELDS = {option.name: option for option in dataclasses.fields(Options)}
STAGES = pytest.mark.parametrize("stage", SCRIPTS, ids=str)

# Every flag that existing users' command lines may hold, and a value.
COMMAND_LINE = """backbone=resnet48_mini image_size=192 max_epoch=3 lr=1e-3 weight_decay=3e-5
    momentum=0.8 batch_size=64 dyna_batch_size=2 warmup=1 sample_method=sandwich
    bias_sample_flag=True stage1_sample_num=2 use_loss_expand=True train_flag=False use_ckpt=True
    ckpt_dir=weights/0.pdparams pretrained=resnet48.pdparams image_dir=images save_dir=out
    save_dir_new=out_new save_freq=2 log_freq=10 num_workers=0 use_tensor_dataset=True
    largest_net_in_stage1=False resume=auto seed=5 modelarch_file=archs.json
    eval_sample_num=20"""
DOCUMENTED = dict(setting.split("=") for setting in COMMAND_LINE.split())
TYPES = {"int": int, "float": float, "str": str, "bool": "True".__eq__}


def parse(stage, *arguments):
    return parse_options(stage, ["run", *arguments])


def stage_with(option):
    """One in which it has an effect."""
    return next(stage for stage in Stage if stage in option.metadata["stages"])


def refusal(*arguments, stage=DISTILL):
    """The one short line that a user is told."""
    with pytest.raises(UserError) as error:
        parse(stage, *arguments)
    assert "\n" not in str(error.value) and 0 < len(str(error.value)) < 400
    return str(error.value)


# --- what is accepted


@STAGES
def test_every_documented_flag_is_accepted(stage):
    before = parse(stage)
    for flag, text in DOCUMENTED.items():
        value = TYPES[FIELDS[flag].type](text)
        # In stage 1 save_dir_new is a name for save_dir.
        extra = {"save_dir": value} if stage is CONTRAST and flag == "save_dir_new" else {}
        has_effect = stage in FIELDS[flag].metadata["stages"]  # else it changes nothing
        expected = dataclasses.replace(before, **{flag: value}, **extra) if has_effect else before
        for arguments in ([f"--{flag}", text], [f"--{flag}={text}"]):
            assert parse(stage, *arguments) == expected
        assert refusal(f"--{flag}", stage=stage) == f"argument --{flag}: expected one argument"


RECIPE = {
    CONTRAST: "backbone=resnet48pinasv2 max_epoch=10 batch_size=256 lr=0.0008 warmup=1 "
    "dyna_batch_size=0 momentum=0.9 image_size=224 weight_decay=0.0001 freeze_bn=True "
    "largest_net_in_stage1=True queue_size=40960 key_momentum=-1 temperature=0.1 "
    "stage1_views=two_kinds lr_schedule=cosine shuffle=True crop_scale_min=0.08 "
    "save_dir=checkpoint_files/stage1",
    DISTILL: "backbone=resnet48 max_epoch=5 batch_size=256 lr=0.0005 warmup=5 dyna_batch_size=4 "
    "momentum=0.9 image_size=224 weight_decay=3e-05 freeze_bn=True sample_method=random "
    "bias_sample_flag=True stage1_sample_num=400 extra_random_every=3 bn_calibration_images=-1 "
    "save_dir=checkpoint_files/stage2",
    SCORE: "backbone=resnet48 batch_size=256 bn_calibration_images=-1 stage1_sample_num=400 "
    "save_dir=checkpoint_files/stage3",
    Stage.PRETRAIN: "max_epoch=90 lr=0.1 keep=0 freeze_bn=False",
    Stage.STANDALONE: "max_epoch=90 lr=0.1 keep=1 freeze_bn=False",
}


@pytest.mark.parametrize("stage", RECIPE, ids=str)
def test_defaults_are_the_recipes(stage):
    options = parse(stage)
    for setting in RECIPE[stage].split():
        name, value = setting.split("=")
        assert str(getattr(options, name)) == value
    assert parse_options(stage, []) == options  # without the word run


PUBLIC = {"lr_schedule": "swing", "stage1_views": "same", "shuffle": False}


@pytest.mark.parametrize(
    "given", [{}, {"lr_schedule": "cosine"}, {"stage1_views": "auto"}], ids=str
)
def test_the_public_recipe_sets_what_is_not_given_and_says_so(given, caplog):
    line = [f"--{name}={value}" for name, value in given.items()]
    with caplog.at_level(logging.INFO):
        options = parse(CONTRAST, "--recipe=public", *line)
    values = PUBLIC | {name: value for name, value in given.items() if value != "auto"}
    assert options == dataclasses.replace(parse(CONTRAST), recipe="public", **values)
    told = ", ".join(f"{name} {value}" for name, value in values.items())
    assert f"recipe public: {told}, channels not sorted" in caplog.text


def test_own_defaults_are_of_the_flags_type_and_within_its_bounds():
    for stage in Stage:
        line = []
        for name, option in FIELDS.items():
            default = default_of(option, stage)
            is_auto = option.metadata["auto"] and default == AUTO
            line.append(f"--{name}={'auto' if is_auto else default}")
        assert parse(stage, *line) == parse(stage)
    assert len({parse(stage).save_dir for stage in Stage}) == len(Stage)


@pytest.mark.parametrize("text", ["True", "true", "1", "False", "FALSE", "0"])
def test_booleans(text):
    options = parse(DISTILL, "--train_flag", text, "--use_ckpt", text, "--ckpt_dir", "w")
    assert options.train_flag is options.use_ckpt is (text in ("True", "true", "1"))
    assert options.initial_weights == ("w" if options.use_ckpt else "")


@pytest.mark.parametrize("flag", ["resume", "pretrained", "ckpt_dir", "image_dir"])
@pytest.mark.parametrize("text", ["None", "False", ""])
def test_a_path_that_is_not_there(flag, text):
    assert getattr(parse(DISTILL, f"--{flag}", text), flag) == ""


def test_every_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = [option for option in FIELDS.values() if option.metadata["unit"] in PATHS]
    found = [(parse(stage_with(path), f"--{path.name}=~/x"), path.name) for path in paths]
    assert len(paths) > 10 and {getattr(*each) for each in found} == {"/home/me/x"}


def test_flags_without_effect_are_named_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        for stage in Stage:
            parse(stage, "--stage1_sample_num", "1", "--seed=1", "--lr=1")
    others = [f"--{{}} has no effect in {stage}" for stage in Stage if stage is not DISTILL]
    idle = {line.format("stage1_sample_num") for line in others}
    idle |= {line.format("lr") for line in others if line.endswith(("3", "export", "search"))}
    assert set(caplog.messages) == idle


# --- what is refused


NAME = "n" * 300
PATH = r"argument --{}: .* a name of 300 bytes"
NEAREST = r"unknown flag --{}; did you mean --{}\?"
REFUSED = [  # arguments of stage 2, and the message
    ("--imgae_dir 1", NEAREST.format("imgae_dir", "image_dir")),
    ("--lr 1 --batchsize=1", NEAREST.format("batchsize", "batch_size")),
    ("--largest_net_in_stage 1", NEAREST.format("largest_net_in_stage", "largest_net_in_stage1")),
    ("--xyzzyqqq 1", "unknown flag --xyzzyqqq; see --help"),
    ("--json_path x", "unknown flag --json_path; give --modelarch_file"),
    ("--pinas_stage 2", "unknown flag --pinas_stage; each stage has its script: .*"),
    ("--phase=2", "unknown flag --phase; each stage has its script: .*_stage1.py, .*"),
    (f"--{NAME}=1", "unknown flag '--nnn.*; see --help"),
    ("--lr 1 2", "unexpected argument '2'; flags are written --name value"),
    ("--batch_size 1.5", "argument --batch_size: '1.5' is not a whole number"),
    ("--bn_calibration_images=-1", "argument --bn_calibration_images: -1 is out of bounds; .*"),
    ("--lr fast", "argument --lr: 'fast' is not a finite number"),
    ("--tf32 fast", "argument --tf32: 'fast'; allowed: auto, on, off"),
    ("--use_ckpt yes", "argument --use_ckpt: 'yes' is neither True nor False"),
    (f"--device {NAME}", "argument --device: 'nnn.*; allowed: auto, cpu, gpu"),
    ("--save_dir=", "--save_dir is missing: results need a folder"),
    ("--image_dir=~whom/x", "argument --image_dir: '~whom/x': nobody's home; write ./~ .*"),
    (f"--save_dir {NAME}", PATH.format("save_dir") + "; 255 are allowed"),
    (f"--image_dir /a/{NAME}/b", PATH.format("image_dir") + ".*"),
    (f"--cache_dir {'é' * 150}", PATH.format("cache_dir") + ".*"),
    (f"--pretrained {'a/' * 2100}b", "argument --pretrained: .* more than 4095 bytes"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_what_is_refused(line, message):
    assert re.fullmatch(message, refusal(*line.split(" ")))


def test_an_unknown_command():
    with pytest.raises(UserError, match="'train'"):
        parse_options(DISTILL, ["train", "--lr", "1"])


NUMBERS = [option for option in FIELDS.values() if option.type in ("int", "float")]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_numbers_have_bounds_which_are_allowed_themselves(option):
    flag, reader = option.name, {"int": int, "float": float}[option.type]
    huge = "9" * 30 if option.type == "int" else "1e300"
    for value in (huge, f"-{huge}"):
        words = rf"argument --{flag}: .* is out of bounds; allowed: (\S+) to (\S+)"
        for bound in re.fullmatch(words, refusal(f"--{flag}={value}")).groups():
            given = f"--{flag}={reader(float(bound))}"
            assert getattr(parse(stage_with(option), given), flag) == float(bound)
    wrong = ("", " ", "nan", "-nan", "-inf", "1e999", "9" * 5000, "0x10", "1,5", NAME)
    for text in (*wrong, "1_0", "\uff11", "\u0661"):  # Python takes these three
        assert refusal(f"--{flag}={text}").startswith(f"argument --{flag}: {text[:50]!r}"[:-1])


def test_the_largest_seed_works():
    start(parse(DISTILL, "--device", "cpu", "--seed", str(2**32 - 1)), writes=False)


def noted(folder, monkeypatch, *arguments, part=""):
    """Start a run in a folder; gives its settings and log."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    start(parse(DISTILL, "--device=cpu", f"--save_dir={folder}", *arguments), part=part)
    own = part and "_part_1_of_2"
    return json.loads((folder / f"settings{own}.json").read_text()), folder / f"log{own}.txt"


def test_every_run_leaves_its_settings_and_log(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    first, _ = noted(tmp_path, monkeypatch, "--seed=5", "--image_dir=my images")
    assert first["options"].items() >= {"seed": 5, "bn_calibration_images": "auto"}.items()
    assert set(first["options"]) == set(FIELDS) and first["version"] == hnas.__version__
    assert first["command"] == "script.py --seed=5 '--image_dir=my images'"
    second, log = noted(tmp_path, monkeypatch, "--seed=6")
    assert first.pop("earlier") == [] and second["earlier"] == [first]
    assert re.findall(r"^\[.*\] script\.py --seed=(\d)", log.read_text(), re.M) == ["5", "6"]
    assert re.search(r"\] device cpu \(CPU, .*\), seed 6\n$", log.read_text())
    # Parts of an evaluation share a folder; what is no settings file is told, and replaced.
    _, own = noted(tmp_path, monkeypatch, part="1/2")
    assert "seed 0" in own.read_text() and "seed 0" not in log.read_text()
    for text in ("[]", '{"earlier": 5}', "{}"):
        (tmp_path / "settings.json").write_text(text)
        assert noted(tmp_path, monkeypatch)[0]["earlier"] == []
    assert caplog.text.count("settings.json begins anew: ") == 3


@pytest.mark.parametrize("kind", ["full", "pipe", "folder"])
def test_a_log_that_cannot_be_written_is_one_line(kind, tmp_path, monkeypatch, caplog):
    """A full disk is emulated by the kernel's limit of a file's size."""
    log, limits = tmp_path / "log.txt", resource.getrlimit(resource.RLIMIT_FSIZE)
    make = {"full": lambda: log.write_text("x" * 50_000), "pipe": lambda: os.mkfifo(log)}
    make.get(kind, log.mkdir)()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        noted(tmp_path, monkeypatch)
        for number in range(3):
            logging.getLogger("hnas").warning("line %d", number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (told,) = [line for line in caplog.messages if "log.txt" in line]
    assert "line 2" in caplog.text and ("File too large" in told) == (kind == "full")


def test_more_processes_than_cards_are_refused(monkeypatch):
    monkeypatch.setattr(runtime, "visible_gpus", lambda: 1)
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "2")
    with pytest.raises(UserError, match="2 processes, but 1 visible GPUs; lower gpus"):
        start(parse(DISTILL, "--device", "gpu"), writes=False)


# --- --help


@pytest.mark.parametrize("stage", Stage, ids=str)
def test_help_prints_a_programs_own_flags_with_default_and_unit(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as end:
        parse_options(stage, ["--help"], about="What it does.")
    text = capsys.readouterr().out
    assert end.value.code in (0, None) and "What it does." in text
    parts = re.split(r"\n  --(\w+) ", text)
    printed = dict(zip(parts[1::2], parts[2::2], strict=True))
    headings = re.findall(r"^([A-Z].*):$", text, re.M)
    own = {name: o for name, o in FIELDS.items() if stage in o.metadata["stages"]}
    assert set(printed) == set(own) >= {"image_dir", "save_dir", "device"}
    assert headings == list(dict.fromkeys(option.metadata["group"] for option in own.values()))
    for name, option in own.items():
        default = default_of(option, stage)
        if option.metadata["auto"] and default == AUTO:
            default = "auto"
        unit = f"{option.metadata['unit']}; " if option.metadata["unit"] else ""
        note = f"[{unit}default {'none' if default == '' else default}]"
        assert f" {option.metadata['help']} {note}\n" in printed[name] + "\n"


# --- the scripts themselves


@pytest.mark.parametrize(
    ("stage", "line", "message"),
    [
        (CONTRAST, "--queue_size 1000", "--queue_size 1000 is not a multiple of --batch_size 256"),
        (CONTRAST, "--backbone resnet48", "--backbone resnet48 has no neck"),
        *(
            (stage, "--backbone resnet48pinasv2", "--backbone resnet48pinasv2 is stage 1's")
            for stage in (DISTILL, SCORE, Stage.PRETRAIN, Stage.STANDALONE)
        ),
    ],
)
def test_scripts_refuse_what_is_another_stages(stage, line, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "run", *line.split()])
    with pytest.raises(UserError, match=message):
        importlib.import_module(SCRIPTS.get(stage, f"hnas.tools.{stage}")).main()
