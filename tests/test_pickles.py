"""Hostile pickles are refused by name; arrays and containers come through whole."""

import builtins
import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import subprocess
import tracemalloc
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from mmsa_lib.corpora import pickles
from mmsa_lib.corpora.pickles import load_npz, load_pickle
from mmsa_lib.corpora.unpickle import answer
from mmsa_lib.errors import CorpusError
from mmsa_lib.files import sha256_of

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def roundtrip(path, value, protocol):
    path.write_bytes(pickle.dumps(value, protocol))
    return load_pickle(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_feature_file_comes_through(tmp_path, protocol):
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(3, 2)).astype(np.float32)
    ragged = np.empty(2, dtype=object)
    ragged[0], ragged[1] = shared, ["words", ("a", 1)]
    value = {
        "train": {
            "text": rng.normal(size=(2, 3, 4)),
            "transposed": np.asfortranarray(rng.normal(size=(4, 5))),
            "strided": rng.normal(size=(4, 6))[:, ::2],
            "big_endian": np.arange(4, dtype=">f4"),
            "lengths": np.array([3, 1], dtype=np.int16),
            "mask": np.array([True, False]),
            "empty": np.empty((0, 7), dtype=np.float16),
            "point": np.array(3.5),
            "id": np.array(["v$_$1", "ü$_$22"]),
            "bytes": np.array([b"sp", b"word"]),
            "ragged": ragged,
        },
        "scalar": np.float32(1.5),
        "containers": [None, True, 2, 2.5, "ü", b"", b"\xff", {1, 2}, frozenset("a")],
        "ordered": collections.OrderedDict(b=(1, [2, {"deep": shared}]), a=2),
    }
    got = roundtrip(tmp_path / "f.pkl", value, protocol)
    for key, array in value["train"].items():
        found = got["train"][key]
        assert type(found) is np.ndarray
        assert found.dtype == array.dtype and found.shape == array.shape, key
        if key != "ragged":
            np.testing.assert_array_equal(found, array, err_msg=key)
    np.testing.assert_array_equal(got["train"]["ragged"][0], shared)
    assert got["train"]["ragged"][1] == ["words", ("a", 1)]
    assert got["scalar"] == 1.5 and got["scalar"].dtype == np.float32
    assert got["containers"] == value["containers"]
    assert list(got["ordered"]) == ["b", "a"]
    np.testing.assert_array_equal(got["ordered"]["b"][1][1]["deep"], shared)


def test_shared_and_circular_containers_keep_their_identity(tmp_path):
    inner = [np.ones(2)]
    value = {"a": inner, "b": inner}
    inner.append(value)
    got = roundtrip(tmp_path / "f.pkl", value, 4)
    assert got["a"] is got["b"] and got["a"][1] is got
    assert type(got["a"][0]) is np.ndarray


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_paths_of_numpy_1_and_2(tmp_path, core):
    data = pickle.dumps({"x": np.arange(6.0).reshape(2, 3)}, 2)
    (tmp_path / "f.pkl").write_bytes(data.replace(b"numpy._core", core))
    np.testing.assert_array_equal(
        load_pickle(tmp_path / "f.pkl")["x"], np.arange(6.0).reshape(2, 3)
    )


def python2_pickle() -> bytes:
    """What Python 2 and numpy 1 wrote for {"x": array([1., -2.])}, protocol 2."""
    raw = struct.pack("<2d", 1.0, -2.0)
    return (
        b"\x80\x02}U\x01xcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
        + bytes([len(raw)])
        + raw
        + b"tbs."
    )


def test_python_2_files_need_latin1(tmp_path):
    path = tmp_path / "f.pkl"
    path.write_bytes(python2_pickle())
    with pytest.raises(CorpusError, match="encoding='latin1'"):
        load_pickle(path)
    got = load_pickle(path, encoding="latin1")
    np.testing.assert_array_equal(got["x"], [1.0, -2.0])


