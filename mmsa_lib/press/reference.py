"""The library reference: docstrings of every module, read from the source.

A Sphinx extension. Where a page says ``<!-- library reference -->``, the modules,
functions and classes of the library follow, as directives of Sphinx's Python domain.
Nothing of the library is imported for it, so rendering needs neither torch nor time.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import TypeGuard

PACKAGE = Path(__file__).resolve().parent.parent
MARK = "<!-- library reference -->"
LAYERS = (
    *("errors", "corpora", "nets", "methods", "training", "metrics", "statistics"),
    *("runs", "figures", "predict", "clip_training", "cli", "press"),
)

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+.!|$~@^&-])")
_CODE = re.compile(r"``([^`]+)``|`([^`]+)`|(?<!\w)\*(\w[^*\n]*\w)\*(?!\w)")
_ROW = re.compile(r"(\S+(?:,? \S+){0,5}?) {2,}(\S.*)")
_NAMED = re.compile(r"(\w+(?:, \w+)*): +(\S.*)")


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, the path from the root and its syntax tree."""

    name: str
    path: str
    tree: ast.Module
    lines: list[str]

    @property
    def summary(self) -> str:
        """The first sentence or two of the docstring: its first paragraph."""
        return (ast.get_docstring(self.tree) or "").partition("\n\n")[0]


def setup(app) -> dict:
    """Called by Sphinx when ``_config.yml`` lists this module as an extension."""
    app.connect("source-read", _fill_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _fill_in(app, page: str, source: list[str]) -> None:
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, reference(PACKAGE))


def reference(package: Path) -> str:
    """MyST-Markdown that documents every public name of a package, module by module."""
    modules = read(package)
    links = _links(modules)
    parts = [
        f"{{py:mod}}`{_short(m)} <{m.name}>`\n: {_prose(m.summary, links)}\n"
        for m in modules
    ]
    for m in modules:
        doc = markdown(ast.get_docstring(m.tree) or "", links)
        parts.append(f"## {_short(m)}\n")
        parts.append(f"```{{py:module}} {m.name}\n```\n")
        parts.append(f"`{m.path}`\n\n{doc}\n")
        parts += [_entry(m, node, links) for node in m.tree.body]
    return "\n".join(p for p in parts if p)


def _short(module: Module) -> str:
    return module.name.partition(".")[2] or module.name


def read(package: Path) -> list[Module]:
    """Every module of a package that holds something, in the order of the layers."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(p for p in inside if p != "__init__")
        source = path.read_text(encoding="utf-8")
        if source.strip() and inside[-1] != "__main__":
            shown = path.relative_to(package.parent).as_posix()
            tree = ast.parse(source)
            found.append(Module(name, shown, tree, source.splitlines()))

    def place(module: Module):
        layer = module.name.split(".")[1:2]
        order = LAYERS.index(layer[0]) if set(layer) & set(LAYERS) else len(LAYERS)
        return order if layer else -1, module.name

    return sorted(found, key=place)


def markdown(doc: str, links: dict[str, str], names: tuple[str, ...] = ()) -> str:
    """A plain docstring as MyST: paragraphs, rows of ``name  meaning``, else as it is.

    names: of parameters; a line ``name: meaning`` about one of them is such a row, and
    none of them is taken for a function of the same name
    """
    links = {k: v for k, v in links.items() if k not in names}
    parts = []
    for block in re.split(r"\n[ \t]*\n", doc.strip("\n")) if doc.strip() else ():
        rows, rest = _rows(dedent(block).splitlines(), names)
        parts += [f"`{k}`\n: {_prose(' '.join(v), links)}\n" for k, v in rows]
        if any(line.startswith(" ") for line in (rest if rows else block.splitlines())):
            parts.append("```text\n" + "\n".join(rest) + "\n```\n")
        elif rest:
            parts.append(_prose("\n".join(rest), links) + "\n")
    return "\n".join(parts)


def _rows(lines: list[str], names: tuple[str, ...]):
    """``name  meaning`` or ``parameter: meaning``, with indented lines going on.

    Returns the rows at the head of `lines` and the lines that are left.
    """
    rows: list[tuple[str, list[str]]] = []
    for i, line in enumerate(lines):
        row, named = _ROW.fullmatch(line), _NAMED.fullmatch(line)
        if named and not set(named[1].split(", ")) <= set(names):
            named = None
        if found := row or named:
            rows.append((found[1], [found[2]]))
        elif rows and line.startswith("  "):
            rows[-1][1].append(line.strip())
        elif rows and not _ROW.fullmatch(lines[0]) and rows[-1][1][-1][-1] != ".":
            rows[-1][1].append(line)  # `name: meaning` may go on at the margin
        else:
            return rows, lines[i:]
    return rows, []


def _prose(text: str, links: dict[str, str]) -> str:
    """Markdown that shows `text` as written; what is in backticks is code or a link."""
    out, end = [], 0
    for found in _CODE.finditer(text):
        out.append(_escape(text[end : found.start()]))
        end = found.end()
        code = found[1] or found[2]
        if code is None:
            out.append(f"*{_escape(found[3])}*")
        elif target := links.get(code.removesuffix("()")):
            out.append(f"{{py:obj}}`{code} <{target}>`")
        else:
            out.append(f"`{code}`")
    out.append(_escape(text[end:]))
    return "".join(out)


def _escape(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def _links(modules: list[Module]) -> dict[str, str]:
    """Every way to write a public name without being ambiguous -> its full name."""
    full = [m.name for m in modules]
    for m in modules:
        for node in m.tree.body:
            for name in _names(node):
                full.append(f"{m.name}.{name}")
                if isinstance(node, ast.ClassDef):
                    inner = (n for child in node.body for n in _names(child))
                    full += [f"{m.name}.{name}.{n}" for n in inner]
    targets: dict[str, set[str]] = {}
    for name in full:
        parts = name.split(".")
        for i in range(len(parts)):
            targets.setdefault(".".join(parts[i:]), set()).add(name)
    return {k: v.pop() for k, v in targets.items() if len(v) == 1}


def _names(node: ast.stmt) -> Iterator[str]:
    """Public names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        found = [node.name]
    elif isinstance(node, ast.Assign):
        inside = (n for t in node.targets for n in ast.walk(t))
        found = [n.id for n in inside if _is_name(n)]
    elif isinstance(node, ast.AnnAssign) and _is_name(node.target):
        found = [node.target.id]
    else:
        found = []
    yield from (name for name in found if not name.startswith("_"))


