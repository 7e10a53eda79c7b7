"""Look at the code cells of the chapters: ruff, and the shape of a chapter.

    python scripts/lint_chapters.py [CHAPTER ...]

Each chapter's cells are written to one file with their line numbers kept, so that
ruff's findings name the line of the page. The shape: visible cells have a median under
ten lines and none over thirty, less than two fifths of the code is hidden, no "Show
code" bar stands before the first section, and a chapter has at most 1,400 lines. Exit
status 1 for either.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mmsa_lib.press.chapters import Chapter, find_root, open_book

HIDDEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
LONGEST, MEDIAN, SHARE, LENGTH = 30, 10, 0.4, 1400
RULES = "E,F,B,C4,UP"
# cells show their last expression, import where they need it, free what they named
# (`del`, after which ruff knows no name); lambdas name arms
EXCEPT = "E402,E501,E703,E731,F821,B008,B018,B023,B905,C408"


def code_of(chapter: Chapter) -> str:
    """All cells as one module in which line n is line n of the page."""
    lines = [""] * len(chapter.text.splitlines())
    for cell in chapter.cells:
        source = cell.source.splitlines()
        if not source:
            continue
        body = chapter.text.splitlines()[cell.line :]
        first = body.index(source[0])  # after the cell's options
        for i, line in enumerate(source):
            lines[cell.line + first + i] = "" if line.startswith(("%", "!")) else line
    return "\n".join(lines) + "\n"


def shape_of(chapter: Chapter) -> tuple[str, list[str]]:
    """A row of numbers, and what is not as it should be."""
    visible, hidden, faults = [], 0, []
    section = chapter.text.find("\n## ")
    first = chapter.text[:section].count("\n") + 1
    for cell in chapter.cells:
        n = len(cell.source.splitlines())
        if HIDDEN & set(cell.tags):
            hidden += n
        else:
            visible.append(n)
            if n > LONGEST:
                faults.append(f"line {cell.line}: a visible cell of {n} lines")
        if "hide-input" in cell.tags and cell.line < first:
            faults.append(
                f"line {cell.line}: a 'Show code' bar before the first section"
            )
    share = hidden / max(hidden + sum(visible), 1)
    median, length = statistics.median(visible), len(chapter.text.splitlines())
    if not median < MEDIAN:
        faults.append(f"visible cells have a median of {median:g} lines")
    if share >= SHARE:
        faults.append(f"{share:.0%} of the code is hidden")
    if length > LENGTH:
        faults.append(f"{length} lines")
    row = f"{length:6} {len(visible):6} {median:7g} {max(visible):8} {share:8.0%}"
    return f"{chapter.name:12} {row}", faults


def ruff(chapters: list[Chapter]) -> int:
    """Exit status of ruff on the cells; its findings name the pages."""
    with tempfile.TemporaryDirectory() as folder:
        for chapter in chapters:
            Path(folder, f"{chapter.name}.py").write_text(code_of(chapter), "utf-8")
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
        command += ["--target-version", "py311", "--output-format", "concise"]
        command += [
            "--select",
            RULES,
            "--ignore",
            EXCEPT,
            "--config",
            "builtins=['display']",
            ".",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        page, mark, rest = line.partition(".py:")
        print(f"book/{page}.md:{rest}" if mark else line)
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


def main(arguments: list[str]) -> int:
    book = open_book(find_root())
    chapters = [book[n] for n in arguments] or list(book.chapters.values())
    status = ruff(chapters)
    print("chapter       lines  shown  median  longest   hidden")
    for chapter in chapters:
        row, faults = shape_of(chapter)
        print(row)
        for fault in faults:
            print(f"  book/{chapter.name}.md, {fault}")
        status |= bool(faults)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
