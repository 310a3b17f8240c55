"""Reading Paddle's pickled state dicts without running anything that they say.

``paddle.load`` unpickles, and unpickling calls whatever the file names. Here a small machine
reads the pickle's own instructions instead. It knows those that Paddle's state dicts need, and
of the classes and functions that a pickle may name it knows a handful, each by a stand-in of
this module. Python's unpickler never sees the file, and what is built stays within the size of
the file: arrays are views of its bytes.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError

PROTOCOLS = (2, 3, 4)
# A state dict takes about twenty instructions a tensor.
MAX_INSTRUCTIONS = 500_000
MAX_AXES = 32
MAX_SIZE = 2**48


class UnsafePickleError(UserError):
    """A checkpoint that is broken, or holds more than arrays, containers and plain values."""


class _RefusedError(Exception):
    """The file asks for something that no state dict needs."""


class _BrokenError(Exception):
    """The file is no whole and well-formed pickle of a state dict."""


def load_pickle(path: str | Path):
    """The object that ``paddle.save`` wrote to ``path``, with NumPy arrays for tensors.

    Arrays are read-only views of the file's content.

    Raises:
        UnsafePickleError: anything else than arrays, dicts, lists, tuples, strings, bytes and
            numbers, or a broken file. Nothing that the file names is executed.
    """
    try:
        with open(path, "rb") as file:
            if file.read(1) != b"\x80":
                raise UnsafePickleError(f"{path} is not a Paddle checkpoint (no pickle header)")
            file.seek(0)
            return _Machine().run(_BoundedFile(file))
    except _RefusedError as error:
        raise UnsafePickleError(f"refused to load {path}: it {error}") from None
    except OSError as error:
        raise UnsafePickleError(f"cannot read {path}: {error.strerror or error}") from None
    except UnsafePickleError:
        raise
    except Exception as error:
        # A pickle can break its reader in any way; none of them is more than a bad file.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsafePickleError(f"cannot read {path}: broken file ({reason})") from None


class _BoundedFile:
    """A file that never allocates more than it holds, whatever length the pickle claims."""

    def __init__(self, file):
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.readline = file.readline
        self.tell = file.tell

    def read(self, length: int) -> bytes:
        return self._file.read(min(length, self._size - self._file.tell()))


class _DType:
    """Stands for ``numpy.dtype``: plain booleans, integers and floats only."""

    def __init__(self, name="", *_):
        text = name.decode("ascii") if isinstance(name, bytes) else str(name)
        if not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", text):
            raise _RefusedError(f"holds an array of type {text[:20]!r}")
        self.name = text

    def build(self, state):
        order, *rest = state[1:]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in rest[:3]):
            raise _RefusedError("holds an array of a structured type")
        self.name = order + self.name.lstrip("<>|=")
        return self


class _Array:
    """Stands for a ``numpy.ndarray`` whose state is still to come."""

    def __init__(self):
        self.memo_numbers: list[int] = []

    def build(self, state) -> np.ndarray:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise _RefusedError("holds an array of objects")
        if len(shape) > MAX_AXES or any(
            not isinstance(size, int) or not 0 <= size <= MAX_SIZE for size in shape
        ):
            raise _BrokenError("array of an impossible shape")
        plain = np.dtype(dtype.name)
        if math.prod(shape) * plain.itemsize != len(data):
            raise _BrokenError(f"array of shape {shape} with {len(data)} bytes")
        return np.frombuffer(data, dtype=plain).reshape(shape, order="F" if fortran else "C")


class _ArrayType:
    """Stands for the class ``numpy.ndarray`` where only its name is an argument."""


def _reconstruct(kind, shape, code):
    if kind is not _ArrayType or tuple(shape) != (0,):
        raise _RefusedError("builds an array in an unknown way")
    return _Array()


def _scalar(dtype, data):
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise _RefusedError("holds a scalar of an unknown type")
    (value,) = np.frombuffer(data, dtype=np.dtype(dtype.name))
    return value


def _encode(text, encoding):
    """``_codecs.encode``: how protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError("holds text in an unknown encoding")
    return text.encode("latin1")


def _no_bytes():
    """``bytes()``: how protocol 2 writes empty bytes."""
    return b""


