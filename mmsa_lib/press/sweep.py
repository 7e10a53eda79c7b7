"""Chapters x seeds x corpora: run what is missing, one table, one record over seeds.

A task executes a chapter as ``mmsa-book run`` does, in a folder named by its key, so a
task that was done once is never done again. For each attempt a driver starts ``python
-m mmsa_lib.press.sweep`` (a runner), on this machine or through Ray on another, writes
a job to its standard input and reads events from its standard output. A runner ends
with that pipe, so nothing computes on when the driver is gone.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmsa_lib import runs
from mmsa_lib.errors import BookError, MmsaError, unknown
from mmsa_lib.files import digest, sha256_of, write_atomic
from mmsa_lib.press.chapters import Book, Chapter, open_book
from mmsa_lib.press.execute import execute
from mmsa_lib.press.freshness import Product, State, data_folder, key_of
from mmsa_lib.runs.record import place

ATTEMPTS = 2  # a failed task is tried once more
SENT = ("_toc.yml", "_config.yml", "constraints.txt", "book", "mmsa_lib", "results")
# what a runner imports
PRESS = ("__init__.py", "errors.py", "files.py", "runs", "press")
METRICS_SHOWN = 4  # in one cell of the table; all of them are in the JSON
REPORT = Callable[[str, dict], None]


@dataclass(frozen=True)
class Task:
    """One chapter, one corpus, one seed; None where a chapter has no such parameter."""

    corpus: str | None
    seed: int | None
    state: State

    @property
    def chapter(self) -> str:
        return self.state.chapter.name

    @property
    def folder(self) -> Path:
        return self.state.product.notebook.parent

    @property
    def label(self) -> str:
        seed = "" if self.seed is None else f"seed {self.seed}"
        return " ".join(filter(None, (self.chapter, self.corpus, seed)))

    def finished(self) -> tuple[dict, list[runs.RunRecord]] | None:
        """What was noted of the task and its records, None unless all are whole."""
        product, folder = self.state.product, self.folder / "records"
        noted = product.read()
        try:
            if noted is None or digest(noted["key"]) != digest(self.state.key):
                return None
            if sha256_of(product.notebook) != noted["notebook"]:
                return None
            places = [folder / place(self.chapter, n) for n in noted["records"]]
            return noted, [runs.load(path) for path in places]
        except (OSError, runs.RecordError):
            return None


def plan(
    book: Book,
    chapters: Sequence[str],
    corpora: Sequence[str],
    seeds: Sequence[int],
    profile: str,
    given: Callable[[Chapter], dict],
    folder: Path,
) -> list[Task]:
    """Every task of a sweep, checked: nothing has started when a name is wrong.

    chapters: all that take seeds and a corpus if there are none. corpora, seeds: those
    of the profile if there are none. given: the user's own parameters for a chapter.
    folder: where the folders of the tasks are.
    """
    if not chapters:
        chapters = [
            c.name
            for c in book.chapters.values()
            if {"seeds", "corpus"} <= {*c.parameters}
        ]
    profiles, tasks = book.profile(profile), []
    for name in dict.fromkeys(chapters):
        chapter = book[name]
        own = profiles[name] | given(chapter)
        usual = chapter.parameters | own
        own_seeds = usual.get("seeds")
        own_seeds = own_seeds if isinstance(own_seeds, (list, tuple)) else ()
        for corpus in dict.fromkeys(corpora or [usual.get("corpus")]):
            for seed in dict.fromkeys(seeds or own_seeds or [None]):
                named = {"corpus": corpus} if corpora else {}
                named |= {} if seed is None else {"seeds": [seed]}
                parameters = own | chapter.check(named)
                tasks.append(
                    _task(book, chapter, corpus, seed, profile, parameters, folder)
                )
    known = _known_corpora(book) if any(t.corpus for t in tasks) else []
    for task in tasks:
        if task.corpus is not None and task.corpus not in known:
            raise unknown("corpus", task.corpus, known)
    if not tasks:
        raise BookError("no chapter takes seeds and a corpus: name the chapters to run")
    return tasks


def numbers(text: str) -> list[int]:
    """Seeds as typed: ``0,1,2``."""
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise BookError(
            f"--seeds {text}: whole numbers with commas, such as 0,1,2"
        ) from None


def _task(book, chapter, corpus, seed, profile, parameters, folder) -> Task:
    key = _key(book, chapter, parameters)
    parts = [chapter.name, corpus, None if seed is None else f"seed{seed}"]
    name = "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts if part)
    product = Product(folder / f"{name}-{digest(key)[:8]}" / f"{chapter.name}.ipynb")
    profile = str(parameters.get("profile", profile))
    state = State(chapter, profile, parameters, key, product, ("asked for",), None)
    return Task(corpus, seed, state)


def _key(book: Book, chapter: Chapter, parameters: dict) -> dict:
    """The chapter's key without ``results/``: a page shows those records, a training
    does not depend on them, and what a sweep puts there must not make it begin anew."""
    key = key_of(book, chapter, parameters)
    files = {k: v for k, v in key["files"].items() if not k.startswith("results/")}
    return key | {"files": files}


def _known_corpora(book: Book) -> list[str]:
    # in a process of its own: the press imports no corpora
    program = "import json, mmsa_lib.corpora as c; print(json.dumps(c.names()))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=os.environ | {"PYTHONPATH": str(book.root)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise BookError(f"the corpora of this book cannot be listed:\n{done.stderr}")
    return json.loads(done.stdout)


# ---------------------------------------------------------------- driving


@dataclass(frozen=True)
class Row:
    """What became of a task: "done", "kept" (was done before) or "failed"."""

    task: Task
    state: str
    attempts: int = 0
    seconds: float | None = None
    error: str = ""
    records: tuple[runs.RunRecord, ...] = ()

    def as_dict(self) -> dict:
        return {
            "chapter": self.task.chapter,
            "corpus": self.task.corpus,
            "seed": self.task.seed,
            "state": self.state,
            "attempts": self.attempts,
            "seconds": self.seconds,
            "error": self.error,
            "folder": self.task.folder.name,
            "records": [_shown(record) for record in self.records],
        }


def sweep(
    book: Book,
    tasks: Sequence[Task],
    *,
    jobs: int = 2,
    engine: str = "local",
    gpus_per_task: float = 0,
    ray_address: str = "local",
    report: REPORT = lambda label, event: None,
) -> list[Row]:
    """Do every task that is not done; one that fails twice does not stop the others.

    jobs: tasks at a time on this machine; a Ray cluster takes as many as it has room
    for. gpus_per_task: GPUs that Ray keeps for a task, fractions allowed.
    ray_address: "local" starts Ray here, "auto" joins the one that runs here.
    report: called with a task's label and each of its events.
    """
    if engine == "ray":
        where = _Ray(book, jobs, gpus_per_task, ray_address)
    elif engine != "local":
        raise unknown("engine", engine, ["local", "ray"])
    elif gpus_per_task:
        raise BookError(
            "--gpus-per-task is kept by Ray: add --engine ray. The local engine leaves "
            "every GPU that CUDA_VISIBLE_DEVICES shows to every task."
        )
    else:
        where = _Local(book, jobs)
    stopped = threading.Event()
    try:
        with ThreadPoolExecutor(where.drivers or len(tasks)) as pool:
            futures = [pool.submit(_drive, t, where, report, stopped) for t in tasks]
            try:
                return [future.result() for future in futures]
            except BaseException:  # Ctrl-C too: what is done stays, the rest ends
                stopped.set()
                for future in futures:
                    future.cancel()
                where.stop()
                raise
    finally:
        where.close()


def _drive(task: Task, where, report: REPORT, stopped: threading.Event) -> Row:
    from filelock import FileLock

    error, attempt = "", 0
    try:
        task.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(task.folder.with_name(f".{task.folder.name}.lock"))
        # another sweep may be at the same task: it is done once
        with lock.acquire(cancel_check=stopped.is_set):
            found, state = task.finished(), "kept"
            while not found and attempt < ATTEMPTS and not stopped.is_set():
                attempt, state = attempt + 1, "done"
                shutil.rmtree(task.folder, ignore_errors=True)
                label = task.label + " (again)" * (attempt > 1)
                report(label, {"event": "start"})
                end = where.attempt(task, lambda e, label=label: report(label, e))
                found, error = task.finished(), end["error"]
                if not stopped.is_set():  # what we ended ourselves has not failed
                    report(label, end | {"event": "done", "ok": bool(found)})
    except OSError as failure:  # a full disk, a lock given up: of this task only
        return Row(task, "failed", attempt, error=f"{task.label}: {failure}")
    if not found:
        error = error or "its notebook or records are not whole"
        return Row(task, "failed", attempt, error=error)
    noted, records = found
    return Row(task, state, attempt, noted["seconds"], records=tuple(records))


def _job(task: Task) -> dict:
    return {
        "chapter": task.chapter,
        "profile": task.state.profile,
        "parameters": task.state.parameters,
        "key": task.state.key,
    }


class _Local:
    """Runners on this machine, as many at a time as there are drivers."""

    def __init__(self, book: Book, jobs: int):
        self.drivers, self._root = jobs, book.root
        self._lock, self._running, self._stopped = threading.Lock(), set(), False

    def attempt(self, task: Task, tell: Callable[[dict], None]) -> dict:
        task.folder.mkdir(parents=True)
        job = _job(task) | {"root": str(self._root), "folder": str(task.folder)}
        log, last = task.folder / "runner.log", {}
        above = str(Path(__file__).resolve().parents[2])
        path = [above, *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mmsa_lib.press.sweep"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                encoding="utf-8",
                cwd=task.folder,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                start_new_session=True,  # Ctrl-C reaches us, and we end the runner
            )
            with self._lock:
                self._running.add(process)
                if self._stopped:
                    process.kill()
            with process, suppress(BrokenPipeError):  # its log says why
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    last = json.loads(line)
                    if last["event"] == "cell":
                        tell(last)
            with self._lock:
                self._running.discard(process)
        if last.get("event") == "end":
            return last
        return _ended(process.returncode, log.read_text("utf-8", "replace"))

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def close(self) -> None:
        pass


class _Ray:
    """Runners on the nodes of a Ray cluster; book and library travel with the task."""

    def __init__(self, book: Book, jobs: int, gpus: float, address: str):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would phone home
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self.drivers = None  # as many as there are tasks: the cluster has the queue
        self._ray = ray = import_ray()
        self._ours = not ray.is_initialized()
        if self._ours:
            local = {"num_cpus": jobs, "include_dashboard": False}
            try:
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    **(local if address == "local" else {}),
                )
            except Exception as error:  # Ray raises all kinds, a bare Exception too
                ray.shutdown()
                raise BookError(
                    f"no Ray cluster at {address!r}: {error}. Start one with 'ray "
                    "start --head', or leave --ray-address out; on a busy machine try "
                    "again."
                ) from error
        try:
            most = max(n["Resources"].get("GPU", 0) for n in ray.nodes() if n["Alive"])
            if gpus > most:
                raise BookError(
                    f"a task asks for {gpus:g} GPUs and the largest node of the Ray "
                    f"cluster has {most:g}; it would wait for ever"
                )
            self._archive = ray.put(pack(book))
        except BaseException:
            self.close()
            raise
        self._function = ray.remote(_far_function()).options(**ray_options(gpus))
        code = runs.code_facts()
        commit = f"{code['commit'] or ''}{' dirty' if code['dirty'] else ''}"
        self._environment = {
            "MMSA_DATA": str(data_folder(book)),
            **({"MMSA_COMMIT": commit} if commit else {}),
        }
        self._lock, self._running, self._stopped = threading.Lock(), set(), False

    def attempt(self, task: Task, tell: Callable[[dict], None]) -> dict:
        reference = self._function.remote(self._archive, _job(task), self._environment)
        with self._lock:
            self._running.add(reference)
            if self._stopped:
                self._ray.cancel(reference)
        try:
            code, printed, log, files = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return {"event": "end", "error": str(error), "seconds": 0.0}
        finally:
            with self._lock:
                self._running.discard(reference)
        unpack(files, task.folder)
        last = json.loads(printed.splitlines()[-1]) if printed.strip() else {}
        return last if last.get("event") == "end" else _ended(code, log)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for reference in self._running:
                self._ray.cancel(reference)

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()


def _ended(code: int, log: str) -> dict:
    detail = "\n".join(log.strip().splitlines()[-15:]) or "nothing was printed"
    error = f"the process ended with status {code}\n{detail}"
    return {"event": "end", "error": error, "seconds": 0.0}


def import_ray():
    """The module ray; `BookError` with the remedy where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise BookError(
            "--engine ray needs Ray, which is not installed: pip install "
            "'mmsa-lib[ray]' (in a clone: .venv/bin/python -m pip install -c "
            "constraints.txt -e '.[ray]')"
        ) from error
    return ray


