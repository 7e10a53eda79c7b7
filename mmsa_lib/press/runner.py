"""One attempt at a task of a sweep, as a process of its own.

`main` reads a job from its standard input, executes the
chapter and writes events to its standard output, one JSON line each. It ends with that
pipe, so nothing computes on when the driver is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from mmsa_lib.errors import BookError, MmsaError
from mmsa_lib.files import digest
from mmsa_lib.press.chapters import Book, open_book
from mmsa_lib.press.execute import execute
from mmsa_lib.press.freshness import Product, State
from mmsa_lib.press.planning import task_key


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
    now = task_key(book, chapter, parameters) | {"corpus": key["corpus"]}
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


def main() -> None:
    """Attempt the one task that is written to the standard input."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        end = _perform(**job)
    except MmsaError as error:
        end = {"error": str(error), "seconds": 0.0}
    print(json.dumps({"event": "end"} | end), flush=True)


if __name__ == "__main__":
    main()
