"""Reading Paddle's pickled state dicts without running anything that they say.

``paddle.load`` unpickles, and unpickling calls whatever the file names. Here only the names that
Paddle's own state dicts hold are known, and each stands for a class of this module that checks
what it is given: not even NumPy's own constructors see the file's bytes before that.
"""

from __future__ import annotations

import collections
import math
import pickle
import re
from pathlib import Path

import numpy as np

from hnas.utils.errors import UserError


class UnsafePickleError(UserError):
    """A checkpoint that is broken, or holds more than arrays, containers and plain values."""


class _DType:
    """Stands for ``numpy.dtype``: plain booleans, integers and floats only."""

    def __init__(self, name="", *_):
        text = name.decode("ascii") if isinstance(name, bytes) else str(name)
        if not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", text):
            raise pickle.UnpicklingError(f"array of type {text[:20]!r}")
        self.name = text

    def __setstate__(self, state):
        order, *rest = state[1:]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in rest[:3]):
            raise pickle.UnpicklingError("array of a structured type")
        self.name = order + self.name.lstrip("<>|=")


class _Array:
    """Stands for ``numpy.ndarray`` while its pickled state is checked."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("array without plain data")
        plain = np.dtype(dtype.name)
        if any(not isinstance(size, int) or size < 0 for size in shape):
            raise pickle.UnpicklingError("array of a negative size")
        if math.prod(shape) * plain.itemsize != len(data):
            raise pickle.UnpicklingError(f"array of shape {shape} with {len(data)} bytes")
        order = "F" if fortran else "C"
        self.value = np.frombuffer(data, dtype=plain).reshape(shape, order=order).copy()


class _ArrayType:
    """Stands for the class ``numpy.ndarray`` where only its name is an argument."""


def _reconstruct(kind, shape, code):
    if kind is not _ArrayType or tuple(shape) != (0,):
        raise pickle.UnpicklingError("array built in an unknown way")
    return _Array()


def _scalar(dtype, data):
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("scalar without plain data")
    return np.frombuffer(data, dtype=np.dtype(dtype.name), count=1)[0]


def _encode(text, encoding):
    """``_codecs.encode``: how protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("text in an unknown encoding")
    return text.encode("latin1")


def _tuple(items=()):
    if not isinstance(items, (tuple, list)):
        raise pickle.UnpicklingError("tuple of something else than a list")
    return tuple(items)


_KNOWN = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _DType,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("builtins", "tuple"): _tuple,
    ("__builtin__", "tuple"): _tuple,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _KNOWN[_module, "_reconstruct"] = _reconstruct
    _KNOWN[_module, "scalar"] = _scalar


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _KNOWN:
            raise UnsafePickleError(f"names {module}.{name}, which no state dict needs")
        return _KNOWN[module, name]

    def persistent_load(self, pid):
        raise UnsafePickleError("refers to objects outside the file")


def load_pickle(path: str | Path):
    """The object that ``paddle.save`` wrote to ``path``, with NumPy arrays for tensors.

    Raises:
        UnsafePickleError: anything else than arrays, dicts, lists, tuples, strings, bytes and
            numbers, or a broken file. Nothing that the file names is executed.
    """
    with open(path, "rb") as file:
        if file.read(1) != b"\x80":
            raise UnsafePickleError(f"{path} is not a Paddle checkpoint (no pickle header)")
        file.seek(0)
        try:
            return _plain(_Unpickler(file).load(), {})
        except UnsafePickleError as error:
            raise UnsafePickleError(f"refused to load {path}: it {error}") from None
        except RecursionError:
            raise UnsafePickleError(f"refused to load {path}: it is nested too deep") from None
        except Exception as error:
            # A pickle can make its reader fail in any way; none of them is more than a bad file.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnsafePickleError(f"cannot read {path}: broken file ({reason})") from None


def _plain(value, seen: dict[int, object]):
    """Replace the stand-ins by arrays; refuse containers that hold themselves."""
    if id(value) in seen:
        result = seen[id(value)]
        if result is None:
            raise pickle.UnpicklingError("container that holds itself")
        return result
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        return value
    seen[id(value)] = None
    if isinstance(value, _Array):
        result = value.value
    elif isinstance(value, dict):
        result = {_plain_key(key): _plain(item, seen) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        result = type(value)(_plain(item, seen) for item in value)
    else:
        raise pickle.UnpicklingError("object of an unknown type")
    seen[id(value)] = result
    return result


def _plain_key(key):
    if not isinstance(key, (str, int)):
        raise pickle.UnpicklingError("dict key that is not text")
    return key
