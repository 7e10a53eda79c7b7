"""Hostile pickles are refused by name; arrays and containers come through whole."""

import builtins
import collections
import os
import pickle
import struct
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from mmsa_lib.corpora.pickles import load_pickle
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
def test_only_exact_globals_are_admitted(tmp_path, module, name):
    path = tmp_path / "f.pkl"
    strings = b"".join(
        pickle.SHORT_BINUNICODE + bytes([len(s)]) + s.encode() for s in (module, name)
    )
    stack_global = b"\x80\x04" + strings + pickle.STACK_GLOBAL + b")R."
    programs = [
        f"c{module}\n{name}\n(tR.".encode(),  # GLOBAL, REDUCE
        f"(i{module}\n{name}\n.".encode(),  # INST
        f"(c{module}\n{name}\no.".encode(),  # OBJ
        stack_global,
        b"\x80\x02" + f"c{module}\n{name}\n)\x81.".encode(),  # NEWOBJ
    ]
    for program in programs:
        path.write_bytes(program)
        with pytest.raises(CorpusError) as caught:
            load_pickle(path)
        assert f"the global {module}.{name}," in str(caught.value), program


def glob(module, name):
    return f"c{module}\n{name}\n".encode()


def value(x):
    return pickle.dumps(x, 3)[2:-1]


def program(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


DTYPE, NDARRAY = glob("numpy", "dtype"), glob("numpy", "ndarray")
ORDERED = glob("collections", "OrderedDict")
BUILD, REDUCE, MARK, TUPLE = pickle.BUILD, pickle.REDUCE, pickle.MARK, pickle.TUPLE
# A dtype of objects whose state denies it: numpy itself would then read raw bytes as
# object pointers, which is a crash or worse.
FORGED = DTYPE + value(("O8", False, True)) + REDUCE
FORGED += value((3, "|", None, None, None, 8, 8, 0)) + BUILD
FIELDS = (3, "<", None, ("a",), {"a": 0}, 8, 8, 0)
FROM_BUFFER = glob("numpy._core.numeric", "_frombuffer")
RECONSTRUCT = glob("numpy._core.multiarray", "_reconstruct")
EMPTY_ARRAY = RECONSTRUCT + MARK + NDARRAY + value((0,)) + value(b"b") + TUPLE + REDUCE

CRAFTED = {
    "object array from a buffer": (
        program(FROM_BUFFER, MARK, value(b"A" * 8), FORGED, value((1,)), value("C"),
                TUPLE, REDUCE),
        "made of raw bytes",
    ),
    "object array from a state": (
        program(EMPTY_ARRAY, MARK, value(1), value((1,)), FORGED, value(False),
                value(b"A" * 8), TUPLE, BUILD),
        "made of raw bytes",
    ),
    "object scalar": (
        program(glob("numpy._core.multiarray", "scalar"), MARK, FORGED,
                value(b"A" * 8), TUPLE, REDUCE),
        "made of raw bytes",
    ),
    "structured dtype": (
        program(DTYPE, value(("V8", False, True)), REDUCE),
        "dtype 'V8'",
    ),
    "dtype from a list": (
        program(DTYPE, value(([("a", "O")], False, True)), REDUCE),
        r"dtype \[",
    ),
    "fields in the state": (
        program(DTYPE, value(("f8", False, True)), REDUCE, value(FIELDS), BUILD),
        "structured dtype",
    ),
    "state on a maker": (
        program(DTYPE, value((None, {"__call__": 1})), BUILD),
        "not a whole pickle",
    ),
    "state on a class": (
        program(ORDERED, value((None, {"items": 1})), BUILD),
        "not a whole pickle",
    ),
    "a maker as value": (program(DTYPE), "bare reference"),
    "array without contents": (program(EMPTY_ARRAY), "array without contents"),
    "another codec": (
        program(glob("_codecs", "encode"), value(("eval", "rot13")), REDUCE),
        "encoding 'rot13'",
    ),
    "ndarray called": (
        program(NDARRAY, value(((10**9,),)), REDUCE),
        "not a whole pickle",
    ),
    "persistent id": (b"\x80\x04Pevil\n.", "outside the file"),
    "extension registry": (b"\x80\x02\x82\x01.", "not a whole pickle"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CRAFTED)
def test_admitted_globals_cannot_be_turned_against_the_reader(tmp_path, kind):
    data, message = CRAFTED[kind]
    path = tmp_path / "f.pkl"
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        load_pickle(path)
    good = {"x": np.arange(3.0)}
    np.testing.assert_array_equal(
        roundtrip(tmp_path / "good.pkl", good, 4)["x"], good["x"]
    )


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
