"""A build killed anywhere and called again ends in the book of an undisturbed one.

Kills come at file operations of the build, counted by an audit hook and drawn with a
seed, some a moment later, so that they do not depend on how busy the machine is.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from processes import family, finish, start, wait_until
from test_press import add_library, chapter, make_project

from mmsa_lib import runs
from mmsa_lib.press import render as rendering
from mmsa_lib.press.cards import Trace
from mmsa_lib.press.chapters import open_book
from mmsa_lib.press.freshness import states
from mmsa_lib.press.shelf import Shelf

pytestmark = pytest.mark.usefixtures("no_orphans")

KILLS = 20
SEED = 7

CHAPTER = """\
from pathlib import Path
from mmsa_lib import runs
with Path("../executed.log").open("a") as log:
    _ = log.write("{name}\\n")
first = runs.measure("{name}-size", value={value})
second = runs.measure("{name}-error", value={value} / 7)
runs.say("{name} has {{n}}", n=runs.value(first, "value"))"""

# Sphinx takes seconds, and what is tested here is what happens around it
TOY_JUPYTER_BOOK = """
import sys, time
from pathlib import Path

def main():
    stage, out = Path(sys.argv[2]), Path(sys.argv[sys.argv.index("--path-output") + 1])
    made = out / "_build" / "html"
    pages = [p for p in sorted(stage.rglob("*")) if p.suffix in (".md", ".ipynb")]
    for page in [*pages, stage / "index.md"]:
        target = (made / page.relative_to(stage)).with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w") as file:
            file.write("<h1>")
            file.flush()
            time.sleep(0.1)
            file.write(page.read_text() if page in pages else "index")
"""
# arguments: operation to kill at (0: none), seconds later, whole group or parent only
KILLER = """
import atexit, os, signal, sys, threading
at, delay, group = int(sys.argv.pop(1)), float(sys.argv.pop(1)), sys.argv.pop(1) == "g"
ROOT, count = os.getcwd(), 0
NAMED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "subprocess.Popen"}

def die():
    os.killpg(0, signal.SIGKILL) if group else os.kill(os.getpid(), signal.SIGKILL)

def hook(event, arguments):
    global count
    if event in NAMED or event == "open" and str(arguments[0]).startswith(ROOT):
        count += 1
        if count == at:
            die() if not delay else threading.Timer(delay, die).start()

