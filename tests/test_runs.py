"""Records: content-addressed, never edited, and the source of numbers on a page."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from toy import ToyModel, toy_corpus

from mmsa_lib import runs
from mmsa_lib.errors import UnknownNameError
from mmsa_lib.methods.baselines import constants
from mmsa_lib.runs import RecordError
from mmsa_lib.training import TrainConfig, fit, select

CORPUS = toy_corpus()


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("MMSA_RECORDS", str(tmp_path / "records"))
    return tmp_path / "records"


def train(seed):
    config = TrainConfig(epochs=2, batch_size=16, device="cpu", seed=seed)
    return fit(lambda: ToyModel(CORPUS.dims), CORPUS, config)


def test_an_experiment_records_everything_a_reader_needs(records):
    record = runs.experiment("toy", train, CORPUS, [0, 1], parameters={"lr": 1e-3})
    assert [p.name for p in records.iterdir()] == [f"toy-{record.id[:12]}.json"]
    assert record.corpus["sha256"] == CORPUS.fingerprint
    assert record.corpus["sizes"] == {"train": 48, "valid": 16, "test": 16}
    assert record.synthetic
    assert record.seeds == [0, 1]
    assert record.resources["trainable_parameters"] == 8 * 7 + 8 * 5 + 17
    assert record.resources["peak_ram_mib"] > 50
    for entry in record.per_seed:
        assert {"mae", "corr", "acc2_non0", "acc7"} <= set(entry["test"])
        assert len(entry["predictions"]) == 16
        assert len(entry["valid_curve"]) == entry["epochs"] == 2
        prediction = np.array(entry["predictions"])
        truth = CORPUS.test.unseal(train(0).receipt).labels["sentiment"][:, 0]
        mae = np.abs(prediction - truth).mean()
        assert entry["test"]["mae"] == pytest.approx(mae, abs=1e-4)
    values = record.values("test.mae")
    assert record.mean("test.mae") == pytest.approx(np.mean(values))
    assert record.sd("test.mae") == pytest.approx(np.std(values, ddof=1))
    assert len(record.code["closure_sha256"]) == 64


def test_records_are_content_addressed_and_an_edit_is_noticed(records):
    record = runs.experiment("toy", train, CORPUS, [0])
    path = next(records.iterdir())
    assert runs.load(path) == record
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
    record = runs.experiment(
        "mean", lambda seed: select(constants(CORPUS), CORPUS), CORPUS, [0]
    )
    assert math.isnan(record.mean("test.corr"))
    assert '"corr": null' in next(records.iterdir()).read_text()
    assert str(runs.number(record, "test.corr")) == "—"


def test_unknown_field_names_the_known_ones():
    record = runs.experiment("toy", train, CORPUS, [0])
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
        runs.experiment("../toy", train, CORPUS, [0])


def test_every_number_of_a_table_names_its_record_and_value():
    record = runs.experiment("toy", train, CORPUS, [0, 1])
    page = runs.table([record], {"MAE": "test.mae", "Acc-2": "test.acc2_non0"}).data
    marks = re.findall(
        r'<data class="rec" value="([^"]+)" data-record="([^"]+)" data-path="([^"]+)"',
        page,
    )
    assert [m[2] for m in marks] == [
        "count(seeds)",
        "mean(test.mae)",
        "sd(test.mae)",
        "mean(test.acc2_non0)",
    ]
    assert all(m[1] == record.id[:12] for m in marks)
    assert float(marks[1][0]) == record.mean("test.mae")
    assert f">{record.mean('test.mae'):.3f}</data>" in page
    assert "Synthetic corpus" in page
    sentence = runs.say("MAE {mae}.", mae=runs.number(record, "test.mae")).data
    assert marks[1][0] in sentence
    assert "— is undefined" not in page
    found = runs.number(record, "test.f1_non0", of="sd", digits=1, suffix=" %")
    assert runs.recall(record, found.path, 1, " %") == found
    assert str(runs.number(record, "seeds", of="count", digits=0)) == "2"


def test_what_no_record_holds_is_a_dash_with_its_reason():
    record = runs.experiment(
        "mean", lambda seed: select(constants(CORPUS), CORPUS), CORPUS, [0]
    )
    page = runs.table([record], {"r": "test.corr"}).data
    assert "mean(test.corr) is undefined" in page
    assert ">—</data>" in page
    assert "— where a value is undefined, such as the correlation of a" in page
    assert ">nan" not in page
    field = "field:resources.peak_gpu_mib"
    assert ">—</data>" in runs.table([record], {"trained": field}).data


def test_a_caption_takes_its_numbers_from_records():
    record = runs.experiment("toy", train, CORPUS, [0])
    size = runs.number(record, "corpus.sizes.test", of="field", digits=0)
    page = runs.table([record], {"MAE": "test.mae"}, caption="On {n}.", n=size).data
    assert f"On {size._repr_html_()}." in page


def test_a_number_without_a_record_says_where_it_comes_from():
    page = runs.say("Margin {m}.", m=runs.given("0.88", "the plan of this book")).data
    assert '<data class="given" value="" title="the plan of this book">0.88' in page
    with pytest.raises(RecordError, match="where it comes from"):
        runs.given("0.88", " ")


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
    with pytest.raises(UnknownNameError, match="baselines on mosei"):
        runs.committed("measuring", "mosei", folder=tmp_path)


def test_real_and_synthetic_never_share_a_table():
    record = runs.experiment("toy", train, CORPUS, [0])
    real = runs.replace(record, corpus=record.corpus | {"synthetic": False})
    with pytest.raises(RecordError, match="synthetic and real"):
        runs.table([record, real], {"MAE": "test.mae"})


def test_run_card_shows_cost_and_origin():
    record = runs.experiment("toy", train, CORPUS, [0, 1])
    card = runs.run_card([record]).data
    for text in ("Training time", "Peak memory", "113", "toy (synthetic)", "0, 1"):
        assert text in card
    assert f'data-records="{record.id[:12]}"' in card
    later = runs.replace(
        record,
        created="2030-01-02T00:00",
        code={"commit": "f" * 40, "dirty": True},
        resources={"trainable_parameters": 7, "peak_gpu_mib": 2048},
        environment={"gpu": "A GPU", "cpu": "not this"},
    )
    facts = runs.facts([later, record])
    assert facts["Trained parameters"] == "7 to 113"
    assert facts["Peak memory"].endswith(" MiB, GPU 2,048 MiB")
    assert facts["Commit"].startswith("ffffffffff (with local changes), ")
    assert "A GPU" in facts["Hardware"] and "not this" not in facts["Hardware"]
    assert facts["Date"] == "2030-01-02"
    with pytest.raises(RecordError, match="at least one"):
        runs.run_card([])


def test_benchmarks_are_records_too(tmp_path):
    rows = [{"what": "step", "ratio": 1.5}]
    path = runs.save_benchmark("speed", rows, settings={"B": 64}, out=tmp_path)
    assert runs.load(path).rows == rows
    assert runs.load(path).kind == "benchmark"


def test_importing_runs_does_not_load_torch():
    code = "import sys, mmsa_lib.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_comparisons_pair_seeds_and_state_their_verdict():
    a = runs.experiment("first", train, CORPUS, [0, 1])
    b = runs.experiment("second", lambda s: train(s + 5), CORPUS, [0, 1])
    found = runs.compare(a, b, names=("first", "second"))
    difference = np.mean(np.subtract(a.values("test.mae"), b.values("test.mae")))
    assert float(runs.value(found, "difference").value) == pytest.approx(difference)
    page = runs.verdict(found).data
    assert found.rows[0]["records"] == [a.id, b.id]
    assert found.rows[0]["verdict"] == runs.verdict_of(found)
    assert runs.html.escape(runs.verdict_of(found)) in page
    better = found.rows[0] | {"difference": -1.5, "low": -2.0, "high": -1.0, "p": 0.01}
    said = runs.verdict_of(runs.replace(found, rows=[better]))
    assert said.startswith("first is better than second in MAE: ")
    assert "difference −1.500 (95 % interval −2.000 to −1.000" in said
    assert found.id[:12] in page
    other = runs.experiment("third", train, CORPUS, [0])
    with pytest.raises(RecordError, match="paired by seed"):
        runs.compare(a, other, names=("a", "b"))


def test_measurements_give_numbers(records):
    found = runs.measure("floor", CORPUS, oracle=0.25)
    assert str(runs.value(found, "oracle", digits=2)) == "0.25"
    assert runs.load(next(records.iterdir())) == found


def test_measurements_by_seed_are_compared_and_tabled_like_experiments(records):
    def make(name, *mae):
        per_seed = [{"seed": s, "test": {"mae": x}} for s, x in enumerate(mae)]
        return runs.measure(name, CORPUS, per_seed=per_seed)

    a, b = make("a", 0.5, 0.6, 0.7), make("b", 0.9, 1.0, 1.3)
    assert a.seeds == [0, 1, 2]
    assert a.values("test.mae") == [0.5, 0.6, 0.7]
    assert not a.rows
    row = runs.compare(a, b, names=("a", "b")).rows[0]
    assert row["difference"] == pytest.approx(-0.4667, abs=1e-3)
    assert 'value="0.6' in runs.table([a, b], {"MAE": "test.mae"}).data


def test_many_comparisons_are_adjusted_together_and_keep_their_origin(records):
    base = runs.measure("base", CORPUS, per_seed=_by_seed(0.0, 0.1, 0.2, 0.3))
    others = {
        "near": _by_seed(0.12, 0.12, 0.3, 0.46),
        "far": _by_seed(1.0, 1.1, 1.2, 1.31),
        "same": _by_seed(0.1, 0.0, 0.3, 0.2),
    }
    plain = [
        runs.compare(runs.measure(k, CORPUS, per_seed=v), base, names=(k, "base"))
        for k, v in others.items()
    ]
    near, far, same = runs.holm(*plain)
    p = [r.rows[0]["p"] for r in plain]
    assert p[1] < p[0] < 0.05 < p[2]
    assert far.rows[0]["p"] == pytest.approx(3 * p[1])
    assert near.rows[0]["p"] == pytest.approx(2 * p[0])
    assert same.rows[0]["p"] == pytest.approx(max(p[2], 2 * p[0]))
    assert near.rows[0]["unadjusted"] == plain[0].id
    assert near.corpus == plain[0].corpus
    assert "Holm's correction for 3 comparisons" in far.rows[0]["verdict"]
    assert "No evidence" in near.rows[0]["verdict"]
    assert "base is better than near" in plain[0].rows[0]["verdict"]
    assert runs.load(records / f"{near.name}-{near.id[:12]}.json") == near


def _by_seed(*mae):
    return [{"seed": s, "test": {"mae": x}} for s, x in enumerate(mae)]


def test_reference_tables_need_a_source(tmp_path):
    path = tmp_path / "elsewhere.yml"
    path.write_text("caption: measured by X\nrows: [{model: ridge, mae: '.954'}]\n")
    page = runs.reference_table(path, {"MAE": "mae", "r": "corr"}).data
    assert ">.954</data>" in page
    assert ">—</data>" in page
    path.write_text("rows: []\n")
    with pytest.raises(RecordError, match="source"):
        runs.reference_table(path, {"MAE": "mae"})


def test_a_full_or_read_only_disk_leaves_no_half_record(tmp_path, monkeypatch):
    record = runs.measure("floor", oracle=0.25)

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.Path, "write_bytes", full)
    with pytest.raises(RecordError, match="No space left"):
        runs.save(record, tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot be made"):
        runs.save(record, tmp_path / "file" / "records")
