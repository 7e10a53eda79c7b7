"""The press: chapters are found, executed once, rendered strictly; errors are named."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT
from processes import family, finish, start, wait_until

from mmsa_lib.errors import BookError, UnknownNameError
from mmsa_lib.files import write_atomic
from mmsa_lib.press import cli
from mmsa_lib.press.chapters import (
    LIMITS,
    UNCLEAR,
    find_root,
    open_book,
    parse,
    read_chapter,
)
from mmsa_lib.press.closure import every_node, reach
from mmsa_lib.press.freshness import states
from mmsa_lib.press.values import seeds_of

pytestmark = pytest.mark.usefixtures("no_orphans")

HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""
CONFIG = """\
title: Tiny
sphinx:
  config:
    suppress_warnings: ["myst.domains"]
"""


def cell(source: str, options: str = "") -> str:
    return f"```{{code-cell}} ipython3\n{options}{source}\n```\n\n"


def chapter(title: str, *cells: str, parameters: str = 'profile = "none"') -> str:
    first = cell(parameters, ":tags: [parameters]\n")
    return f"{HEADER}\n# {title}\n\n{first}" + "".join(map(cell, cells))


def make_project(root: Path, chapters: dict[str, str]) -> Path:
    """A book with a library of its own, one module of which no chapter reaches."""
    files = {
        "_config.yml": CONFIG,
        "_toc.yml": "format: jb-book\nroot: book/index\nchapters:\n"
        + "".join(f"  - file: book/{name}\n" for name in chapters),
        "book/index.md": "# Tiny\n\nA book.\n",
        "book/profiles/quick.yml": "all:\n  profile: quick\n",
        "mmsa_lib/__init__.py": "",
        "mmsa_lib/used.py": "VALUE = 17\n",
        "mmsa_lib/unused.py": "VALUE = 18\n",
    }
    files |= {f"book/{name}.md": text for name, text in chapters.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def add_library(root: Path) -> None:
    """Our records, and what they import, in the library of a book under test."""
    for name in ("__init__", "errors", "files", "runs"):
        if (ROOT / "mmsa_lib" / name).is_dir():
            shutil.copytree(ROOT / "mmsa_lib" / name, root / "mmsa_lib" / name)
        else:
            shutil.copy(ROOT / f"mmsa_lib/{name}.py", root / "mmsa_lib")


def mmsa_book(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and everything printed, in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out + printed.err


# ---------------------------------------------------------------- reading


def test_cells_are_those_of_jupytext(tmp_path):
    import jupytext

    tricky = (
        chapter("Tricky", "x = '''\n~~~\n'''", "# only a comment")
        + "````md\n```{code-cell}\nnot_a_cell = 1\n```\n````\n\n"
        + "```python\nnot_a_cell = 2\n```\n\n"
        + cell(
            "y = 2", "---\ntags: [hide-input, remove-output]\nmystnb:\n  a: b\n---\n"
        )
        + "~~~{code-cell}\nz = 3\n~~~\n\n- a list\n  ```python\n  no = 1\n  ```\n"
        + "````{code-cell}\ntext = '```'\n````\n"
    )
    (tmp_path / "tricky.md").write_text(tricky)
    for path in [tmp_path / "tricky.md", *sorted((ROOT / "book").glob("*.md"))]:
        ours = read_chapter(path)
        if ours is None:
            continue
        theirs = jupytext.reads(path.read_text(), fmt="md:myst").cells
        theirs = [c for c in theirs if c.cell_type == "code"]
        assert [c.source for c in ours.cells] == [c.source for c in theirs]
        tags = [tuple(c.metadata.get("tags", [])) for c in theirs]
        assert [c.tags for c in ours.cells] == tags
        lines = path.read_text().splitlines()
        for c in ours.cells:
            assert "{code-cell}" in lines[c.line - 1]


def test_parameters_and_their_types(tmp_path):
    source = (
        'corpus = "puppets"  # a name\nseeds = [0, 1]\nepochs: int = 3\nlr = 1e-3\n'
        "flag = True\ndevice = None\nunclear = max(1, 2)\nprint(corpus)"
    )
    path = tmp_path / "a.md"
    path.write_text(chapter("A", "epochs = 99", parameters=source))
    a = read_chapter(path)
    assert a.parameters == {
        "corpus": "puppets",
        "seeds": [0, 1],
        "epochs": 3,
        "lr": 1e-3,
        "flag": True,
        "device": None,
        "unclear": UNCLEAR,
    }
    good = {"corpus": "mosi", "seeds": [4], "lr": 1, "device": "cuda", "unclear": {}}
    assert a.check(good) == good
    bad = {"epochs": 2.5, "seeds": 3, "flag": 1, "lr": "fast", "corpus": 7}
    bad |= {"device": 3}
    for name, value in bad.items():
        with pytest.raises(BookError, match=f"parameter {name} of a is .* by default"):
            a.check({name: value})
    with pytest.raises(UnknownNameError, match=r"Did you mean 'epochs'.*seeds"):
        a.check({"epoch": 3})
    # as typed on the command line
    found = cli._parameters(a, ["corpus=123", "seeds=[7]", "lr=1e-2", "device=null"])
    assert found == {"corpus": "123", "seeds": [7], "lr": 0.01, "device": None}


def test_command_line_pairs():
    words = ["run", "a", "-p", "lr", "-1", "-p", "seeds=[0]", "--out", "b", "-p", "x"]
    assert cli._join_pairs(words) == [
        *("run", "a", "-p", "lr=-1", "-p", "seeds=[0]", "--out", "b", "-p", "x"),
    ]
    words = ["predict", "--", "-p", "a.mp4", "b.mp4"]
    assert cli._join_pairs(words) == words


def test_wrong_books_are_refused(tmp_path):
    with pytest.raises(BookError, match="no book here"):
        find_root(tmp_path)
    root = make_project(tmp_path, {"a": chapter("A", "1")})
    assert find_root(root / "book") == root
    assert list(open_book(root).chapters) == ["a"]

    (root / "book/forgotten.md").write_text("# Forgotten\n")
    with pytest.raises(BookError, match=r"book/forgotten\.md.*not in _toc\.yml"):
        open_book(root)
    (root / "book/forgotten.md").unlink()

    toc = (root / "_toc.yml").read_text()
    (root / "_toc.yml").write_text(toc + "  - file: book/lost\n")
    with pytest.raises(
        BookError, match=r"names 'book/lost' but lost\.md does not exist"
    ):
        open_book(root)
    (root / "_toc.yml").write_text(toc + "  - file: book/a\n")
    with pytest.raises(BookError, match="twice"):
        open_book(root)
    (root / "_toc.yml").write_text(toc)

    (root / "book/a.md").write_text(
        chapter("A", "1").replace("language: python", "x: y")
    )
    with pytest.raises(BookError, match="language: python"):
        open_book(root)


def test_profiles_know_their_chapters_and_parameters(tmp_path):
    two = {"a": chapter("A", "1", parameters="profile = ''\nepochs = 1")}
    root = make_project(tmp_path, two | {"b": chapter("B", "1")})
    quick = root / "book/profiles/quick.yml"
    quick.write_text("all: {profile: q, epochs: 5}\nchapters: {a: {epochs: 9}}\n")
    assert open_book(root).profile("quick") == {
        "a": {"profile": "q", "epochs": 9},
        "b": {"profile": "q"},
    }
    for text, error in {
        "chapters: {c: {epochs: 1}}": "unknown chapter 'c'",
        "chapters: {b: {epochs: 1}}": "unknown parameter of b 'epochs'",
        "chapter: {}": "unknown key in quick.yml 'chapter'",
    }.items():
        quick.write_text(text)
        with pytest.raises(UnknownNameError, match=error):
            open_book(root).profile("quick")
    with pytest.raises(UnknownNameError, match=r"unknown profile 'quik'.*'quick'"):
        open_book(root).profile("quik")


def test_plans_are_part_of_the_key_of_their_chapter_only(tmp_path, capsys, monkeypatch):
    root = make_project(tmp_path, {"a": chapter("A", "1"), "b": chapter("B", "1")})
    monkeypatch.chdir(root)
    quick = root / "book/profiles/quick.yml"

    def write(plans, name="quick"):
        text = f"all: {{profile: {name}}}\nplans: {plans}\n"
        (root / f"book/profiles/{name}.yml").write_text(text)

    def reasons():
        code, printed = mmsa_book(capsys, "status", "--json")
        assert code == 0
        return {row["chapter"]: row["reasons"] for row in json.loads(printed)}

    for state in states(open_book(root), "quick"):  # a key that knows no plans yet
        old = {k: v for k, v in state.key.items() if k != "plans"}
        state.product.write("executed", {"key": old, "seconds": 1.0})
    assert reasons() == {"a": [], "b": []}
    write("{a: {puppets: {epochs: 3}, mosi: {epochs: 5, lr: 0.1}}, b: {}}")
    plans = open_book(root).plans("quick", "a")
    assert plans == {"puppets": {"epochs": 3}, "mosi": {"epochs": 5, "lr": 0.1}}
    assert open_book(root).plans("quick", "b") == {}
    added = [f"plans {n} added" for n in ("mosi.epochs", "mosi.lr", "puppets.epochs")]
    assert reasons() == {"a": added, "b": []}
    for state in states(open_book(root), "quick"):
        state.product.write("executed", {"key": state.key, "seconds": 1.0})
    assert reasons() == {"a": [], "b": []}
    write("{a: {mosi: {lr: 0.1, epochs: 5}, puppets: {epochs: 3}}}")  # the same
    assert reasons() == {"a": [], "b": []}
    write("{a: {puppets: {epochs: 4}, mosi: {epochs: 5}}, b: {puppets: {epochs: 1}}}")
    changed = ["plans mosi.lr gone", "plans puppets.epochs 3 -> 4"]
    assert reasons() == {"a": changed, "b": ["plans puppets.epochs added"]}
    write("{a: {puppets: {epochs: 3}, mosi: {epochs: 5, lr: 0.1}, mosei: {}}}")
    assert reasons() == {"a": ["plans mosei added"], "b": []}
    write("{a: {puppets: {epochs: 4}, mosi: {epochs: 5}}}")
    assert reasons() == {"a": changed, "b": []}
    write("{a: {puppets: {epochs: 9}}}", "full")  # of another profile: nothing
    assert reasons()["a"] == changed
    assert open_book(root).plans("full", "a") == {"puppets": {"epochs": 9}}
    assert open_book(root).plans("mine", "a") == {}

    for wrong, problem in {
        "[a]": "plans: plans are {chapter: {corpus: {epochs: 3, ...}}}; found ['a']",
        "{aa: {}}": "plans: unknown chapter 'aa'. Did you mean 'a'? Known: a, b.",
        "{a: [3]}": "plans, a: plans are {chapter: {corpus: ",
        "{b: {puppets: 3}}": "plans, b, puppets: plans are {chapter: ",
        "{b: {puppets: }}": "plans, b, puppets: plans are {chapter: ",
        "{a: {puppets: {lr: 1e-3}}}": "YAML reads lr 1e-3 as a word; write 1.0e-3",
    }.items():
        write(wrong)
        code, printed = mmsa_book(capsys, "status")
        assert code == 1
        assert f"error: {quick.relative_to(root)}, line 2, plans" in printed
        assert problem in printed


# ---------------------------------------------------------------- what cannot be read

SHOUT = cell("print(1)", ":tags: [illustration]\n")
NO_KERNEL = HEADER.replace(HEADER[HEADER.index("kernelspec") : -4], "")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: text.replace("---\n", "--- \n"),
        lambda text: text.replace("---\n", "---\t\n", 1),
        lambda text: text.rstrip(),
        lambda text: text.replace("---\nkernelspec", "---\n# a comment\nkernelspec"),
    ],
)
def test_how_a_file_was_saved_does_not_matter(tmp_path, change):
    root = make_project(tmp_path, {"a": chapter("A") + SHOUT})
    path = root / "book/a.md"
    before = open_book(root)["a"]
    path.write_bytes(change(path.read_text()).encode())
    after = open_book(root)["a"]
    assert (after.cells, after.parameters) == (before.cells, before.parameters)
    assert "\r" not in after.text and after.text.startswith("---")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\n" + HEADER + "\n# A\n\n" + SHOUT, 15, "no header that can be read"),
        (" " + HEADER + "\n# A\n\n" + SHOUT, 14, "no header that can be read"),
        ("<!-- x -->\n" + HEADER + SHOUT, 12, "no header that can be read"),
        (HEADER.replace("---", "--") + SHOUT, 11, "no header that can be read"),
        (HEADER[:-4] + "\n# A\n\n" + SHOUT, 13, "no header that can be read"),
        ("# A\n\n" + SHOUT, 3, "no header that can be read"),
        ("---\n---\n" + SHOUT, 3, "no kernelspec"),
        (NO_KERNEL + "\n# A\n\n" + SHOUT, 10, "no kernelspec"),
        (HEADER.replace("kernelspec", "Kernelspec") + SHOUT, 11, "no kernelspec"),
        (HEADER.replace("language: python", "language: R"), 6, "language: python"),
        ("---\nkernelspec: python\n---\n" + SHOUT, 2, "language: python"),
        ("---\nkernelspec:\n---\n" + SHOUT, 2, "language: python"),
        ("---\nkernelspec: [\n---\n" + SHOUT, 2, "YAML"),
        ("---\na: 1\n b: 2\n---\n" + SHOUT, 3, "YAML"),
        ("---\njust words\n---\n" + SHOUT, 2, "a header is name: value"),
        ("---\na: !!python/name:os.system x\n---\n", 2, "YAML"),
        # cells that look like cells and stand where nothing is executed
        (HEADER + SHOUT + "- x\n  ```{code-cell}\n  1\n  ```\n", 17, "left margin"),
        (HEADER + SHOUT + "> ```{code-cell}\n> 1\n> ```\n", 16, "left margin"),
        (HEADER + SHOUT + "``` {code-cell}\n1\n```\n", 16, "left margin"),
        (HEADER + SHOUT + ":::{code-cell}\n1\n:::\n", 16, "left margin"),
        (HEADER + SHOUT + "Words.\n:::{code-cell}\n1\n:::\n", 17, "left margin"),
        (HEADER + SHOUT + "    ```{code-cell}\n    1\n    ```\n", 16, "left margin"),
        (
            HEADER + SHOUT + "````{note}\nx\n```{code-cell}\n1\n```\n````\n",
            18,
            "left margin",
        ),
        ("# A\n\n- x\n\n  ```{code-cell}\n  1\n  ```\n", 5, "left margin"),
        (HEADER + "````md\nnever closed\n\n" + SHOUT, 14, "left margin"),
        (HEADER + "```{code-cell}\n1\n\n````{code-cell}\n2\n", 11, "never closed"),
        # options of cells
        (HEADER + cell("1", ":tags: [a\n"), 12, "YAML"),
        (HEADER + cell("1", ":name: a\n:tags: {a\n"), 13, "YAML"),
        (HEADER + cell("1", ":tags\n"), 12, "options of a cell are name: value"),
        (HEADER + cell("1", ":tags: 3\n"), 12, "tags are words"),
        (HEADER + cell("1", ":tags: [a, 3]\n"), 12, "tags are words"),
        (HEADER + cell("1", "---\nname: a\ntags: {b: 1}\n---\n"), 14, "tags are words"),
        (HEADER + cell("1", "---\ntags: [\n---\n"), 13, "YAML"),
        (HEADER + cell("1", "---\ntags: [a]\n"), 12, "not closed"),
    ],
)
def test_what_would_not_be_executed_is_an_error_with_file_and_line(
    tmp_path, capsys, monkeypatch, text, line, words
):
    root = make_project(tmp_path, {"a": text})
    monkeypatch.chdir(root)
    code, printed = mmsa_book(capsys, "status")
    assert (code, "Traceback" in printed) == (1, False)
    assert printed.startswith(f"error: book/a.md, line {line}: "), printed
    assert words in printed


@pytest.mark.parametrize(
    "text",
    [
        "# A\n\nA word on `{code-cell}`.\n",
        "# A\n\n````md\n```{code-cell}\n1\n```\n````\n",
        "# A\n\n````{code-block} md\n```{code-cell}\n1\n```\n````\n",
        "# A\n\n<!--\n```{code-cell}\n1\n```\n-->\n",
        "---\norphan: true\n---\n\n# A\n",
    ],
)
def test_a_page_that_only_speaks_of_cells_is_no_chapter(tmp_path, text):
    root = make_project(tmp_path, {"a": text})
    assert list(open_book(root).chapters) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("_toc.yml", "format: [", "_toc.yml, line 1: this cannot be read as YAML"),
        ("_toc.yml", "root: book/index\n\tx: 1", "_toc.yml, line 2: this cannot"),
        ("_toc.yml", "", "_toc.yml, line 1: a table of contents is"),
        ("_toc.yml", "- book/index", "_toc.yml, line 1: a table of contents is"),
        ("_toc.yml", "format: x", "_toc.yml, line 1: a table of contents is"),
        ("_toc.yml", "root: 3", "_toc.yml, line 1: root is the name of a page"),
        (
            "_toc.yml",
            "root: book/index\nchapters:\n- file: [a]\n",
            "_toc.yml, line 3: file is the name of a page",
        ),
        (
            "_toc.yml",
            "root: book/index\nchapters:\n- file: ../../x\n",
            "_toc.yml, line 3: '../../x' lies outside the book",
        ),
        ("_toc.yml", b"root: caf\xe9", "_toc.yml, line 1: the byte E9 is not UTF-8"),
        ("_config.yml", "title: a\nb: {", "_config.yml, line 2: this cannot be read"),
        ("_config.yml", "- a", "_config.yml, line 1: settings are name: value"),
        ("_config.yml", b"\xff\xfet\x00", "_config.yml, line 1: the byte FF is not"),
        (
            "book/index.md",
            b"# A\n\nEin W\xf6rtchen.\n",
            "book/index.md, line 3: the byte",
        ),
        ("book/a.md", "# A\n".encode("utf-16"), "book/a.md, line 1: the byte"),
        (
            "book/a.md",
            (HEADER + "\n\xe4\n" + SHOUT).encode("latin-1"),
            "book/a.md, line 12: the byte E4 is not UTF-8",
        ),
        ("mmsa_lib/used.py", b"A = '\xe4'\n", "mmsa_lib/used.py, line 1: the byte E4"),
        ("mmsa_lib/used.py", "A = 1\nB = (\n", "mmsa_lib/used.py, line 2: '('"),
        ("mmsa_lib/used.py", "A = '\0'\n", "mmsa_lib/used.py, line 1: source code"),
        *(
            (
                "book/profiles/quick.yml",
                content,
                f"book/profiles/quick.yml, line {said}",
            )
            for content, said in (
                ("all: {a", "1: this cannot be read as YAML"),
                ("all: {}\nplans:\n  a: *x", "3: this cannot be read as YAML"),
                ("- all", "1: a profile is a mapping"),
                ("all: 3", "1, all: parameters are {name: value}"),
                ("\nall: [a]", "2, all: parameters are {name: value}"),
                ("chapters: {}\nall: {3: 4}", "2, all: parameters are {name: value}"),
                ("chapters:\n  a: 3", "2, chapters, a: chapters are {chapter:"),
                ("chapters:\n\n  b: {}", "3, chapters, b: unknown chapter 'b'"),
                ("all: {profile: 3}", "1, all: parameter profile of a is"),
                (
                    "chapters:\n  a:\n    profile: [x]",
                    "2, chapters, a: parameter profile",
                ),
                ("chapters:\n  a:\n    x: 1", "2, chapters, a: unknown parameter of a"),
                ("some: 1", "1, some: unknown key in quick.yml 'some'"),
                (
                    "plans:\n  a:\n    b: {lr: 1e-3}",
                    "3, plans, a, b: YAML reads lr 1e-3",
                ),
                (b"# \xe4\n", "1: the byte E4 is not UTF-8"),
            )
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path, capsys, monkeypatch, name, content, said
):
    text = chapter("A", "from mmsa_lib import used")
    root = make_project(tmp_path, {"a": text})
    data = content if isinstance(content, bytes) else content.encode()
    (root / name).write_bytes(data)
    monkeypatch.chdir(root)
    code, printed = mmsa_book(capsys, "status")
    assert code in (1, 2) and "Traceback" not in printed
    assert printed.startswith(f"error: {said}"), printed


def test_a_broken_band_is_named_when_the_book_is_built(tmp_path):
    root = make_project(tmp_path, {"a": chapter("A", "1")})
    quick = root / "book/profiles/quick.yml"
    for text, said in {
        "bands: [a]": "line 1, bands: bands are {chapter:",
        "bands:\n  a:\n    b: 3": "line 3, bands, a, b: bands are",
        "bands:\n  b: {}": "line 2, bands, b: unknown chapter 'b'",
        "bands:\n  a:\n    b:\n      c: [1, x]": "line 4, bands, a, b, c: a band is",
        "bands:\n  a:\n    b:\n      c: [.nan, 1]": "line 4, bands, a, b, c: a band is",
        "bands:\n  a:\n    b: {c: [true, false]}": "line 3, bands, a, b, c: a band is",
    }.items():
        quick.write_text(text)
        with pytest.raises((BookError, UnknownNameError)) as error:
            open_book(root).bands("quick")
        assert str(error.value).startswith(f"book/profiles/quick.yml, {said}")


def test_numbers_of_a_profile_are_decimal(tmp_path):
    text = chapter("A", parameters="profile = ''\nepochs = 1\ndata_dir = None\nf = 0.5")
    root = make_project(tmp_path, {"a": text})
    quick = root / "book/profiles/quick.yml"
    quick.write_text("all: {epochs: 010, data_dir: 2026-01-02, f: 1, profile: no}\n")
    assert open_book(root).profile("quick")["a"] == {
        **{"epochs": 10, "data_dir": "2026-01-02", "f": 1, "profile": "no"},
    }
    for wrong in ("epochs: yes", "epochs: 1:30", "epochs: 1.0", "f: .inf", "f: x"):
        quick.write_text(f"all: {{{wrong}}}\n")
        with pytest.raises(BookError, match=r"quick\.yml, line 1, all: parameter"):
            open_book(root).profile("quick")


# ---------------------------------------------------------------- values as written

TYPED = """\
data_dir = None
epochs = None
device = None
steps = 2
rate = 0.1
flag = False
note = "x"
home_dir = ""
names = ["a"]
seeds = [0, 1]
table = {"a": 1}
brats: "Path | None" = None
backbone: "str | Path" = "tiny"
pair: tuple[int, float] = (1, 2.0)
maybe: Optional[float] = None
nothing = None
"""


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """Reads ``-p NAME VALUE`` in a folder that has a folder ``there``."""
    (tmp_path / "a.md").write_text(chapter("A", parameters=TYPED))
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    a = read_chapter(tmp_path / "a.md")
    return lambda name, text: cli._parameters(a, [f"{name}={text}"])[name]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        *(("data_dir", t, f"/{t}") for t in ("no", "2024-01-01", "010", "1e3", "null")),
        *(
            ("data_dir", t, f"/{t}")
            for t in ("[a]", "a b", "true", "1:30", "{x", "a=b")
        ),
        ("data_dir", "/abs", "/abs"),
        ("data_dir", "", None),
        ("brats", "./folder", "/folder"),
        ("brats", "3", "/3"),
        ("home_dir", "no", "/no"),
        ("backbone", "tiny", "tiny"),
        ("backbone", "./folder", "/folder"),
        ("backbone", "there", "/there"),
        ("backbone", "Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-7B"),
        ("backbone", "no", "no"),
        ("note", "010", "010"),
        ("note", "yes", "yes"),
        ("note", "2024-01-01", "2024-01-01"),
        ("note", "", ""),
        ("note", "null", "null"),
        ("device", "null", None),
        ("epochs", "null", None),
        ("epochs", "010", 10),
        ("steps", "010", 10),
        ("steps", "-3", -3),
        ("rate", "010", 10.0),
        ("rate", "1e-3", 0.001),
        ("rate", ".5", 0.5),
        ("maybe", "none", None),
        ("maybe", "3", 3.0),
        ("flag", "yes", True),
        ("flag", "False", False),
        ("names", "[no, 010, 2024-01-01]", ["no", "010", "2024-01-01"]),
        ("seeds", "[010, 3]", [10, 3]),
        ("pair", "[1, 2.5]", [1, 2.5]),
        (
            "table",
            "{a: 010, b: [x, 1.5], c: null}",
            {"a": 10, "b": ["x", 1.5], "c": None},
        ),
    ],
)
def test_a_value_is_what_was_written(typed, tmp_path, name, text, value):
    inside = isinstance(value, str) and value.startswith("/") and value != "/abs"
    expected = f"{tmp_path}{value}" if inside else value
    found = typed(name, text)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        *(("epochs", t, "takes a whole number") for t in ("yes", "1:30", "1.5", "1e3")),
        *(
            ("steps", t, "takes a whole number")
            for t in ("no", "0x10", "1_000", "null")
        ),
        *(("steps", t, "takes a whole number") for t in ("2024-01-01", "", " 3", "٣")),
        *(
            ("rate", t, "takes a number")
            for t in ("nan", ".inf", "1e999", "1:30", "no")
        ),
        *(("flag", t, "takes a truth value") for t in ("1", "maybe", "")),
        *(("names", t, "takes a list") for t in ("a", "0,1", "{a: 1}")),
        ("names", "[a, [b]]", "takes a list of texts"),
        ("names", "[a", "is written '[0, 1, 2]'"),
        ("table", "[1]", "takes a mapping"),
        ("pair", "[1, x]", "takes a list of whole numbers or numbers"),
        ("seeds", "[a]", "takes a list of whole numbers"),
        ("seeds", "[1.5]", "takes a list of whole numbers"),
        ("seeds", "[true]", "takes a list of whole numbers"),
        ("seeds", "3", "takes a list of whole numbers"),
        ("seeds", "[]", "there is no seed"),
        ("seeds", "[0, 0]", "the seed 0 is there twice"),
        ("seeds", "[1, 01]", "the seed 1 is there twice"),
        ("seeds", "[-1]", "a seed is from 0 to 4294967295; found -1"),
        ("seeds", "[4294967296]", "a seed is from 0 to 4294967295"),
        ("nothing", "3", "declares no type"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(typed, name, text, words):
    with pytest.raises(BookError, match=f"{name}.*{re.escape(words)}"):
        typed(name, text)


def test_a_parameter_is_given_once(typed, tmp_path):
    a = read_chapter(tmp_path / "a.md")
    with pytest.raises(BookError, match="-p steps: a parameter is given once"):
        cli._parameters(a, ["steps=1", "steps=2"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found ''"),
        (",", "found ''"),
        ("0,,1", "found ''"),
        ("a", "found 'a'"),
        ("1.0", "found '1.0'"),
        ("0,0", "the seed 0 is there twice"),
        ("0,00", "the seed 0 is there twice"),
        ("-1", "a seed is from 0 to"),
        ("4294967296", "a seed is from 0 to"),
    ],
)
def test_wrong_seeds_are_refused_by_name(text, words):
    with pytest.raises(BookError, match=re.escape(words)) as error:
        seeds_of(text)
    assert str(error.value).startswith(f"--seeds {text}")
    assert seeds_of("0, 010,4294967295") == [0, 10, 4294967295]


def test_every_parameter_of_the_book_declares_its_type():
    for chapter in open_book(ROOT).chapters.values():
        assert not [name for name, kind in chapter.kinds.items() if kind is None]


# ---------------------------------------------------------------- closure


def nodes(code: str) -> list:
    return every_node(parse(code))


@pytest.fixture
def library(tmp_path) -> Path:
    files = {
        "__init__.py": "",
        "errors.py": "",
        "runs.py": "from mmsa_lib.errors import E\n",
        "training.py": "def f():\n    from . import runs\n",
        "nets/__init__.py": "from .encoder import Encoder\n",
        "nets/encoder.py": "from ..errors import E\nimport numpy\n",
        "nets/fusion.py": "import mmsa_lib.nets.encoder as e\n",
        "nets/parts/__init__.py": "from .gate import Gate\n",
        "nets/parts/gate.py": "from mmsa_lib.errors import E\n",
        "nets/parts/spare.py": "",
        "corpora/__init__.py": "from importlib import import_module\n"
        "def load(name):\n    return import_module(f'mmsa_lib.corpora.{name}')\n",
        "corpora/puppets/__init__.py": "from .oracle import Oracle\n",
        "corpora/puppets/oracle.py": "from .world import LATTICE\n",
        "corpora/puppets/world.py": "",
        "corpora/puppets/table.txt": "a table",
        "corpora/mosi.py": "from mmsa_lib import errors\n",
        "corpora/words/list.txt": "good bad",
        "lazy.py": "import importlib\nm = importlib.import_module('mmsa_lib.runs')\n",
        "loop.py": "import mmsa_lib.pool\n",
        "pool.py": "import mmsa_lib.loop\n",
    }
    for name, text in files.items():
        path = tmp_path / "mmsa_lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("import numpy", ""),
        ("import mmsa_lib", "__init__"),
        ("import mmsa_lib as m", "__init__"),
        ("import_module('mmsa_lib')", "__init__"),
        ("import mmsa_lib.errors as e", "__init__ errors"),
        ("from mmsa_lib import runs, errors", "__init__ errors runs"),
        ("from mmsa_lib.runs import load", "__init__ errors runs"),
        ("def f():\n    import mmsa_lib.runs", "__init__ errors runs"),
        ("import mmsa_lib.training as t", "__init__ errors runs training"),
        ("from mmsa_lib.nets.fusion import Late", "nets/fusion NETS"),
        ("from mmsa_lib import nets", "NETS"),
        ("from mmsa_lib.nets.parts import Gate", "PARTS NETS"),
        ("from mmsa_lib.nets.parts import spare", "PARTS nets/parts/spare NETS"),
        ("import mmsa_lib.loop", "__init__ loop pool"),
        ("import mmsa_lib.lazy as e", "__init__ errors lazy runs"),
        ("__import__('mmsa_lib.errors')", "__init__ errors"),
        ("call(['python', '-m', 'mmsa_lib.errors'])", "__init__ errors"),
        ("%matplotlib inline\nimport mmsa_lib.errors as e", "__init__ errors"),
        ("files = !ls\nfrom mmsa_lib.runs import (\n load)", "__init__ errors runs"),
    ],
)
def test_closure(library, code, files):
    nets = ["__init__", "errors", "nets/__init__", "nets/encoder"]
    several = {"NETS": nets, "PARTS": ["nets/parts/__init__", "nets/parts/gate"]}
    want = {w for f in files.split() for w in several.get(f, [f])}
    found = reach(library, nodes(code))
    assert set(found) == {f"mmsa_lib/{name}.py" for name in want}


def test_closure_is_wide_where_a_name_is_known_at_run_time(library):
    found = set(reach(library, nodes("from mmsa_lib.corpora import load")))
    names = {"__init__", "corpora/__init__", "corpora/mosi"}
    names |= {f"corpora/puppets/{m}" for m in ("__init__", "oracle", "world")}
    files = {f"mmsa_lib/{name}.py" for name in names | {"errors"}}
    data = {"words/list.txt", "puppets/table.txt"}
    assert found == files | {f"mmsa_lib/corpora/{name}" for name in data}
    star = set(reach(library, nodes("from mmsa_lib.nets import *")))
    assert "mmsa_lib/nets/fusion.py" in star
    for code in (
        "import_module(name)",
        "list(map(importlib.import_module, names))",
        "from importlib import import_module as load",
    ):
        everything = set(reach(library, nodes(code)))
        assert everything >= {"mmsa_lib/pool.py", "mmsa_lib/nets/fusion.py"}


def test_closure_sees_content_not_time(library):
    code = nodes("from mmsa_lib import runs")
    before = reach(library, code)
    runs = library / "mmsa_lib/runs.py"
    os.utime(runs)
    assert reach(library, code) == before
    runs.write_text("import mmsa_lib.lazy\n")
    after = reach(library, code)
    assert after["mmsa_lib/runs.py"] != before["mmsa_lib/runs.py"]
    assert "mmsa_lib/lazy.py" in after
    runs.write_text("def broken(:\n")
    with pytest.raises(BookError, match=r"mmsa_lib/runs\.py, line 1"):
        reach(library, code)


# ---------------------------------------------------------------- building


GOOD = chapter("Good") + cell(
    "from mmsa_lib.used import VALUE\nprint('value', VALUE, 'profile', profile)",
    ":tags: [illustration]\n",
)
GOOD += cell(
    "import os, sys, json, pathlib\n"
    "names = ['CHAPTER', 'CHAPTER_SHA', 'CLOSURE_SHA', 'PROFILE', 'RECORDS', 'DATA']\n"
    "names += ['STRICT']\n"
    "env = {n: os.environ['MMSA_' + n] for n in names} | {\n"
    "    'chapter': os.environ['MMSA_CHAPTER'], 'python': sys.executable,\n"
    "    'cwd': os.getcwd(), 'threads': os.environ['OMP_NUM_THREADS']}\n"
    "folder = pathlib.Path(os.environ['MMSA_RECORDS'], 'good')\n"
    "folder.mkdir(parents=True, exist_ok=True)\n"
    "_ = (folder / 'env-0123456789ab.json').write_text(json.dumps(env, indent=1))",
)
BAD = chapter("Bad", "a = 1", "# the culprit\na / 0", "print('never')")
DEAD = chapter("Dead", "import os\nos._exit(3)")


def outputs(root: Path, name: str) -> str:
    path = root / "_build/executed/quick" / f"{name}.ipynb"
    cells = json.loads(path.read_text())["cells"]
    return "".join(
        "".join(o.get("text", ""))
        for c in cells
        if c["cell_type"] == "code"
        for o in c["outputs"]
    )


def test_the_life_of_a_book(tmp_path, capsys, monkeypatch):
    """One book from its first build on; each kernel costs seconds, so one story."""
    root = make_project(tmp_path, {"good": GOOD, "bad": BAD, "dead": DEAD})
    other = tmp_path / "elsewhere/kernels/python3"  # a foreign kernel must not be used
    other.mkdir(parents=True)
    spec = {"argv": ["false"], "display_name": "x", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("MMSA_DATA", raising=False)
    monkeypatch.chdir(root)
    index = root / "_build/html/index.html"

    # two of three chapters fail: both are named, the third is done, nothing rendered
    code, printed = mmsa_book(capsys, "build")
    assert code == 1
    line = (root / "book/bad.md").read_text().splitlines().index("# the culprit")
    place = f"book/bad.md, code cell 3 of 4 (line {line})"
    assert f"{place}: ZeroDivisionError: division by zero" in printed
    assert "book/dead.md, code cell 2 of 2" in printed
    assert "2 of 3 chapters failed: bad, dead" in printed
    assert "never" not in printed
    assert not index.exists()
    assert outputs(root, "good") == "value 17 profile quick\n"
    assert not (root / "_build/executed/quick/bad.ipynb").exists()
    assert "ZeroDivisionError" in (root / "_build/failed/bad.ipynb").read_text()

    env = json.loads((root / "_build/records/good/env-0123456789ab.json").read_text())
    (good,) = (s for s in states(open_book(root), "quick") if s.chapter.name == "good")
    assert good.fresh
    assert good.noted["records"] == ["env-0123456789ab"]
    assert env["CHAPTER"] == "good"
    assert env["PROFILE"] == "quick"
    assert env["STRICT"] == "1"
    assert env["CHAPTER_SHA"] == good.chapter.sha256
    assert len(env["CLOSURE_SHA"]) == 64
    assert env["DATA"] == str(root / "data")
    assert env["cwd"] == str(root / "book")
    assert Path(env["python"]).samefile(sys.executable)

    # mended, the same command executes only these, and renders
    (root / "book/bad.md").write_text(chapter("Bad", "print('one')"))
    (root / "book/dead.md").unlink()
    toc = (root / "_toc.yml").read_text().replace("  - file: book/dead\n", "")
    (root / "_toc.yml").write_text(toc)
    code, printed = mmsa_book(capsys, "build")
    assert code == 0, printed
    assert "2 chapters: 1 fresh, 1 to execute" in printed
    assert "bad: done" in printed
    assert "good: 0 numbers equal their records" in printed
    assert "good: started" not in printed
    page = (root / "_build/html/book/good.html").read_text()
    assert "value 17 profile quick" in page
    assert index.is_file()
    executed = (root / "_build/executed/quick/good.ipynb").read_text()
    injected = [
        c["metadata"]["tags"]
        for c in json.loads(executed)["cells"]
        if "injected-parameters" in c["metadata"].get("tags", [])
    ]
    assert injected == [["injected-parameters", "hide-input"]]  # unlike the page's
    assert str(tmp_path) not in executed  # no machine path on a page

    # unchanged, it does nothing at all
    before = {p: p.stat().st_mtime_ns for p in (root / "_build/html").rglob("*")}
    code, printed = mmsa_book(capsys, "build")
    assert code == 0
    assert "2 fresh, 0 to execute" in printed
    assert "nothing changed" in printed
    assert before == {
        p: p.stat().st_mtime_ns for p in (root / "_build/html").rglob("*")
    }

    # a module that no chapter reaches executes nothing (only the library reference may
    # have to be rendered again); one that is reached, its chapter
    (root / "mmsa_lib/unused.py").write_text("VALUE = 0\n")
    code, printed = mmsa_book(capsys, "build")
    assert code == 0 and "2 fresh, 0 to execute" in printed
    (root / "mmsa_lib/used.py").write_text("VALUE = 99\n")
    code, printed = mmsa_book(capsys, "status", "--json")
    rows = {row["chapter"]: row for row in json.loads(printed)}
    assert rows["bad"]["state"] == "fresh"
    assert rows["good"]["state"] == "stale"
    assert rows["good"]["reasons"] == ["mmsa_lib/used.py edited"]
    code, printed = mmsa_book(capsys, "status")
    assert "mmsa_lib/used.py edited" in printed

    # it is executed again; a page that cannot be rendered leaves the last good book
    (root / "book/index.md").write_text("# Tiny\n\n[gone](gone.md)\n")
    code, printed = mmsa_book(capsys, "build")
    assert code == 1
    assert "good: done" in printed
    assert "bad: started" not in printed
    assert (
        "book/index.md:3: WARNING: 'myst' cross-reference target not found" in printed
    )
    assert outputs(root, "good") == "value 99 profile quick\n"
    assert "value 17" in (root / "_build/html/book/good.html").read_text()

    # an executed notebook that was tampered with is not taken for fresh
    notebook = root / "_build/executed/quick/good.ipynb"
    notebook.write_text(notebook.read_text().replace("99", "98"))
    (good, bad) = states(open_book(root), "quick")
    assert good.reasons == ("executed notebook missing or altered",)
    assert bad.fresh

    code, printed = mmsa_book(capsys, "clean")
    assert code == 0
    left = {p.name for p in (root / "_build").iterdir()}
    assert left == {"records"}
    assert states(open_book(root), "quick")[0].reasons == ("never executed",)


def test_run_takes_parameters_of_its_own(tmp_path, capsys, monkeypatch):
    source = 'profile = "none"\nepochs = 1\ndata_dir = ""\nseeds = [0]'
    shown = "print(profile, epochs, data_dir, seeds, os.environ.get('MMSA_STRICT'))"
    text = chapter("One", f"import os\n{shown}", parameters=source)
    root = make_project(tmp_path, {"one": text})
    monkeypatch.chdir(root)
    for words, message in {
        ("run", "two"): "unknown chapter 'two'. Known: one.",
        ("run", "one", "-p", "epoch", "3"): "Did you mean 'epochs'?",
        ("run", "one", "--profile", "slow"): "unknown profile 'slow'",
    }.items():
        code, printed = mmsa_book(capsys, *words)
        assert code == 2
        assert message in printed
    code, printed = mmsa_book(capsys, "run", "one", "-p", "epochs", "many")
    assert code == 1
    assert "parameter epochs of one is 1 by default" in printed
    assert not (root / "_build/runs").exists()

    code, printed = mmsa_book(
        capsys,
        *("run", "one", "-p", "epochs", "5", "-p", "data_dir", "data", "--out", "mine"),
        *("-p", "seeds", "[3, 4]"),
    )
    assert code == 0, printed
    notebook = (root / "mine/one.ipynb").read_text()
    # what a page claims is claimed of a build's runs, not of this one
    assert f"quick 5 {root / 'data'} [3, 4] None" in notebook
    assert states(open_book(root), "quick")[0].reasons == ("never executed",)


def test_a_readers_own_settings_reach_no_chapter(tmp_path, capsys, monkeypatch):
    """matplotlibrc in every place where matplotlib looks, and what Python executes."""
    look = (
        "import matplotlib as mpl\nfrom pathlib import Path\n"
        "usual = dict(mpl.rcParamsDefault)\nusual.pop('backend')\n"
        "print(all(mpl.rcParams[k] == v for k, v in usual.items()), mpl.get_backend())"
    )
    root = make_project(tmp_path / "book", {"a": chapter("A", look)})
    taste = "text.usetex: True\nfont.size: 23\nbackend: svg\n"
    home = tmp_path / "home"
    for place in (".config/matplotlib", ".matplotlib", "named"):
        write_atomic(home / place / "matplotlibrc", taste)
    write_atomic(home / "start.py", "raise SystemExit('the own start')\n")
    for name, value in {
        "HOME": home,
        "XDG_CONFIG_HOME": home / ".config",
        "MATPLOTLIBRC": home / "named",
        "MPLBACKEND": "no-such-backend",
        "PYTHONSTARTUP": home / "start.py",
        "PYTHONWARNINGS": "error",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(root)
    code, printed = mmsa_book(capsys, "run", "a", "--out", "out")
    assert code == 0, printed
    shown = json.loads((root / "out/a.ipynb").read_text())["cells"][-1]["outputs"]
    (text,) = ("".join(output["text"]) for output in shown)
    assert text.startswith("True ") and "inline" in text

    # one beside the chapters is read by matplotlib, and is part of their keys
    (before,) = states(open_book(root), "quick")
    (root / "book/matplotlibrc").write_text(taste)
    (after,) = states(open_book(root), "quick")
    assert after.key["files"].keys() - before.key["files"] == {"book/matplotlibrc"}


def test_no_orphan_computes_on_after_a_kill(tmp_path):
    """A killed build leaves no kernel behind and no half-written notebook."""
    sleeper = chapter(
        "Sleeper",
        "import os, pathlib, time\n"
        "_ = pathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(120)",
    )
    root = make_project(tmp_path, {"sleeper": sleeper})
    process, pid_file = start(root, "build"), root / "book/pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text(), process)
    kernel = int(pid_file.read_text())
    assert kernel in {p.pid for p in family(root)}
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: not family(root))
    assert not list((root / "_build").rglob("executed/**/*"))


SLEEPER = chapter(
    "Sleeper",
    "import os, pathlib, subprocess, time\n"
    "subprocess.Popen(['sleep', '1000'])\n"
    "_ = pathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(1000)",
)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("build", "--jobs", "1"),
            "stopped: 1 of 3 chapters are done and kept (good); call the same command "
            "to execute sleeper, other",
        ),
        (
            ("run", "sleeper"),
            "stopped: nothing was executed to its end; call the same command to "
            "execute sleeper",
        ),
    ],
)
def test_ctrl_c_says_what_was_kept_and_leaves_no_kernel(tmp_path, words, said):
    texts = {"good": GOOD, "sleeper": SLEEPER, "other": GOOD}
    root = make_project(tmp_path, texts)
    process, pid_file = start(root, *words), root / "book/pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text(), process)
    assert int(pid_file.read_text()) in {p.pid for p in family(root)}
    process.send_signal(signal.SIGINT)
    code, printed = finish(process)
    assert code == 130
    assert said in printed
    assert "Traceback" not in printed and "Aborted" not in printed
    # all were killed before it ended; the system may still be taking them away
    wait_until(lambda: not family(root))
    fresh = {s.chapter.name for s in states(open_book(root), "quick") if s.fresh}
    assert fresh == ({"good"} if words[0] == "build" else set())


@pytest.mark.parametrize(
    ("limits", "source", "said"),
    [
        (
            "{cell_seconds: 2}",
            "import time\nwhile True:\n    time.sleep(1)",
            "still at work after 2 s, the limit cell_seconds",
        ),
        (
            "{cell_seconds: 2}",  # what does not listen to Ctrl-C
            "while True:\n    try:\n        while True:\n            pass\n"
            "    except BaseException:\n        pass",
            "still at work after 2 s, the limit cell_seconds",
        ),
        (
            "{output_mib: 0.1}",
            "while True:\n    print('again and again')",
            "showed more than 0.1 MiB, the limit output_mib",
        ),
        (
            "{}",
            "for i in range(1_000_000):\n    print(i)",
            "showed more than 4 MiB, the limit output_mib",
        ),
        (
            "{}",
            "from IPython.display import HTML\nHTML('a' * 5_000_000)",
            "showed more than 4 MiB, the limit output_mib",
        ),
        (
            "{}",
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            "the kernel was killed (SIGKILL), as the system does when memory runs out",
        ),
        (
            "{}",
            "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
            "the kernel crashed (SIGSEGV)",
        ),
        ("{}", "raise ValueError('x' * 5_000_000)", "ValueError: xxxx"),
    ],
)
def test_a_cell_without_an_end_is_ended_and_named(
    tmp_path, capsys, monkeypatch, limits, source, said
):
    root = make_project(tmp_path, {"a": chapter("A", source)})
    with (root / "book/profiles/quick.yml").open("a") as file:
        file.write(f"limits: {limits}\n")
    monkeypatch.chdir(root)
    code, printed = mmsa_book(capsys, "run", "a")
    assert code == 1
    assert said in printed and printed.count("book/a.md, code cell") == 1
    assert len(printed) < 50_000
    wait_until(lambda: len(family(root)) <= 1)  # this test is one


def test_wrong_limits_are_refused(tmp_path):
    root = make_project(tmp_path, {"a": chapter("A", "1")})
    quick = root / "book/profiles/quick.yml"
    assert open_book(root).limits("quick") == LIMITS == open_book(root).limits("mine")
    for text, said in {
        "{seconds: 3}": "unknown limit 'seconds'",
        "{cell_seconds: 0}": "cell_seconds takes a positive number",
        "{output_mib: yes}": "output_mib takes a positive number",
        "{output_mib: .inf}": "output_mib takes a positive number",
        "[3]": "limits are {cell_seconds, output_mib}",
    }.items():
        quick.write_text(f"limits: {text}\n")
        with pytest.raises((BookError, UnknownNameError)) as error:
            open_book(root).profile("quick")
        where = "book/profiles/quick.yml, line 1, limits"
        assert str(error.value).startswith(where) and said in str(error.value)


def test_two_builds_at_once_wait_for_each_other(tmp_path):
    from filelock import FileLock

    root = make_project(tmp_path, {})
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    # the end of the build comes fast
    (root / "_config.yml").write_text("title: Tiny\nsphinx: nothing\n")
    (root / "_build").mkdir()
    lock = FileLock(root / "_build/.lock")
    with lock:
        process = start(root, "build")
        assert "another build of this book is running" in process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    assert process.wait() != 0


def test_records_and_files_a_chapter_shows_are_part_of_its_key(tmp_path):
    """Its own records and those it plainly asks for; all where that is not plain."""
    asks = {
        "own": "1",
        "none": "1",
        "named": "runs.find('late-fusion', corpus)",
        "keyword": "find(name='late-fusion')",
        "made": "runs.committed('own', 'mosi')",
        "table": "(ROOT / 'book' / 'tables' / f'{corpus}.yml')",
        "all": "runs.load_all(folder)",
        "folder": "(ROOT / 'results').glob('*.json')",
        "computed": "[runs.find(n) for n in names]",
        "aliased": "f = runs.find\nf('mult')",
        "renamed": "from mmsa_lib.runs import committed as c\nc('other')",
        "sly": "getattr(runs, 'find')('mult')",
    }
    root = make_project(tmp_path, {k: chapter(k, v) for k, v in asks.items()})
    record, other, longer = (
        f"results/{name}-0123456789ab.json"
        for name in ("own/late-fusion", "other/mult", "other/late-fusion-against-mult")
    )
    for path in (record, other, longer):
        write_atomic(root / path, "{}")
    write_atomic(root / "book/tables/mosi.yml", "a: 1")
    found = {s.chapter.name: s.key["files"] for s in states(open_book(root), "quick")}
    one, every = [record], [longer, other, record]
    assert {name: list(files) for name, files in found.items()} == {
        **{"own": one, "none": [], "named": one, "keyword": one, "made": one},
        **{"table": ["book/tables/mosi.yml"], "all": every, "folder": every},
        **{"computed": every, "aliased": every, "renamed": every, "sly": every},
    }


def test_writes_are_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch):
    root = make_project(tmp_path, {"a": chapter("A", "1")})
    (root / "_build").write_text("a file in the way")
    monkeypatch.chdir(root)
    code, printed = mmsa_book(capsys, "build")
    assert code == 1
    assert "choose a folder that you may write to" in printed
    assert "Traceback" not in printed


def test_records_are_listed_and_shown(tmp_path, capsys, monkeypatch):
    from mmsa_lib.runs import RunRecord, save, seal

    root = make_project(tmp_path, {})
    monkeypatch.chdir(root)
    code, printed = mmsa_book(capsys, "records", "list")
    assert "no records yet" in printed
    record = seal(
        RunRecord(
            name="late-fusion",
            kind="training",
            created="2026-01-02T03:04:05+00:00",
            chapter="baselines",
            seeds=[0, 1],
            corpus={"name": "puppets", "synthetic": True},
            per_seed=[{"seed": 0, "predictions": [0.5, 1.5]}],
        )
    )
    save(record, root / "results")
    code, printed = mmsa_book(capsys, "records", "list", "--json")
    (row,) = json.loads(printed)
    assert (row["id"], row["seeds"], row["folder"]) == (record.id[:12], 2, "results")
    code, printed = mmsa_book(capsys, "records", "list")
    assert "puppets (synthetic)" in printed
    for which in ("late-fusion", record.id[:6]):
        code, printed = mmsa_book(capsys, "records", "show", which)
        shown = json.loads(printed)
        assert shown["id"] == record.id
        assert shown["per_seed"][0]["predictions"] == "(2 values)"
    code, printed = mmsa_book(capsys, "records", "show", "early")
    assert code == 2
    assert "Known: late-fusion" in printed


def test_status_of_this_book_never_loads_torch():
    program = textwrap.dedent("""
        import sys
        from mmsa_lib.cli import main
        try:
            main(["status", "--json"])
        except SystemExit as stop:
            assert not stop.code, stop.code
        heavy = {"torch", "numpy", "papermill", "jupytext"} & set(sys.modules)
        assert not heavy, heavy
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = [row["chapter"] for row in json.loads(done.stdout)]
    assert names == list(open_book(ROOT).chapters)


