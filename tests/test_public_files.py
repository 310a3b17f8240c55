"""Files of public Track 1 code load bit for bit; broken ones are refused in one line."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict

import numpy as np
import paddle
import pytest
from entry_scripts import CLASSES, noise_images, run
from safetensors.numpy import save_file

import train_supernet
import train_supernet_pinas_stage1
from hnas.base.errors import UserError
from hnas.models.elastic import plain_name
from hnas.models.pinasv2 import PiNASv2, build_network
from hnas.search_space import RESNET48_MINI
from hnas.utils.options import Options
from hnas.utils.public_files import CheckpointError
from hnas.utils.training import (
    pretrained_network,
    start_contrast_from_checkpoint,
    start_from_checkpoint,
)
from hnas.utils.weights import (
    backbone_weights,
    looks_like,
    read_checkpoint,
    read_weights,
    write_state,
)

QUEUE, POINTER, BATCH = 40, 10, 20
SPACE = RESNET48_MINI


def arrays_of(network) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def shaken(network, seed):
    """Values that no new network has; variances and the queue stay what they are."""
    rng = np.random.default_rng(seed)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 and "variance" not in name and "pointer" not in name:
            tensor.set_value((tensor.numpy() + rng.normal(0, 0.1, tensor.shape)).astype("float32"))
    return network


@pytest.fixture(scope="module")
def supernet():
    paddle.seed(1)
    return arrays_of(shaken(build_network("resnet48_mini", 10), 1))


@pytest.fixture(scope="module")
def teacher():
    paddle.seed(2)
    return arrays_of(build_network("resnet48_mini", 10, elastic=False))


def new_contrast(seed, queue=QUEUE):
    paddle.seed(seed)
    return PiNASv2(SPACE, 10, queue_size=queue)


@pytest.fixture(scope="module")
def contrast():
    """Stage one's model, its two encoders and the pointer unlike in a new one."""
    network = shaken(new_contrast(3), 3)
    network.queue_pointer.set_value(np.array([POINTER], np.int64))
    return arrays_of(network)


# --- the layouts, from the names that recipe.md gives


WRAPS = {"one card": "model.", "several cards": "model._layers."}


def wrapped(state, wrap="one card"):
    return {f"{WRAPS[wrap]}{name}": value for name, value in state.items()}


def with_teacher(state, teacher, wrap="one card"):
    beside = {f"ofa_teacher_model.{WRAPS[wrap]}{name}": value for name, value in teacher.items()}
    return {**wrapped(state, wrap), **beside}


def public_contrast(state, wrap="one card", keys=("backbone", "neck")):
    """Stage one's file: the neck by its layers' numbers, the key encoder as the teacher."""
    layers = {"hidden": "mlp.0", "project": "mlp.2"}

    def encoder(name):
        part, _, rest = name.partition(".")
        layer, _, last = rest.partition(".")
        return f"neck.{layers[layer]}.{last}" if part == "neck" else rest

    public = {}
    for name, value in state.items():
        if name.startswith("key_"):
            own = name.removeprefix("key_")
            if own.startswith(keys):
                public[f"ofa_teacher_model.{WRAPS[wrap]}{encoder(own)}"] = value
        elif name.startswith("queue"):
            public["queue_ptr" if name == "queue_pointer" else name] = value
        else:
            public[f"{WRAPS[wrap]}{encoder(name)}"] = value
    return public


def tensors(state):
    return {name: paddle.to_tensor(value) for name, value in state.items()}


def paddle22(state):
    """What Paddle 2.2 pickles of a state dict: arrays and the table of names."""
    table = {name: f"conv2d_{index}.w_0" for index, name in enumerate(state)}
    return {**state, "StructuredToParameterName@@": table}


def sliced(state, largest=5000):
    """As Paddle cuts arrays, only into shorter slices."""
    whole, cuts = paddle22(state), {}
    for name, value in state.items():
        if value.size > largest:
            flat, number = whole.pop(name).flatten(), -(-value.size // largest)
            names = [f"{name}@@.{part}" for part in range(number)]
            cuts[name] = {"OriginShape": value.shape, "slices": names}
            for index, part in enumerate(names):
                whole[part] = flat[index * largest : (index + 1) * largest]
    assert len(cuts) > 5
    return {**whole, "UnpackBigParamInfor@@": cuts}


def pickled(content, path, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol))


