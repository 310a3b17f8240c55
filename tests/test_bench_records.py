"""The ranking bench's files of results: several writers, kills, and what is refused."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hnas.base.errors import UserError
from hnas.bench.rank import records
from hnas.bench.rank.records import Records

ROOT = Path(__file__).parents[1]
LONG = 20_000  # more than a pipe or a page holds


def entry(number, length=8):
    return {"settings": {"lr": 1e-4, "size": number}, "text": "x" * length}


def jobs_of(path):
    """The file's lines, read by the test itself: entries by job."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({line["job"] for line in lines}) == len(lines)
    return {line.pop("job"): line for line in lines}


def test_entries_are_lines_and_come_back(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    kept = Records(path)
    assert kept.get("truth-arch1-0") is None and not path.parent.exists()
    kept.put("truth-arch1-0", {"hits": 5, "settings": {"rotation": 0.6, "names": ["a", "é"]}})
    kept.put("pretrain-0", {"hits": 7})
    assert path.read_bytes() == (
        b'{"job":"truth-arch1-0","hits":5,"settings":{"rotation":0.6,"names":["a","\\u00e9"]}}\n'
        b'{"job":"pretrain-0","hits":7}\n'
    )
    for reader in (kept, Records(path)):
        assert reader.get("pretrain-0") == {"hits": 7}
        assert reader.get("truth-arch1-0")["settings"]["names"] == ["a", "é"]
        assert reader.get("pretrain-1") is None
    assert [entry.name for entry in path.parent.iterdir()] == ["runs.jsonl"]


def test_what_another_process_adds_is_seen(tmp_path):
    path = tmp_path / "runs.jsonl"
    reader, writer = Records(path), Records(path)
    for number in range(20):  # faster than clocks of file systems tick
        writer.put(f"job-{number}", entry(number))
        assert reader.get(f"job-{number}") == entry(number)
    writer.put("job-3", entry(4))  # as long as the one it replaces
    assert reader.get("job-3") == entry(4)
    path.unlink()
    assert reader.get("job-3") is None


def test_a_file_is_parsed_once_until_it_changes(tmp_path, monkeypatch):
    path, calls = tmp_path / "runs.jsonl", []
    Records(path).put("job-0", entry(0))
    parse = records.parse
    monkeypatch.setattr(records, "parse", lambda *args: calls.append(1) or parse(*args))
    reader = Records(path)
    for _ in range(50):
        assert reader.get("job-0") and reader.get("job-1") is None
    assert len(calls) == 1
    Records(path).put("job-1", entry(1))
    del calls[:]
    assert reader.get("job-0") and reader.get("job-1")
    assert len(calls) == 1


def test_a_job_that_is_done_again_replaces_its_entry(tmp_path):
    path = tmp_path / "runs.jsonl"
    kept = Records(path)
    for number in range(3):
        kept.put(f"job-{number}", entry(number))
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    kept.put("job-1", entry(1))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, stamp)
    kept.put("job-1", entry(10))
    assert list(jobs_of(path).items()) == [
        ("job-0", entry(0)),
        ("job-1", entry(10)),
        ("job-2", entry(2)),
    ]


# --- several processes


def write_many(path, writer, number, started):
    kept = Records(path)
    started.wait()
    for index in range(number):
        kept.put(f"job-{writer}-{index}", entry(index, LONG if index % 5 == 0 else 10))
        if index % 4 == 0:
            # Makes a new file, on which the others must go on.
            kept.put("shared", entry(100 * writer + index))
        assert kept.get(f"job-{writer}-{index}") is not None


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path, writers, number = tmp_path / "runs.jsonl", 4, 40
    context = multiprocessing.get_context("fork")
    started = context.Event()
    processes = [
        context.Process(target=write_many, args=(path, writer, number, started))
        for writer in range(writers)
    ]
    for process in processes:
        process.start()
    started.set()
    reader, seen = Records(path), 0
    while any(process.is_alive() for process in processes):
        # Reading takes no lock, and never sees less than before, nor an error.
        found = sum(
            reader.get(f"job-{writer}-{index}") is not None
            for writer in range(writers)
            for index in range(number)
        )
        assert found >= seen
        seen = found
    assert [process.exitcode for process in processes] == [0] * writers
    found = jobs_of(path)
    assert found.pop("shared")["text"] == "x" * 8
    assert found == {
        f"job-{writer}-{index}": entry(index, LONG if index % 5 == 0 else 10)
        for writer in range(writers)
        for index in range(number)
    }
    assert [name.name for name in tmp_path.iterdir()] == ["runs.jsonl"]


