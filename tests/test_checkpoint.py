"""Checkpoints: whatever wrote them they load, or one line says why not; writing never loses one."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from hnas.base.errors import UserError
from hnas.base.files import remove_leftovers, replacing
from hnas.models.elastic import plain_name
from hnas.models.pinasv2 import build_network
from hnas.utils.checkpoint import (
    generators_state,
    load_training,
    newest_set,
    remove_set,
    restore_generators,
    save_training,
)
from hnas.utils.public_files import CheckpointError
from hnas.utils.weights import (
    Checkpoint,
    NotFiniteError,
    backbone_weights,
    check_classes,
    load_weights,
    read_state,
    read_weights,
    write_state,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plain():
    """A plain network with statistics that are not the initial ones."""
    paddle.seed(1)
    network = build_network("resnet48_mini", num_classes=10, elastic=False)
    network(paddle.randn([4, 3, 32, 32]))
    network.eval()
    return network


def arrays_of(network) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


NAMINGS = {
    "plain": lambda name: name,
    "DataParallel": lambda name: f"_layers.{name}",
    "several cards, twice wrapped": lambda name: f"_layers._layers.{name}",
    "PyTorch's DataParallel": lambda name: f"module.{name}",
    "converted supernet": lambda name: fn_name(name),
    "converted supernet, several cards": lambda name: f"_layers.{fn_name(name)}",
}


def fn_name(name: str) -> str:
    """As PaddleSlim names the parameters of what it converts."""
    owner, _, last = name.rpartition(".")
    is_norm = owner.rpartition(".")[2] in ("bn", "bn1", "bn2", "1")
    return name if is_norm else f"{owner}.fn.{last}"


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_official_weights_load_whatever_wrote_them(naming, suffix, plain, tmp_path):
    renamed = {NAMINGS[naming](name): tensor for name, tensor in plain.state_dict().items()}
    path = tmp_path / f"official{suffix}"
    if suffix == ".pdparams":
        paddle.save(renamed, str(path))
    else:
        save_file({name: tensor.numpy() for name, tensor in renamed.items()}, path)
    paddle.seed(2)
    other = build_network("resnet48_mini", num_classes=10, elastic=False)
    load_weights(other, read_weights(path), path)
    assert_equal(arrays_of(other), arrays_of(plain))


def test_a_supernet_takes_plain_weights_and_computes_the_same(plain, tmp_path):
    write_state(tmp_path / "plain.pdparams", plain.state_dict())
    supernet = build_network("resnet48_mini", num_classes=10)
    load_weights(supernet, read_weights(tmp_path / "plain"), "plain")
    supernet.eval()
    images = paddle.randn([2, 3, 32, 32])
    np.testing.assert_allclose(supernet(images).numpy(), plain(images).numpy(), rtol=1e-5)


def test_supernet_names_are_those_of_this_test(plain):
    supernet = build_network("resnet48_mini", num_classes=10)
    assert sorted(supernet.state_dict()) == sorted(map(fn_name, plain.state_dict()))


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_what_is_written_is_read_back_by_others(suffix, plain, tmp_path):
    path = tmp_path / f"weights{suffix}"
    digest = write_state(path, plain.state_dict())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    if suffix == ".safetensors":
        assert_equal(load_file(path), arrays_of(plain))
    else:
        loaded = paddle.load(str(path))
        assert_equal({name: tensor.numpy() for name, tensor in loaded.items()}, arrays_of(plain))
    check = subprocess.run(
        ["sha256sum", "-c", f"{path.name}.sha256"], cwd=tmp_path, capture_output=True, check=False
    )
    assert check.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.sha256"]


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_damage_is_noticed_by_the_digest(suffix, plain, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write_state(path, plain.state_dict())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: its SHA-256 .*sha256"):
        read_weights(path)


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{}x"]
)
def test_broken_safetensors_are_one_line(content, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_differences_are_counted_and_ten_are_listed(plain):
    weights = arrays_of(plain)
    missing = [name for name in weights if name.endswith("conv1.weight")]
    for name in missing:
        del weights[name]
    weights["extra"] = np.ones(1, np.float32)
    weights["blocks.0.conv.weight"] = np.ones((5, 3, 7, 7), np.float32)
    weights["blocks.0.bn.bias"] = np.ones(20, np.int32)
    before = arrays_of(plain)
    with pytest.raises(CheckpointError) as caught:
        load_weights(plain, weights, "F")
    message = str(caught.value)
    assert f"{len(missing)} missing: {', '.join(missing[:10])}, ...;" in message
    assert missing[10] not in message
    assert "1 unexpected: extra;" in message
    assert (
        "1 of another shape: blocks.0.conv.weight [5, 3, 7, 7] instead of [20, 3, 7, 7]" in message
    )
    assert "1 of another type: blocks.0.bn.bias int32 instead of float32" in message
    assert "\n" not in message
    assert_equal(arrays_of(plain), before)


def test_floats_of_other_precision_are_converted(plain):
    weights = {name: array.astype(np.float64) for name, array in arrays_of(plain).items()}
    other = build_network("resnet48_mini", num_classes=10, elastic=False)
    load_weights(other, weights, "F")
    assert_equal(arrays_of(other), arrays_of(plain))


def test_bfloat16_bits_are_no_weights(plain):
    """Paddle pickles bfloat16 as uint16; taking them for numbers would be silent nonsense."""
    weights = {name: np.ones(array.shape, np.uint16) for name, array in arrays_of(plain).items()}
    with pytest.raises(CheckpointError, match="uint16 instead of float32"):
        load_weights(plain, weights, "F")


def test_class_count_is_checked_against_the_folders(plain):
    checkpoint = Checkpoint(arrays_of(plain), {})
    check_classes(checkpoint, list("0123456789"), "F")
    with pytest.raises(CheckpointError, match="F classifies 10 classes, but image_dir has 7"):
        check_classes(checkpoint, list("0123456"), "F")


def test_only_stage_ones_own_tensors_are_left_behind(caplog):
    paddle.seed(3)
    contrastive = build_network("resnet48pinasv2_mini", num_classes=10, queue_size=16)
    supernet = build_network("resnet48_mini", num_classes=10)
    state = {plain_name(n): t.numpy() for n, t in contrastive.state_dict().items()}
    with caplog.at_level("INFO"):
        load_weights(supernet, backbone_weights(state), "F")
    taken = len(supernet.state_dict())
    assert f"left {len(state) - taken} tensors of neck, key encoder and queue" in caplog.text
    assert_equal(arrays_of(supernet), arrays_of(contrastive.backbone))

    state["neck_of_a_stranger"] = np.ones(1, np.float32)
    with pytest.raises(CheckpointError, match="1 unexpected: neck_of_a_stranger"):
        load_weights(supernet, backbone_weights(state), "F")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"a": "text"}, "'a' is a str, not an array"),
        ({"a.w": np.ones(1), "_layers.a.w": np.ones(1)}, "holds a.w twice, once as _layers.a.w"),
    ],
)
def test_states_of_another_kind(state, reason, tmp_path):
    import pickle

    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps(state, 4))
    with pytest.raises(CheckpointError, match=reason):
        read_weights(path)


def test_missing_checkpoints_say_where_to_look(tmp_path):
    with pytest.raises(CheckpointError, match=r"none does not exist \(nor .*none\.pdparams\)"):
        read_weights(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"is a folder; name the file, e\.g\. .*0\.pdparams"):
        read_weights(tmp_path)


# A process whose files may not grow beyond a limit sees the same as on a full disk.
FULL_DISK = """
import resource, sys
import numpy as np
from hnas.utils.weights import write_state
from hnas.base.errors import run_main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run_main(lambda: write_state(sys.argv[1], {"a": np.zeros(1_000_000, np.float32)}))
"""


@pytest.mark.parametrize("suffix", [".pdparams", ".safetensors"])
def test_a_full_disk_leaves_the_previous_checkpoint(suffix, tmp_path):
    path = tmp_path / f"0{suffix}"
    write_state(path, {"a": paddle.ones([3])})
    before = path.read_bytes()
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert f"error: cannot write {path}: File too large" in run.stderr
    assert "Traceback" not in run.stderr
    assert path.read_bytes() == before
    np.testing.assert_array_equal(read_weights(path)["a"], np.ones(3, np.float32))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f"{path.name}.sha256"}


def test_an_error_while_writing_leaves_the_previous_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/a: "), replacing(tmp_path / "file/a"):
        pass


def test_leftovers_of_killed_writers_go(tmp_path):
    for name in (".0.pdparams.123.tmp", "0.pdparams", ".hidden", "a.tmp"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"0.pdparams", ".hidden", "a.tmp"}


def trained(steps: int):
    """A small network and its optimizer after some steps."""
    paddle.seed(5)
    network = paddle.nn.Sequential(paddle.nn.Linear(4, 4), paddle.nn.Linear(4, 2))
    schedule = paddle.optimizer.lr.LambdaDecay(0.1, lambda step: 1 / (1 + step))
    optimizer = paddle.optimizer.Momentum(schedule, 0.9, parameters=network.parameters())
    for step in range(steps):
        network(paddle.full([3, 4], 0.1 * (step + 1))).square().sum().backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
    return network, optimizer


def test_a_set_restores_weights_and_velocity(tmp_path):
    network, optimizer = trained(3)
    save_training(tmp_path / "0-3", network, optimizer, {"epoch": 0, "step": 3})
    other, other_optimizer = trained(0)
    progress = load_training(tmp_path / "0-3", other, other_optimizer)
    assert (progress["epoch"], progress["step"]) == (0, 3)
    assert_equal(arrays_of(other), arrays_of(network))
    assert optimizer.get_lr() == pytest.approx(0.1 / 4)
    # The learning rate follows from the position, which fit sets.
    assert other_optimizer.get_lr() == 0.1
    other_optimizer._learning_rate.step(progress["step"])

    straight, straight_optimizer = trained(4)
    other(paddle.full([3, 4], 0.4)).square().sum().backward()
    other_optimizer.step()
    assert_equal(arrays_of(other), arrays_of(straight))
    del straight_optimizer


def save_at(folder: Path, name: str, steps: int) -> None:
    network, optimizer = trained(steps)
    save_training(folder / name, network, optimizer, {"epoch": 0, "step": steps})


def test_the_set_that_was_saved_last_is_the_newest(tmp_path):
    assert newest_set(tmp_path) is None
    assert newest_set(tmp_path / "none") is None
    for name in ("0-3", "0", "1-2"):
        save_at(tmp_path, name, 1)
        assert newest_set(tmp_path) == tmp_path / name
    # Epoch 0 anew, after the others: theirs belong to an earlier run.
    save_at(tmp_path, "0", 2)
    assert newest_set(tmp_path) == tmp_path / "0"
    save_at(tmp_path, "unknown", 1)
    assert newest_set(tmp_path) == tmp_path / "0"


PIECES = [
    f"{suffix}{digest}"
    for suffix in (".pdparams", ".pdopt", ".pdstates")
    for digest in ("", ".sha256")
]


@pytest.mark.parametrize("written", range(len(PIECES)))
def test_a_crash_between_the_files_never_mixes_sets(written, tmp_path):
    """Any number of a new set's files over those of an old set of the same name."""
    save_at(tmp_path / "old", "0", 1)
    save_at(tmp_path, "0", 2)
    save_at(tmp_path / "new", "0", 3)
    for piece in PIECES:
        Path(f"{tmp_path}/0{piece}").unlink()
    for number, piece in enumerate(PIECES):
        source = tmp_path / ("new" if number < written else "old") / f"0{piece}"
        (tmp_path / f"0{piece}").write_bytes(source.read_bytes())
    if written == 0:
        assert newest_set(tmp_path) == tmp_path / "0"
        return
    assert newest_set(tmp_path) is None
    network, optimizer = trained(0)
    before = arrays_of(network)
    with pytest.raises(UserError):
        load_training(tmp_path / "0", network, optimizer)
    assert_equal(arrays_of(network), before)


