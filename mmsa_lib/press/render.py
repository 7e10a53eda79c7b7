"""Render executed chapters and plain pages into ``_build/html``, strictly.

Pages are gathered in a staging folder with execution switched off, so that the page
shows exactly what papermill produced. Any warning fails the rendering; the book that
was rendered last stays where it is until a new one is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from mmsa_lib.errors import BookError
from mmsa_lib.press.chapters import Book
from mmsa_lib.press.files import digest, sha256_of, write_atomic

_SPHINX_PAGES = {"index", "genindex", "search", "py-modindex"}
_TROUBLE = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|[Ee]rror:|Traceback")


def is_current(book: Book, notebooks: dict[str, Path]) -> bool:
    """Whether ``_build/html`` was rendered from exactly these inputs."""
    key_file = book.build / "html.key"
    return (
        (book.build / "html" / "index.html").is_file()
        and key_file.is_file()
        and key_file.read_text(encoding="utf-8") == digest(_inputs(book, notebooks))
    )


def render(book: Book, notebooks: dict[str, Path]) -> None:
    """Make ``_build/html`` from the executed notebook of each chapter.

    Raises `BookError` for a chapter without outputs, any warning, or a missing page;
    the book rendered before then stays.
    """
    for name, notebook in notebooks.items():
        check_outputs(name, notebook)
    key = digest(_inputs(book, notebooks))
    stage = _stage(book, notebooks)
    made = _jupyter_book(book, stage)
    _check_pages(book, made)
    html, old = book.build / "html", book.build / "html.old"
    shutil.rmtree(old, ignore_errors=True)
    # first of all: a kill must not leave new pages with the key of the old
    (book.build / "html.key").unlink(missing_ok=True)
    if html.exists():
        html.rename(old)
    made.rename(html)
    write_atomic(book.build / "html.key", key)
    for done in (old, stage, book.build / "rendering"):
        shutil.rmtree(done, ignore_errors=True)


def recover(book: Book) -> None:
    """Put in order what a killed build left; only for the one who holds the lock.

    Killed between two renames it left no ``html``: the last good book comes back.
    """
    html, old = book.build / "html", book.build / "html.old"
    if old.is_dir() and not html.exists():
        old.rename(html)
    for left in (old, book.build / "stage", book.build / "rendering"):
        shutil.rmtree(left, ignore_errors=True)
    for path in book.build.rglob("*.*.tmp"):  # of write_atomic and runs.save
        if not _is_running(path.name.split(".")[-2]):
            path.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    import psutil

    return pid.isdecimal() and psutil.pid_exists(int(pid))


def check_outputs(name: str, notebook: Path) -> None:
    """Refuse a notebook that was not executed to its end or that shows nothing."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code" and "".join(c["source"])]
    idle = sum(c["execution_count"] is None for c in code)
    if idle:
        raise BookError(f"{name}: {idle} of {len(code)} code cells were not executed")
    if not any(c["outputs"] for c in code):
        raise BookError(
            f"{name}: no code cell has an output, so the page would show no result"
        )


def _inputs(book: Book, notebooks: dict[str, Path]) -> dict[str, str]:
    sources = [book.root / "_config.yml", book.root / "_toc.yml", *book.pages.values()]
    lock = book.root / "constraints.txt"
    sources += [lock] if lock.is_file() else []
    sources += [source for source, _ in _assets(book)]
    found = {p.relative_to(book.root).as_posix(): sha256_of(p) for p in sources}
    return found | {f"executed {k}": sha256_of(p) for k, p in notebooks.items()}


def _assets(book: Book) -> Iterable[tuple[Path, Path]]:
    """Everything in ``book/`` that is no page: styles, images, bibliography."""
    folder = book.root / "book"
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or inside.parts[0] == "profiles" or not path.is_file():
            continue
        if path.suffix not in (".md", ".ipynb"):
            yield path, Path("book") / inside


def _stage(book: Book, notebooks: dict[str, Path]) -> Path:
    stage = book.build / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    executed = {book[name].page: path for name, path in notebooks.items()}
    for page, path in book.pages.items():
        source = executed.get(page, path)
        target = stage / f"{page}{source.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    for source, inside in _assets(book):
        (stage / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, stage / inside)
    shutil.copyfile(book.root / "_toc.yml", stage / "_toc.yml")
    config = yaml.safe_load((book.root / "_config.yml").read_text(encoding="utf-8"))
    config["execute"] = {"execute_notebooks": "off"}
    write_atomic(stage / "_config.yml", yaml.safe_dump(config, allow_unicode=True))
    return stage


def _jupyter_book(book: Book, stage: Path) -> Path:
    """Run Jupyter Book from nothing: rendered increments would hide old warnings."""
    out, log = book.build / "rendering", book.build / "logs" / "render.log"
    shutil.rmtree(out, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    # it reads the end of our pipe when we are killed: an orphan would go on writing
    # into the folder of the next build
    program = (
        "import os, threading\n"
        "def end():\n    os.read(0, 1)\n    os._exit(1)\n"
        "threading.Thread(target=end, daemon=True).start()\n"
        "from jupyter_book.cli.main import main; main()"
    )
    arguments = ["build", str(stage), "-W", "--keep-going", "--path-output", str(out)]
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=reading,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONWARNINGS": "ignore", "NO_COLOR": "1"},
        )
    finally:
        os.close(reading)
        os.close(writing)
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).replace(f"{stage}{os.sep}", "")
    log.write_text(text, encoding="utf-8")
    made = out / "_build" / "html"
    if done.returncode or not made.is_dir():
        lines = [s for s in text.splitlines() if _TROUBLE.search(s)]
        shown = "\n".join(lines[:20] or text.splitlines()[-20:])
        raise BookError(
            f"the pages could not be rendered, and the last good book is kept. Each "
            f"warning below has to go:\n{shown}\n(everything: {_short(book, log)})"
        )
    return made


def _check_pages(book: Book, made: Path) -> None:
    """As many pages as the table of contents names, each with its content."""
    for page in book.pages:
        path = made / f"{page}.html"
        if not path.is_file() or "<h1" not in path.read_text(encoding="utf-8"):
            raise BookError(f"{page}.html was not rendered, or has no title")
    found = {
        p.relative_to(made).with_suffix("").as_posix()
        for p in made.rglob("*.html")
        if not p.relative_to(made).parts[0].startswith("_")
    }
    extra = sorted(found - set(book.pages) - _SPHINX_PAGES)
    if extra:
        raise BookError(f"pages that _toc.yml does not name: {', '.join(extra)}")


def _short(book: Book, path: Path) -> str:
    return path.relative_to(book.root).as_posix()
