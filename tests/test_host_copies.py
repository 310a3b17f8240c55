"""What the host copies to and from the device in a step, of which a GPU would have to be awaited.

Copies are counted by wrapping the methods that make them; on a CPU they cost nothing.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn

from hnas.parallel import distributed
from hnas.parallel.distributed import GradientExchange
from hnas.parallel.distributed import StopSignals
from hnas.utils.gradient_step import GradientStep, momentum_optimizer
from hnas.utils.hapi_wrapper import StandaloneModel

READS = ("numpy", "tolist", "item", "__float__", "__int__", "__bool__", "__array__")


@pytest.fixture
def events(monkeypatch):
    """Copies and passes, in their order."""
    seen, under_way = [], set()

    def noting(function, name):
        def run(*arguments, **named):
            if name in under_way:  # one calls another
                return function(*arguments, **named)
            seen.append(name)
            under_way.add(name)
            try:
                return function(*arguments, **named)
            finally:
                under_way.remove(name)

        return run

    for name in READS:
        monkeypatch.setattr(paddle.Tensor, name, noting(getattr(paddle.Tensor, name), "read"))
    monkeypatch.setattr(paddle, "to_tensor", noting(paddle.to_tensor, "write"))
    backward = noting(paddle.Tensor.backward, "backward")
    monkeypatch.setattr(paddle.Tensor, "backward", backward)
    return seen


@pytest.fixture
def exchange(monkeypatch):
    """Two ranks of which the other is told to stop in step ``told``."""
    other = SimpleNamespace(told=None, steps=0)

    def all_reduce(flat):
        if other.steps == other.told:
            flat[0] = flat[0] + 1  # the first of SIGNALS, in front of the gradients
        other.steps += 1

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_collective", contextlib.nullcontext)
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    return other


class Loader:
    """Four steps of an epoch."""

    total_batch = 4

    def __len__(self):
        return 4

    def epoch(self, epoch, first):
        rng = np.random.default_rng(0)
        images = paddle.to_tensor(rng.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
        labels = paddle.to_tensor(np.arange(4) % 3)
        for _ in range(len(self)):
            yield images, labels


class Steps:
    """Notes where a step begins, and whether the ranks know of a signal when it has ended."""

    def __init__(self, model, events, known):
        self.model, self.events, self.known = model, events, known

    def __getattr__(self, name):
        return lambda *_: None

    def on_train_batch_begin(self, *_):
        self.events.append("step")

    def on_train_batch_end(self, *_):
        self.known.append(self.model.exchange.received)


def trained(events):
    network = nn.Sequential(
        nn.Conv2D(3, 4, 3), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, 3)
    )
    network.register_forward_pre_hook(lambda *_: events.append("forward"))
    model = StandaloneModel(network, "code")
    optimizer = momentum_optimizer(network, 0.05, 0.9, 1e-4)
    model.prepare(optimizer, GradientStep(optimizer))
    model.exchange = GradientExchange(network.parameters(), StopSignals())
    known = []
    model.fit(Loader(), 1, [Steps(model, events, known)])
    return known


def test_notices_are_read_before_the_forward_pass_and_nothing_else(events, exchange):
    assert trained(events) == [None] * 4
    first = events.index("step")
    steps = " ".join(events[first:]).split("step ")[1:]
    # Of the first step there was none before, and normalising makes its constants once.
    assert steps[0].replace("write ", "").split() == ["forward", "backward"]
    for later in steps[1:]:
        assert later.split() == ["read", "forward", "backward"]


def test_ranks_know_of_a_signal_when_the_step_after_it_ends(events, exchange):
    exchange.told = 1
    known = trained(events)
    assert known[:2] == [None, None]
    assert known[2] == known[3] == distributed.SIGNALS[0]
