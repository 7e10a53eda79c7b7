"""The rendered pages as a reader meets them: in a browser, from disk, no network.

Two sites are visited: a small book made here from the pages of this one with a short
chapter, and the book of `make book`, if it is there and current. Where Chromium or the
book is absent tests are skipped with the reason; with MMSA_REQUIRE_BROWSER=1 they fail.
"""

import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from processes import start
from test_press import HEADER, cell

from mmsa_lib import runs
from mmsa_lib.files import write_atomic
from mmsa_lib.press.cards import RECORDS, STATUS
from mmsa_lib.press.chapters import open_book
from mmsa_lib.press.cli import gated
from mmsa_lib.press.freshness import states
from mmsa_lib.press.render import is_current

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = {"width": 390, "height": 844}


def absent(reason: str):
    """Skip, or fail where somebody has said that nothing may be absent."""
    if os.environ.get("MMSA_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


# ---------------------------------------------------------------- the sites

RECORD = """
from mmsa_lib import figures, runs

figures.style()
corpus = {"name": "puppets", "sha256": "0" * 64, "synthetic": True}
record = runs.seal(
    runs.RunRecord(
        "late-fusion", "training", "2026-01-02T03:04:05+00:00",
        chapter="CHAPTER", seeds=[0, 1], corpus=corpus,
        resources={"trainable_parameters": 12345, "wall_seconds": 3.0,
                   "peak_ram_mib": 321},
        per_seed=[{"seed": s, "test": {"mae": 0.75 + s / 8}} for s in (0, 1)],
    )
)
runs.save(record)
runs.table([record], {f"MAE {i}": "test.mae" for i in range(9)}, caption="A table.")
"""
FIGURE = """
figure, ax = figures.canvas()
figures.strip(ax, {"late": record.values("test.mae")})
figures.show(
    figure, name="dots", mae=runs.number(record, "test.mae"),
    caption="The mean of the two dots is {mae}.",
    alt="Dot plot of one row with two dots, one for each seed.",
)
"""
WORDS = r"""
Attention {cite}`vaswani2017attention` in one line, $\alpha_{ij} \ge 0$, and a wide one,

$$
\alpha_{ij} = \frac{K_j \exp(q_i^\top k_j / \sqrt{d_h})}
{\sum_{j'} K_{j'} \exp(q_i^\top k_{j'} / \sqrt{d_h})}, \qquad
o_i = \sum_j \alpha_{ij} v_j = \sum_j \alpha_{ij} W_v x_j, \qquad
\sg{x} = x, \qquad \sum_j \alpha_{ij} = 1 \quad\text{for every } i .
$$

A {term}`mask` is `mmsa_lib.corpora.schema.Batch.mask_with_a_name_that_is_far_too_long`.

| name | meaning | name | meaning | name | meaning |
|---|---|---|---|---|---|
| has0 | zeroisnonnegative | non0 | zeroisleftout | zneg | zeroisnegative |

```sh
mmsa-book run baselines --profile full -p corpus mosi-text-audio --records results
```

```{note}
A note, with *stress* and `code`.
```

```{exercise-start}
:label: ex-toy
```
What is one and one?
```{exercise-end}
```

````{solution-start} ex-toy
:class: dropdown
````
Two.
````{solution-end}
````
"""


@pytest.fixture(scope="session")
def toy_site(tmp_path_factory) -> Path:
    """A book with every page of this one, a single chapter, and that a short one."""
    root = tmp_path_factory.mktemp("book")
    for name in ("_config.yml", "_toc.yml"):
        shutil.copyfile(ROOT / name, root / name)
    shutil.copytree(ROOT / "book", root / "book")
    real = open_book(ROOT)
    parameters = cell('profile = "quick"', ":tags: [parameters]\n")
    cells = RECORD.replace("CHAPTER", next(iter(real.chapters))), FIGURE
    first = (
        f"{HEADER}\n# A chapter\n\nA sentence.\n\n{parameters}"
        + "".join(map(cell, cells))
        + f"{WORDS}\n{cell('runs.run_card([record])')}"
    )
    for i, chapter in enumerate(real.chapters.values()):
        path = root / chapter.path.relative_to(ROOT)
        path.write_text(first if i == 0 else f"# {chapter.name}\n\nLater.\n")
    (root / "book/profiles/quick.yml").write_text("all:\n  profile: quick\n")
    build = start(root, "build")
    printed = build.communicate()[0]
    assert build.returncode == 0, printed
    return root / "_build" / "html"


def real_site() -> Path:
    book = open_book(ROOT)
    known = states(book, "quick")
    trace = None
    if all(state.good.intact() for state in known):
        trace, _ = gated(book, "quick", known, set())
    if trace is None or not is_current(book, trace):
        absent("the rendered book is absent or older than its sources: call make book")
    return book.build / "html"


@pytest.fixture(scope="session")
def chromium():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        absent(f"no browser: none of {', '.join(NAMES)} is installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu"]  # as root, in a container
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["toy", "book"])
def site(request, chromium) -> Path:
    if request.param == "toy":
        return request.getfixturevalue("toy_site")
    return real_site()


