"""Where the numbers of a page come from, made visible when the book is rendered.

Each number links to its record on the records page, a run card says whether its chapter
is fresh, and two pages are written out: the status of every chapter and the list of
records. Nothing here depends on the time of rendering: equal inputs, equal pages.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from mmsa_lib import runs
from mmsa_lib.press.chapters import Book
from mmsa_lib.press.freshness import moved_on
from mmsa_lib.press.gates import Shelf

STATUS, RECORDS = "<!-- generated: status -->", "<!-- generated: records -->"
NOT_CURRENT = (
    "```{warning}\nThis page is not current. The chapter or something it depends on "
    "has changed since, and the new version could not be built; you see the last good "
    "one.\n```\n"
)
_NUMBER = re.compile(r'<data class="rec"[^>]* data-record="(\w+)"[^>]*>.*?</data>')
_VERDICT = re.compile(r'(<li class="rec"[^>]* data-record="(\w+)"[^>]*>)(.*?)(</li>)')
_CARD = re.compile(r'(<dl class="run-card".*?)(</dl>)', re.DOTALL)
_COLUMNS = ("Training time", "Peak memory", "Trained parameters", "Corpus", "Seeds")
_COLUMNS += ("Hardware", "Commit", "Date")


@dataclass(frozen=True)
class Shown:
    """A chapter as the book will show it, and what was noted when it was made."""

    notebook: Path
    noted: dict
    fresh: bool

    @property
    def state(self) -> str:
        return "fresh" if self.fresh else "stale: the last good version"


@dataclass
class Trace:
    """What a rendering adds to executed notebooks: links, states, generated pages."""

    book: Book
    shown: Mapping[str, Shown]
    shelf: Shelf
    pages: dict[str, str] = field(default_factory=dict)  # page -> text
    files: dict[str, Path] = field(default_factory=dict)  # name -> record to copy

    def __post_init__(self):
        sources = {p: f.read_text("utf-8") for p, f in self.book.pages.items()}
        self.home = next((p for p, text in sources.items() if RECORDS in text), "")
        self._moved = moved_on(self.book)
        if not any(mark in t for t in sources.values() for mark in (STATUS, RECORDS)):
            return
        committed = sorted((self.book.root / "results").rglob("*.json"))
        used = {i for s in self.shown.values() for i in s.noted.get("used", ())}
        used |= {i for s in self.shown.values() for i in _ids(s.noted.get("records"))}
        used |= set(_ids(p.stem for p in committed))
        known = {i: self.shelf[i] for i in sorted(used)}
        self._committed = [known[i] for i in _ids(p.stem for p in committed)]
        if self.home:
            self.files = {
                self.shelf.files[i].name: self.shelf.files[i] for i in sorted(used)
            }
        for page, text in sources.items():
            if STATUS in text:
                self.pages[page] = text.replace(STATUS, self._status(page))
            elif RECORDS in text:
                self.pages[page] = text.replace(RECORDS, self._records(page, known))

    # ------------------------------------------------------------ on a chapter

    def notebook(self, name: str) -> str:
        """The notebook of a chapter as the book shows it, JSON."""
        shown, page = self.shown[name], self.book[name].page
        notebook = json.loads(shown.notebook.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            for output in cell.get("outputs", ()):
                content = output.get("data", {}).get("text/html")
                if content is not None:
                    content = "".join(content)
                    output["data"]["text/html"] = self._linked(content, name, page)
        if not shown.fresh:
            first = next(c for c in notebook["cells"] if c["cell_type"] == "markdown")
            title, _, rest = "".join(first["source"]).partition("\n")
            first["source"] = f"{title}\n\n{NOT_CURRENT}\n{rest}"
        return json.dumps(notebook, indent=1, ensure_ascii=False)

    def _linked(self, content: str, name: str, page: str) -> str:
        def more(match) -> str:
            rows = "".join(
                f"<div><dt>{k}</dt><dd>{v}</dd></div>"
                for k, v in self._card(name, page).items()
            )
            return match[1] + rows + match[2]

        content = _CARD.sub(more, content)
        if self.home:
            content = _NUMBER.sub(lambda m: self._link(m[1], page, m[0]), content)
            content = _VERDICT.sub(
                lambda m: m[1] + self._link(m[2], page, m[3]) + m[4], content
            )
        return content

    def _link(self, short: str, page: str, text: str) -> str:
        return f'<a class="rec" href="{self._to(page)}#record-{short}">{text}</a>'

    def _to(self, page: str) -> str:
        return posixpath.relpath(f"{self.home}.html", posixpath.dirname(page))

    def _card(self, name: str, page: str) -> dict[str, str]:
        """Lines of a run card that only the press knows."""
        shown = self.shown[name]
        lines = {"State": shown.state}
        used = [self.shelf[i] for i in shown.noted.get("used", ())]
        old = [r for r in used if self._is_committed(r)]
        if old:
            newest = max(r.created[:10] for r in old)
            lines["Committed records"] = (
                f"{len(old)}, newest {newest}; {self._code(old)}"
            )
        if self.home:
            count = len(used)
            lines["Records"] = (
                f'<a href="{self._to(page)}">{count} behind this page</a>'
            )
        return lines

    def _is_committed(self, record: runs.RunRecord) -> bool:
        path = self.shelf.files[record.id[:12]]
        return path.is_relative_to(self.book.root / "results")

    def _code(self, records: Iterable[runs.RunRecord]) -> str:
        """Whether the code that made these records is the code of today."""
        moved = [self._moved(r) for r in records]
        if not any(moved):
            return "made by the code as it is"
        if all(moved):
            return "the code has moved on since"
        return f"the code has moved on since {sum(map(bool, moved))} of them"

    # ------------------------------------------------------------ generated pages

    def _status(self, page: str) -> str:
        def to(name: str) -> str:
            there = f"{self.book[name].page}.html"
            return posixpath.relpath(there, posixpath.dirname(page))

        rows = []
        for name, shown in self.shown.items():
            records = [self.shelf[i] for i in _ids(shown.noted.get("records"))]
            rows.append(
                [
                    f'<a href="{to(name)}">{escape(name)}</a>',
                    escape(shown.state),
                    f"{shown.noted['seconds']:,.0f} s",
                    f"{shown.noted['numbers']:,}",
                    *_facts(records),
                ]
            )
        head = ("chapter", "state", "whole chapter", "numbers checked", *_COLUMNS)
        built = _table("Chapters of this book, as executed for it.", head, rows)
        groups = {}
        for r in self._committed:
            # a size or a count belongs to no corpus and costs nothing to make
            if r.kind == "benchmark" or r.corpus:
                groups.setdefault(
                    (r.chapter or "benchmark", r.corpus.get("name") or r.name), []
                ).append(r)
        rows = [
            [escape(who), escape(self._code(records)), *_facts(records)]
            for (who, _), records in sorted(groups.items())
        ]
        head = ("chapter", "state", *_COLUMNS)
        kept = _table("Committed records of full runs and benchmarks.", head, rows)
        return f"{built}\n\n{kept}" if rows else built

    def _records(self, page: str, known: Mapping[str, runs.RunRecord]) -> str:
        folder = posixpath.relpath("_static/records", posixpath.dirname(page))
        groups: dict[tuple[bool, str], list[list[str]]] = {}
        for r in sorted(known.values(), key=lambda r: (r.name, r.created, r.id)):
            committed, file = self._is_committed(r), self.shelf.files[r.id[:12]].name
            link = f'<a href="{folder}/{escape(file)}">{escape(r.name)}</a>'
            row = [
                f'<span id="record-{r.id[:12]}">{link}</span>',
                r.id[:12],
                r.kind,
                *_facts([r]),
                self._code([r]) if committed else "",
            ]
            groups.setdefault((committed, r.chapter or "benchmark"), []).append(row)
        head = ("record", "id", "kind", *_COLUMNS, "code")
        parts = []
        for (committed, chapter), rows in sorted(groups.items()):
            place = "committed, full runs" if committed else "made for this book"
            parts.append(_table(f"{chapter}: {place}.", head, rows))
        return "\n\n".join(parts)


def _ids(names: Iterable[str] | None) -> list[str]:
    """Ids in names such as ``late-fusion-0123456789ab``."""
    return [name.rpartition("-")[2] for name in names or ()]


def _facts(records: list[runs.RunRecord]) -> Iterator[str]:
    known = runs.facts(records) if records else {}
    for column in _COLUMNS:
        text = known.get(column, runs.UNDEFINED)
        if column == "Commit" and ", " in text:
            first, *others = text.split(", ")
            text = f"{first} and {len(others)} more"
        yield escape(text)


def _table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table for a page of MyST; the cells are HTML."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td>{cell}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        '```{raw} html\n<div class="rec-table facts"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>\n```"
    )
