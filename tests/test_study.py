"""What chapters repeat: plans, arms, comparisons, tables, committed runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from toy import ToyModel, toy_corpus

from mmsa_lib import runs, study, tasks
from mmsa_lib.errors import ConfigError, UnknownNameError
from mmsa_lib.methods.baselines import constants
from mmsa_lib.study import Study, columns, facts_table, plan_of, quoted
from mmsa_lib.training import Rule

CORPUS = toy_corpus()
PLANS = {
    "plans": {
        "toys": {
            "toy": {"epochs": 2, "batch_size": 16, "lr": 0.01, "width": 8},
            "default": {"epochs": 1},
        },
        "bare": {"other": {"epochs": 1}},
    }
}


@pytest.fixture(autouse=True)
def book(tmp_path, monkeypatch):
    """A book of its own: profiles with plans, and a folder for records."""
    folder = tmp_path / "book" / "profiles"
    folder.mkdir(parents=True)
    (folder / "quick.yml").write_text(yaml.safe_dump(PLANS))
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setenv("MMSA_RECORDS", str(tmp_path / "records"))
    return tmp_path


def build():
    return ToyModel(CORPUS.dims)


def started(**changes):
    given = {"seeds": [0, 1, 2], "device": "cpu"} | changes
    return Study("toys", CORPUS, **given)


def test_plans_come_from_the_profile_and_readers_may_change_them():
    assert plan_of("toys", "toy")["epochs"] == 2
    assert plan_of("toys", "toy", epochs=7, lr=None) == {
        **PLANS["plans"]["toys"]["toy"],
        "epochs": 7,
    }
    assert plan_of("toys", "unheard") == {"epochs": 1}
    with pytest.raises(UnknownNameError, match="quick"):
        plan_of("toys", "toy", "quik")
    with pytest.raises(UnknownNameError, match=r"'tyos'.*Did you mean 'toys'"):
        plan_of("tyos", "toy")
    with pytest.raises(UnknownNameError, match="Known: other"):
        plan_of("bare", "toy")


def test_sizes_of_models_stay_out_of_the_training_configuration():
    config = started().settings(4, lr=0.5)
    assert (config.seed, config.lr, config.epochs, config.device) == (4, 0.5, 2, "cpu")
    assert config.schedule == "cosine"  # what every plan starts from
    with pytest.raises(ConfigError, match="different labels"):
        started(tasks=[tasks.SENTIMENT, tasks.SENTIMENT])


def test_arms_are_trained_once_a_seed_and_kept():
    seen = []

    class Watch(Rule):
        def epoch_end(self, model, row):
            seen.append(row["epoch"])

    page = started()
    record = page.train("arm", build, rules=lambda: [Watch()], title="the arm")
    assert [e["seed"] for e in record.per_seed] == [0, 1, 2]
    assert record.parameters["width"] == 8 and record.parameters["rules"] == ["Watch"]
    assert seen == [0, 1] * 3
    assert page["arm"] is record and page.records == [record]
    assert len(page.frozen["arm"]) == len(page.ruled["arm"]) == 3
    again = page.fit(build, 1)
    assert again.receipt.artefact == page.frozen["arm"][1].receipt.artefact
    with pytest.raises(UnknownNameError, match="Known: arm"):
        page["amr"]


def test_pairs_are_one_family_and_tables_follow_the_titles():
    page = started(titles={"floor": "constant", "slow": "slow", "fast": "fast"})
    page.train("fast", build, lr=0.03)
    page.train("slow", build, lr=0.001)
    page.pick("floor", constants(CORPUS))
    judged = page.judge([("fast", "slow"), ("fast", "floor")])
    assert [r.rows[0]["family"] for r in judged] == [2, 2]
    assert judged[0].rows[0]["a"] == "fast" and judged[1].rows[0]["b"] == "constant"
    (alone,) = page.judge([("fast", "floor")])
    assert alone.name == "fast-against-floor"  # one comparison needs no adjustment
    shown = page.table("Test split.").data
    places = [shown.index(f">{title}<") for title in ("constant", "slow", "fast")]
    assert places == sorted(places)
    with pytest.raises(ConfigError, match="has a title"):
        started().table("Nothing.")
    with pytest.raises(UnknownNameError, match="record to compare"):
        page.judge([("fast", "fats")])


def test_several_tasks_are_trained_and_judged_together():
    classed = CORPUS.with_classes("sentiment", (-0.3, 0.3))
    corpus = CORPUS._map(lambda s: s._with(labels=s._labels | classed[s.name]._labels))

    class Two(ToyModel):
        def forward(self, batch):
            output = super().forward(batch)
            y = output.predictions["sentiment"]
            wide = np.array([-1.0, 0.0, 1.0], dtype=np.float32)
            output.predictions["class"] = y * y.new_tensor(wide)
            return output

    both = [tasks.SENTIMENT, tasks.classes("class", 3)]
    page = Study("toys", corpus, both, seeds=[0, 1], device="cpu")
    record = page.train("both", lambda: Two(corpus.dims))
    assert page.metric == "test.sentiment.mae"
    assert record.mean("test.sentiment.mae") > 0
    assert 0 <= record.mean("test.class.acc") <= 100
    assert len(record.per_seed[0]["predictions"]["class"]) == 16
    plain = page.train("one", build, on=CORPUS, tasks=tasks.SENTIMENT)
    assert plain.mean("test.mae") > 0
    assert json.dumps(record.per_seed)  # plain values only


def test_a_pair_may_have_its_own_metric_and_history_is_by_seed():
    page = started(seeds=[0, 1])
    for name in ("a", "b"):
        page.train(name, build)
    own, usual = page.judge([("a", "b", "corr"), ("a", "b")])
    assert own.rows[0]["metric"] == "corr"
    assert usual.rows[0]["metric"] == "mae"
    rows = page.history("a", "valid")
    assert [len(row) for row in rows] == [2, 2]
    assert rows[0] == [row["valid"] for row in page.frozen["a"][0].history]


def test_committed_runs_are_of_one_text(book, monkeypatch):
    page = started(seeds=[0])
    monkeypatch.setenv("MMSA_CHAPTER", "toys")
    monkeypatch.setenv("MMSA_RECORDS", str(book / "results"))
    monkeypatch.setattr(runs.record, "ROOT", book)
    for year, text in enumerate(("old", "new"), start=2030):
        monkeypatch.setenv("MMSA_CHAPTER_SHA", text)
        made = page.pick(f"floor-{text}", constants(CORPUS))
        runs.save(runs.seal(replace(made, id="", created=f"{year}-01-01")))
    monkeypatch.setenv("MMSA_CHAPTER_SHA", "newest")  # which only compares these
    (made,) = page.judge([("floor-new", "floor-old")])
    runs.save(runs.seal(replace(made, id="", created="2032-01-01")))
    found = page.committed()
    assert set(found) == {"floor-new"}
    with pytest.raises(UnknownNameError, match="toys on mosi"):
        page.committed("mosi")


def test_columns_of_every_task():
    assert columns(tasks.SENTIMENT)["Acc-2 has0"] == "test.acc2_has0"
    assert columns(tasks.classes("class", 3))["Acc"] == "test.acc"
    assert columns(tasks.pixels())["Dice"] == "test.dice_mean"
    assert "test.wa_mean" in columns(tasks.emotions()).values()


def test_measurements_are_quoted_in_sentences_and_tables():
    record = started(seeds=[0]).measure("found", CORPUS, loss=0.254, size=40)
    numbers = quoted(record, loss=2, size=0)
    assert {k: str(v) for k, v in numbers.items()} == {"loss": "0.25", "size": "40"}
    rows = [("train", "a < b", numbers["loss"]), ("test", "plain", numbers["size"])]
    shown = facts_table(("split", "what", "value"), rows, "What is there.").data
    assert shown.count("<tr>") == 3 and "a &lt; b" in shown
    assert 'data-path="field(rows.0.loss)"' in shown
    for wrong in ([], [("train", "too few")]):
        with pytest.raises(ConfigError, match="3 columns"):
            facts_table(("split", "what", "value"), wrong, "Nothing.")