# ---------------------------------------------------------------- a visit

SETTLED = """async () => {
  const sheet = document.createElement("style");
  sheet.textContent = "* { transition: none !important; animation: none !important }";
  document.head.append(sheet);
  if (window.MathJax?.startup) await MathJax.startup.promise;
  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => {});
  }
}"""

# every text that can be seen with less contrast than it should have
FAINT = """() => {
  const rgba = text => {
    const n = text.match(/[\\d.]+/g).map(Number);
    if (text.startsWith("color(")) n.splice(0, 3, ...n.slice(0, 3).map(x => 255 * x));
    return [n[0], n[1], n[2], n[3] ?? 1];
  };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const luminance = c => {
    const [r, g, b] = c.slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reduceRight((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const found = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const element = walker.currentNode.parentElement;
    if (!text || element.closest("script, style, noscript, dialog:not([open])"))
      continue;
    if (!element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}))
      continue;
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) continue;
    const ground = background(element);
    let ink = rgba(style.color);
    for (let e = element; e; e = e.parentElement)
      ink[3] *= Number(getComputedStyle(e).opacity);
    ink = over(ink, ground);
    const [low, high] = [luminance(ink), luminance(ground)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5)
      found.set(`${style.color} on ${ground.map(Math.round)}`,
        `${ratio.toFixed(2)} ${element.className}: ${text.slice(0, 40)}`);
  }
  return [...found].map(pair => pair.join(" "));
}"""

# what sticks out of the page and cannot be reached by scrolling its own box
WIDE = """() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width || document.body.scrollWidth > width)
    found.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const element of document.querySelectorAll(".bd-article *")) {
    const box = element.getBoundingClientRect();
    if (box.right <= width + 1 || box.width === 0) continue;
    if (!element.checkVisibility({checkVisibilityCSS: true})) continue;
    let scrolls = element.closest("mjx-assistive-mml") !== null;
    for (let e = element; e && !e.matches(".bd-article"); e = e.parentElement)
      scrolls ||= ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
    if (!scrolls)
      found.push(`${element.tagName}.${element.className}: ${Math.round(box.right)}`);
  }
  return found.slice(0, 5);
}"""

MATH = """() => {
  const formulas = [...document.querySelectorAll(".math")];
  const raw = formulas.filter(e => !e.querySelector("mjx-container svg"))
    .map(e => e.textContent.trim());
  const body = document.body.cloneNode(true);
  body.querySelectorAll("pre, code, script, mjx-container").forEach(e => e.remove());
  raw.push(...(body.textContent.match(/\\\\[(\\[a-zA-Z]+|\\$\\$?\\S+/g) ?? []));
  raw.push(...[...document.querySelectorAll("[data-mml-node=merror]")]
    .map(e => "error in " + e.closest(".math").textContent));
  return {formulas: formulas.length, raw};
}"""

NAMELESS = """() => [
  ...[...document.images].filter(e => !e.alt.trim() || !e.naturalWidth),
  ...[...document.querySelectorAll("svg[role=img]:not([aria-hidden=true])")].filter(
    e => !e.closest("mjx-container") && !e.getAttribute("aria-label")
         && !e.querySelector("title")),
  ...[...document.querySelectorAll("a[href], button")].filter(
    e => e.checkVisibility() && !e.textContent.trim() && !e.title && !e.ariaLabel
         && !e.dataset.bsTitle && !e.querySelector("img[alt]")),
].map(e => e.outerHTML.slice(0, 200))"""


