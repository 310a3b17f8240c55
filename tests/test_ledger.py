"""The ledger of chunks: who does which, in any order, over restarts; and its files."""

import itertools
import json

import numpy as np
import pytest
from counted import counts_of
from hypothesis import given
from hypothesis import strategies as st

from hnas.evaluation import ledger as ledger_module
from hnas.evaluation.counts import Counts
from hnas.evaluation.ledger import Ledger, Targets, even_chunk, share_out
from hnas.evaluation.state import STATE_FILE, StateError, load_state, save_state
from hnas.ranking.agreement import Agreement
from hnas.search_space import RESNET48_MINI

NO_TARGETS = Targets()
IDENTITY = {"checkpoint": "c" * 64, "image_list": "i" * 64}
ARCHS = {f"n{i}": RESNET48_MINI.largest() for i in range(2)}


def chunk_counts(start, stop):
    """Multiples of 5 are hits of one architecture, all of the other."""
    images = np.arange(start, stop)
    return counts_of([images % 5 == 0, images >= 0])


@given(st.permutations(range(5)), st.integers(0, 4))
def test_chunks_in_any_order_by_anyone_add_up(tmp_path_factory, order, restart_after):
    folder = tmp_path_factory.mktemp("ledger")

    def ledger(is_main=True):
        made = Ledger(folder, IDENTITY, ARCHS, 13, is_main=is_main)
        made.begin(3)
        return made

    main, other = ledger(), ledger(is_main=False)
    for turn, number in enumerate(order):
        if turn == restart_after:
            main = ledger()
        start = 3 * number
        assert not main.is_done(start)
        (main if number % 2 else other).add(start, chunk_counts(start, min(start + 3, 13)))
        assert main.is_done(start)
    main.collect()
    assert main.enough and main.counts.images == 13
    np.testing.assert_array_equal(main.counts.top1, [3, 13])
    assert not list(folder.glob("eval_chunk_*"))


def test_early_stops_do_not_depend_on_who_is_faster(tmp_path):
    ledger = Ledger(tmp_path, IDENTITY, ARCHS, 400, Targets(se=0.03))
    ledger.begin(100)
    perfect = counts_of(np.ones((2, 100)))
    helper = Ledger(tmp_path, IDENTITY, ARCHS, 400, is_main=False)
    helper.begin(100)
    for start in (100, 200, 300):
        helper.add(start, perfect)
    assert not ledger.collect()
    ledger.add(0, perfect)
    # (101 / 102 * 1 / 102 / 100) ** 0.5 = 0.0099: the first chunk is enough.
    assert ledger.counts.images == 100 and ledger.enough
    assert ledger.complete().images == 100
    assert not list(tmp_path.glob("eval_chunk_*"))


