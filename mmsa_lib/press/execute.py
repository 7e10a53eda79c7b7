"""Execute chapters with papermill, each in its own process, and say what failed.

The parent starts `main` in a process of its own once a chapter, writes a job
to its standard input and reads events from its standard output, one JSON line each. The
child lives only as long as that pipe: kill the parent and no orphan goes on computing.

A cell has a limit of time and of output, see `Book.limits`. A kernel that is killed is
said to have been, for that is how a system ends what needs too much memory.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mmsa_lib.files import python, write_atomic
from mmsa_lib.press.chapters import Book, Chapter
from mmsa_lib.press.freshness import State, closure_hash, data_folder
from mmsa_lib.runs.record import named

KERNEL = "mmsa-book"  # our own kernelspec, so that no other "python3" can be taken
HIDDEN = "hide-input"
START_SECONDS = 600  # for a kernel to come up, on a machine however busy
LONGEST_ERROR, LONGEST_LINE = 4000, 500  # characters of an error's text, of a line
OWN_TASTE = {"MPLBACKEND", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONWARNINGS"}
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
                end_tree(process)

    def discard(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._all.discard(process)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._all:
                end_tree(process)


def end_tree(process: subprocess.Popen) -> None:
    """Kill a process that we started, its kernel, and what that has started."""
    import psutil

    family = []
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in family:
        with suppress(psutil.Error):
            child.kill()


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
                "limits": book.limits(state.profile),
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
            running.discard(process)
    seconds = round(time.time() - began, 1)
    new = sorted(_records_of(chapter, records) - before)
    if "notebook" in end:
        noted = {"key": state.key, "seconds": seconds, "cpu": end["cpu"]}
        noted["records"] = new
        state.product.write(end["notebook"], noted)
        outcome = Outcome(
            chapter.name, True, seconds, state.product.notebook, records=new
        )
    else:
        error = _describe(chapter, end, process.returncode, log)
        failed = book.build / "failed" / f"{chapter.name}.ipynb"
        outcome = Outcome(chapter.name, False, seconds, failed, error)
    done = {"ok": outcome.ok, "seconds": seconds, "cpu": end.get("cpu")}
    report(chapter.name, {"event": "done"} | done)
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
    env = {k: v for k, v in os.environ.items() if k not in OWN_TASTE}
    env.setdefault("OMP_NUM_THREADS", "1")
    return env | {
        "PYTHONSAFEPATH": "1",  # of processes that a chapter starts
        "PYTHONHASHSEED": "0",
        "JUPYTER_PATH": str(book.build / "kernel"),
        "IPYTHONDIR": str(book.build / "kernel" / "ipython"),
        "MATPLOTLIBRC": str(book.build / "kernel" / "matplotlibrc"),
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
    # an empty one: a reader's own settings would change or break the figures
    write_atomic(book.build / "kernel" / "matplotlibrc", "# as matplotlib is shipped\n")


def _describe(chapter: Chapter, end: dict, code: int, log: Path) -> str:
    """The failure in words: chapter, cell, line, error, end of the traceback."""
    where = f"book/{chapter.path.name}"
    if "error" not in end:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        detail = "\n".join(tail[-15:]) or "nothing was printed"
        return f"{where}: the process {_ended(code)}\n{detail}"
    place = "before its first cell"
    if end["cell"]:
        line = chapter.cells[end["cell"] - 1].line
        place = f"code cell {end['cell']} of {len(chapter.cells)} (line {line})"
    return f"{where}, {place}: {end['error']}\n{end['traceback']}".rstrip()


def _ended(code: int | None) -> str:
    """How a process ended, and what that most often means."""
    if code is None or code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name
    if name == "SIGKILL":
        return (
            "was killed (SIGKILL), as the system does when memory runs out. Make the "
            "run smaller, execute one chapter at a time (--jobs 1), or use a machine "
            "with more memory"
        )
    return f"crashed ({name})"


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
    with suppress(OSError):  # Linux: if memory runs out, the kernel is what ends
        Path("/proc/self/oom_score_adj").write_text("500")
    _run(**job)


def _run(text: str, parameters: dict, failed: str, limits: dict[str, float]) -> None:
    import jupytext
    import nbformat
    import papermill
    from papermill.engines import papermill_engines

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
    papermill_engines.register("press", _engine(limits))
    try:
        executed = papermill.execute_notebook(
            notebook,
            str(output),
            parameters=parameters,
            engine_name="press",
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
            error=f"{error.ename}: {error.evalue[:LONGEST_ERROR]}",
            traceback="\n".join(line[:LONGEST_LINE] for line in trace[-30:]),
        )
        return
    except _Limit as error:
        _tell("end", cell=done, error=str(error), traceback="")
        return
    except Exception as error:  # the kernel never came up
        _tell("end", cell=done, error=f"{type(error).__name__}: {error}", traceback="")
        return
    output.unlink(missing_ok=True)
    _tidy(executed)
    spent = round(sum(os.times()[:4]), 1)  # ours and of the kernel, which has ended
    _tell("end", notebook=nbformat.writes(executed) + "\n", cpu=spent)


class _Limit(Exception):
    """A cell took too long or showed too much, or its kernel is gone."""


def _engine(limits: dict[str, float]) -> type:
    """What papermill executes a notebook with, under limits; see `LIMITS`."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine

    seconds = math.ceil(limits["cell_seconds"])
    most = limits["output_mib"] * 2**20

    class Client(PapermillNotebookClient):
        shown = 0  # characters of the cell that is executed

        def execute_cell(self, cell, cell_index, **more):
            self.shown = 0
            try:
                found = super().execute_cell(cell, cell_index, **more)
            except CellTimeoutError as error:
                raise _Limit(
                    f"the cell was still at work after {seconds:,} s, the limit "
                    "cell_seconds of the profile (book/profiles, under limits)"
                ) from error
            except DeadKernelError as error:
                if self.shown > most:
                    raise _Limit(
                        f"the cell showed more than {limits['output_mib']:g} MiB, the "
                        "limit output_mib of the profile (book/profiles, under limits)"
                    ) from error
                process = getattr(self.km.provisioner, "process", None)
                code = process.poll() if process else None
                raise _Limit(f"the kernel {_ended(code)}") from error
            return found

        def process_message(self, msg, cell, cell_index):
            self.shown += _size(msg["content"])
            if self.shown > most:  # what has no end is ended, whatever it still prints
                getattr(self.km.provisioner, "process").kill()  # noqa: B009
                return None
            return super().process_message(msg, cell, cell_index)

    class Press(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, on_cell_start=None, **_):
            Client(
                nb_man,
                kernel_name=kernel_name,
                timeout=seconds,
                iopub_timeout=seconds,
                startup_timeout=START_SECONDS,
                on_cell_start=on_cell_start,
            ).execute()

    return Press


def _size(content: dict) -> int:
    """Characters that a message of the kernel shows; of errors little is kept."""
    data = content.get("data") or {}
    shown = [content.get("text", ""), *data.values()]
    return sum(len(part) if isinstance(part, str) else len(str(part)) for part in shown)


def _tidy(notebook) -> None:
    """Take out what differs between two equal runs. Injected parameters are folded on
    the page, and left out of it where they are those that the page shows anyway."""
    written: dict = {}
    notebook.metadata.pop("papermill", None)
    notebook.metadata.kernelspec["name"] = "python3"
    for i, cell in enumerate(notebook.cells):
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        cell["id"] = f"cell-{i}"
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            written = _assigned(cell.source)
        if "injected-parameters" in tags:
            given = _assigned(cell.source)
            told = given.items() <= written.items()
            shown = "remove-cell" if told else HIDDEN
            cell.metadata["tags"] = ["injected-parameters", shown]


def _assigned(source: str) -> dict[str, str]:
    """Names and values, as code, of a cell of parameters."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {ast.unparse(t): ast.unparse(node.value) for t in targets}
    return found
