"""Open pickles of public feature files without running anything that is in them.

A pickle is a program. `load_pickle` has it read by a process of its own
(`mmsa_lib.corpora.unpickle`) that has limits on memory and time, so that no file can
bring this process down, and builds its value from what that process writes: arrays,
numbers, texts and plain containers. From a .npz only plain arrays are read.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmsa_lib.corpora.unpickle import MAX_DEPTH, check_values
from mmsa_lib.errors import CorpusError
from mmsa_lib.files import sha256_of

# what reading may take: memory in bytes and seconds of computing, both with an
# allowance for each byte of the file
MEMORY, MEMORY_A_BYTE = 1 << 30, 32
SECONDS, BYTES_A_SECOND = 30, 100_000

# a .npz may unpack to so many times its size, and to so many bytes in any case
DENSITY, FREE = 100, 1 << 28

# -I and -S: nothing but this library, numpy and the standard library is found
_CHILD = (
    "import sys; sys.path.extend(sys.argv[1:3]); "
    "from mmsa_lib.corpora.unpickle import main; main()"
)
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}


def load_pickle(
    path: str | Path, *, encoding: str = "ASCII", sha256: str | None = None
) -> Any:
    """Read a pickle of numpy arrays and containers; shared parts stay shared.

    Pickles written by Python 2 need ``encoding="latin1"``. With `sha256` the file is
    compared before its first byte is interpreted. Reading takes its size twice in
    memory. Raises `CorpusError` for another hash, a damaged file, a global that is not
    admitted, which it names, and a file that asks for more depth, memory or time than
    an honest one of its size.
    """
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"there is no file {path}")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise CorpusError(
            f"{path} has sha256 {found}, expected {sha256}: it is not the published "
            "file. It was not opened; download it again."
        )
    with path.open("rb") as file:
        start = file.read(6)
        for magic, name in _PACKED.items():
            if start.startswith(magic):
                raise CorpusError(f"{path} is packed with {name}; unpack it first")
        file.seek(0)
        return _read(path, file, encoding)


def _read(path: Path, file: BinaryIO, encoding: str) -> Any:
    size = os.fstat(file.fileno()).st_size
    memory = MEMORY + MEMORY_A_BYTE * size
    seconds = SECONDS + size // BYTES_A_SECOND
    homes = [Path(__file__).resolve().parents[2], Path(np.__file__).parents[1]]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD]
            + [str(x) for x in (*homes, memory, seconds, encoding)],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=said,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # a thread takes memory
        )
        try:
            return _built(path, process.stdout)
        except EOFError as error:
            process.wait()
            said.seek(0)
            why = _ending(process.returncode, seconds, said.read())
            raise CorpusError(_too_much(path, why)) from error
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def _ending(code: int, seconds: int, said: bytes) -> str:
    if code == -signal.SIGXCPU:
        return f"more than {seconds} s of computing"
    last = said.decode("utf-8", "replace").strip().splitlines()[-1:]
    name = f"signal {-code}" if code < 0 else f"status {code}"
    return f"the process that read it ended with {': '.join([name, *last])}"


def _too_much(path: Path, what: str) -> str:
    return (
        f"{path} asks for more than a file of arrays needs: {what}. It was refused. If "
        "you trust the file, open it where it was made and save the arrays with "
        "numpy.savez."
    )


def _complain(path: Path, kind: str, what: str) -> CorpusError:
    if kind == "refused":
        return CorpusError(
            f"{path} holds {what}, which is neither a numpy array nor a plain "
            "container. It was refused and not executed. If you trust the file, open "
            "it where it was made and save the arrays with numpy.savez."
        )
    if kind == "python 2":
        return CorpusError(f"{path} holds Python 2 strings: pass encoding='latin1'")
    if kind == "too much":
        return CorpusError(_too_much(path, what))
    return CorpusError(
        f"{path} is not a whole pickle ({what}). Download it again and compare its "
        "sha256."
    )


def _built(path: Path, stream: BinaryIO) -> Any:
    """The value that the other process describes; `EOFError` if it died over it."""
    values: list = []
    filled: list[tuple[Any, list]] = []  # made empty, as they may hold themselves
    rigid: dict[int, list] = {}  # what is made of its items
    while True:
        line = stream.readline()
        try:
            kind, *rest = json.loads(line.decode("utf-8", "surrogatepass"))
        except ValueError as error:  # half a line, or none
            raise EOFError from error
        if kind == "end":
            break
        if kind in _LEAVES:
            values.append(_LEAVES[kind](stream, *rest))
        elif kind not in _MADE:
            raise _complain(path, kind, rest[0])
        elif not any(type(i) is list for i in rest[-1]):
            values.append(_MADE[kind](*rest))
        elif kind in _FILLED:
            values.append(_FILLED[kind]())
            filled.append((values[-1], rest[0]))
        else:
            rigid[len(values)] = [kind, *rest]
            values.append(None)
    if not _make_rigid(rigid, values):
        why = f"tuples or arrays within each other, more than {MAX_DEPTH} deep"
        raise CorpusError(_too_much(path, why))
    for made, items in filled:
        _fill(made, [_value(i, values) for i in items])
    return values[0][0]


def _value(item: Any, values: list) -> Any:
    return values[item[0]] if type(item) is list else item


def _make_rigid(rigid: dict[int, list], values: list) -> bool:
    """Make tuples, frozensets and object arrays, the inner ones first.

    False if one holds itself, or they are too deep for the interpreter to take apart.
    """
    depth: dict[int, int] = {}
    open_ones = set()
    for first in rigid:
        work = [first]
        while work:
            n = work[-1]
            items = rigid[n][-1]
            inner = [i[0] for i in items if type(i) is list and i[0] in rigid]
            lacking = [i for i in inner if i not in depth]
            if n not in depth and not lacking:
                depth[n] = 1 + max((depth[i] for i in inner), default=0)
                if depth[n] > MAX_DEPTH:
                    return False
                kind, *more, _ = rigid[n]
                values[n] = _MADE[kind](*more, [_value(i, values) for i in items])
            if n in depth:
                work.pop()
                open_ones.discard(n)
                continue
            open_ones.add(n)
            if not open_ones.isdisjoint(lacking):
                return False
            work += lacking
    return True


def _objects(shape: list[int], items: list) -> np.ndarray:
    flat = np.empty(len(items), dtype=object)
    for i, item in enumerate(items):
        flat[i] = item
    return flat.reshape(shape)


def _pairs(items: list) -> Iterable[tuple]:
    return zip(items[::2], items[1::2], strict=True)


def _fill(made: Any, items: list) -> None:
    if isinstance(made, list):
        made.extend(items)
    elif isinstance(made, set):
        made.update(items)
    else:
        made.update(_pairs(items))


def _array(stream: BinaryIO, dtype: str, shape: list[int], order: str) -> np.ndarray:
    array = np.empty(shape, np.dtype(dtype), order=order)
    if array.dtype.kind not in "biufcSU":
        raise CorpusError(f"an array of dtype {array.dtype} came out of a pickle")
    if array.nbytes:
        flat = (array.T if order == "F" else array).reshape(-1).view(np.uint8)
        if stream.readinto(memoryview(flat)) < len(flat):  # ty: ignore
            raise EOFError
    return array


def _bytes(stream: BinaryIO, size: int) -> bytes:
    found = stream.read(size)
    if len(found) < size:
        raise EOFError
    return found


_FILLED = {
    "list": list,
    "set": set,
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
}
_MADE = {
    "list": list,
    "set": set,
    "dict": lambda items: dict(_pairs(items)),
    "OrderedDict": lambda items: collections.OrderedDict(_pairs(items)),
    "tuple": tuple,
    "frozenset": frozenset,
    "objects": _objects,
}
_LEAVES = {
    "array": _array,
    "scalar": lambda stream, dtype: _array(stream, dtype, [1], "C")[0],
    "bytes": _bytes,
    "bytearray": lambda stream, size: bytearray(_bytes(stream, size)),
    "int": lambda _stream, digits: int(digits, 16),
    "dtype": lambda _stream, name: np.dtype(name),
}


def load_npz(
    path: str | Path, wanted: Sequence[str] | None, expected: str
) -> dict[str, np.ndarray]:
    """The `wanted` arrays of a .npz, or all; `expected` says what the file should be.

    Pickled objects are not opened. Raises `CorpusError` for them, for arrays that are
    not there, for a damaged file and one that is packed more densely than features are.
    """
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"there is no file {path}. Expected {expected}")
    _check_density(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            there = file.files
            wanted = there if wanted is None else wanted
            lacking = [name for name in wanted if name not in there]
            found = {} if lacking else {name: file[name] for name in wanted}
        for name, array in found.items():
            if array.dtype.kind not in "biufcSU":
                raise ValueError(f"{name!r} has dtype {array.dtype}")
            check_values(np.ascontiguousarray(array).reshape(-1))
    except Exception as error:  # a damaged archive can raise almost anything
        raise CorpusError(
            f"{path} is not a .npz of plain arrays ({error}). Pickled object arrays "
            "are not opened: save strings with a fixed width (numpy.array(x, "
            "dtype=str)) and numbers as numbers."
        ) from error
    if lacking:
        raise CorpusError(
            f"{path} lacks the arrays {', '.join(lacking)}; it has {', '.join(there)}. "
            f"Expected {expected}"
        )
    return found


def _check_density(path: Path) -> None:
    """Refuse an archive of a few bytes that would fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return  # numpy says what is wrong with it
    if unpacked > max(DENSITY * path.stat().st_size, FREE):
        raise CorpusError(
            f"{path} has {path.stat().st_size} bytes and would unpack to {unpacked}: "
            f"more than {DENSITY} times as much, as no file of features does. It was "
            "not unpacked. If you trust it, save it again with numpy.savez."
        )
