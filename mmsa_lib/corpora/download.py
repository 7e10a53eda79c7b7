"""Fetch public files: resumed, verified, moved into place only when whole."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from pathlib import Path

import requests
from tqdm import tqdm

from mmsa_lib.errors import DownloadError
from mmsa_lib.files import publish, sha256_of

ATTEMPTS = 4
TIMEOUT = (10, 60)  # seconds to connect, seconds between two blocks
BLOCK = 1 << 16


def fetch(url: str, sha256: str, path: str | Path) -> Path:
    """Bring `url` to `path`; a file there with the right sha256 is kept as it is.

    An interrupted download stays beside it as `<name>.part` and is resumed by the next
    call. Raises `DownloadError` with what to do when the file cannot be had whole, has
    another sha256, or cannot be written; `path` itself is then untouched.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if not url.startswith(("https://", "http://")):
        raise DownloadError(f"only http and https can be fetched, found {url!r}")
    try:
        if path.is_file() and sha256_of(path) == sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _fetch_part(url, part)
        if found != sha256:
            # An old .part may come from another file, or from a login page: once more
            # from the start before anyone is blamed.
            found = _fetch_part(url, part, resume=False)
        if found != sha256:
            part.unlink(missing_ok=True)
            raise DownloadError(
                f"{url} gave a file with sha256 {found}, expected {sha256}. It was "
                "changed at its home or on the way (a proxy, a login page); it was not "
                f"kept. {_by_hand(url, path)}"
            )
        publish(part, path)
    except requests.RequestException as error:
        raise DownloadError(
            f"could not fetch {url}: {_reason(error)}. Run the same command again: it "
            f"resumes. {_by_hand(url, path)}"
        ) from error
    except DownloadError:
        raise
    except OSError as error:
        if part.parent.is_dir():
            part.unlink(missing_ok=True)
        raise DownloadError(
            f"could not write {path}: {disk_remedy(error, path)}"
        ) from error
    return path


def require_terms(name: str, terms: str, accept_terms: bool) -> None:
    """Show the terms of a corpus on stderr; raise unless they were accepted."""
    if not accept_terms:
        raise DownloadError(
            f"nothing was downloaded: {name} comes with terms.\n\n{terms}\n\nIf you "
            "agree, repeat with accept_terms=True (on the command line: "
            f"mmsa-book data get {name} --accept-terms)."
        )
    print(f"Terms of {name}, accepted:\n{terms}", file=sys.stderr)


def disk_remedy(error: OSError, path: Path) -> str:
    """What an operating system error on writing `path` means and what to do."""
    reason = error.strerror or str(error)
    elsewhere = "choose another data folder (--data-dir, or the variable MMSA_DATA)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        home = next((p for p in path.absolute().parents if p.is_dir()), Path("/"))
        free = shutil.disk_usage(home).free / 1e6
        return (
            f"{reason} ({free:,.0f} MB free on this disk; a quota or size limit may be "
            f"lower). Nothing was kept; free some space or {elsewhere}."
        )
    return f"{reason}. Nothing was kept; make the folder writable or {elsewhere}."


def _fetch_part(url: str, part: Path, resume: bool = True) -> str:
    """Download into `part` until it is whole; returns its sha256."""
    if not resume:
        part.unlink(missing_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _read_on(url, part)
            return sha256_of(part)
        except requests.RequestException as error:
            refused = error.response is not None and error.response.status_code < 500
            if refused or attempt == ATTEMPTS:
                raise
            time.sleep(0.1 * 4 ** (attempt - 1))
    raise AssertionError("unreachable")


def _read_on(url: str, part: Path) -> None:
    """One request for what `part` still lacks; from zero if the server has no ranges.

    Raises `requests.ConnectionError` when the body ends before its announced length.
    """
    have = part.stat().st_size if part.exists() else 0
    # Ranges count the bytes that travel, so the server must not compress them.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        if reply.status_code == 416:  # nothing after `have`: whole, or a wrong .part
            return
        reply.raise_for_status()
        sent_range = reply.headers.get("Content-Range", "")
        resumed = reply.status_code == 206 and sent_range.startswith(f"bytes {have}-")
        if reply.status_code == 206 and not resumed:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(f"the server sent range {sent_range!r}")
        start = have if resumed else 0
        length = reply.headers.get("Content-Length")
        total = start + int(length) if length else None
        name = part.name.removesuffix(".part")
        bar = tqdm(  # disable=None: silent where stderr is no terminal
            desc=name, total=total, initial=start, unit="B", unit_scale=True,
            disable=None,
        )  # fmt: skip
        with bar, part.open("ab" if resumed else "wb") as file:
            for block in reply.iter_content(BLOCK):
                file.write(block)
                bar.update(len(block))
            got = file.tell()
    if total is not None and got != total:
        raise requests.ConnectionError(f"it ended after {got} of {total} bytes")


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError):
        return f"the server answered {error.response.status_code}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return f"the download was cut short ({error})"
    return str(error)


def _by_hand(url: str, path: Path) -> str:
    return f"Or download {url} in a browser and save it as {path}."
