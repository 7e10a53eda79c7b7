"""The contracts of the schema that everything downstream relies on."""

import numpy as np
import pytest
import torch
from toy import toy_corpus

from mmsa_lib.corpora.schema import (
    Card,
    Ragged,
    Receipt,
    Split,
    clean_nonfinite,
    fingerprint,
    make_corpus,
)
from mmsa_lib.errors import CorpusError, SealedError, UnknownNameError

RECEIPT = Receipt("corpus", "artefact", "mae", 1.0, candidates=3)


def sequences(lengths, width=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, width)).astype(np.float32) for n in lengths]


def split(name, lengths=(2, 0, 5), seed=0, **changes):
    n = len(lengths)
    kwargs = {
        "ids": [f"{name}{i}" for i in range(n)],
        "features": {
            "text": Ragged.from_list(sequences(lengths, 3, seed)),
            "audio": Ragged.from_list(sequences([1] * n, 2, seed + 1)),
        },
        "labels": {"sentiment": np.linspace(-1, 1, n), "kind": np.arange(n)},
        "raw_text": [f"words of {i}" for i in range(n)],
    }
    return Split(name, **(kwargs | changes))


def card():
    return Card("toy", "three samples", "made here", "none", synthetic=True)


def corpus(**splits):
    names = ("train", "valid", "test")
    return make_corpus(card(), {n: splits.get(n) or split(n) for n in names})


def test_ragged_reads_samples_and_views_share_values():
    xs = sequences([2, 0, 5])
    ragged = Ragged.from_list(xs)
    for i, x in enumerate(xs):
        np.testing.assert_array_equal(ragged[i], x)
    view = ragged.select([2, 0])
    assert view.values is ragged.values
    np.testing.assert_array_equal(view[0], xs[2])
    gone = ragged.without(np.array([True, False, False]))
    assert gone[0].shape == (0, 3)
    np.testing.assert_array_equal(gone[2], xs[2])


def test_moments_equal_numpy_over_all_real_steps():
    xs = sequences([4, 0, 7, 1])
    mean, std = Ragged.from_list(xs).moments()
    stacked = np.concatenate(xs).astype(np.float64)
    np.testing.assert_allclose(mean, stacked.mean(0), atol=1e-7)
    np.testing.assert_allclose(std, stacked.std(0), atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ragged(np.zeros(4), [0], [4]), "2-D"),
        (lambda: Ragged(np.zeros((4, 2)), [0, 2], [2, 3]), "offsets point outside"),
        (lambda: Ragged(np.zeros((4, 2)), [0, 2], [2]), "2 starts but 1 lengths"),
        (
            lambda: Ragged.from_list([np.zeros((2, 3)), np.zeros((2, 4))]),
            r"\(3,\), \(4,\)",
        ),
        (lambda: split("a", raw_text=["one"]), "3 ids but 1 rows in raw text"),
        (lambda: split("a", features={}), "no modality"),
        (lambda: split("a", labels={"s": np.zeros(2)}), "2 rows in label 's'"),
        (lambda: split("a", labels={"s": np.zeros((3, 1, 1))}), r"\(3, 1, 1\)"),
        (lambda: split("a", labels={"s": [0.0, np.nan, 1.0]}), "in 1 rows"),
    ],
)
def test_wrong_shapes_are_named(make, message):
    with pytest.raises(CorpusError, match=message):
        make()


def test_batch_pads_with_masks_and_availability():
    s = split("train")
    batch = s.batch([2, 1])
    assert batch.ids == ["train2", "train1"]
    assert batch.raw_text == ["words of 2", "words of 1"]
    assert batch.features["text"].shape == (2, 5, 3)
    assert batch.features["text"].dtype == torch.float32
    np.testing.assert_array_equal(batch.features["text"][0], s.features["text"][2])
    assert not batch.features["text"][1].any()
    assert batch.mask["text"].tolist() == [[True] * 5, [False] * 5]
    assert batch.available["text"].tolist() == [True, False]
    assert batch.available["audio"].tolist() == [True, True]
    assert batch.labels["sentiment"].shape == (2, 1)  # never (B,): trap 5
    assert batch.labels["kind"].dtype == torch.int64
    assert batch.labels["kind"].tolist() == [2, 1]


