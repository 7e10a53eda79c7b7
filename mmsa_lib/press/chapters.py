"""Find the pages of the book and read its chapters without executing anything.

A page is any file named in ``_toc.yml``. A page whose header has a ``kernelspec`` is a
chapter: a MyST-Markdown notebook. Its cells are read here with jupytext's own parser,
markdown-it, and not with jupytext, because ``mmsa-book status`` must answer at once and
importing that takes over a second; a test holds this reader to jupytext's result.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin

from mmsa_lib.errors import BookError, unknown
from mmsa_lib.files import sha256

STANDARD_PARAMETERS = ("profile", "corpus", "data_dir", "seeds", "device", "epochs")
UNCLEAR = object()  # the default of a parameter that is not a plain literal


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

    @cached_property
    def parameters(self) -> dict[str, object]:
        """Names and defaults of the cell tagged ``parameters``, in order."""
        found = {}
        for cell in self.cells:
            if "parameters" not in cell.tags:
                continue
            for node in parse(cell.source):
                if isinstance(node, ast.Assign):
                    targets = node.targets
                elif isinstance(node, ast.AnnAssign) and node.value is not None:
                    targets = [node.target]
                else:
                    continue
                try:
                    value = ast.literal_eval(node.value)
                except ValueError:
                    value = UNCLEAR
                found |= {t.id: value for t in targets if isinstance(t, ast.Name)}
            break
        return found

    def check(self, given: Mapping[str, object]) -> dict[str, object]:
        """`given` with values of the right type, or an error that names what fits."""
        for name in given:
            if name not in self.parameters:
                raise unknown(f"parameter of {self.name}", name, self.parameters)
        return {k: _fit(self.name, k, v, self.parameters[k]) for k, v in given.items()}


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
        content = self._profile(name)
        common, own = content.get("all") or {}, content.get("chapters") or {}
        for chapter in own:
            self[chapter]
        return {
            chapter.name: chapter.check(
                {k: v for k, v in common.items() if k in chapter.parameters}
                | (own.get(chapter.name) or {})
            )
            for chapter in self.chapters.values()
        }

    def bands(self, name: str) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Where metrics have to lie: ``{chapter: {record: {path: [low, high]}}}``."""
        found = self._profile(name).get("bands") or {}
        for chapter, records in found.items():
            self[chapter]
            for record, paths in records.items():
                for path, band in paths.items():
                    _check_band(f"{name}.yml, {chapter}, {record}, {path}", band)
        return found

    def plans(self, profile: object, chapter: str) -> dict[str, dict[str, object]]:
        """How a chapter trains on each corpus: ``{corpus: {name: value}}``.

        None under a profile without a file, such as one of ``-p profile NAME``. Raises
        `BookError` for a section that is wrong anywhere, whatever the chapter.
        """
        path = self.root / "book" / "profiles" / f"{profile}.yml"
        if not path.is_file():
            return {}
        where = f"book/profiles/{path.name}, plans"
        content = _read_yaml(path.read_text(encoding="utf-8")) or {}
        found = _mapping(where, content.get("plans") or {})
        for name, plans in found.items():
            if name not in self.chapters:
                raise BookError(f"{where}: {unknown('chapter', name, self.chapters)}")
            for corpus, plan in _mapping(f"{where}, {name}", plans or {}).items():
                _check_plan(f"{where}, {name}, {corpus}", plan)
        return found.get(chapter) or {}

    def _profile(self, name: str) -> dict:
        folder = self.root / "book" / "profiles"
        known = {p.stem: p for p in folder.glob("*.yml")}
        if name not in known:
            raise unknown("profile", name, known)
        content = yaml.safe_load(known[name].read_text(encoding="utf-8")) or {}
        keys = ["all", "chapters", "bands", "plans"]
        for key in content:
            if key not in keys:
                raise unknown(f"key in {known[name].name}", key, keys)
        return content


@cache  # every chapter asks
def _read_yaml(text: str) -> dict | None:
    return yaml.safe_load(text)


def _check_band(where: str, band: object) -> None:
    numbers = isinstance(band, list) and len(band) == 2
    numbers = numbers and all(isinstance(end, (int, float)) for end in band)
    if not numbers or band[0] > band[1]:
        raise BookError(f"{where}: a band is [low, high]; found {band!r}")


