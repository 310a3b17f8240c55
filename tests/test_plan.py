"""The plan's figures against sums done by hand, and its command line."""

import json

import numpy as np
import paddle
import pytest
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
    # 2 views x (3 + 1); 1,281,167 images in whole steps of 2,048; 10 epochs
    images = 10 * (1_281_167 // 2048 * 2048)
    assert found["stage1"]["images"] == images
    assert found["stage1"]["gmacs_per_image"] == pytest.approx(8 * LARGEST / 1e9, abs=0.1)
    hours = 8 * LARGEST * images / 8e12 / 3600
    assert found["stage1"]["hours"] == pytest.approx(hours, rel=1e-3)
    # Between the teacher's pass alone and four networks of the largest's size.
    stage2 = found["stage2"]["gmacs_per_image"] * 1e9
    assert LARGEST + 4 * 3 * 0.5 * LARGEST < stage2 < LARGEST + 4 * 3 * LARGEST
    archs = list(RESNET48.sample_distinct(np.random.default_rng(0), 50).values())
    walk = PrefixTree(RESNET48, archs).macs(224)
    # A quarter of 80 GiB, three times the activations of an image; 64 images calibrate.
    together = 20 * 2**30 // (12 * plan.activation_floats(RESNET48, 224))
    rounds = np.ceil(50000 / 8 / (together - 64))
    chunk = np.ceil(50000 / 8 / rounds)
    carried = walk * (chunk + 64) / chunk
    assert found["stage3"]["hours"] == pytest.approx(carried * 50000 / 8e12 / 3600, abs=6e-4)
    assert found["stage3"]["gib_per_device"] < 20.5
    plain = run(capsys, "--gpus", "8", "--gmacs_per_s", "1000", "--bn_calibration_images", "0")
    assert plain["stage3"]["hours"] == pytest.approx(walk * 50000 / 8e12 / 3600, abs=6e-4)
    assert found["stage3"]["hours"] < found["stage3_naive"]["hours"]


def test_stage_two_counts_the_networks_that_are_sampled():
    recipe = Recipe(image_size=32, num_classes=10, subnetworks=2, tilt=0.0)
    rng = np.random.default_rng(7)
    mean = np.mean([RESNET48_MINI.macs(RESNET48_MINI.sample(rng), 32, 10) for _ in range(3000)])
    expected = RESNET48_MINI.macs(RESNET48_MINI.largest(), 32, 10) + 2 * 3 * mean
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
