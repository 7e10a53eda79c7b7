"""Which files of the library a piece of code reaches, found without importing any.

Imports are read from the syntax tree: absolute, relative, ``from mmsa_lib import x``,
inside functions, and the ``__init__`` of every package on the way. A module that is
only named in a string (``python -m mmsa_lib.press.execute``) counts as well. Where a
name is only known at run time (``import_module(f"mmsa_lib.corpora.{name}")``)
everything it could mean counts: a closure may be too large, never too small.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from mmsa_lib.errors import BookError
from mmsa_lib.files import read_text, sha256_of

PACKAGE = "mmsa_lib"
NAMES = (ast.Name, ast.Attribute)
_DYNAMIC = {"import_module", "__import__"}
# what may name a module without an import statement: such sources are searched whole
_UNUSUAL = re.compile(rf"import_module|__import__|[\"']{PACKAGE}\.")
_NAMED = re.compile(rf"{PACKAGE}(\.\w+)+")


def reach(root: Path, code: Iterable[ast.AST]) -> dict[str, str]:
    """Files of the library that `code` reaches, with their sha256.

    code: every node of it, as `every_node` gives them.
    Keys are paths relative to `root`. Beside the modules, the data files in their
    folders count, because a module reads those without naming them in an import.
    """
    _module.cache_clear()  # files come and go between two calls
    modules: dict[Path, None] = {}
    pending = list(dict.fromkeys(_targets_of(root, code, package="")))
    while pending:
        path = pending.pop()
        if path not in modules:
            modules[path] = None
            shown = path.relative_to(root).as_posix()
            pending += _imports_of(root, path, read_text(path, shown))
    files = set(modules)
    for folder in {path.parent for path in modules}:
        files |= set(_data_files(folder))
    return {p.relative_to(root).as_posix(): hash_of(p) for p in sorted(files)}


def every_node(code: Iterable[ast.AST]) -> list[ast.AST]:
    """The nodes of some statements, those inside them included; outer before inner."""
    found = list(code)
    for node in found:  # grows on the way
        for field in node._fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                found += [child for child in value if isinstance(child, ast.AST)]
            elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):
                found.append(value)
    return found


def hash_of(path: Path) -> str:
    """sha256 of a file; one that has not been touched since is not read again."""
    facts = path.stat()
    return _hash_as_of(path, facts.st_mtime_ns, facts.st_size)


@cache
def _hash_as_of(path: Path, changed: int, size: int) -> str:
    return sha256_of(path)


@cache
def _imports_of(root: Path, path: Path, source: str) -> tuple[Path, ...]:
    parts = path.relative_to(root).with_suffix("").parts
    package = ".".join(parts[:-1])  # for x/__init__.py this is x itself
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        where = path.relative_to(root).as_posix()
        line, why = (
            getattr(error, "lineno", None) or 1,
            getattr(error, "msg", str(error)),
        )
        raise BookError(f"{where}, line {line}: {why}") from error
    nodes = every_node([tree]) if _UNUSUAL.search(source) else _statements(tree)
    return tuple(dict.fromkeys(_targets_of(root, nodes, package)))


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements at any depth, without the expressions in them: a tenth of the nodes.

    Enough where no import is hidden in an expression.
    """
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inside = getattr(node, name, ())
            pending += inside if isinstance(inside, list) else ()


def _targets_of(root: Path, nodes: Iterable[ast.AST], package: str) -> Iterator[Path]:
    """Module files that imports among `nodes` name; `package` resolves the dots."""
    called = set()
    for node in nodes:  # a call comes before the name that it calls
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(root, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module or "", node.level, package)
            yield from _module(root, base)
            for alias in node.names:
                if alias.name == "*":
                    yield from _everything(root, base, deep=False)
                elif alias.name in _DYNAMIC and alias.asname:
                    yield from _everything(root, PACKAGE)
                else:
                    yield from _module(root, f"{base}.{alias.name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _NAMED.fullmatch(node.value):
                yield from _module(root, f"{node.value}.__main__")
        elif (
            isinstance(node, ast.Call) and name_of(node.func) in _DYNAMIC and node.args
        ):
            called.add(node.func)
            yield from _dynamic(root, node.args[0], package)
        elif (
            isinstance(node, NAMES) and name_of(node) in _DYNAMIC and node not in called
        ):
            yield from _everything(root, PACKAGE)


def name_of(node: ast.AST) -> str:
    """The last name of ``a``, ``m.a`` or ``x().a``; of other nodes nothing."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _absolute(module: str, level: int, package: str) -> str:
    if not level:
        return module
    parts = package.split(".")
    base = parts[: len(parts) - level + 1]
    return ".".join([*base, module] if module else base)


@cache
def _module(root: Path, name: str) -> tuple[Path, ...]:
    """The file of a module and the ``__init__`` of each package above it."""
    above, _, last = name.rpartition(".")
    if name.split(".")[0] != PACKAGE:
        return ()
    folder = root.joinpath(*above.split(".")) if above else root
    paths = (folder / last / "__init__.py", folder / f"{last}.py")
    found = tuple(path for path in paths if path.is_file())
    return _module(root, above) + found if above else found


def _everything(root: Path, package: str, deep: bool = True) -> Iterator[Path]:
    if package.split(".")[0] == PACKAGE:
        folder = root.joinpath(*package.split("."))
        yield from _module(root, package)
        yield from folder.glob("**/*.py" if deep else "*.py")


def _dynamic(root: Path, argument: ast.expr, package: str) -> Iterator[Path]:
    """A module named at run time: exact for a literal, else all it could be."""
    if isinstance(argument, ast.Constant):
        name = str(argument.value)
        dots = len(name) - len(name.lstrip("."))
        yield from _module(root, _absolute(name[dots:], dots, package))
        return
    if isinstance(argument, ast.JoinedStr) and argument.values:
        first = argument.values[0]
        start = str(first.value) if isinstance(first, ast.Constant) else ""
        rest = start.lstrip(".")
        start = _absolute(f"{rest}|", len(start) - len(rest), package)
        if start.startswith(f"{PACKAGE}."):
            yield from _everything(root, start.rpartition(".")[0])
            return
    yield from _everything(root, PACKAGE)


def _data_files(folder: Path) -> Iterator[Path]:
    """Files of a package folder that are not code, outside its subpackages."""
    for path in folder.iterdir():
        if path.name == "__pycache__" or path.name.startswith("."):
            continue
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            yield path
        elif path.is_dir() and not (path / "__init__.py").is_file():
            yield from _data_files(path)
