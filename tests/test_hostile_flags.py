"""Flags, launcher variables and settings that make no sense: one line, before anything is done."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

import train_supernet
from hnas.base import memory
from hnas.base.errors import UserError
from hnas.dataset.image_folder import ImageList
from hnas.search_space import RESNET48, SearchSpace
from hnas.utils import memory_needs
from hnas.utils.flags import Stage
from hnas.utils.memory_needs import (
    check_batch,
    check_cache,
    check_chunk,
    check_queue,
    check_shared_memory,
)
from hnas.utils.options import Options
from hnas.utils.parsing import parse_options
from hnas.utils.runtime import scored_order
from hnas.utils.SampleMethod import SamplerSettings, build_sampler

ROOT = Path(__file__).parents[1]
LONG = "9" * 30
NAME = "n" * 300


def one_line(message: str) -> str:
    """The message, which a terminal shows in a few rows."""
    assert "\n" not in message and 0 < len(message) < 400
    return message


# --- flags of the programs


NUMBERS = [o for o in dataclasses.fields(Options) if o.type in ("int", "float")]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_every_number_has_bounds(option):
    assert option.metadata["low"] is not None and option.metadata["high"] is not None
    huge = LONG if option.type == "int" else "1e300"
    for value, word in ((huge, "large"), (f"-{huge}", "small")):
        with pytest.raises(UserError, match=f"--{option.name} .* is too {word}; the ") as error:
            parse_options(Stage.DISTILL, [f"--{option.name}={value}"])
        one_line(str(error.value))


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
@pytest.mark.parametrize("text", ["", " ", "nan", "9" * 5000, "0x10", "1,5", NAME])
def test_what_is_no_number(option, text):
    with pytest.raises(UserError, match=f"--{option.name}") as error:
        parse_options(Stage.DISTILL, [f"--{option.name}={text}"])
    one_line(str(error.value))


HOSTILE_FLAGS = [
    (Stage.DISTILL, "--save_dir None", "--save_dir is missing: results need a folder"),
    (Stage.DISTILL, "--save_dir False", "--save_dir is missing"),
    (Stage.CONTRAST, "--save_dir None", "--save_dir is missing"),
    (Stage.SCORE, "--save_dir=", "--save_dir is missing"),
    (Stage.DISTILL, f"--save_dir {NAME}", "argument --save_dir: .* a name of 300 bytes; 255 are"),
    (Stage.DISTILL, f"--image_dir /a/{NAME}/b", "argument --image_dir: .* a name of 300 bytes"),
    (Stage.DISTILL, f"--resume {NAME}", "argument --resume: .* a name of 300 bytes"),
    (Stage.DISTILL, f"--cache_dir {'é' * 150}", "argument --cache_dir: .* a name of 300 bytes"),
    (Stage.DISTILL, f"--pretrained {'a/' * 2100}b", "argument --pretrained: .* more than 4095"),
    (Stage.DISTILL, f"--device {NAME}", "--device 'nnn.*; allowed: auto, cpu, gpu"),
    (Stage.DISTILL, f"--{NAME}=1", "unknown flag '--nnn.*; see --help"),
    (Stage.DISTILL, f"{NAME} 1", "invalid choice|unexpected argument"),
]


@pytest.mark.parametrize(("stage", "line", "words"), HOSTILE_FLAGS)
def test_a_hostile_flag_is_one_line(stage, line, words):
    with pytest.raises(UserError, match=words) as error:
        parse_options(stage, line.split(" "))
    one_line(str(error.value))


def test_stage_1s_own_name_for_save_dir_is_enough():
    line = ["--save_dir", "None", "--save_dir_new", "there"]
    assert parse_options(Stage.CONTRAST, line).save_dir == "there"


# --- flags of the tools


HOSTILE_TOOLS = [
    ("tools.draw_architectures", "--output OUT --number 1e9", "--number"),
    ("tools.draw_architectures", f"--output OUT --number {LONG}", "--number"),
    ("tools.draw_architectures", "--output OUT --number 1000001", "--number"),
    ("tools.draw_architectures", "--output OUT --seed -1", "--seed"),
    ("tools.draw_architectures", "--output=", "--output: the path is empty"),
    ("tools.draw_architectures", f"--output {NAME}", "--output: .* 300 bytes"),
    ("tools.plan", "--gmacs_per_s nan", "--gmacs_per_s: 'nan' is not a finite number"),
    ("tools.plan", "--gmacs_per_s=-inf", "--gmacs_per_s: '-inf' is not a finite number"),
    ("tools.plan", "--gmacs_per_s -1", "--gmacs_per_s: -1.0 is out of bounds"),
    ("tools.plan", "--gmacs_per_s 1e300", "--gmacs_per_s: 1e.300 is out of bounds"),
    ("tools.plan", f"--image_size {LONG}", "--image_size"),
    ("tools.plan", f"--n_arch {LONG}", "--n_arch"),
    ("tools.plan", f"--gpus {LONG}", "--gpus"),
    ("tools.flops", "--modelarch_file=", "--modelarch_file: the path is empty"),
    ("tools.flops", f"--modelarch_file x --image_size {LONG}", "--image_size"),
    ("tools.flops", "--modelarch_file x --output=", "--output: the path is empty"),
    ("tools.choose", "--submission=", "--submission: the path is empty"),
    ("tools.choose", f"--submission x --image_size {LONG}", "--image_size"),
    ("tools.rank_report", "--pred macs --gt= --out OUT", "--gt: the path is empty"),
    ("tools.rank_report", "--pred macs --gt x --out=", "--out: the path is empty"),
    ("tools.rank_report", f"--pred macs --gt x --out OUT --resamples {LONG}", "--resamples"),
    ("tools.digits_folder", "--output=", "--output: the path is empty"),
    ("tools.digits_folder", f"--output {NAME}", "--output: .* 300 bytes"),
    ("tools.demo_summary", "--demo_dir=", "--demo_dir: the path is empty"),
    ("bench.speed_scoring", f"--modelarch_file x --n_images {LONG}", "--n_images"),
    ("bench.speed_training", f"--num_workers {LONG}", "--num_workers"),
]


@pytest.mark.parametrize(("tool", "line", "words"), HOSTILE_TOOLS)
def test_a_hostile_tool_flag_is_one_line(tool, line, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"hnas.{tool}").main
    with pytest.raises(UserError, match=words) as error:
        main(line.split(" "))
    one_line(str(error.value))
    assert list(tmp_path.iterdir()) == []


TINY = SearchSpace(max_digits=(1, 1, 1, 1))


def test_a_space_has_the_size_that_its_choices_give():
    # Depths 2 to 5, 5, 8 and 5, and one width of everything.
    assert TINY.size == 4 * 4 * 7 * 4
    found = {
        TINY.compose(lambda options, stage, what, own=depths: own[stage] if what == 0 else 0)
        for depths in itertools.product(range(4), range(4), range(7), range(4))
    }
    assert len(found) == TINY.size
    # Stage 1: an output width of 3, and 3 inner ones for each of 2 to 5 blocks; and so on.
    by_hand = 3 * (9 + 27 + 81 + 243)
    assert by_hand**2 < RESNET48.size and RESNET48.size % by_hand**2 == 0


def test_more_architectures_than_exist_are_refused():
    with pytest.raises(UserError, match="449 architectures are asked for, and only 448 exist"):
        TINY.sample_distinct(np.random.default_rng(0), TINY.size + 1)


# --- settings that do not fit what they are for


@pytest.mark.parametrize("number", [1, 0])
def test_a_sandwich_of_fewer_than_two_is_refused(number):
    settings = SamplerSettings("sandwich", dyna_batch_size=number)
    with pytest.raises(UserError, match="the largest and the smallest network are two") as error:
        build_sampler(settings, RESNET48, 0)
    one_line(str(error.value))


def test_a_sandwich_of_two_is_told(caplog):
    with caplog.at_level(logging.INFO):
        build_sampler(SamplerSettings("sandwich", dyna_batch_size=3), RESNET48, 0)
        assert caplog.messages == []
        sampler = build_sampler(SamplerSettings("sandwich", dyna_batch_size=2), RESNET48, 0)
    assert caplog.messages == ["sandwich of 2: the largest and the smallest network only"]
    assert sampler.sample(0, 0) == [RESNET48.largest(), RESNET48.smallest()]


def test_more_images_than_the_set_has_are_refused():
    images = ImageList(Path("val"), ["a"], [Path("x")] * 10, np.zeros(10, np.int64))
    with pytest.raises(UserError, match="--eval_images 11, but val has 10; lower it, or give 0"):
        scored_order(Options(eval_images=11), images)


def test_more_architectures_than_the_file_has_are_refused(tmp_path):
    path = tmp_path / "archs.txt"
    path.write_text(RESNET48.largest().code + "\n")
    options = Options(modelarch_file=str(path), eval_sample_num=2)
    with pytest.raises(UserError, match="--eval_sample_num 2, but .* has 1 architectures"):
        train_supernet.architectures(options, RESNET48)
    archs = train_supernet.architectures(dataclasses.replace(options, eval_sample_num=1), RESNET48)
    assert len(archs) == 1


# --- memory


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory and shared memory is free, in MiB."""
    paddle.set_device("cpu")

    def say(mib=1024, shared=1024):
        monkeypatch.setattr(memory_needs, "available_bytes", lambda: mib * 2**20)
        found = SimpleNamespace(f_bavail=shared * 2**8, f_frsize=2**12)
        monkeypatch.setattr(memory.os, "statvfs", lambda path: found)

    return say


