"""Where the tasks of a sweep are attempted: on this machine, or through Ray on another.

For each attempt an engine starts a runner (`mmsa_lib.press.runner`), gives it a job and
hands back its last event.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mmsa_lib import runs
from mmsa_lib.errors import BookError
from mmsa_lib.files import python, write_atomic
from mmsa_lib.press.chapters import Book
from mmsa_lib.press.execute import end_tree
from mmsa_lib.press.freshness import data_folder
from mmsa_lib.press.planning import SweepTask

RUNNER = "mmsa_lib.press.runner"
SENT = ("_toc.yml", "_config.yml", "constraints.txt", "book", "mmsa_lib", "results")
LIGHT = ("__init__", "errors", "files", "runs", "press")  # what a runner imports


def _job(task: SweepTask) -> dict:
    return {
        "chapter": task.chapter,
        "profile": task.state.profile,
        "parameters": task.state.parameters,
        "key": task.state.key,
    }


class Local:
    """Runners on this machine, as many at a time as there are drivers."""

    def __init__(self, book: Book, jobs: int):
        self.drivers, self._root = jobs, book.root
        self._lock, self._running, self._stopped = threading.Lock(), set(), False

    def attempt(self, task: SweepTask, tell: Callable[[dict], None]) -> dict:
        task.folder.mkdir(parents=True)
        job = _job(task) | {"root": str(self._root), "folder": str(task.folder)}
        log, last = task.folder / "runner.log", {}
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                python("from mmsa_lib.press.runner import main; main()"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                encoding="utf-8",
                cwd=task.folder,
                start_new_session=True,  # Ctrl-C reaches us, and we end the runner
            )
            with self._lock:
                self._running.add(process)
                if self._stopped:
                    end_tree(process)
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
                end_tree(process)

    def close(self) -> None:
        pass


class Ray:
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

    def attempt(self, task: SweepTask, tell: Callable[[dict], None]) -> dict:
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
                    [sys.executable, "-P", "-m", RUNNER],
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
    light = (name if (package / name).is_dir() else f"{name}.py" for name in LIGHT)
    sent = [(f"book/{name}", book.root / name) for name in SENT]
    sent += [(f"press/mmsa_lib/{name}", package / name) for name in light]
    packed = io.BytesIO()
    with zipfile.ZipFile(
        packed, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False
    ) as made:
        for inside, top in sent:
            for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
                parts = file.relative_to(top).parts
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
