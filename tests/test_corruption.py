"""The corruption protocol: seeded by sample, recorded, re-applied bit for bit."""

import hashlib

import numpy as np
import pytest

from mmsa_lib.corpora import corruption, puppets
from mmsa_lib.corpora.schema import Ragged, Split
from mmsa_lib.errors import CorpusError, SealedError, UnknownNameError

IDS = [f"clip{i}" for i in range(2000)]
ALL = ("text", "audio", "vision")
# A change of these bytes is another protocol: raise CORRUPTION_VERSION.
PINNED = "72b3598b3f469de0521431520d70d6d6ae24e62f006ccbaed554263cbc784d48"


@pytest.fixture(scope="module")
def split():
    return puppets.load(sizes=(60, 5, 40), num_speakers=12).train


EVERY = {
    "missing_modalities": lambda s, seed=3: corruption.missing_modalities(
        s, rate=0.7, seed=seed
    ),
    "missing_frames": lambda s, seed=3: corruption.missing_frames(
        s, rate=0.4, seed=seed
    ),
    "noise": lambda s, seed=3: corruption.noise(s, scale=0.5, seed=seed),
    "shift": lambda s, seed=3: corruption.shift(s, gain=0.2, offset=1.0, seed=seed),
}


def same(a: Split, b: Split) -> bool:
    return all(
        np.array_equal(a.features[m].lengths, b.features[m].lengths)
        and all(
            a.features[m][i].tobytes() == b.features[m][i].tobytes()
            for i in range(len(a))
        )
        for m in a.modalities
    )


# --- patterns ------------------------------------------------------------------------


def test_the_six_patterns_and_their_generalisation():
    assert set(corruption.patterns(ALL)) == {
        *[("text",), ("audio",), ("vision",)],
        *[("text", "audio"), ("text", "vision"), ("audio", "vision")],
    }
    assert [len(corruption.patterns(range(m))) for m in (1, 2, 4, 7)] == [
        0,
        2,
        14,
        126,
    ]


