"""Files of weights, whoever wrote them: bit for bit what they hold, or one line says why not."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from entry_scripts import CLASSES, arrays_of, assert_same_bits, noise_images, run
from safetensors.numpy import save_file

import train_supernet
import train_supernet_pinas_stage1
from hnas.base.errors import UserError
from hnas.base.files import digest_path
from hnas.models.elastic import plain_name
from hnas.models.pinasv2 import PiNASv2, build_network
from hnas.programs.options import Options
from hnas.search_space import RESNET48_MINI
from hnas.utils.starting import (
    pretrained_network,
    start_contrast_from_checkpoint,
    start_from_checkpoint,
)
from hnas.weights.loading import (
    backbone_weights,
    load_weights,
    looks_like,
    read_checkpoint,
    read_state,
    read_weights,
    write_state,
)

MINI = "resnet48_mini"
QUEUE, POINTER, BATCH = 40, 10, 20


def plain(state):
    return {plain_name(name): value for name, value in state.items()}


def shaken(network, seed):
    """Values that no new network has; variances and the queue stay what they are."""
    rng = np.random.default_rng(seed)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 and "variance" not in name and "pointer" not in name:
            tensor.set_value((tensor.numpy() + rng.normal(0, 0.1, tensor.shape)).astype("float32"))
    return network


def new_contrast(seed, queue=QUEUE):
    paddle.seed(seed)
    return PiNASv2(RESNET48_MINI, 10, queue_size=queue)


@pytest.fixture(scope="module")
def nets():
    """Arrays of a plain network, a supernet, and stage one's model with encoders that differ."""
    paddle.seed(1)
    contrast = shaken(new_contrast(3), 3)
    contrast.queue_pointer.set_value(np.array([POINTER], np.int64))
    return SimpleNamespace(
        plain=arrays_of(shaken(build_network(MINI, 10, elastic=False), 2)),
        supernet=arrays_of(shaken(build_network(MINI, 10), 1)),
        contrast=arrays_of(contrast),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return noise_images(tmp_path_factory.mktemp("images"))


# --- the layouts, from the names that recipe.md gives


def under(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def public_contrast(state, wrap="model.", keys=("backbone", "neck")):
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
                public[f"ofa_teacher_model.{wrap}{encoder(own)}"] = value
        elif name.startswith("queue"):
            public["queue_ptr" if name == "queue_pointer" else name] = value
        else:
            public[f"{wrap}{encoder(name)}"] = value
    return public


def with_teacher(nets, wrap, teacher):
    return {**under(wrap, nets.supernet), **under(f"ofa_teacher_model.{wrap}", teacher)}


ONE, SEVERAL = "model.", "model._layers."
LAYOUTS = {  # what a file holds, and of which network that is
    "plain": lambda nets: (nets.plain, nets.plain),
    "DataParallel": lambda nets: (under("_layers.", nets.plain), nets.plain),
    "twice wrapped": lambda nets: (under("_layers._layers.", nets.plain), nets.plain),
    "PyTorch's DataParallel": lambda nets: (under("module.", nets.plain), nets.plain),
    "converted": lambda nets: (nets.supernet, nets.supernet),
    "public, alone": lambda nets: (under(SEVERAL, nets.supernet), nets.supernet),
    "public, one card": lambda nets: (with_teacher(nets, ONE, nets.plain), nets.supernet),
    "public, several cards": lambda nets: (with_teacher(nets, SEVERAL, nets.plain), nets.supernet),
    "public, stage 1": lambda nets: (public_contrast(nets.contrast), nets.contrast),
    "public, stage 1, cards": lambda nets: (public_contrast(nets.contrast, SEVERAL), nets.contrast),
}


def tensors(state):
    return {name: paddle.to_tensor(value) for name, value in state.items()}


def paddle22(state):
    """What Paddle 2.2 pickles of a state dict: arrays and the table of names."""
    table = {name: f"conv2d_{index}.w_0" for index, name in enumerate(state)}
    return {**state, "StructuredToParameterName@@": table}


def pickled(content, path, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol))


WRITERS = {
    "paddle 3": lambda state, path: paddle.save(tensors(state), str(path)),
    "paddle 2.2": lambda state, path: pickled(paddle22(state), path),
    "protocol 3": lambda state, path: pickled(OrderedDict(paddle22(state)), path, 3),
    "nested model": lambda state, path: paddle.save(
        {"model": tensors(state), "epoch": 3}, str(path), protocol=2
    ),
    "nested, paddle 3": lambda state, path: paddle.save({"state_dict": tensors(state)}, str(path)),
    "two nests": lambda state, path: pickled({"model": {"state_dict": paddle22(state)}}, path),
    "safetensors": lambda state, path: save_file(state, path.with_suffix(".safetensors")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_weights_load_bit_for_bit(writer, layout, nets, tmp_path, caplog):
    content, expected = LAYOUTS[layout](nets)
    WRITERS[writer](content, tmp_path / "weights.pdparams")
    with caplog.at_level("INFO"):
        checkpoint = read_checkpoint(tmp_path / "weights")
    if writer == "nested model":
        assert "weights.pdparams: took 'model', left 1 others" in caplog.text
    assert_same_bits(checkpoint.weights, plain(expected))
    # Public code trains at frozen statistics.
    assert checkpoint.freeze_bn == layout.startswith("public")
    beside = sum(name.startswith("ofa_teacher_model.") for name in content)
    told = [message for message in caplog.messages if "teacher" in message]
    assert len(told) == (beside > 0 and "stage 1" not in layout)
    assert all(f"left {beside} tensors of the teacher beside the network" in line for line in told)


# --- every stage takes them


@pytest.mark.parametrize("layout", ["public, stage 1", "public, one card"])
def test_pretrained_and_ckpt_dir_take_files_of_both_stages(layout, nets, tmp_path, caplog):
    content, whole = LAYOUTS[layout](nets)
    path = tmp_path / "public.pdparams"
    pickled(paddle22(content), path)
    expected = backbone_weights(plain(whole))
    student = build_network(MINI, 10)
    with caplog.at_level("INFO"):
        assert start_from_checkpoint(student, str(path), CLASSES).freeze_bn
    assert_same_bits(plain(arrays_of(student)), expected)
    stranger = {**plain(whole), "neck_of_a_stranger": np.ones(1, np.float32)}
    with pytest.raises(UserError, match="1 unexpected: neck_of_a_stranger"):
        load_weights(student, backbone_weights(stranger), "F")
    left = f"left {len(whole) - len(expected)} tensors of neck, key encoder and queue"
    assert (left in caplog.text) == (layout == "public, stage 1")
    options = Options(backbone=MINI, pretrained=str(path))
    assert_same_bits(arrays_of(pretrained_network(options, CLASSES, RESNET48_MINI)[0]), expected)


# --- stage one goes on from them


def test_stage_one_goes_on_from_a_public_file(nets, images, tmp_path, monkeypatch, caplog):
    contrast = nets.contrast
    pickled(paddle22(public_contrast(contrast)), tmp_path / "public.pdparams")
    flags = {"backbone": "resnet48pinasv2_mini", "queue_size": QUEUE, "use_ckpt": True}
    flags |= {"ckpt_dir": tmp_path / "public.pdparams", "max_epoch": 1, "lr": 1e-6}
    flags |= {"batch_size": BATCH, "key_momentum": 0.999}
    with caplog.at_level("INFO"):
        run(train_supernet_pinas_stage1, monkeypatch, images, tmp_path / "out", **flags)
    assert f"stage 1 goes on with {len(contrast)} tensors" in caplog.text
    assert "left out" not in caplog.text
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


def test_stage_three_takes_the_public_list_and_folder(nets, tmp_path, monkeypatch, caplog):
    images = noise_images(tmp_path / "images")
    (images / "val").rename(images / "val_slim")
    pickled(under("model.", nets.supernet), tmp_path / "public.pdparams")
    codes = [RESNET48_MINI.sample(np.random.default_rng(seed)).code for seed in range(3)]
    (tmp_path / "model_str.txt").write_text(",".join(codes))
    monkeypatch.chdir(tmp_path)
    flags = {"backbone": MINI, "ckpt_dir": "public.pdparams"}
    with caplog.at_level("INFO"):
        run(train_supernet, monkeypatch, images, "out", **flags)
    rows = (tmp_path / "out/channel_sample.txt").read_text().splitlines()
    assert [row.split()[0] for row in rows] == codes
    assert f"{images / 'val_slim'}: 20 images" in caplog.text and "model_str.txt" in caplog.text
    # A file that is named goes before; so does a folder val.
    (tmp_path / "one.txt").write_text(codes[2])
    (images / "val_slim").rename(images / "val")
    (images / "val_slim").mkdir()
    run(train_supernet, monkeypatch, images, "one", **flags, modelarch_file="one.txt")
    assert (tmp_path / "one/channel_sample.txt").read_text().split()[0] == codes[2]


@pytest.mark.parametrize("recipe", ["own", "public"])
def test_stage_one_starts_from_channels_that_are_sorted_or_not(
    recipe, nets, images, tmp_path, monkeypatch, caplog
):
    """At a learning rate of nearly zero what is saved is what it starts from."""
    pickled(nets.plain, tmp_path / "pretrained.pdparams")
    flags = {"backbone": "resnet48pinasv2_mini", "queue_size": 20, "batch_size": 10, "lr": 0}
    flags |= {"pretrained": tmp_path / "pretrained.pdparams", "max_epoch": 1, "recipe": recipe}
    with caplog.at_level("INFO"):
        run(train_supernet_pinas_stage1, monkeypatch, images, tmp_path / "out", **flags)
    checkpoint, name = read_checkpoint(tmp_path / "out/final"), "blocks.1.conv1.weight"
    after, own = checkpoint.weights, {"backbone": flags["backbone"], "classes": CLASSES}
    assert checkpoint.about == {**own, "freeze_bn": True}
    found, start = after[f"backbone.{name}"], nets.plain[name]
    assert np.array_equal(found, start) == (recipe == "public")
    assert np.array_equal(np.sort(found, axis=None), np.sort(start, axis=None))
    assert f"key_momentum {0.999 ** (10 / 256):.6f}" in caplog.text
    assert ("recipe public" in caplog.text) == (recipe == "public")


@pytest.mark.parametrize("keys", [(), ("backbone",), ("backbone", "neck")])
def test_a_key_encoder_that_is_missing_starts_as_the_query_encoder(keys, nets, tmp_path, caplog):
    contrast, network = nets.contrast, new_contrast(9)
    pickled(public_contrast(contrast, keys=keys), tmp_path / "a.pdparams")
    with caplog.at_level("INFO"):
        start_contrast_from_checkpoint(network, str(tmp_path / "a.pdparams"), CLASSES)
    missing = [f"key_{part}" for part in ("backbone", "neck") if part not in keys]
    starts = tuple(f"{part}." for part in missing)
    expected = {
        name: contrast[name.removeprefix("key_") if name.startswith(starts) else name]
        for name in contrast
    }
    assert_same_bits(arrays_of(network), expected)
    assert (f"as in a new run start {', '.join(missing)}\n" in caplog.text) == bool(missing)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.neck.mlp.0.bias": None}, "1 missing: neck.hidden.bias"),
        ({"model.neck.mlp.3.bias": np.ones(1)}, "1 unexpected: neck.mlp.3.bias"),
        ({"ofa_teacher_model.model.blocks.3.bn1.bias": None}, "1 missing: key_backbone.blocks.3"),
        ({"queue_ptr": None}, "1 missing: queue_pointer"),
        ({"queue_pointer": np.ones(1)}, "holds queue_pointer twice"),
        ({"queue": np.ones((3, QUEUE), np.float32)}, "of another shape: queue [3, 40] instead"),
        ({"queue": np.array(1, np.float32)}, "of another shape: queue [] instead"),
    ],
)
def test_half_a_stage_one_is_refused(changes, told, nets, tmp_path):
    state = {**public_contrast(nets.contrast), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    pickled(state, tmp_path / "a.pdparams")
    with pytest.raises(UserError) as caught:
        start_contrast_from_checkpoint(new_contrast(9), str(tmp_path / "a.pdparams"), CLASSES)
    assert told in str(caught.value) and "\n" not in str(caught.value)


# --- another network's


@pytest.mark.parametrize(
    ("beside", "name"),
    [({}, "resnet48"), ({"model.neck.mlp.0.bias": np.ones(1, np.float32)}, "resnet48pinasv2")],
)
def test_a_file_of_another_backbone_says_which(beside, name, tmp_path):
    """Of its tensors those suffice that tell the widths."""
    few = {"blocks.0.conv.fn.weight": [64, 3, 7, 7], "blocks.23.bn2.weight": [512]}
    state = under(ONE, {name: np.ones(shape, np.float32) for name, shape in few.items()})
    pickled({**state, **beside}, tmp_path / "a.pdparams")
    assert looks_like(read_weights(tmp_path / "a")) == name
    with pytest.raises(UserError, match=r"another network \(it is a resnet48 file\): "):
        start_from_checkpoint(build_network(MINI, 10), str(tmp_path / "a"), CLASSES)


def test_differences_are_counted_and_ten_are_listed(nets):
    weights = dict(nets.plain)
    missing = [name for name in weights if name.endswith("conv1.weight")]
    for name in missing:
        del weights[name]
    weights["extra"] = np.ones(1, np.float32)
    weights["blocks.1.conv2.weight"] = np.ones((5, 3, 7, 7), np.float32)
    weights["blocks.0.bn.bias"] = np.ones(20, np.int32)
    # Paddle pickles bfloat16 as uint16; taking them for numbers would be silent nonsense.
    weights["blocks.0.bn.weight"] = np.ones(20, np.uint16)
    weights["blocks.3.bn2.weight"] = np.array(1.0, np.float32)
    weights["blocks.3.bn2.bias"] = np.ones((0, 3), np.float32)
    network = build_network(MINI, 10, elastic=False)
    before = arrays_of(network)
    with pytest.raises(UserError) as caught:
        load_weights(network, weights, "F")
    message = str(caught.value)
    listed = f"{len(missing)} missing: {', '.join(missing[:10])}, ...; 1 unexpected: extra; 3 of"
    assert f"F is of another network: {listed}" in message
    assert "3 of another shape: blocks.1.conv2.weight [5, 3, 7, 7] instead of [20, 20, " in message
    assert "blocks.3.bn2.weight [] instead of [20], blocks.3.bn2.bias [0, 3] instead" in message
    assert "2 of another type: blocks.0.bn.weight uint16 instead of float32, " in message
    assert "blocks.0.bn.bias int32 instead of float32" in message
    assert "\n" not in message
    assert_same_bits(arrays_of(network), before)


def test_floats_of_other_precision_are_converted(nets):
    other = build_network(MINI, 10, elastic=False)
    load_weights(other, {name: v.astype(np.float64) for name, v in nets.plain.items()}, "F")
    assert_same_bits(arrays_of(other), nets.plain)


# --- what files say of how they were trained


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_files_say_how_they_were_trained(suffix, nets, tmp_path):
    about = {"backbone": MINI, "freeze_bn": True, "classes": ["ä", 'b "c"', *CLASSES[2:]]}
    path, state = tmp_path / f"a{suffix}", tensors(nets.plain)
    write_state(path, state, about)
    checkpoint = read_checkpoint(path)
    assert checkpoint.about == about and checkpoint.freeze_bn is True
    assert_same_bits(checkpoint.weights, nets.plain)
    write_state(path, state, {**about, "freeze_bn": False})
    assert read_checkpoint(path).freeze_bn is False
    write_state(path, state)
    assert read_checkpoint(path).about == {} and not read_checkpoint(path).freeze_bn


TAKERS = {
    "stage 1": lambda path, classes: start_contrast_from_checkpoint(new_contrast(1), path, classes),
    "others": lambda path, classes: start_from_checkpoint(build_network(MINI, 10), path, classes),
    "pretrained": lambda path, classes: pretrained_network(
        Options(backbone=MINI, pretrained=path), classes, RESNET48_MINI
    ),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_class_names_are_compared(taker, nets, tmp_path, caplog):
    path, state = str(tmp_path / "a.pdparams"), tensors(nets.plain)
    write_state(path, state, {"classes": CLASSES})
    TAKERS[taker](path, tuple(CLASSES))
    swapped = ["0", "2", "1", *CLASSES[3:]]
    other = "other classes: '1' where image_dir has '2'; use folders of the same names"
    with pytest.raises(UserError, match=f"^checkpoint {path} was trained on {other}$"):
        TAKERS[taker](path, swapped)
    with pytest.raises(UserError, match="classifies 10 classes, but image_dir has 9"):
        TAKERS[taker](path, CLASSES[:9])
    # As many names as classes.
    write_state(path, state, {"classes": CLASSES[:4]})
    with pytest.raises(UserError, match="classifies 4 classes, but image_dir has 10"):
        TAKERS[taker](path, CLASSES)
    # Official weights have no names.
    write_state(path, state)
    with caplog.at_level("INFO"):
        TAKERS[taker](path, swapped)
    assert f"{path} does not name its classes: taken to be those of image_dir" in caplog.messages


# --- what is broken


def endless():
    state = {}
    state["model"] = state
    return state


HOSTILE = {
    "name twice": ({"a.w": np.ones(1), "_layers.a.fn.w": np.ones(1)}, "twice, once as _layers.a."),
    "endless nests": (endless(), "'model' is a dict, not an array"),
    "two nests": ({"model": {"w": np.ones(1)}, "state_dict": {}}, "both 'state_dict' and 'model'"),
    "slices of a GiB": ({"UnpackBigParamInfor@@": {"w": {}}}, "Infor@@' is a dict, not an array"),
    "name with a line break": ({"a\nb": np.ones(1)}, "'a\\nb' is no name"),
    "number for a name": ({7: np.ones(1)}, "7 is no name"),
    "endless name": ({"a" * 10_000: np.ones(1)}, "is no name"),
    "function": ({"w": OrderedDict}, "'w' is a function, not an array"),
    "list": ([np.ones(1)], "holds a list, not a state dict"),
}
for what in ("{freeze", "[" * 200_000, "[]", '{"freeze_bn": "maybe"}', '{"classes": [1, 2]}'):
    HOSTILE[what[:20]] = {"about@pinas": what}, "'about@pinas' is not what"
for what in (b"", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{}x"):
    HOSTILE[f"safetensors {what}"] = what, "cannot read"


def refused(path) -> str:
    """What reading is told, in one line."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert isinstance(caught.value, UserError), message
    assert "\n" not in message and len(message) < 1000 and str(path) in message
    return message


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(name, tmp_path):
    content, told = HOSTILE[name]
    if isinstance(content, bytes):
        (tmp_path / "a.safetensors").write_bytes(content)
    else:
        pickled(content, tmp_path / "a.pdparams", 4)
    assert told in refused(tmp_path / "a")


DIGESTS = {  # as this program and others write them
    "sha256sum": lambda digest: f"{digest}  a.pdparams\n".encode(),
    "upper case": lambda digest: digest.upper().encode(),
    "a byte order mark": lambda digest: f"{digest}  a".encode("utf-8-sig"),
    "PowerShell": lambda digest: f"{digest.upper()}\r\n".encode("utf-16"),
    "sha256sum --tag": lambda digest: f"SHA256 (a.pdparams) = {digest}".encode(),
}


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
@pytest.mark.parametrize("case", DIGESTS)
def test_damage_is_noticed_by_the_digest_beside_a_file_or_what_a_link_means(case, suffix, tmp_path):
    path, link = tmp_path / f"far/a{suffix}", tmp_path / f"latest{suffix}"
    digest = write_state(path, {"a": np.ones(100, np.float32)})
    digest_path(path).write_bytes(DIGESTS[case](digest))
    link.symlink_to(path)
    assert read_checkpoint(path).digest == read_checkpoint(link).digest == digest
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    for each in (path, link):
        assert "is damaged: its SHA-256 is not the one beside it" in refused(each)


def test_missing_checkpoints_say_where_to_look(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none: No such file"):
        read_state(tmp_path / "none")
    assert f"none does not exist (nor {tmp_path}/none.pdparams)" in refused(tmp_path / "none")
    assert f"is a folder; name the file, e.g. {tmp_path}/0.pdparams" in refused(tmp_path)
