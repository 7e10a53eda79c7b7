"""Files a chapter's page offers: the clean notebook, the executed one, the source."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mmsa_lib.files import write_atomic

FOLDER = "_build/downloads"  # below the staging folder; Sphinx looks for no pages here

_TITLE = re.compile(r"^# .*$", re.MULTILINE)
_LINKS = """

```{{container}} downloads
{{download}}`Notebook </{folder}/{name}.ipynb>`
{{download}}`Executed notebook </{folder}/{name}-executed.ipynb>`
{{download}}`Source </{folder}/{name}.md>`
```
"""


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
    text = source.read_text(encoding="utf-8")
    write_atomic(folder / f"{name}.ipynb", clean(text))
    write_atomic(folder / f"{name}.md", text)
    shutil.copyfile(staged, folder / f"{name}-executed.ipynb")
    notebook = nbformat.reads(staged.read_text(encoding="utf-8"), as_version=4)
    for cell in notebook.cells:
        title = _TITLE.search(cell.source) if cell.cell_type == "markdown" else None
        if title:
            links = _LINKS.format(folder=FOLDER, name=name)
            end = title.end()
            cell.source = cell.source[:end] + links + cell.source[end:]
            break
    write_atomic(staged, nbformat.writes(notebook) + "\n")
