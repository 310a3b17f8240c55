"""Reading Paddle's pickled state dicts without running anything that they say.

``paddle.load`` unpickles, and unpickling calls whatever the file names. Here all instructions are
looked at before the first is followed, and only those pass that state dicts need; the few classes
and functions that they name are stand-ins of this module. What is built stays within the size of
the file.

It is the unpickler that Python itself is written in: the one in C takes 32 GB for a memo number of
2**32, and hashes nested tuples for years.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np

from hnas.base.errors import UserError, word_of

# A state dict takes about thirty a tensor.
MAX_INSTRUCTIONS = 1_000_000
MAX_AXES = 32
MAX_LONG = 17
MAX_SIZE = 2**48
PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")
# Of protocols 2 to 4, without those for other objects, for sets, and for dicts of any keys.
INSTRUCTIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_DICT EMPTY_LIST "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE APPEND APPENDS SETITEM SETITEMS MEMOIZE BINPUT "
    "LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD"
)
ALLOWED = frozenset(INSTRUCTIONS.split())


class _RefusedError(Exception):
    """The file asks for something that no state dict needs."""


def load_pickle(path: str | Path, content: bytes):
    """The object that ``paddle.save`` wrote to ``path``, with NumPy arrays for tensors.

    What the file names, but does not call, is a stand-in, which is no array, text or number, and
    an array that it does not fill is empty.

    Raises:
        UserError: anything else than arrays, dicts, lists, tuples, strings, bytes and
            numbers, or a broken file. Nothing that the file names is executed.
    """
    if content[:1] != b"\x80":
        raise UserError(f"{path} is not a Paddle checkpoint (no pickle header)")
    try:
        _check_instructions(content)
        return _Unpickler(content).load()
    except _RefusedError as error:
        raise UserError(f"refused to load {path}: it {error}") from None
    except Exception as error:
        # A pickle can break its reader in any way; none of them is more than a bad file.
        raise UserError(f"cannot read {path}: broken file ({word_of(error)})") from None


def _check_instructions(content: bytes) -> None:
    """Refuse what no state dict uses; a ValueError if the file ends within an instruction."""
    for number, (instruction, value, _) in enumerate(pickletools.genops(content)):
        if instruction.name not in ALLOWED:
            code = instruction.code.encode("latin1")
            raise _RefusedError(f"uses the pickle instruction {code}, unlike state dicts")
        if number > MAX_INSTRUCTIONS:
            raise _RefusedError(f"has more than {MAX_INSTRUCTIONS} parts")
        # Generators' states, in older sets, have whole numbers of 128 bits, nothing longer ones.
        if instruction.name == "LONG1" and value.bit_length() >= 8 * MAX_LONG:
            raise _RefusedError(f"holds a whole number of {value.bit_length() // 8 + 1} bytes")


class _DType:
    """Stands for ``numpy.dtype``: plain booleans, integers and floats only."""

    def __init__(self, name="", *_):
        # Never str(name): of nested tuples that would take forever.
        text = name if isinstance(name, str) else name.decode("ascii")
        if not PLAIN_DTYPE.fullmatch(text):
            raise _RefusedError(f"holds an array of type {text[:20]!r}")
        self.dtype = np.dtype(text)


def _scalar(kind: _DType, data: bytes):
    (value,) = np.frombuffer(data, kind.dtype)
    return value


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with a closed list of names.

    Nothing else on its stack can be called, so calls need no look of their own.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self._may_copy = 2 * len(content)
        self._empty: dict[int, np.ndarray] = {}  # Arrays whose state is still to come.
        self._known = {
            "numpy.ndarray": "numpy.ndarray",  # An argument, which is never called.
            "numpy.dtype": _DType,
            "numpy.core.multiarray._reconstruct": self._reconstruct,
            "numpy.core.multiarray.scalar": _scalar,
            "collections.OrderedDict": lambda: OrderedDict(),  # Its content is set afterwards.
            "_codecs.encode": self._encode,
            "builtins.tuple": lambda pair: pair,  # A tensor's name and array, in a nested state.
            "builtins.bytes": lambda: b"",  # Protocol 2 writes empty bytes as a call.
        }

    def find_class(self, module, name):
        asked = f"{module}.{name}"
        # Of NumPy 2 and of Python 2.
        known = asked.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")
        if known not in self._known:
            raise _RefusedError(f"names {asked[:100]!r}, which no state dict needs")
        return self._known[known]

    def load_build(self):
        state = self.stack.pop()
        unfinished = self.stack[-1]
        if isinstance(unfinished, _DType):
            unfinished.dtype = unfinished.dtype.newbyteorder(state[1])
        elif id(unfinished) in self._empty:
            self._fill(unfinished, state)
        else:
            raise _RefusedError(f"sets the state of a {type(unfinished).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self):
        self._check_keys(*self.stack[-3:-1])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self):
        self._check_keys(self.metastack[-1][-1], *self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def _check_keys(self, target, *keys) -> None:
        # Hashing anything else may take forever, and what arrays make of nested tuples.
        if not isinstance(target, dict) or not all(isinstance(key, (str, int)) for key in keys):
            raise _RefusedError("sets items of no dict, or has a dict key that is not text")

    def _encode(self, text, encoding):
        """``_codecs.encode``: how protocol 2 writes bytes."""
        if encoding not in ("latin1", "latin-1"):
            raise _RefusedError("holds text in an unknown encoding")
        self._count_copied(len(text))
        return text.encode("latin1")

    def _count_copied(self, size: int) -> None:
        """Copying one remembered text or array again and again would grow without end."""
        self._may_copy -= size
        if self._may_copy < 0:
            raise _RefusedError("writes the same bytes many times")

    def _reconstruct(self, *_) -> np.ndarray:
        """An array whose shape and content come as its state."""
        array = np.empty(0, np.uint8)
        self._empty[id(array)] = array
        return array

    def _fill(self, array: np.ndarray, state) -> None:
        _, shape, kind, fortran, data = state
        if len(shape) > MAX_AXES or not all(0 <= size <= MAX_SIZE for size in shape):
            raise ValueError("array of an impossible shape")
        if math.prod(shape) * kind.dtype.itemsize != len(data):
            raise ValueError(f"array of shape {shape} with {len(data)} bytes")
        self._count_copied(len(data))
        array.__setstate__((1, tuple(shape), kind.dtype, bool(fortran), data))
        del self._empty[id(array)]