@pytest.mark.parametrize("suffix", [".pdparams", ".pdopt", ".pdstates"])
def test_a_damaged_set_is_passed_over(suffix, tmp_path, caplog):
    save_at(tmp_path, "0", 1)
    save_at(tmp_path, "1", 2)
    (tmp_path / f"1{suffix}").write_bytes(b"\x80\x04}.")
    assert newest_set(tmp_path) == tmp_path / "0"
    assert f"passed over {tmp_path}/1" in caplog.text


def test_a_set_goes_whole(tmp_path):
    save_at(tmp_path, "0", 1)
    remove_set(tmp_path / "0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_written(value, tmp_path):
    network, optimizer = trained(1)
    network[1].bias.set_value(np.array([0, value], np.float32))
    with pytest.raises(NotFiniteError, match=r"1\.bias is not finite"):
        save_training(tmp_path / "0", network, optimizer, {})
    assert list(tmp_path.iterdir()) == []


def test_generators_go_on_where_they_were(tmp_path):
    import random

    def draw():
        return random.random(), np.random.rand(), paddle.rand([3]).numpy().tolist()

    paddle.seed(7)
    random.gauss(0, 1)
    np.random.standard_normal()
    write_state(tmp_path / "a.pdstates", {"generators": generators_state()})
    expected = draw()
    assert draw() != expected
    restore_generators(read_state(tmp_path / "a.pdstates")["generators"])
    assert draw() == expected
