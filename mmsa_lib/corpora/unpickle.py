"""Open one pickle without running anything that is in it, and describe what it holds.

A pickle is a program. This module runs in a process of its own, which
`mmsa_lib.corpora.pickles.load_pickle` starts with limits on memory and time. It scans
the instructions, admits numpy arrays, numpy scalars and plain containers, and refuses
any other global by name before it is looked up. Even the admitted numpy globals are not
numpy's own: a crafted dtype state can make numpy treat raw bytes as object pointers, so
arrays are rebuilt here from checked parts. What comes out is checked once more, type by
type, and written as JSON lines and raw bytes.
"""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pickle
import pickletools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np

MAX_DEPTH = 1000  # containers within each other
MAX_PARTS = 10**8  # of a tuple of tuples, counted as often as they occur in it
SLACK = 1 << 20  # bytes of arrays that a file may hold beyond its own size


class Refused(pickle.UnpicklingError):
    """The file holds what is neither an array nor a plain container."""


class TooMuch(pickle.UnpicklingError):
    """The file asks for more depth, memory or time than an honest one of its size."""


# ----------------------------------------------------------------- the scan

_OPCODES = {op.code.encode("latin1"): op for op in pickletools.opcodes}
_FORBIDDEN = {
    "PERSID": "a reference to an object outside the file",
    "BINPERSID": "a reference to an object outside the file",
    "EXT1": "a reference to the extension registry",
    "EXT2": "a reference to the extension registry",
    "EXT4": "a reference to the extension registry",
    "NEXT_BUFFER": "an array whose contents lie outside the file",
    "READONLY_BUFFER": "an array whose contents lie outside the file",
}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_NEW = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_AS_TEXT = {"PUT", "GET"}
_LEAVES = {
    op.name for op in pickletools.opcodes if op.stack_after and not op.stack_before
} - {"MARK", *_NEW, *_GETS}
_LEAF = [0, 1]


