"""The program as a whole: it executes nothing that lies where it is called."""

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT, command
from test_press import cell, chapter, make_project

from mmsa_lib import cli
from mmsa_lib.cli import _options
from mmsa_lib.corpora.clips import puppet_clips

CELLS = """\
import argparse, asyncio, json, multiprocessing, numpy, subprocess, sys
from mmsa_lib.used import VALUE
subprocess.run([sys.executable, "-c", "import argparse, numpy"], check=True)
print(VALUE)
"""
CHAPTER = chapter("A") + cell(CELLS, ":tags: [illustration]\n")
ENTRY = "from mmsa_lib.cli import main\n\nmain()\n"  # as pip writes it


def everything() -> list[str]:
    """The name of each module that Python or an installed package has at its top."""
    names = {*sys.stdlib_module_names, *packages_distributions(), "sitecustomize"}
    return sorted(n for n in names - {"__main__"} if n.isidentifier())


@pytest.fixture(params=["root of the book", "its pages", "a folder of clips"])
def mmsa_book(request, tmp_path):
    """Calls the program in a folder of a book where modules are planted."""
    root = make_project(tmp_path / "book", {"a": CHAPTER})
    inside = {"root of the book": ".", "its pages": "book"}
    folder, marker = root / inside.get(request.param, "clips"), tmp_path / "executed"
    folder.mkdir(exist_ok=True)
    for name in everything():
        if name != "mmsa_lib" or folder != root:  # its library stands in its root
            text = f"open({str(marker)!r}, 'a').write('{name} ')\n"
            (folder / f"{name}.py").write_text(text)
    program = tmp_path / "bin" / "mmsa-book"
    program.parent.mkdir()
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ENTRY}")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def call(*arguments: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, str(program), *arguments],
            cwd=folder,
            env=clean | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert not marker.exists(), marker.read_text()
        return done

    call.folder, call.root, call.marker = folder, root, marker
    return call


COMMANDS = {  # with what it says
    "status": (["status"], "never executed"),
    "data list": (["data", "list"], "mosi-text-audio"),
    "data get": (
        ["data", "get", "puppets", "--accept-terms"], "generated when it is loaded",
    ),
    "records list": (["records", "list"], "no records yet"),
    "records show": (["records", "show", "x"], "unknown record 'x'"),
    "records check": (["records", "check"], "0 records match"),
    "run": (["run", "a"], "a: done"),
    "build": (["build"], "the book is ready"),
    "sweep": (["sweep", "a", "--profile", "quick"], "a: done"),
    "clean": (["clean"], "cleaned"),
    "predict": (["predict", "clip.mp4", "--device", "cpu"], "clip.mp4"),
    "train": (["train", "readout", "--clips", ".", "--out", "o"], "label.csv"),
}  # fmt: skip


def commands(app, before: str = "") -> Iterator[str]:
    for one in app.registered_commands:
        yield before + (one.name or one.callback.__name__)
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{before}{group.name} ")


def test_every_command_is_tried():
    assert set(COMMANDS) == set(commands(cli.app))


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_of_the_callers_folder_is_executed(mmsa_book, name):
    arguments, said = COMMANDS[name]
    if name == "predict":
        clip = mmsa_book.folder / "clip.mp4"
        clip.write_bytes(puppet_clips()[0].path.read_bytes())
    done = mmsa_book(*arguments)
    assert said in done.stdout + done.stderr
    if name in ("predict", "build", "run"):
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_pickle_is_read_where_modules_are_planted(mmsa_book):
    code = "import sys; from mmsa_lib.corpora.pickles import load_pickle as load; "
    code += "print(load('a.pkl'))"
    (mmsa_book.folder / "a.pkl").write_bytes(pickle.dumps([1, "a"]))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=mmsa_book.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[1, 'a']\n", done.stderr
    assert not mmsa_book.marker.exists()


def test_planted_modules_would_be_noticed(mmsa_book):
    """Python itself does execute them where it is told to look there."""
    subprocess.run([sys.executable, "-c", "import argparse"], cwd=mmsa_book.folder)
    with pytest.raises(AssertionError, match="argparse"):
        mmsa_book("status")


@pytest.mark.parametrize("device", ["gpu", "GPU", "cuda:first"])
def test_a_device_that_is_none_is_named(tmp_path, capsys, device):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(puppet_clips()[0].path.read_bytes())
    assert command("predict", clip, "--device", device) == 2
    said = capsys.readouterr().err
    assert f"unknown device {device!r}. A GPU is called cuda." in said
    train = ("train", "readout", "--clips", "puppets", "--out", tmp_path / "o")
    assert command(*train, "--device", device) == 2
    assert f"{device!r} is not one of" in capsys.readouterr().err


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