def test_writers_that_are_killed_leave_whole_lines(tmp_path):
    """At worst the line or the file that was being written is missing."""
    path = tmp_path / "runs.jsonl"
    program = (
        "import itertools, sys\n"
        "from hnas.bench.rank.records import Records\n"
        "kept = Records(sys.argv[1])\n"
        "for index in itertools.count():\n"
        "    kept.put(f'{sys.argv[2]}-{index}', {'text': 'x' * 5000})\n"
        "    sys.stdout.write('.') and sys.stdout.flush()\n"
        "    index % 3 or kept.put('shared', {'number': index, 'by': sys.argv[2]})\n"
    )
    done = {}
    for round_ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path), f"writer{round_}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        process.stdout.read(1)
        time.sleep(0.02 + 0.013 * round_)
        process.send_signal(signal.SIGKILL)
        done[round_] = 1 + len(process.communicate()[0])
        reader = Records(path)
        # All that had returned is there, of this process and of those before.
        for earlier, number in done.items():
            for index in range(number):
                assert reader.get(f"writer{earlier}-{index}") == {"text": "x" * 5000}
    Records(path).put("last", {})
    assert set(jobs_of(path)) >= {"last", "shared", "writer0-0", "writer5-0"}


# --- what a kill leaves, and what is damaged


def test_a_cut_last_line_is_ignored_and_removed(tmp_path):
    path = tmp_path / "runs.jsonl"
    first, second = (records.line(f"job-{number}", entry(number)) for number in range(2))
    for cut in range(len(second) + 1):
        path.write_bytes(first + second[:cut])
        kept = Records(path)
        whole = cut >= len(second) - 1  # but for the line's end
        assert kept.get("job-0") == entry(0)
        assert kept.get("job-1") == (entry(1) if whole else None)
        kept.put("job-2", entry(2))
        expected = {0: entry(0), 1: entry(1), 2: entry(2)} if whole else {0: entry(0), 2: entry(2)}
        assert jobs_of(path) == {f"job-{number}": own for number, own in expected.items()}
        assert path.read_bytes().endswith(b"\n")


def test_a_file_of_nothing_but_a_cut_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b'{"job":"job-0","hi')
    assert Records(path).get("job-0") is None
    Records(path).put("job-1", entry(1))
    assert jobs_of(path) == {"job-1": entry(1)}


@pytest.mark.parametrize(
    "text", ['{"job":"job-1","hits":4', '{"hits":4}', '{"job":5}', "[]", "", "\\xff", '"job"']
)
@pytest.mark.parametrize("place", [1, 2])
def test_a_damaged_line_in_the_middle_is_told(text, place, tmp_path):
    path = tmp_path / "runs.jsonl"
    lines = [records.line(f"job-{number}", entry(number)).decode() for number in range(2)]
    lines.insert(place - 1, text + "\n")
    path.write_text("".join(lines), encoding="latin-1")
    before = path.read_bytes()
    for action in (lambda: Records(path).get("job-0"), lambda: Records(path).put("job-5", {})):
        with pytest.raises(UserError, match=f"runs.jsonl, line {place} is not a whole entry"):
            action()
    assert path.read_bytes() == before


def test_a_job_that_stands_twice(tmp_path):
    path = tmp_path / "runs.jsonl"
    lines = [records.line(f"job-{number}", entry(number)) for number in (0, 1, 0)]
    path.write_bytes(b"".join(lines))
    assert Records(path).get("job-0") == entry(0) and Records(path).get("job-1") == entry(1)
    path.write_bytes(b"".join(lines) + records.line("job-1", entry(2)))
    for action in (lambda: Records(path).get("job-0"), lambda: Records(path).put("job-5", {})):
        with pytest.raises(UserError) as error:
            action()
        assert "two different entries of job-1, in lines 2 and 4" in str(error.value)
        assert "\n" not in str(error.value)


def test_files_that_cannot_be_used_are_told(tmp_path):
    (tmp_path / "runs.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot read .*runs.jsonl"):
        Records(tmp_path / "runs.jsonl").get("job-0")
    with pytest.raises(UserError, match="cannot write .*runs.jsonl"):
        Records(tmp_path / "runs.jsonl").put("job-0", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Records(tmp_path / "file" / "runs.jsonl").put("job-0", {})


def test_a_disk_that_is_full_leaves_the_entries_before(tmp_path):
    """A file's largest size stands for a disk's: a line is cut where it ends."""
    path = tmp_path / "runs.jsonl"
    program = (
        "import resource, signal, sys\n"
        "from hnas.base.errors import run_main\n"
        "from hnas.bench.rank.records import Records\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "def main():\n"
        "    for index in range(9):\n"
        "        Records(sys.argv[1]).put(f'job-{index}', {'text': 'x' * 900})\n"
        "run_main(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write")
    assert os.path.getsize(path) <= 5000
    kept = Records(path)
    assert [kept.get(f"job-{index}") is not None for index in range(6)] == [True] * 5 + [False]
    kept.put("job-5", {})
    assert len(jobs_of(path)) == 6
