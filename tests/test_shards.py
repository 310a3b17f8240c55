"""Lists that are scored in shards, and joined: the same files, byte for byte, or one line."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from counted import counts_of
from entry_scripts import noise_images, run
from hypothesis import given
from hypothesis import strategies as st

import train_supernet
from hnas.architecture_file import submission
from hnas.base.errors import UserError
from hnas.dataset.image_folder import ImageList, scan_images
from hnas.evaluation.images import list_hash
from hnas.evaluation.ledger import Targets
from hnas.evaluation.shard_files import ScoredShard, ShardError, join, read_shard, write_shard
from hnas.evaluation.shards import Shard, balanced_cuts, leaf_macs
from hnas.evaluation.state import architectures_hash
from hnas.evaluation.tree import PrefixTree
from hnas.search_space import RESNET48, RESNET48_MINI
from hnas.tools import merge_scores
from hnas.utils.options import Options

DEMO = Path(__file__).parents[1] / "checkpoint_files/demo_stage2.pdparams"
FILES = ("submission.json", "submission_top5.json", "channel_sample.txt", "estimates.json")


def drawn(number: int, space=RESNET48_MINI) -> dict:
    return space.sample_distinct(np.random.default_rng(number), number)


# --- cutting


@pytest.mark.parametrize("text", ["1/1", "2/8", "8/8", "0002/0008", "9999/9999"])
def test_shards_are_read(text):
    shard = Shard.read(text)
    assert f"{shard.number}/{shard.of}" == str(shard) and 1 <= shard.number <= shard.of


WRONG_SHARDS = [
    *("0/8", "9/8", "1/0", "0/0", "-1/8", "2/-8", "+2/8", "a/b", "2", "/", "2/", "/8", "2/8/1"),
    *(" 2/8", "2 /8", "2/8\n", "2:8", "1.5/8", "١/٨", "1e0/8", "2/10000", "10000/10000", "9" * 500),
    *("True", "2/8,3/8"),
]


@pytest.mark.parametrize("text", WRONG_SHARDS)
def test_what_is_no_shard_is_one_line(text):
    with pytest.raises(UserError, match="--arch_shard .* is not a shard as 2/8") as error:
        train_supernet.wanted_shard(Options(arch_shard=text))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target_tau": 0.9}, "--target_tau would stop every shard elsewhere"),
        ({"target_se": 0.1}, "--target_se would stop every shard elsewhere"),
        ({"eval_engine": "reference"}, "--arch_shard is for --eval_engine shared"),
    ],
)
def test_flags_that_contradict_a_shard(flags, message):
    with pytest.raises(UserError, match=message):
        train_supernet.wanted_shard(Options(arch_shard="2/8", **flags))


@pytest.mark.parametrize("flag", ["target_se", "target_tau"])
def test_the_reference_engine_has_no_targets(flag):
    with pytest.raises(UserError, match=f"--{flag} is for --eval_engine shared"):
        train_supernet.wanted_shard(Options(eval_engine="reference", **{flag: 0.5}))
    assert train_supernet.wanted_shard(Options(**{flag: 0.5})) is None


def test_targets_reach_the_engine(tmp_path, monkeypatch):
    seen = []

    def evaluate(network, archs, images, save_dir, identity, settings):
        seen.append(settings.targets)
        return counts_of(np.ones((len(archs), len(images))))

    monkeypatch.setattr(train_supernet, "evaluate_shared", evaluate)
    flags = {"backbone": "resnet48_mini", "ckpt_dir": DEMO, "eval_sample_num": 2}
    flags |= {"bn_calibration_images": 0, "target_se": 0.1, "target_tau": 0.8}
    run(train_supernet, monkeypatch, noise_images(tmp_path, 1), tmp_path / "out", **flags)
    assert seen == [Targets(se=0.1, tau=0.8)]


def test_more_shards_than_architectures_are_refused():
    archs = drawn(5)
    assert [Shard(n, 5).positions(RESNET48_MINI, archs, 32) for n in range(1, 6)]
    with pytest.raises(UserError, match="shard 2/6 of 5 architectures: make at most as many"):
        Shard(2, 6).positions(RESNET48_MINI, archs, 32)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=60), st.data())
def test_cuts_are_balanced(costs, data):
    shards = data.draw(st.integers(1, len(costs)))
    cuts = balanced_cuts(np.array(costs), shards)
    assert cuts[0] == 0 and cuts[-1] == len(costs) and len(cuts) == shards + 1
    assert all(low < high for low, high in zip(cuts[:-1], cuts[1:], strict=True))
    # Where elements are enough, a cut is off by half an element at most.
    ends = np.cumsum([0, *costs])
    for number, cut in enumerate(cuts):
        wanted = sum(costs) * number // shards
        is_free = cuts[max(0, number - 1)] + 1 < cut < len(costs) - shards + number
        if is_free:
            assert abs(ends[cut] - wanted) == np.abs(ends - wanted).min()


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_are_a_partition_that_costs_little_more(shards):
    archs = drawn(200, RESNET48)
    codes, names = list(archs.values()), dict(archs)
    positions = [Shard(n, shards).positions(RESNET48, names, 64) for n in range(1, shards + 1)]
    assert sorted(sum(positions, [])) == list(range(200))
    assert all(own == sorted(own) for own in positions)
    whole = PrefixTree(RESNET48, codes).macs(64)
    costs = [PrefixTree(RESNET48, [codes[p] for p in own]).macs(64) for own in positions]
    largest = RESNET48.macs(RESNET48.largest(), 64)
    assert sum(costs) <= whole + (shards - 1) * largest
    assert max(costs) - min(costs) <= 2 * largest
    dealt = sum(PrefixTree(RESNET48, codes[n::shards]).macs(64) for n in range(shards))
    assert shards == 1 or sum(costs) < 0.97 * dealt


def test_leaves_share_the_trees_cost():
    archs = list(drawn(60).values())
    tree = PrefixTree(RESNET48_MINI, archs)
    shares = leaf_macs(tree, 32)
    stem = 16 * 16 * 3 * 49 * tree.stem_channels
    assert len(shares) == 60 and (shares > 0).all()
    assert 0 <= tree.macs(32) - stem - shares.sum() < 60 * sum(1 for _ in tree.nodes())


# --- scoring and joining


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Files of a whole run and of two shards of it, with other chunks and copies of images."""
    folder = tmp_path_factory.mktemp("shards")
    images = noise_images(folder / "images", number=4)
    shutil.copytree(images, folder / "copy", copy_function=shutil.copyfile)
    (folder / "archs.json").write_text(json.dumps(submission(drawn(11), [0.0] * 11)))
    flags = {
        "backbone": "resnet48_mini",
        "ckpt_dir": DEMO,
        "modelarch_file": folder / "archs.json",
        "bn_calibration_images": 10,
    }
    with pytest.MonkeyPatch.context() as patch:
        run(train_supernet, patch, images, folder / "whole", chunk_size=15, **flags)
        for number in (1, 2):
            where = folder / "copy" if number == 2 else images
            shard = f"{number}/2"
            run(train_supernet, patch, where, folder / f"{number}", arch_shard=shard, **flags)
    return folder


