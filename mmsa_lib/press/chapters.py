"""Find the pages of the book and read its chapters without executing anything.

A page is any file named in ``_toc.yml``. A page whose header has a ``kernelspec`` is a
chapter: a MyST-Markdown notebook. A page with code cells that would not be executed is
an error. Cells are read here with jupytext's own parser,
markdown-it, and not with jupytext, because ``mmsa-book status`` must answer at once and
importing that takes over a second; a test holds this reader to jupytext's result.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin

from mmsa_lib.errors import BookError, MmsaError, UnknownNameError, unknown
from mmsa_lib.files import line_in_yaml, read_text, read_yaml, sha256
from mmsa_lib.press.values import UNCLEAR, Kind, check, fits, kind_of

STANDARD_PARAMETERS = ("profile", "corpus", "data_dir", "seeds", "device", "epochs")
CELL = "{code-cell}"
# directives that show what stands in them as it is
_LITERAL = {"code", "code-block", "eval-rst", "literalinclude", "math", "raw"}


@dataclass(frozen=True)
class Cell:
    """A code cell: the line of its fence (from 1), its tags and its source."""

    line: int
    tags: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Chapter:
    """One executable page. `name` is the file's stem, `page` its name in the toc."""

    name: str
    page: str
    path: Path
    text: str
    cells: tuple[Cell, ...]

    @property
    def sha256(self) -> str:
        return sha256(self.text)

    @property
    def where(self) -> str:
        """The file as messages name it."""
        return f"{self.page}.md" if self.page else self.path.name

    @property
    def parameters(self) -> dict[str, object]:
        """Names and defaults of the cell tagged ``parameters``, in order."""
        return {name: default for name, (default, _) in self._declared.items()}

    @cached_property
    def kinds(self) -> dict[str, Kind | None]:
        """What each parameter takes; None where no type is declared."""
        return {k: kind_of(k, *found) for k, found in self._declared.items()}

    @cached_property
    def _declared(self) -> dict[str, tuple[object, str]]:
        """Default and annotation of each parameter."""
        found = {}
        first = next((c for c in self.cells if "parameters" in c.tags), None)
        for node in parse(first.source) if first else ():
            note = ""
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                targets, note = [node.target], ast.unparse(node.annotation)
            else:
                continue
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                value = UNCLEAR
            found |= {t.id: (value, note) for t in targets if isinstance(t, ast.Name)}
        return found

    def check(self, given: Mapping[str, object]) -> dict[str, object]:
        """`given`, or an error that names what fits."""
        for name in given:
            if name not in self.parameters:
                raise unknown(f"parameter of {self.name}", name, self.parameters)
        return {
            name: check(
                f"parameter {name} of {self.name}",
                name,
                value,
                self.parameters[name],
                self.kinds[name],
            )
            for name, value in given.items()
        }


