"""Values of parameters: what fits, and how a value that was typed is read.

A parameter takes what its annotation says (``epochs: int | None = None``), or what its
default is. A typed value is read for that type and never guessed at: a path stays text,
``010`` is ten, ``yes`` is no number.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmsa_lib.errors import BookError
from mmsa_lib.files import read_yaml

UNCLEAR = object()  # the default of a parameter that is not a plain literal
LARGEST_SEED = 2**32 - 1
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_BOOL = {"true": True, "yes": True, "on": True}
_BOOL |= {"false": False, "no": False, "off": False}
_WORDS = {
    "path": "path",
    "str": "text",
    "bool": "truth value (true or false)",
    "int": "whole number",
    "float": "number",
    "list": "list",
    "dict": "mapping",
    "none": "null",
}
_ALIASES = {"tuple": "list", "Sequence": "list", "Path": "path", "None": "none"}
_PATHS = ("_dir", "_path", "_file", "_folder")


@dataclass(frozen=True)
class Kind:
    """Names of the types that a value may have (of `_WORDS`), none for any; and the
    types of the items, if it is a list."""

    types: frozenset[str] = frozenset()
    items: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.types

    def words(self) -> str:
        """What it takes, for a message."""
        found = [words for name, words in _WORDS.items() if name in self.types]
        text = " or ".join(found)
        items = [w.split(" (")[0] for n, w in _WORDS.items() if n in self.items]
        if not items or "list" not in self.types:
            return text
        return text.replace("list", f"list of {'s or '.join(items)}s")


_STANDARD = {
    "profile": Kind(frozenset({"str", "none"})),
    "corpus": Kind(frozenset({"str", "none"})),
    "data_dir": Kind(frozenset({"path", "none"})),
    "seeds": Kind(frozenset({"list", "none"}), frozenset({"int"})),
    "device": Kind(frozenset({"str", "none"})),
    "epochs": Kind(frozenset({"int", "none"})),
}


def kind_of(name: str, default: object, annotation: str = "") -> Kind | None:
    """What a parameter takes; None where its default is None and nothing is declared.

    annotation: as in the source, empty if there is none.
    """
    if annotation:
        return annotated(annotation)
    if default is None:
        return _STANDARD.get(name)
    if default is UNCLEAR:
        return Kind()
    if isinstance(default, (list, tuple)):
        items = frozenset(type(item).__name__ for item in default)
        plain = items if items <= {"str", "bool", "int", "float"} else frozenset()
        return Kind(
            frozenset({"list"}), frozenset({"int"}) if name == "seeds" else plain
        )
    found = type(default).__name__
    if found == "str" and name.endswith(_PATHS):
        found = "path"
    return Kind(frozenset({found} & _WORDS.keys()))


def annotated(text: str) -> Kind:
    """What an annotation such as ``list[int] | None`` or ``str | Path`` lets in."""
    types, items = set(), set()
    pending = [ast.parse(text, mode="eval").body]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.BinOp):
            pending += [node.left, node.right]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            pending.append(ast.parse(node.value, mode="eval").body)
        elif isinstance(node, ast.Subscript):
            outer = ast.unparse(node.value).rpartition(".")[2]
            inner = (
                node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            )
            if outer in ("Optional", "Union"):
                types |= {"none"} if outer == "Optional" else set()
                pending += inner
            else:
                types.add(_ALIASES.get(outer, outer))
                inner = [node for node in inner if ast.unparse(node) != "..."]
                items |= set().union(*(annotated(ast.unparse(n)).types for n in inner))
        else:
            word = ast.unparse(node).rpartition(".")[2]
            types.add(_ALIASES.get(word, word))
    known = types <= _WORDS.keys()
    return Kind(frozenset(types if known else ()), frozenset(items & _WORDS.keys()))


def fits(value: object, types: Iterable[str]) -> bool:
    """Whether a value has one of the types; of none any plain value fits."""
    types = set(types)
    if value is None:
        return "none" in types or not types
    if isinstance(value, bool):
        return "bool" in types or not types
    if isinstance(value, int):
        return bool({"int", "float"} & types) or not types
    if isinstance(value, float):
        return "float" in types or not types
    if isinstance(value, str):
        return bool({"str", "path"} & types) or not types
    if isinstance(value, (list, tuple)):
        return ("list" in types or not types) and all(fits(v, ()) for v in value)
    plain = isinstance(value, dict) and all(isinstance(k, str) for k in value)
    return (
        plain
        and ("dict" in types or not types)
        and all(fits(v, ()) for v in value.values())
    )


def check(what: str, name: str, value, default, kind: Kind | None):
    """The value, if it fits; `BookError` says what would.

    what: the parameter in words, such as ``parameter epochs of baselines``.
    """
    if kind is None:
        raise BookError(
            f"{what} is None by default and declares no type. Declare one in the cell "
            f"of parameters, such as {name}: int | None = None"
        )
    right = value is None or fits(value, kind.types)
    if right and isinstance(value, (list, tuple)):
        right = all(fits(item, kind.items) for item in value)
    if not right:
        shown = "not a literal" if default is UNCLEAR else f"{default!r}"
        raise BookError(
            f"{what} is {shown} by default, so it takes a {kind.words() or 'value'}; "
            f"found {value!r} ({type(value).__name__})"
        )
    if name == "seeds" and isinstance(value, (list, tuple)):
        check_seeds(what, value)
    return value


def check_seeds(what: str, seeds: Iterable[object]) -> None:
    """Raises `BookError` unless these are one or more whole numbers, from 0, all
    different."""
    seeds = list(seeds)
    if not seeds:
        raise BookError(f"{what}: there is no seed; name one or more")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise BookError(f"{what}: a seed is a whole number; found {seed!r}")
        if not 0 <= seed <= LARGEST_SEED:
            raise BookError(f"{what}: a seed is from 0 to {LARGEST_SEED}; found {seed}")
        if seeds.count(seed) > 1:
            raise BookError(f"{what}: the seed {seed} is there twice; each counts once")


def seeds_of(text: str, option: str = "--seeds") -> list[int]:
    """Seeds as typed: ``0,1,2``. Raises `BookError` that names what is no seed."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not _INT.fullmatch(word):
            raise BookError(
                f"{option} {text}: whole numbers with commas; found {word!r}"
            )
    seeds = [int(word) for word in words]
    check_seeds(f"{option} {text}", seeds)
    return seeds