def _tensor(pair):
    """``tuple((name, array))``: how Paddle writes a tensor in a nested state."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise _RefusedError("calls tuple on something else than a tensor's name and data")
    return pair


_KNOWN = {
    "numpy ndarray": _ArrayType,
    "numpy dtype": _DType,
    "collections OrderedDict": OrderedDict,
    "_codecs encode": _encode,
}
for _module in ("builtins", "__builtin__"):
    _KNOWN[f"{_module} tuple"] = _tensor
    _KNOWN[f"{_module} bytes"] = _no_bytes
# NumPy 1 and NumPy 2.
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _KNOWN[f"{_module} _reconstruct"] = _reconstruct
    _KNOWN[f"{_module} scalar"] = _scalar

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
# Instructions that put the value that follows them on the stack.
# fmt: off
_VALUES = frozenset((
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
))
# fmt: on
_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, np.ndarray)
_MARK = object()


class _Machine:
    """The pickle machine, as far as state dicts need it: a stack and a memo of earlier values."""

    def __init__(self):
        self.stack: list = []
        self.memo: dict[int, object] = {}
        self.encoded = 0

    def run(self, file: _BoundedFile):
        """Follow the instructions to the end; gives the object on the stack."""
        for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
            if count > MAX_INSTRUCTIONS:
                raise _RefusedError(f"has more than {MAX_INSTRUCTIONS} instructions")
            if instruction.name == "STOP":
                break
            self.follow(instruction.name, argument, file)
        (value,) = self.stack
        _check_plain(value)
        return value

    def follow(self, name: str, argument, file: _BoundedFile) -> None:
        """One instruction, by its name in ``pickletools``."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            stack[-length:] = [tuple(self.top(length))]
        elif name == "TUPLE":
            stack.append(tuple(self.pop_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.pop_mark()
            self.target(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.pop_mark()
            self.set_items(self.target(dict), items)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self.remember(len(self.memo) if name == "MEMOIZE" else argument, stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(_known(argument))
        elif name == "STACK_GLOBAL":
            module, attribute = self.pop(2)
            stack.append(_known(f"{module} {attribute}"))
        elif name == "REDUCE":
            function, arguments = self.pop(2)
            stack.append(self.call(function, arguments, file))
        elif name == "BUILD":
            self.build(stack.pop())
        elif name == "PROTO":
            if argument not in PROTOCOLS:
                raise _BrokenError(f"pickle protocol {argument}; 2 to 4 are read")
        elif name in ("PERSID", "BINPERSID"):
            raise _RefusedError("refers to objects outside the file")
        elif name != "FRAME":
            raise _RefusedError(f"uses the pickle instruction {name}, which no state dict needs")

    def top(self, number: int) -> list:
        if len(self.stack) < number:
            raise _BrokenError("value missing")
        return self.stack[-number:]

    def pop(self, number: int) -> list:
        values = self.top(number)
        del self.stack[-number:]
        return values

    def pop_mark(self) -> list:
        """The values above the last mark, which goes too."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def target(self, kind: type):
        """The container on top of the stack, which the values just popped go into."""
        if not isinstance(self.stack[-1], kind):
            raise _BrokenError(f"values for a {kind.__name__} without one")
        return self.stack[-1]

    def remember(self, number: int, value) -> None:
        self.memo[number] = value
        if isinstance(value, _Array):
            value.memo_numbers.append(number)

    def set_items(self, target: dict, items: list) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing anything else may take forever.
            if not isinstance(key, (str, int)):
                raise _RefusedError("has a dict key that is not text")
            target[key] = value

    def call(self, function, arguments, file: _BoundedFile):
        # Only known names come from ``_known``; what else lies on the stack is data.
        if not isinstance(arguments, tuple) or not any(function is f for f in _KNOWN.values()):
            raise _RefusedError("calls something that is not a function")
        if function in (_ArrayType, OrderedDict) and arguments:
            raise _RefusedError("builds a container in an unknown way")
        value = function(*arguments)
        if function is _encode:
            # Encoding one remembered text again and again would grow without end.
            self.encoded += len(value)
            if self.encoded > file.tell():
                raise _RefusedError("writes the same bytes many times")
        return value

    def build(self, state) -> None:
        unfinished = self.stack.pop()
        if not isinstance(unfinished, (_Array, _DType)):
            raise _RefusedError(f"sets the state of a {type(unfinished).__name__}")
        finished = unfinished.build(state)
        self.stack.append(finished)
        if isinstance(unfinished, _Array):
            self.memo.update(dict.fromkeys(unfinished.memo_numbers, finished))


def _known(name: str):
    if name not in _KNOWN:
        shown = name.replace(" ", ".", 1)[:100]
        raise _RefusedError(f"names {shown!r}, which no state dict needs")
    return _KNOWN[name]


def _check_plain(value) -> None:
    """Refuse stand-ins that were left over, wherever they lie."""
    seen, left = set(), [value]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
        else:
            raise _BrokenError("a value without content")