def _is_name(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _entry(module: Module, node: ast.stmt, links: dict[str, str]) -> str:
    """The directives for what one top-level statement defines."""
    names = list(_names(node))
    if not names:
        return ""
    if isinstance(node, ast.FunctionDef):
        return _function(node, links)
    if isinstance(node, ast.ClassDef):
        return _class(node, links)
    return "".join(_constant(module, node, name) for name in names)


def _function(node: ast.FunctionDef, links, kind: str = "function") -> str:
    arguments = _unannotated(node.args)
    decorators = {ast.unparse(d) for d in node.decorator_list}
    options = {}
    if kind == "method":
        for wrapper in ("classmethod", "staticmethod"):
            if wrapper in decorators:
                options[wrapper] = ""
        if "staticmethod" not in decorators:
            arguments = _without_first(arguments)
    result = _type(node.returns)
    signature = f"{node.name}({ast.unparse(arguments)})"
    if {"property", "cached_property"} & decorators:
        kind, signature = "property", node.name
        options = {"type": result} if result else {}
    elif result:
        signature += f" -> {result}"
    doc = markdown(ast.get_docstring(node) or "", links, _parameters(node.args))
    return _directive(f"py:{kind}", signature, options, doc)


def _class(node: ast.ClassDef, links) -> str:
    doc = ast.get_docstring(node) or ""
    bases = [ast.unparse(b) for b in node.bases]
    fields = [f for f in node.body if isinstance(f, ast.AnnAssign) if list(_names(f))]
    functions = (f for f in node.body if isinstance(f, ast.FunctionDef))
    init = next((f for f in functions if f.name == "__init__"), None)
    names, signature = (), ""
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        names = tuple(f.target.id for f in fields)
        signature = ", ".join(map(ast.unparse, fields))
    elif init is not None:
        names = _parameters(init.args)
        signature = ast.unparse(_without_first(_unannotated(init.args)))
    exception = any(b.endswith(("Error", "Exception")) for b in bases)
    body = [markdown(doc, links, names)]
    if bases:
        body.append(f"Bases: {', '.join(f'`{b}`' for b in bases)}\n")
    body += [
        _function(child, links, "method")
        for child in node.body
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_")
    ]
    kind = "py:exception" if exception else "py:class"
    return _directive(kind, f"{node.name}({signature})", {}, "\n".join(body))


def _constant(module: Module, node: ast.Assign | ast.AnnAssign, name: str) -> str:
    """A module's constant: its value where that is short, and the comment beside it."""
    value = ast.unparse(node.value) if node.value else ""
    comment = module.lines[node.end_lineno - 1].partition("  # ")[2]
    options = {"value": value} if value and len(value) <= 60 else {}
    return _directive("py:data", name, options, _prose(comment, {}))


def _directive(kind: str, argument: str, options: dict[str, str], body: str) -> str:
    fence = "`" * 3
    while fence in body:
        fence += "`"
    head = "".join(f":{k}: {v}".rstrip() + "\n" for k, v in options.items())
    return f"{fence}{{{kind}}} {argument}\n{head}\n{body.rstrip()}\n{fence}\n"


def _parameters(args: ast.arguments) -> tuple[str, ...]:
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    every += [a for a in (args.vararg, args.kwarg) if a]
    return tuple(a.arg for a in every)


class _Plain(ast.NodeTransformer):
    """``Annotated[T, ...]`` as ``T``: what stands behind T is for a program."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
            return node.slice.elts[0]
        return node


def _type(annotation: ast.expr | None) -> str:
    return ast.unparse(_Plain().visit(annotation)) if annotation else ""


def _unannotated(args: ast.arguments) -> ast.arguments:
    return _Plain().visit(args)


def _without_first(args: ast.arguments) -> ast.arguments:
    """Without self or cls."""
    if args.posonlyargs:
        args.posonlyargs = args.posonlyargs[1:]
    else:
        args.args = args.args[1:]
    return args
