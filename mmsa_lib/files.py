"""Files on the ground floor: texts, whole writes, hashes, and how Python is started."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mmsa_lib.errors import BookError

ROOT = Path(__file__).resolve().parent.parent  # the checkout, when there is one

# -P leaves the current folder out, and only the package is taken from its own: a
# json.py beside either is never imported
_FIND = """\
import sys
from importlib import util
found = util.spec_from_file_location(
    "mmsa_lib", {file!r}, submodule_search_locations=[{folder!r}]
)
sys.modules["mmsa_lib"] = util.module_from_spec(found)
found.loader.exec_module(sys.modules["mmsa_lib"])
"""


def python(program: str, library: Path | None = None) -> list[str]:
    """The start of a command: `program` in this Python, with this mmsa_lib or another.

    library: the folder that holds the other. What else lies there, or in the folder
    where the command runs, is never imported.
    """
    own = Path(__file__).resolve().parent
    folder = own if library is None else library.resolve() / own.name
    found = _FIND.format(file=str(folder / "__init__.py"), folder=str(folder))
    return [sys.executable, "-P", "-c", found + program]


def sha256(content: bytes | str) -> str:
    """The hash of bytes, or of a text in UTF-8, as hex."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: str | Path) -> str:
    """The hash of a file's content, as hex; the file is read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value) -> str:
    """sha256 of anything JSON can write, whatever the order of its keys."""
    return sha256(json.dumps(value, sort_keys=True, default=str))


def publish(part: str | Path, path: str | Path) -> None:
    """Put the finished file `part` in the place of `path`, its content on the disk."""
    with Path(part).open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def printable(text: object) -> str:
    """A name on one line that any file and any terminal can hold.

    What cannot be shown is escaped: a line break is ``\\n``, the byte E9 of a name that
    is not UTF-8 is ``\\udce9``.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )


@contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """A path beside `path` to write to; it takes that place if the block ends well.

    A kill or a full disk leaves the old file. The folder is made. Raises `OSError`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield part
        publish(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """All of the content (a text in UTF-8) or nothing, see `replacing`."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as part:
        part.write_bytes(data)


def read_text(path: str | Path, shown: str) -> str:
    """A text in UTF-8, without a byte order mark and with plain ends of lines.

    shown: the file's name in messages. Raises `BookError` with the line of a byte that
    is not UTF-8.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BookError(
            f"{shown}, line {line}: the byte {data[error.start]:02X} is not UTF-8. "
            "Save the file in the encoding UTF-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_yaml(
    text: str,
    shown: str,
    first: int = 1,
    as_written: bool = False,
    texts: bool = False,
):
    """The value of a text in YAML; None if it is empty.

    shown: the file's name in messages; first: the number of its first line there.
    as_written: dates, ``1:30`` and ``yes`` are texts, ``010`` is ten. texts: so is
    every other value that is no list or mapping. Raises `BookError` with file and line.
    """
    import yaml
    from yaml.reader import ReaderError

    try:
        return yaml.load(text, _loader(as_written, _is_plain(text), texts))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, why = mark.line if mark else 0, error.problem or error.context
    except ReaderError as error:
        line = text.count("\n", 0, error.position)
        why = "a character that may not stand there"
    except RecursionError:
        line, why = 0, "its values are nested too deep"
    line = first + min(line, text.rstrip().count("\n"))
    raise BookError(f"{shown}, line {line}: this cannot be read as YAML: {why}")


def line_in_yaml(text: str, *path: str | int) -> int:
    """The line, from 1, of what lies at the end of a path of keys and positions.

    Of a path that ends early the line of the last part that is there.
    """
    import yaml

    node, line = yaml.compose(text, _loader(False, _is_plain(text))), 1
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if pair[0].value == str(step)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            found = [(child, child) for child in node.value[step : step + 1]]
        else:
            break
        if not found:
            break
        line, node = found[-1][0].start_mark.line + 1, found[-1][1]
    return line


def _is_plain(text: str) -> bool:
    """Whether no nesting in it can exhaust the stack of the loader written in C."""
    return sum(map(text.count, "[{?-")) < 10_000


@cache
def _loader(as_written: bool, fast: bool, texts: bool = False) -> type:
    """A safe loader of YAML; fast: the one in C, where it was built."""
    import yaml
    from yaml.constructor import ConstructorError

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if fast else yaml.SafeLoader

    class Loader(base):
        def construct_object(self, node, deep=False):
            try:
                return super().construct_object(node, deep)
            except (
                ValueError,
                TypeError,
                OverflowError,
            ) as error:  # such as 2026-13-01
                raise ConstructorError(
                    None, None, str(error), node.start_mark
                ) from error

    if texts:
        Loader.yaml_implicit_resolvers = {}
        return Loader
    if not as_written:
        return Loader
    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag not in _AS_WRITTEN]
        for first, rules in Loader.yaml_implicit_resolvers.items()
    }
    for tag, (rule, first) in _AS_WRITTEN.items():
        if rule:
            Loader.add_implicit_resolver(tag, re.compile(rf"(?:{rule})$"), first)
    Loader.add_constructor(_TAG + "int", lambda loader, node: int(node.value))
    return Loader


_TAG = "tag:yaml.org,2002:"
_AS_WRITTEN = {  # tag: what is read so, and how it may begin
    f"{_TAG}bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    f"{_TAG}int": ("[-+]?[0-9]+", "-+0123456789"),
    f"{_TAG}float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?",
        "-+.0123456789",
    ),
    f"{_TAG}timestamp": ("", ""),
}
