"""The ledger of chunks: who does which, in any order, over restarts, in parts; and its files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from entry_scripts import ROOT, noise_images, run
from hypothesis import given
from hypothesis import strategies as st
from independent import counts_of

import train_supernet
from hnas.architecture_file import submission
from hnas.base.errors import UserError
from hnas.evaluation import ledger as ledger_module
from hnas.evaluation.counts import Counts
from hnas.evaluation.ledger import Ledger, Part
from hnas.evaluation.results import STATE_FILE, save_state
from hnas.evaluation.tree import even_chunk
from hnas.programs.options import Options
from hnas.ranking.agreement import Agreement
from hnas.search_space import RESNET48_MINI
from hnas.tools import export, search
from hnas.weights import loading
from hnas.weights.loading import load_supernet, write_state

DEMO = ROOT / "checkpoint_files/demo_stage2.pdparams"
IDENTITY = {"checkpoint": "c" * 64, "image_list": "i" * 64}
ARCHS = {f"n{i}": RESNET48_MINI.largest() for i in range(2)}


def chunk_counts(start, stop):
    """Multiples of 5 are hits of one architecture, all of the other."""
    images = np.arange(start, stop)
    return counts_of([images % 5 == 0, images >= 0])


def begun(folder, monkeypatch, world_size, target_tau=0.0):
    """The ledgers of several processes, all in this one, after their begin."""
    told = []

    def tell(numbers):
        told.append(list(numbers))
        return list(numbers)

    monkeypatch.setattr(ledger_module, "world_size", lambda: world_size)
    ledgers = [
        Ledger(folder, IDENTITY, ARCHS, 23, target_tau, is_main=rank == 0)
        for rank in range(world_size)
    ]
    for rank, ledger in enumerate(ledgers):
        hear = iter(told)
        answer = (lambda _, hear=hear: next(hear)) if rank else tell
        monkeypatch.setattr(ledger_module, "from_main_process", answer)
        monkeypatch.setattr(ledger_module, "rank", lambda rank=rank: rank)
        ledger.begin(5 + rank)  # what the main process asks for counts
    return ledgers


def do(ledger, chunk):
    ledger.add(chunk.start, chunk_counts(chunk.start, chunk.stop))


def test_processes_take_chunks_in_turns_and_restarts_what_is_left(tmp_path, monkeypatch):
    main, helper = begun(tmp_path, monkeypatch, 2)
    assert next(main.chunks()) == range(5)
    for chunk, expected in zip(helper.chunks(), (range(5, 10), range(15, 20)), strict=True):
        assert chunk == expected
        do(helper, chunk)
    # All die before the first chunk is done; three others go on, whatever they ask for.
    ledgers = begun(tmp_path, monkeypatch, 3)
    shares = [list(ledger.chunks()) for ledger in ledgers]
    assert shares == [[range(5)], [range(10, 15)], [range(20, 23)]]
    # The main process waits for the others' chunks.
    first, *others = [(ledger, *chunks) for ledger, chunks in zip(ledgers, shares, strict=True)]
    do(*first)
    pending = iter(others[::-1])
    monkeypatch.setattr(ledger_module.time, "sleep", lambda _: do(*next(pending)))
    counts = ledgers[0].complete()
    assert counts.images == 23 and next(pending, None) is None
    assert counts.top1.tolist() == chunk_counts(0, 23).top1.tolist()
    assert not list(tmp_path.glob("eval_chunk_*"))
    # Everything is done: nobody gets anything.
    assert [list(ledger.chunks()) for ledger in begun(tmp_path, monkeypatch, 2)] == [[], []]


def test_no_more_chunks_once_the_prefix_is_enough(tmp_path, monkeypatch):
    low = {5: 0.7, 10: 0.8}
    monkeypatch.setattr(
        ledger_module, "expected_agreement", lambda _, images, __: Agreement(0.9, low[images], 1)
    )
    ledgers = begun(tmp_path, monkeypatch, 2, target_tau=0.8)
    chunks = [ledger.chunks() for ledger in ledgers]
    for ledger, left in zip(ledgers[::-1], chunks[::-1], strict=True):
        do(ledger, next(left))
    assert ledgers[0].enough and ledgers[0].counts.images == 10
    # The helper reads what the main process wrote.
    assert [list(left) for left in chunks] == [[], []]
    do(ledgers[1], range(15, 20))
    # What others have done beyond it stays, for a run that wants more.
    assert ledgers[0].complete().images == 10 and (tmp_path / "eval_chunk_00000015.npz").exists()


def noisy_counts(chunk: range) -> Counts:
    """Of twelve architectures that are right about 35 to 90 % of given images of one list."""
    draws = np.random.default_rng(0).random((12, 1000))
    return counts_of(draws[:, chunk.start : chunk.stop] < np.linspace(0.9, 0.35, 12)[:, None])


TAU = 0.88
TWELVE = {f"n{i}": RESNET48_MINI.largest() for i in range(12)}


def stopped_at(folder, order) -> tuple[int, bytes]:
    """Images at the stop and estimates.json, of chunks that are done in a given order.

    Each is done by a ledger that has begun anew, as after a kill; those that come too early are
    kept as files, as those of other processes are.
    """
    for start in order:
        ledger = Ledger(folder, IDENTITY, TWELVE, 1000, TAU)
        ledger.begin(50)
        if ledger.enough:
            break
        if not ledger.is_done(start):
            ledger.add(start, noisy_counts(range(start, start + 50)))
    counts = ledger.complete()
    return counts.images, (folder / "estimates.json").read_bytes()


def test_a_stop_by_the_ranking_is_the_same_whoever_did_which_chunk(tmp_path):
    mixed = [*range(50, 1000, 100), *range(0, 1000, 100)]
    orders = [range(0, 1000, 50), range(950, -1, -50), mixed]
    found = {stopped_at(tmp_path / str(index), order) for index, order in enumerate(orders)}
    assert len(found) == 1
    ((images, told),) = found
    told = json.loads(told)
    assert 100 < images < 1000 and told["images"] == images
    assert TAU <= told["agreement"]["low"] < 1 and told["agreement"]["images"] == 1000
    # One chunk before, it was not yet enough; and it was the first.
    earlier = Ledger(tmp_path / "earlier", IDENTITY, TWELVE, 1000, TAU)
    earlier.begin(50)
    for start in range(0, images, 50):
        assert not earlier.enough
        earlier.add(start, noisy_counts(range(start, start + 50)))
    assert earlier.enough
    # Without a target it goes on from there, to all images, where all is known.
    whole = Ledger(tmp_path / "0", IDENTITY, TWELVE, 1000)
    whole.begin(50)
    for chunk in whole.chunks():
        whole.add(chunk.start, noisy_counts(chunk))
    assert whole.complete().images == 1000 and whole.agreement == Agreement(1, 1, 1)


def test_a_chunk_that_is_in_the_prefix_already_is_not_counted_twice(tmp_path):
    """A kill between writing the prefix and deleting the chunk's file leaves both."""
    ledger = Ledger(tmp_path, IDENTITY, ARCHS, 13)
    ledger.begin(5)
    ledger.add(0, chunk_counts(0, 5))
    save_state(tmp_path / "eval_chunk_00000000.npz", IDENTITY, 5, chunk_counts(0, 5))
    resumed = Ledger(tmp_path, IDENTITY, ARCHS, 13)
    resumed.begin(7)
    assert list(resumed.chunks()) == [range(5, 10), range(10, 13)]
    assert resumed.counts.images == 5 and not list(tmp_path.glob("eval_chunk_*"))


