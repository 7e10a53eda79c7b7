"""The chapter "Generative against discriminative": audit, twin and exercises."""

from fractions import Fraction

import pytest
import yaml

from mmsa_lib import runs
from mmsa_lib.press.chapters import read_chapter

CHAPTER = read_chapter(runs.ROOT / "book" / "generative.md", "book/generative")
REPORTED = yaml.safe_load(
    (runs.ROOT / "book" / "reference" / "readout.yml").read_text("utf-8")
)


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
    cells(names, "figures.style()", "four = keep(", "def counts(", "def agree(")
    cells(names, "def written(score)", "pieces =", "def best_case", "def wrong_tokens")
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
    cells(page, "class Alive")  # ends in assertions


def test_solutions_of_the_exercises(page):
    cells(page, "draws = np", "one = np.mean(", "def soft(", "def colleague")
