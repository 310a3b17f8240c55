"""What goes with frozen BatchNorm: re-calibration and warnings, and what files say of it."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from entry_scripts import CLASSES, noise_images, run

import train_supernet_pinas_stage1 as stage1
import train_supernet_pinas_stage2_simple as stage2
from hnas.dataset.image_folder import DataError
from hnas.models.registry import build_network
from hnas.models.resnet import ResNet
from hnas.search_space import RESNET48_MINI
from hnas.utils import validation
from hnas.utils.flags import AUTO
from hnas.utils.options import Options
from hnas.utils.public_files import CheckpointError
from hnas.utils.runtime import calibration_images, calibration_number
from hnas.utils.starting import (
    pretrained_network,
    start_contrast_from_checkpoint,
    start_from_checkpoint,
)
from hnas.utils.training import about_weights
from hnas.utils.weights import check_classes, read_checkpoint, write_state

MINI = "resnet48_mini"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plain():
    paddle.seed(1)
    return build_network(MINI, 10, elastic=False).state_dict()


# --- re-calibration


@pytest.mark.parametrize(
    ("asked", "frozen", "number", "told"),
    [
        (AUTO, True, 0, "bn_calibration_images 0: the weights were trained with freeze_bn"),
        (AUTO, False, 64, "bn_calibration_images 64: the weights were trained without freeze_bn"),
        (
            8,
            True,
            8,
            "--bn_calibration_images 8, but the weights were trained with freeze_bn: the ranking "
            "suffers; give 0 or auto",
        ),
        (
            0,
            False,
            0,
            "--bn_calibration_images 0, but the weights were trained without freeze_bn: their "
            "running statistics are a mixture of all sub-networks'",
        ),
        (0, True, 0, None),
        (8, False, 8, None),
    ],
)
def test_calibration_follows_the_checkpoint(asked, frozen, number, told, caplog):
    with caplog.at_level("INFO"):
        assert calibration_number(Options(bn_calibration_images=asked), frozen) == number
    assert caplog.messages == ([] if told is None else [told])
    levels = [record.levelname for record in caplog.records]
    assert levels == ([] if told is None else ["INFO" if asked == AUTO else "WARNING"])


def test_calibration_takes_so_many_images(images):
    def number(asked, frozen):
        options = Options(image_dir=str(images), image_size=32, bn_calibration_images=asked)
        found = calibration_images(options, frozen)
        return None if found is None else len(found)

    assert number(AUTO, True) is None and number(0, False) is None
    assert number(5, True) == number(5, False) == 5
    with pytest.raises(DataError, match="--bn_calibration_images 64, but .* has 20"):
        number(AUTO, False)


@pytest.mark.parametrize(
    ("train", "freeze_bn", "about", "told"),
    [
        (False, True, None, "trained without freeze_bn: their running statistics"),
        (False, False, {"freeze_bn": False}, "trained without freeze_bn: their running statistics"),
        (False, False, {"freeze_bn": True}, ""),
        (True, True, None, ""),
        (True, False, {"freeze_bn": True}, "trained without freeze_bn: their running statistics"),
    ],
)
def test_stage_two_evaluates_as_it_trains_or_as_the_checkpoint_was_trained(
    train, freeze_bn, about, told, plain, images, tmp_path, monkeypatch, caplog
):
    write_state(tmp_path / "start.pdparams", plain, about)
    seen, first = [], []

    def extremes(network, loader, calibration, at_first):
        seen.append(network)
        at_first()
        return {"top1": 0.5}

    monkeypatch.setattr(validation, "extremes", extremes)
    monkeypatch.setattr(validation, "evaluate_network", lambda network, _: first.append(network))
    monkeypatch.setattr(stage2, "fit", lambda model, *_: seen.append(model.network))
    weights = tmp_path / "start.pdparams"
    flags = {"pretrained": weights, "ckpt_dir": weights, "use_ckpt": True, "backbone": MINI}
    flags |= {"train_flag": train, "freeze_bn": freeze_bn, "bn_calibration_images": 0}
    run(stage2, monkeypatch, images, tmp_path / "out", **flags)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == bool(told) and all(told in warning for warning in warnings)
    frozen = freeze_bn if train else bool((about or {}).get("freeze_bn"))
    assert seen and all(network.stem.bn.frozen is frozen for network in seen)
    # It is measured against the plain network that --pretrained names.
    assert len(first) == (not train) and all(type(network) is ResNet for network in first)


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_one_process_that_does_not_freeze_is_told_what_is_given_away(
    freeze_bn, plain, images, tmp_path, monkeypatch, caplog
):
    write_state(tmp_path / "start.pdparams", plain)
    models = []
    monkeypatch.setattr(stage1, "fit", lambda model, *_: models.append(model))
    flags = {"pretrained": tmp_path / "start.pdparams", "backbone": "resnet48pinasv2_mini"}
    flags |= {"queue_size": 20, "freeze_bn": freeze_bn}
    run(stage1, monkeypatch, images, tmp_path / "out", **flags)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == (not freeze_bn)
    told = "--freeze_bn False in one process: keys and queries are normalised by the same batch"
    assert all(warning.startswith(told) for warning in warnings)
    (model,) = models
    assert model.shuffle is not freeze_bn
    for encoder in (model.network.backbone, model.network.key_backbone):
        assert encoder.stem.bn.frozen is freeze_bn


# --- what files say


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_files_say_how_they_were_trained(suffix, plain, tmp_path):
    about = {"backbone": MINI, "freeze_bn": True, "classes": ["ä", 'b "c"', *CLASSES[2:]]}
    path = tmp_path / f"a{suffix}"
    write_state(path, plain, about)
    checkpoint = read_checkpoint(path)
    assert checkpoint.about == about and checkpoint.freeze_bn is True
    assert checkpoint.weights.keys() == plain.keys()
    for name, value in checkpoint.weights.items():
        np.testing.assert_array_equal(value, plain[name].numpy())
    write_state(path, plain, {**about, "freeze_bn": False})
    assert read_checkpoint(path).freeze_bn is False
    write_state(path, plain)
    assert read_checkpoint(path).about == {} and not read_checkpoint(path).freeze_bn


def test_training_says_it(images):
    folder = SimpleNamespace(classes=("cat", "dog"))
    loader = SimpleNamespace(dataset=SimpleNamespace(images=folder))
    options = Options(backbone=MINI, freeze_bn=True)
    expected = {"backbone": MINI, "freeze_bn": True, "classes": ["cat", "dog"]}
    assert about_weights(options, loader) == expected


def taken_by_stage_one(path, classes):
    network = build_network("resnet48pinasv2_mini", 10, queue_size=4)
    start_contrast_from_checkpoint(network, path, classes)


TAKERS = {
    "ckpt_dir of stage 1": taken_by_stage_one,
    "ckpt_dir of stages 2 and 3": lambda path, classes: start_from_checkpoint(
        build_network(MINI, 10), path, classes
    ),
    "pretrained": lambda path, classes: pretrained_network(
        Options(backbone=MINI, pretrained=path), classes, RESNET48_MINI
    ),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_class_names_are_compared(taker, plain, tmp_path, caplog):
    path = str(tmp_path / "a.pdparams")
    write_state(path, plain, {"classes": CLASSES})
    TAKERS[taker](path, tuple(CLASSES))
    swapped = ["0", "2", "1", *CLASSES[3:]]
    with pytest.raises(CheckpointError) as caught:
        TAKERS[taker](path, swapped)
    assert str(caught.value) == (
        f"checkpoint {path} was trained on other classes: '1' where image_dir has '2'; use "
        "folders of the same names"
    )
    with pytest.raises(CheckpointError, match="classifies 10 classes, but image_dir has 9"):
        TAKERS[taker](path, CLASSES[:9])
    # Files of earlier versions and official weights have no names.
    write_state(path, plain)
    with caplog.at_level("INFO"):
        TAKERS[taker](path, swapped)
    assert f"{path} does not name its classes: taken to be those of image_dir" in caplog.messages


def test_as_many_names_as_classes(plain, tmp_path):
    path = tmp_path / "a.pdparams"
    write_state(path, plain, {"classes": CLASSES[:4]})
    with pytest.raises(CheckpointError, match="was trained on 4 classes, but image_dir has 10"):
        check_classes(read_checkpoint(path), CLASSES, path)