def test_real_zero_frames_stay_real():
    zeros = Ragged.from_list([np.zeros((3, 2)), np.ones((1, 2))])
    batch = Split("a", ["x", "y"], {"audio": zeros}, {}).batch([0, 1])
    assert batch.mask["audio"].tolist() == [[True] * 3, [True, False, False]]


def test_batches_cover_every_sample_in_order():
    ids = [i for batch in split("a").batches(2) for i in batch.ids]
    assert ids == ["a0", "a1", "a2"]


def test_only_and_without_and_select_are_views():
    c = corpus().only(["audio"])
    assert c.modalities == ("audio",) and c.dims == {"audio": 2}
    with pytest.raises(UnknownNameError, match=r"vision.*audio, text"):
        corpus().only(["vision"])
    lacking = split("a").without({"audio": [True, False, False]})
    assert lacking.batch([0, 1]).available["audio"].tolist() == [False, True]
    some = split("a").select(np.array([True, False, True]))
    assert some.ids == ["a0", "a2"]
    assert some.labels["kind"].tolist() == [0, 2]


def test_test_labels_are_sealed_until_a_receipt_opens_them():
    test = corpus(test=split("test", truth={"flag": np.arange(3)})).test
    with pytest.raises(SealedError, match=r"training\.fit"):
        _ = test.labels
    with pytest.raises(SealedError, match="ground truth"):
        _ = test.truth
    assert test.batch([0]).labels == {}
    for derived in (test.select([0]), test.only(["text"]), test.without({})):
        with pytest.raises(SealedError):
            _ = derived.labels
    for key in (None, "open", Receipt("c", "a", "mae", 1.0, candidates=0)):
        with pytest.raises(SealedError, match="Receipt"):
            test.unseal(key)
    opened = test.unseal(RECEIPT)
    assert opened.labels["kind"].tolist() == [0, 1, 2]
    assert opened.truth["flag"].tolist() == [0, 1, 2]
    with pytest.raises(SealedError):
        _ = test.labels
    assert corpus().train.labels["kind"].tolist() == [0, 1, 2]


