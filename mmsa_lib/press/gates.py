"""What an executed chapter and a rendered book must hold before a reader sees them.

Gates look only at what was made: the executed notebook beside its source and its run
records, and the HTML pages. Each problem is one line that names chapter, cell and line,
and says what to do; all of them are found before anything is refused.

A number on a page is one of these, everything else turns the build red:

- marked with its record by `runs.number`, `runs.table`, ...: computed again from the
  record's file and compared; these are counted;
- given: ``runs.given(...)`` in an output, ``[0.88]{.given source="..."}`` in prose, for
  what was chosen, defined or taken from a source that is named;
- in an output of a cell tagged ``illustration``: a small worked example, shapes, sizes
  of data. Never a result.
"""

from __future__ import annotations

import ast
import html
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from mmsa_lib import runs
from mmsa_lib.errors import MmsaError
from mmsa_lib.files import digest, sha256, sha256_of, write_atomic
from mmsa_lib.press.chapters import Book, Cell, Chapter, parse
from mmsa_lib.press.closure import name_of
from mmsa_lib.press.freshness import Product, State

ILLUSTRATION = "illustration"
_NUMBER = re.compile(
    r"(?<![\w.])(?<![A-Za-z][-–])[-−+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?!\w)"
)
_DECIMAL = re.compile(r"(?<![\w.])[-−+]?\d*\.\d+(?!\w|\.\d)")
_PERCENT = re.compile(
    r"(?<![\w.])\d+(?:\s?%|\s+per ?cent\b)(?!\s+(?:confidence|interval))"
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
_VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
_FILE_NAME = re.compile(r"\S*\.(png|svg|jpe?g|gif|webp)", re.IGNORECASE)
_HASH = re.compile(r"[0-9a-f]{12,}", re.IGNORECASE)


# ---------------------------------------------------------------- one output


@dataclass
class _Mark:
    """An element that says where its text comes from."""

    kind: str  # "rec", "ref", "given" or "card"
    attributes: dict[str, str]
    text: str = ""


class _Output(HTMLParser):
    """What a reader sees of a piece of HTML, and its marks, pictures and cells."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.marks: list[_Mark] = []
        self.images: list[dict[str, str]] = []
        self.plain: list[str] = []  # text outside marks and headings of tables
        self.seen: list[str] = []  # all text
        self.tables = self.cells = 0
        self._open: list[tuple[str, str]] = []  # tag, what it is to us
        self.feed(source)
        self.close()

    def _inside(self, *kinds: str) -> bool:
        return any(kind in kinds for _, kind in self._open)

    def handle_starttag(self, tag, attrs):
        attributes = {k: v or "" for k, v in attrs}
        self.tables += tag == "tbody"
        self.cells += tag == "td"
        if tag == "img":
            self.images.append(attributes)
        if tag in _VOID:
            return
        classes = attributes.get("class", "").split()
        kinds = [c for c in classes if c in ("rec", "ref", "given")]
        kinds += ["card"] * ("run-card" in classes)
        if kinds and not self._inside("mark"):
            self.marks.append(_Mark(kinds[0], attributes))
            self._open.append((tag, "mark"))
        elif tag in ("script", "style", "svg"):
            self._open.append((tag, "hidden"))
        else:
            self._open.append((tag, "label" if tag == "th" else ""))

    def handle_endtag(self, tag):
        if any(tag == opened for opened, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data):
        if self._inside("hidden"):
            return
        self.seen.append(data)
        if self._inside("mark"):
            self.marks[-1].text += data
        elif not self._inside("label"):
            self.plain.append(data)


# ---------------------------------------------------------------- one chapter


@dataclass
class Findings:
    """What the gates of one chapter found: numbers that are right, and problems."""

    numbers: int = 0
    problems: list[str] = field(default_factory=list)
    records: set[str] = field(default_factory=set)  # ids (12) of those on the page


@dataclass(frozen=True)
class Shelf:
    """Records by the first 12 digits of their id, from folders that may hold them."""

    folders: tuple[Path, ...]

    @cached_property
    def files(self) -> dict[str, Path]:
        paths = (p for f in self.folders if f.is_dir() for p in f.rglob("*.json"))
        return {p.stem.rpartition("-")[2]: p for p in paths}

    def __getitem__(self, short: str) -> runs.RunRecord:
        """Raises `RecordError` if there is none of that id, or it was edited."""
        if short not in self.files:
            places = " or ".join(f.name for f in self.folders)
            raise runs.RecordError(
                f"there is no record {short} in {places}; execute the chapter again"
            )
        return runs.load(self.files[short])


def approve(
    book: Book, state: State, shelf: Shelf, bands: Mapping
) -> tuple[Product, list[str]]:
    """The last version of a chapter that passed, and the problems of the newest one.

    A notebook that passes is copied to ``_build/good/PROFILE/``, from where the book
    is rendered; one that does not leaves the last good one there. What passed before is
    not looked at again until the notebook, its bands or these gates change.
    """
    good = state.good
    text = state.product.notebook.read_text(encoding="utf-8")
    noted = state.product.read() or {}
    key = digest([sha256(text), state.chapter.sha256, bands, sha256_of(Path(__file__))])
    last = good.read()
    state.refused.unlink(missing_ok=True)
    if last and last["key"] == key and good.intact():
        return good, []
    made = noted.get("records", [])
    found = check_chapter(book, state.chapter, json.loads(text), shelf, bands, made)
    if found.problems:
        write_atomic(state.refused, "\n".join(found.problems))
        return good, found.problems
    more = {"numbers": found.numbers, "used": sorted(found.records)}
    facts = {"key": key, "records": made, "seconds": noted.get("seconds", 0)}
    good.write(text, facts | more)
    return good, []


def check_chapter(
    book: Book,
    chapter: Chapter,
    notebook: Mapping,
    shelf: Shelf,
    bands: Mapping[str, Mapping[str, list[float]]] | None = None,
    made: Iterable[str] = (),
) -> Findings:
    """Every gate of one executed chapter.

    notebook: the executed notebook, as JSON. bands: record name -> path -> [low, high]
    of the profile. made: names of the record files that the execution wrote.
    """
    found = Findings()
    cells = [
        c
        for c in notebook["cells"]
        if c["cell_type"] == "code"
        and "injected-parameters" not in c["metadata"].get("tags", [])
    ]
    where = f"book/{chapter.path.name}"
    if len(cells) != len(chapter.cells):
        found.problems.append(
            f"{where}: {len(chapter.cells)} code cells, but {len(cells)} were executed"
        )
        return found
    for i, (cell, executed) in enumerate(zip(chapter.cells, cells, strict=True), 1):
        place = f"{where}, code cell {i} of {len(cells)} (line {cell.line})"
        for problem in _check_cell(book, cell, executed, shelf, found):
            found.problems.append(f"{place}: {problem}")
    if not any(c["outputs"] for c in cells):
        found.problems.append(
            f"{where}: no code cell has an output, so the page would show no result"
        )
    for line, problem in _check_prose(chapter.text):
        found.problems.append(f"{where}, line {line}: {problem}")
    found.problems += [f"{where}: {p}" for p in _check_bands(shelf, bands or {}, made)]
    return found


def _check_cell(book, cell: Cell, executed, shelf, found: Findings) -> Iterator[str]:
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
        return f"it ends in the expression {_short(ast.unparse(last))}"
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
            first = _short(content.strip().splitlines()[0])
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
    page = _Output(content if kind == "text/html" else html.escape(content))
    seen = " ".join(page.seen)
    if not seen.strip() and not page.images:
        yield "shows an empty output. Show something, or leave the cell's last line out"
    if page.tables and not page.cells:
        yield "shows a table without rows: nothing was found to put into it"
    if "Traceback (most recent call last)" in seen:
        yield "shows a traceback"
    for warning in _WARNING.findall(seen):
        yield f"shows a warning: {_short(warning)}. Repair what it warns of"
    shown = ILLUSTRATION not in cell.tags
    for word in _UNDEFINED.findall(seen) if shown else ():
        yield (
            f"shows {word}. Show a dash and say why the value is undefined "
            "(runs.number does), or repair the computation"
        )
    for image in page.images:
        problem = _alt_problem(image)
        if problem:
            yield f"shows a picture {problem}: describe it with figures.show(alt=...)"
    for mark in page.marks:
        yield from _check_mark(book, mark, shelf, found)
    for text in page.plain if shown else ():
        numbers = _NUMBER.findall(text)
        if numbers:
            around = _short(" ".join(text.split()))
            yield (
                f"shows {', '.join(n.rstrip(',') for n in numbers[:6])} in {around!r}, "
                "which no record backs. Take it from one (runs.number, runs.value), "
                "name its source (runs.given), or tag the cell illustration if this is "
                "no result"
            )


def _check_mark(book: Book, mark: _Mark, shelf, found: Findings) -> Iterator[str]:
    """Compare a mark with its record or source, computed again from the file."""
    a = mark.attributes
    if mark.kind == "given":
        if not a.get("title", "").strip():
            yield f"{mark.text} is given without a source: runs.given(number, source)"
        return
    if mark.kind == "ref":
        path = book.root / "book" / "reference" / a.get("data-source", "")
        expected = _reference(path, a.get("data-path", ""))
        if expected != mark.text:
            yield f"shows {mark.text!r} but {path.name} has {expected!r}"
        return
    try:
        if mark.kind == "card":
            ids = a.get("data-records", "").split()
            found.records.update(ids)
            card = _Output(runs.run_card([shelf[i] for i in ids]).data).marks[0]
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
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in field_.split("."):
        if isinstance(value, list):
            value = value[int(key)]
        else:
            value = value.get(key, runs.UNDEFINED)
    return str(value)


def _check_bands(shelf: Shelf, bands, made: Iterable[str]) -> Iterator[str]:
    """Metrics of the records that were made now, against the profile's bands."""
    records = {}
    for name in made:
        stem, _, short = name.rpartition("-")
        if stem in bands:
            records.setdefault(stem, []).append(shelf[short])
    for name, paths in bands.items():
        if name not in records:
            yield f"the profile has a band for the record {name}, but none was made"
        for record in records.get(name, ()):
            for path, (low, high) in paths.items():
                of = "mean" if record.per_seed else "field"
                value = runs.number(record, path, of=of).value
                if not low <= value <= high:
                    yield (
                        f"{path} of {name} is {value:.4g}, outside its band {low} to "
                        f"{high}. Find out what broke; move the band in the profile "
                        "only if the new value is right"
                    )


# ---------------------------------------------------------------- prose

_FENCE = re.compile(r"\s*(`{3,}|~{3,}|:{3,})(.*)")
_CODE = re.compile(r"\{(code-cell|code|code-block|math|raw|eval-rst|bibliography)\}|\w")
_GIVEN = re.compile(r"\[[^\]\[]*\]\{[^{}]*\.given\b([^{}]*)\}")
_NOT_PROSE = [
    re.compile(r"\A---\n.*?\n---\n", re.DOTALL),
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL),
    re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL),
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"(?<!\\)\$[^$\n]*(?:\n[^$\n]+)*\$"),
    re.compile(r"\]\([^)\s]*\)"),
    re.compile(r"https?://\S+"),
    re.compile(r"</?[A-Za-z][^>\n]*>"),
]


