"""What an H100 did through PyTorch, docs/results/cudnn_h100.json, against what is made of it.

PyTorch is not there when tests run: hnas.bench.cudnn itself is run by hand.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from test_readme import table_after, text_of

from hnas.base.errors import UserError
from hnas.bench.cudnn import __main__ as cudnn
from hnas.bench.cudnn import expected
from hnas.evaluation.tree import PrefixTree
from hnas.evaluation.variants import Precision, usual_variant
from hnas.search_space import RESNET48, feature_sizes
from hnas.tools.check_device import training, walk
from hnas.tools.plan import GPUS, rates_of

FOUND = json.loads((Path(__file__).parents[1] / "docs/results/cudnn_h100.json").read_text())
PRECISIONS = {each.value: each for each in Precision}
COARSE = ("TF32", "float16", "bfloat16")
PX = {"mini": "mini, 32 px", "full width": "full width, 64 px"}


def rate(part, what):
    (value,) = (row["gmacs_per_s"] for row in FOUND[part] if row["what"] == what)
    return value


def rounding(way):
    return {
        (row["network"], row["calibration_images"]): row["apart"]
        for row in FOUND["rounding"]
        if row["way"] == way
    }


# --- rounding


@pytest.mark.parametrize("kind", PRECISIONS)
def test_limits_of_the_walk_are_three_times_what_a_card_rounds(kind):
    limit = walk.LIMITS[PRECISIONS[kind]]
    for way in (kind, f"{kind} fused"):
        found = rounding(way)
        assert len(found) == (3 if "fused" in way else 6)
        assert 0 < max(found.values()) < limit / 3


@pytest.mark.parametrize("kind", COARSE)
def test_tests_emulate_what_a_card_rounds(kind):
    emulated, real = rounding(f"{kind} emulated"), rounding(kind)
    assert real.keys() == emulated.keys()
    assert all(0.45 < real[each] / emulated[each] < 1.2 for each in real)


def test_pytorch_agrees_with_the_reference_engine():
    rows = [row for row in FOUND["rounding"] if row["way"] == "float64"]
    for row in rows:
        if row["from_reference"] is None:
            assert "224" in row["network"]
        else:
            assert row["from_reference"] < (3e-5 if row["calibration_images"] else 2e-6)


def test_training_of_a_card_is_within_a_third_of_its_limits():
    limits = {
        "first_loss": training.FIRST_LOSS,
        "direction": training.DIRECTION,
        "length": training.LENGTH,
        "losses": training.CURVE,
    }
    rows = {(row["stage"], row["precision"]): row for row in FOUND["training"]}
    assert len(rows) == 2 * 5 and all(row["finite"] for row in rows.values())
    for (_, kind), row in rows.items():
        for name, by_precision in limits.items():
            if kind == "float64":
                assert row[name] < (2e-13 if name == "direction" else 5e-7)
            elif PRECISIONS[kind] in by_precision:
                assert row[name] < by_precision[PRECISIONS[kind]] / 3


def test_the_tables_of_rounding_are_what_was_measured():
    ways = {kind: (rounding(kind), rounding(f"{kind} emulated")) for kind in COARSE}
    walked = [
        [PX.get(network, network), str(number)]
        + [f"{real[network, number]:.2g} ({emulated[network, number]:.2g})" for real, emulated in
           ways.values()]
        for network, number in ways["TF32"][0]
    ]  # fmt: skip
    assert table_after("docs/gpu.md", "cudnn rounding table") == walked
    names = ("first_loss", "direction", "length", "losses")
    trained = [
        [row["stage"], row["precision"], *(f"{row[name]:.1e}" for name in names)]
        for row in FOUND["training"]
        if row["precision"] in COARSE
    ]
    assert table_after("docs/gpu.md", "cudnn training table") == trained


# --- rates


def test_the_table_of_rates_is_what_was_measured():
    rows = []
    for kind in PRECISIONS:
        for fused in ("", " fused"):
            found = [
                rate("rates_stages", f"stage {stage} of 256 images in {kind}{fused}")
                for stage in range(1, 5)
            ]
            found += [
                rate("rates", f"walk of {number} images in {kind}{fused}")
                for number in (64, 256, 1024)
            ]
            found.append(rate("rates_searched", f"walk of 256 images in {kind}{fused}"))
            cells = [f"{value / 1000:.1f}" for value in found]
            rows.append([kind, "yes" if fused else "no", *cells])
    assert table_after("docs/speed.md", "cudnn rates table") == rows


def stage_costs(tree: PrefixTree) -> tuple[np.ndarray, np.ndarray]:
    """Of one walk, an image, and of each stage: multiply-accumulates, and numbers written."""
    _, sizes = feature_sizes(224)
    macs, outputs = np.zeros(4), np.zeros(4)
    for node in tree.nodes():
        for group in node.groups:
            macs[group.stage] += group.macs(sizes[group.stage])
            outputs[group.stage] += group.outputs(sizes[group.stage])
    return macs, outputs


@pytest.mark.slow
def test_the_plan_has_the_rates_of_the_card():
    archs = list(RESNET48.sample_distinct(np.random.default_rng(0), 45_000).values())
    by_stage, outputs = stage_costs(PrefixTree(RESNET48, archs))
    shares = by_stage / by_stage.sum()
    page = " ".join(text_of("docs/speed.md").split())
    assert f"{100 * shares[2]:.0f} and {100 * shares[3]:.0f} % of its" in page
    hours = {}
    for kind in ("float32", "TF32", "float16"):
        rates = rates_of(GPUS["h100"], PRECISIONS[kind])
        assert rates.training / 1e9 == pytest.approx(rate("rates", f"training in {kind}"), rel=0.05)
        for fused in (False, True):
            way = kind + " fused" * fused
            measured = [
                rate("rates_stages", f"stage {stage} of 256 images in {way}") * 1e9
                for stage in range(1, 5)
            ]
            seconds = float((by_stage / measured).sum())
            hours[way] = seconds * 50_000 / 3600
            planned = rates.scoring_seconds(
                by_stage.sum(), outputs.sum(), usual_variant(PRECISIONS[kind], fused=fused)
            )
            assert planned == pytest.approx(seconds, rel=0.12 if fused else 0.03)
    rounded = [round(hours[way]) for way in ("TF32", "float16", "float16 fused")]
    assert "for 50,000 images {}, {} and {} hours".format(*rounded) in page


# --- the command


def test_without_pytorch_it_says_so(tmp_path):
    arguments = ["--expected", str(tmp_path / "no"), "--output", str(tmp_path / "out.json")]
    with pytest.raises(UserError) as error:
        cudnn.main(arguments)
    missing = "is no file" if find_spec("torch") else "needs PyTorch"
    assert missing in str(error.value) and "\n" not in str(error.value)


def test_what_pytorch_starts_from_is_all_there():
    model = training.STAGES["stage 1"]()
    found = expected.start(model)
    lines = [line.split() for line in found["parameters"]]
    assert [kind for name, kind in lines if name.startswith("key_")].count("trained") == 0
    own = {name for name, _ in lines if not name.startswith("key_")}
    assert own <= found.keys() and not any(name.startswith("key_") for name in found)
    for step, line in enumerate(found["codes"]):
        codes = [arch.code for arch in model.sampler.sample(0, step)]
        assert line.split() == codes