WRITERS = {
    "paddle 3": lambda state, path: paddle.save(tensors(state), str(path)),
    "paddle 2.2": lambda state, path: pickled(paddle22(state), path),
    "protocol 3": lambda state, path: pickled(OrderedDict(paddle22(state)), path, 3),
    "slices": lambda state, path: pickled(sliced(state), path),
    "nested model": lambda state, path: paddle.save(
        {"model": tensors(state), "epoch": 3}, str(path), protocol=2
    ),
    "nested state_dict": lambda state, path: pickled({"state_dict": paddle22(state)}, path),
    "nested slices": lambda state, path: pickled({"model": sliced(state)}, path),
    "two nests": lambda state, path: pickled({"model": {"state_dict": state}}, path),
}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


def plain(state):
    return {plain_name(name): value for name, value in state.items()}


# --- reading


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_network_with_its_teacher_beside_it(writer, wrap, supernet, teacher, tmp_path, caplog):
    path = tmp_path / "public.pdparams"
    WRITERS[writer](with_teacher(supernet, teacher, wrap), path)
    with caplog.at_level("INFO"):
        checkpoint = read_checkpoint(path)
    assert_same_bits(checkpoint.weights, plain(supernet))
    assert checkpoint.freeze_bn
    told = [message for message in caplog.messages if "teacher" in message]
    assert told == [f"{path}: left {len(teacher)} tensors of the teacher beside the network"]


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_network_alone_and_a_converted_teacher(wrap, supernet, tmp_path):
    for state in (wrapped(supernet, wrap), with_teacher(supernet, supernet, wrap)):
        pickled(paddle22(state), tmp_path / "a.pdparams")
        assert_same_bits(read_weights(tmp_path / "a.pdparams"), plain(supernet))
    save_file(wrapped(supernet, wrap), tmp_path / "a.safetensors")
    assert_same_bits(read_weights(tmp_path / "a.safetensors"), plain(supernet))


def test_what_lies_beside_a_nest_is_named(supernet, tmp_path, caplog):
    beside = {f"x{index}": index for index in range(12)}
    pickled({**beside, "model": supernet}, tmp_path / "a.pdparams")
    with caplog.at_level("INFO"):
        assert_same_bits(read_weights(tmp_path / "a"), plain(supernet))
    assert f"took 'model', left {', '.join(map(repr, list(beside)[:10]))}, ..." in caplog.text
    assert "x10" not in caplog.text


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("writer", WRITERS)
def test_stage_ones_file(writer, wrap, contrast, tmp_path):
    path = tmp_path / "public.pdparams"
    WRITERS[writer](public_contrast(contrast, wrap), path)
    checkpoint = read_checkpoint(path)
    assert_same_bits(checkpoint.weights, plain(contrast))
    assert checkpoint.freeze_bn


def test_plain_files_are_not_taken_for_public_ones(supernet, teacher, tmp_path):
    for state in (supernet, teacher):
        paddle.save(tensors(state), str(tmp_path / "a.pdparams"))
        assert not read_checkpoint(tmp_path / "a").freeze_bn


# --- every stage takes them


@pytest.mark.parametrize("kind", ["stage 1", "stage 2"])
def test_pretrained_and_ckpt_dir_take_files_of_both_stages(
    kind, supernet, contrast, teacher, tmp_path
):
    path = tmp_path / "public.pdparams"
    if kind == "stage 1":
        pickled(paddle22(public_contrast(contrast)), path)
        expected = backbone_weights(plain(contrast))
    else:
        pickled(paddle22(with_teacher(supernet, teacher)), path)
        expected = plain(supernet)
    student = build_network("resnet48_mini", 10)
    assert start_from_checkpoint(student, str(path), CLASSES).freeze_bn
    assert_same_bits(plain(arrays_of(student)), expected)
    options = Options(backbone="resnet48_mini", pretrained=str(path))
    assert_same_bits(arrays_of(pretrained_network(options, CLASSES, SPACE)), expected)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("images"))


