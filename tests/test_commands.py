"""Every command that a reader is told to type is one that the program understands.

They are found in README, CONTRIBUTING, the pages and in every text of the library
(error messages, docstrings, help), and bound by the command line itself: each option
and argument, each name of a chapter, parameter, corpus or profile. What needs neither
data nor long work is executed.
"""

import ast
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer
from conftest import ROOT, command

from mmsa_lib import cli, corpora
from mmsa_lib.press.chapters import open_book
from mmsa_lib.press.cli import _join_pairs, _parameters
from mmsa_lib.press.values import seeds_of

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted((ROOT / "book").glob("*.md"))
SOURCES = sorted((ROOT / "mmsa_lib").rglob("*.py"))
# at once, and without data
QUICK = {"status", "records list", "records check", "data list"}
_CALL = re.compile(r"(?<![\w/-])mmsa-book(?=\s)")
_PLACEHOLDER = re.compile(r"<\w+>|\.\.\.|…|[A-Z][A-Z_-]*(\.\w+)?")


@dataclass(frozen=True)
class Found:
    """A command, where it stands, and what stands around it."""

    words: tuple[str, ...]
    where: str
    around: str = ""
    whole: bool = True  # not only the name of a command, in running text

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def root_command():
    return typer.main.get_command(cli.app)


def path_of(words) -> tuple[list[str], object]:
    """The names of the command and subcommand that words begin with, and what it is."""
    here, names = root_command(), []
    for word in words:
        inside = getattr(here, "commands", {})
        if word not in inside:
            break
        here = inside[word]
        names.append(word)
    return names, here


def in_prose(text: str) -> list[str]:
    """The words of a command in running text: its name, its options, placeholders."""
    words = text.split()
    names, here = path_of([w.strip("`'\").,;:") for w in words])
    found, rest = list(names), words[len(names) :]
    if names and words[len(names) - 1].strip("`'\").,;:") != words[len(names) - 1]:
        return found
    options = {o: p for p in here.params for o in getattr(p, "opts", ())}
    while rest:
        word = rest.pop(0)
        clean = word.strip("`'\").,;:")
        if clean in options:
            found.append(clean)
            if not options[clean].is_flag:
                taken = 2 if clean == "-p" else 1
                found += [w.strip("`'\").,;:") for w in rest[:taken]]
                rest = rest[taken:]
        elif _PLACEHOLDER.fullmatch(clean) or clean in corpora.names():
            found.append(clean)
        else:
            break
        if word[-1] in ").,;:`":
            break
    return found


