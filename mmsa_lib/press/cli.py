"""The book's part of ``mmsa-book``: build it, run a chapter, look at what there is.

`mmsa_lib.cli` adds the commands that need modelling code, and is what is started.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmsa_lib.errors import BookError, MmsaError, UnknownNameError, unknown
from mmsa_lib.files import digest
from mmsa_lib.press.chapters import Book, Chapter, find_root, open_book
from mmsa_lib.press.values import Kind, seeds_of, typed

HEARTBEAT = 20.0  # seconds between two lines of one chapter where there is no terminal

# a pipe or a log has no width of its own
console = Console(
    highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160
)
app = typer.Typer(
    help="Build, run and inspect the executable book.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
records_app = typer.Typer(help="Look at run records.", no_args_is_help=True)
app.add_typer(records_app, name="records")

Profile = Annotated[
    str, typer.Option(help="Which parameters: a file of book/profiles/.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Chapters executed at a time.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def build(profile: Profile = "quick", jobs: Jobs = 2) -> None:
    """Execute every stale chapter, then render _build/html/index.html.

    A chapter is stale when its text, its parameters, a library module it reaches, a
    record it asks for, constraints.txt or Python changed. What was executed then passes
    the gates: outputs, numbers equal to their records, alt text, bands of the profile,
    links. A chapter that fails does not stop the others, and its last good page stays.
    """
    from mmsa_lib.press.execute import execute
    from mmsa_lib.press.freshness import states
    from mmsa_lib.press.render import is_current, recover, render

    book = open_book(find_root())
    with _only_build(book.build):
        began = time.time()
        recover(book)
        known = states(book, profile)
        stale = [s for s in known if not s.fresh]
        fresh = len(known) - len(stale)
        console.print(f"{len(known)} chapters: {fresh} fresh, {len(stale)} to execute")
        failed = set()
        if stale:
            # the pages' claims are written for the runs of the quick profile
            place, strict = book.build / "records", profile == "quick"
            with _progress() as report, _said_when_stopped(known) as noted:
                outcomes = execute(book, stale, place, jobs, noted(report), strict)
            for outcome in (o for o in outcomes if not o.ok):
                failed.add(outcome.chapter)
                console.print(f"\n[bold red]FAILED[/] {escape(outcome.error)}")
                if outcome.notebook.is_file():
                    shown = outcome.notebook.relative_to(book.root)
                    console.print(f"the notebook up to there: {shown}")
        trace, refused = gated(book, profile, known, failed)
        current = trace is not None and is_current(book, trace)
        problem = ""
        if trace is not None and not current:
            console.print(f"rendering {len(book.pages)} pages ...")
            try:
                render(book, trace)
            except BookError as error:
                problem = str(error)
        if failed or refused:
            words = _what_failed(known, failed, refused, trace is not None)
            problem = f"{problem}\n{words}".strip()
        if problem:
            raise BookError(problem)
    verb = "nothing changed" if current else "the book is ready"
    index = _short(book.build / "html" / "index.html")
    console.print(f"{verb} ({time.time() - began:.0f} s): open {index}")


def gated(book: Book, profile: str, known: list, failed: set[str]):
    """The chapters as the book will show them, and those that a gate refused.

    Instead of the first, None if a chapter has no good version yet.
    """
    from mmsa_lib.press.cards import Shown, Trace
    from mmsa_lib.press.gates import approve
    from mmsa_lib.press.shelf import Shelf

    shelf = Shelf((book.root / "results", book.build / "records"))
    bands = book.bands(profile)
    shown, refused = {}, set()
    for state in known:
        name = state.chapter.name
        if name in failed:
            good = state.good
        else:
            good, problems = approve(book, state, shelf, bands.get(name, {}))
            if problems:
                refused.add(name)
                console.print(f"\n[bold red]REFUSED[/] {name}")
                console.print(escape("\n".join(problems)))
            else:
                count = good.read()["numbers"]
                console.print(f"{name}: {count} numbers equal their records")
        if good.intact():
            fresh = name not in failed | refused
            shown[name] = Shown(good.notebook, good.read(), fresh)
    if len(shown) < len(known):
        return None, refused
    return Trace(book, shown, shelf), refused


def _what_failed(known, failed: set[str], refused: set[str], shown: bool) -> str:
    parts = [
        f"{len(names)} of {len(known)} chapters {verb}: {', '.join(sorted(names))}."
        for names, verb in ((failed, "failed"), (refused, "refused by the gates"))
        if names
    ]
    parts.append(
        "The book shows the last good version of each, marked as not current."
        if shown
        else "The book is not rendered: there is no good version of each chapter yet."
    )
    parts.append(
        "The others are done and will not be executed again; mend these and call the "
        "same command."
    )
    return " ".join(parts)


@app.command()
def run(
    chapter: Annotated[str, typer.Argument(help="A chapter, such as baselines.")],
    p: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="NAME VALUE", help="A parameter; repeat as needed."),
    ] = None,
    profile: Profile = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Folder; by default _build/runs/CHAPTER-HASH.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            help="Where records go; by default records/ in there. To keep: results."
        ),
    ] = None,
) -> None:
    """Execute one chapter with parameters of your own.

    Example: mmsa-book run baselines -p corpus mosi-text-audio -p seeds '[0, 1, 2]'
    """
    from mmsa_lib.press.execute import execute
    from mmsa_lib.press.freshness import Product, State, key_of
    from mmsa_lib.press.gates import check_chapter
    from mmsa_lib.press.shelf import Shelf
    from mmsa_lib.runs.record import place

    book = open_book(find_root())
    one = book[chapter]
    given = _parameters(one, p or [])
    parameters = book.profile(profile)[chapter] | given
    key = key_of(book, one, parameters)
    folder = out or book.build / "runs" / f"{chapter}-{digest(key)[:8]}"
    folder = folder.expanduser().resolve()
    records = (records or folder / "records").expanduser().resolve()
    product = Product(folder / f"{chapter}.ipynb")
    profile = str(parameters.get("profile", profile))
    state = State(one, profile, parameters, key, product, ("asked for",), None)
    with _progress() as report, _said_when_stopped([state]) as noted:
        (outcome,) = execute(book, [state], records, 1, noted(report))
    if not outcome.ok:
        console.print(f"\n[bold red]FAILED[/] {escape(outcome.error)}")
        raise BookError(f"{chapter} failed after {outcome.seconds:.0f} s")
    notebook = json.loads(outcome.notebook.read_text(encoding="utf-8"))
    shelf = Shelf((book.root / "results", records))
    for problem in check_chapter(book, one, notebook, shelf).problems:
        console.print(f"[yellow]a build would refuse this:[/] {escape(problem)}")
    console.print(f"notebook: {_short(outcome.notebook)}")
    for name in outcome.records:
        console.print(f"record:   {_short(records / place(chapter, name))}")


@app.command()
def status(profile: Profile = "quick", as_json: AsJson = False) -> None:
    """Say of each chapter whether it is fresh, and if not, what changed."""
    from mmsa_lib.press.freshness import states

    book = open_book(find_root())
    rows = [s.as_dict() for s in states(book, profile)]
    if as_json:
        print_json(rows)
        return
    table = _table("chapter", "state", "why", "seconds", "records")
    for row in rows:
        style = {"fresh": "green", "refused": "red"}.get(row["state"], "yellow")
        why = row["reasons"][:4]
        why += [f"and {len(row['reasons']) - 4} more"] * (len(row["reasons"]) > 4)
        table.add_row(
            row["chapter"],
            f"[{style}]{row['state']}[/]",
            escape("\n".join(why)),
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            str(len(row["record"]) or ""),
        )
    console.print(table)


@records_app.command("list")
def records_list(as_json: AsJson = False) -> None:
    """Every record of results/ (committed) and _build/records/ (of builds)."""
    rows = [
        {
            "id": r.id[:12],
            "name": r.name,
            "kind": r.kind,
            "chapter": r.chapter,
            "corpus": r.corpus.get("name"),
            "synthetic": r.corpus.get("synthetic"),
            "seeds": len(r.seeds),
            "created": r.created,
            "folder": folder,
        }
        for r, folder in _all_records()
    ]
    if as_json:
        print_json(rows)
        return
    table = _table("id", "name", "chapter", "corpus", "seeds", "date", "in")
    for row in rows:
        corpus = row["corpus"] or ""
        corpus += " (synthetic)" if row["synthetic"] else ""
        table.add_row(
            row["id"],
            row["name"],
            row["chapter"] or "",
            corpus,
            str(row["seeds"] or ""),
            row["created"][:10],
            row["folder"],
        )
    console.print(table if rows else "no records yet: build the book or run a chapter")


@records_app.command("show")
def records_show(
    which: Annotated[str, typer.Argument(help="An id (or its start), or a name.")],
) -> None:
    """Print one record; of several with one name, the newest."""
    from dataclasses import asdict

    known = [r for r, _ in _all_records()]
    found = [r for r in known if r.id.startswith(which) or r.name == which]
    if not found:
        raise unknown("record", which, {r.name for r in known})
    newest = max(found, key=lambda r: r.created)
    shown = asdict(newest)
    for entry in shown["per_seed"]:
        if "predictions" in entry:
            entry["predictions"] = f"({len(entry['predictions'])} values)"
    print_json(shown)


@records_app.command("check")
def records_check() -> None:
    """Verify every record; fail if one is damaged, edited, misnamed or misplaced.

    Says as well which committed records belong to no chapter, were made from code with
    local changes, or by code that has moved on since.
    """
    from mmsa_lib.press.freshness import moved_on
    from mmsa_lib.runs import RecordError, load

    book = open_book(find_root())
    moved, damaged, notes, count = moved_on(book), [], {}, 0
    for folder in (book.root / "results", book.build / "records"):
        for path in sorted(folder.rglob("*.json")) if folder.is_dir() else ():
            count += 1
            try:
                record = load(path)
                if path.relative_to(folder) != record.place:
                    raise RecordError(
                        f"{path.name} is the record {record.place.as_posix()}; move it "
                        "back there, where pages look for it"
                    )
            except RecordError as error:
                damaged.append(f"{_short(path.parent)}: {error}")
                continue
            if record.chapter is not None and record.chapter not in book.chapters:
                notes.setdefault("of a chapter that is not there", []).append(path.stem)
            elif folder == book.root / "results" and moved(record):
                notes.setdefault("the code has moved on since", []).append(path.stem)
            if folder == book.root / "results" and record.code.get("dirty"):
                notes.setdefault("made with local changes", []).append(path.stem)
    for what, names in sorted(notes.items()):
        console.print(f"{len(names)} {what}:")
        console.print(escape("\n".join(f"  {name}" for name in names)))
    if damaged:
        raise BookError(
            f"{len(damaged)} of {count} records are damaged:\n" + "\n".join(damaged)
        )
    console.print(f"{count} records match their content addresses")


@app.command()
def clean(
    everything: Annotated[
        bool, typer.Option("--all", help="Records and runs of _build as well.")
    ] = False,
) -> None:
    """Remove what builds have made, so that the next one starts from nothing."""
    folder = find_root() / "_build"
    kept = () if everything else ("records", "runs")
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in kept:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = [name for name in kept if (folder / name).is_dir()]
    more = f"; kept {', '.join(kept)} (--all removes them too)" if kept else ""
    console.print(f"cleaned {_short(folder)}{more}")


@app.command()
def sweep(
    chapters: Annotated[
        list[str] | None,
        typer.Argument(help="Chapters; by default all that take seeds and a corpus."),
    ] = None,
    corpora: Annotated[
        str, typer.Option(help="Names with commas; by default the profile's.")
    ] = "",
    seeds: Annotated[
        str, typer.Option(help="Such as 0,1,2; by default the profile's.")
    ] = "",
    p: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="NAME VALUE", help="A parameter of every chapter."),
    ] = None,
    profile: Profile = "full",
    jobs: Annotated[int, typer.Option(min=1, help="Tasks at a time, here.")] = 2,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    gpus_per_task: Annotated[
        float, typer.Option(min=0, help="GPUs that Ray keeps for a task.")
    ] = 0,
    ray_address: Annotated[
        str, typer.Option(help="local starts Ray here; auto; ray://HOST:10001.")
    ] = "local",
    out: Annotated[
        Path | None, typer.Option(help="Folder; by default _build/runs/sweep.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            help="Where records over seeds go; by default beside the table. To keep: "
            "results."
        ),
    ] = None,
) -> None:
    """Run chapters x seeds x corpora; what is done already is not done again.

    Each task has its own folder with notebook and records; a failed one is tried once
    more. With --engine ray the tasks run on a Ray cluster, to which book and library
    travel; real data must lie on the nodes (MMSA_DATA).
    """
    from mmsa_lib.press.collect import conclude
    from mmsa_lib.press.planning import plan
    from mmsa_lib.press.sweep import sweep as do

    book = open_book(find_root())
    out = (out or book.build / "runs" / "sweep").expanduser().resolve()
    tasks = plan(
        book,
        chapters or [],
        [name for name in corpora.split(",") if name],
        seeds_of(seeds) if seeds else [],
        profile,
        lambda chapter: _parameters(chapter, p or []),
        out / "tasks",
    )
    with _progress() as report:
        try:
            rows = do(
                book,
                tasks,
                jobs=jobs,
                engine=engine,
                gpus_per_task=gpus_per_task,
                ray_address=ray_address,
                report=report,
            )
        except Stopped:
            kept = sum(task.finished() is not None for task in tasks)
            raise Stopped(
                f"stopped: {kept} of {len(tasks)} tasks are done and kept in "
                f"{_short(out)}; call the same command to go on with the others"
            ) from None
    summary = conclude(rows, out, records and records.expanduser().resolve())
    table = _table("chapter", "corpus", "seed", "state", "seconds", "test")
    for line in summary.lines:
        table.add_row(*map(escape, line))
    console.print(table)
    console.print(
        f"table:   {_short(summary.file)}\nrecords: {_short(summary.records)}"
    )
    if summary.problems:
        for problem in summary.problems:
            console.print(f"\n[bold red]FAILED[/] {escape(problem)}")
        raise BookError(
            f"{len(summary.problems)} problems in a sweep of {len(tasks)} tasks. What "
            "is done is kept; mend these and call the same command."
        )


def _table(*headings: str) -> Table:
    table = Table(box=None)
    for heading in headings:
        table.add_column(heading, overflow="fold")  # never cut a name short
    return table


def _all_records():
    from mmsa_lib.runs import load_all

    root = find_root()
    for folder in ("results", "_build/records"):
        if (root / folder).is_dir():
            yield from ((r, folder) for r in load_all(root / folder))


def _parameters(chapter: Chapter, given: list[str]) -> dict[str, object]:
    """``name=value`` pairs as values of the right type; paths become absolute."""
    found = {}
    for name, text in pairs(given, "a parameter"):
        kind = chapter.kinds.get(name, Kind())
        found[name] = typed(name, text, chapter.parameters.get(name), kind)
    return chapter.check(found)


def pairs(given: list[str], what: str) -> Iterator[tuple[str, str]]:
    """``name=value`` texts as names and values; a name comes once.

    what: what is named, such as ``an option``, for the message.
    """
    seen = set()
    for pair in given:
        name, separator, text = pair.partition("=")
        if not separator:
            raise BookError(f"-p {pair}: {what} needs a name and a value")
        if name in seen:
            raise BookError(f"-p {name}: {what} is given once; here it comes twice")
        seen.add(name)
        yield name, text


def _join_pairs(arguments: list[str]) -> list[str]:
    """``-p name value`` as ``-p name=value``, the one form that Typer can repeat."""
    joined, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        joined.append(word)
        if word == "--":  # what follows are files, whatever they are called
            return joined + rest
        if word == "-p" and rest:
            name = rest.pop(0)
            if rest and not re.match(r"\w+=", name):
                name = f"{name}={rest.pop(0)}"
            joined.append(name)
    return joined


@contextmanager
def _only_build(folder: Path):
    """Two builds at once would write the same files: the second waits."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print("another build of this book is running; waiting for it ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Stopped(BaseException):
    """Ctrl-C; its text says what was kept. Typer would end before we could say it."""


