"""Files a chapter's page offers: the clean notebook, the executed one, the source."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmsa_lib.files import read_text, write_atomic
from mmsa_lib.press.chapters import below_title

FOLDER = "_build/downloads"  # below the staging folder; Sphinx looks for no pages here

_LINKS = """
```{{container}} downloads
{{download}}`Notebook </{folder}/{name}.ipynb>`
{{download}}`Executed notebook </{folder}/{name}-executed.ipynb>`
{{download}}`Source </{folder}/{name}.md>`
```"""


def clean(source: str) -> str:
    """A chapter's source as a notebook without outputs, ready to be run."""
    import jupytext
    import nbformat

    notebook = jupytext.reads(source, fmt="md:myst")
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # jupytext draws them at random
    return nbformat.writes(notebook) + "\n"


def offer(stage: Path, source: Path, staged: Path) -> None:
    """Lay the three files of a chapter into the staging folder and link to them.

    source: the chapter in ``book/``. staged: its executed notebook in the staging
    folder; the links are written below its title and nowhere else.
    """
    import nbformat

    name, folder = source.stem, stage / FOLDER
    text = read_text(source, source.name)
    write_atomic(folder / f"{name}.ipynb", clean(text))
    write_atomic(folder / f"{name}.md", text)
    shutil.copyfile(staged, folder / f"{name}-executed.ipynb")
    notebook = nbformat.reads(staged.read_text(encoding="utf-8"), as_version=4)
    for cell in notebook.cells:
        end = below_title(cell.source) if cell.cell_type == "markdown" else 0
        if end:
            links = _LINKS.format(folder=FOLDER, name=name)
            lines = cell.source.split("\n")
            cell.source = "\n".join([*lines[:end], links, *lines[end:]])
            break
    write_atomic(staged, nbformat.writes(notebook) + "\n")
