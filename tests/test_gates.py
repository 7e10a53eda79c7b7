"""Gates: what must turn a build red does, and the message names the place."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT
from test_press import add_library, cell, chapter, make_project, mmsa_book

from mmsa_lib import runs
from mmsa_lib.errors import BookError, UnknownNameError
from mmsa_lib.press import cards
from mmsa_lib.press.chapters import open_book
from mmsa_lib.press.freshness import closure_hash, moved_on, states
from mmsa_lib.press.gates import check_chapter
from mmsa_lib.press.pages import check_pages
from mmsa_lib.press.prose import EXTENSIONS, check_prose
from mmsa_lib.press.shelf import Shelf

RECORD = runs.seal(
    runs.RunRecord(
        name="late-fusion",
        kind="training",
        created="2026-01-02T03:04:05+00:00",
        chapter="a",
        seeds=[0, 1],
        corpus={"name": "puppets", "synthetic": True, "sha256": "x", "sizes": {"n": 9}},
        code={"commit": "c" * 40, "dirty": False},
        environment={"cpu": "A processor"},
        resources={"peak_ram_mib": 500, "wall_seconds": 3.0},
        per_seed=[
            {"test": {"mae": 0.8, "corr": None, "acc2_non0": 81.0}},
            {"test": {"mae": 0.9, "corr": 0.5, "acc2_non0": 83.0}},
        ],
    )
)
COMPARED = runs.seal(
    runs.RunRecord(
        name="late-against-early",
        kind="comparison",
        created="2026-01-02T03:04:05+00:00",
        chapter="a",
        rows=[
            {"a": "late", "b": "early", "metric": "mae", "difference": -0.1, "n": 3}
            | {"low": -0.2, "high": -0.05, "p": 0.01, "unit": "seeds"}
            | {"confidence": 0.95, "detectable": None, "family": 1, "verdict": "old"}
        ],
    )
)
SOURCE = "book/a.md"


def shown(content: str, kind: str = "text/html") -> dict:
    return {"output_type": "display_data", "data": {kind: content}, "metadata": {}}


def printed(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


@pytest.fixture
def gate(tmp_path):
    """Problems and findings of a chapter of one cell (and its parameters)."""
    runs.save(RECORD, tmp_path / "results")
    runs.save(COMPARED, tmp_path / "results")

    def check(
        *outputs,
        source="show()",
        options="",
        prose="",
        bands=None,
        made=(),
        executed=2,
        extra=(),
    ):
        text = chapter("A") + cell(source, options) + prose
        root = make_project(tmp_path, {"a": text})
        book = open_book(root)
        code = [
            {"cell_type": "code", "metadata": {}, "execution_count": n, "outputs": o}
            for n, o in [(1, []), (executed, list(outputs))]
        ]
        injected = code[0] | {"metadata": {"tags": ["injected-parameters"]}}
        text = {"cell_type": "markdown"}
        notebook = {"cells": [text, code[0], injected, code[1], *extra]}
        shelf = Shelf((root / "results",))
        return check_chapter(book, book["a"], notebook, shelf, bands, made)

    return check


def only(found) -> str:
    (problem,) = found.problems
    return problem


NUMBER = runs.number(RECORD, "test.mae")
CELL = rf"^{re.escape(SOURCE)}, code cell 2 of 2 \(line \d+\): "

# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = 1\nresults_table(made)", r"ends in the expression results_table\(made\)"),
        ("figures.show(f, name='x')\na = 1", "it calls show"),
        ("for x in names:\n    print(x)", "it calls print"),
        ("with context:\n    display(1)\nx = 2", "it calls display"),
        ("a = 1", ""),
        ("model.train();", ""),
        ("def f():\n    print(1)", ""),
        ("if synthetic:\n    print(1)", ""),
        ("# nothing", ""),
    ],
)
def test_a_cell_without_the_output_it_should_have(gate, source, expected):
    found = gate(source=source)
    last = f"{SOURCE}: no code cell has an output, so the page would show no result"
    assert found.problems[-1] == last
    if expected:
        assert len(found.problems) == 2
        assert re.search(CELL + rf".*{expected}.*no output", found.problems[0])
    else:
        assert len(found.problems) == 1


def test_a_cell_that_was_not_executed(gate):
    assert re.search(CELL + "was not executed", gate(executed=None).problems[0])
    found = gate(extra=[{"cell_type": "code", "metadata": {}}])
    assert only(found) == f"{SOURCE}: 2 code cells, but 3 were executed"
    assert len(gate(options=":tags: [remove-output]\n").problems) == 1


@pytest.mark.parametrize(
    ("source", "lost"),
    [
        ("runs.say('x')\na = 1", "runs.say in line 1"),
        ("if real:\n    runs.table(r, c)", "runs.table in line 2"),
        ("runs.verdict(v)\nrun()", "runs.verdict in line 1"),
        ("runs.claim(a < b, 'x')\nrun()", "runs.claim in line 1"),
        ("runs.say('x')", ""),
        ("def f():\n    runs.say('x')\n'y'", ""),
        ("display(runs.say('x'))\ntable()", ""),
    ],
)
def test_a_sentence_that_jupyter_drops(gate, source, lost):
    found = gate(shown("<p>words</p>"), source=source)
    if lost:
        assert re.search(CELL + lost, only(found))
    else:
        assert not found.problems


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (printed("  \n"), "empty output"),
        (shown("<ul></ul>"), "empty output"),
        (shown("<table><tbody></tbody></table>x"), "table without rows"),
        (printed("careful", "stderr"), "writes to stderr: careful"),
        (printed("a.py: UserWarning: old"), "warning: UserWarning: old"),
        (printed("Traceback (most recent call last)\n"), "traceback"),
        (shown("<td>nan</td>"), "shows nan"),
        (printed("loss -inf"), "shows -inf"),
        (shown("png", "image/png"), "picture without alt text"),
        (shown("<img src='x.png'>"), "picture without alt text"),
        (shown("<img src='x' alt='fig.png'>"), "'fig.png' for alt text"),
        ({"output_type": "error", "ename": "E", "evalue": "v"}, "ended in E: v"),
    ],
)
def test_what_no_page_may_show(gate, output, problem):
    assert re.search(CELL + f".*{problem}", only(gate(output)))


def test_what_a_page_may_show(gate):
    found = gate(
        printed("information, nanometres and warnings\n"),
        shown("<img src='x' alt='A curve that falls.'>"),
        shown("", "application/papermill.record/text/plain"),
        shown('<data value="nan" title="nan">fine</data>'),
    )
    assert not found.problems
    assert found.numbers == 0


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        # a nested mark ends with its own tag, and only there
        ("<p><b>0.<i>5</i></b></p>", "shows 0"),
        ("<div class='given' title='x'><div>1</div>2</div> 3", "shows 3 in '3'"),
        ("<table><tr><th>rank 8<td>7</table>", "shows 7"),
        ("<p>it is &#48;&period;5</p>", "shows 0.5"),
        ("<p>it is <!-- > --> 0.5</p>", "shows 0.5"),
        ("<template>0.5</template><style>p {top: 0.5em}</style><p>1</p>", "shows 1 in"),
        ("<img src='x > y.png' alt=''>words", "without alt text"),
        ("<p title='<img alt=1>'>nan</p>", "shows nan"),
    ],
)
def test_html_is_read_as_a_browser_reads_it(gate, content, problem):
    assert problem in gate(shown(content)).problems[0]
    hidden = "<!-- 0.5 nan --><script>0.5</script><svg><text>0.5</text></svg>"
    assert not gate(shown(hidden + "<p title='0.5 > 0.4'>words</p>")).problems


def test_marks_in_any_spelling(gate):
    data = runs.say("{m}", m=NUMBER).data
    value, record = re.search(r'value="[^"]*"', data)[0], f'"{RECORD.id[:12]}"'
    assert f'class="rec" {value} data-record={record}' in data
    for spelled in (
        data.replace(f'class="rec" {value}', f"{value}\n class='small rec'"),
        data.replace(">0.850<", ">&#48;.850<"),
        data.replace(">0.850<", "><span><b>0</b>.8</span>50<!-- x --><"),
        data.replace("<data", "<DATA").replace("</data", "</DATA"),
    ):
        assert spelled != data
        found = gate(shown(spelled))
        assert (found.problems, found.numbers) == ([], 1)
        assert found.records == {RECORD.id[:12]}


# ---------------------------------------------------------------- numbers


def test_numbers_that_equal_their_records_are_counted(gate):
    table = runs.table([RECORD], {"MAE": "test.mae", "r": "test.corr"}).data
    found = gate(
        shown(runs.say("MAE {m}.", m=NUMBER).data),
        shown(table),
        shown(runs.verdict(COMPARED).data),
        shown(runs.run_card([RECORD]).data),
    )
    assert not found.problems
    # 1; mean, sd, r (undefined) and seeds; 6 of the verdict; 6 of the card and its date
    in_verdict = len(re.findall(r"\d+(\.\d+)?", runs.verdict_of(COMPARED)))
    assert found.numbers >= 1 + 4 + in_verdict
    assert found.records == {RECORD.id[:12], COMPARED.id[:12]}
    assert gate(shown(table)).numbers == 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.replace(">0.850<", ">0.750<"), r"shows '0.750'.*is '0.850'"),
        (lambda s: s.replace('value="0.85', 'value="0.75'), r"'0.850'.*\(0.85"),
        (lambda s: s.replace("mean(", "sd("), r"sd\(test.mae\).*is '0.071'"),
        (lambda s: s.replace("test.mae", "test.mea"), "unknown record field 'mea"),
        (lambda s: s.replace(RECORD.id[:12], "0" * 12), "no record 000000000000"),
        (lambda s: s.replace(' data-digits="3"', ""), "lacks 'data-digits'"),
    ],
)
def test_a_number_that_is_not_its_record(gate, change, problem):
    right = runs.say("{m}", m=NUMBER).data
    assert change(right) != right
    assert re.search(CELL + f".*{problem}", only(gate(shown(change(right)))))


def test_an_edited_record_or_verdict_or_card(gate, tmp_path):
    said = runs.verdict(COMPARED).data.replace("0.100", "0.300")
    assert "rows.0.verdict of record" in only(gate(shown(said)))
    card = runs.run_card([RECORD]).data.replace("500 MiB", "400 MiB")
    assert "its records say" in only(gate(shown(card)))
    (path,) = (tmp_path / "results/a").glob("late-fusion-*.json")
    path.write_text(path.read_text().replace("0.8", "0.7"))
    right = runs.say("{m}", m=NUMBER).data
    assert "edited or damaged" in only(gate(shown(right)))


@pytest.mark.parametrize(
    "output",
    [
        printed("accuracy 81\n"),
        shown("<p>MAE 0.8</p>"),
        shown("<td>.8</td>"),
        shown("[1]", "text/plain"),
        shown("<caption>of 686 clips</caption>"),
        shown("<p>in 3-fold validation</p>"),
        shown("<p>&minus;1e-3</p>"),
    ],
)
def test_a_number_that_no_record_backs(gate, output):
    assert re.search(CELL + "shows .*which no record backs", only(gate(output)))
    assert not gate(output, options=":tags: [illustration]\n").problems


def test_names_headings_and_given_numbers_are_no_results(gate, tmp_path):
    given = runs.say("Acc-2 and F1 at width {w}.", w=runs.given(40, "chosen above"))
    found = gate(shown(given.data), shown("<th>rank 8</th><td>words</td>"))
    assert not found.problems
    naked = given.data.replace('title="chosen above"', 'title=""')
    assert "given without a source" in only(gate(shown(naked)))


def test_reference_numbers_equal_their_file(gate, tmp_path):
    path = tmp_path / "book/reference/x.yml"
    path.parent.mkdir(parents=True)
    path.write_text("caption: In 2020 by X\nrows: [{model: M 1, mae: '.954'}]\n")
    page = runs.reference_table(path, {"MAE": "mae", "r": "corr"}).data
    assert not gate(shown(page)).problems
    wrong = page.replace(">.954<", ">.854<")
    assert "shows '.854' but x.yml has '.954'" in only(gate(shown(wrong)))


def test_bands_notice_a_metric_that_is_broken(gate):
    bands = {"late-fusion": {"test.mae": [0.8, 0.9]}}
    made = [f"late-fusion-{RECORD.id[:12]}"]
    assert not gate(shown("x"), bands=bands, made=made).problems
    bands["late-fusion"]["test.acc2_non0"] = [90, 99]
    message = (
        "book/a.md: test.acc2_non0 of late-fusion is 82, outside its band 90 to 99"
    )
    assert only(gate(shown("x"), bands=bands, made=made)).startswith(message)
    undefined = {"late-fusion": {"test.corr": [0, 1]}}
    assert "test.corr of late-fusion is nan" in only(
        gate(shown("x"), bands=undefined, made=made)
    )
    assert "a band for the record late-fusion, but none was made" in only(
        gate(shown("x"), bands=undefined)
    )
    # of what is not per seed, the field itself
    bands = {"late-against-early": {"rows.0.p": [0.02, 1]}}
    made = [f"late-against-early-{COMPARED.id[:12]}"]
    assert "rows.0.p of late-against-early is 0.01" in only(
        gate(shown("x"), bands=bands, made=made)
    )


def test_bands_of_a_profile(tmp_path):
    root = make_project(tmp_path, {"a": chapter("A", "1")})
    quick = root / "book/profiles/quick.yml"
    quick.write_text("bands: {a: {late-fusion: {test.mae: [0.1, 2]}}}\n")
    found = open_book(root).bands("quick")
    assert found == {"a": {"late-fusion": {"test.mae": [0.1, 2]}}}
    quick.write_text("bands: {b: {}}\n")
    with pytest.raises(UnknownNameError, match="chapter 'b'"):
        open_book(root).bands("quick")
    for band in ("[2, 1]", "[1]", "'0.1 to 2'"):
        quick.write_text(f"bands: {{a: {{late-fusion: {{test.mae: {band}}}}}}}\n")
        with pytest.raises(BookError, match=r"a band is \[low, high\]"):
            open_book(root).bands("quick")
    # those of this book name records that its chapters make
    book = open_book(ROOT)
    for name, records in book.bands("quick").items():
        for record in records:
            parts = record.split("-")
            assert record in book[name].text or parts[0] in book[name].text, record


# ---------------------------------------------------------------- prose


@pytest.mark.parametrize(
    ("prose", "typed"),
    [
        ("The error falls to .882 here.", ".882"),
        ("An error of 0.88.", "0.88"),
        ("Right in 55 % of cases, or 12.5 %", "55 % 12.5"),
        ("44 percent", "44 percent"),
        ("| late | 0.71 |", "0.71"),
        ("```{note}\nfell by −0.3\n```", "−0.3"),
        (":::{tip}\nfell to 0.3\n:::", "0.3"),
        ("```{note} It reaches 0.88\nwords\n```", "0.88"),
        ("where x < 0.5 and y > 1", "0.5"),
        ("<b>0.5</b><img width='0.7'>", "0.5"),
        ("a 95 % interval of 3 clips in 2199", ""),
        ("`0.5` and ``lr = 0.1`` and $x = 0.2$ and\n$$\n0.3\n$$", ""),
        ("```python\nx = 0.5\n```\n\n```\n0.6\n```\n\n```{math}\n0.7\n```", ""),
        ("\\begin{align}\n0.5\n\\end{align}", ""),
        ("[a](https://x.org/1.5) https://x.org/v2.5 {cite}`a0.5`", ""),
        ('[0.5]{.given source="the plan"} and [12.5 %]{.given source="X 2020"}', ""),
        ("[0.5]{.given}", "source"),
        ('[0.5]{.given source=" "}', "source"),
        ("```{exercise-start}\n```\n55 % negative\n```{exercise-end}\n```", ""),
        ("```{exercise-start}\n```\nMAE 0.5\n```{exercise-end}\n```\n60 %", "0.5 60 %"),
        (f"{cell('x = 0.5  # 12 %')}<!-- 0.5 -->", ""),
        # code and prose in places where lines alone do not tell
        ("- ```python\n  x = 0.5\n  ```\n\n  then 0.6", "0.6"),
        ("- a\n  - b\n\n    ```\n    0.5\n    ```\n\n    0.6", "0.6"),
        ("1. ~~~\n   0.5\n   ```\n   0.5\n   ~~~\n2. 0.6", "0.6"),
        ("~~~~\n0.5\n~~~\n0.5\n~~~~\n\n0.6", "0.6"),
        ("```\n0.5\n    ```\n0.5\n```\n0.6", "0.6"),
        ("words\n\n    x = 0.5\n\n0.6", "0.6"),
        ("> ```\n> 0.5\n> ```\n> 0.6", "0.6"),
        ("- ```\n  0.5\n\n0.6", "0.6"),
        ("````{note}\n```\n0.5\n```\n0.6\n````", "0.6"),
        (":::{note}\n:class: x-0.5\n\n```{tip}\n0.6\n```\n:::", "0.6"),
        ("```{note}\n---\nclass: 0.5\n---\n0.6\n```", "0.6"),
        ("a ` here, 0.6 there\n\nand ` again", "0.6"),
        ("a \\`0.6\\` and `` ` 0.5 ``", "0.6"),
        ("| a |\n|---|\n| `0.5` 0.6 |", "0.6"),
        ("words[^a]\n\n[^a]: it was 0.6", "0.6"),
        ("![a curve at 0.6](x-0.5.png 'title 0.5')", "0.6"),
        ('<div title="0.5 > 0.4">0.6</div>', "0.6"),
        ("<!--\n\n0.5\n\n-->\n\n0.6", "0.6"),
        ("% a remark of 0.5\n\n(label-0.5)=\n\n0.6", "0.6"),
        ('[about [0.5]{.x}]{.small .given source="X"} 0.6', "0.6"),
        ("a 95 %\nconfidence interval", ""),
    ],
)
def test_numbers_typed_by_hand(gate, prose, typed):
    text = chapter("A", "x = 0.5") + prose
    found = list(check_prose(text))
    if typed == "source":
        assert [p.endswith('{.given source="where from"}') for _, p in found] == [True]
    else:
        assert " ".join(p.partition(" is typed")[0] for _, p in found) == typed
    for line, problem in found:
        assert (
            problem.partition(" is typed")[0].split()[0] in text.splitlines()[line - 1]
        )


def test_what_markdown_joins_is_one_number():
    def typed(text):
        return [(n, p.partition(" is typed")[0]) for n, p in check_prose(text)]

    assert typed("It reaches **0**.88.") == [(1, "0.88")]
    assert typed("It reaches 0\\.88, 0&#46;88 and 5 &percnt;.") == [
        *((1, "0.88"), (1, "0.88"), (1, "5 %")),
    ]
    assert typed("55\nper cent") == [(1, "55 per cent")]
    # the line is right below whatever spans several
    spans = "a `b\nc` $d\ne$ [f\ng](h\n'i') <b\nid='j'>k</b>\\\nl {term}`m\nn`"
    assert typed(f"# T\n\n> {spans} 0.5\n\n0.6") == [(10, "0.5"), (12, "0.6")]
    assert typed("````{note}\n:class: x\n\n- ```{tip} T\n\n  0.5\n  ```\n````") == [
        (6, "0.5")
    ]


def test_prose_is_read_with_the_extensions_of_the_book():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert set(config["parse"]["myst_enable_extensions"]) == EXTENSIONS


def test_a_typed_number_is_named_with_its_line(gate):
    found = gate(shown("x"), prose="Words.\n\nIt reaches 0.88 here.\n")
    lines = (chapter("A") + cell("show()")).count("\n") + 3
    assert only(found).startswith(f"book/a.md, line {lines}: 0.88 is typed by hand")


# ---------------------------------------------------------------- pages


@pytest.fixture
def pages(tmp_path):
    """Problems of a small rendered book with one page of the given HTML."""
    root = make_project(tmp_path, {"a": chapter("A", "1")})
    made = tmp_path / "made"
    (made / "_static").mkdir(parents=True)
    (made / "_static/x y.svg").write_text("<svg/>")
    (made / "book").mkdir()
    (made / "book/index.html").write_text("<h1 id='top-of-it'>T</h1><a name='old'></a>")

    def check(page: str) -> list[str]:
        if page:
            (made / "book/a.html").write_text(f"<h1>A</h1><section id='s'>{page}")
        return check_pages(open_book(root), made)

    return check


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("<img src='data:x'>", "#s: the picture data:x is without alt text"),
        ("<img src='data:x' alt=' '>", "without alt text"),
        ("<img src='data:x' alt='_images/x.png'>", "'_images/x.png' for alt text"),
        ("<img src='data:x' alt='0123456789abcdef'>", "for alt text"),
        ("<a href='gone.html'>x</a>", "link gone.html leads nowhere: there is no such"),
        ("<a href='#gone'>x</a>", "book/a.html has no anchor of that name"),
        ("<a href='index.html#gone'>x</a>", "book/index.html has no anchor"),
        ("<script src='../_static/gone.js'></script>", "gone.js leads nowhere"),
        ("<a href='../'>x</a>", "leads nowhere"),
        ("<A class=x HREF = gone.html>x</A>", "link gone.html leads nowhere"),
        ("<a title='>' href='index.html#a&amp;b'>x</a>", "book/index.html has no"),
        ("<img alt='' title='alt=\"A curve\"' src='data:x'>", "without alt text"),
    ],
)
def test_a_page_with_a_fault_is_named(pages, page, problem):
    (found,) = pages(page)
    assert found.startswith("book/a.html, section #s: ")
    assert problem in found


def test_a_page_without_faults(pages):
    assert not pages(
        "<img src='../_static/x%20y.svg?v=1' alt='A curve'><a href='#'>x</a>"
        "<a href='#s'>x</a><a href='index.html#top-of-it'>x</a>"
        "<a href='./index.html?q=1#old'>x</a><a href='https://x.org/#no'>x</a>"
        "<a href='mailto:a@b'>x</a>"
        "<!-- <a href='gone.html'> --><script>'<img src=\"x\">'</script>"
    )


def test_as_many_pages_as_the_table_of_contents_names(pages, tmp_path):
    missing = ["book/a.html was not rendered, or has no title"]
    assert pages("") == missing
    (tmp_path / "made/book/a.html").write_text("<!-- <h1>A</h1> -->")
    assert pages("") == missing
    (tmp_path / "made/book/b.html").write_text("<h1>B</h1>")
    assert pages("x") == ["pages that _toc.yml does not name: book/b"]


# ---------------------------------------------------------------- cards

PLACEHOLDERS = {
    "status": f"# Status\n\n## Chapters\n\n{cards.STATUS}\n",
    "records": f"# Records\n\n{cards.RECORDS}\n",
}


def test_numbers_lead_to_their_records_and_pages_are_generated(tmp_path):
    root = make_project(tmp_path, {"a": chapter("A", "show()")})
    for name, text in PLACEHOLDERS.items():
        (root / f"book/{name}.md").write_text(text)
    toc = (root / "_toc.yml").read_text()
    toc += "".join(f"  - file: book/{name}\n" for name in PLACEHOLDERS)
    (root / "_toc.yml").write_text(toc)
    runs.save(RECORD, root / "_build/records")
    real = {"name": "mosi", "synthetic": False, "sha256": "y"}
    kept = runs.seal(replace(RECORD, corpus=real, id="", created="2025-05-06"))
    runs.save(kept, root / "results")
    book, short = open_book(root), RECORD.id[:12]
    outputs = [
        shown(runs.say("{m}", m=NUMBER).data),
        shown(f'<ul><li class="rec" data-record="{short}">late wins</li></ul>'),
        shown(runs.run_card([RECORD]).data),
    ]
    notebook = root / "a.ipynb"
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "\n", "Text."]},
        {"cell_type": "code", "outputs": outputs},
    ]
    notebook.write_text(json.dumps({"cells": cells}))
    noted = {"seconds": 61.4, "numbers": 17, "records": [f"late-fusion-{short}"]}
    noted["used"] = [short, kept.id[:12]]
    shelf = Shelf((root / "results", root / "_build/records"))

    def trace(fresh):
        shown_ = {"a": cards.Shown(notebook, noted, fresh)}
        return cards.Trace(book, shown_, shelf)

    made = trace(True)
    page = json.loads(made.notebook("a"))["cells"]
    assert page[0]["source"] == ["# A\n", "\n", "Text."]
    number, verdict, card = (o["data"]["text/html"] for o in page[1]["outputs"])
    link = f'<a class="rec" href="records.html#record-{short}">'
    assert f'{link}<data class="rec"' in number
    assert number.count("</data></a>") == 1
    assert f">{link}late wins</a></li>" in verdict
    assert "<dt>Page</dt><dd>fresh</dd>" in card
    assert "<dt>Code</dt>" not in card  # of a run of this build
    own = f'<dl class="run-card" data-records="{kept.id[:12]}"></dl>'
    kept_card = made._linked(own, "a", book["a"].page)
    assert "<dt>Code</dt><dd>the code has moved on since</dd>" in kept_card
    assert made.files.keys() == {f"late-fusion-{short}.json"} | {
        f"late-fusion-{kept.id[:12]}.json"
    }
    status, records = made.pages["book/status"], made.pages["book/records"]
    for text in (
        "fresh",
        "61 s",
        "17",
        "500 MiB",
        "puppets (synthetic)",
        "mosi (real)",
    ):
        assert text in status, text
    assert "A processor" in status and "2026-01-02" in status and "cccccccccc" in status
    assert '<a href="a.html">a</a>' in status
    for record in (RECORD, kept):
        assert f'id="record-{record.id[:12]}"' in records
        assert f'href="../_static/records/late-fusion-{record.id[:12]}.json"' in records
    assert trace(True).pages == made.pages  # nothing of the time of rendering

    old = json.loads(trace(False).notebook("a"))["cells"]
    assert old[0]["source"].startswith("# A\n\n```{warning}\nThis page is not current")
    assert "stale: the last good version" in trace(False).pages["book/status"]

    # a record is of today's code as long as nothing that its chapter reaches changes
    moved = moved_on(book)
    (state,) = states(book, "quick")
    now = {"closure_sha256": closure_hash(state.key)}
    assert moved(kept)
    assert not moved(replace(kept, code=now))
    assert moved(replace(kept, code=now, chapter="b"))
    assert moved(replace(kept, code=now, chapter=None))
    now = {"closure_sha256": runs.package_sha256(root)}
    assert not moved(replace(kept, code=now, chapter=None))


def test_records_are_checked(tmp_path, capsys, monkeypatch):
    root = make_project(tmp_path, {"a": chapter("A", "1")})
    monkeypatch.chdir(root)
    path = runs.save(RECORD, root / "results")
    code, text = mmsa_book(capsys, "records", "check")
    assert code == 0
    assert f"1 the code has moved on since:\n  {path.stem}" in text
    assert "1 records match their content addresses" in text
    dirty = {"dirty": True, "closure_sha256": closure_hash(states_of(root)[0].key)}
    runs.save(runs.seal(replace(RECORD, code=dirty, id="")), root / "results")
    gone = replace(RECORD, chapter="gone", id="")
    runs.save(runs.seal(gone), root / "_build/records")
    code, text = mmsa_book(capsys, "records", "check")
    assert code == 0
    assert "1 made with local changes" in text
    assert "1 of a chapter that is not there" in text

    path.rename(root / "results/a/other-000000000000.json")
    edited = next((root / "_build/records/gone").iterdir())
    edited.write_text(edited.read_text().replace("0.8", "0.7"))
    code, text = mmsa_book(capsys, "records", "check")
    assert code == 1
    assert "2 of 3 records are damaged" in text
    assert (
        f"_build/records/gone: {edited.name} does not match its content address" in text
    )
    assert f"other-000000000000.json is the record a/{path.name}; move it back" in text


def states_of(root):
    return states(open_book(root), "quick")


# ---------------------------------------------------------------- a build


def test_a_build_turns_red_and_keeps_the_last_good_page(tmp_path, capsys, monkeypatch):
    """Each fault in turn in one of two chapters; kernels cost seconds, so one story."""
    measured = """
