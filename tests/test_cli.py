"""The program as a whole: it executes nothing that lies where it is called."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT, command
from test_press import cell, chapter, make_project

from mmsa_lib.cli import _options
from mmsa_lib.corpora.clips import puppet_clips

CHAPTER = chapter("A") + cell("import json, numpy\nprint(1)", ":tags: [illustration]\n")
PLANTED = ("argparse", "av", "json", "numpy", "mmsa_lib", "jupyter_book", "torch")


@pytest.fixture
def mmsa_book(tmp_path):
    """Calls the program in a folder of a book where modules are planted."""
    root = make_project(tmp_path / "book", {"a": CHAPTER})
    folder, marker = root / "clips", tmp_path / "executed"
    folder.mkdir()
    for name in PLANTED:
        text = f"open({str(marker)!r}, 'a').write('{name} ')\n"
        (folder / f"{name}.py").write_text(text)
    program = tmp_path / "bin" / "mmsa-book"  # as pip writes it for an entry point
    program.parent.mkdir()
    program.write_text("from mmsa_lib.cli import main\n\nmain()\n")

    def call(*arguments: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, str(program), *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert not marker.exists(), marker.read_text()
        return done

    call.folder = folder
    return call


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status"], "never executed"),
        (["data", "list"], "mosi-text-audio"),
        (["data", "get", "puppets", "--accept-terms"], "generated when it is loaded"),
        (["records", "list"], "no records yet"),
        (["run", "a"], "a: done"),
        (["sweep", "a", "--profile", "quick"], "a: done"),
        (["train", "readout", "--clips", ".", "--out", "o"], "label.csv"),
    ],
)
def test_nothing_of_the_callers_folder_is_executed(mmsa_book, arguments, said):
    done = mmsa_book(*arguments)
    assert said in done.stdout + done.stderr


def test_clips_are_scored_where_they_lie(mmsa_book):
    clip = mmsa_book.folder / "clip.mp4"
    clip.write_bytes(puppet_clips()[0].path.read_bytes())
    done = mmsa_book("predict", "clip.mp4", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "clip.mp4"


def test_rendering_executes_nothing_of_the_callers_folder(mmsa_book):
    done = mmsa_book("build")  # Jupyter Book too is a process of its own
    assert done.returncode == 0, done.stdout + done.stderr
    assert (mmsa_book.folder.parent / "_build/html/index.html").is_file()


def test_planted_modules_would_be_noticed(mmsa_book):
    """Python itself does execute them where it is told to look there."""
    for how in (["-c", "import argparse"], ["-m", "mmsa_lib"]):
        done = subprocess.run(
            [sys.executable, *how], cwd=mmsa_book.folder, capture_output=True
        )
        assert done.returncode == 0
    with pytest.raises(AssertionError, match="argparse mmsa_lib"):
        mmsa_book("status")


def test_data_asks_where_somebody_can_answer(monkeypatch, tmp_path, capsys):
    class Terminal:
        def isatty(self):
            return True

        def readline(self):
            return "n\n"

    monkeypatch.setattr(sys, "stdin", Terminal())
    get = ("data", "get", "mosei-video", "--data-dir", tmp_path)
    assert command(*get) == 1
    printed = capsys.readouterr()
    assert "Do you agree?" in printed.out + printed.err
    assert command(*get, "-p", "path") == 1
    assert "an option needs a name and a value" in capsys.readouterr().err
    assert command("data", "get", "mosei") == 2
    assert "mosei-video" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "pair", "value"),
    [
        ("clips", "folder=2024", "2024"),
        ("mosei-video", "path=010", "010"),
        ("mosei-video", "path=a=b.npz", "a=b.npz"),
        ("mosi-text-audio", "encoder=12", "12"),
        ("mosi-text-audio", "batch_size=010", 10),
        ("mosi-text-audio", "text_features=yes", "yes"),
    ],
)
def test_options_of_a_corpus_are_what_was_written(name, pair, value):
    option = pair.partition("=")[0]
    found = _options(name, [pair])
    assert found == {option: value}


def test_wrong_options_of_a_corpus_are_refused(tmp_path, capsys):
    get = ("data", "get", "mosi-text-audio", "--data-dir", tmp_path, "-p")
    assert command(*get, "batch_size", "many") == 1
    assert "option batch_size of mosi-text-audio" in capsys.readouterr().err
    assert command(*get, "encodr", "x") == 2
    assert "Did you mean 'encoder'?" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_command_prints_on_any_terminal(tmp_path, monkeypatch, encoding):
    """Names that the terminal's encoding lacks are escaped, never an error."""
    odd = os.fsdecode(b"caf\xe9 \xe6\x97\xa5")
    text = chapter("\u65e5\u672c \u2014 A") + cell(
        "print('\u65e5\u672c')", ":tags: [illustration]\n"
    )
    root = make_project(tmp_path / "\u65e5", {"a": text})
    monkeypatch.chdir(root)
    for arguments, status in (
        (["status"], 0),
        (["status", "--json"], 0),
        (["data", "list"], 0),
        (["records", "list"], 0),
        (["records", "show", odd], 2),
        (["records", "check"], 0),
        (["run", odd], 2),
        (["run", "a", "-p", odd, "1"], None),
        (["train", "readout", "--clips", odd, "--out", str(tmp_path / odd)], 1),
        (["data", "get", odd], 2),
        (["clean"], 0),
    ):
        raws = {name: io.BytesIO() for name in ("stdout", "stderr")}
        for name, raw in raws.items():
            stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
            monkeypatch.setattr(sys, name, stream)
        found = command(*arguments)
        sys.stdout.flush(), sys.stderr.flush()
        said = [raw.getvalue().decode(encoding) for raw in raws.values()]
        assert found == status or (status is None and found), (arguments, said)
        assert any(said) and "Traceback" not in said[1], arguments
