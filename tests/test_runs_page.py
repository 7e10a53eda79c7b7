"""Records on a page: every figure is marked with the record that it came from."""

import re
from dataclasses import replace

import numpy as np
import pytest
from toy import TOY, train_toy

from mmsa_lib import runs
from mmsa_lib.errors import MmsaError
from mmsa_lib.methods.baselines import constants
from mmsa_lib.runs import RecordError
from mmsa_lib.training import select

pytestmark = pytest.mark.usefixtures("records")


def test_every_number_of_a_table_names_its_record_and_value():
    record = runs.experiment("toy", train_toy, TOY, [0, 1])
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
    record = runs.experiment("mean", lambda seed: select(constants(TOY), TOY), TOY, [0])
    page = runs.table([record], {"r": "test.corr"}).data
    assert "mean(test.corr) is undefined" in page
    assert ">—</data>" in page
    assert "— where a value is undefined, such as the correlation of a" in page
    assert ">nan" not in page
    field = "field:resources.peak_gpu_mib"
    assert ">—</data>" in runs.table([record], {"trained": field}).data


def test_a_caption_takes_its_numbers_from_records():
    record = runs.experiment("toy", train_toy, TOY, [0])
    size = runs.number(record, "corpus.sizes.test", of="field", digits=0)
    page = runs.table([record], {"MAE": "test.mae"}, caption="On {n}.", n=size).data
    assert f"On {size._repr_html_()}." in page


def test_a_number_without_a_record_says_where_it_comes_from():
    page = runs.say("Margin {m}.", m=runs.given("0.88", "the plan of this book")).data
    assert '<data class="given" value="" title="the plan of this book">0.88' in page
    with pytest.raises(RecordError, match="where it comes from"):
        runs.given("0.88", " ")


def test_real_and_synthetic_never_share_a_table():
    record = runs.experiment("toy", train_toy, TOY, [0])
    real = replace(record, corpus=record.corpus | {"synthetic": False})
    with pytest.raises(RecordError, match="synthetic and real"):
        runs.table([record, real], {"MAE": "test.mae"})


def test_run_card_shows_cost_and_origin():
    record = runs.experiment("toy", train_toy, TOY, [0, 1])
    card = runs.run_card([record]).data
    for text in ("Training time", "Peak memory", "113", "toy (synthetic)", "0, 1"):
        assert text in card
    assert f'data-records="{record.id[:12]}"' in card
    later = replace(
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


def test_reference_tables_need_a_source(tmp_path):
    path = tmp_path / "elsewhere.yml"
    path.write_text("caption: measured by X\nrows: [{model: ridge, mae: '.954'}]\n")
    page = runs.reference_table(path, {"MAE": "mae", "r": "corr"}).data
    assert ">.954</data>" in page
    assert ">—</data>" in page
    path.write_text("rows: []\n")
    with pytest.raises(RecordError, match="source"):
        runs.reference_table(path, {"MAE": "mae"})


def test_a_claim_that_holds_is_a_sentence_with_its_numbers(monkeypatch):
    record = runs.measure("floor", TOY, mae=0.25, other=0.5)
    low, high = (runs.value(record, k, digits=2) for k in ("mae", "other"))
    words = "{a} is below {b}."
    told = runs.say(words, a=low, b=high).data
    for strict in ("1", "", "0"):
        monkeypatch.setenv("MMSA_STRICT", strict)
        shown = runs.claim(low.value < high.value, words, a=low, b=high).data
        assert shown == told


def test_a_claim_that_fails_is_a_box_or_where_it_must_hold_an_error(monkeypatch):
    record = runs.measure("floor", TOY, mae=-0.25)
    numbers = {"a": runs.value(record, "mae", digits=2), "b": runs.given("1 %", "us")}
    words = "{a} is above {b}."
    for strict in ("", "0"):
        monkeypatch.setenv("MMSA_STRICT", strict)
        shown = runs.claim(False, words, **numbers).data
        assert shown.startswith('<div class="claim-failed"><p><strong>This run does')
        assert runs.say(words, **numbers).data in shown  # marked all the same
    monkeypatch.setenv("MMSA_STRICT", "1")
    with pytest.raises(runs.ClaimError) as error:
        runs.claim(np.bool_(False), words, **numbers)
    assert str(error.value).startswith(
        "this page claims '−0.25 is above 1 %.', which is not true of this "
    )
    assert isinstance(error.value, MmsaError)


def test_a_sentence_shows_what_is_no_tag_of_ours_as_it_is_written():
    text = '<b>x</b> & <strong>y</strong> <script>z</script> <em class="a">'
    assert runs.say(text).data == (
        "<p>&lt;b&gt;x&lt;/b&gt; &amp; <strong>y</strong> "
        '&lt;script&gt;z&lt;/script&gt; &lt;em class="a"&gt;</p>'
    )
