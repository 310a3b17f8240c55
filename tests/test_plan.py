"""The plan's figures against sums done by hand, and its command line."""

import json
import re

import numpy as np
import paddle
import pytest
from paddle import nn

from hnas.base.errors import UserError
from hnas.evaluation.tree import PrefixTree
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48, RESNET48_MINI, convolution_outputs
from hnas.tools import plan

LARGEST = 5_282_238_464


@pytest.fixture(autouse=True)
def few_steps(request, monkeypatch):
    """Stage 2's cost is averaged over few steps where it does not matter."""
    if "sampled" not in request.node.name:
        monkeypatch.setattr(plan, "SAMPLED", 3)


def drawn(number):
    """What a plan draws for stage 3."""
    many = RESNET48.sample_many(np.random.default_rng(0), number)
    return [many.architecture(index) for index in range(number)]


def run(capsys, *arguments):
    plan.main([*arguments, "--n_arch", "50"])
    return json.loads(capsys.readouterr().out)


def test_hours_follow_from_the_macs_of_the_recipe_and_what_is_sampled(capsys):
    found = run(capsys, "--gpus", "8", "--gmacs_per_s", "1000", "--images", "50000")
    # 3 for queries, 2 for keys; 1,281,167 images in whole steps of 2,048; 10 epochs
    images = 10 * (1_281_167 // 2048 * 2048)
    assert found["stage1"]["images"] == images
    assert found["stage1"]["gmacs_per_image"] == pytest.approx(5 * LARGEST / 1e9, abs=0.1)
    hours = 5 * LARGEST * images / 8e12 / 3600
    assert found["stage1"]["hours"] == pytest.approx(hours, rel=1e-3)
    # The teacher's pass, and 4 1/3 networks of 4.18 GMAC on average (recipe.md's simulation).
    stage2 = found["stage2"]["gmacs_per_image"] * 1e9
    assert stage2 == pytest.approx(LARGEST + 13 / 3 * 3 * 4.18e9, rel=0.02)
    walk = PrefixTree(RESNET48, drawn(50)).cost(224)[0]
    assert found["stage3"]["hours"] == pytest.approx(walk * 50000 / 8e12 / 3600, abs=6e-4)
    # Chunks of 1024 at most, the engine's limit; 60 % of 80 GiB would hold more.
    assert found["stage3"]["gib_per_device"] < 48
    # A queue of 40,960 keys is little beside a batch.
    assert found["stage1"]["gib_per_device"] >= found["stage2"]["gib_per_device"] > 1


PRECISIONS = [
    ("h100", "", 494.5, 0.37, 4, "TF32"),
    ("v100", "", 15.7, 0.8, 4, "float32"),
    ("h200", "--amp O1", 989.4, 0.43, 2, "float16"),
    ("a100-40gb", "--tf32 off", 19.5, 0.8, 4, "float32"),
    ("l40s", "", 183.0, 0.5, 4, "TF32"),
]
GB_PER_S = {"h100": 3350, "h200": 4800, "a100-40gb": 1555, "l40s": 864, "v100": 900}


@pytest.mark.parametrize(("gpu", "flags", "tflops", "share", "size", "words"), PRECISIONS)
def test_stage_3_takes_the_time_of_its_precision(gpu, flags, tflops, share, size, words, capsys):
    found = run(capsys, "--gpu", gpu, "--images", "10000000", *flags.split())
    macs, outputs = PrefixTree(RESNET48, drawn(50)).cost(224)
    compute = macs / (tflops * 1e12 / 2 * share)
    memory = 7.5 * size * outputs / (0.8e9 * GB_PER_S[gpu])
    hours = (compute + memory) * 1e7 / 3600
    assert found["stage3"]["hours"] == pytest.approx(hours, abs=6e-4)
    assert any(f"walks in {words}:" in line for line in found["assumptions"])
    assert any(f"{tflops} TFLOP/s" in line for line in found["assumptions"])
    assert any("left out: " in line and "BatchNorm" in line for line in found["assumptions"])


SENTENCES = [
    ("--gpus 8 --gpu h100", r"on 8 h100 stage 1 takes about 20 min, .* 80 GiB is 1,\d{3} a card"),
    ("--gpu v100 --memory_gib 16", r"about 21\.8 h, .* is 217 a card: lower .*, .* --accumulate 2"),
    ("--gpu v100 --memory_gib 8", "lower --batch_size 256, or train with --accumulate 4"),
    ("--gmacs_per_s 9 --memory_gib 0.1", r"device\(s\) of .*; at 224 px no batch fits 0.1 GiB"),
]


@pytest.mark.parametrize(("line", "words"), SENTENCES)
def test_a_plan_ends_in_a_sentence(line, words, capsys, caplog):
    with caplog.at_level("INFO"):
        run(capsys, *line.split())
    assert re.search(f"{words}$", caplog.messages[-1])
    if "--memory_gib 16" in line:  # by the plan's own figures, too
        for batch, fits in ((217, True), (222, False)):
            found = run(capsys, *line.split(), "--batch_size", str(batch))
            assert (found["stage1"]["gib_per_device"] <= 0.8 * 16) is fits


def test_a_chunk_follows_the_cards_memory_and_the_precision():
    path = 2 * 112**2 * 64 + 3 * sum(
        blocks * size**2 * width
        for blocks, size, width in ((5, 56, 64), (5, 28, 128), (8, 14, 256), (5, 7, 512))
    )
    for amp, number in (("O0", 4), ("O1", 2)):
        options = plan.parser().parse_args(["--gpu", "v100", "--amp", amp, "--memory_gib", "16"])
        chunk = plan.scored_chunk(RESNET48, options, plan.planned_precision(options))
        assert chunk == int(0.6 * 16 * 2**30 / (number * path))


def test_activations_are_what_the_convolutions_put_out():
    network = build_network("resnet48_mini", 10, elastic=False)
    sizes = []
    for layer in network.sublayers():
        if isinstance(layer, nn.Conv2D):
            layer.register_forward_post_hook(lambda _, __, output: sizes.append(output.size))
    network(paddle.zeros([1, 3, 64, 64]))
    largest = RESNET48_MINI.plan(RESNET48_MINI.largest())
    assert convolution_outputs(largest, 64) == sum(sizes)


WRONG = ["--gpu t4", "--gpus 0", "--memory_gib x", "--gpu v100 --tf32 on", "--train_images 99"]


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_refused(line):
    with pytest.raises(UserError):
        plan.main(line.split())
