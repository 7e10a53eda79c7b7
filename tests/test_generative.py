"""The twin: parser, training; and the chapter "Generative against discriminative"."""

import math
import random
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from thinkers import SMALL, changed, thinker

from mmsa_lib import runs, training
from mmsa_lib.errors import ConfigError, UnknownNameError
from mmsa_lib.methods import generative
from mmsa_lib.methods.generative import Answers, parse_score, spell
from mmsa_lib.press.chapters import read_chapter

CHAPTER = read_chapter(runs.ROOT / "book" / "generative.md", "book/generative")
REPORTED = yaml.safe_load(
    (runs.ROOT / "book" / "reference" / "readout.yml").read_text("utf-8")
)


# --- the parser -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("+1.6", 1.6), ("-0.4", -0.4), ("2", 2.0), ("-3", -3.0), (".5", 0.5)),
        *(("1,5", 1.5), ("-,5", -0.5), ("\u22121.2", -1.2), ("0.0.", 0.0), ("2.", 2)),
        *(("Score: -1.0!", -1.0), ("(+2)", 2.0), ("a\n0.4\nb", 0.4), ("=3", 3.0)),
        *(("1.0 or 2.0", 1.0), ("2-3", 2.0), ("7.5", 7.5), ("-12", -12.0)),
        # nothing that is a number
        *(("", None), ("five", None), ("very good", None), (".", None), ("-", None)),
        *(("1.1.1", None), ("1,000.5", None), ("GPT-4", None), ("v2", None)),
        *(("2nd", None), ("1e5", None), ("0x1", None), ("nan", None), ("inf", None)),
        # a number whose sign is in doubt
        *(("- 1.2", None), ("--1", None), ("+-1", None), ("\u20131.2", None)),
        *(("good - 2.0", None), ("minus 1.2", None), ("Negative 2", None)),
        *(("\u00b11", None), ("- \n2, or 1", None)),
    ],
)
def test_parser(text, value):
    found = parse_score(text)
    assert found == value
    if value is not None:
        assert type(found) is float


def test_parser_invents_nothing():
    """Over random texts: no number without one, and never one with another sign."""
    draw = random.Random(0)
    letters = [chr(c) for c in range(32, 127) if not chr(c).isdigit()]
    letters += list("\n\t\u2212\u2013\u00b1\u00e9")
    for _ in range(2000):
        text = "".join(draw.choices(letters, k=draw.randint(0, 12)))
        assert parse_score(text) is None, text
        tail = "".join(draw.choices(letters, k=draw.randint(0, 4)))
        found = parse_score(f"{text}1.5{tail}")
        assert found in (None, 1.5, -1.5), (text, tail)
        before = text.rstrip()[-1:]
        if found is not None:
            assert (found < 0) == (before in ("-", "\u2212") and before == text[-1:])


def test_every_label_survives_being_written():
    for k in range(-15, 16):
        label = np.float32(k / 5)  # the grid of MOSI
        text = spell(label)
        assert len(text) == 4 and text[0] in "+-"
        assert parse_score(text) == pytest.approx(k / 5)
    written = {
        1 / 3: "+0.3",
        2 / 3: "+0.7",
        -1.66: "-1.7",
        -0.04: "+0.0",
        -0.06: "-0.1",
    }
    written |= {3.2: "+3.0", -9: "-3.0", 0: "+0.0", 2.96: "+3.0", math.inf: "+3.0"}
    assert {y: spell(y) for y in written} == written
    with pytest.raises(ConfigError, match="NaN"):
        spell(math.nan)


def test_rates_of_answers():
    texts = ["+1.0", "good", "-7", "3.0", "3.1", "- 2", "-3", "0"]
    values = [parse_score(t) for t in texts]
    answers = Answers(
        [str(k) for k in range(8)],
        texts,
        np.array([math.nan if v is None else v for v in values]),
    )
    assert answers.unparsable == 2 / 8  # not counted as out of range as well
    assert answers.out_of_range == 2 / 8
    assert answers.scores(0.4).tolist() == [
        [y] for y in (1.0, 0.4, -3.0, 3.0, 3.0, 0.4, -3.0, 0.0)
    ]


# --- learning -------------------------------------------------------------------------


def test_the_twin_learns_to_write_the_labels(twin, handful):
    answers = twin.module.answer(handful.valid, batch_size=4)
    labels = handful.train.labels["sentiment"][:, 0].tolist()
    assert answers.texts == [spell(y) for y in labels]
    assert answers.ids == list(handful.valid.ids)
    assert answers.unparsable == answers.out_of_range == 0
    found = training.evaluate(generative.writing(twin), handful, "valid")
    assert np.abs(found.truth - found.prediction).max() < 0.05 + 1e-6
    with pytest.raises(UnknownNameError, match="emotion"):
        twin.module.predict(handful.valid, "emotion")
    assert twin.trainable < twin.total


