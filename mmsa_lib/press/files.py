"""Hashes, atomic writes and the places under ``_build``."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def sha256(content: bytes | str) -> str:
    """The hash of bytes, or of a text in UTF-8, as hex."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """The hash of a file's content, as hex."""
    return sha256(path.read_bytes())


def digest(value) -> str:
    """sha256 of anything JSON can write, whatever the order of its keys."""
    return sha256(json.dumps(value, sort_keys=True, default=str))


def write_atomic(path: Path, content: str) -> None:
    """All of the text or nothing: a kill or a full disk leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
