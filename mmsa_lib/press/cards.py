"""Where the numbers of a page come from, made visible when the book is rendered.

Each number links to its record on the records page, a run card says whether its chapter
is fresh, and two pages are written out: the status of every chapter and the list of
records. Nothing here depends on the time of rendering: equal inputs, equal pages.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from mmsa_lib import runs
from mmsa_lib.files import read_text
from mmsa_lib.press.chapters import Book, below_title
from mmsa_lib.press.freshness import moved_on
from mmsa_lib.press.reading import soup_of
from mmsa_lib.press.shelf import Shelf

STATUS, RECORDS = "<!-- generated: status -->", "<!-- generated: records -->"
NOT_CURRENT = (
    "```{warning}\nThis page is not current. The chapter or something it depends on "
    "has changed since, and the new version could not be built; you see the last good "
    "one.\n```\n"
)
_LINES = ("Training time", "Peak memory", "Trained parameters", "Corpus", "Seeds")
_LINES += ("Hardware", "Commit", "Date")


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
        sources = {
            page: read_text(file, f"{page}.md")
            for page, file in self.book.pages.items()
        }
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
            lines = "".join(first["source"]).split("\n")
            end = below_title("\n".join(lines))
            parts = [*lines[:end], "", NOT_CURRENT, *lines[end:]]
            first["source"] = "\n".join(parts)
        return json.dumps(notebook, indent=1, ensure_ascii=False)

    def _linked(self, content: str, name: str, page: str) -> str:
        """An output with links to its records and the press's lines in run cards."""
        soup = soup_of(content)
        cards = soup.select("dl.run-card[data-records]")
        numbers = soup.select(".rec[data-record]") if self.home else []
        if not cards and not numbers:
            return content
        for card in cards:
            own = [self.shelf[i] for i in card["data-records"].split()]
            lines = self._card(name, page, own).items()
            rows = (f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in lines)
            card.append(soup_of("".join(rows)))
        for number in numbers:
            href = f"{self._to(page)}#record-{number['data-record']}"
            link = soup.new_tag("a", attrs={"class": "rec", "href": href})
            if number.name == "li":  # a link may not stand around an item of a list
                link.extend(list(number.contents))
                number.append(link)
            else:
                number.wrap(link)
        return soup.decode(formatter="html5")

    def _to(self, page: str) -> str:
        return posixpath.relpath(f"{self.home}.html", posixpath.dirname(page))

    def _card(self, name: str, page: str, own: list[runs.RunRecord]) -> dict[str, str]:
        """Lines that only the press knows, for a run card of the records `own`."""
        shown = self.shown[name]
        lines = {"Page": shown.state}
        old = [r for r in own if self._is_committed(r)]
        if old:
            lines["Code"] = self._code(old)
        if self.home:
            count = len(shown.noted.get("used", ()))
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
            return "the code is as it was"
        if all(moved):
            return "the code has moved on since"
        return f"the code has moved on since {sum(moved)} of {len(moved)}"

    # ------------------------------------------------------------ generated pages

    def _status(self, page: str) -> str:
        """A table of all chapters, then the cards of each."""
        groups: dict[str, dict[str, list[runs.RunRecord]]] = {}
        for r in self._committed:
            # a size or a count belongs to no corpus and costs nothing to make
            if r.kind == "benchmark" or r.corpus:
                what = r.corpus.get("name") or r.name
                found = groups.setdefault(r.chapter or "", {})
                found.setdefault(what, []).append(r)
        rows, parts = [], []
        for name, shown in self.shown.items():
            there = posixpath.relpath(
                f"{self.book[name].page}.html", posixpath.dirname(page)
            )
            link = f'<a href="{there}">{escape(name)}</a>'
            noted, old = shown.noted, groups.get(name, {})
            full = [r for records in old.values() for r in records]
            seconds, numbers = f"{noted['seconds']:,.0f} s", f"{noted['numbers']:,}"
            state = escape(shown.state)
            rows.append(
                [link, state, seconds, numbers, self._code(full) if full else ""]
            )
            records = [self.shelf[i] for i in _ids(noted.get("records"))]
            # comparisons may be of committed runs on other corpora
            records = [r for r in records if r.kind == "training"] or records
            whole = {"Run": "quick, for this book", "State": shown.state}
            whole |= {"Whole chapter": seconds, "Numbers checked": numbers}
            parts += [f"### {_plain(name)}", _card(whole | _facts(records))]
            parts += [self._old(what, records) for what, records in old.items()]
        others = {k: v for k, v in groups.items() if k not in self.shown}
        for name, old in sorted(others.items()):
            parts.append(f"### {_plain(name or 'Benchmarks')}")
            parts += [self._old(what, records) for what, records in old.items()]
        head = ("chapter", "state", "executed in", "numbers checked", "full runs")
        return "\n\n".join([_table(head, rows), *parts])

    def _old(self, what: str, records: list[runs.RunRecord]) -> str:
        kind = {r.kind for r in records} == {"benchmark"}
        run = f"benchmark {what}" if kind else f"full, {what}"
        whole = {"Run": run, "State": self._code(records)}
        return _card(whole | _facts(records))

    def _records(self, page: str, known: Mapping[str, runs.RunRecord]) -> str:
        folder = posixpath.relpath("_static/records", posixpath.dirname(page))
        groups: dict[tuple[str, bool], list[list[str]]] = {}
        for r in sorted(known.values(), key=lambda r: (r.name, r.created, r.id)):
            committed, file = self._is_committed(r), self.shelf.files[r.id[:12]].name
            f = {k: escape(_line(v)) for k, v in _facts([r]).items()}
            cost = [f["Training time"], f["Peak memory"]]
            if f["Trained parameters"] != runs.UNDEFINED:
                cost.append(f"{f['Trained parameters']} trained parameters")
            row = [
                f'<a id="record-{r.id[:12]}" href="{folder}/{escape(file)}">'
                f"{escape(_line(r.name))}</a><br>{r.id[:12]}",
                f["Corpus"],
                f["Seeds"],
                ", ".join(c for c in cost if c != runs.UNDEFINED) or runs.UNDEFINED,
                f"{f['Date']} at {f['Commit']}, {f['Hardware']}",
            ]
            row += [self._code([r])] * committed
            groups.setdefault((r.chapter or "", committed), []).append(row)
        head = ["record", "corpus", "seeds", "cost", "made"]
        parts = []
        for (chapter, committed), rows in sorted(
            groups.items(), key=lambda item: (not item[0][0], item[0])
        ):
            place = "committed" if committed else "made for this book"
            parts.append(f"## {_plain(chapter or 'Benchmarks')}, {place}")
            parts.append(_table(head + ["code"] * committed, rows))
        return "\n\n".join(parts)


