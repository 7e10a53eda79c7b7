"""Execute chapters with papermill, each in its own process, and say what failed.

The parent starts `main` in a process of its own once a chapter, writes a job
to its standard input and reads events from its standard output, one JSON line each. The
child lives only as long as that pipe: kill the parent and no orphan goes on computing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mmsa_lib.files import python, write_atomic
from mmsa_lib.press.chapters import Book, Chapter
from mmsa_lib.press.freshness import State, closure_hash, data_folder
from mmsa_lib.runs.record import named

KERNEL = "mmsa-book"  # our own kernelspec, so that no other "python3" can be taken
HIDDEN = "hide-input"
_MARK = "press-event "
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Outcome:
    """What became of one chapter."""

    chapter: str
    ok: bool
    seconds: float
    notebook: Path
    error: str = ""
    records: list[str] = field(default_factory=list)


def execute(
    book: Book,
    stale: Iterable[State],
    records: Path,
    jobs: int = 2,
    report: Callable[[str, dict], None] = lambda chapter, event: None,
    strict: bool = False,
) -> list[Outcome]:
    """Execute chapters, `jobs` at a time; one that fails does not stop the others.

    records: the folder where run records are written.
    report: called with a chapter's name and each of its events.
    strict: a claim that does not hold fails its chapter, see `runs.claim`.
    """
    stale = list(stale)
    _write_kernelspec(book)
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        running = _Children()
        futures = [
            pool.submit(_one, book, state, records, report, running, strict)
            for state in stale
        ]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C too: leave no child behind
            for future in futures:
                future.cancel()
            running.stop()
            raise


class _Children:
    """Processes now running, so that an interrupted build can end its own."""

    def __init__(self):
        self._lock, self._all, self._stopped = threading.Lock(), set(), False

    def add(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._all.add(process)
            if self._stopped:
                process.kill()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._all:
                process.kill()


def _one(
    book, state: State, records: Path, report, running: _Children, strict: bool
) -> Outcome:
    chapter, began = state.chapter, time.time()
    log = book.build / "logs" / f"{chapter.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = _records_of(chapter, records)
    report(chapter.name, {"event": "start"})
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            python("from mmsa_lib.press.execute import main; main()"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            encoding="utf-8",
            env=_environment(book, state, records, strict),
            cwd=chapter.path.parent,  # as in JupyterLab
            start_new_session=True,  # Ctrl-C reaches us, and we end the child
        )
        running.add(process)
        end = {}
        try:
            job = {
                "text": chapter.text,
                "parameters": state.parameters,
                "failed": str(book.build / "failed" / f"{chapter.name}.ipynb"),
            }
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            for event in _events(process.stdout):
                if event["event"] == "end":
                    end = event
                else:
                    report(chapter.name, event)
        except BrokenPipeError:
            pass  # it died at once; its log says why
        finally:
            process.stdin.close()
            process.wait()
    seconds = round(time.time() - began, 1)
    new = sorted(_records_of(chapter, records) - before)
    if "notebook" in end:
        noted = {"key": state.key, "seconds": seconds, "records": new}
        state.product.write(end["notebook"], noted)
        outcome = Outcome(
            chapter.name, True, seconds, state.product.notebook, records=new
        )
    else:
        error = _describe(chapter, end, process.returncode, log)
        failed = book.build / "failed" / f"{chapter.name}.ipynb"
        outcome = Outcome(chapter.name, False, seconds, failed, error)
    report(chapter.name, {"event": "done", "ok": outcome.ok, "seconds": seconds})
    return outcome


def _records_of(chapter: Chapter, folder: Path) -> set[str]:
    """Names of the record files that a chapter wrote."""
    return {path.stem for path in named(folder, chapter=chapter.name)}


def _events(stream) -> Iterator[dict]:
    for line in stream:  # a library may print to the same stream: those lines pass by
        if line.startswith(_MARK):
            yield json.loads(line.removeprefix(_MARK))


def _environment(
    book: Book, state: State, records: Path, strict: bool
) -> dict[str, str]:
    """What a chapter's kernel sees; the user's own settings of threads stand."""
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    env.setdefault("OMP_NUM_THREADS", "1")
    return env | {
        "PYTHONSAFEPATH": "1",  # of processes that a chapter starts
        "PYTHONHASHSEED": "0",
        "JUPYTER_PATH": str(book.build / "kernel"),
        "IPYTHONDIR": str(book.build / "kernel" / "ipython"),
        "MMSA_DATA": str(data_folder(book)),  # ./data is another folder in there
        "MMSA_RECORDS": str(records),
        "MMSA_CHAPTER": state.chapter.name,
        "MMSA_CHAPTER_SHA": state.chapter.sha256,
        "MMSA_CLOSURE_SHA": closure_hash(state.key),
        "MMSA_PROFILE": state.profile,
        **({"MMSA_STRICT": "1"} if strict else {}),
    }


def _write_kernelspec(book: Book) -> None:
    own = (book.root / "mmsa_lib" / "__init__.py").is_file()  # the book's library
    program = "from ipykernel.kernelapp import launch_new_instance as start; start()"
    spec = {
        "argv": [
            *python(program, book.root if own else None),
            "-f",
            "{connection_file}",
            "--HistoryManager.enabled=False",
            "--IPKernelApp.ignore_cwd=True",  # a numpy.py among the pages is no numpy
        ],
        "display_name": "The book's Python",
        "language": "python",
    }
    folder = book.build / "kernel" / "kernels" / KERNEL
    write_atomic(folder / "kernel.json", json.dumps(spec, indent=1))


def _describe(chapter: Chapter, end: dict, code: int, log: Path) -> str:
    """The failure in words: chapter, cell, line, error, end of the traceback."""
    where = f"book/{chapter.path.name}"
    if "error" not in end:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        detail = "\n".join(tail[-15:]) or "nothing was printed"
        return f"{where}: the process ended with status {code}\n{detail}"
    place = "before its first cell"
    if end["cell"]:
        line = chapter.cells[end["cell"] - 1].line
        place = f"code cell {end['cell']} of {len(chapter.cells)} (line {line})"
    return f"{where}, {place}: {end['error']}\n{end['traceback']}".rstrip()


# ------------------------------------------------------------------ the child


def _tell(event: str, **more) -> None:
    print(_MARK + json.dumps({"event": event} | more), flush=True)


def _end_with_parent() -> None:
    sys.stdin.read()
    import psutil

    # a kernel would notice too, but late: it could still write a record meanwhile
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


def main() -> None:
    """Execute the chapter of one job; see the top of this module."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run(**job)