def typed(name: str, text: str, default: object, kind: Kind | None):
    """A value as somebody typed it; what fits no type of `kind` is left as text.

    A path is taken from the current folder, and becomes absolute.
    """
    if kind is None:
        return text
    if not kind.types:
        return _plain(name, text)
    if "path" in kind:
        return _path(text, default, kind)
    if "none" in kind and text.lower() in ("null", "none", "~", ""):
        return None
    if {"list", "dict"} & kind.types and text.lstrip()[:1] in ("[", "{"):
        return _plain(name, text, kind.items)
    return _scalar(text, kind.types)


def _path(text: str, default: object, kind: Kind):
    if not text or ("str" in kind and text == default):
        return None if "none" in kind and not text else text
    path = Path(text).expanduser()
    named = "str" in kind and not re.match(r"[~./\\]", text) and not path.exists()
    return text if named else str(path.resolve())


def _scalar(text: str, types: frozenset[str]):
    if "int" in types and _INT.fullmatch(text):
        return int(text)
    if "float" in types and _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if "bool" in types and text.lower() in _BOOL:
        return _BOOL[text.lower()]
    return text


def _plain(name: str, text: str, items: frozenset[str] = frozenset()):
    """A list, mapping, number, truth value or null, else the text."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            value = read_yaml(text, f"-p {name}", texts=True)
        except BookError as error:
            raise BookError(f"{error} (a list is written '[0, 1, 2]')") from error
        return _inside(value, items)
    return _inside(text, items)


def _inside(value, items: frozenset[str]):
    if isinstance(value, list):
        return [_inside(item, items) for item in value]
    if isinstance(value, dict):
        return {key: _inside(item, items) for key, item in value.items()}
    if items:
        return _scalar(value, items)
    words = {"true": True, "false": False, "null": None}
    if value.lower() in words:
        return words[value.lower()]
    return _scalar(value, frozenset({"int", "float"}))
