"""What an executed chapter and a rendered book must hold before a reader sees them.

Gates look only at what was made: the executed notebook beside its source and its run
records, and the HTML pages. Each problem is one line that names chapter, cell and line,
and says what to do; all of them are found before anything is refused.

A number on a page is one of these, everything else turns the build red:

- marked with its record by `runs.number`, `runs.table`, ...: computed again from the
  record's file and compared; these are counted;
- given: ``runs.given(...)`` in an output, ``[0.88]{.given source="..."}`` in prose, for
  what was chosen, defined or taken from a source that is named;
- in an output of a cell tagged ``illustration``: a small worked example, shapes, sizes
  of data. Never a result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mmsa_lib import runs
from mmsa_lib.files import digest, sha256, sha256_of, write_atomic
from mmsa_lib.press.chapters import Book, Chapter
from mmsa_lib.press.freshness import Product, State
from mmsa_lib.press.outputs import Findings, check_cell
from mmsa_lib.press.prose import check_prose
from mmsa_lib.press.shelf import Shelf


def approve(
    book: Book, state: State, shelf: Shelf, bands: Mapping
) -> tuple[Product, list[str]]:
    """The last version of a chapter that passed, and the problems of the newest one.

    A notebook that passes is copied to ``_build/good/PROFILE/``, from where the book
    is rendered; one that does not leaves the last good one there. What passed before is
    not looked at again until the notebook, its bands or these gates change.
    """
    good = state.good
    text = state.product.notebook.read_text(encoding="utf-8")
    noted = state.product.read() or {}
    key = digest([sha256(text), state.chapter.sha256, bands, _press_sha256()])
    last = good.read()
    state.refused.unlink(missing_ok=True)
    if last and last["key"] == key and good.intact():
        return good, []
    made = noted.get("records", [])
    found = check_chapter(book, state.chapter, json.loads(text), shelf, bands, made)
    if found.problems:
        write_atomic(state.refused, "\n".join(found.problems))
        return good, found.problems
    more = {"numbers": found.numbers, "used": sorted(found.records)}
    facts = {"key": key, "records": made, "seconds": noted.get("seconds", 0)}
    good.write(text, facts | more)
    return good, []


def _press_sha256() -> str:
    """One hash for all that may change a verdict: any module of the press counts."""
    return digest([sha256_of(p) for p in sorted(Path(__file__).parent.glob("*.py"))])


def check_chapter(
    book: Book,
    chapter: Chapter,
    notebook: Mapping,
    shelf: Shelf,
    bands: Mapping[str, Mapping[str, list[float]]] | None = None,
    made: Iterable[str] = (),
) -> Findings:
    """Every gate of one executed chapter.

    notebook: the executed notebook, as JSON. bands: record name -> path -> [low, high]
    of the profile. made: names of the record files that the execution wrote.
    """
    found = Findings()
    cells = [
        c
        for c in notebook["cells"]
        if c["cell_type"] == "code"
        and "injected-parameters" not in c["metadata"].get("tags", [])
    ]
    where = f"book/{chapter.path.name}"
    if len(cells) != len(chapter.cells):
        found.problems.append(
            f"{where}: {len(chapter.cells)} code cells, but {len(cells)} were executed"
        )
        return found
    for i, (cell, executed) in enumerate(zip(chapter.cells, cells, strict=True), 1):
        place = f"{where}, code cell {i} of {len(cells)} (line {cell.line})"
        for problem in check_cell(book, cell, executed, shelf, found):
            found.problems.append(f"{place}: {problem}")
    if not any(c["outputs"] for c in cells):
        found.problems.append(
            f"{where}: no code cell has an output, so the page would show no result"
        )
    for line, problem in check_prose(chapter.text):
        found.problems.append(f"{where}, line {line}: {problem}")
    found.problems += [f"{where}: {p}" for p in _check_bands(shelf, bands or {}, made)]
    return found


def _check_bands(shelf: Shelf, bands, made: Iterable[str]) -> Iterator[str]:
    """Metrics of the records that were made now, against the profile's bands."""
    records = {}
    for name in made:
        stem, _, short = name.rpartition("-")
        if stem in bands:
            records.setdefault(stem, []).append(shelf[short])
    for name, paths in bands.items():
        if name not in records:
            yield f"the profile has a band for the record {name}, but none was made"
        for record in records.get(name, ()):
            for path, (low, high) in paths.items():
                of = "mean" if record.per_seed else "field"
                value = runs.number(record, path, of=of).value
                if not low <= value <= high:
                    yield (
                        f"{path} of {name} is {value:.4g}, outside its band {low} to "
                        f"{high}. Find out what broke; move the band in the profile "
                        "only if the new value is right"
                    )