def begun(folder, monkeypatch, world_size, targets=NO_TARGETS):
    """The ledgers of several processes, all in this one, after their begin."""
    told = []

    def tell(numbers):
        told.append(list(numbers))
        return list(numbers)

    monkeypatch.setattr(ledger_module, "world_size", lambda: world_size)
    ledgers = [
        Ledger(folder, IDENTITY, ARCHS, 23, targets, is_main=rank == 0)
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
    for ledger, (chunk,) in zip(ledgers[::-1], shares[::-1], strict=True):
        do(ledger, chunk)
    counts = ledgers[0].complete()
    assert counts.images == 23 and counts.top1.tolist() == chunk_counts(0, 23).top1.tolist()
    assert not list(tmp_path.glob("eval_chunk_*"))
    # Everything is done: nobody gets anything.
    assert [list(ledger.chunks()) for ledger in begun(tmp_path, monkeypatch, 2)] == [[], []]


def test_no_more_chunks_once_the_prefix_is_enough(tmp_path, monkeypatch):
    ledgers = begun(tmp_path, monkeypatch, 2, Targets(se=0.2))
    chunks = [ledger.chunks() for ledger in ledgers]
    for ledger, left in zip(ledgers[::-1], chunks[::-1], strict=True):
        do(ledger, next(left))
    # Largest error: (3 / 12 * 9 / 12 / 10) ** 0.5 = 0.137 of the first architecture.
    assert ledgers[0].enough and ledgers[0].counts.images == 10
    # The helper reads what the main process wrote.
    assert [list(left) for left in chunks] == [[], []]
    assert ledgers[0].complete().images == 10


def noisy_counts(chunk: range) -> Counts:
    """Of twelve architectures that are right about 35 to 90 % of given images of one list."""
    draws = np.random.default_rng(0).random((12, 1000))
    return counts_of(draws[:, chunk.start : chunk.stop] < np.linspace(0.9, 0.35, 12)[:, None])


TAU = Targets(tau=0.88)
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
    orders = [
        range(0, 1000, 50),
        range(950, -1, -50),
        [*range(50, 1000, 100), *range(0, 1000, 100)],
    ]
    found = {stopped_at(tmp_path / str(index), order) for index, order in enumerate(orders)}
    assert len(found) == 1
    ((images, told),) = found
    told = json.loads(told)
    assert 100 < images < 1000 and told["images"] == images
    assert TAU.tau <= told["agreement"]["low"] < 1 and told["agreement"]["images"] == 1000
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


@pytest.mark.parametrize(
    ("targets", "enough"),
    [
        (Targets(), False),
        (Targets(se=0.1), True),
        (Targets(se=0.01), False),
        (Targets(tau=0.8), True),
        (Targets(tau=0.99), False),
        (Targets(se=0.1, tau=0.99), False),
        (Targets(se=0.01, tau=0.8), False),
        (Targets(se=0.1, tau=0.8), True),
    ],
)
def test_of_two_targets_both_are_needed(targets, enough, tmp_path):
    ledger = Ledger(tmp_path, IDENTITY, TWELVE, 1000, targets)
    ledger.begin(800)
    assert not ledger.enough
    ledger.add(0, noisy_counts(range(800)))
    assert ledger.enough == enough


def test_counts_add_up_by_fold():
    whole, together = counts_of(np.eye(3, 50, 20)), Counts.zeros(3)
    for start, stop in ((0, 7), (7, 8), (8, 40), (40, 50)):
        together.add(counts_of(np.eye(3, 50, 20)[:, start:stop]))
    np.testing.assert_array_equal(together.folds, whole.folds)
    assert together.images == 50 and together.top1.tolist() == whole.top1.tolist()


def test_the_main_process_waits_for_chunks_of_others(tmp_path, monkeypatch):
    main, helper = begun(tmp_path, monkeypatch, 2)
    for chunk in main.chunks():
        do(main, chunk)
    assert main.counts.images == 5
    pending = iter(list(helper.chunks()))
    monkeypatch.setattr(ledger_module.time, "sleep", lambda _: do(helper, next(pending)))
    assert main.complete().images == 23
    assert next(pending, None) is None


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


def test_chunk_files_of_two_sizes_are_refused(tmp_path):
    save_state(tmp_path / "eval_chunk_00000005.npz", IDENTITY, 5, chunk_counts(5, 10), 5)
    save_state(tmp_path / STATE_FILE, IDENTITY, 4, chunk_counts(0, 4))
    with pytest.raises(StateError, match="chunks of 5 images, not 4"):
        Ledger(tmp_path, IDENTITY, ARCHS, 13)


@given(st.integers(1, 2000), st.integers(1, 60000), st.integers(1, 64))
def test_chunks_are_even(limit, images, processes):
    chunk = even_chunk(limit, images, processes)
    assert 1 <= chunk <= limit
    undone = np.ones(-(-images // chunk), dtype=bool)
    shares = [share_out(undone, rank, processes) for rank in range(processes)]
    assert sorted(itertools.chain(*shares)) == list(range(len(undone)))
    if processes > 1 and images >= processes:
        # As many rounds as the limit forces, not one more.
        assert max(map(len, shares)) <= -(-images // (limit * processes))


def test_state_of_another_evaluation_is_refused(tmp_path):
    counts = Counts.zeros(2)
    counts.images = 3
    path = tmp_path / "state.npz"
    save_state(path, IDENTITY, 4, counts)
    found = load_state(path, IDENTITY)
    assert (found.start, found.chunk, found.counts.images) == (0, 4, 3)
    with pytest.raises(StateError, match=r"another image list \(iiii.*save_dir"):
        load_state(path, {**IDENTITY, "image_list": "j" * 64})
    content = path.read_bytes()
    for broken in (content[:100], content[:-30], b"", b"PK\x03\x04 nonsense"):
        path.write_bytes(broken)
        with pytest.raises(StateError, match="broken"):
            load_state(path, IDENTITY)
    path.write_bytes(content)
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "objects.npz", top1=objects)
    with pytest.raises(StateError, match="broken"):
        load_state(tmp_path / "objects.npz", IDENTITY)
    assert load_state(tmp_path / "none.npz", IDENTITY) is None