from mmsa_lib import runs
made = runs.measure("floor", mae=0.25)
runs.say("The floor is {m}.", m=runs.value(made, "mae", digits=2))
"""
    good = chapter("A", measured) + "Words.\n"
    root = make_project(
        tmp_path, {"a": good, "b": chapter("B", "'words'"), **PLACEHOLDERS}
    )
    add_library(root)
    monkeypatch.chdir(root)
    quick = root / "book/profiles/quick.yml"
    quick.write_text("bands: {a: {floor: {rows.0.mae: [0.2, 0.3]}}}\n")
    code, text = mmsa_book(capsys, "build")
    assert code == 0, text
    assert "a: 1 numbers equal their records" in text
    page = root / "_build/html/book/a.html"
    assert 'a class="rec" href="records.html#record-' in page.read_text()
    assert "not current" not in page.read_text()

    code, text = mmsa_book(capsys, "build")  # unchanged: nothing to do
    assert (code, "nothing changed" in text, "rendering" in text) == (0, True, False)

    # a metric outside its band, and a chapter that fails: both keep the last good page
    quick.write_text(quick.read_text().replace("0.2, 0.3", "0.3, 0.4"))
    (root / "book/b.md").write_text(chapter("B", "1 / 0"))
    code, text = mmsa_book(capsys, "build")
    assert code == 1
    assert "1 fresh, 1 to execute" in text
    code, status = mmsa_book(capsys, "status", "--json")
    assert [row["state"] for row in json.loads(status)] == ["refused", "stale"]
    assert "outside its band 0.3 to 0.4" in json.loads(status)[0]["reasons"][0]
    assert "book/a.md: rows.0.mae of floor is 0.25, outside its band 0.3 to 0.4" in text
    assert "book/b.md, code cell 2 of 2" in text
    assert "1 of 2 chapters failed: b. 1 of 2 chapters refused by the gates: a" in text
    assert "The book shows the last good version of each" in text
    for name, words in {"a": "The floor is", "b": "words"}.items():
        content = (page.parent / f"{name}.html").read_text()
        assert "This page is not current" in content
        assert words in content
    assert "stale: the last good version" in (page.parent / "status.html").read_text()

    # all at once: a silent cell, no alt text, a number of no record, one by hand, and a
    # picture on another page whose alt text is its file name
    quick.write_text(quick.read_text().replace("0.3, 0.4", "0.2, 0.3"))
    faults = chapter(
        "A",
        measured,
        "def f():\n    pass\nf()",
        "from IPython.display import HTML\nHTML('<img src=\"data:x\">')",
        "print('accuracy', 81)",
    )
    (root / "book/a.md").write_text(faults + "It reaches 0.88.\n")
    (root / "book/x.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (root / "book/index.md").write_text("# Tiny\n\n![](x.svg)\n")
    before = page.read_text()
    code, text = mmsa_book(capsys, "build")
    assert code == 1
    lines = (root / "book/a.md").read_text().splitlines()
    starts = [i for i, s in enumerate(lines, 1) if "{code-cell}" in s]
    for i, problem in {3: "ends in", 4: "shows a picture", 5: "shows 81"}.items():
        place = f"book/a.md, code cell {i} of 5 (line {starts[i - 1]}): "
        assert re.search(re.escape(place) + f".*{problem}", text), text
    assert f"book/a.md, line {len(lines)}: 0.88 is typed by hand" in text
    assert re.search(
        r"book/index\.html, section #tiny: the picture .*x\.svg is with", text
    )
    assert "refused by the gates: a" in text
    assert page.read_text() == before  # the last good book