def _check_prose(text: str) -> Iterator[tuple[int, str]]:
    """Decimal numbers and percentages that somebody typed, with their lines.

    Percentages inside an exercise or its solution are its made-up data.
    """
    prose, exercises = _prose(text)
    for number, line in enumerate(prose.splitlines(), 1):
        found = list(_DECIMAL.finditer(line))
        found += [] if number in exercises else _PERCENT.finditer(line)
        for match in sorted(found, key=lambda m: m.start()):
            typed = match[0]
            yield (
                number,
                f"{typed} is typed by hand. Take it from a record (runs.say), or name "
                f'its source: [{typed}]{{.given source="..."}}',
            )
    for given in _GIVEN.finditer(text):
        if not re.search(r"\bsource=\"[^\"]*\w[^\"]*\"", given[1]):
            line = text.count("\n", 0, given.start()) + 1
            yield line, f'{given[0]} has no source: {{.given source="where from"}}'


def _prose(text: str) -> tuple[str, set[int]]:
    """The text with everything that is not prose blanked, and the exercises' lines."""
    lines, opened, exercises, inside = [], [], set(), False
    for number, line in enumerate(text.split("\n"), 1):
        fence = _FENCE.fullmatch(line)
        skipping = bool(opened) and opened[-1][1]
        if fence:
            marker, info = fence[1], fence[2].strip()
            last = opened[-1][0] if opened else ""
            closes = last and not info and marker[0] == last[0]
            if closes and len(marker) >= len(last):
                opened.pop()
                info = ""
            elif not skipping:
                opened.append((marker, bool(_CODE.match(info)) or not info))
                gate = re.match(r"\{(?:exercise|solution)-(start|end)\}", info)
                inside = gate[1] == "start" if gate else inside
            # the title of a box is prose, the name of a language is not
            line = "" if skipping or _CODE.match(info) else info
        elif skipping or re.match(r"\s*:[\w-]+:", line):
            line = ""
        if inside:
            exercises.add(number)
        lines.append(line)
    text = "\n".join(lines)
    for pattern in [_NOT_PROSE[0], _GIVEN, *_NOT_PROSE[1:]]:
        text = pattern.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    return text, exercises


