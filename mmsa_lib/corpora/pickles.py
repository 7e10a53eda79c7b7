"""Open pickles of public feature files without running anything that is in them.

A pickle is a program. This reader admits numpy arrays, numpy scalars and plain
containers; any other global is refused by name before it is looked up. Even the
admitted numpy globals are not numpy's own: a crafted dtype state can make numpy treat
raw bytes as object pointers, so arrays are rebuilt here from checked parts. From a
.npz only plain arrays are read.
"""

from __future__ import annotations

import collections
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsa_lib.errors import CorpusError
from mmsa_lib.files import sha256_of

# what numpy raises for a file that is no .npz; a TypeError for a lone .npy
_DAMAGED = (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


class _Refused(pickle.UnpicklingError):
    pass


class _Dtype:
    """Stands for numpy.dtype while unpickling: plain kinds only, no fields."""

    __slots__ = ("value",)
    __hash__ = None

    def __init__(self, code):
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not re.fullmatch(r"[biufc?SUO]\d*", code):
            raise _Refused(f"an array of dtype {code!r}")
        self.value = np.dtype("O" if code[0] == "O" else code)

    def __setstate__(self, state):
        _, order, subdtype, names, fields, size, *_ = state
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if subdtype or names or fields or size not in (-1, self.value.itemsize):
            raise _Refused("an array of a structured dtype")
        if order in ("<", ">"):
            self.value = self.value.newbyteorder(order)


class _Array:
    """Stands for an ndarray whose contents arrive by a later BUILD instruction."""

    __slots__ = ("value",)
    __hash__ = None

    def __init__(self):
        self.value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data, dtype: _Dtype, shape, order="C") -> np.ndarray:
    if type(dtype) is not _Dtype:
        raise _Refused(f"an array whose dtype is a {type(dtype).__name__}")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if dtype.value.hasobject:
        if type(data) is not list or len(data) != math.prod(shape):
            raise _Refused("an object array made of raw bytes")
        flat = np.empty(len(data), dtype=object)
        for i, item in enumerate(data):
            flat[i] = item
    else:
        data = data.encode("latin1") if isinstance(data, str) else data
        flat = np.frombuffer(data or b"", dtype.value)
    return flat.reshape(shape, order=order)


# Instances without a __dict__ (every subclass needs __slots__ too): a BUILD instruction
# cannot set anything on them, as it could on a function or on a class of ours.
class _Maker:
    __slots__ = ()


class _Ndarray(_Maker):
    """The class argument of `_reconstruct`; never called itself."""

    __slots__ = ()


class _MakeDtype(_Maker):
    __slots__ = ()

    def __call__(self, code, align=False, copy=False):
        return _Dtype(code)


class _Reconstruct(_Maker):
    __slots__ = ()

    def __call__(self, kind, shape, code):
        if not isinstance(kind, _Ndarray):
            raise _Refused("an array of an unknown subclass")
        return _Array()


class _FromBuffer(_Maker):
    __slots__ = ()

    def __call__(self, data, dtype, shape, order, axis_order=None):
        if order == "K" and axis_order is not None:
            return _array(data, dtype, shape).transpose(axis_order)
        return _array(data, dtype, shape, order)


class _Scalar(_Maker):
    __slots__ = ()

    def __call__(self, dtype, data):
        return _array(data, dtype, (1,))[0]


class _Encode(_Maker):
    """`_codecs.encode`, as protocol 2 writes bytes; other codecs run other code."""

    __slots__ = ()

    def __call__(self, text, encoding):
        if encoding not in ("latin1", "latin-1"):
            raise _Refused(f"bytes in encoding {encoding!r}")
        return text.encode("latin1")