def refused(check, *arguments):
    with pytest.raises(UserError) as error:
        check(*arguments)
    return one_line(str(error.value))


def test_a_queue_that_memory_cannot_hold_is_refused(free):
    free(1024)
    # Two copies of 128 float32: a KiB a key.
    check_queue(Options(queue_size=2**20))
    message = refused(check_queue, Options(queue_size=2**20 + 1))
    assert message.startswith("--queue_size 1048577 needs 1.00 GiB at least, and 1.00 GiB are free")


def test_a_batch_that_memory_cannot_hold_is_refused(free):
    free(1024)
    options = Options(batch_size=10_000, image_size=224, num_workers=0)
    message = refused(check_batch, options, RESNET48)
    assert message.startswith("--batch_size 10000 at --image_size 224 needs ")
    assert message.endswith("and 1.00 GiB are free; lower them, or raise --accumulate")
    # uint8 and float32 pixels; every convolution's output by the sizes of the smallest network.
    pixels = 5 * 3 * 224**2
    widths, sizes = (56, 112, 208, 360), (56, 28, 14, 7)
    kept = 112**2 * 56 + sum(4 * w * s**2 for w, s in zip(widths, sizes, strict=True))
    kept += sum(w * s**2 for w, s in list(zip(widths, sizes, strict=True))[1:])  # shortcuts
    most = 2**30 // (pixels + 4 * kept)
    check_batch(dataclasses.replace(options, batch_size=most), RESNET48)
    refused(check_batch, dataclasses.replace(options, batch_size=most + 1), RESNET48)
    check_batch(dataclasses.replace(options, batch_size=most + 1, accumulate=most + 1), RESNET48)


