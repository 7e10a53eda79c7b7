"""Downloads against a local server that resumes, truncates, lies and fails."""

import errno
import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmsa_lib import files
from mmsa_lib.corpora import download
from mmsa_lib.corpora.download import fetch, require_terms
from mmsa_lib.errors import DownloadError

BODY = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves BODY; what it does wrong is set on the server as `faults`."""

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append((wanted, self.headers.get("Accept-Encoding")))
        fault = server.faults.pop(0) if server.faults else server.always
        if fault == "404" or fault == "503":
            return self.send_error(int(fault))
        body = b"<html>please log in</html>" if fault == "lie" else BODY
        start = 0
        if wanted and fault not in ("no ranges", "lie"):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            said = 7 if fault == "wrong range" else start
            self.send_header("Content-Range", f"bytes {said}-{len(body) - 1}/x")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = {"cut": start + 300_000, "cut at once": start}.get(fault, len(body))
        self.wfile.write(body[start:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.faults, server.always = [], [], None
        server.url = f"http://127.0.0.1:{server.server_port}/features.bin"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_arrives_whole_once(server, tmp_path, capfd):
    path = tmp_path / "deep" / "features.bin"
    assert fetch(server.url, SHA256, path) == path
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["features.bin"]
    fetch(server.url, SHA256, path)
    assert server.requests == [(None, "identity")]  # the second call asked nothing
    out, err = capfd.readouterr()
    assert out == err == ""  # no progress bar where there is no terminal


KEPT = 300_000 // download.BLOCK * download.BLOCK  # of a cut reply, whole blocks


def test_a_cut_download_is_resumed(server, tmp_path):
    server.faults = ["cut", "cut"]
    fetch(server.url, SHA256, tmp_path / "f")
    ranges = [asked for asked, _ in server.requests]
    assert ranges == [None, f"bytes={KEPT}-", f"bytes={2 * KEPT}-"]
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_download_cut_every_time_is_kept_for_the_next_call(server, tmp_path):
    server.faults = ["cut"]
    server.always = "503"
    with pytest.raises(DownloadError) as caught:
        fetch(server.url, SHA256, tmp_path / "f")
    message = str(caught.value)
    assert "503" in message and "it resumes" in message
    assert server.url in message and str(tmp_path / "f") in message
    assert [p.name for p in tmp_path.iterdir()] == ["f.part"]
    server.always = None
    fetch(server.url, SHA256, tmp_path / "f")
    assert server.requests[-1][0] == f"bytes={KEPT}-"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_truncated_download_is_never_taken_for_whole(server, tmp_path):
    """Not even when the hash that was asked for is that of the truncated bytes."""
    of_the_head = hashlib.sha256(BODY[:300_000]).hexdigest()
    server.faults = ["cut", "404"]
    with pytest.raises(DownloadError, match="404"):
        fetch(server.url, of_the_head, tmp_path / "f")
    assert [p.name for p in tmp_path.iterdir()] == ["f.part"]
    (tmp_path / "f.part").unlink()
    server.faults, server.always = [], "cut at once"
    with pytest.raises(DownloadError, match=r"was cut short|ended after 0 of"):
        fetch(server.url, SHA256, tmp_path / "f")
    assert len(server.requests) == 2 + download.ATTEMPTS
    assert not (tmp_path / "f").exists()


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    (tmp_path / "f.part").write_bytes(BODY[:1000])
    server.always = "no ranges"
    fetch(server.url, SHA256, tmp_path / "f")
    assert server.requests[0][0] == "bytes=1000-"
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_wrong_range_is_not_glued_on(server, tmp_path):
    (tmp_path / "f.part").write_bytes(BODY[:1000])
    server.faults = ["wrong range"]
    fetch(server.url, SHA256, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


@pytest.mark.parametrize("left", [b"<html>" * 50, BODY + b"more", BODY])
def test_a_part_of_another_file_is_replaced(server, tmp_path, left):
    (tmp_path / "f.part").write_bytes(left)
    fetch(server.url, SHA256, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_another_content_is_refused_with_both_hashes(server, tmp_path):
    server.always = "lie"
    with pytest.raises(DownloadError) as caught:
        fetch(server.url, SHA256, tmp_path / "f")
    message = str(caught.value)
    assert SHA256 in message
    assert hashlib.sha256(b"<html>please log in</html>").hexdigest() in message
    assert "in a browser and save it as" in message
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_on_disk_is_replaced_only_by_a_good_one(server, tmp_path):
    (tmp_path / "f").write_bytes(b"damaged")
    server.always = "lie"
    with pytest.raises(DownloadError):
        fetch(server.url, SHA256, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"damaged"
    server.always = None
    fetch(server.url, SHA256, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_refusals_are_not_repeated_and_silence_is_an_error(server, tmp_path):
    server.always = "404"
    with pytest.raises(DownloadError, match="the server answered 404"):
        fetch(server.url, SHA256, tmp_path / "f")
    assert len(server.requests) == 1
    with pytest.raises(DownloadError, match="could not fetch http://127"):
        fetch("http://127.0.0.1:9/nobody", SHA256, tmp_path / "f")
    with pytest.raises(DownloadError, match="only http and https"):
        fetch("file:///etc/hostname", SHA256, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_real_size_limit_is_explained_and_leaves_nothing(server, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(DownloadError, match="MB free on this disk"):
            fetch(server.url, SHA256, tmp_path / "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_failing_disk_is_explained_and_leaves_nothing(
    server, tmp_path, monkeypatch, code
):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(DownloadError, match=rf"{os.strerror(code)}.*MMSA_DATA"):
        fetch(server.url, SHA256, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="could not write"):
        fetch(server.url, SHA256, tmp_path / "file" / "f")


def test_terms_must_be_accepted_and_are_shown(capsys):
    with pytest.raises(DownloadError, match=r"(?s)Be kind.*get mosi --accept-terms"):
        require_terms("mosi", "Be kind.", accept_terms=False)
    require_terms("mosi", "Be kind.", accept_terms=True)
    assert "Be kind." in capsys.readouterr().err
