"""Files on the ground floor: whole or not at all, hashes, and the checkout's root."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout, when there is one


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