def test_twin_and_readout_adapt_the_same_layers(twin, overfit):
    shapes = [
        {n: p.shape for n, p in m.named_parameters() if "lora_" in n}
        for m in (twin.module, overfit.module)
    ]
    assert shapes[0] == shapes[1] and shapes[0]


def test_an_untrained_twin_is_counted_not_guessed(backbone, handful):
    fresh = generative.generative(thinker(backbone), SMALL, [[-1.0], [2.0]])
    with changed(fresh.body, say=lambda batch: ["hmm"] * len(batch)):
        answers = fresh.answer(handful.valid)
        scores = fresh.predict(handful.valid)
    assert answers.unparsable == 1
    assert scores.tolist() == [[0.5]] * 6  # the mean training label


# --- the chapter ----------------------------------------------------------------------


def cells(page, *marks):
    """Execute the cells that hold these marks, in the order of the page."""
    for mark in marks:
        (cell,) = [c for c in CHAPTER.cells if mark in c.source]
        exec(cell.source, page)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the chapter's cells up to its first training, on few clips."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MMSA_RECORDS", str(tmp_path_factory.mktemp("records")))
    names = {"display": lambda *shown: None} | CHAPTER.parameters
    names["device"] = "cpu"
    cells(names, "figures.style()", "study = Study(", "reported = yaml", "four = study")
    cells(names, "def counts(", "def agree(")
    cells(names, "def written(score)", "def thinker(", "pieces =")
    cells(names, "assert 609", "def best_case", "anywhere =", "def wrong_tokens")
    yield names
    patch.undo()


def test_digits_and_sizes_are_judged_exactly(page):
    for row in REPORTED["accuracies"]:
        printed = row["value"]
        half = Fraction(1, 2) / 10 ** len(printed.partition(".")[2])
        for n in (229, 656, 686):
            fits = [
                k
                for k in range(n + 1)
                if abs(Fraction(100 * k, n) - Fraction(printed)) <= half
            ]
            assert page["counts"](printed, n).tolist() == fits, (printed, n)


def test_the_reported_mean_of_four_seeds_is_recomputed(page):
    four = page["four"]
    assert four.mean("test.mae") == pytest.approx(0.570, abs=5e-4)
    assert four.sd("test.mae") == pytest.approx(0.014, abs=5e-4)


def test_sources_of_the_tables(page):
    equal, keys = page["equal"], page["errors"]
    assert equal(REPORTED["mosi"], "rerun", keys) == 8
    assert equal(REPORTED["mosi"], "rerun", {"acc2": "has0"}) == 0
    assert equal(REPORTED["mosei"], "rerun", keys) == 0
    assert equal(REPORTED["mosei"], "quoted", keys) == 4


def test_loss_writing_and_parser_from_nothing_agree_with_the_library(page):
    # every cell ends in assertions
    cells(page, "def written_loss", "slow = written_loss", "def write(model")
    cells(page, "slow = [write(", "def parse(text)", "expected = {", "made_up =")


def test_mistakes_change_the_loss_and_only_the_named_place(page):
    import torch

    cells(page, "def written_loss", "slow = written_loss")
    model, batch = page["model"], page["data"].train.batch([0, 1, 4])
    loss, told = page["written_loss"], ["+1.0", "-2.0", "+0.4"]
    with torch.no_grad():
        right = loss(model, batch, told)
        whole = loss(model, batch, told, whole=True)
        model.padding_side = "right"
        padded = loss(model, batch, told)
        model.padding_side = "left"
        assert torch.allclose(loss(model, batch, told), right, atol=1e-5)
    lengths = [len(t) for t in batch.raw_text]
    longest = lengths.index(max(lengths))
    assert not torch.allclose(whole, right, atol=1e-2)
    others = [i for i in range(3) if i != longest]
    assert (padded - right)[others].abs().min() > 1e-2


def test_peak_counts_what_is_alive_at_once(page):
    # the last cell holds assertions
    cells(page, "class Alive", "def peak(", "torch.zeros(2**18) + 1")


def test_solutions_of_the_exercises(page):
    valid = page["data"].valid
    said = Answers(valid.ids, ["+0.0"] * len(valid), np.zeros(len(valid)))
    page["writer"] = SimpleNamespace(body=page["model"])  # trained on the page
    page["answers"] = {("writer", page["once"][-1]): {"valid": said}}
    cells(page, "draws = np", "one = np.mean(", "def soft(", "def colleague")
