"""The demo's closing words: a table, its files, and commands that work as they are printed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hnas.base.errors import UserError
from hnas.search_space import RESNET48_MINI
from hnas.tools.demo_summary import SUPERNET, main, next_steps, summarize
from hnas.tools.flag_tables import launcher_variables
from hnas.utils.flags import Stage
from hnas.utils.parsing import parse_options

ROOT = Path(__file__).parents[1]
NUMBER = 21


@pytest.fixture
def demo(tmp_path):
    """What a demo leaves that its summary reads: accuracies that grow with the MACs."""
    space = RESNET48_MINI
    archs = space.sample_distinct(
        np.random.default_rng(0), NUMBER, (space.largest(), space.smallest())
    )
    entries = {
        name: {"arch": arch.code, "acc": space.macs(arch, 32, 10) / 1e7}
        for name, arch in archs.items()
    }
    for stage in ("pretrain", "stage1", "stage2", "stage3"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "history.json").write_text('{"epoch_losses": [2.0, 1.0]}')
    (tmp_path / "stage3/submission.json").write_text(json.dumps(entries))
    (tmp_path / "seconds.txt").write_text("data 3\nstage1 20\n")
    return tmp_path


def test_the_table_tells_the_largest_median_and_smallest(demo, capsys):
    main(["--demo_dir", str(demo)])
    text = capsys.readouterr().out
    summary = json.loads((demo / "summary.json").read_text())
    assert summary == summarize(demo) and summary["architectures"] == NUMBER
    space = RESNET48_MINI
    for name, arch in (("largest", space.largest()), ("smallest", space.smallest())):
        macs = space.macs(arch, 32, 10)
        assert summary["subnetworks"][name] == {"arch": arch.code, "macs": macs, "top1": macs / 1e7}
        assert re.search(rf"^{name} +{macs:,} +{macs / 1e7:.2%}$", text, re.M)
    every = sorted(
        entry["acc"] for entry in json.loads((demo / "stage3/submission.json").read_text()).values()
    )
    assert summary["subnetworks"]["median"]["top1"] == every[NUMBER // 2]
    assert summary["seconds"] == {"data": 3, "stage1": 20} and "2.000 -> 1.000" in text


def test_an_unfinished_demo_is_refused(demo):
    (demo / "stage2/history.json").unlink()
    with pytest.raises(UserError, match=r"stage2/history.json is missing; run sh run_demo.sh"):
        summarize(demo)


def commands(text):
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.startswith("  ")][4:]


def test_the_report_works_as_printed(demo, capsys):
    main(["--demo_dir", str(demo)])
    report, _ = commands(capsys.readouterr().out)
    assert (ROOT / report[0]).resolve() == Path(sys.executable).resolve()
    done = subprocess.run(report, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    # The accuracies are the MACs.
    assert found["architectures"] == NUMBER
    assert found["kendall_tau_b"]["value"] == pytest.approx(1)
    assert (demo / "macs/report.html").is_file()


def test_the_other_command_scores_what_it_draws():
    _, other = commands(next_steps(Path("output/demo"), ".venv/bin/python"))
    assert other[-2:] == ["sh", "local_eval.sh"]
    given = dict(word.split("=") for word in other[:-2])
    assert set(given) <= set(launcher_variables((ROOT / other[-1]).read_text()))
    options = parse_options(Stage.SCORE, [f"--{name}={value}" for name, value in given.items()])
    assert (options.eval_sample_num, options.modelarch_file) == (500, "")
    assert options.ckpt_dir == f"output/demo/{SUPERNET}"
    assert f'ckpt_dir="$demo/{SUPERNET}" modelarch_file=' in (ROOT / "run_demo.sh").read_text()