@dataclass(frozen=True)
class Book:
    """Every page in the order of the table of contents, and the chapters by name."""

    root: Path
    pages: dict[str, Path]  # name in the toc -> file
    chapters: dict[str, Chapter] = field(repr=False)

    @property
    def build(self) -> Path:
        return self.root / "_build"

    def __getitem__(self, name: str) -> Chapter:
        if name not in self.chapters:
            raise unknown("chapter", name, self.chapters)
        return self.chapters[name]

    def profile(self, name: str) -> dict[str, dict[str, object]]:
        """Parameters of each chapter under a profile: ``{chapter: {name: value}}``.

        Values under ``all`` reach every chapter that has a parameter of that name;
        those under ``chapters`` must exist in theirs.
        """
        file = self._profile(name)
        self.plans(name, "")  # a mistake there is told now
        self.limits(name)
        common, own = file.mapping("all"), file.mapping("chapters")
        for chapter in own:
            with file.blamed("chapters", chapter):
                self[chapter]
        found = {}
        for chapter in self.chapters.values():
            named = {k: v for k, v in common.items() if k in chapter.parameters}
            with file.blamed("all"):
                found[chapter.name] = chapter.check(named)
            with file.blamed("chapters", chapter.name):
                given = file.mapping("chapters", chapter.name)
                found[chapter.name] |= chapter.check(given)
        return found

    def bands(self, name: str) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Where metrics have to lie: ``{chapter: {record: {path: [low, high]}}}``."""
        file = self._profile(name)
        found = file.mapping("bands")
        for chapter in found:
            with file.blamed("bands", chapter):
                self[chapter]
            for record in file.mapping("bands", chapter):
                for path, band in file.mapping("bands", chapter, record).items():
                    with file.blamed("bands", chapter, record, path):
                        _check_band(band)
        return found

    def limits(self, name: str) -> dict[str, float]:
        """What a cell may take under a profile: seconds, and MiB of output.

        `LIMITS` where the profile, or its file, says nothing.
        """
        if not (self.root / "book" / "profiles" / f"{name}.yml").is_file():
            return dict(LIMITS)
        file = self._profile(name)
        given = file.mapping("limits")
        for key, value in given.items():
            with file.blamed("limits", key):
                if key not in LIMITS:
                    raise unknown("limit", key, LIMITS)
                if not fits(value, {"float"}) or not 0 < value < float("inf"):
                    raise BookError(f"{key} takes a positive number; found {value!r}")
        return LIMITS | given

    def plans(self, profile: object, chapter: str) -> dict[str, dict[str, object]]:
        """How a chapter trains on each corpus: ``{corpus: {name: value}}``.

        None under a profile without a file, such as one of ``-p profile NAME``. Raises
        `BookError` for a section that is wrong anywhere, whatever the chapter.
        """
        path = self.root / "book" / "profiles" / f"{profile}.yml"
        if not path.is_file():
            return {}
        file = self._profile(str(profile))
        found = file.mapping("plans", shape=_PLANS)
        for name in found:
            if name not in self.chapters:
                where = file.where("plans", name, path=["plans"])
                raise BookError(f"{where}: {unknown('chapter', name, self.chapters)}")
            for corpus in file.mapping("plans", name, shape=_PLANS):
                plan = file.mapping("plans", name, corpus, shape=_PLANS, empty=False)
                with file.blamed("plans", name, corpus):
                    _check_plan(plan)
        return found.get(chapter) or {}

    def _profile(self, name: str) -> Profile:
        folder = self.root / "book" / "profiles"
        known = {p.stem: p for p in folder.glob("*.yml")}
        if name not in known:
            raise unknown("profile", name, known)
        shown = f"book/profiles/{known[name].name}"
        file = _read_profile(read_text(known[name], shown), shown)
        for key in file.mapping():
            with file.blamed(key):
                if key not in SECTIONS:
                    raise unknown(f"key in {known[name].name}", key, SECTIONS)
        return file


SECTIONS = ("all", "chapters", "bands", "plans", "limits")
LIMITS = {"cell_seconds": 4 * 3600.0, "output_mib": 4.0}  # both of one cell
_PLANS = "plans are {chapter: {corpus: {epochs: 3, ...}}}"
_SHAPES = {
    "all": "parameters are {name: value}",
    "chapters": "chapters are {chapter: {name: value}}",
    "bands": "bands are {chapter: {record: {field: [low, high]}}}",
    "limits": f"limits are {{{', '.join(LIMITS)}}}",
}


@dataclass(frozen=True)
class Profile:
    """A file of ``book/profiles``: what stands in it, and where."""

    shown: str
    text: str
    content: object

    def where(self, *keys: str, path: Sequence[str] | None = None) -> str:
        """File, line and section, for a message; `path` names another section."""
        line = line_in_yaml(self.text, *keys)
        return ", ".join(
            [f"{self.shown}, line {line}", *(keys if path is None else path)]
        )

    def mapping(self, *keys: str, shape: str = "", empty: bool = True) -> dict:
        """The mapping below some keys, empty where there is none.

        Raises `BookError` with file, line and `shape` for anything else.
        """
        value = self.content
        for key in keys:
            value = (value or {}).get(key)
        if value is None and (empty or not keys):
            return {}
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            shape = shape or _SHAPES.get(next(iter(keys), ""), "a profile is a mapping")
            raise BookError(f"{self.where(*keys)}: {shape}; found {value!r}")
        return value

    @contextmanager
    def blamed(self, *keys: str) -> Generator[None]:
        """An error inside gets file and line in front."""
        try:
            yield
        except MmsaError as error:
            if str(error).startswith(self.shown):
                raise
            kind = (
                UnknownNameError if isinstance(error, UnknownNameError) else BookError
            )
            raise kind(f"{self.where(*keys)}: {error}") from error


@cache  # every chapter asks
def _read_profile(text: str, shown: str) -> Profile:
    return Profile(shown, text, read_yaml(text, shown, as_written=True))


def _check_band(band: object) -> None:
    numbers = isinstance(band, list) and len(band) == 2
    numbers = numbers and all(fits(end, {"float"}) for end in band)
    if not numbers or not band[0] <= band[1]:
        raise BookError(f"a band is [low, high]; found {band!r}")


def _check_plan(plan: Mapping[str, object]) -> None:
    for name, value in plan.items():
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
            first, *rest = re.split("[eE]", value)
            raise BookError(
                f"YAML reads {name} {value} as a word; write {first}.0e{rest[0]}"
            )


def find_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` that holds a book."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "_toc.yml").is_file() and (folder / "_config.yml").is_file():
            return folder
    raise BookError(
        f"no book here: neither {start} nor a folder above it has _toc.yml and "
        "_config.yml. Go to your clone of the book and try again."
    )


def open_book(root: Path) -> Book:
    """Read the table of contents and every chapter it names.

    Raises `BookError`, with file and line where there is one, for a missing page, a
    page that the table of contents forgot, two chapters of one name, a header that
    papermill could not use, code cells that would not be executed, and for YAML or an
    encoding that cannot be read.
    """
    pages, chapters = {}, {}
    for page, line in _table_of_contents(read_text(root / "_toc.yml", "_toc.yml")):
        path = root / page if page.endswith(".md") else root / f"{page}.md"
        if not path.resolve().is_relative_to(root.resolve()):
            raise BookError(f"_toc.yml, line {line}: {page!r} lies outside the book")
        if not path.is_file():
            raise BookError(
                f"_toc.yml names {page!r} but {path.name} does not exist in "
                f"{path.parent.name}/ (line {line}). Write the page or take the line "
                "out."
            )
        page = page.removesuffix(".md")
        if page in pages:
            raise BookError(
                f"_toc.yml names {page!r} twice (line {line}); a page has one place"
            )
        pages[page] = path
        chapter = read_chapter(path, page)
        if chapter is None:
            continue
        if chapter.name in chapters:
            raise BookError(
                f"{page}.md and {chapters[chapter.name].where}: two chapters are "
                f"called {chapter.name!r}; rename one"
            )
        chapters[chapter.name] = chapter
    forgotten = sorted(
        p.relative_to(root).as_posix()
        for p in (root / "book").rglob("*.md")
        if p not in pages.values() and not _is_private(p.relative_to(root))
    )
    if forgotten:
        raise BookError(
            f"{', '.join(forgotten)}: written but not in _toc.yml, so no reader would "
            "find it. Add it to _toc.yml or move it out of book/."
        )
    configuration(root)
    return Book(root, pages, chapters)


def configuration(root: Path) -> dict:
    """What ``_config.yml`` says. Raises `BookError` with the line that is wrong."""
    found = read_yaml(read_text(root / "_config.yml", "_config.yml"), "_config.yml")
    if found is not None and not isinstance(found, dict):
        raise BookError(
            f"_config.yml, line 1: settings are name: value; found {found!r}"
        )
    return found or {}


def read_chapter(path: Path, page: str = "") -> Chapter | None:
    """The chapter in a MyST-Markdown file, or None for a page without code cells.

    Raises `BookError` with file and line for cells that would not be executed.
    """
    shown = f"{page}.md" if page else path.name
    text = read_text(path, shown)
    if not text.startswith("---") and CELL not in text:
        return None  # most pages
    found = blocks(text)
    cells = tuple(_cells(shown, text, found))
    header = found and found[0].type == "front_matter"
    meta = read_yaml(found[0].content, shown, 2) if header else {}
    if meta is not None and not isinstance(meta, dict):
        raise BookError(f"{shown}, line 2: a header is name: value; found {meta!r}")
    if "kernelspec" not in (meta or {}):
        if not cells:
            return None
        lacks = "its header has no kernelspec" if header else _NO_HEADER
        raise BookError(
            f"{shown}, line {cells[0].line}: here is a code cell, but {lacks}, so it "
            "would not be executed. CONTRIBUTING.md shows the header of a chapter"
        )
    spec = meta["kernelspec"]
    if not isinstance(spec, dict) or spec.get("language") != "python":
        line = 1 + line_in_yaml(found[0].content, "kernelspec")
        raise BookError(
            f"{shown}, line {line}: the header's kernelspec needs 'language: python', "
            "or no parameters can be set"
        )
    return Chapter(path.stem, page, path, text, cells)


_NO_HEADER = (
    "the page has no header that can be read (the file begins with a line --- at the "
    "left margin, then come its entries, then another line ---)"
)


def parse(source: str) -> list[ast.stmt]:
    """Statements of a cell, with magics blanked.

    Of a cell that still does not parse (executing it will say why) only what it may
    import is kept: everything in each package or module that it mentions.
    """
    lines = ("" if s.lstrip()[:1] in ("%", "!") else s for s in source.splitlines())
    try:
        return ast.parse("\n".join(lines)).body
    except SyntaxError:
        names = sorted(set(re.findall(r"\bmmsa_lib(?:\.\w+)*", source)))
        return ast.parse("\n".join(f"from {name} import *" for name in names)).body


def _is_private(path: Path) -> bool:
    return any(part[0] in "_." for part in path.parts)


def _table_of_contents(text: str) -> Iterator[tuple[str, int]]:
    """Pages that ``_toc.yml`` names, and their lines."""
    toc = read_yaml(text, "_toc.yml")
    if not isinstance(toc, dict) or "root" not in toc:
        raise BookError(
            "_toc.yml, line 1: a table of contents is 'root: PAGE', then parts or "
            f"chapters; found {toc!r}"
        )
    yield from _files_of(toc, text, ())


def _files_of(node, text: str, path: tuple) -> Iterator[tuple[str, int]]:
    if isinstance(node, dict):
        for key in ("root", "file"):
            if key in node:
                line = line_in_yaml(text, *path, key)
                if not isinstance(node[key], str) or not node[key]:
                    raise BookError(
                        f"_toc.yml, line {line}: {key} is the name of a page, such as "
                        f"book/corpora; found {node[key]!r}"
                    )
                yield node[key], line
        node = {k: v for k, v in node.items() if k not in ("root", "file")}
    steps = node.items() if isinstance(node, dict) else enumerate(node)
    for step, child in steps:
        if isinstance(child, (dict, list)):
            yield from _files_of(child, text, (*path, step))


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark").enable("table").disable("inline", True)
    return parser.use(front_matter_plugin).use(myst_block_plugin)


def blocks(text: str) -> list[Token]:
    """The blocks of MyST-Markdown, without looking into running text."""
    return _parser().parse(text + "\n")


def below_title(text: str) -> int:
    """The number of lines up to the end of the first title, 0 if there is none."""
    titles = (t for t in blocks(text) if t.type == "heading_open" and t.tag == "h1")
    return next((t.map[1] for t in titles if t.map), 0)


def _cells(shown: str, text: str, tokens: list[Token]) -> Iterator[Cell]:
    """Top-level ``{code-cell}`` fences.

    Raises `BookError` for one that stands in another block, where it is only text.
    """
    lines = text.splitlines()
    for token in tokens:
        line = token.map[0] + 1 if token.map else 0
        if CELL not in token.content + token.info:
            continue
        if token.type == "fence" and not token.level and token.info.startswith(CELL):
            _refuse_unclosed(shown, token, lines)
            yield _cell(shown, line, token.content.splitlines())
        elif (found := _hidden_cell(token, lines)) is not None:
            raise BookError(
                f"{shown}, line {line + found}: a code cell that would not be "
                f"executed. It begins with ```{CELL} at the left margin and stands in "
                "no other block"
            )


def _hidden_cell(token: Token, lines: list[str]) -> int | None:
    """Which line of a block begins a cell that nobody would execute, from 0."""
    if token.type == "fence" and token.info.strip().startswith(CELL):
        return 0
    if token.type == "fence":
        name = re.match(r"\s*\{([^}]*)\}", token.info)
        open_ended = not token.level and not _is_closed(token, lines)
        if not open_ended and (name is None or name[1] in _LITERAL):
            return None  # shown as it is
        start = r"\s*(`{3,}|~{3,}|:{3,})\s*\{code-cell\}"
        found = _line_like(start, token.content.splitlines())
        return None if found is None else found + 1
    if token.type in ("inline", "code_block"):
        start = r"\s*(`{3,}|~{3,}|:{3,})\s*\{code-cell\}"
        return _line_like(start, token.content.splitlines())
    return None


def _line_like(pattern: str, lines: list[str]) -> int | None:
    return next((i for i, s in enumerate(lines) if re.match(pattern, s)), None)


def _refuse_unclosed(shown: str, token: Token, lines: list[str]) -> None:
    """A cell whose end is missing takes those below it into itself."""
    if CELL in token.content and not _is_closed(token, lines):
        raise BookError(
            f"{shown}, line {token.map[0] + 1}: this block is never closed with "
            f"{token.markup}, so the code cells below would not be executed"
        )


def _is_closed(token: Token, lines: list[str]) -> bool:
    last = min(token.map[1], len(lines)) - 1
    end = lines[last].strip() if last > token.map[0] else ""
    return len(end) >= len(token.markup) and set(end) == {token.markup[0]}


def _cell(shown: str, line: int, body: list[str]) -> Cell:
    options: list[str] = []
    first = line + 1
    if body and body[0].startswith("---"):
        end = next((i for i, s in enumerate(body[1:], 1) if s.startswith("---")), None)
        if end is None:
            raise BookError(
                f"{shown}, line {first}: the options of this cell are not closed by a "
                "line ---"
            )
        options, body, first = body[1:end], body[end + 1 :], first + 1
    else:
        while body and body[0].lstrip().startswith(":"):
            options.append(body.pop(0).lstrip()[1:])
    if body and not body[0].strip():  # a blank line may follow the options
        body = body[1:]
    text = "\n".join(options)
    found = (read_yaml(text, shown, first) if options else None) or {}
    if not isinstance(found, dict):
        raise BookError(
            f"{shown}, line {first}: options of a cell are name: value, such as "
            f":tags: [hide-input]; found {text!r}"
        )
    tags = found.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        at = first + line_in_yaml(text, "tags") - 1
        raise BookError(
            f"{shown}, line {at}: tags are words, such as [parameters]; found {tags!r}"
        )
    return Cell(line, tuple(tags), "\n".join(body))