def scan(file: BinaryIO) -> None:
    """Read every instruction of a pickle up to its end, and execute none.

    Raises `Refused` for an instruction that reaches outside the file, `TooMuch` for
    containers nested too deep, shared tuples that multiply and a memo index that no
    writer gives, and `ValueError` for a file that is cut off or no pickle.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    machine = _Machine()
    for op, argument in _instructions(file, size):
        if op.name in _FORBIDDEN:
            raise Refused(_FORBIDDEN[op.name])
        if op.name in ("GLOBAL", "INST"):
            _admitted(*argument.decode("utf-8", "replace").split("\n")[:2])
        machine.do(op, argument, file.tell())


def _instructions(file: BinaryIO, size: int) -> Iterator[tuple[Any, bytes]]:
    """The instructions with the bytes of those arguments that say a number."""
    op = None
    while op is None or op.name != "STOP":
        code = file.read(1)
        if not code:
            raise ValueError("the file ends before its STOP instruction")
        op = _OPCODES.get(code)
        if op is None:
            raise ValueError(f"{code!r} is no instruction of a pickle")
        yield op, b"" if op.arg is None else _argument(file, op, size)


def _argument(file: BinaryIO, op, size: int) -> bytes:
    """The argument; only its length is looked at where it has one."""
    kind = op.arg.n
    if kind == pickletools.UP_TO_NEWLINE:
        lines = file.readline()
        if op.arg.name == "stringnl_noescape_pair":
            lines += file.readline()
        if not lines.endswith(b"\n"):
            raise ValueError(f"the file ends within {op.name}")
        return lines
    if kind >= 0:
        found = file.read(kind)
        if len(found) < kind:
            raise ValueError(f"the file ends within {op.name}")
        if op.name == "FRAME":
            _stay_within(file, op, int.from_bytes(found, "little"), size)
        return found
    length = int.from_bytes(file.read(_LENGTH_BYTES[kind]), "little")
    file.seek(_stay_within(file, op, length, size))
    return b""


def _stay_within(file: BinaryIO, op, length: int, size: int) -> int:
    """The place `length` bytes on; `ValueError` if it is beyond the file."""
    end = file.tell() + length
    if end > size:
        raise ValueError(
            f"{op.name} announces {length} bytes and the file ends {end - size} sooner"
        )
    return end


class _Machine:
    """The stack of an unpickler that keeps of each value [depth, parts] only.

    `parts` counts tuples within tuples as often as they occur: as many steps does it
    take to hash one.
    """

    def __init__(self):
        self.stack: list[list[int]] = []
        self.marks: list[int] = []
        self.memo: dict[int, list[int]] = {}

    def do(self, op, argument: bytes, place: int) -> None:
        name, stack = op.name, self.stack
        if name in _LEAVES:
            stack.append(_LEAF)
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _NEW:
            stack.append([1, 1])
        elif name in _PUTS:
            self._put(_index(name, argument), place)
        elif name in _GETS:
            stack.append(self.memo[_index(name, argument)])
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP" and self.marks and self.marks[-1] == len(stack):
            self.marks.pop()
        elif op.stack_before:
            self._combine(op)

    def _put(self, index: int, place: int) -> None:
        if index > place:  # writers count them, and each takes two bytes or more
            raise TooMuch(f"a memo index of {index} within its first {place} bytes")
        self.memo[index] = self.stack[-1]

    def _combine(self, op) -> None:
        taken = self._take(op)
        deepest = max((depth for depth, _ in taken), default=-1)
        if op.name in _FILLS:
            made = self.stack[-1]
            if made is _LEAF:  # which all share
                made = self.stack[-1] = [0, 1]
            made[0] = max(made[0], 1 + deepest)
        elif op.stack_after:
            made = [1 + deepest, 1]
            if op.name.startswith("TUPLE"):
                made[1] += sum(parts for _, parts in taken)
            self.stack.append(made)
        else:
            return
        if made[0] > MAX_DEPTH:
            raise TooMuch(f"containers nested more than {MAX_DEPTH} deep")
        if made[1] > MAX_PARTS:
            raise TooMuch(f"shared tuples that stand for more than {MAX_PARTS} parts")

    def _take(self, op) -> list[list[int]]:
        """Take from the stack what an instruction uses; what it fills stays there."""
        if pickletools.markobject in op.stack_before:
            start = self.marks.pop()
        else:
            start = len(self.stack) - len(op.stack_before) + (op.name in _FILLS)
        if start < 0:
            raise ValueError(f"{op.name} lacks what it works on")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken


def _index(name: str, argument: bytes) -> int:
    return int(argument) if name in _AS_TEXT else int.from_bytes(argument, "little")


# ----------------------------------------------------------------- stand-ins


class _Dtype:
    """Stands for numpy.dtype while unpickling: plain kinds only, no fields."""

    __slots__ = ("value",)
    __hash__ = None

    def __init__(self, code):
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not re.fullmatch(r"[biufc?SUO]\d*", code):
            raise Refused(f"an array of dtype {code!r}")
        try:
            self.value = np.dtype("O" if code[0] == "O" else code)
        except (TypeError, ValueError) as error:
            raise Refused(f"an array of dtype {code!r}") from error

    def __setstate__(self, state):
        _, order, subdtype, names, fields, size, *_ = state
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if subdtype or names or fields or size not in (-1, self.value.itemsize):
            raise Refused("an array of a structured dtype")
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
        raise Refused(f"an array whose dtype is a {type(dtype).__name__}")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise Refused("an array whose shape is not made of whole numbers")
    if dtype.value.hasobject:
        if type(data) is not list or len(data) != math.prod(shape):
            raise Refused("an object array made of raw bytes")
        flat = np.empty(len(data), dtype=object)
        for i, item in enumerate(data):
            flat[i] = item
    else:
        data = data.encode("latin1") if isinstance(data, str) else data
        flat = np.frombuffer(data or b"", dtype.value)
        check_values(flat)
    return flat.reshape(shape, order=order)


def check_values(flat: np.ndarray) -> None:
    """Raises `Refused` for bytes of (n,) texts or truth values that none can have."""
    if flat.dtype.kind == "U" and flat.size:
        points = flat.view(np.dtype(np.uint32).newbyteorder(flat.dtype.byteorder))
        if points.max() > sys.maxunicode:
            raise Refused("an array of text whose bytes are no characters")
    if flat.dtype.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
        raise Refused("an array of truth values whose bytes are neither 0 nor 1")


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
            raise Refused("an array of an unknown subclass")
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
            raise Refused(f"bytes in encoding {encoding!r}")
        return text.encode("latin1")


class _Make(_Maker):
    """Makes a container, as protocols 0 to 3 and Python 2 write them."""

    __slots__ = ("kind",)

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, *items):
        return self.kind(*items)


class _EmptyBytes(_Maker):
    """`bytes()`, as protocols 0 to 2 write b""."""

    __slots__ = ()

    def __call__(self):
        return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Ndarray(),
    ("numpy", "dtype"): _MakeDtype(),
    ("_codecs", "encode"): _Encode(),
    ("collections", "OrderedDict"): _Make(collections.OrderedDict),
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Reconstruct()
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _Scalar()
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _FromBuffer()
for _builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    _ALLOWED[_builtins, "bytes"] = _EmptyBytes()
    _ALLOWED[_builtins, "set"] = _Make(set)
    _ALLOWED[_builtins, "frozenset"] = _Make(frozenset)


def _admitted(module: str, name: str) -> Any:
    try:
        return _ALLOWED[module, name]
    except KeyError:
        raise Refused(f"the global {module}.{name}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return _admitted(module, name)

    def persistent_load(self, pid):
        raise Refused("a reference to an object outside the file")


# ----------------------------------------------------------------- what came out

_PLAIN = (type(None), bool, float, str)
_GROUPS = (list, tuple, set, frozenset)
_PAIRS = (dict, collections.OrderedDict)


def describe(value: Any, room: int) -> Iterator[tuple[list, Any]]:
    """The parts of a value, each as a node for JSON and its raw bytes (or b"").

    An item of a node is itself, or [number of another node] if it is no plain number
    or text; node 0 is a list of `value` alone. At most `room` raw bytes in all. Raises
    `Refused` for any type that is not listed here and `TooMuch`.
    """
    numbers: dict[int, int] = {}
    queue: list[tuple[Any, int]] = []  # holds what it has seen: ids stay unique
    depth = 0

    def item(x):
        if type(x) in _PLAIN or (type(x) is int and -(2**63) <= x < 2**63):
            return x
        if id(x) not in numbers:
            numbers[id(x)] = len(queue)
            queue.append((x, depth + 1))
        return [numbers[id(x)]]

    item([value])
    for x, depth in queue:
        if depth > MAX_DEPTH + 2:
            raise TooMuch(f"containers nested more than {MAX_DEPTH} deep")
        node, raw = _node(x, item)
        room -= len(raw)
        if room < 0:
            raise TooMuch("arrays of more bytes than the file has")
        yield node, raw


def _node(x: Any, item: Callable) -> tuple[list, Any]:
    kind = type(x)
    if kind in _GROUPS:
        return [kind.__name__, [item(i) for i in x]], b""
    if kind in _PAIRS:
        if getattr(x, "__dict__", None):
            raise Refused("a container with attributes")
        return [kind.__name__, [item(i) for pair in x.items() for i in pair]], b""
    if kind in (bytes, bytearray):
        return [kind.__name__, len(x)], x
    if kind is int:
        return ["int", hex(x)], b""
    if kind is _Dtype:
        return ["dtype", x.value.str], b""
    if isinstance(x, np.generic):
        one = np.array([x])
        return ["scalar", one.dtype.str], one.tobytes()
    if kind is _Array:
        x = x.value
        if x is None:
            raise Refused("an array without contents")
    if type(x) is not np.ndarray:
        raise Refused(f"a bare reference to {kind.__name__.lstrip('_')}")
    if x.dtype.hasobject:
        return ["objects", x.shape, [item(i) for i in x.flat]], b""
    order = "F" if x.flags.f_contiguous and not x.flags.c_contiguous else "C"
    flat = np.ascontiguousarray(x.T if order == "F" else x)
    raw = memoryview(flat.reshape(-1).view(np.uint8)) if flat.nbytes else b""
    return ["array", x.dtype.str, x.shape, order], raw


# ----------------------------------------------------------------- the process


def _limit(memory: int, seconds: int) -> None:
    with suppress(ImportError):
        import resource

        for what, most in (("AS", memory), ("CPU", seconds), ("CORE", 0)):
            kind = getattr(resource, f"RLIMIT_{what}")
            hard = resource.getrlimit(kind)[1]
            if hard != resource.RLIM_INFINITY:
                most = min(most, hard)
            with suppress(ValueError, OSError):  # macOS has no limit of memory
                resource.setrlimit(kind, (most, hard))


def answer(file: BinaryIO, encoding: str) -> Iterator[Any]:
    """The description of a pickle in bytes; what is wrong with it as its last line."""
    try:
        scan(file)
        room = file.seek(0, io.SEEK_END) + SLACK
        file.seek(0)
        value = _Unpickler(file, encoding=encoding).load()
        for node, raw in describe(value, room):
            yield _line(*node)
            yield raw
        yield _line("end")
    except Refused as error:
        yield _line("refused", _printable(str(error)))
    except TooMuch as error:
        yield _line("too much", _printable(str(error)))
    except MemoryError:
        yield _line("too much", "more memory than a file of its size needs")
    except Exception as error:  # a damaged pickle can raise almost anything
        python2 = isinstance(error, UnicodeDecodeError) and error.encoding == "ascii"
        what = _printable(f"{type(error).__name__}: {error}")
        yield _line("python 2" if python2 else "damaged", what)


def _printable(text: str) -> str:
    """The file's own words may be long, or steer a terminal."""
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in text[:500])
    return "".join(shown) + ("..." if len(text) > 500 else "")


def _line(*node) -> bytes:
    return json.dumps(node, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def main() -> None:
    """Describe the pickle on the standard input on the standard output.

    The last three arguments: bytes of memory, seconds of computing, and the encoding of
    Python 2 strings.
    """
    memory, seconds, encoding = sys.argv[-3:]
    _limit(int(memory), int(seconds))
    out = sys.stdout.buffer
    for part in answer(sys.stdin.buffer, encoding):
        out.write(part)
    out.flush()
    os._exit(0)  # what the file made need not be taken apart