def test_scores_are_those_of_the_plain_file(supernet, teacher, images, tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    codes = {f"n{i}": {"acc": 0, "arch": SPACE.sample(rng).code} for i in range(2)}
    (tmp_path / "codes.json").write_text(json.dumps(codes))
    write_state(tmp_path / "plain.pdparams", tensors(supernet), {"freeze_bn": True})
    WRITERS["paddle 3"](with_teacher(supernet, teacher), tmp_path / "one.pdparams")
    WRITERS["nested slices"](wrapped(supernet, "several cards"), tmp_path / "several.pdparams")
    found = {}
    for name in ("plain", "one", "several"):
        run(
            train_supernet,
            monkeypatch,
            images,
            tmp_path / name,
            backbone="resnet48_mini",
            ckpt_dir=tmp_path / f"{name}.pdparams",
            modelarch_file=tmp_path / "codes.json",
        )
        files = ("submission.json", "submission_top5.json", "channel_sample.txt")
        found[name] = [(tmp_path / name / file).read_bytes() for file in files]
        state = json.loads((tmp_path / name / "estimates.json").read_text())
        found[name].append(state)
    assert found["one"] == found["several"] == found["plain"]
    assert sum(json.loads(found["plain"][1])[name]["acc"] for name in codes) > 0


# --- stage one goes on from them


def test_stage_one_goes_on_from_a_public_file(contrast, images, tmp_path, monkeypatch, caplog):
    pickled(paddle22(public_contrast(contrast)), tmp_path / "public.pdparams")
    with caplog.at_level("INFO"):
        run(
            train_supernet_pinas_stage1,
            monkeypatch,
            images,
            tmp_path / "out",
            backbone="resnet48pinasv2_mini",
            queue_size=QUEUE,
            use_ckpt=True,
            ckpt_dir=tmp_path / "public.pdparams",
            max_epoch=1,
            lr=1e-6,
            batch_size=BATCH,
        )
    assert f"stage 1 goes on with {len(contrast)} tensors" in caplog.text
    assert "left" not in caplog.text
    after = read_weights(tmp_path / "out/final")
    # The one step's keys go where the pointer was; the others are the file's.
    same = np.all(after["queue"] == contrast["queue"], axis=0)
    assert same.nonzero()[0].tolist() == [*range(POINTER), *range(POINTER + BATCH, QUEUE)]
    assert after["queue_pointer"].tolist() == [POINTER + BATCH]
    # The learning rate is as good as zero: the key encoder is on its way to the query encoder.
    name = "neck.project.bias"
    apart = (contrast[f"key_{name}"] - contrast[name]) * 0.999**2
    np.testing.assert_allclose(after[f"key_{name}"] - after[name], apart, atol=1e-5)
    assert np.abs(apart).max() > 0.1


def test_all_of_stage_one_is_taken(contrast, tmp_path):
    pickled(paddle22(public_contrast(contrast, "several cards")), tmp_path / "a.pdparams")
    network = new_contrast(9)
    start_contrast_from_checkpoint(network, str(tmp_path / "a.pdparams"), CLASSES)
    assert_same_bits(arrays_of(network), contrast)


@pytest.mark.parametrize("keys", [(), ("backbone",)])
def test_a_key_encoder_that_is_missing_starts_as_the_query_encoder(
    keys, contrast, tmp_path, caplog
):
    pickled(public_contrast(contrast, keys=keys), tmp_path / "a.pdparams")
    network = new_contrast(9)
    with caplog.at_level("INFO"):
        start_contrast_from_checkpoint(network, str(tmp_path / "a.pdparams"), CLASSES)
    missing = [part for part in ("backbone", "neck") if part not in keys]
    expected = {
        name: contrast[
            name.removeprefix("key_")
            if name.startswith(tuple(f"key_{part}." for part in missing))
            else name
        ]
        for name in contrast
    }
    assert_same_bits(arrays_of(network), expected)
    named = ", ".join(f"key_{part}" for part in missing)
    assert f"as in a new run start {named}\n" in caplog.text


def test_a_queue_of_another_size_starts_anew(contrast, tmp_path, caplog):
    pickled(public_contrast(contrast), tmp_path / "a.pdparams")
    network = new_contrast(9, queue=2 * QUEUE)
    queue = network.queue.numpy()
    start_contrast_from_checkpoint(network, str(tmp_path / "a.pdparams"), CLASSES)
    assert f"has a queue of {QUEUE} keys, not --queue_size {2 * QUEUE}: starting" in caplog.text
    found = arrays_of(network)
    expected = {**contrast, "queue": queue, "queue_pointer": np.zeros(1, np.int64)}
    assert_same_bits(found, expected)


@pytest.fixture(scope="module")
def taker():
    return new_contrast(9)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.neck.mlp.0.bias": None}, "1 missing: neck.hidden.bias"),
        ({"model.neck.mlp.3.bias": 1}, "1 unexpected: neck.mlp.3.bias"),
        ({"ofa_teacher_model.model.blocks.3.bn1.bias": None}, "1 missing: key_backbone.blocks.3"),
        ({"queue_ptr": None}, "1 missing: queue_pointer"),
        ({"queue_pointer": 1}, "holds queue_pointer twice"),
        ({"queue": np.ones((3, QUEUE), np.float32)}, "of another shape: queue [3, 40] instead"),
        ({"queue": np.float32([1])}, "of another shape: queue [1] instead"),
        ({"queue": np.array(1, np.float32)}, "of another shape: queue [] instead"),
    ],
)
def test_half_a_stage_one_is_refused(changes, told, contrast, taker, tmp_path):
    state = {**public_contrast(contrast), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    state = {n: np.ones(1, np.float32) if type(v) is int else v for n, v in state.items()}
    pickled(state, tmp_path / "a.pdparams")
    with pytest.raises(CheckpointError) as caught:
        start_contrast_from_checkpoint(taker, str(tmp_path / "a.pdparams"), CLASSES)
    assert told in str(caught.value) and "\n" not in str(caught.value)


# --- another backbone's


@pytest.mark.parametrize(
    ("beside", "name"),
    [({}, "resnet48"), ({"model.neck.mlp.0.bias": np.ones(1, np.float32)}, "resnet48pinasv2")],
)
def test_a_file_of_another_backbone_says_which(beside, name, tmp_path):
    """Of its tensors those suffice that tell the widths."""
    few = {"blocks.0.conv.fn.weight": [64, 3, 7, 7], "blocks.23.bn2.weight": [512]}
    state = {**wrapped({name: np.ones(shape, np.float32) for name, shape in few.items()}), **beside}
    pickled(state, tmp_path / "a.pdparams")
    assert looks_like(read_weights(tmp_path / "a")) == name
    with pytest.raises(CheckpointError) as caught:
        start_from_checkpoint(build_network("resnet48_mini", 10), str(tmp_path / "a"), CLASSES)
    told = "it is a resnet48 file: backbone=resnet48, in stage 1 backbone=resnet48pinasv2)"
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_of_the_same_backbone_there_is_nothing_to_say(supernet, tmp_path):
    state = plain(supernet)
    del state["blocks.3.bn1.bias"]
    pickled(state, tmp_path / "a.pdparams")
    with pytest.raises(CheckpointError, match="is of another network: 1 missing"):
        start_from_checkpoint(build_network("resnet48_mini", 10), str(tmp_path / "a"), CLASSES)


# --- what is broken


def endless():
    state = {}
    state["model"] = state
    return state


CUT = {"OriginShape": (2, 2), "slices": ["w@@.0", "w@@.1"]}
PARTS = {"w@@.0": np.ones(2, np.float32), "w@@.1": np.ones(2, np.float32)}


def cut(parts=None, **changes):
    return {**PARTS, **(parts or {}), "UnpackBigParamInfor@@": {"w": {**CUT, **changes}}}


HOSTILE = {
    "slices too short": (cut(OriginShape=(2, 3)), "4 values for another shape"),
    "slice missing": (cut(slices=["w@@.0", "w@@.2"]), "'w@@.2' is missing"),
    "slice twice": (cut(slices=["w@@.0", "w@@.0"]), "'w@@.0' is missing"),
    "no slices": (cut(slices=[]), "not listed"),
    "slices are text": (cut(slices="w@@.0"), "not listed"),
    "slices of lists": (cut(slices=[["w@@.0"], {}]), "is missing"),
    "slice is text": (cut({"w@@.0": "12"}), "no array"),
    "slices of two types": (cut({"w@@.0": np.ones(2, np.int32)}), "several types"),
    "huge shape": (cut(OriginShape=(10**30, 10**30)), "another shape"),
    "shape of zero times huge": (
        cut({"w@@.0": np.ones(0, "f4"), "w@@.1": np.ones(0, "f4")}, OriginShape=(0, 10**30)),
        "do not fit",
    ),
    "shape with a guess": (cut(OriginShape=(2, -1)), "shape is none"),
    "shape of many axes": (cut(OriginShape=(4, *[1] * 50)), "shape is none"),
    "shape of strings": (cut(OriginShape=("2", "2")), "shape is none"),
    "shape is text": (cut(OriginShape="22"), "shape is none"),
    "shape is a number": (cut(OriginShape=4), "shape is none"),
    "cut is a list": ({"UnpackBigParamInfor@@": {"w": [1]}}, "not listed"),
    "cut of an array that is there": (cut({"w": np.ones(4)}), "it is there whole, too"),
    "table is a list": ({**PARTS, "UnpackBigParamInfor@@": ["w"]}, "not a table of slices"),
    "table is None": ({**PARTS, "UnpackBigParamInfor@@": None}, "not a table of slices"),
    "name twice": ({"model.a.w": np.ones(1), "model._layers.a.w": np.ones(1)}, "holds a.w twice"),
    "name twice, by fn": ({"a.fn.w": np.ones(1), "a.w": np.ones(1)}, "holds a.w twice"),
    "endless nests": (endless(), "without end"),
    "deep nests": ({"model": {"model": {"model": {"model": {}}}}}, "without end"),
    "two nests": ({"model": {"w": np.ones(1)}, "state_dict": {}}, "both 'state_dict' and 'model'"),
    "model is text": ({"model": "resnet48"}, "'model' is a str, not an array"),
    "model is a list": ({"model": [np.ones(1)]}, "'model' is a list, not an array"),
    "a dict inside": ({"w": np.ones(1), "optimizer": {"lr": 1}}, "'optimizer' is a dict"),
    "name with a line break": ({"a\nb": np.ones(1)}, "'a\\nb' is no name"),
    "number for a name": ({7: np.ones(1)}, "7 is no name"),
    "endless name": ({"a" * 10_000: np.ones(1)}, "is no name"),
    "list": ([np.ones(1)], "holds a list"),
    "number": (3, "holds a int"),
    "about is no JSON": ({"about@pinas": "{freeze"}, "'about@pinas' is not what"),
    "about is a list": ({"about@pinas": "[]"}, "'about@pinas' is not what"),
    "about is an array": ({"about@pinas": np.ones(2)}, "'about@pinas' is not what"),
    "about is deep": ({"about@pinas": "[" * 200_000}, "'about@pinas' is not what"),
    "freeze_bn maybe": ({"about@pinas": '{"freeze_bn": "maybe"}'}, "freeze_bn in 'about@pinas'"),
    "freeze_bn 1": ({"about@pinas": '{"freeze_bn": 1}'}, "freeze_bn in 'about@pinas'"),
    "classes text": ({"about@pinas": '{"classes": "abc"}'}, "classes in 'about@pinas'"),
    "classes of numbers": ({"about@pinas": '{"classes": [1, 2]}'}, "classes in 'about@pinas'"),
    "backbone null": ({"about@pinas": '{"backbone": null}'}, "backbone in 'about@pinas'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(name, tmp_path):
    content, told = HOSTILE[name]
    pickled(content, tmp_path / "a.pdparams", 4)
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path / "a.pdparams")
    message = str(caught.value)
    assert isinstance(caught.value, CheckpointError), message
    assert told in message and "\n" not in message and len(message) < 1000
    assert str(tmp_path / "a.pdparams") in message


def test_slices_that_fit_are_accepted(tmp_path):
    """What the hostile ones above spoil is right."""
    pickled(cut(), tmp_path / "a.pdparams")
    assert_same_bits(read_weights(tmp_path / "a"), {"w": np.ones((2, 2), np.float32)})


@pytest.mark.parametrize("value", [np.array(1.0, np.float32), np.ones((0, 3), np.float32)])
def test_arrays_without_length_are_of_another_network(value, supernet, tmp_path):
    state = {**plain(supernet), "blocks.0.conv.weight": value, "blocks.3.bn2.weight": value}
    pickled(state, tmp_path / "a.pdparams")
    with pytest.raises(CheckpointError, match="2 of another shape"):
        start_from_checkpoint(build_network("resnet48_mini", 10), str(tmp_path / "a"), CLASSES)
