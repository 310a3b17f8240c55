"""The plan's figures against sums done by hand, and its command line."""

import json

import numpy as np
import paddle
import pytest
from independent import first_place_size
from paddle import nn

from hnas.base.errors import UserError
from hnas.evaluation.tree import PrefixTree
from hnas.models.pinasv2 import build_network
from hnas.search_space import RESNET48, RESNET48_MINI
from hnas.tools import plan
from hnas.tools.plan import Recipe

LARGEST = 5_282_238_464


def run(capsys, *arguments):
    plan.main([*arguments, "--n_arch", "50"])
    return json.loads(capsys.readouterr().out)


def test_hours_follow_from_the_macs_of_the_recipe(capsys):
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
    archs = list(RESNET48.sample_distinct(np.random.default_rng(0), 50).values())
    walk = PrefixTree(RESNET48, archs).macs(224)
    # The engine's most, of which 60 % of 80 GiB would hold more.
    together = 1024
    assert found["stage3"]["hours"] == pytest.approx(walk * 50000 / 8e12 / 3600, abs=6e-4)
    flags = ("--gpus", "8", "--gmacs_per_s", "1000", "--bn_calibration_images", "64")
    calibrated = run(capsys, *flags)
    rounds = np.ceil(50000 / 8 / together)
    chunk = np.ceil(50000 / 8 / rounds)
    carried = walk * (chunk + 64) / chunk
    assert calibrated["stage3"]["hours"] == pytest.approx(carried * 50000 / 8e12 / 3600, abs=6e-4)
    assert calibrated["stage3"]["gib_per_device"] < 48
    assert found["stage3"]["hours"] < found["stage3_naive"]["hours"]


def outputs_by_hand(archs):
    """Numbers that the convolutions of a walk write, from sets of prefixes."""
    first, second, project = {}, {}, {}
    sizes = (56, 28, 14, 7)
    total = 112**2 * max(RESNET48.shared_plan(arch).stem for arch in archs)
    for arch in archs:
        plan_of = RESNET48.shared_plan(arch)
        prefix = (plan_of.stem,)
        for stage, _, mid, cout, stride in plan_of.blocks():
            key = (prefix, stage)
            first[key] = max(first.get(key, 0), mid)
            second[key, mid] = max(second.get((key, mid), 0), cout)
            if stride == 2:
                project[key] = max(project.get(key, 0), cout)
            prefix = (*prefix, (stage, mid, cout))
    for widths in (first, project):
        total += sum(sizes[key[1]] ** 2 * width for key, width in widths.items())
    return total + sum(sizes[key[0][1]] ** 2 * width for key, width in second.items())


VARIANTS = {
    "TF32": ("h100", "", 494.5, 0.37, 4, 7.5, "TF32, NCHW, not fused"),
    "an A100 without": ("a100", "--tf32 off", 19.5, 0.8, 4, 7.5, "float32, NCHW, not fused"),
    "no tensor cores": ("v100", "", 15.7, 0.8, 4, 7.5, "float32, NCHW, not fused"),
    "half": ("h100", "--amp O1", 989.4, 0.43, 2, 7.5, "float16, NHWC, not fused"),
    "fused": ("h100", "--amp O1 --fused True", 989.4, 0.43, 2, 2.5, "float16, NHWC, fused"),
}
BANDWIDTH = {"h100": 3350e9, "a100": 2039e9, "v100": 900e9}


@pytest.mark.parametrize("name", VARIANTS)
def test_stage_3_takes_the_time_of_its_variant(name, capsys, monkeypatch):
    monkeypatch.setattr(plan, "SAMPLED", 3)  # of stage 2
    gpu, flags, tflops, share, size, passes, words = VARIANTS[name]
    found = run(capsys, "--gpu", gpu, "--images", "10000000", *flags.split())
    archs = list(RESNET48.sample_distinct(np.random.default_rng(0), 50).values())
    compute = PrefixTree(RESNET48, archs).macs(224) / (tflops * 1e12 / 2 * share)
    memory = passes * size * outputs_by_hand(archs) / (0.8 * BANDWIDTH[gpu])
    hours = (compute + memory) * 1e7 / 3600
    assert found["stage3"]["hours"] == pytest.approx(hours, abs=6e-4)
    assert any(words in line for line in found["assumptions"])
    assert any(f"{tflops} TFLOP/s" in line for line in found["assumptions"])


