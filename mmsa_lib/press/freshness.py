"""The key of a chapter: everything its result depends on, and what changed since.

A key is kept beside each executed notebook. Equal keys, and the notebook still the one
that was written: the chapter is fresh and is not executed again.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import platform
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmsa_lib.files import digest, sha256, sha256_of, write_atomic
from mmsa_lib.press.chapters import Book, Chapter, parse
from mmsa_lib.press.closure import NAMES, every_node, hash_of, name_of, reach
from mmsa_lib.runs import RunRecord, package_sha256


@dataclass(frozen=True)
class Product:
    """Where an executed chapter and its key lie."""

    notebook: Path

    @property
    def key_file(self) -> Path:
        return self.notebook.with_suffix(".key.json")

    def read(self) -> dict | None:
        """What was noted of the last complete execution, None if there is none."""
        try:
            noted = json.loads(self.key_file.read_text(encoding="utf-8"))
            noted["key"], noted["notebook"]
            return noted
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def intact(self) -> bool:
        """Whether the notebook is there and the one that was noted."""
        noted = self.read()
        there = noted is not None and self.notebook.is_file()
        return there and sha256_of(self.notebook) == noted["notebook"]

    def write(self, notebook: str, noted: dict) -> None:
        """The notebook first, then the note with its hash: a kill between the two
        leaves a note that does not fit, so the chapter is executed again."""
        write_atomic(self.notebook, notebook)
        noted = noted | {"notebook": sha256(notebook)}
        write_atomic(self.key_file, json.dumps(noted, indent=1, sort_keys=True))


@dataclass(frozen=True)
class State:
    """One line of ``mmsa-book status``."""

    chapter: Chapter
    profile: str
    parameters: dict
    key: dict
    product: Product
    reasons: tuple[str, ...]  # why it must be executed; empty when fresh
    noted: dict | None

    @property
    def fresh(self) -> bool:
        return not self.reasons

    @property
    def good(self) -> Product:
        """The last version that passed the gates; the book shows it."""
        folder = self.product.notebook.parents[2] / "good" / self.profile
        return Product(folder / self.product.notebook.name)

    @property
    def refused(self) -> Path:
        """Where the gates note what they refuse in the newest version."""
        return self.good.notebook.with_suffix(".refused")

    def as_dict(self) -> dict:
        state = "fresh" if self.fresh else "stale" if self.noted else "new"
        reasons = list(self.reasons)
        if self.fresh and self.refused.is_file():
            state = "refused"
            reasons = self.refused.read_text(encoding="utf-8").splitlines()
        return {
            "chapter": self.chapter.name,
            "state": state,
            "reasons": reasons,
            "seconds": (self.noted or {}).get("seconds"),
            "record": (self.noted or {}).get("records", []),
        }


def states(book: Book, profile: str) -> list[State]:
    """The state of every chapter under a profile, in the order of the book."""
    found = []
    with _no_collection():
        for name, parameters in book.profile(profile).items():
            product = Product(book.build / "executed" / profile / f"{name}.ipynb")
            found.append(state(book, book[name], profile, parameters, product))
    return found


@contextmanager
def _no_collection() -> Generator[None]:
    """Syntax trees are very many objects and hold no rings: collecting finds none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def state(
    book: Book, chapter: Chapter, profile: str, parameters: dict, product: Product
) -> State:
    """Compare the key of a chapter now with the one of its last execution."""
    key = key_of(book, chapter, parameters)
    noted = product.read()
    if noted is None:
        reasons = ["never executed"]
    elif not product.intact():
        reasons = ["executed notebook missing or altered"]
    else:
        reasons = list(_changes(noted["key"], key))
    return State(chapter, profile, parameters, key, product, tuple(reasons), noted)


def key_of(book: Book, chapter: Chapter, parameters: dict) -> dict:
    """Every input of a chapter by name, with its hash or value."""
    code = every_node(n for cell in chapter.cells for n in parse(cell.source))
    return {
        "chapter": chapter.sha256,
        "parameters": {k: repr(v) for k, v in sorted(parameters.items())},
        "plans": _plans(book, chapter, chapter.parameters | parameters),
        "library": reach(book.root, code),
        "files": _files(book.root, chapter.name, code),
        "corpus": _cards(book, chapter.parameters | parameters),
        "lock": _hash_if_there(book.root / "constraints.txt"),
        "python": platform.python_version(),
    }


def _plans(book: Book, chapter: Chapter, parameters: dict) -> dict[str, str]:
    """The chapter's own plans under the profile that it is told, value by value."""
    plans = book.plans(parameters.get("profile"), chapter.name)
    found = {corpus: "{}" for corpus, plan in plans.items() if not plan}
    return found | {
        f"{corpus}.{name}": repr(value)
        for corpus, plan in plans.items()
        for name, value in plan.items()
    }


