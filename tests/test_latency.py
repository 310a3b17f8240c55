"""Latency: which parts there are, sums of them, files, and measuring that goes on after a kill."""

import json
import logging
import os
import re
import signal
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from independent import latency_file
from test_readme import table_after, text_of

from hnas.base.errors import UserError
from hnas.ranking.costs import all_parts, open_latency, parts_of, read_latency
from hnas.search_space import RESNET48, search_space
from hnas.tools import latency

MINI = search_space("resnet48_mini")
RESULT = Path(__file__).parents[1] / "docs/results/latency_resnet48_224px.json"


@pytest.mark.parametrize(
    ("backbone", "sample_space", "blocks"),
    [
        # Per stage, widths in (of the stage before) x mid x out, and mid x out: of 2, 3, 5 and 7
        # distinct widths of ResNet48, and so on.
        ("resnet48", "released", 2 * 2 + (2 * 9 + 9) + (3 * 25 + 25) + (5 * 49 + 49)),
        ("resnet48", "full", 3 * 3 + (3 * 36 + 36) + (6 * 49 + 49) + (7 * 49 + 49)),
        ("resnet48_mini", "released", 3 * 3 + (3 * 9 + 9) + (3 * 25 + 25) + (5 * 49 + 49)),
        ("resnet48_mini", "full", 7 * 7 + 3 * (7 * 49 + 49)),
    ],
)
def test_as_many_blocks_as_widths_make(backbone, sample_space, blocks):
    parts = all_parts(search_space(backbone, sample_space))
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.kind == "block" for part in parts) == blocks


@given(
    seed=st.integers(0, 2**32 - 1),
    backbone=st.sampled_from(["resnet48", "resnet48_mini"]),
    sample_space=st.sampled_from(["released", "full"]),
)
def test_every_drawn_network_is_made_of_them(seed, backbone, sample_space):
    space = search_space(backbone, sample_space)
    arch = space.sample(np.random.default_rng(seed))
    parts = list(parts_of(space.plan(arch)))
    assert set(parts) <= set(all_parts(space))
    assert len(parts) == sum(arch.depths) + 2
    assert [part.stride for part in parts[1:-1]].count(2) == 3


def test_what_was_not_measured_is_named(tmp_path):
    path = latency_file(tmp_path)
    narrow = search_space("resnet48_mini", "full").smallest()
    with pytest.raises(UserError, match=f"lacks 'stem 14' of architecture {narrow.code}.*full"):
        read_latency(path).of(narrow)
    with pytest.raises(UserError, match="backbone resnet48_mini instead of resnet48;"):
        open_latency(path, {"backbone": "resnet48"})
    assert open_latency(None, {}) is None
    with pytest.raises(UserError, match="--limit takes --latency FILE, which python -m"):
        open_latency(None, {}, asked_by="--limit")


HOSTILE = [
    ({"format": 2}, "'format'"),
    ({"backbone": None}, "'backbone'"),
    ({"backbone": "resnet50"}, "unknown backbone"),
    ({"sample_space": "other"}, "'sample_space'"),
    ({"image_size": "32"}, "'image_size'"),
    ({"threads": True}, "'threads'"),
    ({"batch_size": 10**400}, "'batch_size'"),
    ({"num_classes": 0}, "'num_classes'"),
    ({"milliseconds": [1]}, "'milliseconds'"),
    ({"milliseconds": {"stem 20": 1.0}}, "'milliseconds'"),
    *(
        ({"milliseconds": {part.name: wrong for part in all_parts(MINI)}}, "'milliseconds'")
        for wrong in (-1.0, float("nan"), "1", 10**400, 1e308)
    ),
]


@pytest.mark.parametrize(("change", "words"), HOSTILE)
def test_a_wrong_file_is_one_line(tmp_path, change, words):
    with pytest.raises(UserError, match=words) as error:
        read_latency(latency_file(tmp_path, **change))
    assert "\n" not in str(error.value)


def stopwatch(line):
    return latency.Stopwatch(latency.parser().parse_args(f"--output x --threads 1 {line}".split()))


