"""Reading Paddle's pickled state dicts without running anything that they say.

``paddle.load`` unpickles, and unpickling calls whatever the file names. Here Python's unpickler
follows only the instructions that state dicts need, and the few classes and functions that they
name are stand-ins of this module. What is built stays within the size of the file.

It is the unpickler that Python itself is written in: the one in C takes 32 GB for a memo number of
2**32, hashes nested tuples for years, and its instructions cannot be chosen.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError
from hnas.base.files import reason_of

# A state dict takes about thirty a tensor: of each instruction, and of what follows it.
MAX_READS = 1_000_000
MAX_AXES = 32
MAX_LONG = 17
MAX_SIZE = 2**48
PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")
# Of protocols 2 to 4, without those for other objects, for sets, and for dicts of any keys.
# fmt: off
INSTRUCTIONS = (
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
    "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT",
    "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
)
# fmt: on
PLAIN = (type(None), bool, int, float, str, bytes, np.generic)


class UnsafePickleError(UserError):
    """A checkpoint that is broken, or holds more than arrays, containers and plain values."""


class _RefusedError(Exception):
    """The file asks for something that no state dict needs."""


def load_pickle(path: str | Path, content: bytes):
    """The object that ``paddle.save`` wrote to ``path``, with NumPy arrays for tensors.

    Raises:
        UnsafePickleError: anything else than arrays, dicts, lists, tuples, strings, bytes and
            numbers, or a broken file. Nothing that the file names is executed.
    """
    try:
        if content[:1] != b"\x80":
            raise UnsafePickleError(f"{path} is not a Paddle checkpoint (no pickle header)")
        return _Unpickler(content).load()
    except _RefusedError as error:
        raise UnsafePickleError(f"refused to load {path}: it {error}") from None
    except UnsafePickleError:
        raise
    except Exception as error:
        # A pickle can break its reader in any way; none of them is more than a bad file.
        raise UnsafePickleError(f"cannot read {path}: broken file ({reason_of(error)})") from None


class _BoundedFile:
    """A file that never allocates more than it holds, whatever length the pickle claims."""

    def __init__(self, content: bytes):
        self._file = file = io.BytesIO(content)
        self._size = len(content)
        self._reads = 0
        self.readline = file.readline
        self.tell = file.tell

    def read(self, length: int) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise _RefusedError(f"has more than {MAX_READS} parts")
        content = self._file.read(min(length, self._size - self.tell()))
        if len(content) < length:
            raise ValueError(f"{length} bytes expected, {len(content)} there")
        return content


class _DType:
    """Stands for ``numpy.dtype``: plain booleans, integers and floats only."""

    def __init__(self, name="", *_):
        # Never str(name): of nested tuples that would take forever.
        text = name if isinstance(name, str) else name.decode("ascii")
        if not PLAIN_DTYPE.fullmatch(text):
            raise _RefusedError(f"holds an array of type {text[:20]!r}")
        self.dtype = np.dtype(text)

    def build(self, state) -> None:
        order, *rest = state[1:]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in rest[:3]):
            raise _RefusedError("holds an array of a structured type")
        self.dtype = self.dtype.newbyteorder(order)


def _scalar(stand_in, data):
    if not isinstance(stand_in, _DType) or not isinstance(data, bytes):
        raise _RefusedError("holds a scalar of an unknown type")
    (value,) = np.frombuffer(data, stand_in.dtype)
    return value


def _tensor(pair):
    """``tuple((name, array))``: how Paddle writes a tensor in a nested state."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise _RefusedError("calls tuple on something else than a tensor's name and data")
    return pair


ARRAY_TYPE = object()
"""Stands for the class ``numpy.ndarray``, where only its name is an argument."""


