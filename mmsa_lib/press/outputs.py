"""The gates of one executed cell: its outputs, and every number that they show."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mmsa_lib import files, runs
from mmsa_lib.errors import MmsaError
from mmsa_lib.press.chapters import Book, Cell, parse
from mmsa_lib.press.closure import name_of
from mmsa_lib.press.reading import Mark, alt_problem, read_html, read_text, short

ILLUSTRATION = "illustration"
_NUMBER = re.compile(
    r"(?<![\w.])(?<![A-Za-z][-–])[-−+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?!\w)"
)
_UNDEFINED = re.compile(r"(?<![\w.])[-−+]?(?:nan|inf|infinity)(?!\w)", re.IGNORECASE)
_WARNING = re.compile(r"\b\w*Warning\b:.*")
_SHOWN = {"print", "show", "display"}  # calls that show something wherever they stand
_VALUES = {
    "say",
    "claim",
    "table",
    "reference_table",
    "verdict",
    "run_card",
}  # as last of a cell
_RICHEST = ("text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown")
_RICHEST += ("text/latex", "text/plain")  # the order in which a page prefers them


@dataclass
class Findings:
    """What the gates of one chapter found: numbers that are right, and problems."""

    numbers: int = 0
    problems: list[str] = field(default_factory=list)
    records: set[str] = field(default_factory=set)  # ids (12) of those on the page


def check_cell(book, cell: Cell, executed, shelf, found: Findings) -> Iterator[str]:
    """What is wrong with a cell and its outputs; what is right counts in `found`."""
    outputs = executed["outputs"]
    if executed["execution_count"] is None and cell.source.strip():
        yield "was not executed"
        return
    statements = parse(cell.source)
    hidden = {"remove-output", "remove-cell"} & set(cell.tags)
    if not outputs and not hidden:
        expected = _expects(cell, statements)
        if expected:
            yield (
                f"{expected}, but the cell has no output. Show something, or end the "
                "cell with a semicolon if there is nothing to show"
            )
    for line, call in _lost(statements):
        yield (
            f"runs.{call} in line {line} of the cell shows nothing, because it is not "
            "the last expression of its cell. Make it the last one, or use display()"
        )
    for output in outputs:
        yield from _check_output(book, cell, output, shelf, found)


def _expects(cell: Cell, statements: list[ast.stmt]) -> str:
    """Why a cell should have an output; empty if it need not."""
    if not statements:
        return ""
    last = statements[-1]
    if isinstance(last, ast.Expr) and not cell.source.rstrip().endswith(";"):
        return f"it ends in the expression {short(ast.unparse(last))}"
    blocks = list(statements)
    while blocks:  # what surely happens: not under an if, not in a function
        node = blocks.pop()
        if isinstance(node, (ast.For, ast.With)):
            blocks += node.body
        elif isinstance(node, ast.Expr):
            call = name_of(getattr(node.value, "func", node))
            if call in _SHOWN:
                return f"it calls {call}"
    return ""


def _lost(statements: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Displays that Jupyter drops: ``runs.say(...)`` anywhere but at the end."""
    shown = statements and isinstance(statements[-1], ast.Expr)
    blocks = statements[:-1] if shown else list(statements)
    while blocks:
        node = blocks.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        blocks += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
        if isinstance(node, ast.Expr):
            call = getattr(node.value, "func", node)
            owner = name_of(getattr(call, "value", call))
            if owner == "runs" and name_of(call) in _VALUES:
                yield node.lineno, name_of(call)


