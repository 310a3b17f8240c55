"""The speed benches: what they compare is the same computation, and their figures add up."""

import json
from argparse import Namespace

import numpy as np
import paddle
import pytest

from hnas.base.errors import UserError
from hnas.base.files import write_json
from hnas.bench import speed_scoring, speed_training
from hnas.models.elastic import ElasticBatchNorm2D
from hnas.search_space import RESNET48_MINI


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_straightforward_loop_is_the_same_computation(stage, frozen):
    """Losses and all weights after two steps on 16 images."""
    options = Namespace(backbone="resnet48_mini", image_size=32, batch_size=16, freeze_bn=frozen)
    found = []
    for straightforward in (False, True):
        model = speed_training.new_model(stage, options, straightforward)
        norms = {type(part) for part in model.network.sublayers() if hasattr(part, "_momentum")}
        assert (ElasticBatchNorm2D in norms) is not straightforward
        model.optimizer.set_lr(0.01)
        rng = np.random.default_rng(2)
        images = rng.integers(0, 256, (2, 16, 3, 32, 32), dtype=np.uint8)
        second = rng.integers(0, 10, 16) if stage == 2 else images[1]
        losses = []
        for model.step in range(2):
            logs = model.train_batch([paddle.to_tensor(images[0]), paddle.to_tensor(second)])
            losses.append(float(logs["loss"]))
        state = {name: value.numpy() for name, value in model.network.state_dict().items()}
        found.append((losses, state))
    (losses, state), (other_losses, other) = found
    np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
    assert state.keys() == other.keys()
    for name, value in state.items():
        np.testing.assert_allclose(value, other[name], atol=1e-4, rtol=1e-3, err_msg=name)


def printed(bench, capsys, flags):
    """The lines of JSON that a bench prints."""
    bench.main([str(part) for pair in flags.items() for part in pair])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_training_is_timed_a_line_a_stage(capsys):
    flags = {"--batch_size": 4, "--rounds": 2, "--steps": 1, "--num_workers": 0}
    lines = printed(speed_training, capsys, flags)
    assert [line["stage"] for line in lines] == [1, 2]
    for line in lines:
        speeds = [line[f"{kind}_sample_forwards_per_s"] for kind in speed_training.LOOPS]
        assert line["ratio"] == pytest.approx(speeds[0] / speeds[1], abs=0.05)
        low, high = line["ratio_of_rounds"]
        assert 0 < low <= line["ratio"] <= high


def test_scoring_is_timed_and_both_engines_agree(tmp_path, capsys):
    path = tmp_path / "codes.json"
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(3), 6)
    write_json(path, {name: {"acc": 0, "arch": arch.code} for name, arch in archs.items()})
    flags = {"--modelarch_file": path, "--backbone": "resnet48_mini", "--image_size": 32}
    few = {"--n_images": 8, "--num_classes": 10}
    (found,) = printed(speed_scoring, capsys, flags | few)
    assert found["n_arch"] == 6 and found["largest_difference_top1"] <= found["near_ties"]
    assert found["ratio"] == pytest.approx(found["reference_s"] / found["shared_s"], rel=0.05)
    # A classifier's products are not counted.
    naive = sum(RESNET48_MINI.macs(arch, 32, num_classes=0) for arch in archs.values())
    assert found["macs_naive"] == naive > found["macs_shared"]
    with pytest.raises(UserError, match="--n_arch 7, but the file has 6 architectures"):
        printed(speed_scoring, capsys, flags | {"--n_arch": 7})