def ray_options(gpus_per_task: float) -> dict:
    """Options of the remote task. Retries are ours: Ray would hide a crash."""
    return {"num_cpus": 1, "num_gpus": gpus_per_task, "max_retries": 0}


def _far_function():
    """What Ray executes. Made inside a function, it is sent by value: a node needs no
    mmsa_lib, and one that it has is not taken for the driver's."""

    def execute_far(archive: bytes, job: dict, environment: dict) -> tuple:
        import io
        import json
        import os
        import subprocess
        import sys
        import tempfile
        import zipfile
        from pathlib import Path

        with tempfile.TemporaryDirectory(prefix="mmsa-sweep-") as place:
            folder = Path(place, "task")
            zipfile.ZipFile(io.BytesIO(archive)).extractall(place)
            folder.mkdir()
            job = job | {"root": str(Path(place, "book")), "folder": str(folder)}
            path = [str(Path(place, "press")), os.environ.get("PYTHONPATH")]
            log = folder / "runner.log"
            with (
                log.open("w") as stream,
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "mmsa_lib.press.sweep"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stream,
                    text=True,
                    encoding="utf-8",
                    cwd=folder,
                    # data and threads as this node has them
                    env=environment
                    | dict(os.environ)
                    | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
                ) as process,
            ):
                try:
                    process.stdin.write(json.dumps(job) + "\n")
                    process.stdin.flush()
                    printed = process.stdout.read()
                except BrokenPipeError:
                    printed = ""
                except BaseException:  # cancelled
                    process.kill()
                    raise
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
                for file in sorted(folder.rglob("*")):
                    inside = file.relative_to(folder)
                    if file.is_file() and inside.parts[0] != "kernel":
                        made.write(file, inside.as_posix())
            text = log.read_text(encoding="utf-8", errors="replace")
            return process.returncode, printed, text, packed.getvalue()

    return execute_far