# ------------------------------------------------------------------------- attacks


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def wrapped(attack):
    """The attack alone, deep in containers, in an object array, and as a state."""
    cell = np.empty(1, dtype=object)
    cell[0] = attack
    return {"alone": attack, "nested": {"a": [(1, {"b": attack})]}, "object": cell}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("where", ["alone", "nested", "object"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, r"\w+\.system"), (builtins.exec, r"\w+\.exec"),
     (subprocess.check_call, r"\w+\.check_call")],
)  # fmt: skip
def test_a_command_in_a_pickle_is_refused_by_name(
    tmp_path, monkeypatch, protocol, where, function, name
):
    monkeypatch.chdir(tmp_path)
    victim = tmp_path / "victim"
    code = f"open({str(victim)!r}, 'w')" if function is exec else f"touch {victim}"
    argument = ["touch", str(victim)] if function is subprocess.check_call else code
    path = tmp_path / "evil.pkl"
    data = pickle.dumps(wrapped(Calls(function, argument))[where], protocol)
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=rf"the global {name}.*not executed"):
        load_pickle(path)
    assert not victim.exists()
    pickle.loads(data)  # the attack is a real one
    assert victim.exists()


NUMPY_GLOBALS = [
    ("numpy", "load"),
    ("numpy", "fromfile"),
    ("numpy", "memmap"),
    ("numpy", "save"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.testing", "measure"),
    ("numpy.f2py", "compile"),
    ("numpy.lib.npyio", "load"),
    ("numpy.ctypeslib", "load_library"),
    ("numpy.core.multiarray", "fromfile"),
    ("numpy._core.multiarray", "add_docstring"),
    ("numpy", "vectorize"),
    ("numpy", "ndarray.tofile"),  # a dotted name reaches through an allowed one
    ("numpy", "dtype.__class__"),
    ("collections", "OrderedDict.__init_subclass__"),
    ("collections", "namedtuple"),
    ("builtins", "getattr"),
    ("__builtin__", "eval"),
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("functools", "partial"),
    ("operator", "attrgetter"),
    ("codecs", "encode"),
    ("torch._utils", "_rebuild_tensor_v2"),
]


@pytest.mark.parametrize(("module", "name"), NUMPY_GLOBALS)
def test_only_exact_globals_are_admitted(module, name):
    strings = b"".join(
        pickle.SHORT_BINUNICODE + bytes([len(s)]) + s.encode() for s in (module, name)
    )
    stack_global = b"\x80\x04" + strings + pickle.STACK_GLOBAL + b")R."
    programs = [
        f"c{module}\n{name}\n(tR.".encode(),  # GLOBAL, REDUCE
        f"(i{module}\n{name}\n.".encode(),  # INST
        f"(c{module}\n{name}\no.".encode(),  # OBJ
        stack_global,
        f"\x80\x02c{module}\n{name}\n)\x81.".encode("latin1"),  # NEWOBJ
        f"\x80\x04c{module}\n{name}\n)}}\x92.".encode("latin1"),  # NEWOBJ_EX
    ]
    for program in programs:
        told = b"".join(answer(io.BytesIO(program), "ASCII"))
        assert json.loads(told) == ["refused", f"the global {module}.{name}"], program


def glob(module, name):
    return f"c{module}\n{name}\n".encode()


def value(x):
    return pickle.dumps(x, 3)[2:-1]


def program(*parts, protocol=5):
    return bytes([0x80, protocol]) + b"".join(parts) + b"."


def call(name, *arguments):
    """An admitted global called with what the arguments leave on the stack."""
    return name + MARK + b"".join(arguments) + TUPLE + REDUCE


def laughs(levels: int, start=b")", double=b"\x86", names=range(1, 200)):
    """A value that holds the one before it twice, and so on."""
    parts = [start]
    for _, name in zip(range(levels), names, strict=False):
        put, get = pickle.BINPUT + bytes([name]), pickle.BINGET + bytes([name])
        parts.append(put + pickle.POP + get + get + double)
    return b"".join(parts)


DTYPE, NDARRAY = glob("numpy", "dtype"), glob("numpy", "ndarray")
ORDERED, SET = glob("collections", "OrderedDict"), glob("builtins", "set")
BUILD, REDUCE, MARK, TUPLE = pickle.BUILD, pickle.REDUCE, pickle.MARK, pickle.TUPLE
NEWOBJ, LIST = pickle.NEWOBJ, pickle.EMPTY_LIST
# A dtype of objects whose state denies it: numpy itself would then read raw bytes as
# object pointers, which is a crash or worse.
FORGED = DTYPE + value(("O8", False, True)) + REDUCE
FORGED += value((3, "|", None, None, None, 8, 8, 0)) + BUILD
FIELDS = (3, "<", None, ("a",), {"a": 0}, 8, 8, 0)
FROM_BUFFER = glob("numpy._core.numeric", "_frombuffer")
RECONSTRUCT = glob("numpy._core.multiarray", "_reconstruct")
SCALAR = glob("numpy._core.multiarray", "scalar")
ENCODE = glob("_codecs", "encode")
EMPTY_ARRAY = call(RECONSTRUCT, NDARRAY, value((0,)), value(b"b"))


def dtype(code):
    return DTYPE + value((code, False, True)) + REDUCE


def from_buffer(data, code, shape, order="C"):
    data, shape = value(data), value(shape)
    return call(FROM_BUFFER, data, dtype(code), shape, value(order))


def within(item: bytes, levels: int) -> bytes:
    """Object arrays of one item, each within the next."""
    shell = EMPTY_ARRAY + MARK + value(1) + value((1,)) + dtype("O") + value(False)
    return (shell + LIST) * levels + item + (b"a" + TUPLE + BUILD) * levels


FOREIGN, MUCH, CUT = "neither a numpy array", "asks for more than", "not a whole pickle"
HOSTILE = {
    # what calls, and what is called
    "reduce": (program(call(glob("os", "system"), value("true"))), r"os\.system"),
    "build": (program(glob("os", "environ"), value({"a": 1}), BUILD), r"os\.environ"),
    "inst": (program(MARK, value("true"), b"ios\nsystem\n"), r"os\.system"),
    "obj": (program(MARK, glob("os", "system"), value("true"), b"o"), r"os\.system"),
    "newobj": (program(glob("subprocess", "Popen"), value(("true",)), NEWOBJ), FOREIGN),
    "newobj_ex": (
        program(glob("subprocess", "Popen"), b")", value({"args": "true"}),
                pickle.NEWOBJ_EX),
        r"subprocess\.Popen",
    ),
    "stack global": (
        program(value("os"), value("system"), pickle.STACK_GLOBAL, value(("true",)),
                REDUCE),
        r"os\.system",
    ),
    "stack global of no strings": (
        program(value(1), value(2), pickle.STACK_GLOBAL), CUT,
    ),
    "dotted global": (
        program(value("numpy"), value("ndarray.tofile"), pickle.STACK_GLOBAL), FOREIGN,
    ),
    "dunder of a global": (
        program(value("numpy"), value("dtype.__init__.__globals__"),
                pickle.STACK_GLOBAL),
        FOREIGN,
    ),
    "global of this library": (
        program(glob("mmsa_lib.corpora.unpickle", "os")), r"unpickle\.os",
    ),
    "global with a line of its own": (
        program(value("numpy"), value("ndarray\x1b[2J\n"), pickle.STACK_GLOBAL),
        r"numpy\.ndarray\\x1b\[2J\\n,",
    ),
    "global before the file is cut off": (glob("os", "system"), r"os\.system"),
    "persistent id": (b"\x80\x04Pevil\n.", "outside the file"),
    "binary persistent id": (program(value("evil"), b"Q"), "outside the file"),
    "extension of one byte": (b"\x80\x02\x82\x01.", "extension registry"),
    "extension of two bytes": (b"\x80\x02\x83\x01\x01.", "extension registry"),
    "extension of four bytes": (b"\x80\x02\x84\1\1\1\1.", "extension registry"),
    "buffer outside": (program(b"\x97"), "outside the file"),
    "read-only buffer": (program(value(b"a"), b"\x98"), "outside the file"),
    # admitted globals turned against the reader
    "object array from a buffer": (
        program(call(FROM_BUFFER, value(b"A" * 8), FORGED, value((1,)), value("C"))),
        "made of raw bytes",
    ),
    "object array from a state": (
        program(EMPTY_ARRAY, MARK, value(1), value((1,)), FORGED, value(False),
                value(b"A" * 8), TUPLE, BUILD),
        "made of raw bytes",
    ),
    "object scalar": (
        program(call(SCALAR, FORGED, value(b"A" * 8))), "made of raw bytes",
    ),
    "structured dtype": (program(dtype("V8")), "dtype 'V8'"),
    "dtype from a list": (program(dtype([("a", "O")])), r"dtype \["),
    "dtype that is none": (program(dtype("f3")), "dtype 'f3'"),
    "dtype of a huge width": (program(dtype("U99999999999")), FOREIGN),
    "dates": (program(dtype("M8[ns]")), "dtype 'M8"),
    "fields in the state": (
        program(dtype("f8"), value(FIELDS), BUILD), "structured dtype",
    ),
    "another width in the state": (
        program(dtype("f8"), value((3, "<", None, None, None, 16, 8, 0)), BUILD),
        "structured dtype",
    ),
    "text that is no text": (
        program(from_buffer(b"\xff" * 4, "U1", (1,))), "no characters",
    ),
    "swapped text that is no text": (
        program(call(FROM_BUFFER, value(b"\x7f\0\0\0"), dtype("U1"),
                     value((3, ">", None, None, None, 4, 4, 8)), BUILD, value((1,)),
                     value("C"))),
        "no characters",
    ),
    "a word that is no text": (
        program(call(SCALAR, dtype("U1"), value(b"\xff" * 4))), "no characters",
    ),
    "neither true nor false": (
        program(from_buffer(b"\x02", "?", (1,))), "neither 0 nor 1",
    ),
    "fewer bytes than the shape": (program(from_buffer(b"abc", "f8", (9,))), CUT),
    "a negative shape": (program(from_buffer(b"", "f8", (-1, 10**18))), FOREIGN),
    "a shape of texts": (program(from_buffer(b"a" * 8, "f8", ("1",))), FOREIGN),
    "too many axes": (program(from_buffer(b"a" * 8, "f8", (1,) * 99)), CUT),
    "an order that is none": (program(from_buffer(b"a" * 8, "f8", (1,), "X")), CUT),
    "an array without dtype": (
        program(call(FROM_BUFFER, value(b"a"), NDARRAY, value((1,)), value("C"))),
        "whose dtype is",
    ),
    "an array without contents": (program(EMPTY_ARRAY), "without contents"),
    "such an array as an item": (program(LIST, EMPTY_ARRAY, b"a"), "without contents"),
    "an array within itself": (
        program(EMPTY_ARRAY, pickle.BINPUT, b"\x63", MARK, value(1), value((1,)),
                dtype("O"), value(False), LIST, pickle.BINGET, b"\x63a", TUPLE, BUILD),
        MUCH,
    ),
    "an array of another class": (
        program(call(RECONSTRUCT, DTYPE, value((0,)), value(b"b"))), "unknown subclass",
    ),
    "state on a maker": (program(DTYPE, value((None, {"__call__": 1})), BUILD), CUT),
    "state on a container": (
        program(call(ORDERED), value((None, {"items": 1})), BUILD), FOREIGN,
    ),
    "a maker as value": (program(DTYPE), "bare reference"),
    "a maker in a list": (program(LIST, DTYPE, b"a"), "bare reference"),
    "a maker in a tuple": (program(NDARRAY, b"\x85"), "bare reference"),
    "a maker as key": (program(b"}", ORDERED, b"Ns"), "bare reference"),
    "a maker in a key": (program(b"}", SET, b"\x85Ns"), "bare reference"),
    "a maker in a set": (program(b"\x8f(", SET, b"\x90"), "bare reference"),
    "a maker in a frozenset": (program(b"(", SET, b"\x91"), "bare reference"),
    "a maker in an object array": (program(within(ENCODE, 1)), "bare reference"),
    "a dtype in a set": (program(b"\x8f(", dtype("f8"), b"\x90"), CUT),
    "another codec": (program(call(ENCODE, value("eval"), value("rot13"))), "rot13"),
    "ndarray called": (program(NDARRAY, value(((10**9,),)), REDUCE), CUT),
    "a container as a class": (program(SET, b")", NEWOBJ), CUT),
    # depth
    "deep key": (program(b"})", b"\x85" * 50_000, b"Ns"), "deep"),
    "deep key of marks": (program(b"}", b"(" * 50_000, b"t" * 50_000, b"Ns"), "deep"),
    "deep key in a set": (program(b"\x8f()", b"\x85" * 50_000, b"\x90"), "deep"),
    "deep frozensets": (program(b"(" * 50_000, b"\x91" * 50_000), "deep"),
    "deep lists": (program(b"]" * 50_000, b"a" * 49_999), "deep"),
    "deep dicts": (program(b"}N" * 50_000, b"N", b"s" * 50_000), "deep"),
    "deep tuples of two": (program(b"N" * 50_001, b"\x86" * 50_000), "deep"),
    "deep object arrays": (program(within(b"N", 20_000)), "deep"),
    "deep states": (program(DTYPE, b")" * 50_000, b"b" * 50_000), "."),
    "deep lists filled late": (
        program(LIST, b"q\1", (LIST + b"q\2a0h\2") * 50_000, b"0h\1"), "deep",
    ),
    # memory and time
    "memo index": (b"\x80\2Nr\0\0\0\x08.", "memo index of 134217728"),
    "memo index of four bytes": (b"\x80\2Nr\xff\xff\xff\xff.", "memo index"),
    "memo index in digits": (b"Np99999999999\n.", "memo index"),
    "memo index in thousands of digits": (b"Np" + b"9" * 9999 + b"\n.", CUT),
    "memo that is not there": (b"\x80\2h\7.", CUT),
    "laughs": (program(laughs(40)), "shared tuples"),
    "laughs of three": (program(laughs(40, b"N", b"h\1\x87")), "shared tuples"),
    "laughs as key": (program(b"}", laughs(60), b"Ns"), "shared tuples"),
    "laughs in a set": (program(b"\x8f(", laughs(60), b"\x90"), "shared tuples"),
    "bytes that are not there": (program(b"\x8e" + b"\xff" * 7 + b"\x7f"), CUT),
    "text that is not there": (program(b"X\xff\xff\xff\x7f"), CUT),
    "bytearray that is not there": (program(b"\x96\0\0\0\0\1\0\0\0"), CUT),
    "integer that is not there": (program(b"\x8b\xff\xff\xff\x7f"), CUT),
    "integer of a negative length": (program(b"\x8b\xff\xff\xff\xff"), CUT),
    "frame that is not there": (b"\x80\4\x95\0\0\0\0\1\0\0\0N.", CUT),
    "integer in a million digits": (b"L" + b"9" * 1_000_000 + b"L\n.", CUT),
    "one text encoded again and again": (
        program(value("a" * 1_000_000), b"q\x010", LIST,
                (ENCODE + b"h\1" + value("latin1") + b"\x86Ra") * 3000),
        MUCH,
    ),
    "one set made again and again": (
        program(value(list(range(100_000))), b"q\x010", LIST,
                (SET + b"h\1\x85Ra") * 3000),
        MUCH,
    ),
    # no pickle, or half of one
    "empty file": (b"", CUT),
    "no STOP": (b"\x80\4N", CUT),
    "STOP alone": (b".", CUT),
    "nothing left to fill": (b"\x80\4Na.", CUT),
    "mark without end": (b"\x80\4((((.", CUT),
    "pops from an empty stack": (b"\x80\0000000.", CUT),
    "a later protocol": (b"\x80\x63N.", CUT),
    "cut-off argument": (b"\x80\4J\0\0", CUT),
    "cut-off line": (b"cnumpy\nndarray", CUT),
    "unknown instruction": (b"\xff.", CUT),
    "web page": (b"<html>login</html>", CUT),
    "gzip bomb": (gzip.compress(bytes(10_000_000)), "packed with gzip"),
    "zip bomb": (b"PK\3\4" + bytes(100), "packed with zip"),
    "bzip2": (bz2.compress(bytes(1000)), "packed with bzip2"),
    "xz": (lzma.compress(bytes(1000)), "packed with xz"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_nothing_comes_down(tmp_path, kind):
    data, message = HOSTILE[kind]
    path = tmp_path / "f.pkl"
    path.write_bytes(data)
    tracemalloc.start()  # of the other process there is a limit
    try:
        with pytest.raises(CorpusError, match=message) as caught:
            load_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_file_that_computes_for_ever_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "SECONDS", 1)
    monkeypatch.setattr(pickles, "BYTES_A_SECOND", 10**9)
    clash = [i * (2**61 - 1) for i in range(60_000)]  # all of one hash
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(dict.fromkeys(clash)))
    with pytest.raises(CorpusError, match="more than 1 s of computing"):
        load_pickle(tmp_path / "f.pkl")


def test_a_reader_that_dies_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "f.pkl").write_bytes(pickle.dumps([1]))
    for code, said in [
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("raise SystemExit(3)", "status 3"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
        ("print('[\"list\", [[1')", "status 0"),
        ('print(\'["array", "<f8", [9], "C"]\')', "status 0"),
    ]:
        monkeypatch.setattr(pickles, "_CHILD", code)
        with pytest.raises(CorpusError, match=said):
            load_pickle(tmp_path / "f.pkl")


def test_shared_lists_that_would_laugh_stay_shared(tmp_path):
    inner = LIST
    for name in range(1, 61):
        get = pickle.BINGET + bytes([name])
        inner += b"q" + bytes([name]) + b"0](" + get + get + b"e"
    (tmp_path / "f.pkl").write_bytes(program(inner))
    found, levels = load_pickle(tmp_path / "f.pkl"), 0
    while found:
        assert found[0] is found[1]
        found, levels = found[0], levels + 1
    assert levels == 60


def test_a_large_file_takes_its_size_twice(tmp_path, monkeypatch):
    """200 MB of arrays: once in the other process, once here."""
    big = {m: np.full(8_000_000, i) for i, m in enumerate(("text", "audio", "vision"))}
    path = tmp_path / "f.pkl"
    path.write_bytes(pickle.dumps(big, 4))
    monkeypatch.setattr(pickles, "MEMORY", 400 << 20)  # the interpreter's and numpy's
    monkeypatch.setattr(pickles, "MEMORY_A_BYTE", 1)
    tracemalloc.start()
    try:
        got = load_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 1.1 * path.stat().st_size
    finally:
        tracemalloc.stop()
    for m, array in big.items():
        np.testing.assert_array_equal(got[m], array)


def test_many_small_parts_come_back(tmp_path):
    rows = [(str(i), i, i / 3, [i] * (i % 3)) for i in range(50_000)]
    arrays = [np.full(i % 5, i) for i in range(5_000)]
    cells = np.empty(len(arrays), dtype=object)
    cells[:] = arrays
    got = roundtrip(tmp_path / "f.pkl", {"rows": rows, "cells": cells}, 4)
    assert got["rows"] == rows
    assert all(map(np.array_equal, got["cells"], arrays))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_plain_value_comes_back_equal(tmp_path, protocol):
    values = [
        None, True, False, 0, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**4000,
        0.1, -0.0, float("inf"), 5e-324, "", "ü\U0001f600", "\ud83d", "a\nb\x00\x85",
        b"\x00\xff", (), ((), [()]), {(1, ("a", b"b")): {frozenset((1, 2)): set()}},
        {None: 1, 1.5: 2, np.float64(2.5): 3}, collections.OrderedDict(b=1, a=2),
        np.float32(1.5), np.int8(-3), np.bool_(True), np.str_("ü"), np.bytes_(b"a"),
        np.complex128(1 + 2j), np.dtype(">f4"),
    ]  # fmt: skip
    got = roundtrip(tmp_path / "f.pkl", values, protocol)
    assert got == values
    assert [type(x) for x in got] == [type(x) for x in values]
    nan = roundtrip(tmp_path / "f.pkl", [float("nan"), np.float32("nan")], protocol)
    assert nan[0] != nan[0] and np.isnan(nan[1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "code", ["?", "b", "u1", "<i2", ">i4", "<u8", "f2", ">f8", "c8", "S3", "<U4", ">U2"]
)
def test_every_dtype_and_order_comes_back_equal(tmp_path, protocol, code):
    flat = (np.arange(24) % 2).astype(code)
    arrays = [
        flat, flat.reshape(2, 3, 4), flat.reshape(2, 3, 4).transpose(1, 2, 0),
        np.asfortranarray(flat.reshape(6, 4)), flat[::-2], flat[:0].reshape(0, 5),
        flat[3].reshape(()),
    ]  # fmt: skip
    for array, found in zip(
        arrays, roundtrip(tmp_path / "f.pkl", arrays, protocol), strict=True
    ):
        assert found.dtype == array.dtype and found.shape == array.shape
        np.testing.assert_array_equal(found, array)


def test_nothing_beside_the_file_is_executed(tmp_path, monkeypatch):
    for name in ("numpy", "json", "pickle", "mmsa_lib", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert roundtrip(tmp_path / "f.pkl", [1, "a"], 4) == [1, "a"]
    assert not (tmp_path / "executed").exists()


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for name in ("pipe", "."):
        with pytest.raises(CorpusError, match="there is no file"):
            load_pickle(tmp_path / name)


def test_the_files_that_were_brought(shared_dir):
    paths = sorted(shared_dir.glob("cases/pickle-*/*.pkl"))
    if not paths:
        pytest.skip("no pickles among the cases")
    for path in paths:
        with pytest.raises(CorpusError, match="refused"):
            load_pickle(path)


@pytest.mark.parametrize(
    "thing", [datetime(2020, 1, 1), Path("x"), np.random.default_rng(0)], ids=type
)
def test_other_objects_are_refused(tmp_path, thing):
    path = tmp_path / "f.pkl"
    path.write_bytes(pickle.dumps(thing))
    with pytest.raises(CorpusError, match=r"holds the global \w"):
        load_pickle(path)


def test_hash_is_compared_before_the_first_byte_is_read(tmp_path):
    path = tmp_path / "f.pkl"
    victim = tmp_path / "victim"
    path.write_bytes(pickle.dumps([1, 2]))
    assert load_pickle(path, sha256=sha256_of(path)) == [1, 2]
    path.write_bytes(pickle.dumps(Calls(os.system, f"touch {victim}")))
    with pytest.raises(CorpusError, match="not the published file"):
        load_pickle(path, sha256="0" * 64)
    assert not victim.exists()


def test_damaged_and_absent_files(tmp_path):
    path = tmp_path / "f.pkl"
    whole = pickle.dumps({"x": np.arange(100.0)})
    for data in (b"", whole[:50], whole[:-1], b"<html>login</html>", whole[5:]):
        path.write_bytes(data)
        with pytest.raises(CorpusError, match=r"f\.pkl"):
            load_pickle(path)
    with pytest.raises(CorpusError, match="there is no file"):
        load_pickle(tmp_path / "none.pkl")


# ----------------------------------------------------------------------------- .npz


def npz(path, **arrays):
    """A .npz of members as they are given: bytes, or arrays."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in arrays.items():
            if not isinstance(content, bytes):
                out = io.BytesIO()
                np.save(out, content)
                content = out.getvalue()
            archive.writestr(f"{name}.npy", content)
    return path


def header(shape, descr="<f8") -> bytes:
    out = io.BytesIO()
    given = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, given)
    return out.getvalue()


BROKEN = {
    "objects": np.array([{}], dtype=object),
    "a structure": np.zeros(1, dtype=[("a", "f8")]),
    "dates": np.zeros(1, "M8[ns]"),
    "terabytes": header((10**13,)),
    "a negative shape": header((-1, 5)),
    "fewer bytes than the shape": header((9,)) + bytes(8),
    "text that is no text": header((1,), "<U1") + b"\xff" * 4,
    "truth that is none": header((2, 1), "|b1") + b"\x01\x02",
    "no array": b"<html>",
    "a pickle": pickle.dumps([1]),
    "a deep header": b"\x93NUMPY\1\0\x20\x4e" + b"(" * 20_000,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_npz_of_anything_else_is_refused(tmp_path, kind):
    path = npz(tmp_path / "a.npz", x=BROKEN[kind], y=np.arange(3))
    with pytest.raises(CorpusError, match=r"not a \.npz of plain arrays"):
        load_npz(path, ["x"], "x")


def test_an_npz_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = npz(tmp_path / "a.npz", x=np.zeros(2_000_000), y=np.ones(2_000_000))
    assert len(load_npz(path, None, "x")["y"]) == 2_000_000
    monkeypatch.setattr(pickles, "FREE", 1 << 20)
    with pytest.raises(CorpusError, match="would unpack to 32000256: more than 100"):
        load_npz(path, ["x"], "x")


def test_an_npz_that_is_none_or_cut_off(tmp_path):
    path = npz(tmp_path / "a.npz", x=np.arange(1000))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 255
    (tmp_path / "lone.npy").write_bytes(header((1,)) + bytes(8))
    for data in (b"", b"PK", whole[:100], whole[:-30], bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(CorpusError, match=r"a\.npz is not a \.npz"):
            load_npz(path, ["x"], "x")
    with pytest.raises(CorpusError, match=r"lone\.npy is not a \.npz"):
        load_npz(tmp_path / "lone.npy", ["x"], "x")
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "pipe", "."):
        with pytest.raises(CorpusError, match="there is no file"):
            load_npz(tmp_path / name, ["x"], "x")