def test_a_chunk_that_memory_cannot_hold_is_refused(free):
    free(1024)
    message = refused(check_chunk, Options(chunk_size=10_000))
    assert message.startswith("--chunk_size 10000 at --image_size 224 needs 5.61 GiB at least")
    check_chunk(Options(chunk_size=1000))
    check_chunk(Options(chunk_size=0))


def test_decoded_images_that_memory_cannot_hold_are_refused(free):
    free(1024)
    options = Options(cache_gb=8, image_size=224)
    # 1 GiB are 7133 images of 147 KiB.
    check_cache(options, 7133)
    message = refused(check_cache, options, 7134)
    assert message.startswith("--cache_gb 8: keeping 7134 images of 224 px needs 1.00 GiB at least")
    # Beyond cache_gb they go to a file.
    check_cache(dataclasses.replace(options, cache_gb=1), 7134)


def test_docker_gives_too_little_shared_memory_for_stage_1(free):
    """Two views of 224 px are 77 MB a batch of 256, and 16 of them may be under way."""
    options = Options(backbone="resnet48pinasv2")
    batch = memory_needs.batch_bytes(options)
    assert batch == 2 * 256 * 3 * 224**2
    free(shared=64)
    message = refused(check_shared_memory, batch, 5000, 8)
    assert message == (
        "--num_workers 8 needs 1.15 GiB of shared memory for batches under way, and /dev/shm has "
        "0.06 GiB free; give the container more (docker run --shm-size 3g), or --num_workers 0"
    )
    check_shared_memory(batch, 5000, 0)
    free(shared=1200)
    check_shared_memory(batch, 5000, 8)


def test_few_batches_need_little_shared_memory(free):
    free(shared=64)
    check_shared_memory(2**26, 1, 8)
    refused(check_shared_memory, 2**26, 2, 8)


def test_ranks_of_a_machine_share_it(free, monkeypatch):
    free(shared=64)
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "2")
    check_shared_memory(2**25, 1, 8)
    refused(check_shared_memory, 2**25 + 1, 1, 8)


