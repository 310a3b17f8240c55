"""Malicious and broken pickles are refused with nothing executed; honest ones load as they are."""

from __future__ import annotations

import os
import pickle
import time
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hnas.base.errors import UserError
from hnas.base.safe_pickle import load_pickle


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def text(value) -> bytes:
    """The instruction that puts a string on the stack (BINUNICODE)."""
    encoded = str(value).encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


# Each creates the file ``marker`` when Python's own unpickler reads it. A refusal names what comes
# before the comma.
LIVE = {
    f"{os.system.__module__}.system": lambda m: pickle.dumps(Call(os.system, f"touch '{m}'"), 4),
    "builtins.eval": lambda m: pickle.dumps(Call(eval, f"open({str(m)!r}, 'w')"), 4),
    "__builtin__.exec": lambda m: pickle.dumps(Call(exec, f"open({str(m)!r}, 'w')"), 2),
    "an array of type 'O8', with a call": lambda m: pickle.dumps(
        np.array([Call(os.system, f"touch '{m}'")], dtype=object), 4
    ),
    "instruction b'i'": lambda m: b"\x80\x02(" + text(f"touch '{m}'") + b"ios\nsystem\n.",
    "numpy.load": lambda m: (
        b"\x80\x02cnumpy\nload\ncbuiltins\nopen\n" + text(m) + text("w") + b"\x86R\x85R."
    ),
}


@pytest.fixture
def load(tmp_path):
    """Load the bytes of a file."""

    def load(content: bytes):
        return load_pickle(tmp_path / "weights.pdparams", content)

    return load


@pytest.mark.parametrize("name", LIVE)
def test_nothing_is_executed(name, tmp_path, load):
    marker = tmp_path / "executed"
    content = LIVE[name](marker)
    with pytest.raises(UserError, match="^refused to load") as caught:
        load(content)
    assert name.partition(",")[0] in str(caught.value)
    assert not marker.exists()

    # The payload does work where it is allowed to.
    try:
        pickle.loads(content)
    except Exception as error:
        assert not isinstance(error, FileNotFoundError)
    assert marker.exists()


def array_claiming(shape: tuple, data: bytes) -> bytes:
    """A pickled float32 array of ``shape`` with ``data`` as its content."""
    honest = pickle.dumps(np.zeros(1, np.float32), 2)
    sizes = b"".join(b"\x8a\x08" + size.to_bytes(8, "little", signed=True) for size in shape)
    honest = honest.replace(b"K\x01\x85", b"(" + sizes + b"t")
    return honest.replace(text("\0\0\0\0"), text(data.decode("latin1")))


def repeated_encoding(length: int, times: int) -> bytes:
    once = b"h\x01h\x02" + text("latin1") + b"\x86Ra"
    return b"\x80\x02c_codecs\nencode\nq\x01" + text("a" * length) + b"q\x02]" + once * times + b"."