# ---------------------------------------------------------------- mutation

# What a chapter reaches, found another way than by `press.closure`: its imports are
# executed, and what the loaded modules would import later, inside functions, is read
# from their byte code.
REACHED = """
import dis, importlib.util, json, os, pkgutil, sys
import numpy, scipy.stats, sklearn.linear_model, torch, matplotlib.figure  # shared

def code_of(name):
    spec = importlib.util.find_spec(name)
    return spec.loader.get_code(name) if spec and spec.origin else None

def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False

def imports(code, package):
    ops = list(dis.get_instructions(code))
    if "import_module" in code.co_names and code.co_name != "<module>":
        yield from (m.name for m in pkgutil.iter_modules(
            sys.modules[package].__path__, package + "."))
    for i, op in enumerate(ops):
        if op.opname == "IMPORT_NAME":
            level, names = ops[i - 2].argval, ops[i - 1].argval
            base = importlib.util.resolve_name("." * level + op.argval, package)
            if base.split(".")[0] == "mmsa_lib":
                yield base
                yield from (f"{base}.{n}" for n in names or ()
                            if is_module(f"{base}.{n}"))
    for const in code.co_consts:
        if hasattr(const, "co_code"):
            yield from imports(const, package)

def reached(source):
    exec(compile(source, "chapter", "exec"), {})
    loaded = {n for n in sys.modules if n.split(".")[0] == "mmsa_lib"}
    found, pending = set(), sorted(loaded)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        parent = name.rpartition(".")[0]
        pending += [parent] if parent else []
        spec = importlib.util.find_spec(name)
        package = name if spec.submodule_search_locations else parent
        pending += imports(code_of(name), package)
    return sorted(os.path.relpath(importlib.util.find_spec(n).origin) for n in found)

for source in json.load(sys.stdin):
    if os.fork():
        os.wait()
    else:
        print(json.dumps(reached(source)), flush=True)
        os._exit(0)
"""