def test_a_stopwatch_times_what_it_is_given():
    """The sum of the parts is near the whole, as far as a busy machine lets one see."""
    watch = stopwatch("--image_size 64 --seconds 0.05")
    plan = RESNET48.plan(RESNET48.smallest())
    parts = list(parts_of(plan))
    times = {part: watch.part(part) for part in dict.fromkeys(parts)}
    assert all(time > 0 for time in times.values())
    total, whole = sum(times[part] for part in parts), watch.network(plan)
    assert total == pytest.approx(whole, rel=0.6)


class KilledError(Exception):
    pass


@pytest.fixture
def fake_watch(monkeypatch):
    """Times that a formula gives; the second round is faster."""
    calls = []

    class Watch:
        fails_at = None

        def __init__(self, options):
            pass

        def _time(self, name, value):
            if len(calls) == Watch.fails_at:
                raise KilledError
            calls.append(name)
            return value * (1.0 if calls.count(name) != 2 else 0.8)

        def part(self, part):
            return self._time(part.name, sum(part.channels) / 100)

        def network(self, plan):
            return self._time(plan, sum(sum(p.channels) / 100 for p in parts_of(plan)) * 1.05)

    monkeypatch.setattr(latency, "Stopwatch", Watch)
    # A thousand times the disk would take longest.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return Watch, calls


FLAGS = "--backbone resnet48_mini --image_size 32 --num_classes 10 --threads 1 --device cpu "
FLAGS += "--rounds 2 --networks 5"