def arrays_of_one_content(times: int) -> bytes:
    """In an order of bytes that has to be changed, which takes a copy."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b")
    shape = b"J" + (2**16).to_bytes(4, "little") + b"\x85"
    array += b"\x87R(K\x01" + shape + b"cnumpy\ndtype\n" + text(">f4") + b"\x85R\x89h\x01tba"
    content = b"B" + (2**18).to_bytes(4, "little") + bytes(2**18) + b"q\x01a"
    return b"\x80\x03]" + content + array * times + b"."


NESTED = b"K\x01" + b"q\x01h\x01\x86" * 100
# Broken ones, and small ones that ask for gigabytes, or for years; and why they are refused.
REFUSED = {
    "empty": (b"", "no pickle header"),
    "PyTorch's zip": (b"PK\x03\x04" + bytes(100), "no pickle header"),
    "protocol 5": (pickle.dumps({"a": np.ones(3)}, 5), "instruction b'\\x96'"),
    "protocol 77": (b"\x80\x4d}.", "77"),
    "truncated array": (pickle.dumps({"a": np.ones(1000)}, 4)[:-500], "expected 8000 bytes"),
    "mark in a container": (b"\x80\x02](a.", "broken file"),
    "call of a string": (b"\x80\x02X\x01\x00\x00\x00a)R.", "not callable"),
    "state of a list": (b"\x80\x02]]b.", "sets the state of a list"),
    "structured array": (pickle.dumps(np.zeros(3, [("a", "f4"), ("b", "O")]), 4), "'V12'"),
    "bytes of 2**60": (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc.", "expected"),
    "a key of 600 digits": (b"\x80\x02}\x8a\xff" + bytes([1] * 255) + b"K\x01s.", "of 255 bytes"),
    "a key of 4,300 digits": (pickle.dumps({10**4300: 1}, protocol=2), "instruction b'\\x8b'"),
    "array of 2**40": (array_claiming((2**40,), b"\0\0\0\0"), "with 4 bytes"),
    "array of a negative size": (array_claiming((-1, -1), b"\0\0\0\0"), "impossible shape"),
    "array of many axes": (array_claiming((1,) * 100, b"\0\0\0\0"), "impossible shape"),
    "empty array of 2**62": (array_claiming((0, 2**62), b""), "impossible shape"),
    "one text encoded over and over": (repeated_encoding(10**5, 10**4), "many times"),
    "one content of many arrays": (arrays_of_one_content(3000), "many times"),
    "hashing nested tuples": (b"\x80\x02}" + NESTED + b"K\x01s.", "key that is not text"),
    "a type of nested tuples": (b"\x80\x02cnumpy\ndtype\n" + NESTED + b"\x85R.", "'decode'"),
    "an order of nested tuples": (
        b"\x80\x02cnumpy\ndtype\n" + text("f4") + b"\x85R(K\x03" + NESTED + b"tb.",
        "broken file",
    ),
    "an array of nested tuples": (
        pickle.dumps(np.ones(3), 2)[:-1] + b"K\x00" + NESTED + b"s.",
        "items of no dict",
    ),
    "many instructions": (b"\x80\x02" + b"}" * 1_010_000 + b".", "1000000 parts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line_and_costs_little(name, load):
    content, reason = REFUSED[name]
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(UserError) as caught:
            load(content)
        seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert reason in message and "\n" not in message and "weights.pdparams" in message
    assert peak < 400 * 2**20
    assert seconds < 60


def test_large_claims_and_deep_nests_cost_nothing(load):
    # Python's unpickler allocates up to a memo's number, 32 GB here.
    assert load(b"\x80\x02}r\xff\xff\xff\xff.") == {}
    assert load(b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"}.") == {}  # a frame
    assert load(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


def layouts(state: dict) -> dict[str, bytes]:
    """The same state as NumPy 1 and NumPy 2 would pickle it, in each protocol."""
    found = {}
    for protocol in (2, 3):
        # These two name modules in lines, so that the other NumPy's name can be put in.
        content = pickle.dumps(state, protocol)
        found[f"numpy 1, {protocol}"] = content.replace(b"numpy._core.", b"numpy.core.")
        found[f"numpy 2, {protocol}"] = content.replace(b"numpy.core.", b"numpy._core.")
    found["4"] = pickle.dumps(state, 4)
    return found


STATE = OrderedDict(
    {
        "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "half": np.ones(3, np.float16),
        "big end": np.arange(3, dtype=">i4"),
        "scalar": np.float32(0.1),
        "zero axes": np.array(7, np.int64),
        "empty": np.zeros((0, 5), np.float32),
        "twice": [np.ones(5, np.float32)] * 2,
        "flags": np.array([True, False]),
        "StructuredToParameterName@@": {"weight": "conv2d_0.w_0"},
        "LR_Scheduler": {"last_epoch": 3, "last_lr": np.float64(0.25)},
        "plain": [None, True, -1, 2**70, 0.5, "é", b"\x00\xff", (1, (2, "x"))],
    }
)


@pytest.mark.parametrize("layout", layouts(STATE))
def test_honest_states_load_as_python_loads_them(layout, load):
    found, expected = load(layouts(STATE)[layout]), pickle.loads(pickle.dumps(STATE, 4))
    np.testing.assert_equal(found, expected)
    # Types, orders and digits, too; without what is remembered, which the two do not share alike.
    assert list(map(repr, found.items())) == list(map(repr, expected.items()))


@st.composite
def damaged(draw) -> bytes:
    """An honest state with other bytes in a few places, or noise."""
    if draw(st.booleans()):
        return b"\x80\x04" + draw(st.binary(max_size=200)) + b"."
    content = bytearray(pickle.dumps(STATE, draw(st.sampled_from([2, 4]))))
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged())
def test_damage_anywhere_is_refused_or_harmless(content, load):
    try:
        load(content)
    except UserError as error:
        assert "\n" not in str(error)
