"""The state of all random generators, as plain values for a checkpoint."""

from __future__ import annotations

import logging
import random

import numpy as np
import paddle

logger = logging.getLogger(__name__)


def generators_state() -> dict:
    """The state of Python's, NumPy's and Paddle's global generators."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": keys,
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "paddle": [_plain(state) for state in paddle.get_rng_state()],
    }


def restore_generators(state: dict) -> None:
    """Set the generators to what :func:`generators_state` gave.

    Paddle's are left alone if the run now has other devices than then.
    """
    python, numpy = state["python"], state["numpy"]
    words = tuple(int(word) for word in python["words"])
    random.setstate((python["version"], words, python["gauss"]))
    np.random.set_state(
        (numpy["kind"], numpy["keys"], numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    current = paddle.get_rng_state()
    if [_plain(s)["device"] for s in current] != [s["device"] for s in state["paddle"]]:
        logger.warning("other devices than before: Paddle's generators start from the seed")
        return
    pairs = zip(current, state["paddle"], strict=True)
    paddle.set_rng_state([_generator(type(own), plain) for own, plain in pairs])


def _plain(state) -> dict:
    device, seed, offset, engine = state.__getstate__()
    return {
        "device": device,
        "seed": seed,
        "offset": offset,
        "engine": np.array(engine, np.uint8),
    }


def _generator(kind: type, plain: dict):
    state = kind.__new__(kind)
    state.__setstate__((plain["device"], plain["seed"], plain["offset"], plain["engine"].tolist()))
    return state
