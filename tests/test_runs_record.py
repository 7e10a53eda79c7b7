"""Records on disk: content-addressed, never edited, found by their place."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from toy import TOY, train_toy

from mmsa_lib import runs
from mmsa_lib.errors import UnknownNameError
from mmsa_lib.methods.baselines import constants
from mmsa_lib.runs import RecordError
from mmsa_lib.runs import record as on_disk
from mmsa_lib.training import select

pytestmark = pytest.mark.usefixtures("records")


def test_records_are_content_addressed_and_an_edit_is_noticed(records):
    record = runs.experiment("toy", train_toy, TOY, [0])
    path = next(records.rglob("*.json"))
    assert runs.load(path) == record
    assert path.relative_to(records) == record.place
    assert runs.save(record) == path
    body = json.loads(path.read_text())
    body["per_seed"][0]["test"]["mae"] = 0.1
    path.write_text(json.dumps(body))
    with pytest.raises(RecordError, match="edited"):
        runs.load(path)
    path.write_text("{}")
    with pytest.raises(RecordError, match="not a run record"):
        runs.load(path)


def test_undefined_metrics_are_null_on_disk_and_nan_in_memory(records):
    record = runs.experiment("mean", lambda seed: select(constants(TOY), TOY), TOY, [0])
    assert math.isnan(record.mean("test.corr"))
    assert '"corr": null' in next(records.rglob("*.json")).read_text()
    assert str(runs.number(record, "test.corr")) == "—"


def test_unknown_field_names_the_known_ones():
    record = runs.experiment("toy", train_toy, TOY, [0])
    with pytest.raises(UnknownNameError, match="mae"):
        record.values("test.mea")
    with pytest.raises(UnknownNameError, match="toy"):
        runs.find("tyo", folder=runs.records_folder())
    assert runs.find("toy", folder=runs.records_folder()) == record
    folder = runs.records_folder()
    assert runs.find("toy", folder=folder, kind=record.kind) == record
    with pytest.raises(UnknownNameError):
        runs.find("toy", folder=folder, kind="benchmark")


def test_names_are_file_names():
    with pytest.raises(RecordError, match="lower-case"):
        runs.experiment("../toy", train_toy, TOY, [0])


def test_committed_records_are_the_newest_of_each_name_and_corpus(tmp_path):
    def save(name, created, chapter, corpus):
        made = runs.RunRecord(
            name, "training", created, chapter, corpus={"name": corpus}
        )
        runs.save(made, tmp_path)

    save("late", "2026-01-01", "baselines", "mosi")
    save("late", "2026-01-03", "baselines", "mosi")
    save("late", "2026-01-02", "baselines", "mosei")
    save("late", "2026-01-04", "measuring", "mosi")

    def dates(*query):
        return [r.created[-2:] for r in runs.committed(*query, folder=tmp_path)]

    assert dates("baselines") == ["02", "03"]
    assert dates("baselines", "mosi") == ["03"]
    assert dates("measuring", "mosi") == ["04"]
    with pytest.raises(UnknownNameError, match=r"Known: .*measuring on mosi\."):
        runs.committed("measuring", "mosei", folder=tmp_path)
    with pytest.raises(UnknownNameError, match=r"Known: baselines, measuring\."):
        runs.committed("mesuring", folder=tmp_path)


def test_a_query_reads_only_the_files_that_its_words_name(tmp_path, monkeypatch):
    names = ("wander", "wander-head", "wander-head-against", "a-wander", "other")
    for chapter in (None, "wander", "cggm"):
        for name in names:
            made = runs.RunRecord(name, "training", "2026", chapter)
            runs.save(made, tmp_path)
    read = []
    load = on_disk.load
    monkeypatch.setattr(on_disk, "load", lambda path: read.append(path) or load(path))

    def places():
        found = sorted((p.parent.name, p.stem.rpartition("-")[0]) for p in read)
        read.clear()
        return found

    runs.find("wander", folder=tmp_path)
    assert places() == [(c, "wander") for c in ("benchmarks", "cggm", "wander")]
    assert len(runs.committed("wander", folder=tmp_path)) == len(names)
    assert places() == sorted(("wander", name) for name in names)
    with pytest.raises(UnknownNameError, match="Known: a-wander, other, wander, "):
        runs.find("wander-hea", folder=tmp_path)
    with pytest.raises(UnknownNameError):
        runs.find("*", folder=tmp_path)
    assert places() == []


def test_every_committed_record_lies_in_its_place():
    folder = ROOT / "results"
    for path in folder.rglob("*.json"):
        assert path.relative_to(folder) == runs.load(path).place


def test_a_full_or_read_only_disk_leaves_no_half_record(tmp_path, monkeypatch):
    record = runs.measure("floor", oracle=0.25)

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RecordError, match="No space left"):
        runs.save(record, tmp_path / "full")
    assert list((tmp_path / "full").rglob("*.*")) == []
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot be made"):
        runs.save(record, tmp_path / "file" / "records")


def test_importing_runs_does_not_load_torch():
    code = "import sys, mmsa_lib.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["../a", "a/b", "/a", "a\\b", "a\0b"])
def test_a_name_that_leaves_its_folder_is_refused(tmp_path, name):
    for record in (
        runs.RunRecord(name, "training", "2026"),
        runs.RunRecord("a", "training", "2026", chapter=name),
        runs.RunRecord("a", "training", "2026", chapter=".."),
    ):
        with pytest.raises(runs.RecordError, match="no name for a record"):
            runs.save(record, tmp_path / "records")
    assert not (tmp_path / "records").exists()