def test_a_system_without_shared_memory_is_not_asked(monkeypatch):
    monkeypatch.setattr(memory, "SHARED", "/nope")
    check_shared_memory(2**60, 100, 8)


# --- variables of the launchers


HOSTILE_VARIABLES = [
    ({"gpus": ","}, "gpus=, is not a list of numbers as 0,1,2,3"),
    ({"gpus": "a"}, "gpus=a is not a list"),
    ({"gpus": "0,,1"}, "gpus=0,,1 is not a list"),
    ({"gpus": "0 1"}, "gpus=0 1 is not a list"),
    ({"gpus": "-1"}, "gpus=-1 is not a list"),
    ({"gpus": "0,0"}, "gpus=0,0 names a GPU twice"),
    ({"processes": "0"}, "processes=0 is too small; the least is 1"),
    ({"processes": "abc"}, "processes=abc is not a whole number from 1 to 9999"),
    ({"processes": "-1"}, "processes=-1 is not a whole number"),
    ({"processes": "1.5"}, "processes=1.5 is not a whole number"),
    ({"processes": "08"}, "processes=08 is not a whole number"),
    ({"processes": LONG}, f"processes={LONG} is not a whole number"),
    ({"threads": "abc"}, "threads=abc is not a whole number"),
    ({"threads": "0"}, "threads=0 is too small"),
    ({"threads": "$(touch /tmp/x)"}, "threads=$(touch /tmp/x) is not a whole number"),
    ({"nnodes": "abc"}, "nnodes=abc is not a whole number"),
    ({"nnodes": "0"}, "nnodes=0 is too small"),
    ({"gpus": "0,1", "processes": "2"}, "gpus and processes are both set"),
    ({"nnodes": "2", "node_rank": "0"}, "nnodes=2 needs master=HOST:PORT"),
    ({"nnodes": "2", "master": "here:6170"}, "nnodes=2 needs master=HOST:PORT"),
    ({"nnodes": "2", "master": "host", "node_rank": "0"}, "master=host is not HOST:PORT"),
    ({"nnodes": "2", "master": "host:p", "node_rank": "0"}, "master=host:p is not HOST:PORT"),
    ({"nnodes": "2", "master": "host:1", "node_rank": "2"}, "node_rank=2 is not below nnodes=2"),
    ({"nnodes": "2", "master": "host:1", "node_rank": "x"}, "node_rank=x is not a whole number"),
    ({"python": "/nope"}, "python=/nope cannot be run"),
    ({"python": "/tmp"}, "python=/tmp cannot be run"),
    ({"PADDLE_TRAINERS_NUM": "4"}, "PADDLE_TRAINERS_NUM=4 is left in the environment; unset it"),
    ({"save_dir": "None"}, "save_dir=None: results need a folder"),
    ({"save_dir": "None", "processes": "2"}, "save_dir=None: results need a folder"),
    ({"save_dir": NAME, "processes": "2"}, f"cannot make the folder {NAME}/log; choose another"),
]


@pytest.mark.parametrize(("variables", "words"), HOSTILE_VARIABLES)
def test_a_hostile_variable_is_one_line(variables, words):
    done = subprocess.run(
        ["sh", "local_eval.sh"],
        cwd=ROOT,
        env={**os.environ, "python": "false", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("processes", "devices"), [(1, "0"), (2, "-1,-1"), (3, "-1,-1,-1")])
def test_processes_on_cpus_have_no_gpu_each(processes, devices, tmp_path):
    """Paddle's launcher gives each a device of CUDA_VISIBLE_DEVICES, and ran out of them."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES"\n')
    fake.chmod(0o755)
    variables = {"CUDA_VISIBLE_DEVICES": "0", "processes": str(processes), "device": "cpu"}
    done = subprocess.run(
        ["sh", "local_eval.sh"],
        cwd=ROOT,
        env={**os.environ, **variables, "python": str(fake), "save_dir": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, f"{devices}\n"), done.stderr


@pytest.mark.slow
def test_two_processes_start_where_one_gpu_is_visible(tmp_path):
    variables = {"CUDA_VISIBLE_DEVICES": "0", "processes": "2", "device": "cpu"}
    done = subprocess.run(
        ["sh", "local_eval.sh", "--imgae_dir", "x"],
        cwd=ROOT,
        env={**os.environ, **variables, "python": sys.executable, "save_dir": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = done.stdout + done.stderr
    assert done.returncode and "IndexError" not in told
    assert "error: unknown flag --imgae_dir; did you mean --image_dir?" in told