def test_editing_a_module_makes_exactly_the_chapters_stale_that_reach_it(tmp_path):
    """Every module of the library in turn, on a copy of the book's sources."""
    import jupytext

    for name in ("mmsa_lib", "book", "results"):
        skip = shutil.ignore_patterns("__pycache__", "_static")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    for name in ("_toc.yml", "_config.yml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    book = open_book(tmp_path)
    names, sources = list(book.chapters), []
    for chapter in book.chapters.values():
        cells = jupytext.reads(chapter.text, fmt="md:myst").cells
        trees = [ast.parse(c.source) for c in cells if c.cell_type == "code"]
        found = [n for tree in trees for n in ast.walk(tree)]
        kinds = (ast.Import, ast.ImportFrom)
        sources.append("\n".join(ast.unparse(n) for n in found if isinstance(n, kinds)))
    done = subprocess.run(
        [sys.executable, "-P", "-c", REACHED],
        input=json.dumps(sources),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    truth = dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))
    assert all("mmsa_lib/runs/record.py" in modules for modules in truth.values())

    for state in states(book, "quick"):
        state.product.write("executed", {"key": state.key, "seconds": 1.0})
    assert all(s.fresh for s in states(book, "quick"))
    modules = sorted(
        path for path in (tmp_path / "mmsa_lib").rglob("*.py") if path.is_file()
    )
    unreached = []
    for path in modules:
        module, before = path.relative_to(tmp_path).as_posix(), path.read_text()
        path.write_text(before + "\n_touched = 1\n")
        stale = {s.chapter.name: s.reasons for s in states(book, "quick")}
        path.write_text(before)
        expected = {n: (f"{module} edited",) for n in names if module in truth[n]}
        assert {n: r for n, r in stale.items() if r} == expected, module
        unreached += [module] * (not expected)
    assert {"mmsa_lib/cli.py", "mmsa_lib/press/cli.py"} <= set(unreached)
    assert len(unreached) < len(modules)


def test_injected_parameters_are_shown_only_where_they_say_more():
    import nbformat

    from mmsa_lib.press.execute import _tidy

    def tags_of(injected):
        cells = [
            nbformat.v4.new_code_cell('seeds = [0, 1]\nprofile = "quick"  # or full'),
            nbformat.v4.new_code_cell(injected),
        ]
        for cell, tag in zip(cells, ("parameters", "injected-parameters"), strict=True):
            cell.metadata["tags"] = [tag]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {"name": "x"}
        _tidy(notebook)
        return notebook.cells[1].metadata["tags"][1:]

    assert tags_of("# Parameters\nprofile = 'quick'\n") == ["remove-cell"]
    assert tags_of("seeds = [0, 1, 2]\nprofile = 'quick'") == ["hide-input"]
    assert tags_of("epochs = 3") == ["hide-input"]