def pack(book: Book) -> bytes:
    """The book with its library (``book/``) and this press (``press/``) as a zip."""
    package = Path(__file__).resolve().parents[1]
    trees = [(book.root, SENT, "book"), (package, PRESS, "press/mmsa_lib")]
    packed = io.BytesIO()
    with zipfile.ZipFile(
        packed, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False
    ) as made:
        for root, names, inside in trees:
            for name in names:
                top = root / name
                for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
                    parts = file.relative_to(root).parts
                    if file.is_file() and not any(
                        part == "__pycache__" or part.startswith(".") for part in parts
                    ):
                        made.write(file, "/".join((inside, *parts)))
    return packed.getvalue()


def unpack(files: bytes, folder: Path) -> None:
    """Write a task's files; the note that makes it finished comes last."""
    with zipfile.ZipFile(io.BytesIO(files)) as packed:
        for name in sorted(packed.namelist(), key=lambda n: n.endswith(".key.json")):
            write_atomic(folder / name, packed.read(name).decode("utf-8", "replace"))


# ---------------------------------------------------------------- merging


@dataclass(frozen=True)
class Merged:
    """The records over seeds of one chapter and corpus, and what could not be."""

    chapter: str
    corpus: str | None
    seeds: tuple[int, ...]
    records: tuple[runs.RunRecord, ...]
    problems: tuple[str, ...]