def closure_hash(key: dict) -> str:
    """One hash for the part of the library that a chapter reaches."""
    return digest(key["library"])


def moved_on(book: Book) -> Callable[[RunRecord], bool]:
    """Whether the code that a record was made with has changed since.

    A chapter's record is compared with the part of the library that the chapter reaches
    now, any other with the whole library. True where the chapter is no longer there.
    """

    @cache
    def now(chapter: str | None) -> str:
        if chapter is None:
            return package_sha256(book.root)
        if chapter not in book.chapters:
            return ""
        cells = book[chapter].cells
        return digest(
            reach(book.root, every_node(n for c in cells for n in parse(c.source)))
        )

    return lambda record: record.code.get("closure_sha256") != now(record.chapter)


# how a chapter asks for committed records; the first argument says for which
_QUERIES = {"find": "name", "committed": "chapter"}


def _files(root: Path, chapter: str, code: list[ast.AST]) -> dict[str, str]:
    """Files outside the library that a chapter may show.

    Records of ``results/``, told by folder and name: its own, those that it asks for
    (``runs.find("late-fusion")``, ``runs.committed("baselines")``), or all of them if
    that is not plain to see: the argument is no literal, the function goes by another
    name, or the code uses ``load_all`` or the folder itself (a literal "results").
    Data files under ``book/``: those of which it names the file or the folder, and
    ``book/matplotlibrc``, which matplotlib reads by itself.
    """
    words, everything = set(), False
    asked, called = {"name": set(), "chapter": {chapter}}, set()
    for node in code:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words |= set(node.value.split("/"))
        elif isinstance(node, ast.alias):
            everything |= node.name in _QUERIES and bool(node.asname)
        elif isinstance(node, ast.Call) and name_of(node.func) in _QUERIES:
            kind = _QUERIES[name_of(node.func)]
            first = node.args[:1] or [k.value for k in node.keywords if k.arg == kind]
            if first and isinstance(first[0], ast.Constant):
                called.add(node.func)
                asked[kind].add(first[0].value)
        elif isinstance(node, NAMES):
            name = name_of(node)
            everything |= name == "load_all"
            everything |= name in _QUERIES and node not in called
    everything |= bool(words & {"results", "load_all", *_QUERIES})
    found = {}
    for path in sorted((root / "results").rglob("*.json")):
        if (
            everything
            or path.stem.rpartition("-")[0] in asked["name"]
            or path.parent.name in asked["chapter"]
        ):
            found[path.relative_to(root).as_posix()] = hash_of(path)
    for path in sorted((root / "book").rglob("*")):
        inside = path.relative_to(root / "book").parts
        named = words & set(inside) or inside == ("matplotlibrc",)
        if path.is_file() and path.suffix != ".md" and named:
            found[path.relative_to(root).as_posix()] = hash_of(path)
    return found


def _cards(book: Book, parameters: dict) -> dict[str, str]:
    """Cards of the corpus on disk; they hold its fingerprint. None for the puppets,
    which the library generates."""
    name, folder = parameters.get("corpus"), parameters.get("data_dir")
    if not isinstance(name, str):
        return {}
    folder = Path(folder) if isinstance(folder, str) and folder else data_folder(book)
    cards = sorted((folder / name).rglob("card.json"))
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in cards}


def data_folder(book: Book) -> Path:
    """Where real corpora lie unless a chapter is told otherwise."""
    return Path(os.environ.get("MMSA_DATA") or book.root / "data").resolve()


def _hash_if_there(path: Path) -> str:
    return sha256_of(path) if path.is_file() else ""


def _changes(old: dict, new: dict) -> Iterator[str]:
    """One phrase for each input that differs."""
    if old.get("chapter") != new["chapter"]:
        yield "chapter source edited"
    labels = {"parameters": "parameter ", "plans": "plans "}
    for group in ("parameters", "plans", "library", "files", "corpus"):
        label = labels.get(group, "")
        before, after = old.get(group) or {}, new[group]
        for name in sorted(before.keys() | after.keys()):
            if name not in after:
                yield f"{label}{name} gone"
            elif name not in before:
                yield f"{label}{name} added"
            elif before[name] != after[name]:
                if group in labels:
                    yield f"{label}{name} {before[name]} -> {after[name]}"
                else:
                    yield f"{name} edited"
    if old.get("lock") != new["lock"]:
        yield "constraints.txt edited"
    if old.get("python") != new["python"]:
        yield f"Python {old.get('python')} -> {new['python']}"