@given(st.integers(1, 2000), st.integers(1, 60000), st.integers(1, 64))
def test_chunks_are_even(limit, images, processes):
    chunk = even_chunk(limit, images, processes)
    assert 1 <= chunk <= limit
    chunks = -(-images // chunk)
    if processes > 1 and images >= processes:
        # As many rounds as the limit forces, not one more.
        assert -(-chunks // processes) <= -(-images // (limit * processes))


REAL = {"backbone": "resnet48_mini", "bn_calibration_images": 0}
LARGEST = RESNET48_MINI.largest()
PROGRAMS = [  # flags, and what says whose the result is
    (train_supernet, {"eval_sample_num": 2, "target_tau": 0.8, "fused": "off"}, STATE_FILE),
    (search, {"generations": 0, "population": 2, "fused": "off"}, f"generation_0000/{STATE_FILE}"),
    (export, {"arch": LARGEST.code}, "card.json"),
]


@pytest.mark.parametrize(("program", "flags", "file"), PROGRAMS)
def test_what_was_read_is_named_though_other_weights_took_its_place(
    program, flags, file, tmp_path, monkeypatch, caplog
):
    path, network = tmp_path / "weights.pdparams", load_supernet(DEMO)
    digest, load = write_state(path, network.state_dict()), loading.load_pickle

    def read(*args):
        found = load(*args)
        write_state(path, {name: 2 * value for name, value in network.state_dict().items()})
        return found

    monkeypatch.setattr(loading, "load_pickle", read)
    fuses = []
    monkeypatch.setattr(program, "wanted_variant", lambda *a: fuses.append(a[-1]), raising=False)
    flags = {**REAL, "ckpt_dir": path, **flags}
    run(program, monkeypatch, noise_images(tmp_path / "images"), tmp_path / "out", **flags)
    # Flags reach the engine.
    assert ("there is nowhere to stop" in caplog.text) == ("target_tau" in flags)
    assert fuses == [False] * ("fused" in flags)
    # NumPy writes four bytes a letter.
    assert digest.encode() in (tmp_path / "out" / file).read_bytes().replace(b"\0", b"")


def test_counts_of_images_of_other_pixels_are_none_of_these(tmp_path, monkeypatch, caplog):
    """Of equal names, sizes and times; images that were moved are the same."""
    caplog.set_level("INFO")
    images = noise_images(tmp_path / "images", seed=0, suffix=".bmp")
    twin = noise_images(tmp_path / "twin", seed=1, suffix=".bmp")
    flags = {**REAL, "ckpt_dir": DEMO, "eval_sample_num": 3, "chunk_size": 7}

    def score(images, name="out", **more):
        run(train_supernet, monkeypatch, images, tmp_path / name, **flags, **more)

    score(images, "parts", images_part="1/2")
    score(images)
    images.rename(tmp_path / "moved")
    twin.rename(images)
    for name in ("parts", "out"):
        with pytest.raises(UserError, match=r"of other settings: image pixels \w+ instead of"):
            score(images, name)
    before = (tmp_path / "out/submission.json").read_bytes()
    caplog.clear()
    score(tmp_path / "moved")
    assert "continuing after 20 of 20 images" in caplog.text
    assert (tmp_path / "out/submission.json").read_bytes() == before


FILES = ("submission.json", "submission_top5.json", "channel_sample.txt", "estimates.json")
COPIES = "k" * 64
PARTS_IDENTITY = {**IDENTITY, "image_list": COPIES}


@pytest.mark.parametrize("text", ["1/1", "2/8", "8/8", "0002/0008", "9999/9999"])
def test_parts_are_read(text):
    part = train_supernet.wanted_part(Options(images_part=text, chunk_size=5))
    assert f"{part.number}/{part.of}" == str(part) and 1 <= part.number <= part.of


NO_PARTS = [
    *("0/8", "9/8", "1/0", "0/0", "-1/8", "+2/8", "a/b", "2", "/", "2/", "/8", "2/8/1", "2/8,3/8"),
    *(" 2/8", "2/8\n", "2:8", "1.5/8", "١/٨", "1e0/8", "2/10000", "9" * 500, "True"),
]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(({"images_part": text}, "--images_part .* is not a part as 2/8") for text in NO_PARTS),
        ({"target_tau": 0.9}, "--target_tau would stop every part elsewhere"),
        ({"chunk_size": 0}, "--images_part needs --chunk_size, the same for all parts"),
        ({"eval_engine": "reference"}, "--images_part is for --eval_engine shared"),
        (
            {"eval_engine": "reference", "images_part": "", "target_tau": 0.5},
            "--target_tau is for --eval_engine shared",
        ),
        (
            {"eval_engine": "reference", "images_part": "", "amp": "O1"},
            "--eval_engine reference computes in float32; --amp O1",
        ),
    ],
)
def test_flags_that_make_no_part_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        train_supernet.wanted_part(Options(**{"images_part": "2/8", "chunk_size": 5, **flags}))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.data())
def test_parts_deal_all_chunks_once(tmp_path_factory, images, chunk, of, processes, data):
    chunks = -(-images // min(chunk, images))
    done = data.draw(st.sets(st.integers(0, chunks - 1)))
    folder, dealt = tmp_path_factory.mktemp("parts"), []
    whole = Ledger(folder, IDENTITY, ARCHS, images, copies=COPIES)
    whole.begin(chunk)
    for number in done:
        start = number * whole.chunk
        counts = chunk_counts(start, min(start + whole.chunk, images))
        save_state(whole._path(start), PARTS_IDENTITY, whole.chunk, counts, start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "world_size", lambda: processes)
        patch.setattr(ledger_module, "from_main_process", list)
        for number in range(1, of + 1):
            for process in range(processes):
                patch.setattr(ledger_module, "rank", lambda process=process: process)
                part = Ledger(folder, IDENTITY, ARCHS, images, part=Part(number, of), copies=COPIES)
                if of > chunks:
                    with pytest.raises(UserError, match=f"{number}/{of} of {chunks} chunks"):
                        part.begin(chunk)
                    continue
                part.begin(chunk)
                dealt += [positions.start // whole.chunk for positions in part.chunks()]
    if of <= chunks:
        assert sorted(dealt) == sorted(set(range(chunks)) - done)
    assert not (folder / STATE_FILE).exists()


def gathered(folder: Path, starts=(0, 5, 10, 15, 20), size=5, **changes) -> None:
    """What the parts of 23 images leave, in one folder."""
    for start in starts:
        counts = chunk_counts(start, min(start + size, 23))
        path = folder / f"eval_chunk_{start:08d}.npz"
        save_state(path, {**PARTS_IDENTITY, **changes}, size, counts, start)


# Words of the error, what is in the folder. Others are in test_hostile_scores.
NOT_GATHERED = {
    "has chunks of ": lambda f: [gathered(f), gathered(f, (4,), size=4)],
    "checkpoint dddd": lambda f: gathered(f, checkpoint="d" * 64),
    "image list jjjj": lambda f: gathered(f, image_list="j" * 64),
    "00000010.* image list": lambda f: [gathered(f), gathered(f, (10,), image_list="j" * 64)],
}


@pytest.mark.parametrize("words", NOT_GATHERED)
def test_what_does_not_belong_together_is_refused(words, tmp_path):
    NOT_GATHERED[words](tmp_path)
    with pytest.raises(UserError, match=words) as error:
        Ledger(tmp_path, IDENTITY, ARCHS, 23, copies=COPIES)
    assert "\n" not in str(error.value) and "eval_chunk_" in str(error.value)


def test_a_part_of_other_chunks_than_its_folder_is_refused(tmp_path):
    gathered(tmp_path, (0,))
    with pytest.raises(UserError, match="has chunks of 5 images: give --chunk_size 5, to all"):
        Ledger(tmp_path, IDENTITY, ARCHS, 23, part=Part(1, 2), copies=COPIES).begin(7)


def test_parts_of_a_run_are_the_run_byte_for_byte(tmp_path, monkeypatch, caplog):
    """Scored with copies of the images, and once more after one chunk was lost."""
    images = noise_images(tmp_path / "images", number=4)
    shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(11), 11)
    (tmp_path / "archs.json").write_text(json.dumps(submission(archs, [0.0] * 11)))
    flags = {**REAL, "ckpt_dir": DEMO, "modelarch_file": tmp_path / "archs.json"}
    flags |= {"bn_calibration_images": 10, "chunk_size": 7}
    run(train_supernet, monkeypatch, images, tmp_path / "whole", **flags)
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in FILES}
    assert len({entry["acc"] for entry in json.loads(whole[FILES[0]]).values()}) > 3
    for number, where in ((1, images), (2, tmp_path / "copy")):
        own = tmp_path / f"part{number}"
        run(train_supernet, monkeypatch, where, own, images_part=f"{number}/2", **flags)
        names = [f"eval_chunk_{start:08d}.npz" for start in range(0, 40, 7)][number - 1 :: 2]
        names += [f"log_part_{number}_of_2.txt", f"settings_part_{number}_of_2.json"]
        assert sorted(path.name for path in own.iterdir() if path.suffix != ".lock") == names
    for lost in (None, "eval_chunk_00000007.npz"):
        together = tmp_path / f"without {lost}"
        for number in (1, 2):
            shutil.copytree(tmp_path / f"part{number}", together, dirs_exist_ok=True)
        if lost:
            (together / lost).unlink()
        caplog.clear()
        run(train_supernet, monkeypatch, images, together, **flags)
        told = "1 are missing, and scored now: those of images 7 to 13" in caplog.text
        assert told == bool(lost)
        for name in FILES:
            assert (together / name).read_bytes() == whole[name], name
    # A part given another list is none of this run.
    with pytest.raises(UserError, match="architecture list"):
        own = tmp_path / "part2"
        run(train_supernet, monkeypatch, images, own, images_part="2/2", eval_sample_num=5, **flags)