class _EmptyBytes(_Maker):
    """`bytes()`, as protocols 0 to 2 write b""."""

    __slots__ = ()

    def __call__(self):
        return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Ndarray(),
    ("numpy", "dtype"): _MakeDtype(),
    ("_codecs", "encode"): _Encode(),
    ("collections", "OrderedDict"): collections.OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Reconstruct()
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _Scalar()
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _FromBuffer()
for _builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    _ALLOWED[_builtins, "bytes"] = _EmptyBytes()
    _ALLOWED[_builtins, "set"] = set
    _ALLOWED[_builtins, "frozenset"] = frozenset


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"the global {module}.{name}") from None

    def persistent_load(self, pid):
        raise _Refused("a reference to an object outside the file")


def load_pickle(
    path: str | Path, *, encoding: str = "ASCII", sha256: str | None = None
) -> Any:
    """Read a pickle of numpy arrays and containers; arrays are read-only views.

    Pickles written by Python 2 need ``encoding="latin1"``. With `sha256` the file is
    compared before its first byte is interpreted. Raises `CorpusError` for another
    hash, a damaged file and every global that is not admitted, which it names.
    """
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"there is no file {path}")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise CorpusError(
            f"{path} has sha256 {found}, expected {sha256}: it is not the published "
            "file. It was not opened; download it again."
        )
    try:
        with path.open("rb") as file:
            return _plain(_Unpickler(file, encoding=encoding).load(), {})
    except _Refused as error:
        raise CorpusError(
            f"{path} holds {error}, which is neither a numpy array nor a plain "
            "container. It was refused and not executed. If you trust the file, open "
            "it where it was made and save the arrays with numpy.savez."
        ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} holds Python 2 strings: pass encoding='latin1'"
        ) from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CorpusError(
            f"{path} is not a whole pickle ({type(error).__name__}: {error}). Download "
            "it again and compare its sha256."
        ) from error


def load_npz(
    path: str | Path, wanted: Sequence[str], expected: str
) -> dict[str, np.ndarray]:
    """The `wanted` arrays of a .npz; `expected` says what the file should have been.

    Pickled objects are not opened. Raises `CorpusError` for them, for arrays that are
    not there and for a damaged file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            lacking = [name for name in wanted if name not in file.files]
            if not lacking:
                return {name: file[name] for name in wanted}
            there = file.files
    except _DAMAGED as error:
        raise CorpusError(
            f"{path} is not a .npz of plain arrays ({error}). Pickled object arrays "
            "are not opened: save strings with a fixed width (numpy.array(x, "
            "dtype=str)) and numbers as numbers."
        ) from error
    raise CorpusError(
        f"{path} lacks the arrays {', '.join(lacking)}; it has {', '.join(there)}. "
        f"Expected {expected}"
    )


def _plain(x: Any, seen: dict[int, Any]) -> Any:
    """Replace stand-ins by arrays and dtypes, inside containers too."""
    if type(x) in (str, bytes, int, float, bool, complex, type(None)):
        return x
    if id(x) in seen:
        return seen[id(x)][1]
    if isinstance(x, _Dtype):
        return x.value
    if isinstance(x, _Array):
        if x.value is None:
            raise _Refused("an array without contents")
        array = x.value
        seen[id(x)] = x, array  # keeping x keeps its id from being used again
        return _plain_items(array, seen)
    if isinstance(x, np.ndarray):
        seen[id(x)] = x, x
        return _plain_items(x, seen)
    if isinstance(x, list):
        seen[id(x)] = x, x
        x[:] = [_plain(item, seen) for item in x]
    elif isinstance(x, dict):
        seen[id(x)] = x, x
        for key, value in list(dict.items(x)):
            dict.__setitem__(x, key, _plain(value, seen))
    elif isinstance(x, tuple):
        return tuple(_plain(item, seen) for item in x)
    elif isinstance(x, _Maker | type):
        raise _Refused(f"a bare reference to {x!r}")
    return x


def _plain_items(array: np.ndarray, seen: dict[int, Any]) -> np.ndarray:
    if array.dtype.hasobject:
        for i, item in enumerate(array.flat):
            array.flat[i] = _plain(item, seen)
    return array
