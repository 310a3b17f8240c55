"""python -m hnas.tools.flops: its output against networks that are really built."""

import json

import numpy as np
import paddle
import pytest
from paddle import nn

from hnas.base.errors import UserError
from hnas.models.resnet import ResNet
from hnas.search_space import RESNET48, RESNET48_MINI, Architecture
from hnas.tools.flops import main

LARGEST = "1558511111111111111111111111111111111111111111111111"
# 51 digits, without the image size; small enough to run at any size.
SMALL = "22223" + "3313000000" + "2212000000" + "5414" + "0" * 12 + "6727000000"


@pytest.fixture
def arch_file(tmp_path):
    path = tmp_path / "archs.json"
    path.write_text(
        json.dumps({"big": {"acc": 0.0, "arch": LARGEST}, "small": {"acc": 0.5, "arch": SMALL}})
    )
    return path


def run(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return json.loads(capsys.readouterr().out)


def built_counts(space, code, image_size, classes):
    """MACs and trainable parameters of the stand-alone network, from one forward of it."""
    network = ResNet(space.plan(Architecture.from_code(code)), classes)
    macs = []

    def count_layer(layer, _, output):
        pixels = int(np.prod(output.shape[2:])) if isinstance(layer, nn.Conv2D) else 1
        macs.append(pixels * int(np.prod(layer.weight.shape)))

    for layer in network.sublayers():
        if isinstance(layer, nn.Conv2D | nn.Linear):
            layer.register_forward_post_hook(count_layer)
    network.eval()
    with paddle.no_grad():
        network(paddle.zeros([1, 3, image_size, image_size]))
    trainable = [p for p in network.parameters() if not p.stop_gradient]
    return {"macs": sum(macs), "params": sum(int(np.prod(p.shape)) for p in trainable)}


def test_output_by_default_is_for_imagenet(arch_file, capsys):
    counts = run(capsys, "--modelarch_file", arch_file)
    assert list(counts) == ["big", "small"]
    assert counts["big"] == {"arch": LARGEST, "macs": 5_282_238_464, "params": 34_043_688}
    assert counts["small"] == {"arch": SMALL, **built_counts(RESNET48, SMALL, 224, 1000)}


def test_backbone_image_size_and_classes(arch_file, capsys):
    flags = ("--backbone", "resnet48_mini", "--image_size", 33, "--num_classes", 10)
    counts = run(capsys, "--modelarch_file", arch_file, *flags)
    for name, code in (("big", LARGEST), ("small", SMALL)):
        assert counts[name] == {"arch": code, **built_counts(RESNET48_MINI, code, 33, 10)}


def test_output_file_holds_the_same(arch_file, tmp_path, capsys):
    printed = run(capsys, "--modelarch_file", arch_file)
    output = tmp_path / "new folder" / "counts.json"
    main(["--modelarch_file", str(arch_file), "--output", str(output)])
    assert capsys.readouterr().out == ""
    assert json.loads(output.read_text()) == printed


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--modelarch_file", "nowhere.json", "nowhere.json: No such file"),
        ("--backbone", "resnet84", "did you mean resnet48"),
    ],
)
def test_wrong_values_are_user_errors(arch_file, flag, value, message):
    with pytest.raises(UserError, match=message):
        main(["--modelarch_file", str(arch_file), flag, value])


@pytest.mark.parametrize(
    ("flag", "value"), [("--image_size", "-224"), ("--image_size", "0"), ("--num_classes", "-1")]
)
def test_values_out_of_bounds_are_refused(arch_file, flag, value):
    with pytest.raises(UserError):
        main(["--modelarch_file", str(arch_file), flag, value])


@pytest.mark.parametrize("wrong", [["--imgae_size", "64"], ["--image_size", "small"]])
def test_a_wrong_command_line_is_one_line(arch_file, wrong):
    with pytest.raises(UserError) as error:
        main(["--modelarch_file", str(arch_file), *wrong])
    assert "\n" not in str(error.value)