from mmsa_lib.press.cli import main
sys.addaudithook(hook)
atexit.register(lambda: print("operations:", count))
main(["build"])
"""


def make_book(root: Path) -> Path:
    text = {
        name: chapter(name.title(), CHAPTER.format(name=name, value=value))
        for name, value in (("one", 14), ("two", 21))
    }
    make_project(root, text)
    add_library(root)
    toy = root / "toys/jupyter_book/cli/main.py"
    toy.parent.mkdir(parents=True)
    toy.write_text(TOY_JUPYTER_BOOK)
    for folder in (toy.parent, toy.parent.parent):
        (folder / "__init__.py").touch()
    return root


def build(root: Path, at: int = 0, delay: float = 0, how: str = "p"):
    """A build with the toy rendering that kills itself at a file operation."""
    path = os.pathsep.join((str(root / "toys"), str(ROOT)))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", KILLER, str(at), str(delay), how],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def content(root: Path) -> dict[str, str]:
    """Pages, notebooks and their notes. Only what contains a time is made equal: the
    ids of records (they hash the time) and the seconds that a chapter took."""
    found = {}
    for folder in ("html", "executed"):
        for path in sorted((root / "_build" / folder).rglob("*")):
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                found[path.relative_to(root).as_posix()] = text
    for path in (root / "_build/records").rglob("*.json"):
        name, _, short = path.stem.rpartition("-")
        found = {k: v.replace(short, name) for k, v in found.items()}
    for name in (n for n in found if n.endswith(".key.json")):
        found[name] = re.sub(r'"(seconds|cpu)": [\d.]+', "", found[name])
        notebook = re.compile(r'"notebook": "[0-9a-f]{64}"')  # its hash, ids included
        found[name] = notebook.sub("", found[name])
    return found


def left(root: Path) -> set[str]:
    """What lies in _build."""
    return {p.name for p in (root / "_build").iterdir()}


@pytest.mark.timeout(1800)  # five minutes where the machine is busy
def test_twenty_kills_leave_the_book_as_if_undisturbed(tmp_path):
    calm = make_book(tmp_path / "calm")
    code, printed = finish(build(calm))
    assert code == 0, printed
    operations = int(printed.rpartition("operations: ")[2])
    expected, usual = content(calm), left(calm)
    assert "one has " in expected["_build/html/book/one.html"]
    assert operations > 60

    draw = random.Random(SEED)
    root, kills = make_book(tmp_path / "shaken"), 0
    places = set()
    while kills < KILLS:
        # early operations are drawn as often as late ones; half of the kills come
        # later than theirs, while a chapter or the rendering is at work
        at = draw.randint(1, operations)
        delay = draw.choice([0, draw.uniform(0, 1.5)])
        code, printed = finish(build(root, at, delay, draw.choice("gp")))
        if code == -signal.SIGKILL:
            kills += 1
            places.add(tuple(sorted(left(root))))
            continue
        # it was done before its kill came: a whole book, and the next starts anew
        assert code == 0, printed
        assert content(root) == expected
        wait_until(lambda: not family(root))
        shutil.rmtree(root / "_build")
    code, printed = finish(build(root))
    assert code == 0, printed
    assert content(root) == expected
    assert left(root) == usual
    assert not list((root / "_build").rglob("*.tmp"))
    assert len(places) > 3  # the kills came at different stages
    wait_until(lambda: not family(root))
    # every record is whole, also those of chapters that were killed after writing
    records = {f"{r.name}-{r.id[:12]}" for r in runs.load_all(root / "_build/records")}
    for state in states(open_book(root), "quick"):
        assert state.fresh
        assert len(state.noted["records"]) == 2
        assert {*state.noted["records"]} <= records


def test_two_builds_at_once_give_one_book(tmp_path):
    root = make_book(tmp_path)
    both = [build(root), build(root)]
    ended = [finish(process) for process in both]
    assert [code for code, _ in ended] == [0, 0], ended
    log = (root / "executed.log").read_text().split()
    assert sorted(log) == ["one", "two"]
    printed = sorted((text for _, text in ended), key=len)
    assert "another build of this book is running" in printed[0]
    assert "2 fresh, 0 to execute" in printed[0]
    assert "0 fresh, 2 to execute" in printed[1]
    assert all(s.fresh for s in states(open_book(root), "quick"))
    assert {p.stem for p in (root / "_build/html/book").glob("*.html")} == {
        "index",
        "one",
        "two",
    }


# ---------------------------------------------------------------- rendering


def test_no_kill_between_two_renames_loses_the_last_book(tmp_path, monkeypatch):
    """Killed at every file operation of a rendering in turn, in a forked process."""
    root = make_project(tmp_path, {})
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    html = root / "_build/html"

    def toy(book, stage):
        made = book.build / "rendering/_build/html"
        (made / "book").mkdir(parents=True)
        (made / "index.html").write_text("<h1>")
        text = (stage / "book/index.md").read_text()
        (made / "book/index.html").write_text(f"<h1>{text}")
        return made

    def nothing(root) -> Trace:
        return Trace(open_book(root), {}, Shelf(()))

    def rendered(at: int) -> int:
        """Exit status of a rendering that was killed at that operation."""
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            rendering.render(open_book(root), nothing(root))
            os._exit(0)
        finally:
            os._exit(1)

    monkeypatch.setattr(rendering, "_jupyter_book", toy)
    pages, at, lost = ["old", "new"], 0, 0
    (root / "book/index.md").write_text("# old")
    assert rendered(0) == 0
    while True:
        at += 1
        old, new = pages
        (root / "book/index.md").write_text(f"# {new}")
        code = rendered(at)
        book = open_book(root)
        lost += not html.exists()
        assert (
            not (code and rendering.is_current(book, nothing(root)))
            or shown(html) == new
        )
        rendering.recover(book)
        assert shown(html) in (old, new)
        # the key never belongs to other pages than those that lie there
        for name in pages:
            (root / "book/index.md").write_text(f"# {name}")
            assert not rendering.is_current(book, nothing(root)) or shown(html) == name
        # only what is the book's: nothing half-made stays
        known = {"html", "html.key", "logs"}
        assert {p.name for p in (root / "_build").iterdir()} <= known
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        if shown(html) == new:
            pages = [new, old]
    assert at > 20
    assert lost  # one of the kills did come between the renames


def shown(html: Path) -> str:
    assert (html / "index.html").is_file()
    return (html / "book/index.html").read_text().removeprefix("<h1># ")


def test_a_killed_jupyter_book_leaves_the_last_book_and_no_orphan(tmp_path):
    """The same with the real rendering, once: the first and the last page are equal."""
    root = make_project(tmp_path, {})
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    page, html = root / "book/index.md", root / "_build/html"

    def whole() -> None:
        code, printed = finish(start(root, "build"))
        assert code == 0, printed

    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in html.rglob("*") if p.is_file()}

    text = page.read_text()
    whole()
    first = files()
    page.write_text("# Tiny\n\nAnother book.\n")
    process = start(root, "build")
    while not (root / "_build/rendering").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    (at_work,) = psutil.Process(process.pid).children()
    at_work.suspend()  # else it might be done before its parent is gone
    last = root / "_build/rendering/_build/html/index.html"
    assert not last.exists()
    process.kill()  # the parent only
    process.wait()
    at_work.resume()
    wait_until(lambda: not family(root))
    assert not last.exists()  # cut short: it did not come to its own end
    assert files() == first
    whole()
    assert b"Another book" in (html / "book/index.html").read_bytes()
    page.write_text(text)
    whole()
    assert files() == first
    assert not (root / "_build/rendering").exists()