@dataclass
class Seen:
    """What was found on one page."""

    title: str = ""
    headings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    formulas: int = 0
    raw: list[str] = field(default_factory=list)
    images: int = 0
    nameless: list[str] = field(default_factory=list)
    cards: list[list[str]] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)
    faint: dict[str, list[str]] = field(default_factory=dict)
    ground: dict[str, str] = field(default_factory=dict)
    wide: list[str] = field(default_factory=list)


def open_page(chromium, seen: Seen, **options):
    """A tab that notes errors and requests, and lets none leave the machine."""
    context = chromium.new_context(viewport={"width": 1300, "height": 900}, **options)

    def note(route):
        seen.requests.append(route.request.url)
        if route.request.url.startswith(("file:", "data:", "blob:")):
            route.continue_()
        else:
            route.abort()

    context.route("**/*", note)
    page = context.new_page()
    page.set_default_timeout(120_000)  # machines of CI are slow
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("requestfailed", lambda r: seen.errors.append(f"failed: {r.url}"))
    page.on(
        "console",
        lambda m: seen.errors.append(m.text) if m.type in ("error", "warning") else 0,
    )
    return page


def toggle(page, wanted: str) -> None:
    """Click the button of the theme until the page is light or dark."""
    for _ in range(3):
        if page.locator("html").get_attribute("data-theme") == wanted:
            return
        page.locator(".theme-switch-button:visible").first.click()
    assert page.locator("html").get_attribute("data-theme") == wanted


def visit(chromium, path: Path) -> Seen:
    seen = Seen()
    page = open_page(chromium, seen, color_scheme="light")
    page.goto(path.as_uri())
    page.evaluate(SETTLED)
    seen.title = page.title()
    seen.headings = page.locator("article h1").all_inner_texts()
    seen.images = page.locator("article img").count()
    seen.nameless = page.evaluate(NAMELESS)
    seen.cards = [
        c.locator("dt").all_inner_texts() for c in page.locator(".run-card").all()
    ]
    links = page.locator("a.download").all()
    seen.downloads = [link.evaluate("e => e.href") for link in links]
    seen.formulas, seen.raw = page.evaluate(MATH).values()
    for mode in ("dark", "light"):
        if page.locator(".theme-switch-button").count():
            toggle(page, mode)
        seen.faint[mode] = page.evaluate(FAINT)
        seen.ground[mode] = page.evaluate(
            "() => getComputedStyle(document.body).backgroundColor"
        )
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(100)
    seen.wide = page.evaluate(WIDE)
    page.context.close()
    return seen


@pytest.fixture(scope="module")
def seen(site, chromium) -> dict[str, Seen]:
    """Every page of the table of contents, and two of each other kind."""
    named = [*open_book(ROOT).pages, "search", "genindex"]
    others: dict[Path, list[str]] = {}
    for path in sorted(site.rglob("*.html")):
        page = path.relative_to(site).with_suffix("").as_posix()
        if page not in named and page != "index" and page[0] != "_":
            others.setdefault(path.parent, []).append(page)
    named += [page for pages in others.values() for page in pages[:2]]
    return {page: visit(chromium, site / f"{page}.html") for page in named}


def _first_chapter() -> str:
    return next(iter(open_book(ROOT).chapters.values())).page


def complaints(seen: dict[str, Seen], of) -> str:
    """The pages with something to complain about, a line each."""
    found = {page: of(facts) for page, facts in seen.items()}
    return "\n".join(f"{page}: {what}" for page, what in found.items() if what)


# ---------------------------------------------------------------- what must hold


def test_nothing_fails_on_a_page(seen):
    assert not complaints(seen, lambda page: page.errors)


def test_no_page_asks_anything_of_the_network(seen, site):
    def foreign(page):
        inside = (site.as_uri(), "data:", "blob:")
        return [url for url in page.requests if not url.startswith(inside)]

    assert not complaints(seen, foreign)
    assert all(len(page.requests) > 5 for page in seen.values())  # they were noted


def test_equations_are_set(seen):
    assert not complaints(seen, lambda page: page.raw)
    assert seen["book/notation"].formulas > 20
    assert seen[_first_chapter()].formulas >= 2


def test_images_and_buttons_have_words(seen):
    assert not complaints(seen, lambda page: page.nameless)
    assert seen[_first_chapter()].images