def shard_files(folder: Path) -> list[Path]:
    return [folder / f"{number}/shard_{number}_of_2.json" for number in (1, 2)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_joined_shards_are_the_whole_run(order, scored, tmp_path):
    files = [str(shard_files(scored)[index]) for index in order]
    merge_scores.main(["--out", str(tmp_path / "out"), *files])
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (scored / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    accuracies = [e["acc"] for e in json.loads((scored / "whole" / FILES[0]).read_text()).values()]
    assert len(set(accuracies)) > 3


def test_a_shard_writes_no_submission(scored):
    for number in (1, 2):
        assert not {path.name for path in (scored / f"{number}").iterdir()} & set(FILES[:3])


def test_a_state_of_another_shard_is_refused(scored, tmp_path, monkeypatch):
    shutil.copytree(scored / "1", tmp_path / "other")
    flags = {"backbone": "resnet48_mini", "ckpt_dir": DEMO, "bn_calibration_images": 10}
    flags |= {"modelarch_file": scored / "archs.json", "arch_shard": "2/2"}
    with pytest.raises(UserError, match="of another architecture list"):
        run(train_supernet, monkeypatch, scored / "images", tmp_path / "other", **flags)


def test_copies_of_images_are_the_same_images_elsewhere(scored):
    def of(folder, **times):
        images = scan_images(scored / folder, "val")
        return list_hash(images, np.arange(len(images)), 32, **times)

    assert of("images", times=False) == of("copy", times=False)
    assert of("images") != of("copy")
    images = scan_images(scored / "images", "val")
    swapped = ImageList(images.folder, images.classes, images.paths[::-1], images.labels)
    order = np.arange(len(images))
    assert list_hash(swapped, order, 32, times=False) != list_hash(images, order, 32, times=False)


# --- what is refused

ARCHS = drawn(5)
IDENTITY = {
    "checkpoint": "c" * 64,
    "image_list": "i" * 64,
    "architecture_list": architectures_hash(ARCHS),
    "setting": "resnet48_mini amp=O0",
    "calibration": "none",
}


def part(number=1, of=2, positions=None, images=40, identity=IDENTITY, archs=ARCHS):
    """A shard of five architectures: the first has positions 0, 2, 4 and the second 1, 3."""
    positions = list(range(number - 1, 5, 2)) if positions is None else positions
    entries = [list(archs.items())[position] for position in positions]
    right = np.random.default_rng(number).random((len(positions), images)) < 0.5
    counts = counts_of(right, right.sum(axis=1) + 1)
    return ScoredShard(Shard(number, of), 5, identity, dict(entries), positions, counts)


def gathered(folder, *parts) -> list[Path]:
    """Files of shards, in folders of their own since two may have one name."""
    return [write_shard(folder / str(index), scored) for index, scored in enumerate(parts)]


def other(**changes):
    return {**IDENTITY, **changes}


OTHERS = drawn(7)
SETS = {  # shards, words of the error
    "a gap": ([part(1)], "of 2 shards these are missing: 2"),
    "another gap": ([part(3, 12, [0])], "missing: 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, ..."),
    "a double": ([part(1), part(2), part(2)], "is shard 2/2, as .* is"),
    "the same file twice": ([part(1), part(1)], "is shard 1/2, as .* is"),
    "other numbers of shards": ([part(1), part(2, 3)], "another number of shards"),
    "other checkpoints": (
        [part(1), part(2, identity=other(checkpoint="d" * 64))], "another checkpoint"),
    "other images": ([part(1), part(2, identity=other(image_list="j" * 64))], "another image list"),
    "other lists": (
        [part(1), part(2, identity=other(architecture_list="a" * 64))],
        "another architecture list"),
    "other settings": ([part(1), part(2, identity=other(setting="amp=O1"))], "another setting"),
    "other calibrations": (
        [part(1), part(2, identity=other(calibration="x"))], "another calibration"),
    "an identity that lacks something": (
        [part(1), part(2, identity={"checkpoint": "c" * 64})], "another architecture list"),
    "an identity that has more": ([part(1), part(2, identity=other(seed="1"))], "another seed"),
    "fewer images": ([part(1), part(2, images=39)], "another number of images"),
    "an architecture twice": (
        [part(1), part(2, positions=[1, 2, 3])], "both hold .* architecture 3"),
    "an architecture that is missing": (
        [part(1), part(2, positions=[1])], "lack .* architecture 4"),
    "another architecture of the name": (
        [part(1), part(2, archs=dict(zip(ARCHS, OTHERS.values(), strict=False)))], "not those of"),
    "another name": (
        [part(1), part(2, archs={f"x{name}": arch for name, arch in ARCHS.items()})],
        "not those of"),
    "a name twice": (
        [part(1), part(2, archs=dict.fromkeys(["x", list(ARCHS)[0], "y", "z", "w"], 0) | {
            list(ARCHS)[0]: list(ARCHS.values())[1], "x": list(ARCHS.values())[0],
            "y": list(ARCHS.values())[2], "z": list(ARCHS.values())[3],
            "w": list(ARCHS.values())[4]})], "not those of"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETS)
def test_what_does_not_belong_together_is_refused(case, tmp_path):
    parts, words = SETS[case]
    files = [str(path) for path in gathered(tmp_path / "parts", *parts)]
    with pytest.raises(ShardError, match=words) as error:
        merge_scores.main(["--out", str(tmp_path / "out"), *files])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_the_tables_start_from_is_joined(tmp_path):
    archs, counts = join(gathered(tmp_path, part(2), part(1)))
    assert list(archs.items()) == list(ARCHS.items())
    for scored in (part(1), part(2)):
        np.testing.assert_array_equal(counts.folds[scored.positions], scored.counts.folds)
        np.testing.assert_array_equal(counts.top5[scored.positions], scored.counts.top5)
    with pytest.raises(ShardError, match="no files"):
        join([])


def entry(**changes):
    def change(content):
        next(iter(content["architectures"].values())).update(changes)

    return change


def without(key):
    return lambda content: next(iter(content["architectures"].values())).pop(key)


FOLDS = "1 " * 15 + "1"
BROKEN = {  # what becomes of the content, words of the error
    "a key is missing": (lambda c: c.pop("images"), "keys are not"),
    "a key more": (lambda c: c.update(more=1), "keys are not"),
    "a shard of text": (lambda c: c.update(shard="a/b"), "not a shard as 2/8"),
    "a shard of numbers": (lambda c: c.update(shard=[1, 2]), "no text"),
    "a shard of none": (lambda c: c.update(shard=None), "no text"),
    "no images": (lambda c: c.update(images=0), "no number of them"),
    "images of text": (lambda c: c.update(images="40"), "no number of them"),
    "images that are true": (lambda c: c.update(images=True), "no number of them"),
    "images of 1e30": (lambda c: c.update(images=10**30), "no number of them"),
    "a list of -1": (lambda c: c.update(list_length=-1), "no number of them"),
    "a shorter list": (lambda c: c.update(list_length=2), "no part of a list"),
    "an identity of text": (lambda c: c.update(identity="x"), "object of texts"),
    "an identity of numbers": (lambda c: c["identity"].update(checkpoint=1), "object of texts"),
    "no architectures": (lambda c: c.update(architectures={}), "no part of a list"),
    "architectures in a list": (lambda c: c.update(architectures=[1]), "no part of a list"),
    "an entry of text": (lambda c: c["architectures"].update(x="y"), "has not the keys"),
    "an entry that lacks top5": (without("top5"), "has not the keys"),
    "an entry that has more": (entry(acc=0.5), "has not the keys"),
    "no code": (entry(arch="12"), "digits"),
    "a code of a number": (entry(arch=12), "no file of a shard"),
    "a position beyond": (entry(position=5), "not in the list"),
    "a negative position": (entry(position=-1), "not in the list"),
    "a position of a float": (entry(position=0.0), "not in the list"),
    "a position that is false": (entry(position=False), "not in the list"),
    "hits above the images": (entry(top5=41), "not 0 to 40"),
    "negative hits": (entry(top1=-1), "not 0 to 40"),
    "hits of floats": (entry(top1=1.0), "not 0 to 40"),
    "hits of NaN": (entry(near1=math.nan), "not 0 to 40"),
    "more top-1 than top-5": (entry(top5=0), "more top-1"),
    "folds of other hits": (entry(folds=FOLDS), "do not add up"),
    "folds above their images": (entry(top1=16, folds="16" + " 0" * 15), "do not add up"),
    "15 folds": (entry(folds=FOLDS[2:]), "16 whole numbers"),
    "folds of none": (entry(folds=None), "16 whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_files_are_not_believed(case, tmp_path):
    change, words = BROKEN[case]
    (path,) = gathered(tmp_path, part(1))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError, match=words) as error:
        read_shard(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "{}", "nonsense", "\0"])
def test_what_is_no_shard_file_at_all(text, tmp_path):
    path = tmp_path / "shard_1_of_2.json"
    path.write_text(text)
    with pytest.raises(UserError, match="shard_1_of_2.json"):
        read_shard(path)


def test_paths_that_cannot_be_read_are_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none", "/dev/null"):
        with pytest.raises(ShardError, match="cannot read"):
            read_shard(path)
    (path,) = gathered(tmp_path, part(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --out"):
        merge_scores.main(["--out", str(tmp_path / "file/out"), str(path)])