def test_a_killed_measurement_goes_on_where_it_was(
    fake_watch, tmp_path, capsys, caplog, monkeypatch
):
    watch, calls = fake_watch
    path = tmp_path / "latency.json"
    arguments = ["--output", str(path), *FLAGS.split()]
    watch.fails_at = 600
    with pytest.raises(KilledError):
        latency.main(arguments)
    assert not path.exists()
    watch.fails_at = None
    content = json.loads((tmp_path / "latency.json.partial").read_text())
    for wrong in ({"stem 14": [10**400]}, {"stem 14": "1"}, {"stem 14": ["1"]}, [1]):
        (tmp_path / "latency.json.partial").write_text(json.dumps(content | {"times": wrong}))
        with pytest.raises(UserError, match="partial holds times that are none; remove it"):
            latency.main(arguments)
    (tmp_path / "latency.json.partial").write_text(json.dumps(content))
    with pytest.raises(UserError, match="partial is of other settings: batch size 1 instead"):
        latency.main([*arguments, "--batch_size", "2"])
    monkeypatch.setattr(latency, "GOOD_ERROR", 0.04)
    with caplog.at_level(logging.INFO):
        latency.main(arguments)
    assert "the sums are off by 5 % on average" in caplog.text
    assert "continuing with the 454 programs" in caplog.text  # 449 parts and 5 networks
    assert len(calls) == 2 * 454
    table = read_latency(path)
    arch = MINI.sample(np.random.default_rng(5))
    expected = sum(0.8 * sum(part.channels) / 100 for part in parts_of(MINI.plan(arch)))
    assert table.of(arch) == pytest.approx(expected, rel=1e-4)
    check = json.loads(path.read_text())["check"]
    assert check["mean_error"] == pytest.approx(1 / 1.05 - 1, abs=1e-3)
    assert check["mean_absolute_error"] == pytest.approx(1 - 1 / 1.05, abs=1e-3)
    assert len(check["networks"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert told["largest_absolute_error"] == check["largest_absolute_error"]
    assert [file.name for file in tmp_path.iterdir()] == ["latency.json"]
    # Asked again, it is finished; asked for another, the file is not overwritten.
    before = path.read_bytes()
    latency.main(arguments)
    with pytest.raises(UserError, match="json is of other settings: threads 1 instead of 2"):
        latency.main([*arguments, "--threads", "2"])
    assert path.read_bytes() == before and len(calls) == 2 * 454


def test_a_coarse_table_says_how_long_it_takes_and_what_is_interpolated(
    fake_watch, tmp_path, caplog
):
    _, calls = fake_watch
    path = tmp_path / "latency.json"
    arguments = ["--output", str(path), *FLAGS.split()]
    with caplog.at_level(logging.INFO):
        latency.main([*arguments, "--coarse", "True"])
    # Of the 3, 3, 5 and 7 inner widths of the mini space's stages 3 are measured.
    blocks = 3 * (3 + (3 * 3 + 3) + (3 * 5 + 5) + (5 * 7 + 7))
    assert caplog.messages[0].startswith(f"{blocks} blocks and 15 other programs, 1 times each, on")
    assert re.fullmatch(r"about \d\.\d minutes more", caplog.messages[1])
    assert len(calls) == len({*calls}) == blocks + 15
    interpolated = json.loads(path.read_text())["interpolated"]
    assert {*interpolated} == {part.name for part in all_parts(MINI)} - {*calls}
    # The formula is linear in a block's inner width.
    arch = MINI.sample(np.random.default_rng(5))
    parts = list(parts_of(MINI.plan(arch)))
    assert not {*interpolated}.isdisjoint(part.name for part in parts)
    expected = sum(sum(part.channels) / 100 for part in parts)
    assert read_latency(path).of(arch) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match=r"seconds 0.0 instead of 0.2, rounds 1 instead of 2"):
        latency.main(arguments)


def test_a_signal_ends_after_the_program_under_way(fake_watch, tmp_path, monkeypatch):
    watch, calls = fake_watch
    measure = watch.part

    def part(self, which):
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, which)

    monkeypatch.setattr(watch, "part", part)
    path = tmp_path / "latency.json"
    with pytest.raises(SystemExit) as ended:
        latency.main(["--output", str(path), *FLAGS.split()])
    assert ended.value.code == 143
    content = json.loads((tmp_path / "latency.json.partial").read_text())
    assert len(content["times"]) == len(calls) == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--output OUT --backbone resnet48pinasv2", "stage 1's"),
        ("--output OUT --device gpu", "sees no GPU"),
        ("--output . ", "is a folder"),
    ],
)
def test_wrong_flags_are_one_line(line, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        latency.main(line.replace("OUT", "latency.json").split())
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_run_on_a_gpu_is_waited_for_by_the_walls_clock(monkeypatch):
    """A predictor that returns at once, and work that ends when it is waited for."""
    now, calls = [0.0], []

    class Predictor:
        def run(self):
            calls.append("run")
            now[0] += 0.001

    def wait():
        calls.append("wait")
        now[0] += 0.009

    monkeypatch.setattr(latency, "on_gpu", lambda: True)
    monkeypatch.setattr(paddle.device, "synchronize", wait)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    watch = stopwatch("--image_size 32 --seconds 0.3")
    assert watch._repeat(Predictor()) == pytest.approx(10.0)
    assert calls == ["run", "wait"] * 30


def test_the_pages_latencies_are_the_result_files():
    content = json.loads(RESULT.read_text())
    read_latency(RESULT)
    check = content["check"]
    kinds = ("mean", "mean_absolute", "largest_absolute")
    shown = [f"{100 * check[f'{kind}_error']:.1f} %" for kind in kinds]
    measured = [row["measured"] for row in check["networks"]]
    assert table_after("docs/search.md", "latency table") == [
        [f"{min(measured):.1f} to {max(measured):.1f} ms", *shown]
    ]
    assert content["rounds"] == 2 and content["processor"].startswith("AMD EPYC")
    # What a coarse table would have made of it.
    times, every = content["milliseconds"], all_parts(RESNET48)
    coarse = latency.completed(every, all_parts(RESNET48, coarse=True), times)
    plans = map(RESNET48.plan, RESNET48.sample_distinct(np.random.default_rng(1), 1000).values())
    names = [[part.name for part in parts_of(plan)] for plan in plans]
    errors = [abs(sum(map(coarse.get, own)) / sum(map(times.get, own)) - 1) for own in names]
    text = f"by {100 * np.mean(errors):.1f} % on average and {100 * max(errors):.1f} % at most"
    assert text in " ".join(text_of("docs/search.md").split())
