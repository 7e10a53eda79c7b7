"""The gates of the rendered book: every page there, every link and picture whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmsa_lib.press.chapters import Book
from mmsa_lib.press.reading import Page, alt_problem, short


def check_pages(book: Book, made: Path, generated: Iterable[str] = ()) -> list[str]:
    """Problems of the rendered pages in the folder `made`.

    As many pages as the table of contents names, each with a title; alt text on every
    picture; every internal link and anchor resolves. generated: pages by name that are
    neither in the table of contents nor Sphinx's own, and may be there.
    """
    files = {
        p.relative_to(made).as_posix(): p
        for p in sorted(made.rglob("*.html"))
        if not p.relative_to(made).parts[0].startswith("_")
    }
    pages = {name: Page(p.read_text(encoding="utf-8")) for name, p in files.items()}
    problems = [
        f"{page}.html was not rendered, or has no title"
        for page in book.pages
        if f"{page}.html" not in pages or not pages[f"{page}.html"].titled
    ]
    own = {*book.pages, *generated, "index", "genindex", "search", "py-modindex"}
    extra = sorted({name.removesuffix(".html") for name in files} - own)
    if extra:
        problems.append(f"pages that _toc.yml does not name: {', '.join(extra)}")
    for name, page in pages.items():
        for image, section in page.images:
            problem = alt_problem(image)
            if problem:
                shown = short(image.get("src", ""))
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
