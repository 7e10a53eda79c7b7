"""Each heading of the troubleshooting page is raised here, as a reader meets it."""

import errno
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from processes import start
from test_press import chapter, make_project, mmsa_book
from toy import ToyModel, toy_corpus

from mmsa_lib import corpora, errors, metrics, runs, statistics
from mmsa_lib.corpora import download, mosi_text_audio, store
from mmsa_lib.corpora.pickles import load_pickle
from mmsa_lib.corpora.schema import Ragged, make_corpus
from mmsa_lib.nets import Encoder, FusionConfig, LateFusion
from mmsa_lib.nets.trained import freeze
from mmsa_lib.press.chapters import find_root, open_book
from mmsa_lib.training import TrainConfig, evaluate, fit

PAGE = ROOT / "book" / "troubleshooting.md"
HEADINGS = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
CASES = {}  # function name -> (heading, function)


def raises(heading: str):
    """The function raises an error, or returns what a command printed, that begins as
    this heading of the page; dots stand for anything."""

    def register(function):
        assert function.__name__ not in CASES
        CASES[function.__name__] = (heading, function)
        return function

    return register


def begins(text: str, heading: str) -> bool:
    parts = [re.escape(part) for part in heading.split("…")]
    return re.match(".+".join(parts), text, re.DOTALL) is not None


def said(capsys, *arguments: str) -> str:
    """What the command printed of its error."""
    _, printed = mmsa_book(capsys, *arguments)
    return printed.rpartition("error: ")[2]


def make(tmp_path, answer: str, fake: str) -> str:
    """`make env` with a Python that refuses the `fake` question it is asked."""
    python = tmp_path / "python3"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *{fake}*) exit 1;; -V) echo {answer};; esac\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        [
            "make",
            "--no-print-directory",
            "env",
            f"PYTHON={python}",
            f"VENV={tmp_path}/venv",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode and not (tmp_path / "venv").exists()
    return done.stdout


# ---------------------------------------------------------------- installing


@raises("Python 3.11 or newer is needed; '…' is …")
def old_python(tmp_path):
    return make(tmp_path, "Python 3.9.2", "version_info")


@raises("This Python cannot create environments: venv or ensurepip is missing.")
def no_venv(tmp_path):
    return make(tmp_path, "Python 3.12.1", "ensurepip")


@raises("… mmsa-book: command not found")
def no_command(tmp_path):
    done = subprocess.run(
        ["/bin/bash", "-c", "mmsa-book status"],
        env={"PATH": str(tmp_path), "LC_ALL": "C"},
        capture_output=True,
        text=True,
    )
    return done.stderr


@raises("No module named 'mmsa_lib'")
def another_python():
    program = "import mmsa_lib"  # -I -S: as a Python that has nothing installed
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True
    )
    return done.stderr.rpartition("ModuleNotFoundError: ")[2]


@raises("no book here: neither … nor a folder above it has _toc.yml and _config.yml.")
def another_folder(tmp_path):
    find_root(tmp_path)


@raises('device="cuda" was asked for but no GPU is visible.')
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    TrainConfig(device="cuda")


# ---------------------------------------------------------------- data


@raises("unknown corpus '…'.")
def unknown_corpus():
    corpora.load("mossi-text-audio")


@raises("nothing was downloaded: … comes with terms.")
def terms(tmp_path):
    corpora.prepare("mosi-text-audio", tmp_path)


@raises("could not fetch …")
def no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    download.fetch("http://127.0.0.1:9/a.csv", "0" * 64, tmp_path / "a.csv")


@raises("… gave a file with sha256 …, expected …")
def login_page(tmp_path, monkeypatch):
    def answer(url, part):
        part.write_bytes(b"<html>Log in</html>")

    monkeypatch.setattr(download, "_read_on", answer)
    download.fetch("https://example.org/a.csv", "0" * 64, tmp_path / "a.csv")


@raises("could not write …")
def full_disk(tmp_path, monkeypatch):
    def full(url, part):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "_read_on", full)
    download.fetch("https://example.org/a.csv", "0" * 64, tmp_path / "a.csv")