def _run(text: str, parameters: dict, failed: str) -> None:
    import jupytext
    import nbformat
    import papermill

    notebook = jupytext.reads(text, fmt="md:myst")
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # jupytext draws them at random
    total = sum(cell.cell_type == "code" for cell in notebook.cells)
    done = 0

    def started(cell, cell_index) -> None:
        nonlocal done
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and "injected-parameters" not in tags:
            done += 1
            _tell("cell", cell=done, total=total)

    output = Path(failed)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    try:
        executed = papermill.execute_notebook(
            notebook,
            str(output),
            parameters=parameters,
            kernel_name=KERNEL,
            language="python",
            progress_bar=False,
            request_save_on_cell_execute=False,
            on_cell_start=started,
        )
    except papermill.PapermillExecutionError as error:
        trace = "\n".join(_ANSI.sub("", s) for s in error.traceback).splitlines()
        _tell(
            "end",
            cell=done,
            error=f"{error.ename}: {error.evalue}",
            traceback="\n".join(trace[-30:]),
        )
        return
    except Exception as error:  # the kernel died or never came up
        _tell("end", cell=done, error=f"{type(error).__name__}: {error}", traceback="")
        return
    output.unlink(missing_ok=True)
    _tidy(executed)
    _tell("end", notebook=nbformat.writes(executed) + "\n")


def _tidy(notebook) -> None:
    """Take out what differs between two equal runs; fold the injected parameters."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.kernelspec["name"] = "python3"
    for i, cell in enumerate(notebook.cells):
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        cell["id"] = f"cell-{i}"
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = ["injected-parameters", HIDDEN]