def _ids(names: Iterable[str] | None) -> list[str]:
    """Ids in names such as ``late-fusion-0123456789ab``."""
    return [name.rpartition("-")[2] for name in names or ()]


def _facts(records: list[runs.RunRecord]) -> dict[str, str]:
    """The lines of a run card; what was not trained has no training time."""
    found = runs.facts(records) if records else {}
    if not any(r.resources.get("wall_seconds") for r in records):
        found["Training time"] = runs.UNDEFINED
    elif len(records) == 1:
        found["Training time"] = found["Training time"].partition(" in ")[0]
    first, *others = found.get("Commit", runs.UNDEFINED).split(", ")
    found["Commit"] = f"{first} and {len(others)} more" if others else first
    return {name: found.get(name, runs.UNDEFINED) for name in _LINES}


def _line(text: str) -> str:
    """A text without ends of lines, which would end a block of MyST."""
    return " ".join(text.split())


def _plain(text: str) -> str:
    """A text for a page of MyST that is shown as it is, in one line."""
    return re.sub(r"([!-,/:-@\[-`{-~])", r"\\\1", _line(text))


def _card(lines: Mapping[str, str]) -> str:
    """A run card for a page of MyST."""
    cells = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(_line(v))}</dd></div>"
        for k, v in lines.items()
    )
    return f'```{{raw}} html\n<dl class="run-card">{cells}</dl>\n```'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
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
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n```"
    )