def test_each_page_has_one_title(seen):
    def wrong(page):
        if len(page.headings) != 1:
            return page.headings or "no title"
        return page.headings[0].strip(" #") not in page.title and page.title

    content = {k: v for k, v in seen.items() if k.startswith("book/")}
    assert not complaints(content, wrong)


def test_no_folded_code_stands_before_the_first_section(site):
    for chapter in open_book(ROOT).chapters.values():
        page = site / f"{chapter.page}.html"
        top, section, _ = page.read_text(encoding="utf-8").partition("<h2")
        if section:  # a toy chapter has none
            assert "Show code" not in top, chapter.name


def test_each_chapter_has_a_run_card_and_its_files(seen, site):
    chapters = list(open_book(ROOT).chapters.values())
    real = site == ROOT / "_build" / "html"
    for chapter in chapters if real else chapters[:1]:
        found = seen[chapter.page]
        assert found.cards
        for card in found.cards:
            assert {"Peak memory", "Corpus", "Seeds", "Commit"} <= set(card)
        files = [Path(url.removeprefix("file://")) for url in found.downloads]
        name = chapter.name
        wanted = [f"{name}.ipynb", f"{name}-executed.ipynb", f"{name}.md"]
        assert [path.name for path in files] == wanted
        clean, executed = (json.loads(p.read_text())["cells"] for p in files[:2])
        code = [c for c in clean if c["cell_type"] == "code"]
        assert code and not any(c["outputs"] or c["execution_count"] for c in code)
        assert any(c.get("outputs") for c in executed)
        assert "{container} downloads" not in str(clean) + str(executed)
        source = files[2].read_text()
        assert len(code) == len(re.findall(r"^```\{code-cell\}", source, re.MULTILINE))


def test_text_can_be_read_in_light_and_dark(seen):
    for mode in ("light", "dark"):
        assert not complaints(seen, lambda page, mode=mode: page.faint[mode])
    grounds = {tuple(page.ground.items()) for page in seen.values()}
    assert grounds == {(("dark", "rgb(18, 18, 18)"), ("light", "rgb(255, 255, 255)"))}


def test_a_phone_never_scrolls_sideways(seen):
    assert not complaints(seen, lambda page: page.wide)


def test_search_finds_a_word(site, chromium):
    seen = Seen()
    page = open_page(chromium, seen)
    page.goto((site / "book/index.html").as_uri())
    page.locator(".search-button-field:visible, .search-button:visible").first.click()
    page.locator("input[type=search]:visible").first.fill("padding")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=padding*")
    results = page.locator("#search-results li a")
    results.first.wait_for()
    page.locator("#search-results p.search-summary", has_text="found").wait_for()
    titles = results.all_inner_texts()
    assert "Notation" in titles
    results.nth(titles.index("Notation")).click()
    page.wait_for_url("**/book/notation.html*")
    assert "padding" in page.locator("article").inner_text()
    page.goto((site / "search.html").as_uri() + "?q=zzyzx")
    page.locator("#search-results p.search-summary", has_text="not match").wait_for()
    assert results.count() == 0
    assert not seen.errors
    page.context.close()


def test_the_visit_would_notice(chromium, tmp_path):
    """The checks above on a page that breaks every one of them."""
    (tmp_path / "bad.html").write_text(
        "<html><title>Bad</title><body style='background: white'>"
        "<script src='https://example.org/a.js'></script><script>throw 1</script>"
        "<img src='gone.png'><span class='math'>\\(a^2\\)</span>"
        "<p style='color: #999'>faint</p><p style='opacity: .3'>fainter</p>"
        "<p style='color: #767676'>just enough</p>"
        "<div class='bd-article'><p style='width: 500px'>wide</p>"
        "<div style='overflow-x: auto'><p style='width: 300px'>fine</p></div></div>"
    )
    bad = visit(chromium, tmp_path / "bad.html")
    assert any("1" in e for e in bad.errors)
    assert any("example.org" in e for e in bad.errors)
    assert any("gone.png" in e for e in bad.errors)
    assert "https://example.org/a.js" in bad.requests
    assert bad.raw[0] == "\\(a^2\\)"
    assert "gone.png" in bad.nameless[0]
    assert len(bad.faint["light"]) == 2
    assert len(bad.wide) == 2
    assert bad.headings == bad.cards == []


# ---------------------------------------------------------------- foreign texts

