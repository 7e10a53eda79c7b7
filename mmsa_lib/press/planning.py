"""The tasks of a sweep: chapters x seeds x corpora, checked before anything starts.

A task executes a chapter as ``mmsa-book run`` does, in a folder named by its key, so a
task that was done once is never done again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmsa_lib import runs
from mmsa_lib.errors import BookError, unknown
from mmsa_lib.files import digest, sha256_of
from mmsa_lib.press.chapters import Book, Chapter
from mmsa_lib.press.freshness import Product, State, key_of
from mmsa_lib.runs.record import place


@dataclass(frozen=True)
class SweepTask:
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
) -> list[SweepTask]:
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


def _task(book, chapter, corpus, seed, profile, parameters, folder) -> SweepTask:
    key = task_key(book, chapter, parameters)
    parts = [chapter.name, corpus, None if seed is None else f"seed{seed}"]
    name = "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts if part)
    product = Product(folder / f"{name}-{digest(key)[:8]}" / f"{chapter.name}.ipynb")
    profile = str(parameters.get("profile", profile))
    state = State(chapter, profile, parameters, key, product, ("asked for",), None)
    return SweepTask(corpus, seed, state)


def task_key(book: Book, chapter: Chapter, parameters: dict) -> dict:
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
