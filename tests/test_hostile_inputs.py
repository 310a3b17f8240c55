"""Inputs of tools, settings and files that make no sense: a right result, or one line."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import importlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from entry_scripts import ROOT

import train_supernet
from hnas import architecture_file
from hnas.architecture_file import read_architectures
from hnas.base import device
from hnas.base.errors import UserError
from hnas.base.files import claim_folder, is_whole
from hnas.base.settings import check_same_settings
from hnas.dataset.image_folder import ImageList
from hnas.evaluation.results import architectures_hash
from hnas.programs import memory_needs
from hnas.programs.memory_needs import check_batch, check_chunk, check_queue, check_shared_memory
from hnas.programs.options import Options
from hnas.programs.runtime import scored_order
from hnas.ranking.findings import notes_on_ranking
from hnas.search_space import RESNET48, RESNET48_MINI
from hnas.tools import draw_architectures
from hnas.tools.choose import conclusions
from hnas.weights.loading import read_weights, write_state

LONG, NAME = "9" * 30, "n" * 300


def refused(check, *arguments) -> str:
    """What is said, in one line, which a terminal shows in a few rows."""
    with pytest.raises(UserError) as error:
        check(*arguments)
    message = str(error.value)
    assert "\n" not in message and 0 < len(message) < 400
    return message


# --- flags of the tools


HOSTILE_TOOLS = [
    ("tools.draw_architectures", f"--output OUT --number {LONG}", "--number"),
    ("tools.draw_architectures", "--output OUT --seed -1", "--seed"),
    ("tools.plan", "--gmacs_per_s nan", "--gmacs_per_s: 'nan' is not a finite number"),
    ("tools.plan", "--gmacs_per_s 1e300", "--gmacs_per_s: 1e.300 is out of bounds"),
    ("tools.choose", f"--submission x --image_size {LONG}", "--image_size"),
    ("tools.rank_report", "--pred macs --gt= --out OUT", "--gt: the path is empty"),
    ("tools.rank_report", f"--pred macs --gt x --out OUT --resamples {LONG}", "--resamples"),
    ("tools.digits_folder", f"--output {NAME}", "--output: .* 300 bytes"),
    ("tools.split_folder", "--images . --output OUT --val_share 2", "--val_share: 2.0 is out of"),
    ("tools.split_folder", f"--images . --output {NAME}", "--output: .* 300 bytes"),
    ("tools.demo_summary", "--demo_dir=", "--demo_dir: the path is empty"),
    ("tools.choose", "--submission x --out ~whom/x", "--out: '~whom/x': nobody's home"),
    ("tools.choose", "--submission x --top 1_0", "--top: '1_0' is not a whole number"),
]


@pytest.mark.parametrize(("tool", "line", "words"), HOSTILE_TOOLS)
def test_a_hostile_tool_flag_is_one_line(tool, line, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"hnas.{tool}").main
    assert re.search(words, refused(main, line.split(" ")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", [*dict(row[:2] for row in HOSTILE_TOOLS), "tools.latency"])
def test_help_of_a_tool_tells_every_default(tool, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"hnas.{tool}").main(["--help"])
    usage, told = " ".join(capsys.readouterr().out.split()).split(" options: ")
    parts = re.split(r" (?=--\w+ [A-Z{])", told)
    helps = {re.match(r"--(\w+)", part)[1]: part for part in parts[1:]}
    optional = set(re.findall(r"\[--(\w+)", usage))
    assert optional <= set(helps)
    assert all(helps[flag].rstrip().endswith("]") for flag in optional), helps


def test_settings_are_told_whole_but_digests_by_their_start():
    found, wanted = ({"a": f"long_name_of_{i}_thing", "b": f"{i}" * 64} for i in (1, 2))
    told = f"a long_name_of_1_thing instead of long_name_of_2_thing, b {'1' * 16} instead"
    with pytest.raises(UserError, match=f"^f is of other settings: {told} of {'2' * 16}; mend$"):
        check_same_settings("f", found, wanted, "mend")


# --- settings that do not fit what they are for


def test_more_than_there_are_is_refused(tmp_path):
    images = ImageList(Path("val"), ["a"], [Path("x")] * 10, np.zeros(10, np.int64))
    message = refused(scored_order, Options(eval_images=11), images)
    assert "--eval_images 11, but val has 10; lower it, or give 0" in message
    path = tmp_path / "archs.txt"
    path.write_text(RESNET48.largest().code + "\n")
    one, two = (Options(modelarch_file=str(path), eval_sample_num=number) for number in (1, 2))
    message = refused(train_supernet.architectures, two, RESNET48)
    assert f"--eval_sample_num 2, but {path} has 1 architectures" in message
    assert len(train_supernet.architectures(one, RESNET48)) == 1


# --- memory


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory and shared memory is free, in MiB."""
    paddle.set_device("cpu")

    def say(mib=1024, shared=1024):
        monkeypatch.setattr(memory_needs, "available_bytes", lambda: mib * 2**20)
        found = SimpleNamespace(f_bavail=shared * 2**8, f_frsize=2**12)
        monkeypatch.setattr(device.os, "statvfs", lambda path: found)

    return say


