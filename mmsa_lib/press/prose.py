"""The gate of a chapter's prose: numbers that somebody typed, with their lines.

Markdown is read by markdown-it as MyST reads it, with the extensions of ``_config.yml``
and everything inside a directive (a note, a table, an exercise) as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.attrs import attrs_plugin
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.deflist import deflist_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.footnote import footnote_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin
from mdit_py_plugins.myst_role import myst_role_plugin

from mmsa_lib.press.reading import read_html

EXTENSIONS = {"amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"}
_DECIMAL = re.compile(r"(?<![\w.])[-−+]?\d*\.\d+(?!\w|\.\d)")
_PERCENT = re.compile(
    r"(?<![\w.])\d+(?:\s?%|\s+per ?cent\b)(?!\s+(?:confidence|interval))"
)
_URL = re.compile(r"https?://\S+")
_DIRECTIVE = re.compile(r"\{([^{}\s]+)\}(.*)")
_NOT_PROSE = {"code-cell", "code", "code-block", "math", "raw", "eval-rst"}
_NOT_PROSE |= {"bibliography"}
_EXERCISE = re.compile(r"(?:exercise|solution)-(start|end)")
_OPTION = re.compile(r"\s*:[\w-]+:")
_MARKUP = ("em_", "strong_", "link_", "span_", "html_inline")  # shows nothing itself


def check_prose(text: str) -> Iterator[tuple[int, str]]:
    """Decimal numbers and percentages that somebody typed, with their lines.

    Percentages inside an exercise or its solution are its made-up data.
    """
    for passage in _Reader().passages(text, 1):
        found = list(_DECIMAL.finditer(passage.text))
        found += [] if passage.exercise else _PERCENT.finditer(passage.text)
        for match in sorted(found, key=lambda m: m.start()):
            typed = " ".join(match[0].split())
            yield (
                passage.line_at(match.start()),
                f"{typed} is typed by hand. Take it from a record (runs.say), or name "
                f'its source: [{typed}]{{.given source="..."}}',
            )
        for line, words in passage.unnamed:
            yield (
                line,
                f"[{words}]{{.given ...}} has no source: "
                '{.given source="where from"}',
            )


@dataclass(frozen=True)
class _Passage:
    """Prose of one block as it is shown; line breaks are those of the source."""

    line: int
    text: str
    exercise: bool
    unnamed: tuple[tuple[int, str], ...] = ()  # numbers given without a source

    def line_at(self, position: int) -> int:
        return self.line + self.text.count("\n", 0, position)


class _Reader:
    """Walks through a page; whether it is inside an exercise is known on the way."""

    def __init__(self):
        self._exercise = False

    def passages(self, text: str, first: int) -> Iterator[_Passage]:
        """The prose of Markdown whose first line has the number `first`."""
        for token in _parser().parse(text):
            line = first + (token.map[0] if token.map else 0)
            if token.type == "inline":
                yield _shown(token, line, self._exercise)
            elif token.type in ("fence", "colon_fence"):
                yield from self._directive(token, line)
            elif token.type == "html_block":
                yield from self._html(token.content, line)

    def _directive(self, token: Token, line: int) -> Iterator[_Passage]:
        directive = _DIRECTIVE.match(token.info.strip())
        if not directive or directive[1] in _NOT_PROSE:
            return  # code, in a language or in none
        gate = _EXERCISE.fullmatch(directive[1])
        self._exercise = gate[1] == "start" if gate else self._exercise
        yield from self.passages(directive[2].strip(), line)  # the title of a box
        lines = token.content.split("\n")
        for i in range(_options(lines)):
            lines[i] = ""
        yield from self.passages("\n".join(lines), line + 1)

    def _html(self, content: str, line: int) -> Iterator[_Passage]:
        at = 0
        for text in read_html(content).seen:
            at = max(content.find(text.strip(), at), at)  # entities are not found
            start = line + content.count("\n", 0, at)
            yield _Passage(start, _without_urls(text.strip()), self._exercise)


def _options(lines: list[str]) -> int:
    """How many lines at the head of a directive's content are its options."""
    if lines and lines[0].startswith("---"):
        ends = (i for i, line in enumerate(lines[1:], 2) if line.startswith("---"))
        return next(ends, len(lines))
    count = 0
    while count < len(lines) and _OPTION.match(lines[count]):
        count += 1
    return count


def _shown(token: Token, line: int, exercise: bool) -> _Passage:
    """What a reader sees of running text: no code, no mathematics, no targets."""
    text, unnamed, given, opened = "", [], 0, 0
    for child in token.children or ():
        if child.type == "span_open" and (given or _is_given(child)):
            given += 1
            if given == 1:
                opened, source = len(text), str(child.attrGet("source") or "")
        if child.type == "text":
            text += child.content
        elif child.type == "image":
            text += child.content.replace("\n", " ")
        elif not child.type.startswith(_MARKUP):
            text += " " * (child.type not in ("softbreak", "hardbreak"))
        text += "\n" * child.meta.get("lines", 0)
        if child.type == "span_close" and given:
            given -= 1
            if not given:
                if not re.search(r"\w", source):
                    at = line + text.count("\n", 0, opened)
                    unnamed.append((at, " ".join(text[opened:].split())))
                text = text[:opened] + re.sub(r"[^\n]", " ", text[opened:])
    return _Passage(line, _without_urls(text), exercise, tuple(unnamed))


def _is_given(token: Token) -> bool:
    return "given" in str(token.attrGet("class") or "").split()


def _without_urls(text: str) -> str:
    return _URL.sub(lambda m: " " * len(m[0]), text)


@cache
def _parser() -> MarkdownIt:
    """As `myst_parser` makes it; each inline token knows the line breaks it spans."""
    parser = (
        MarkdownIt("commonmark")
        .enable("table")
        .use(front_matter_plugin)
        .use(myst_block_plugin)
        .use(myst_role_plugin)
        .use(footnote_plugin)
        .disable("footnote_inline")
        .disable("footnote_tail")
        .use(dollarmath_plugin)
        .use(colon_fence_plugin)
        .use(amsmath_plugin)
        .use(deflist_plugin)
        .use(attrs_plugin, spans=True, span_after="footnote_ref")
    )
    for rule in parser.inline.ruler.__rules__:
        parser.inline.ruler.at(rule.name, _counting(rule.fn))
    return parser


def _counting(rule: Callable) -> Callable:
    """A rule that notes on its last token the line breaks that no other token has."""

    def run(state: StateInline, silent: bool) -> bool:
        start, known = state.pos, len(state.tokens)
        if not rule(state, silent):
            return False
        if not silent and state.tokens:
            lines = state.src.count("\n", start, state.pos)
            lines -= sum(t.meta.get("lines", 0) for t in state.tokens[known:])
            if lines:
                meta = state.tokens[-1].meta
                meta["lines"] = meta.get("lines", 0) + lines
        return True

    return run
