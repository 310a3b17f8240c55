"""What several test files share."""

import os
import signal

import numpy as np
import pytest
from hypothesis import settings
from scipy.stats import chisquare

# The same examples in every run, and no deadline, since machines are shared.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")
# Under nohup it is ignored, also by what tests start, and programs then leave it alone.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


NO_GPU = ",".join(["-1"] * 8)
"""Hides GPUs. Paddle's launcher takes one of these for each of up to eight processes."""


def pytest_configure(config):
    """Hide GPUs from these tests and from what they start; only ``-m gpu`` sees them.

    Paddle would choose a GPU wherever it sees one, and the numbers are those of CPUs.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = NO_GPU


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Decoded images go to a folder of the tests', not to the user's."""
    # Matplotlib says so when it lists the fonts; programs under test find the list made here.
    import matplotlib.font_manager

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def option_ranks(codes, max_digits=(3, 3, 5, 7)):
    """The choices behind 52-digit codes, read by position.

    Returns a dict from each choice's name to the number n of its options and the ranks that
    were chosen, from 0 (shallow, narrow) to n - 1: every code's for depths and output widths,
    and for a block's inner width those of the codes that have the block.
    """
    digits = np.array([list(code) for code in codes]).astype(int)
    ranks, first = {}, 6
    for stage, (deepest, narrowest) in enumerate(zip((5, 5, 8, 5), max_digits, strict=True)):
        depth = digits[:, 1 + stage]
        ranks[f"depth {stage + 1}"] = (deepest - 1, depth - 2)
        ranks[f"output width {stage + 1}"] = (narrowest, narrowest - digits[:, first + 1])
        for block in range(deepest):
            inner = digits[depth > block, first + 2 * block]
            ranks[f"inner width {stage + 1}.{block + 1}"] = (narrowest, narrowest - inner)
        first += 2 * deepest
    return ranks


def assert_uniform(codes, *max_digits):
    for choice, (options, ranks) in option_ranks(map(str, codes), *max_digits).items():
        counts = np.bincount(ranks, minlength=options)
        assert len(counts) == options, choice
        assert chisquare(counts).pvalue > 1e-4, choice
