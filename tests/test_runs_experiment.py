"""Experiments, measurements and comparisons leave records."""

import html
from dataclasses import replace

import numpy as np
import pytest
from toy import TOY, train_toy

from mmsa_lib import runs
from mmsa_lib.runs import RecordError

pytestmark = pytest.mark.usefixtures("records")


def test_an_experiment_records_everything_a_reader_needs(records):
    record = runs.experiment("toy", train_toy, TOY, [0, 1], parameters={"lr": 1e-3})
    assert [p.name for p in records.rglob("*.json")] == [f"toy-{record.id[:12]}.json"]
    assert record.corpus["sha256"] == TOY.fingerprint
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
        truth = TOY.test.unseal(train_toy(0).receipt).labels["sentiment"][:, 0]
        mae = np.abs(prediction - truth).mean()
        assert entry["test"]["mae"] == pytest.approx(mae, abs=1e-4)
    values = record.values("test.mae")
    assert record.mean("test.mae") == pytest.approx(np.mean(values))
    assert record.sd("test.mae") == pytest.approx(np.std(values, ddof=1))
    assert len(record.code["closure_sha256"]) == 64


def test_benchmarks_are_records_too(tmp_path):
    rows = [{"what": "step", "ratio": 1.5}]
    path = runs.save_benchmark("speed", rows, settings={"B": 64}, out=tmp_path)
    assert runs.load(path).rows == rows
    assert runs.load(path).kind == "benchmark"


def test_comparisons_pair_seeds_and_state_their_verdict():
    a = runs.experiment("first", train_toy, TOY, [0, 1])
    b = runs.experiment("second", lambda s: train_toy(s + 5), TOY, [0, 1])
    found = runs.compare(a, b, names=("first", "second"))
    difference = np.mean(np.subtract(a.values("test.mae"), b.values("test.mae")))
    assert float(runs.value(found, "difference").value) == pytest.approx(difference)
    page = runs.verdict(found).data
    assert found.rows[0]["records"] == [a.id, b.id]
    assert found.rows[0]["verdict"] == runs.verdict_of(found)
    assert html.escape(runs.verdict_of(found)) in page
    better = found.rows[0] | {"difference": -1.5, "low": -2.0, "high": -1.0, "p": 0.01}
    said = runs.verdict_of(replace(found, rows=[better]))
    assert said.startswith("first is better than second in MAE: ")
    assert "difference −1.500 (95 % interval −2.000 to −1.000" in said
    assert found.id[:12] in page
    other = runs.experiment("third", train_toy, TOY, [0])
    with pytest.raises(RecordError, match="paired by seed"):
        runs.compare(a, other, names=("a", "b"))


def test_measurements_give_numbers(records):
    found = runs.measure("floor", TOY, oracle=0.25)
    assert str(runs.value(found, "oracle", digits=2)) == "0.25"
    assert runs.load(next(records.rglob("*.json"))) == found


def test_measurements_by_seed_are_compared_and_tabled_like_experiments(records):
    def make(name, *mae):
        per_seed = [{"seed": s, "test": {"mae": x}} for s, x in enumerate(mae)]
        return runs.measure(name, TOY, per_seed=per_seed)

    a, b = make("a", 0.5, 0.6, 0.7), make("b", 0.9, 1.0, 1.3)
    assert a.seeds == [0, 1, 2]
    assert a.values("test.mae") == [0.5, 0.6, 0.7]
    assert not a.rows
    row = runs.compare(a, b, names=("a", "b")).rows[0]
    assert row["difference"] == pytest.approx(-0.4667, abs=1e-3)
    assert 'value="0.6' in runs.table([a, b], {"MAE": "test.mae"}).data


def test_many_comparisons_are_adjusted_together_and_keep_their_origin(records):
    base = runs.measure("base", TOY, per_seed=_by_seed(0.0, 0.1, 0.2, 0.3))
    others = {
        "near": _by_seed(0.12, 0.12, 0.3, 0.46),
        "far": _by_seed(1.0, 1.1, 1.2, 1.31),
        "same": _by_seed(0.1, 0.0, 0.3, 0.2),
    }
    plain = [
        runs.compare(runs.measure(k, TOY, per_seed=v), base, names=(k, "base"))
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
    assert runs.load(records / near.place) == near


def _by_seed(*mae):
    return [{"seed": s, "test": {"mae": x}} for s, x in enumerate(mae)]
