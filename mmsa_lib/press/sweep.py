"""Do the tasks of a sweep that are missing; one that fails is tried once more."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mmsa_lib import runs
from mmsa_lib.errors import BookError, unknown
from mmsa_lib.press.chapters import Book
from mmsa_lib.press.engines import Local, Ray
from mmsa_lib.press.planning import SweepTask

ATTEMPTS = 2  # a failed task is tried once more
REPORT = Callable[[str, dict], None]


@dataclass(frozen=True)
class Row:
    """What became of a task: "done", "kept" (was done before) or "failed"."""

    task: SweepTask
    state: str
    attempts: int = 0
    seconds: float | None = None
    error: str = ""
    records: tuple[runs.RunRecord, ...] = ()


def sweep(
    book: Book,
    tasks: Sequence[SweepTask],
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
        where = Ray(book, jobs, gpus_per_task, ray_address)
    elif engine != "local":
        raise unknown("engine", engine, ["local", "ray"])
    elif gpus_per_task:
        raise BookError(
            "--gpus-per-task is kept by Ray: add --engine ray. The local engine leaves "
            "every GPU that CUDA_VISIBLE_DEVICES shows to every task."
        )
    else:
        where = Local(book, jobs)
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


def _drive(task: SweepTask, where, report: REPORT, stopped: threading.Event) -> Row:
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
