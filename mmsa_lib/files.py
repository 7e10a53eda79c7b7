"""Files on the ground floor: whole or not at all, hashes, and how Python is started."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

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