def _mapping(where: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise BookError(
            f"{where}: plans are {{chapter: {{corpus: {{epochs: 3, ...}}}}}}; found "
            f"{value!r}"
        )
    return value


def _check_plan(where: str, plan: object) -> None:
    for name, value in _mapping(where, plan).items():
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
            first, *rest = re.split("[eE]", value)
            raise BookError(
                f"{where}: YAML reads {name} {value} as a word; write "
                f"{first}.0e{rest[0]}"
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

    Raises `BookError` for a missing page, a page that the table of contents forgot,
    two chapters of one name, or a header that papermill could not use.
    """
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    pages, chapters = {}, {}
    for page in _files_of(toc):
        path = root / page if page.endswith(".md") else root / f"{page}.md"
        if not path.is_file():
            raise BookError(
                f"_toc.yml names {page!r} but {path.name} does not exist in "
                f"{path.parent.name}/. Write the page or take the line out."
            )
        page = page.removesuffix(".md")
        if page in pages:
            raise BookError(f"_toc.yml names {page!r} twice; a page has one place")
        pages[page] = path
        chapter = read_chapter(path, page)
        if chapter is None:
            continue
        if chapter.name in chapters:
            raise BookError(f"two chapters are called {chapter.name!r}; rename one")
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
    return Book(root, pages, chapters)


def read_chapter(path: Path, page: str = "") -> Chapter | None:
    """The chapter in a MyST-Markdown file, or None for a page without a kernel."""
    text = path.read_text(encoding="utf-8")
    found = blocks(text) if text.startswith("---") else []  # most pages have no header
    header = found[0].content if found and found[0].type == "front_matter" else ""
    meta = yaml.safe_load(header) or {}
    if "kernelspec" not in meta:
        return None
    if (meta["kernelspec"] or {}).get("language") != "python":
        raise BookError(
            f"{path.name}: the header's kernelspec needs 'language: python', or no "
            "parameters can be set"
        )
    return Chapter(path.stem, page, path, text, tuple(_cells(found)))


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


def _files_of(node) -> Iterator[str]:
    if isinstance(node, dict):
        if "root" in node:
            yield node["root"]
        if "file" in node:
            yield node["file"]
        node = [v for v in node.values() if isinstance(v, list)]
    if isinstance(node, list):
        for child in node:
            yield from _files_of(child)


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


def _cells(tokens: list[Token]) -> Iterator[Cell]:
    """Top-level ``{code-cell}`` fences; what stands inside another block is text."""
    for token in tokens:
        fence = token.type == "fence" and token.level == 0
        if fence and token.info.startswith("{code-cell}"):
            yield _cell(token.map[0] + 1, token.content.splitlines())


def _cell(line: int, body: list[str]) -> Cell:
    options: list[str] = []
    if body and body[0].startswith("---"):
        end = next((i for i, s in enumerate(body[1:], 1) if s.startswith("---")), None)
        options, body = body[1:end], body[end + 1 :] if end else []
    else:
        while body and body[0].lstrip().startswith(":"):
            options.append(body.pop(0).lstrip()[1:])
    if body and not body[0].strip():  # a blank line may follow the options
        body = body[1:]
    found = (yaml.safe_load("\n".join(options)) or {}) if options else {}
    tags = found.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    return Cell(line, tuple(tags), "\n".join(body))


def _fit(chapter: str, name: str, value, default):
    """The value as the type of its default, where that type is clear."""
    if default is UNCLEAR or default is None or value is None:
        return value
    if isinstance(default, str):
        fits = isinstance(value, str)
    elif isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, (int, float)):
        number = int if isinstance(default, int) else (int, float)
        fits = isinstance(value, number) and not isinstance(value, bool)
    elif isinstance(default, (list, tuple)):
        fits = isinstance(value, (list, tuple))
    else:
        fits = isinstance(value, type(default))
    if not fits:
        raise BookError(
            f"parameter {name} of {chapter} is {default!r} by default, so it takes a "
            f"{type(default).__name__}; found {value!r} ({type(value).__name__})"
        )
    return value