def test_a_chunk_or_queue_that_memory_cannot_hold_is_refused(free):
    free(1024)
    for chunk in (0, 1000):
        check_chunk(Options(chunk_size=chunk))
    message = refused(check_chunk, Options(chunk_size=10_000))
    assert message.startswith("--chunk_size 10000 at --image_size 224 needs 5.61 GiB at least")
    # Two copies of 128 float32: a KiB a key.
    check_queue(Options(queue_size=2**20))
    message = refused(check_queue, Options(queue_size=2**20 + 1))
    assert message.startswith("--queue_size 1048577 needs 1.00 GiB at least, and 1.00 GiB are free")


def test_a_batch_that_memory_cannot_hold_is_refused(free):
    free(1024)
    options = Options(batch_size=10_000, image_size=224, num_workers=0)
    message = refused(check_batch, options, RESNET48)
    assert message.startswith("--batch_size 10000 at --image_size 224 needs ")
    assert message.endswith("and 1.00 GiB are free; lower them, or raise --accumulate")
    # uint8 and float32 pixels; every convolution's output by the sizes of the smallest network.
    pixels = 5 * 3 * 224**2
    widths, sizes = (56, 112, 208, 360), (56, 28, 14, 7)
    kept = 112**2 * 56 + sum(4 * w * s**2 for w, s in zip(widths, sizes, strict=True))
    kept += sum(w * s**2 for w, s in list(zip(widths, sizes, strict=True))[1:])  # shortcuts
    most = 2**30 // (pixels + 4 * kept)
    check_batch(dataclasses.replace(options, batch_size=most), RESNET48)
    refused(check_batch, dataclasses.replace(options, batch_size=most + 1), RESNET48)
    check_batch(dataclasses.replace(options, batch_size=most + 1, accumulate=most + 1), RESNET48)


def test_docker_gives_too_little_shared_memory_for_stage_1(free, monkeypatch):
    """Two views of 224 px are 77 MB a batch of 256, and 16 of them may be under way."""
    options = Options(backbone="resnet48pinasv2")
    batch = memory_needs.batch_bytes(options)
    assert batch == 2 * 256 * 3 * 224**2
    free(shared=64)
    message = refused(check_shared_memory, batch, 5000, 8)
    assert message == (
        "--num_workers 8 needs 1.15 GiB of shared memory for batches under way, and /dev/shm has "
        "0.06 GiB free; give the container more (docker run --shm-size 3g), or --num_workers 0"
    )
    check_shared_memory(batch, 5000, 0)
    free(shared=1200)
    check_shared_memory(batch, 5000, 8)
    free(shared=64)
    check_shared_memory(2**26, 1, 8)  # one batch
    refused(check_shared_memory, 2**26, 2, 8)
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "2")  # of two processes
    check_shared_memory(2**25, 1, 8)
    refused(check_shared_memory, 2**25 + 1, 1, 8)
    monkeypatch.setattr(device.os, "statvfs", os.stat)  # which looks whether it is there
    monkeypatch.setattr(device, "SHARED", "/nope")
    check_shared_memory(2**60, 100, 8)


# --- kinds of files


def open_socket(path: Path) -> None:
    """A socket's file; names of sockets are short."""
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


ENDLESS = {
    "pipe": os.mkfifo,
    "socket": open_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "folder": Path.mkdir,
    "nothing": lambda path: path.symlink_to("/nowhere"),
    "itself": lambda path: path.symlink_to(path.name),
}
READ = """
import sys
from pathlib import Path
from hnas.architecture_file import read_architectures
from hnas.base.errors import UserError
from hnas.dataset.image_folder import decode_image
for path in sys.argv[1:]:
    for read in (decode_image, read_architectures):
        try:
            read(Path(path))
        except UserError as error:
            print(error)
"""