def merge_seeds(rows: Iterable[Row]) -> list[Merged]:
    """Merge training records of each chapter and corpus of which every seed is done."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.task.seed is not None:
            groups.setdefault((row.task.chapter, row.task.corpus), []).append(row)
    return [
        _merge_rows(chapter, corpus, found)
        for (chapter, corpus), found in groups.items()
        if all(row.state != "failed" for row in found)
    ]


def _merge_rows(chapter: str, corpus: str | None, rows: list[Row]) -> Merged:
    seeds = tuple(sorted(row.task.seed for row in rows))
    parts: dict[str, list[runs.RunRecord]] = {}
    for record in (r for row in rows for r in row.records if r.kind == "training"):
        parts.setdefault(digest([record.name, record.parameters]), []).append(record)
    records, problems = [], []
    for found in parts.values():
        have = sorted(seed for record in found for seed in record.seeds)
        if have != list(seeds):
            problems.append(
                f"{found[0].name} with equal parameters was recorded for seeds {have}, "
                f"not once for each of {list(seeds)}"
            )
            continue
        try:
            records.append(runs.merge(found))
        except runs.RecordError as error:
            problems.append(str(error))
    return Merged(chapter, corpus, seeds, tuple(records), tuple(problems))


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Summary:
    """The end of a sweep: lines of its table, where it is kept, what went wrong."""

    lines: list[tuple[str, ...]]
    file: Path
    records: Path
    problems: list[str]


def conclude(rows: Sequence[Row], out: Path, records: Path | None = None) -> Summary:
    """Merge what is complete, save table and merged records in a folder of this sweep.

    records: another folder for the merged records, such as ``results``.
    """
    merged = merge_seeds(rows)
    place = out / digest(sorted(row.task.folder.name for row in rows))[:8]
    records = records or place / "records"
    for record in (r for one in merged for r in one.records):
        runs.save(record, records)
    body = {
        "tasks": [row.as_dict() for row in rows],
        "merged": [
            {
                "chapter": one.chapter,
                "corpus": one.corpus,
                "seeds": list(one.seeds),
                "records": [_shown(record) for record in one.records],
                "problems": list(one.problems),
            }
            for one in merged
        ],
    }
    file = place / "sweep.json"
    write_atomic(file, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    problems = [f"{r.task.label}: {r.error}" for r in rows if r.state == "failed"]
    problems += [
        f"{one.chapter} {one.corpus or ''}: {problem}"
        for one in merged
        for problem in one.problems
    ]
    return Summary(_table(rows, merged), file, records, problems)


def _table(rows: Iterable[Row], merged: Iterable[Merged]) -> list[tuple[str, ...]]:
    """Every task, then each merge with mean and sample standard deviation."""
    lines = []
    for row in rows:
        state = row.state + " at the 2nd try" * (
            row.state == "done" and row.attempts > 1
        )
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        seed = "" if row.task.seed is None else str(row.task.seed)
        # of an error the first line; the whole is printed below the table
        shown = row.error.strip().partition("\n")[0] or _metrics(row.records)
        corpus = row.task.corpus or ""
        lines.append((row.task.chapter, corpus, seed, state, seconds, shown))
    for one in merged:
        seeds = ", ".join(map(str, one.seeds))
        shown = _metrics(one.records)
        lines.append((one.chapter, one.corpus or "", seeds, "merged", "", shown))
    return lines


def _main_metric(record: runs.RunRecord) -> str | None:
    """MAE where it was measured, else the first metric of the test split."""
    known = [set(entry.get("test") or ()) for entry in record.per_seed]
    common = set.intersection(*known) if known else set()
    return "mae" if "mae" in common else min(common, default=None)


def _shown(record: runs.RunRecord) -> dict:
    """Name, file and main test metric of a record."""
    found = {"name": record.name, "file": record.place.as_posix()}
    metric = _main_metric(record)
    if metric:
        path = f"test.{metric}"
        values = {"mean": record.mean(path), "sd": record.sd(path)}
        values = {k: None if math.isnan(v) else v for k, v in values.items()}
        found |= {"metric": path, **values}
    return found


def _metrics(records: Iterable[runs.RunRecord]) -> str:
    """``late-fusion mae 0.905 ± 0.020``, the first few; the JSON has them all."""
    found = [s for s in map(_shown, records) if "metric" in s]
    texts = []
    for one in found[:METRICS_SHOWN]:
        mean = "–" if one["mean"] is None else f"{one['mean']:.3f}"
        sd = "" if one["sd"] is None else f" ± {one['sd']:.3f}"
        texts.append(f"{one['name']} {one['metric'].removeprefix('test.')} {mean}{sd}")
    more = len(found) - METRICS_SHOWN
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------- the runner


@dataclass(frozen=True)
class _Workplace(Book):
    """The book with a build folder of its own: tasks of one chapter share no log."""

    folder: Path = Path()

    @property
    def build(self) -> Path:
        return self.folder


def _perform(root: str, folder: str, key: dict, **job) -> dict:
    place = Path(folder)
    book = _Workplace(**vars(open_book(Path(root))), folder=place)
    chapter, parameters = book[job["chapter"]], job["parameters"]
    # a node's own corpus may differ from the driver's; the record says which it was
    now = _key(book, chapter, parameters) | {"corpus": key["corpus"]}
    changed = [name for name in key if digest(now[name]) != digest(key[name])]
    if changed:
        raise BookError(
            f"{', '.join(changed)} of {chapter.name} changed since the sweep began; "
            "call it again"
        )
    product = Product(place / f"{chapter.name}.ipynb")
    state = State(
        chapter, job["profile"], parameters, key, product, ("asked for",), None
    )

    def tell(_: str, event: dict) -> None:
        if event["event"] == "cell":
            print(json.dumps(event), flush=True)

    (outcome,) = execute(book, [state], place / "records", 1, tell)
    return {"error": outcome.error, "seconds": outcome.seconds}


def _end_with_driver() -> None:
    sys.stdin.read()
    os._exit(1)  # the chapter's process and its kernel follow


def _runner() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        end = _perform(**job)
    except MmsaError as error:
        end = {"error": str(error), "seconds": 0.0}
    print(json.dumps({"event": "end"} | end), flush=True)


if __name__ == "__main__":
    _runner()
