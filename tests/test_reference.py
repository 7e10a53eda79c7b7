"""The library reference: every public name is in it, and docstrings read as written."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from conftest import ROOT

import mmsa_lib
from mmsa_lib.press.cards import Trace
from mmsa_lib.press.chapters import open_book
from mmsa_lib.press.reference import MARK, PACKAGE, markdown, read, reference
from mmsa_lib.press.render import _inputs
from mmsa_lib.press.shelf import Shelf

MODULES = [
    m.name
    for m in pkgutil.walk_packages(mmsa_lib.__path__, "mmsa_lib.")
    if not m.name.rpartition(".")[2].startswith("_")
]


def public(name: str) -> dict[str, object]:
    """What a module itself offers, by the interpreter: not by our reading of it."""
    found = vars(importlib.import_module(name))
    return {
        k: v
        for k, v in found.items()
        if not k.startswith("_") and getattr(v, "__module__", None) == name
    }


@pytest.fixture(scope="module")
def page() -> str:
    return reference(PACKAGE)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_there(page, name):
    if not Path(inspect.getfile(importlib.import_module(name))).read_text().strip():
        return
    assert f"{{py:module}} {name}\n" in page
    part = page.split(f"{{py:module}} {name}\n")[1].split("{py:module}")[0]
    for key, value in public(name).items():
        kinds = ("class", "exception") if inspect.isclass(value) else ("function",)
        kinds = (*kinds, "data")  # a constant may be an instance of its own module
        assert any(f"{{py:{kind}}} {key}" in part for kind in kinds), key
        source = inspect.getsource(value) if inspect.isclass(value) else ""
        for inner in re.findall(r"^    def ([a-z]\w*)\(", source, re.MULTILINE):
            kind = "method" if callable(getattr(value, inner)) else "property"
            assert f"{{py:{kind}}} {inner}" in part, f"{key}.{inner}"


def test_what_a_reader_calls_has_a_docstring():
    bare = [
        f"{module}.{key}"
        for module in MODULES
        for key, value in public(module).items()
        if inspect.isfunction(value) or inspect.isclass(value)
        # a dataclass without one gets its signature
        if not value.__doc__ or value.__doc__.startswith(f"{key}(")
    ]
    assert not bare


def test_the_page_of_the_book_asks_for_it():
    assert MARK in (ROOT / "book/library.md").read_text()
    assert "mmsa_lib.press.reference" in (ROOT / "_config.yml").read_text()


def test_a_changed_docstring_renders_the_page_again(tmp_path):
    for name, text in {
        "_config.yml": "title: T\n",
        "_toc.yml": "format: jb-book\nroot: book/index\n",
        "book/index.md": "# T\n",
        "mmsa_lib/a.py": '"""Old."""\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    trace = Trace(book := open_book(tmp_path), {}, Shelf(()))
    before = _inputs(book, trace)
    (tmp_path / "mmsa_lib/a.py").write_text('"""New."""\n')
    assert _inputs(book, trace) != before


def test_modules_come_in_the_order_of_the_layers():
    names = [m.name.split(".")[1] for m in read(PACKAGE) if "." in m.name]
    order = list(dict.fromkeys(names))
    wanted = "errors corpora nets methods training metrics statistics runs figures"
    assert order[:9] == wanted.split()
    assert len(names) - names.index(order[-1]) == names.count(order[-1])


def test_a_signature_has_types_defaults_and_no_self(page):
    assert "{py:function} acc2(truth, prediction, rule: str) -> float\n" in page
    assert "{py:method} only(modalities: Sequence[str]) -> Split\n" in page
    assert "{py:property} width\n:type: int\n" in page
    assert "{py:data} SPLITS\n:value: ('train', 'valid', 'test')\n" in page
    assert "Annotated" not in page


DOC = """One line with *stress*, `code`, ``more code`` and [-3, 3] < $x_1$.

epochs        most epochs to run
lr, decay     of the optimiser; a line
              that goes on
Raises nothing.

    a file    in a folder

folder: where it lies,
and how
seed: of all.
What follows a full stop is prose.

    x = f(1)

Prose with a colon: not a row.
"""


def test_docstrings_read_as_written():
    text = markdown(DOC, {}, ("folder", "seed"))
    assert r"*stress*, `code`, `more code` and \[\-3, 3\] \< \$x\_1\$\." in text
    assert "`epochs`\n: most epochs to run\n" in text
    assert "`lr, decay`\n: of the optimiser; a line that goes on\n" in text
    assert "\n\nRaises nothing\\.\n" in text
    assert "`a file`\n: in a folder\n" in text
    assert "`folder`\n: where it lies, and how\n" in text
    assert "`seed`\n: of all\\.\n\nWhat follows" in text
    assert "```text\nx = f(1)\n```" in text
    assert "\nProse with a colon: not a row\\.\n" in text
    assert markdown("", {}) == ""


def test_names_in_docstrings_are_links_unless_ambiguous_or_parameters():
    links = {"Split": "a.Split", "seed": "a.seed"}
    text = markdown("A `Split` of `seed` and `load`.", links, ("seed",))
    assert text == "A {py:obj}`Split <a.Split>` of `seed` and `load`\\.\n"