# ---------------------------------------------------------------- pages


class _Page(HTMLParser):
    """Anchors, links and pictures of a page, with the section they stand in."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.anchors: set[str] = {"", "top"}
        self.links: list[tuple[str, str]] = []  # target, section
        self.images: list[tuple[dict[str, str], str]] = []
        self._section = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = {k: v or "" for k, v in attrs}
        for name in ("id", "name"):
            if name in attributes:
                self.anchors.add(attributes[name])
        if tag in ("section", "figure") and "id" in attributes:
            self._section = attributes["id"]
        for name in ("href", "src", "poster"):
            if name in attributes:
                self.links.append((attributes[name], self._section))
        if tag == "img":
            self.images.append((attributes, self._section))


def check_pages(book: Book, made: Path, generated: Iterable[str] = ()) -> list[str]:
    """Problems of the rendered pages in the folder `made`.

    As many pages as the table of contents names, each with a title; alt text on every
    picture; every internal link and anchor resolves. generated: pages by name that are
    neither in the table of contents nor Sphinx's own, and may be there.
    """
    problems = []
    for page in book.pages:
        path = made / f"{page}.html"
        if not path.is_file() or "<h1" not in path.read_text(encoding="utf-8"):
            problems.append(f"{page}.html was not rendered, or has no title")
    files = {
        p.relative_to(made).as_posix(): p
        for p in sorted(made.rglob("*.html"))
        if not p.relative_to(made).parts[0].startswith("_")
    }
    own = {*book.pages, *generated, "index", "genindex", "search", "py-modindex"}
    extra = sorted({name.removesuffix(".html") for name in files} - own)
    if extra:
        problems.append(f"pages that _toc.yml does not name: {', '.join(extra)}")
    pages = {name: _Page(p.read_text(encoding="utf-8")) for name, p in files.items()}
    for name, page in pages.items():
        for image, section in page.images:
            problem = _alt_problem(image)
            if problem:
                shown = _short(image.get("src", ""))
                problems.append(
                    f"{name}, section #{section}: the picture {shown} is {problem}: "
                    "![what is seen on it](file), or figures.show(alt=...)"
                )
        broken = {}
        for target, section in page.links:
            problem = _link_problem(made, name, target, pages)
            if problem:
                broken.setdefault((target, problem), section)
        problems += [
            f"{name}, section #{section}: the link {target} leads nowhere: {problem}"
            for (target, problem), section in broken.items()
        ]
    return problems


def _link_problem(made: Path, page: str, target: str, pages) -> str:
    try:
        parts = urlsplit(target)
    except ValueError as error:
        return str(error)
    if parts.scheme or parts.netloc:
        return ""
    inside = (made / page).parent / unquote(parts.path) if parts.path else made / page
    inside = inside / "index.html" if inside.is_dir() else inside
    if not inside.is_file():
        return "there is no such file"
    if not parts.fragment:
        return ""
    name = inside.resolve().relative_to(made.resolve()).as_posix()
    if name in pages and unquote(parts.fragment) not in pages[name].anchors:
        return f"{name} has no anchor of that name"
    return ""


def _alt_problem(image: Mapping[str, str]) -> str:
    """What is wrong with the alt text of an ``<img>``; empty if nothing."""
    alt = image.get("alt", "").strip()
    if not alt:
        return "without alt text"
    if _FILE_NAME.fullmatch(alt) or _HASH.fullmatch(alt):
        return f"with {_short(alt)!r} for alt text"
    return ""


def _text(content: str | list[str]) -> str:
    return content if isinstance(content, str) else "".join(content)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