def _check_output(book, cell, output, shelf, found: Findings) -> Iterator[str]:
    if output["output_type"] == "error":
        yield f"ended in {output.get('ename')}: {output.get('evalue')}"
        return
    if output["output_type"] == "stream":
        kind, content = "text/plain", _text(output["text"])
        if output.get("name") == "stderr" and content.strip():
            first = short(content.strip().splitlines()[0])
            yield f"writes to stderr: {first}. Repair what it warns of"
            return
    else:
        data = output["data"]
        kind = next((k for k in _RICHEST if k in data), "")
        if not kind:
            return  # kept for programs; no page shows it
        content = _text(data[kind])
    if kind.startswith("image/"):
        yield "shows a picture without alt text: show it with figures.show(...)"
        return
    page = read_html(content) if kind == "text/html" else read_text(content)
    seen = " ".join(page.seen)
    if not seen.strip() and not page.images:
        yield "shows an empty output. Show something, or leave the cell's last line out"
    if page.tables and not page.cells:
        yield "shows a table without rows: nothing was found to put into it"
    if "Traceback (most recent call last)" in seen:
        yield "shows a traceback"
    for warning in _WARNING.findall(seen):
        yield f"shows a warning: {short(warning)}. Repair what it warns of"
    shown = ILLUSTRATION not in cell.tags
    for word in _UNDEFINED.findall(seen) if shown else ():
        yield (
            f"shows {word}. Show a dash and say why the value is undefined "
            "(runs.number does), or repair the computation"
        )
    for image in page.images:
        problem = alt_problem(image)
        if problem:
            yield f"shows a picture {problem}: describe it with figures.show(alt=...)"
    for mark in page.marks:
        yield from _check_mark(book, mark, shelf, found)
    for text in page.plain if shown else ():
        numbers = _NUMBER.findall(text)
        if numbers:
            around = short(" ".join(text.split()))
            yield (
                f"shows {', '.join(n.rstrip(',') for n in numbers[:6])} in {around!r}, "
                "which no record backs. Take it from one (runs.number, runs.value), "
                "name its source (runs.given), or tag the cell illustration if this is "
                "no result"
            )


def _check_mark(book: Book, mark: Mark, shelf, found: Findings) -> Iterator[str]:
    """Compare a mark with its record or source, computed again from the file."""
    a = mark.attributes
    if mark.kind == "given":
        if not a.get("title", "").strip():
            yield f"{mark.text} is given without a source: runs.given(number, source)"
        return
    if mark.kind == "ref":
        path = book.root / "book" / "reference" / a.get("data-source", "")
        try:
            expected = _reference(path, a.get("data-path", ""))
        except (MmsaError, LookupError, ValueError, TypeError, AttributeError) as error:
            yield f"{mark.text!r}: {error}"
            return
        if expected != mark.text:
            yield f"shows {mark.text!r} but {path.name} has {expected!r}"
        return
    try:
        if mark.kind == "run-card":
            ids = a.get("data-records", "").split()
            found.records.update(ids)
            card = read_html(runs.run_card([shelf[i] for i in ids]).data).marks[0]
            if card.text != mark.text:
                yield f"has the run card {mark.text!r}; its records say {card.text!r}"
            else:
                found.numbers += len(_NUMBER.findall(mark.text))
            return
        short, path = a["data-record"], a["data-path"]
        found.records.add(short)
        if path == "rows.0.verdict":
            expected = runs.verdict_of(shelf[short])
            count = len(_NUMBER.findall(mark.text))
        else:
            digits, suffix = int(a["data-digits"]), a.get("data-suffix", "")
            number = runs.recall(shelf[short], path, digits, suffix)
            expected, count = str(number), 1
            if expected == mark.text and float(a["value"]) != number.value:
                expected += "" if math.isnan(number.value) else f" ({number.value!r})"
    except KeyError as error:
        if isinstance(error, MmsaError):
            yield f"{mark.text!r}: {error}"
        else:
            yield f"{mark.text!r} lacks {error}: make marks with runs.number"
        return
    except (MmsaError, ValueError, TypeError) as error:
        yield f"{mark.text!r}: {error}"
        return
    if expected != mark.text:
        yield (
            f"shows {mark.text!r} but {path} of record {short} is {expected!r}. "
            "Take numbers from records only; execute the chapter again"
        )
    else:
        found.numbers += count


def _reference(path: Path, field_: str) -> str | None:
    """A field of a file of ``book/reference/``; None if there is no such file."""
    if not path.is_file():
        return None
    value = files.read_yaml(files.read_text(path, path.name), path.name)
    for key in field_.split("."):
        if isinstance(value, list):
            value = value[int(key)]
        else:
            value = value.get(key, runs.UNDEFINED)
    return str(value)


def _text(content: str | list[str]) -> str:
    return content if isinstance(content, str) else "".join(content)
