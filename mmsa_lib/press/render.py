"""Render executed chapters and plain pages into ``_build/html``, strictly.

Pages are gathered in a staging folder with execution switched off, so that the page
shows exactly what papermill produced, with its numbers linked to their records. Any
warning and any page that fails its gates stops the rendering; the book that was
rendered last stays where it is until a new one is whole.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from mmsa_lib.errors import BookError
from mmsa_lib.files import digest, python, read_text, sha256, sha256_of, write_atomic
from mmsa_lib.press.cards import Trace
from mmsa_lib.press.chapters import Book, configuration
from mmsa_lib.press.downloads import offer
from mmsa_lib.press.pages import check_pages

_TROUBLE = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|[Ee]rror:|Traceback")


def is_current(book: Book, trace: Trace) -> bool:
    """Whether ``_build/html`` was rendered from exactly these inputs."""
    key_file = book.build / "html.key"
    return (
        (book.build / "html" / "index.html").is_file()
        and key_file.is_file()
        and key_file.read_text(encoding="utf-8") == digest(_inputs(book, trace))
    )


def render(book: Book, trace: Trace) -> None:
    """Make ``_build/html`` from the chapters that `trace` shows.

    Raises `BookError` for any warning, and with every problem of `check_pages`; the
    book rendered before then stays.
    """
    key = digest(_inputs(book, trace))
    stage = _stage(book, trace)
    made = _jupyter_book(book, stage)
    for name, path in trace.files.items():
        (made / "_static" / "records").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, made / "_static" / "records" / name)
    problems = check_pages(book, made)
    if problems:
        raise BookError(
            "the pages were rendered but do not hold, and the last good book is kept:\n"
            + "\n".join(problems)
        )
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


def _inputs(book: Book, trace: Trace) -> dict[str, str]:
    sources = [book.root / "_config.yml", book.root / "_toc.yml", *book.pages.values()]
    lock = book.root / "constraints.txt"
    sources += [lock] if lock.is_file() else []
    sources += [source for source, _ in _assets(book)]
    sources += (book.root / "mmsa_lib").rglob("*.py")  # the reference shows docstrings
    found = {p.relative_to(book.root).as_posix(): sha256_of(p) for p in sources}
    for path in Path(__file__).parent.glob("*.py"):  # another press, other pages
        found[f"press {path.name}"] = sha256_of(path)
    for name, shown in trace.shown.items():
        found[f"executed {name}"] = f"{sha256_of(shown.notebook)} {shown.state}"
    return found | {f"page {k}": sha256(text) for k, text in trace.pages.items()}


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


def _stage(book: Book, trace: Trace) -> Path:
    import yaml

    stage = book.build / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    executed = {book[name].page: name for name in trace.shown}
    for page, path in book.pages.items():
        if page in executed:
            target = stage / f"{page}.ipynb"
            write_atomic(target, trace.notebook(executed[page]))
            offer(stage, path, target)
        else:
            text = trace.pages.get(page) or read_text(path, f"{page}.md")
            write_atomic(stage / f"{page}.md", text)
    for source, inside in _assets(book):
        (stage / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, stage / inside)
    shutil.copyfile(book.root / "_toc.yml", stage / "_toc.yml")
    config = configuration(book.root) | {"execute": {"execute_notebooks": "off"}}
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
            [*python(program), *arguments],
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


def _short(book: Book, path: Path) -> str:
    return path.relative_to(book.root).as_posix()
