"""Clips decoded in processes of their own: one that crashes its process ends no other.

A file can bring a decoder down: a fault in it, or so much memory that the system ends
the process. Here that costs one clip, which is refused with the reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import cast

import numpy as np

from mmsa_lib.corpora.decoding import LONGEST, Media, Unusable, read
from mmsa_lib.errors import ClipError
from mmsa_lib.files import python

MEMORY = 8 * 2**30  # bytes that one decoder may take
_PROGRAM = "from mmsa_lib.corpora.apart import serve; serve()"
_ARRAYS = {"frames": np.uint8, "frame_times": np.float64, "audio": np.float32}


def decode(
    path: str | Path,
    frames: int = 16,
    rate: int = 16000,
    longest: float = LONGEST,
) -> Media:
    """As `decoding.decode`, in another process. Raises `ClipError` if that one dies."""
    job = os.path.abspath(path), frames, rate, longest
    try:
        answer = _ask(job)
    except _DiedError:  # perhaps another clip took the memory: once more
        try:
            answer = _ask(job)
        except _DiedError as error:
            answer = str(error)
    if isinstance(answer, str):
        raise ClipError(f"{path}: {answer}")
    return answer


def _ask(job: tuple) -> Media | str:
    worker = _workers.take()
    try:
        answer = worker.ask(job)
    except BaseException:
        worker.end()
        raise
    _workers.give(worker)
    return answer


@contextmanager
def kept() -> Generator[None]:
    """Inside this block decoders wait for the next clip; they end with the block."""
    _workers.hold(1)
    try:
        yield
    finally:
        _workers.hold(-1)


class _DiedError(Exception):
    """How a decoder ended."""


class _Worker:
    """A decoder and the pipes to it."""

    def __init__(self):
        self.process = subprocess.Popen(
            python(_PROGRAM),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, job: tuple) -> Media | str:
        """A clip, or why there is none. Raises `_DiedError`."""
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            head = json.loads(self.process.stdout.readline())
            if isinstance(head, str):
                return head
            arrays = {k: self._array(head.pop(k), t) for k, t in _ARRAYS.items()}
        except (OSError, EOFError, ValueError) as error:
            raise _DiedError(self._death()) from error
        return Media(**arrays, **head)

    def _array(self, shape: list[int], kind: type) -> np.ndarray:
        array = np.empty(shape, kind)
        rest = memoryview(array.reshape(-1).view(np.uint8))
        while rest:
            count = cast(BufferedReader, self.process.stdout).readinto(rest)
            if not count:
                raise EOFError
            rest = rest[count:]
        return array

    def _death(self) -> str:
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "its decoder broke off"
        if code >= 0:
            return f"broken: its decoder ended with exit status {code}"
        with suppress(ValueError):
            code = signal.Signals(-code).name
        why = ", as the system does when memory runs out" * (code == "SIGKILL")
        return f"broken: its decoder was ended by {code}{why}"

    def end(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                pipe.close()
        self.process.wait()


class _Workers:
    """Decoders that wait, and for how many blocks they do."""

    def __init__(self):
        self.lock = threading.Lock()
        self.idle: list[_Worker] = []
        self.blocks = 0

    def take(self) -> _Worker:
        with self.lock:
            while self.idle:
                worker = self.idle.pop()
                if worker.alive:
                    return worker
                worker.end()
        return _Worker()

    def give(self, worker: _Worker) -> None:
        with self.lock:
            if self.blocks and worker.alive:
                self.idle.append(worker)
                return
        worker.end()

    def hold(self, change: int) -> None:
        with self.lock:
            self.blocks += change
            left = [] if self.blocks else self.idle
            self.idle = self.idle if self.blocks else []
        for worker in left:
            worker.end()


_workers = _Workers()


# --- the other process ----------------------------------------------------------------


def serve() -> None:
    """Decode what standard input asks for, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks decides when to stop
    _limit_memory()
    out = sys.stdout.buffer
    for line in sys.stdin.buffer:
        for piece in _answer(json.loads(line)):
            out.write(piece)
        out.flush()


def _answer(job: list):
    try:
        media = read(*job)
    except Unusable as error:
        return [json.dumps(str(error)).encode() + b"\n"]
    arrays = {k: np.ascontiguousarray(getattr(media, k), t) for k, t in _ARRAYS.items()}
    head = {k: a.shape for k, a in arrays.items()}
    head |= {"rate": media.rate, "seconds": media.seconds}
    return [json.dumps(head).encode() + b"\n", *(a.data for a in arrays.values())]


def _limit_memory() -> None:
    with suppress(OSError):  # where there is such a file: end this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