def test_patterns_are_uniform_at_the_rate_and_never_empty():
    masks = corruption.missing_modality_masks(IDS, ALL, rate=0.7, seed=1)
    gone = np.stack([masks[m] for m in ALL], 1)
    assert not gone.all(1).any()
    assert gone.any(1).mean() == pytest.approx(0.7, abs=0.03)
    _, counts = np.unique(gone[gone.any(1)], axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts / counts.sum() == pytest.approx(np.full(6, 1 / 6), abs=0.03)


@pytest.mark.parametrize("count", [2, 5, 7])
def test_any_number_of_modalities_keeps_at_least_one(count):
    names = puppets.MODALITIES[:count]
    masks = corruption.missing_modality_masks(IDS[:500], names, rate=1.0)
    gone = np.stack([masks[m] for m in names], 1)
    assert not gone.all(1).any() and gone.any(1).all()


def test_a_decision_belongs_to_the_sample_not_to_its_place():
    masks = corruption.missing_modality_masks(IDS[:100], ALL, rate=0.5, seed=9)
    backwards = corruption.missing_modality_masks(
        [*IDS[:100][::-1], "another"], ALL, rate=0.5, seed=9
    )
    for m in ALL:
        np.testing.assert_array_equal(masks[m], backwards[m][:100][::-1])


def test_more_missing_means_the_same_samples_and_others():
    few = corruption.missing_modality_masks(IDS, ALL, rate=0.2, seed=4)
    many = corruption.missing_modality_masks(IDS, ALL, rate=0.6, seed=4)
    struck = np.any([few[m] for m in ALL], 0)
    for m in ALL:
        np.testing.assert_array_equal(few[m][struck], many[m][struck])


def test_chosen_patterns_only():
    masks = corruption.missing_modality_masks(
        IDS, ALL, rate=1.0, patterns=[("text",), ("text", "vision")]
    )
    assert masks["audio"].all() and not masks["text"].any()
    assert masks["vision"].mean() == pytest.approx(0.5, abs=0.05)


# --- splits ---------------------------------------------------------------------------


def test_fixed_patterns_for_evaluation(split):
    for kept in corruption.patterns(ALL):
        corrupted, masks = corruption.fixed_pattern(split, kept)
        for m in ALL:
            assert (corrupted.features[m].lengths > 0).all() == (m in kept)
            assert masks[f"missing_modality/{m}"].all() == (m not in kept)
        batch = corrupted.batch([0, 1, 2])
        assert all(batch.available[m].all() == (m in kept) for m in ALL)
    complete, masks = corruption.fixed_pattern(split, ALL)
    assert same(complete, split) and not any(m.any() for m in masks.values())


def test_a_sample_that_had_one_modality_keeps_it(split):
    gone = np.arange(len(split)) % 2 == 0
    poor = split.without({"audio": gone, "vision": gone})
    corrupted, masks = corruption.missing_modalities(
        poor, rate=1.0, patterns=[("audio",)]
    )
    here = {m: corrupted.features[m].lengths > 0 for m in ALL}
    assert here["text"][gone].all()
    assert not here["text"][~gone].any() and here["audio"][~gone].all()
    assert not masks["missing_modality/text"][gone].any()


def test_missing_frames_keep_lengths_and_one_step(split):
    corrupted, masks = corruption.missing_frames(split, rate=1.0)
    for m in ALL:
        np.testing.assert_array_equal(
            corrupted.features[m].lengths, split.features[m].lengths
        )
        assert masks[f"missing_frame/{m}"].sum() == (
            split.features[m].lengths.sum() - len(split)
        )
    half, masks = corruption.missing_frames(split, rate=0.5, modalities=["audio"])
    assert set(masks) == {"missing_frame/audio"}
    lost = masks["missing_frame/audio"]
    assert lost.mean() == pytest.approx(0.5, abs=0.05)
    x = np.concatenate([half.features["audio"][i] for i in range(len(half))])
    y = np.concatenate([split.features["audio"][i] for i in range(len(split))])
    assert not x[lost].any()
    np.testing.assert_array_equal(x[~lost], y[~lost])
    assert same(half.only(["text", "vision"]), split.only(["text", "vision"]))


def test_noise_is_gaussian_enough_and_of_the_given_scale(split):
    corrupted, masks = corruption.noise(split, scale=2.0, modalities=["vision"])
    added = masks["noise/vision"]
    assert added.dtype == np.float32
    assert added.mean() == pytest.approx(0, abs=0.05)
    assert added.std() == pytest.approx(2.0, rel=0.03)
    z = added / added.std()
    assert (z**4).mean() == pytest.approx(3, abs=0.25)
    x = np.concatenate([corrupted.features["vision"][i] for i in range(len(split))])
    y = np.concatenate([split.features["vision"][i] for i in range(len(split))])
    np.testing.assert_allclose(x - y, added, atol=1e-5)


def test_shift_is_one_affine_map_per_channel(split):
    corrupted, masks = corruption.shift(split, gain=0.3, offset=1.0)
    for m in ALL:
        g, o = masks[f"shift_gain/{m}"], masks[f"shift_offset/{m}"]
        assert g.shape == o.shape == (split.dims[m],) and g.std() > 0.1 < o.std()
        for i in (0, 17):
            np.testing.assert_allclose(
                corrupted.features[m][i], split.features[m][i] * g + o, rtol=1e-6
            )


def test_labels_ids_and_the_seal_are_untouched(split):
    for corrupt in EVERY.values():
        corrupted, _ = corrupt(split)
        assert corrupted.ids == split.ids
        np.testing.assert_array_equal(
            corrupted.labels["sentiment"], split.labels["sentiment"]
        )
    sealed = puppets.load(sizes=(5, 5, 8), num_speakers=3).test
    with pytest.raises(SealedError):
        _ = corruption.noise(sealed, scale=1.0)[0].labels


def test_the_original_is_not_changed(split):
    before = {m: r.values.copy() for m, r in split.features.items()}
    for corrupt in EVERY.values():
        corrupt(split)
    for m, values in before.items():
        np.testing.assert_array_equal(values, split.features[m].values)


# --- masks ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_saved_masks_give_the_same_bytes_again(kind, split, tmp_path):
    corrupted, masks = EVERY[kind](split)
    assert not same(corrupted, split)
    corruption.save_masks(tmp_path / "m.npz", split.ids, masks)
    again = corruption.load_masks(tmp_path / "m.npz", split.ids)
    assert set(again) == set(masks)
    assert same(corruption.apply(split, again), corrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]


@pytest.mark.parametrize("kind", EVERY)
def test_seeded_and_independent_of_order(kind, split):
    corrupted, _ = EVERY[kind](split)
    assert same(EVERY[kind](split)[0], corrupted)
    assert not same(EVERY[kind](split, seed=4)[0], corrupted)
    order = np.random.default_rng(0).permutation(len(split))
    assert same(EVERY[kind](split.select(order))[0], corrupted.select(order))


def test_masks_are_pinned(split):
    digest = hashlib.sha256()
    for kind in sorted(EVERY):
        _, masks = EVERY[kind](split)
        for key in sorted(masks):
            digest.update(key.encode() + masks[key].tobytes())
    assert digest.hexdigest() == PINNED


def test_corruptions_compose(split):
    noisy, a = corruption.noise(split, scale=1.0)
    both, b = corruption.missing_modalities(noisy, rate=0.8)
    assert same(corruption.apply(split, {**a, **b}), both)


# --- bad input ------------------------------------------------------------------------


def test_masks_of_other_samples_are_refused(split, tmp_path):
    _, masks = EVERY["noise"](split)
    corruption.save_masks(tmp_path / "m.npz", split.ids, masks)
    with pytest.raises(CorpusError, match="another order"):
        corruption.load_masks(tmp_path / "m.npz", split.ids[::-1])
    with pytest.raises(CorpusError, match="made for another split"):
        corruption.apply(split.select([0, 1]), masks)
    with pytest.raises(UnknownNameError, match="noise"):
        corruption.apply(split, {"nois/text": masks["noise/text"]})
    with pytest.raises(UnknownNameError, match="pose"):
        corruption.apply(split, {"noise/pose": masks["noise/text"]})


def test_masks_of_another_protocol_are_refused(split, tmp_path, monkeypatch):
    _, masks = EVERY["shift"](split)
    monkeypatch.setattr(corruption, "CORRUPTION_VERSION", "0")
    corruption.save_masks(tmp_path / "m.npz", split.ids, masks)
    monkeypatch.undo()
    with pytest.raises(CorpusError, match="protocol version 0"):
        corruption.load_masks(tmp_path / "m.npz", split.ids)


def test_impossible_requests_say_what_to_do(split):
    with pytest.raises(CorpusError, match="probability"):
        corruption.missing_modalities(split, rate=1.5)
    with pytest.raises(CorpusError, match="none"):
        corruption.missing_modalities(split, rate=0.5, patterns=[()])
    with pytest.raises(CorpusError, match="at least one"):
        corruption.missing_modalities(split.only(["text"]), rate=0.5)
    with pytest.raises(UnknownNameError, match="Did you mean 'audio'"):
        corruption.missing_frames(split, rate=0.5, modalities=["audoi"])
    with pytest.raises(CorpusError, match=">= 0"):
        corruption.noise(split, scale=-1)


def test_an_empty_modality_is_no_obstacle():
    empty = Split(
        "train",
        ["a", "b"],
        {
            "text": Ragged.from_list([np.ones((2, 3)), np.ones((1, 3))]),
            "audio": Ragged.from_list([np.ones((0, 2)), np.ones((0, 2))]),
        },
        {"sentiment": np.zeros((2, 1))},
    )
    for corrupt in EVERY.values():
        corrupted, _ = corrupt(empty)
        assert (corrupted.features["text"].lengths > 0).all()
