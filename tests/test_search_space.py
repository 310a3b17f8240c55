"""Codes, widths, MACs and parameters of the ResNet48 space."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import assert_uniform, option_ranks
from hypothesis import given
from hypothesis import strategies as st
from independent import width
from paddle import nn
from scipy.stats import chi2_contingency

from hnas.base.errors import UserError
from hnas.evaluation.tree import PrefixTree
from hnas.models.resnet import ResNet
from hnas.search_space import (
    RESNET48,
    RESNET48_MINI,
    Architecture,
    SearchSpace,
    search_space,
)

OFFICIAL = Path(__file__).parents[2] / "shared" / "data" / "CVPR_2022_NAS_Track1_test.json"
LARGEST = "1558511111111111111111111111111111111111111111111111"
SMALLEST = "12222" + "3" + "3333000000" + "3333000000" + "5555" + "0" * 12 + "7777000000"
MIXED = "13254" + "2" + "3212120000" + "7161000000" + "4353231353" + "000000" + "2414642400"
# Output widths vary inside stages 1 and 3 and the stem's is not stage 1's.
NOT_SHAREABLE = "12232" + "7" + "1113000000" + "2222000000" + "517137" + "0" * 10 + "7676000000"
DEEPEST = (5, 5, 8, 5)


@st.composite
def valid_codes(draw):
    """Any valid 52-digit code, shareable or not."""
    depths = [draw(st.integers(2, deepest)) for deepest in DEEPEST]
    code = "1" + "".join(map(str, depths)) + draw(st.sampled_from("1234567"))
    for depth, deepest in zip(depths, DEEPEST, strict=True):
        widths = draw(st.text("1234567", min_size=2 * depth, max_size=2 * depth))
        code += widths.ljust(2 * deepest, "0")
    return code


@st.composite
def sampled(draw):
    """(space, an architecture drawn from it)."""
    name = draw(st.sampled_from(["resnet48", "resnet48_mini"]))
    space = search_space(name, draw(st.sampled_from(["released", "full"])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return space, space.sample(rng, draw(st.floats(-5, 5)))


# --- codes


@given(valid_codes())
def test_a_code_is_written_back_as_it_was_read(code):
    with_image_size, without = Architecture.from_code(code), Architecture.from_code(code[1:])
    assert (with_image_size.code, without.code) == (code, code[1:])
    assert with_image_size == without and hash(with_image_size) == hash(without)


def test_digits_of_a_code():
    arch = Architecture.from_code(MIXED)
    assert (arch.depths, arch.stem) == ((3, 2, 5, 4), 2)
    assert arch.widths == (
        ((3, 2), (1, 2), (1, 2)),
        ((7, 1), (6, 1)),
        ((4, 3), (5, 3), (2, 3), (1, 3), (5, 3)),
        ((2, 4), (1, 4), (6, 4), (2, 4)),
    )
    codes = {LARGEST, SMALLEST, MIXED, NOT_SHAREABLE, MIXED[:6] + "2" + MIXED[7:]}
    assert len({Architecture.from_code(code) for code in codes}) == 5


def allowed_digits(depths):
    """For each position of a 52-digit code the digits that are allowed there."""
    allowed = ["1", "2345", "2345", "2345678", "2345", "1234567"]
    for depth, deepest in zip(depths, DEEPEST, strict=True):
        allowed += ["1234567"] * (2 * depth) + ["0"] * (2 * (deepest - depth))
    return allowed


@pytest.mark.parametrize("dropped", [0, 1], ids=["52 digits", "51 digits"])
@pytest.mark.parametrize("code", [SMALLEST, MIXED])
def test_every_invalid_digit_is_named_by_its_position(code, dropped):
    refused = 0
    for position, allowed in enumerate(allowed_digits([int(d) for d in code[1:5]])):
        if position < dropped:
            continue
        for digit in set("0123456789") - set(allowed):
            wrong = (code[:position] + digit + code[position + 1 :])[dropped:]
            with pytest.raises(UserError) as error:
                Architecture.from_code(wrong)
            assert f"digit {position + 1 - dropped} (" in str(error.value)
            assert f"is {digit}; allowed: {allowed[0]}" in str(error.value)
            refused += 1
    assert refused > 51 * 3


@given(sampled(), st.integers(-1, 3), st.integers(0, 7), st.integers(1, 7))
def test_shareable_means_one_output_width_a_stage_and_the_stems(drawn, stage, block, digit):
    space, arch = drawn
    assert space.shared_plan(arch) == space.plan(arch)
    # In the mini space the seven widths differ, so that channels change wherever digits do.
    code = list(arch.code)
    position = 5  # the stem's
    if stage >= 0:
        position = 6 + 2 * sum(DEEPEST[:stage]) + 2 * (block % int(code[1 + stage])) + 1
    unchanged = code[position] == str(digit)
    code[position] = str(digit)
    arch = Architecture.from_code("".join(code))
    if unchanged:
        RESNET48_MINI.shared_plan(arch)
    else:
        told = f"{arch.code}: stage {max(1, stage + 1)} changes from"
        with pytest.raises(UserError, match=told):
            RESNET48_MINI.shared_plan(arch)
    # Of RESNET48, digits 3 and 4 both give 56 channels: no projection is needed.
    RESNET48.shared_plan(Architecture.from_code(SMALLEST[:5] + "4" + SMALLEST[6:]))


# --- widths


@pytest.mark.parametrize("divisor", [1, 4, 8, 16])
@pytest.mark.parametrize("bases", [(64, 128, 256, 512), (20, 32, 64, 128), (90, 170, 180, 340)])
def test_widths_are_the_nearest_multiples(bases, divisor):
    space = SearchSpace(bases, divisor)
    for stage, base in enumerate(bases):
        for digit in range(1, 8):
            assert space.channels(stage, digit) == width(base, digit, divisor), (base, digit)


# --- MACs and parameters


RELEASED_SAMPLE = RESNET48.sample(np.random.default_rng(1)).code


@pytest.mark.parametrize(
    ("space", "code", "image_size", "classes"),
    [
        pytest.param(RESNET48, SMALLEST, 224, 1000, id="smallest"),
        pytest.param(RESNET48, RELEASED_SAMPLE, 96, 1000, id="released"),
        pytest.param(RESNET48, LARGEST, 75, 10, id="largest, odd size"),
        pytest.param(RESNET48, NOT_SHAREABLE, 64, 10, id="not shareable"),
        pytest.param(RESNET48, MIXED, 33, 10, id="mixed"),
        pytest.param(RESNET48_MINI, MIXED, 45, 7, id="mini"),
    ],
)
def test_macs_and_parameters_equal_those_of_the_network(space, code, image_size, classes):
    arch = Architecture.from_code(code)
    network = ResNet(space.plan(arch), classes)
    if code == NOT_SHAREABLE and space is RESNET48:
        # Stage 1: 48 -> 64 -> 56; 2: 56 -> 120 -> 120; 3: -> 256 -> 256 -> 176.
        projecting = [block.downsample is not None for block in network.active_blocks()]
        assert projecting == [True, True, True, False, True, False, True, True, False]
    nothing = dict.fromkeys((nn.BatchNorm2D, nn.ReLU, nn.AdaptiveAvgPool2D), lambda *_: None)
    macs = paddle.flops(network, [1, 3, image_size, image_size], custom_ops=nothing)
    assert space.macs(arch, image_size, classes) == macs
    # Paddle lists BatchNorm's running statistics among the parameters, without gradient.
    trainable = [p for p in network.parameters() if not p.stop_gradient]
    assert space.params(arch, classes) == sum(parameter.size for parameter in trainable)


@pytest.mark.skipif(not OFFICIAL.is_file(), reason=f"no {OFFICIAL.name} beside the project")
def test_official_codes_parse_round_trip_and_are_shareable():
    official = [entry["arch"] for entry in json.loads(OFFICIAL.read_text()).values()]
    archs = [Architecture.from_code(code) for code in official]
    assert [arch.code for arch in archs] == official
    assert len(set(archs)) == 45_000
    convolutions = []
    for arch in archs:
        RESNET48.shared_plan(arch)
        convolutions.append(RESNET48.macs(arch, num_classes=0))
    # The documented mean and sum leave the classifier out (0.0004 GMAC a network).
    assert np.mean(convolutions) == pytest.approx(2.971e9, abs=0.0005e9)
    assert np.sum(convolutions) == pytest.approx(133_710e9, abs=0.5e9)
    assert round(PrefixTree(RESNET48, archs).cost(224)[0] / 1e9) == 68_179  # of one walk
    assert_uniform(official, (3, 3, 5, 7))


# --- sampling


def test_choices_are_independent():
    rng = np.random.default_rng(6)
    codes = [RESNET48.sample(rng).code for _ in range(2000)]
    ranks = option_ranks(codes, (3, 3, 5, 7))
    # Inner widths of the first two blocks only: every code has them.
    choices = [
        *(f"depth {stage}" for stage in (1, 2, 3, 4)),
        *(f"output width {stage}" for stage in (1, 2, 3, 4)),
        *(f"inner width {stage}.{block}" for stage in (1, 3, 4) for block in (1, 2)),
    ]
    for index, first in enumerate(choices):
        for second in choices[:index]:
            table = np.zeros((ranks[first][0], ranks[second][0]))
            np.add.at(table, (ranks[first][1], ranks[second][1]), 1)
            assert chi2_contingency(table).pvalue > 1e-5, (first, second)


def test_smallest_of_the_released_and_of_the_full_space():
    assert RESNET48.smallest().code == SMALLEST
    narrowest = SMALLEST.translate(str.maketrans("35", "77"))
    assert search_space("resnet48", "full").smallest().code == narrowest
    assert search_space("resnet48", "full").largest().code == RESNET48.largest().code == LARGEST
