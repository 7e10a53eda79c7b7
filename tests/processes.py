"""Processes of the tests: started, waited for by what they do, and ended at last."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import ROOT

PATIENCE = 300  # seconds for what nobody can tell us; no busy machine needs as many


def start(root: Path, *arguments: str, **more) -> subprocess.Popen:
    """The command as a process of its own, with this library, on another book.

    No ``with``: its end waits for the process. See `end_family`.
    """
    # -P: the library of the book under test must not shadow this one
    program = (
        "import signal\n"  # a test that runs in the background would ignore Ctrl-C
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mmsa_lib.press.cli import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and everything printed, once it is done."""
    printed = process.communicate()[0]
    return process.returncode, printed


def computes(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(root: Path) -> list[psutil.Process]:
    """Living processes that work in a book or on it."""
    found = []
    for process in psutil.process_iter():
        try:
            words = (process.cwd(), *process.cmdline())
            if str(root) in " ".join(words) and computes(process):
                found.append(process)
        except psutil.Error:
            pass
    return found


def end_family(root: Path) -> None:
    """Kill what a test has left, also what a killed parent left."""
    for process in family(root):
        if process.pid != os.getpid():
            process.kill()


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    """Until it holds; fails if the process that should bring it about has ended."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if process is None:
            assert time.monotonic() < end, "waited in vain"
        elif process.poll() is not None and not condition():
            raise AssertionError(f"it ended without it:\n{process.stdout.read()}")
        time.sleep(0.05)