@contextmanager
def _said_when_stopped(known: list):
    """Gives a wrapper of reporters; a Ctrl-C says which chapters were kept.

    known: states of the chapters.
    """
    kept = {state.chapter.name for state in known if state.fresh}

    def noted(report):
        def both(chapter: str, event: dict) -> None:
            kept.update({chapter} if event.get("ok") else ())
            report(chapter, event)

        return both

    try:
        yield noted
    except Stopped:
        names = [state.chapter.name for state in known]
        text = "nothing was executed to its end"
        if kept:
            there = ", ".join(name for name in names if name in kept)
            text = f"{len(kept)} of {len(names)} chapters are done and kept ({there})"
        left = ", ".join(name for name in names if name not in kept)
        more = f"; call the same command to execute {left}" if left else ""
        raise Stopped(f"stopped: {text}{more}") from None


@contextmanager
def _interruptible():
    """Inside, Ctrl-C raises `Stopped`; where signals are no matter of ours, nothing."""

    def stop(*_) -> None:
        raise Stopped("stopped; what was done is kept, call it again to go on")

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _progress():
    """A reporter for `execute`: bars on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield _line_reporter(console.print)
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("cell {task.completed}/{task.total}"),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        tasks = {}

        def report(chapter: str, event: dict) -> None:
            if event["event"] == "start":
                tasks[chapter] = progress.add_task(chapter, total=None)
            elif event["event"] == "cell":
                progress.update(
                    tasks[chapter], completed=event["cell"] - 1, total=event["total"]
                )
            else:
                mark = "[green]done[/]" if event["ok"] else "[red]FAILED[/]"
                task = progress.tasks[tasks[chapter]]
                full = {"completed": task.total} if event["ok"] else {}
                progress.update(task.id, description=f"{chapter} {mark}", **full)
                progress.stop_task(task.id)

        yield report


def _line_reporter(say: Callable[[str], None]) -> Callable[[str, dict], None]:
    spoke = {}

    def report(chapter: str, event: dict) -> None:
        now = time.monotonic()
        if event["event"] == "start":
            say(f"{chapter}: started")
        elif event["event"] == "cell":
            if now - spoke[chapter] < HEARTBEAT:
                return
            say(f"{chapter}: cell {event['cell']} of {event['total']}")
        else:
            verb = "done" if event["ok"] else "FAILED"
            cpu = f", {event['cpu']:.0f} s of CPU" if event.get("cpu") else ""
            say(f"{chapter}: {verb} in {event['seconds']:.0f} s{cpu}")
        spoke[chapter] = now

    return report


def _short(path: Path) -> str:
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def print_json(value) -> None:
    """For programs: ASCII, so that no terminal and no pipe changes it."""
    print(json.dumps(value, indent=1))


def _print_anything() -> None:
    """Escape what a terminal's encoding lacks, rather than fail after the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; an error that we foresaw is one message, not a traceback."""
    _print_anything()
    error_console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with _interruptible():
            app(_join_pairs(sys.argv[1:] if arguments is None else arguments))
    except MmsaError as error:
        error_console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2 if isinstance(error, UnknownNameError) else 1)
    except Stopped as stopped:
        error_console.print(escape(str(stopped)))
        sys.exit(130)
    except OSError as error:
        error_console.print(
            f"[bold red]error:[/] {escape(str(error))}. Nothing half-written was kept; "
            "free some space or choose a folder that you may write to."
        )
        sys.exit(1)