def test_what_has_no_end_is_refused_at_once(tmp_path):
    paths = [tmp_path / f"{kind}.png" for kind in ENDLESS]
    for path, make in zip(paths, ENDLESS.values(), strict=True):
        make(path)
    # In a process of its own, which can be ended when it hangs.
    command = [sys.executable, "-c", READ, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    messages = done.stdout.splitlines()
    assert len(messages) == 2 * len(paths), done
    for number, message in enumerate(messages):
        assert str(paths[number // 2]) in message


# --- outputs


def null_device(path: Path) -> None:
    if os.getuid():
        pytest.skip("only root makes devices")
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # /dev/null's


@pytest.mark.parametrize("make", [os.mkfifo, open_socket, null_device])
def test_what_is_no_file_is_not_replaced(make, tmp_path):
    path, link = tmp_path / "out", tmp_path / "link"
    make(path)
    link.symlink_to(path)
    kind = path.stat().st_mode
    for output in map(str, (path, link)):
        assert "a pipe, socket or device" in refused(draw_architectures.main, ["--output", output])
        assert "a pipe, socket or device" in refused(write_state, output, {})
    assert path.stat().st_mode == kind and link.is_symlink() and len(os.listdir(tmp_path)) == 2


def test_what_a_link_leads_to_is_written(tmp_path):
    name = os.fsdecode(b"\xc8\xa8\xd6\xd8.pdparams")  # in GBK
    real, link = tmp_path / "disk" / name, tmp_path / "a.pdparams"
    link.symlink_to(real)
    for value in (1.0, 2.0):
        write_state(link, {"a": np.full(3, value, np.float32)})
        assert read_weights(link)["a"][0] == read_weights(real)["a"][0] == value
    assert link.is_symlink() and is_whole(link) and is_whole(real)


def test_names_that_are_no_text():
    one, other = (architectures_hash({n: RESNET48.largest()}) for n in ("\ud800", "\udcff"))
    assert one != other
    table = SimpleNamespace(about={"processor": "\ud800", "batch_size": 1, "threads": 1})
    row = {"name": "n", "arch": "1", "acc": 1.0, "latency": 2.0, "front": True, "group": True}
    told = conclusions([row], 1, "latency", table)
    assert "accuracy and latency, ms (\\ud800, batch 1, 1 threads)\n" in told


END = """
import logging
from hnas.base.errors import UserError, run_main
from hnas.base.files import print_text
def main():
    logging.warning("%s is odd", "n" * 5_000_000)
    print_text("found \\ud800\\n")
    raise UserError("n" * 5_000_000 + "; mend it")
run_main(main)
"""
FULL = "error: cannot write to the standard output: No space left on device"


@pytest.mark.parametrize(("disk", "last"), [("null", "; mend it"), ("full", FULL)])
def test_lines_are_short_and_a_full_disk_is_one(disk, last):
    with open(f"/dev/{disk}", "w") as out:
        run, told = (
            subprocess.run([sys.executable, *end], stdout=out, stderr=subprocess.PIPE, cwd=ROOT)
            for end in (["-c", END], ["-m", "hnas.tools.plan", "--help"])
        )
    warning, error = run.stderr.decode().splitlines()
    assert max(len(warning), len(error)) < 2000
    assert warning.endswith("n is odd") and error.endswith(last) and run.returncode == 2
    assert told.stderr.decode() == (f"{FULL}\n" if disk == "full" else "")


FILE = "import os\nfrom hnas.base.errors import run_main\ndef main(): raise {}\nrun_main(main)"


@pytest.mark.parametrize(
    ("error", "place"),
    [
        ("PermissionError(13, os.strerror(13), '/of a/colleague')", "/of a/colleague: Permission"),
        ("OSError(122, os.strerror(122))", "a file, maybe in $TMPDIR, /tmp where that is "),
        ("OSError(28, os.strerror(28))", "a file, maybe in $TMPDIR, /tmp where that is "),
        ("OSError(5, os.strerror(5))", ""),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_wherever(error, place):
    """Root may enter every folder, so this is what others meet."""
    run = subprocess.run([sys.executable, "-c", FILE.format(error)], cwd=ROOT, capture_output=True)
    told = run.stderr.decode()
    assert told.startswith(f"error: cannot use {place}" if place else "Traceback")
    assert run.returncode == (2 if place else 1) and (told.count("\n") == 1) == bool(place)


# --- two runs in one folder

HOLD = """
import sys, time
from hnas.base.files import claim_folder
claim_folder(sys.argv[1], "--save_dir", *sys.argv[2:])
print("here", flush=True)
time.sleep(600)
"""
RUNS = [
    *("train_supernet_pinas_stage1", "train_supernet_pinas_stage2_simple", "train_supernet"),
    *(f"hnas.tools.{tool}" for tool in ("pretrain", "search", "train_standalone", "export")),
    "hnas.bench.rank.__main__",
]
MORE = f"--device cpu --ckpt_dir x --arch {RESNET48.largest().code}"


@contextmanager
def held(folder: Path, *part: str):
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLD, str(folder), *part]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"here\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """What a program says that is to write to the test's folder."""

    def refusal(name: str, more: str = "") -> str:
        flags = (
            f"truth --out {tmp_path}" if "rank" in name else f"--save_dir {tmp_path} {MORE} {more}"
        )
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        return refused(importlib.import_module(name).main)

    return refusal


def test_a_second_run_in_a_folder_is_refused_by_name(tmp_path, refusal):
    with held(tmp_path) as process:
        owner = f"pid {process.pid} on {socket.gethostname()}, -c, since 20"
        for name in RUNS:
            assert f"{tmp_path} is in use: {owner}" in refusal(name), name
        end = HOLD.replace("time.sleep", "")
        subprocess.run([sys.executable, "-c", end, str(tmp_path / "new")], cwd=ROOT, check=True)
        assert not (tmp_path / "new").exists()
    # Killed, it has nothing any more, and something else is wrong.
    assert "--modelarch_file is missing" in refusal("train_supernet")


def test_parts_share_a_folder_each_once(tmp_path, refusal):
    part = "--chunk_size 2 --images_part"
    with held(tmp_path, "1/2"):
        assert "part 1/2 in --save_dir" in refusal("train_supernet", f"{part} 1/2")
        assert "is in use" in refusal("train_supernet")
        assert "--modelarch_file is missing" in refusal("train_supernet", f"{part} 2/2")


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    claim_folder(tmp_path, "--save_dir")
    assert f"no lock on --save_dir {tmp_path} (No locks available)" in caplog.text


# --- too many architectures


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[]," * 100 + "[]]",
        "[" + '"1",' * 300 + '"1"]',
        "{" + '"a":{},' * 100 + '"b":{}}',
        "1," * 101,
        "1\n" * 101,
    ],
)
def test_too_many_architectures(text, tmp_path, monkeypatch):
    """Refused before anything is built of them: 48 MB of ``[],`` took 3.8 GB."""
    assert architecture_file.MOST_ARCHITECTURES < 10**6
    monkeypatch.setattr(architecture_file, "MOST_ARCHITECTURES", 100)
    monkeypatch.setattr(json, "loads", None)
    (tmp_path / "archs").write_text(text)
    with pytest.raises(UserError, match="holds more than 100 entries"):
        read_architectures(tmp_path / "archs")


def test_as_many_architectures_as_are_allowed(tmp_path, monkeypatch):
    archs = RESNET48_MINI.sample_distinct(np.random.default_rng(0), 20)
    content = {name: {"acc": 0.0, "arch": arch.code} for name, arch in archs.items()}
    codes = [arch.code for arch in archs.values()]
    monkeypatch.setattr(architecture_file, "MOST_ARCHITECTURES", 20)
    for text in (json.dumps(content), json.dumps(codes), ",".join(codes)):
        (tmp_path / "archs").write_text(text)
        assert len(read_architectures(tmp_path / "archs")) == 20


# --- placeholders


@pytest.mark.parametrize(("equal", "said"), [(0, False), (10, False), (11, True), (39, True)])
def test_many_equal_accuracies_are_mentioned(equal, said):
    values = np.linspace(0.1, 0.9, 40)
    values[:equal] = 0.0
    notes = notes_on_ranking(values, np.linspace(50, 70, 40))
    found = [note for note in notes if "placeholders" in note]
    assert found == [f"{equal} of 40 predictions are 0: placeholders? Among them nothing is ranked."
                     for _ in range(said)]  # fmt: skip