@raises("mosi-text-audio with text by … is not in …")
def mosi_is_not_there(tmp_path):
    corpora.load("mosi-text-audio", tmp_path)


@raises("mosei-video is read from a file that is not there: …")
def mosei_is_not_there(tmp_path):
    corpora.load("mosei-video", tmp_path)


@raises("the text encoder '…' could not be loaded: …")
def no_encoder(tmp_path):
    mosi_text_audio.encode(["great"], str(tmp_path))


@raises("… holds the global …, which is neither a numpy array nor a plain container.")
def foreign_pickle(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Path("a")))
    load_pickle(tmp_path / "a.pkl")


@raises("… is not a whole pickle")
def cut_pickle(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": 1})[:-5])
    load_pickle(tmp_path / "a.pkl")


@raises("… is not a .npz of plain arrays")
def objects_in_npz(tmp_path):
    ids = np.array(["a_1", "b_1"], dtype=object)
    np.savez(tmp_path / "a.npz", id=ids, text_lengths=[1, 1], text_features=np.eye(2))
    mosi_text_audio.read_text_features(tmp_path / "a.npz", ["a_1"])


@raises("modality '…' holds NaN or infinite values in … samples")
def nan_features():
    corpus = toy_corpus()
    train = corpus.train
    silent = [train.features["audio"][i] for i in range(len(train))]
    silent[3] = silent[3] * np.nan
    bad = train._with(features=train.features | {"audio": Ragged.from_list(silent)})
    make_corpus(corpus.card, {"train": bad})


@raises("id '…' occurs in split '…' and again in '…'")
def sample_in_two_splits():
    corpus = toy_corpus()
    again = corpus.valid._with(ids=corpus.train.ids[:16])
    make_corpus(corpus.card, {"train": corpus.train, "valid": again})


@raises("the store in … is damaged: …")
def cut_store(tmp_path):
    store.write(toy_corpus(), tmp_path)
    (data,) = (p for p in tmp_path.iterdir() if p.suffix == ".safetensors")
    data.write_bytes(data.read_bytes()[:-100])
    store.open_store(tmp_path)


# ---------------------------------------------------------------- training


def train(loss=None, model=ToyModel, corpus=None, **changes):
    corpus = corpus or toy_corpus()
    config = TrainConfig(epochs=1, device="cpu", **changes)
    return fit(lambda: model(corpus.dims), corpus, config, loss=loss)


@raises("the labels of the 'test' split are sealed.")
def look_at_the_test():
    toy_corpus().test.labels["sentiment"]


@raises("the weights changed after validation had frozen them")
def weights_changed():
    corpus = toy_corpus()
    frozen = train(corpus=corpus)
    frozen.module.regressor.bias.data += 1
    evaluate(frozen, corpus)


@raises("the loss is nan at epoch …, batch …")
def diverged():
    train(lambda output, batch: output.predictions["sentiment"].mean() * np.nan)


@raises("a gradient is NaN or infinite at epoch …")
def root_of_zero():
    train(lambda output, batch: (output.predictions["sentiment"] * 0).sqrt().sum())


@raises("no parameter of the model requires a gradient")
def all_frozen():
    train(model=lambda dims: freeze(ToyModel(dims)))


@raises("features of '…' are …; the model was built for (batch, steps, …).")
def other_widths():
    corpus = toy_corpus()
    model = LateFusion(FusionConfig(corpus.dims | {"audio": 7}, layers=1))
    model(corpus.train.batch([0, 1]))


@raises("the batch holds …, which the model was not built for")
def too_many_modalities():
    model = LateFusion(FusionConfig({"text": 6}, layers=1))
    model(toy_corpus().train.batch([0, 1]))


@raises("every modality is missing for … samples")
def nothing_left():
    corpus = toy_corpus()
    gone = np.arange(len(corpus.train)) == 1
    empty = corpus.train.without(dict.fromkeys(corpus.modalities, gone))
    LateFusion(FusionConfig(corpus.dims, layers=1))(empty.batch([0, 1]))


@raises("the checkpoint … belongs to another run")
def other_checkpoint(tmp_path):
    train(checkpoint=str(tmp_path))
    train(checkpoint=str(tmp_path), lr=1e-2)


@raises("… heads do not divide width …; choose a divisor")
def odd_heads():
    Encoder(width=40, layers=1, heads=7)


@raises("truth must be (n,) or (n, 1), found …")
def two_columns():
    metrics.mae(np.zeros((4, 2)), np.zeros(4))


@raises("one seed cannot be compared; run at least 2, better 5")
def one_seed():
    statistics.compare([1.0], [0.9], "mae", names=("a", "b"))


@raises("synthetic and real results never share a table; make two tables")
def mixed_table():
    made = runs.RunRecord("a", "training", "2026", corpus={"synthetic": True})
    runs.table([made, replace(made, corpus={"synthetic": False})], {})


# ---------------------------------------------------------------- building


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A folder with a book of one chapter."""
    root = make_project(tmp_path, {"bad": chapter("Bad", "1 / 0")})
    monkeypatch.chdir(root)
    return root


@pytest.fixture(scope="module")
def failed_build(tmp_path_factory):
    """What building that book prints."""
    root = make_project(tmp_path_factory.mktemp("failed"), {"bad": chapter("B", "1/0")})
    return start(root, "build").communicate()[0]


@raises("book/…, code cell … of … (line …): …")
def failing_cell(failed_build):
    return failed_build.rpartition("FAILED ")[2]


@raises("… of … chapters failed: …")
def failed_chapters(failed_build):
    return failed_build.rpartition("error: ")[2]


@raises("unknown parameter of … '…'.")
def unknown_parameter(book, capsys):
    return said(capsys, "run", "bad", "-p", "epoch", "3")


@raises("parameter … of … is … by default, so it takes a …; found …")
def parameter_of_another_type(book):
    open_book(book)["bad"].check({"profile": 3})


@raises("the pages could not be rendered, and the last good book is kept.")
def broken_link(book, capsys):
    (book / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
    (book / "book/bad.md").unlink()
    (book / "book/index.md").write_text("# Tiny\n\n[gone](gone.md)\n")
    return said(capsys, "build")


@raises("_toc.yml names '…' but … does not exist")
def page_not_written(book):
    (book / "book/bad.md").unlink()
    open_book(book)


@raises("…: written but not in _toc.yml, so no reader would find it.")
def page_forgotten(book):
    (book / "book/new.md").write_text("# New\n")
    open_book(book)


@raises("another build of this book is running; waiting for it ...")
def two_builds(book):
    (book / "_build").mkdir()
    with FileLock(book / "_build/.lock"):
        second = start(book, "build")
        text = second.stdout.readline()
        second.kill()
    second.communicate()
    return text


@raises("… does not match its content address: it was edited or damaged.")
def edited_record(tmp_path):
    path = runs.save(runs.RunRecord("a", "training", "2026"), tmp_path)
    path.write_text(path.read_text().replace("2026", "2027"))
    runs.load(path)


@raises("this page claims '…', which is not true of this run.")
def false_claim(monkeypatch):
    monkeypatch.setenv("MMSA_STRICT", "1")
    runs.claim(False, "The MAE is {mae}.", mae=runs.given(1.2, "made up"))


@raises("the records folder … cannot be made")
def no_records_folder(tmp_path):
    (tmp_path / "a").write_text("a file in the way")
    runs.save(runs.RunRecord("a", "training", "2026"), tmp_path / "a" / "b")


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", CASES)
def test_the_message_begins_as_the_page_says(name, request):
    heading, function = CASES[name]
    needed = {k: request.getfixturevalue(k) for k in signature(function).parameters}
    try:
        text = function(**needed)
    except (errors.MmsaError, ModuleNotFoundError) as error:
        text = str(error)
    assert text, "nothing was raised or printed"
    assert begins(text, heading), text


def test_every_heading_of_the_page_is_raised():
    assert sorted(HEADINGS) == sorted(heading for heading, _ in CASES.values())


def test_dots_of_a_heading_stand_for_something():
    assert begins("could not fetch a: b", "could not fetch …")
    assert not begins("could not fetch ", "could not fetch …")
    assert not begins("x could not fetch a", "could not fetch …")
    assert not begins("3 of 2 chapters: a", "… of … chapters failed: …")