def test_standardised_uses_training_statistics_only():
    far = [x + 100 for x in sequences([3, 3, 3], 2)]
    constant = [np.ones((2, 2)) for _ in range(3)]
    train = split("train", features={"a": Ragged.from_list(sequences([4, 5, 6], 2, 7)),
                                     "c": Ragged.from_list(constant)})  # fmt: skip
    valid = split("valid", features={"a": Ragged.from_list(far),
                                     "c": Ragged.from_list(constant)})  # fmt: skip
    test = split("test", features=valid.features)
    raw = corpus(train=train, valid=valid, test=test)
    scaled = raw.standardised(["a", "c"])
    steps = np.concatenate([scaled.train.features["a"][i] for i in range(3)])
    np.testing.assert_allclose(steps.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(steps.std(0), 1, atol=1e-4)
    mean, std = train.features["a"].moments()
    np.testing.assert_allclose(
        scaled.valid.features["a"][1], (far[1] - mean) / std, rtol=1e-4
    )
    assert not scaled.train.features["c"][0].any()  # a constant channel becomes 0
    np.testing.assert_array_equal(raw.valid.features["a"][1], far[1])


def test_duplicate_ids_are_refused_within_and_across_splits():
    twice = split("train", ids=["a", "b", "a"])
    with pytest.raises(CorpusError, match="'a' occurs in split 'train' and again"):
        corpus(train=twice)
    with pytest.raises(CorpusError, match="'train' and again in 'valid'"):
        corpus(valid=split("valid", ids=["v0", "train1", "v2"]))


def test_splits_must_agree_on_modalities_widths_and_labels():
    lacking = split("valid").only(["text"])
    with pytest.raises(CorpusError, match="same modalities"):
        corpus(valid=lacking)
    wide = split("valid", features={
        "text": Ragged.from_list(sequences([1] * 3, 9)),
        "audio": Ragged.from_list(sequences([1] * 3, 2)),
    })  # fmt: skip
    with pytest.raises(CorpusError, match="same modalities and widths"):
        corpus(valid=wide)
    with pytest.raises(CorpusError, match="has labels"):
        corpus(valid=split("valid", labels={"sentiment": np.zeros(3)}))
    with pytest.raises(UnknownNameError, match=r"vali.*Did you mean 'valid'"):
        _ = corpus()["vali"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_features_are_refused_by_id(value):
    xs = sequences([2, 3, 4])
    xs[1][2, 0] = value
    features = {"text": Ragged.from_list(xs), "audio": split("a").features["audio"]}
    with pytest.raises(CorpusError, match=r"'text'.*1 samples \(valid1\)"):
        corpus(valid=split("valid", features=features))
    cleaned, count = clean_nonfinite(xs[1])
    assert count == 1 and cleaned[2, 0] == 0 and np.isfinite(cleaned).all()
    assert not np.isfinite(xs[1][2, 0])  # the original is not touched


def test_card_states_facts_and_fingerprint_follows_content():
    c = corpus()
    assert c.card.splits["valid"]["size"] == 3
    assert c.card.splits["train"]["sentiment"]["mean"] == [0.0]
    assert c.card.splits["train"]["sentiment"]["histogram_-3_to_3"] == [
        0, 0, 1, 1, 1, 0, 0,
    ]  # fmt: skip
    assert c.card.modalities["text"] == {
        "width": 3, "length_min": 0, "length_median": 2.0, "length_max": 5,
        "missing": 3,
    }  # fmt: skip
    assert c.fingerprint == corpus().fingerprint == fingerprint(c.splits)
    assert c.fingerprint != corpus(valid=split("valid", seed=5)).fingerprint
    other = split("valid", labels={"sentiment": np.zeros(3), "kind": np.arange(3)})
    assert c.fingerprint != corpus(valid=other).fingerprint
    assert (
        c.fingerprint != corpus(valid=split("valid", raw_text=["", "", ""])).fingerprint
    )


@pytest.mark.parametrize("labels", [[1, 2, 3], np.array([1, 2, 3], dtype=np.int8)])
def test_integers_are_classes_and_floats_are_columns(labels):
    s = split("a", labels={"kind": labels, "score": np.array([1, 2, 3], np.float64)})
    assert s.labels["kind"].dtype == np.int64 and s.labels["kind"].shape == (3,)
    assert s.labels["score"].dtype == np.float32 and s.labels["score"].shape == (3, 1)


def test_classes_from_a_label_stay_sealed():
    corpus = toy_corpus()
    classed = corpus.with_classes("sentiment", (-0.5, 0.5))
    values = corpus.train.labels["sentiment"][:, 0]
    expected = (values >= -0.5).astype(int) + (values >= 0.5)
    np.testing.assert_array_equal(classed.train.labels["class"], expected)
    assert classed.train.batch([0]).labels["class"].dtype == torch.int64
    with pytest.raises(SealedError):
        _ = classed.test.labels
    with pytest.raises(UnknownNameError, match="sentiment"):
        corpus.with_classes("sentimant", (0,))


def test_a_split_needs_a_known_name_and_samples():
    for name in ("dev", "Test", "train ", "all"):  # "Test" would not be sealed
        with pytest.raises(UnknownNameError, match=f"unknown split '{name}'"):
            make_corpus(card(), {"train": split("train"), name: split(name)})
    whole = split("valid")
    with pytest.raises(CorpusError, match="split 'valid' has no samples"):
        make_corpus(
            card(), {"train": split("train"), "valid": whole.select(np.array([], int))}
        )
    with pytest.raises(CorpusError, match="needs a split"):
        make_corpus(card(), {})


@pytest.mark.parametrize("kind", ["i8", "i1", "u2"])
def test_scores_of_integers_are_no_classes(kind):
    features = {"text": Ragged.from_list([np.zeros((2, 3))] * 4)}
    whole = np.array([0, 1, 2, 3]).astype(kind)
    for name, labels in (("sentiment", whole), ("emotions", np.eye(4).astype(kind))):
        with pytest.raises(CorpusError, match=r"is a score and came as .*give floats"):
            Split("train", list("abcd"), features, {name: labels})
    kept = Split("train", list("abcd"), features, {"class": whole})
    assert kept.labels["class"].dtype == np.int64
    for labels in (["1", "2", "3", "4"], [None] * 4, [{}] * 4):
        with pytest.raises(CorpusError, match="must be numbers"):
            Split("train", list("abcd"), features, {"sentiment": labels})
