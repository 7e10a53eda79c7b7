"""What a reader sees of HTML: its text, marks, pictures and links."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bs4 import BeautifulSoup, Tag
from bs4.element import PreformattedString

_MARKS = ("rec", "ref", "given", "run-card")
_UNSEEN = {"script", "style", "svg", "template"}
_FILE_NAME = re.compile(r"\S*\.(png|svg|jpe?g|gif|webp)", re.IGNORECASE)
_HASH = re.compile(r"[0-9a-f]{12,}", re.IGNORECASE)


def soup_of(source: str) -> BeautifulSoup:
    """The tree of a piece of HTML; attributes are texts, ``class`` too."""
    return BeautifulSoup(source, "html.parser", multi_valued_attributes=None)


@dataclass
class Mark:
    """An element that says where its text comes from."""

    kind: str  # "rec", "ref", "given" or "run-card"
    attributes: dict[str, str]
    text: str


@dataclass
class Fragment:
    """What an output shows, and its marks, pictures, tables and cells of tables."""

    seen: list[str]  # all text, in the pieces between two tags
    plain: list[str]  # of these what stands outside marks and headings of tables
    marks: list[Mark] = field(default_factory=list)
    images: list[dict[str, str]] = field(default_factory=list)
    tables: int = 0
    cells: int = 0


def read_text(content: str) -> Fragment:
    """An output of plain text."""
    return Fragment([content], [content])


def read_html(content: str) -> Fragment:
    """An output of HTML. A mark inside a mark is part of the outer one."""
    soup = soup_of(content)
    marked = {id(tag) for tag in soup.find_all(_kind)}
    seen, plain = [], []
    for text, above in _texts(soup):
        seen.append(text)
        in_cell = next((tag.name for tag in above if tag.name in ("td", "th")), "")
        if in_cell != "th" and not any(id(tag) in marked for tag in above):
            plain.append(text)
    marks = [
        Mark(_kind(tag), dict(tag.attrs), "".join(text for text, _ in _texts(tag)))
        for tag in soup.find_all(_kind)
        if not any(id(outer) in marked for outer in tag.parents)
    ]
    images = [dict(tag.attrs) for tag in soup.find_all("img")]
    tables, cells = len(soup.find_all("tbody")), len(soup.find_all("td"))
    return Fragment(seen, plain, marks, images, tables, cells)


def _kind(tag: Tag) -> str:
    classes = tag.get("class", "").split()
    return next((c for c in classes if c in _MARKS), "")


def _texts(tag: Tag) -> Iterator[tuple[str, list[Tag]]]:
    """Pieces of text that are shown (no comment, no script) and what is above them."""
    for text in tag.find_all(string=True):
        above = list(text.parents)
        if isinstance(text, PreformattedString):
            continue
        if not any(outer.name in _UNSEEN for outer in above):
            yield str(text), above


class Page:
    """Title, anchors, links and pictures of a page, with the section they stand in."""

    def __init__(self, source: str):
        self.anchors: set[str] = {"", "top"}
        self.links: list[tuple[str, str]] = []  # target, section
        self.images: list[tuple[dict[str, str], str]] = []
        soup, section = soup_of(source), ""
        self.titled = soup.find("h1") is not None
        for tag in soup.find_all(True):
            attributes = tag.attrs
            self.anchors |= {attributes[k] for k in ("id", "name") if k in attributes}
            if tag.name in ("section", "figure") and "id" in attributes:
                section = attributes["id"]
            for name in ("href", "src", "poster"):
                if name in attributes:
                    self.links.append((attributes[name], section))
            if tag.name == "img":
                self.images.append((dict(attributes), section))


def alt_problem(image: Mapping[str, str]) -> str:
    """What is wrong with the alt text of an ``<img>``; empty if nothing."""
    alt = image.get("alt", "").strip()
    if not alt:
        return "without alt text"
    if _FILE_NAME.fullmatch(alt) or _HASH.fullmatch(alt):
        return f"with {short(alt)!r} for alt text"
    return ""


def short(text: str) -> str:
    """At most 60 characters of a text, for a message."""
    return text if len(text) <= 60 else f"{text[:57]}..."
