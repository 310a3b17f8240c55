"""The plan's figures against sums done by hand, and its command line."""

import json

import numpy as np
import paddle
import pytest
from independent import first_place_size
from paddle import nn

from hnas.base.errors import UserError
from hnas.evaluation.tree import PrefixTree
from hnas.models.registry import build_network
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
    # A quarter of 80 GiB, three times the activations of an image.
    together = 20 * 2**30 // (12 * plan.activation_floats(RESNET48, 224))
    assert found["stage3"]["hours"] == pytest.approx(walk * 50000 / 8e12 / 3600, abs=6e-4)
    flags = ("--gpus", "8", "--gmacs_per_s", "1000", "--bn_calibration_images", "64")
    calibrated = run(capsys, *flags)
    rounds = np.ceil(50000 / 8 / (together - 64))
    chunk = np.ceil(50000 / 8 / rounds)
    carried = walk * (chunk + 64) / chunk
    assert calibrated["stage3"]["hours"] == pytest.approx(carried * 50000 / 8e12 / 3600, abs=6e-4)
    assert calibrated["stage3"]["gib_per_device"] < 20.5
    assert found["stage3"]["hours"] < found["stage3_naive"]["hours"]


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


@pytest.mark.parametrize("arguments", [["--gpu", "t4"], ["--gpus", "0"], ["--efficiency", "2"]])
def test_wrong_input_is_refused(arguments):
    with pytest.raises(UserError):
        plan.main(arguments)