SCRIPT = "<script>window.hit=true</script><img src=x onerror=window.hit=true>"
NAME = "<img src=x onerror=window.hit=true> {raw}`y` *z*"  # no slash
BREAKS = f"a\n```\n\n</td></dl></pre>\n\n{SCRIPT}\n\n`x` $z$ {SCRIPT}"
FOREIGN = """
from IPython.display import display
from mmsa_lib import figures, runs
from mmsa_lib.errors import unknown
from mmsa_lib.predict import Prediction
from mmsa_lib.study import facts_table

corpus = {"name": note, "sha256": "0" * 64, "synthetic": True}
record = runs.seal(
    runs.RunRecord(
        NAME, "training", "2026-01-02T03:04:05+00:00", chapter="a", seeds=[0],
        corpus=corpus, parameters={note: note}, environment={"cpu": note},
        code={"commit": note}, per_seed=[{"seed": 0, "test": {"mae": 0.5}}],
        resources={"wall_seconds": 3.0},
    )
)
_ = runs.save(record)
"""
SHOWN = (
    "runs.table([record], {note: 'test.mae'}, names={record.name: note}, caption=note)",
    "runs.run_card([record])",
    "runs.say(note + ' {n}', n=runs.number(record, 'test.mae'))",
    "runs.claim(False, note)",
    "facts_table([note, note], [[note, note]], note)",
    "print(note)",
    "note",
    "try:\n    raise unknown('clip', note, [note])\n"
    "except KeyError as error:\n    print(error)\n    display(str(error))",
    "print(Prediction(note, None, note))",
    "figure, ax = figures.canvas()\n_ = ax.set_title(note, parse_math=False)\n"
    "figures.show(figure, name='a', alt='A picture of ' + note, "
    "caption='A caption of ' + note)",
)


@pytest.fixture(scope="session")
def foreign_site(tmp_path_factory) -> Path:
    """A small book into which every text that is not ours brings a script."""
    root = tmp_path_factory.mktemp("foreign")
    parameters = cell(
        f'profile = "quick"\nnote = {BREAKS!r}\nNAME = {NAME!r}',
        ":tags: [parameters, illustration]\n",
    )
    cells = [cell(source, ":tags: [illustration]\n") for source in (FOREIGN, *SHOWN)]
    files = {
        "_toc.yml": "format: jb-book\nroot: book/index\nchapters:\n"
        "- file: book/a\n- file: book/status\n- file: book/records\n",
        "book/index.md": "# Foreign\n",
        "book/a.md": f"{HEADER}\n# A\n\n{parameters}{''.join(cells)}",
        "book/status.md": f"# Status\n\n## Each\n\n{STATUS}\n",
        "book/records.md": f"# Records\n\n{RECORDS}\n",
        "book/profiles/other.yml": "all: {}\n",
    }
    for name, text in files.items():
        write_atomic(root / name, text)
    shutil.copyfile(ROOT / "_config.yml", root / "_config.yml")
    shutil.copyfile(ROOT / "book/references.bib", root / "book/references.bib")
    shutil.copytree(ROOT / "book/_static", root / "book/_static")
    for chapter in (NAME, None):
        record = runs.RunRecord(
            NAME,
            "benchmark",
            "2026-01-02T03:04:05+00:00",
            chapter=chapter,
            corpus={"name": BREAKS, "sha256": "1" * 64},
            environment={"cpu": BREAKS},
            code={"commit": SCRIPT},
        )
        runs.save(runs.seal(record), root / "results")
    build = start(root, "build", "--profile", "other")  # a quick build is strict
    printed = build.communicate()[0]
    assert build.returncode == 0, printed
    return root / "_build" / "html"


def test_foreign_texts_are_texts_in_the_source(foreign_site):
    pages = [
        foreign_site / "book" / f"{name}.html" for name in ("a", "status", "records")
    ]
    for page in pages:
        soup = BeautifulSoup(page.read_text(), "html.parser")
        assert not soup.select("[onerror]"), page.name
        assert not [s for s in soup.find_all("script") if "window.hit" in s.text]
        assert "onerror=window.hit=true" in soup.text


def test_foreign_texts_execute_nothing_in_a_browser(foreign_site, chromium):
    page = chromium.new_page()
    for path in sorted(foreign_site.glob("*/*.html")):  # index.html leads elsewhere
        page.goto(path.as_uri())
        page.evaluate(SETTLED)
        assert page.evaluate("window.hit") is None, path.name
    page.close()