class _Instructions(dict):
    """What follows an instruction, by its code."""

    def __missing__(self, code: int):
        raise _RefusedError(f"uses the pickle instruction {bytes([code])}, unlike state dicts")


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with closed lists of instructions and of names."""

    dispatch = _Instructions(
        (code, pickle._Unpickler.dispatch[code])
        for (code,) in (getattr(pickle, name) for name in INSTRUCTIONS)
    )

    def __init__(self, content: bytes):
        self._bounded = _BoundedFile(content)
        super().__init__(self._bounded)
        self._copied = 0
        self._empty: dict[int, np.ndarray] = {}  # Arrays whose state is still to come.
        self._known = {
            "numpy.ndarray": ARRAY_TYPE,
            "numpy.dtype": _DType,
            # Its content is set afterwards.
            "collections.OrderedDict": lambda: OrderedDict(),
            "_codecs.encode": self._encode,
        }
        for module in ("builtins", "__builtin__"):
            # Protocol 2 writes empty bytes as a call.
            self._known |= {f"{module}.tuple": _tensor, f"{module}.bytes": lambda: b""}
        # NumPy 1 and NumPy 2.
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            self._known[f"{module}._reconstruct"] = self._reconstruct
            self._known[f"{module}.scalar"] = _scalar

    def load(self):
        """The object, once all of it has been looked at."""
        value = super().load()
        if self.stack or self.metastack:
            raise ValueError("more than one value")
        self._check_plain(value)
        return value

    def load_frame(self):
        """A frame says how much to read at once, which is no matter here."""
        self.read(8)

    dispatch[pickle.FRAME[0]] = load_frame

    def load_long1(self):
        """Generators' states have whole numbers of 128 bits, nothing has longer ones."""
        (length,) = self.read(1)
        if length > MAX_LONG:
            raise _RefusedError(f"holds a whole number of {length} bytes")
        self.append(pickle.decode_long(self.read(length)))

    dispatch[pickle.LONG1[0]] = load_long1

    def find_class(self, module, name):
        found = self._known.get(f"{module}.{name}")
        if found is None:
            raise _RefusedError(f"names {f'{module}.{name}'[:100]!r}, which no state dict needs")
        return found

    def load_reduce(self):
        function, arguments = self.stack[-2:]
        # Comparing by identity: what else lies on the stack is data.
        known = any(function is each for each in self._known.values())
        if not known or not isinstance(arguments, tuple):
            raise _RefusedError("calls something that is not a function")
        self.stack[-2:] = [function(*arguments)]

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self):
        state = self.stack.pop()
        unfinished = self.stack[-1]
        if isinstance(unfinished, _DType):
            unfinished.build(state)
        elif id(unfinished) in self._empty:
            self._fill(unfinished, state)
        else:
            raise _RefusedError(f"sets the state of a {type(unfinished).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self):
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set_items(items)

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self):
        self._set_items(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def _set_items(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("values for a dict without one")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing anything else may take forever.
            if not isinstance(key, (str, int)):
                raise _RefusedError("has a dict key that is not text")
            target[key] = value

    def _encode(self, text, encoding):
        """``_codecs.encode``: how protocol 2 writes bytes."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise _RefusedError("holds text in an unknown encoding")
        self._count_copied(len(text))
        return text.encode("latin1")

    def _count_copied(self, size: int) -> None:
        """Copying one remembered text or array again and again would grow without end."""
        self._copied += size
        if self._copied > 2 * self._bounded.tell():
            raise _RefusedError("writes the same bytes many times")

    def _reconstruct(self, kind, shape, code) -> np.ndarray:
        """An array whose shape and content come as its state."""
        if kind is not ARRAY_TYPE or tuple(shape) != (0,):
            raise _RefusedError("builds an array in an unknown way")
        array = np.empty(0, np.uint8)
        self._empty[id(array)] = array
        return array

    def _fill(self, array: np.ndarray, state) -> None:
        _, shape, stand_in, fortran, data = state
        if not isinstance(stand_in, _DType) or not isinstance(data, bytes):
            raise _RefusedError("holds an array of objects")
        if len(shape) > MAX_AXES or any(
            not isinstance(size, int) or not 0 <= size <= MAX_SIZE for size in shape
        ):
            raise ValueError("array of an impossible shape")
        if math.prod(shape) * stand_in.dtype.itemsize != len(data):
            raise ValueError(f"array of shape {shape} with {len(data)} bytes")
        self._count_copied(len(data))
        array.__setstate__((1, tuple(shape), stand_in.dtype, bool(fortran), data))
        del self._empty[id(array)]

    def _check_plain(self, value) -> None:
        """Refuse stand-ins that were left over, wherever they lie."""
        seen, left = set(), [value]
        while left:
            value = left.pop()
            if id(value) in seen or isinstance(value, PLAIN):
                continue
            seen.add(id(value))
            if isinstance(value, dict):
                left += value.values()
            elif isinstance(value, (list, tuple)):
                left += value
            elif not isinstance(value, np.ndarray) or id(value) in self._empty:
                raise ValueError("a value without content")