def test_an_a100_without_tf32_is_slow(capsys, monkeypatch):
    """What was planned without a word: 23 TFLOP/s, above the 19.5 of its float32 cores."""
    monkeypatch.setattr(plan, "SAMPLED", 3)
    fast, slow = (run(capsys, "--gpu", "a100", "--tf32", mode) for mode in ("on", "off"))
    for stage in ("stage1", "stage2", "stage3"):
        assert slow[stage]["hours"] > 2 * fast[stage]["hours"]


def test_a_chunk_follows_the_cards_memory_and_the_precision(capsys):
    path = 2 * 112**2 * 64 + 3 * sum(
        blocks * size**2 * width
        for blocks, size, width in ((5, 56, 64), (5, 28, 128), (8, 14, 256), (5, 7, 512))
    )
    recipe = Recipe(memory_gib=16)
    assert plan.scored_chunk(RESNET48, recipe) == int(0.6 * 16 * 2**30 / (4 * path))
    assert recipe.variant.precision.bytes == 4
    half = Recipe(memory_gib=16, variant=plan.usual_variant(plan.Precision.FLOAT16))
    assert plan.scored_chunk(RESNET48, half) == int(0.6 * 16 * 2**30 / (2 * path))


def test_stage_two_counts_the_networks_that_are_sampled():
    recipe = Recipe(image_size=32, num_classes=10, subnetworks=2)
    rng, steps, total = np.random.default_rng(7), 90, 0
    for step in range(steps):
        drawn = [RESNET48_MINI.sample(rng) for _ in range(400)]
        by_size = {first_place_size(arch.code): arch for arch in drawn}
        trained = [by_size[size] for size in sorted(by_size)[-2:]]
        trained += [RESNET48_MINI.sample(rng)] if step % 3 == 0 else []
        total += sum(RESNET48_MINI.macs(arch, 32, 10) for arch in trained)
    expected = RESNET48_MINI.macs(RESNET48_MINI.largest(), 32, 10) + 3 * total / steps
    assert plan.stage2_macs(RESNET48_MINI, recipe) == pytest.approx(expected, rel=0.03)


def test_activations_are_what_the_convolutions_put_out():
    network = build_network("resnet48_mini", 10, elastic=False)
    sizes = []
    for layer in network.sublayers():
        if isinstance(layer, nn.Conv2D):
            layer.register_forward_post_hook(lambda _, __, output: sizes.append(output.size))
    network(paddle.zeros([1, 3, 64, 64]))
    assert plan.activation_floats(RESNET48_MINI, 64) == sum(sizes)


def test_more_devices_and_faster_ones_take_less(capsys):
    slow = run(capsys, "--gpu", "v100")
    fast = run(capsys, "--gpu", "h100", "--gpus", "8")
    for stage in ("stage1", "stage2", "stage3", "stage3_naive"):
        assert fast[stage]["hours"] < slow[stage]["hours"] / 8
    assert any("assumed" in line for line in slow["assumptions"])
    assert slow["stage1"]["gib_per_device"] > slow["stage2"]["gib_per_device"] > 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu", "t4"],
        ["--gpus", "0"],
        ["--efficiency", "2"],
        ["--gpu", "v100", "--tf32", "on"],
        ["--fused", "True", "--bn_calibration_images", "64"],
    ],
)
def test_wrong_input_is_refused(arguments):
    with pytest.raises(UserError):
        plan.main(arguments)