def commands_in(text: str, where: str) -> list[Found]:
    """Calls of mmsa-book in the text of a message or a docstring."""
    found = []
    joined = re.sub(r"\\\n\s*", " ", text)
    for match in _CALL.finditer(joined):
        line = joined[joined.rfind("\n", 0, match.start()) + 1 : match.start()]
        after = joined[match.end() :]
        own = re.fullmatch(r"\s+|\s*Example: |\s*torchrun [^`]*|", line)
        if own and ("\n" in joined or line):
            words = shlex.split(after.partition("\n")[0], comments=True)
            if path_of(words)[0] and (line.strip() or line):
                found.append(Found(tuple(words), where, text))
                continue
        words = in_prose(after)
        names, _ = path_of(words)
        if words:
            found.append(Found(tuple(words), where, text, len(words) > len(names)))
    return found


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def inline_code(text: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(s.split()) for s in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def of_pages() -> list[Found]:
    """Commands of pages: lines of shell blocks, and code inside running text."""
    found = []
    for path in PAGES:
        text, where = path.read_text("utf-8"), path.name
        for line in shell_lines(text):
            found.append(Found(tuple(shlex.split(line, comments=True)), where, text))
        for code in inline_code(text):
            first = code.partition(" ")[0]
            if first in ("mmsa-book", "make", "torchrun", "bash", "conda", "pip", "-p"):
                words = tuple(shlex.split(code.removeprefix("(")))
                names, _ = path_of(words[1:])
                # a name, or a method of training, is spoken of without the rest
                more = words[1 + len(names) :]
                whole = bool(more) and (names != ["train"] or len(more) > 1)
                found.append(Found(words, where, text, whole))
    return found


def of_sources() -> list[Found]:
    """Commands in the strings of the library, with what is filled in filled in."""
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text("utf-8"))
        constants = {
            t.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for t in node.targets
            if isinstance(t, ast.Name)
        }
        inside = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(_filled(part, constants) for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = "" if id(node) in inside else node.value
            else:
                continue
            where = f"{path.relative_to(ROOT)}, line {getattr(node, 'lineno', 0)}"
            found += commands_in(text, where)
    return found


def _filled(part: ast.expr, constants: dict) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    name = ast.unparse(part.value)
    if name in constants:
        return str(constants[name])
    return {"name": "mosi-text-audio", "options": ""}.get(name, "FILLED")


# ---------------------------------------------------------------- binding


def bind(words, whole: bool = True) -> tuple[list[str], dict]:
    """The names of a command and its parameters, bound by the command line itself."""
    words = [w for w in words if w not in ("...", "…")]
    names, here = path_of(words)
    assert names, f"no such command: {words}"
    if not whole:
        return names, {}
    assert not hasattr(here, "commands"), f"no such command: {words}"
    arguments = _join_pairs(words[len(names) :])
    with here.make_context(" ".join(names), arguments) as context:
        return names, dict(context.params)


def check(names: list[str], given: dict, around: str) -> None:
    """The names that a command is given exist."""
    book = open_book(ROOT)

    def known(chapter: str) -> bool:
        made = f"book/{chapter}.md" in around  # by what the page tells to do
        return not (_PLACEHOLDER.fullmatch(chapter) or made)

    if given.get("profile"):
        book.profile(given["profile"])
    match names:
        case ["run"]:
            if known(given["chapter"]):
                _parameters(book[given["chapter"]], given["p"] or [])
        case ["sweep"]:
            for chapter in given["chapters"] or ():
                _parameters(book[chapter], given["p"] or [])
            for name in filter(None, given["corpora"].split(",")):
                corpora.describe(name)
            seeds_of(given["seeds"] or "0")
        case ["data", "get"]:
            if not _PLACEHOLDER.fullmatch(given["name"]):
                cli._options(given["name"], given["p"] or [])
        case ["train"]:
            cli._seeds(given["seeds"])


def told() -> list[Found]:
    found = []
    for one in of_pages():
        if "mmsa-book" in one.words:  # after torchrun, too
            at = one.words.index("mmsa-book") + 1
            words = one.words[at:]
            if words:  # else only the program is spoken of
                whole = one.whole and words != ("train",)
                found.append(replace(one, words=words, whole=whole))
    return found + of_sources()


TOLD = told()


@pytest.mark.parametrize("one", TOLD, ids=[f"{i}-{one}" for i, one in enumerate(TOLD)])
def test_a_command_that_is_told_is_understood(one):
    words, partial = one.words, {"...", "…"} & set(one.words)
    if words[:2] == ("train", "NAME"):
        words, partial = ("train", "readout", *words[2:]), True
    if partial and words[0] == "train":  # what stands for the dots is needed
        words = (*words, "--clips", "CLIPS", "--out", "OUT")
    names, given = bind(words, one.whole)
    if one.whole:
        check(names, given, one.around)


def test_commands_are_found_in_every_place():
    places = {one.where.partition(",")[0] for one in TOLD}
    assert places >= {"README.md", "CONTRIBUTING.md", "index.md", "troubleshooting.md"}
    assert places >= {"mmsa_lib/corpora/mosei_video.py", "mmsa_lib/cli.py"}
    words = [" ".join(one.words) for one in TOLD]
    assert words.count("data get mosei-video -p path FILE") >= 4
    assert "data get mosi-text-audio --accept-terms" in words
    assert {one.words[0] for one in TOLD if one.words} >= {"run", "train", "predict"}


@pytest.mark.parametrize(
    "text",
    [
        "mmsa-book data get mosei-video --path FILE",
        "mmsa-book data fetch NAME",
        "mmsa-book run baselin --profile full",
        "mmsa-book run baselines -p epoch 3",
        "mmsa-book run baselines --profil full",
        "mmsa-book data get mosei -p path FILE",
        "mmsa-book sweep baselines --seeds 0,0",
        "mmsa-book train oracle --clips C --out O",
        "mmsa-book train readout --clips C",
    ],
)
def test_a_wrong_command_would_be_noticed(text):
    words = shlex.split(text)[1:]
    with pytest.raises((Exception, SystemExit)):
        check(*bind(words), around="")


def test_commands_in_running_text_are_cut_out():
    for text, words in {
        "run it (mmsa-book data get NAME), or": "data get NAME",
        "that mmsa-book train has made": "train",
        "Score clips: mmsa-book predict --model FOLDER.": "predict --model FOLDER",
        "Get it with\n\n    mmsa-book data get a -p b c\n\nor": "data get a -p b c",
        "Example: mmsa-book run a -p seeds '[0, 1]'\n": "run a -p seeds [0, 1]",
        "    mmsa-book train readout \\\n        --clips X": "train readout --clips X",
    }.items():
        (found,) = commands_in(text, "here")
        assert " ".join(found.words) == words


@pytest.mark.parametrize("name", sorted(QUICK))
def test_what_is_quick_is_executed(name, monkeypatch, capsys):
    assert any(" ".join(one.words).startswith(name) for one in TOLD)
    monkeypatch.chdir(ROOT)
    assert command(*name.split()) == 0, capsys.readouterr()


def test_getting_a_corpus_from_a_file_reads_that_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = {
        one.words for one in TOLD if one.words[:3] == ("data", "get", "mosei-video")
    }
    for words in lines:
        more = ["--accept-terms", "--data-dir", tmp_path]
        assert command(*words, *more) == 1
        said = capsys.readouterr().err
        assert "FILE" in said and "is read from a file that is not there" in said


# ---------------------------------------------------------------- other programs


OTHERS = [one for one in of_pages() if "mmsa-book" not in one.words]


@pytest.mark.parametrize(
    "one", OTHERS, ids=[f"{i}-{one}" for i, one in enumerate(OTHERS)]
)
def test_other_commands_of_the_pages_find_what_they_name(one):
    words = [w for w in one.words if w != "&&"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in re.findall(r"\[(\w+)\]", " ".join(words)) if "pip" in words[0] else ():
        assert name in extras["optional-dependencies"]
    if words[0] == "make":
        done = subprocess.run(
            ["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    elif words[0] == "-p":
        chapters = open_book(ROOT).chapters
        own = chapters.get(Path(one.where).stem)
        having = [c for c in chapters.values() if words[1] in c.parameters]
        for chapter in [own] if own else having[:1]:
            _parameters(chapter, _join_pairs(list(words))[1::2])
        assert own or having or words[1:] in ((), ("profile", "NAME"))
    else:
        for word in words[1:]:
            made = word in one.around.replace(" ".join(one.words), "")
            if re.fullmatch(r"[\w./-]+\.(yml|py|txt)|\.ci/\w+", word) and not made:
                assert (ROOT / word).is_file(), word
