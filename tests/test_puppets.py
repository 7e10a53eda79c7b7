"""The puppet world: same bytes, right grammar, exact oracles, knobs, calibration."""

import hashlib
import importlib.util
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmsa_lib import corpora
from mmsa_lib.corpora import puppets
from mmsa_lib.corpora.puppets import PuppetConfig, Scripts, compose
from mmsa_lib.corpora.schema import EMOTIONS, SPLITS, Receipt
from mmsa_lib.errors import CorpusError, SealedError, UnknownNameError

# A change of these bytes is a new world: raise PUPPET_VERSION and measure the
# calibration again (benchmarks/puppet_calibration.py).
PINNED = {"1": "217e7ec19f681c984820dc87dbac09817332c07426de8b05b5c5026108bf5a91"}
PINNED_SCRIPTS = "68f4a5a86045df26efda7a00446480a0a9cfd941ab8a2458cfb2afb7c7e05c4e"
PINNED_EVERYTHING = "f7f8c9322efdfcf884d24c29920b722c483c07f7f22e561caa02c38ebe4d6894"
EVERYTHING = {
    "sizes": (40, 12, 20),
    "num_modalities": 7,
    "num_speakers": 9,
    "synergy": 0.3,
    "conflict": 0.5,
    "redundancy": 0.5,
    "domain": "B",
    "missing": 0.5,
    "informativeness": {"text": 1.5, "audio": 0.5},
    "noise": {"vision": 2.0},
}
RECEIPT = Receipt("", "", "mae", 0.0, 1)
SMALL = {"sizes": (400, 20, 100)}


@pytest.fixture(scope="module")
def corpus():
    return puppets.load()


@pytest.fixture(scope="module")
def tables():
    return {s: Scripts(PuppetConfig(), s) for s in SPLITS}


# --- bytes ---------------------------------------------------------------------------


def test_default_corpus_has_the_pinned_bytes(corpus):
    assert corpus.fingerprint == PINNED[puppets.PUPPET_VERSION]
    assert corpus.card.version == puppets.PUPPET_VERSION
    assert corpus.card.synthetic


def test_every_knob_has_the_pinned_bytes():
    assert puppets.load(**EVERYTHING).fingerprint == PINNED_EVERYTHING


def test_same_bytes_in_a_fresh_process_on_a_lesser_processor():
    """Another hash seed and thread count, and NumPy without its vector extensions."""
    code = (
        "from mmsa_lib.corpora import puppets; "
        f"print(puppets.load(**{EVERYTHING!r}).fingerprint)"
    )
    extensions = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PYTHONHASHSEED": "77",
            "OMP_NUM_THREADS": "2",
            "NPY_DISABLE_CPU_FEATURES": " ".join(extensions),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == PINNED_EVERYTHING


def test_scripts_and_truth_are_pinned_too(tables):
    digest = hashlib.sha256()
    for name in sorted(tables["test"].columns):
        column = tables["test"].columns[name]
        digest.update(name.encode() + column.astype("<f8").tobytes())
    assert digest.hexdigest() == PINNED_SCRIPTS


def test_features_lie_on_the_grid_so_that_the_last_bit_is_no_accident(corpus):
    for ragged in corpus.train.features.values():
        scaled = ragged.values.astype(np.float64) * puppets.GRID
        assert (scaled == np.rint(scaled)).all()


def test_another_seed_is_another_draw(corpus):
    other = puppets.load(seed=1)
    assert other.fingerprint != corpus.fingerprint
    assert other.train.raw_text != corpus.train.raw_text


def test_knobs_of_features_leave_scripts_alone(tables):
    config = PuppetConfig(
        noise={"text": 3.0}, informativeness={"audio": 0.2}, defects=0, redundancy=1
    )
    changed = Scripts(config, "test")
    for name, column in tables["test"].columns.items():
        np.testing.assert_array_equal(column, changed.columns[name])


# --- shape ---------------------------------------------------------------------------


def test_sizes_lengths_and_widths_are_those_of_the_specification(corpus):
    assert [len(corpus[s]) for s in SPLITS] == [1200, 240, 600]
    assert corpus.dims == {"text": 32, "audio": 12, "vision": 10}
    for name, low, high in (("audio", 20, 60), ("vision", 10, 30), ("text", 4, 15)):
        lengths = corpus.train.features[name].lengths
        assert low <= lengths.min() < lengths.max() <= high
        assert len(np.unique(lengths)) > 8  # ragged


def test_labels_lie_on_the_grid_of_five_annotators(corpus):
    y = corpus.train.labels["sentiment"]
    e = corpus.train.labels["emotions"]
    assert y.shape == (1200, 1) and y.dtype == np.float32
    np.testing.assert_array_equal(y, (np.rint(y * 5) / 5).astype(np.float32))
    assert y.min() == -3 and y.max() == 3 and len(np.unique(y)) == 31
    assert 1.3 < y.std() < 1.8 and abs(y.mean()) < 0.3  # MOSI: 1.57 and 0.07
    assert e.shape == (1200, len(EMOTIONS)) and e.min() == 0 and 2 < e.max() <= 3
    share = (e > 0).mean(0)
    assert (share > 0.25).all() and (share < 0.75).all()


def test_emotions_follow_the_names_of_their_columns(corpus):
    s, e = corpus.train.truth["sentiment"], corpus.train.labels["emotions"]
    r = {n: np.corrcoef(s, e[:, k])[0, 1] for k, n in enumerate(EMOTIONS)}
    a = corpus.train.truth["arousal"]
    ra = {n: np.corrcoef(a, e[:, k])[0, 1] for k, n in enumerate(EMOTIONS)}
    assert r["happy"] > 0.6 and max(r["sad"], r["anger"], r["disgust"]) < -0.4
    assert ra["surprise"] > 0.6 and ra["anger"] > 0.2 > ra["sad"]


def test_speakers_never_cross_splits(corpus):
    speakers = {
        s: set(Scripts(PuppetConfig(), s).columns["speaker"].tolist()) for s in SPLITS
    }
    for a, b in itertools.combinations(SPLITS, 2):
        assert not speakers[a] & speakers[b]
    assert sum(map(len, speakers.values())) == PuppetConfig().num_speakers
    assert len({i for s in SPLITS for i in corpus[s].ids}) == 2040


def test_raw_text_is_readable_and_spells_the_tokens(corpus, tables):
    table = tables["train"]
    for i in range(50):
        text = corpus.train.raw_text[i]
        assert text[0].isupper() and text.endswith(".")
        words = text[:-1].replace(",", "").lower().split()
        assert tuple(words) == table.words(i)
        assert len(words) == corpus.train.features["text"].lengths[i]


def test_test_split_is_sealed_labels_and_truth_alike(corpus):
    for what in ("labels", "truth"):
        with pytest.raises(SealedError, match="sealed"):
            getattr(corpus.test, what)
    assert set(corpus.test.unseal(RECEIPT).truth) == set(corpus.train.truth)
    assert not corpus.test.batch([0, 1]).labels


def test_truth_holds_what_pages_need(corpus):
    truth = corpus.train.truth
    assert {
        *("sentiment", "literal", "sincerity", "sarcasm", "voice", "face", "arousal"),
        *("delivery", "conflict", "dominant", "speaker", "emotions", "lift"),
        *("late_smile", "defect_trailing", "defect_frozen_from", "defect_clipped"),
    } <= set(truth)
    s = truth["sincerity"] * truth["literal"] + truth["delivery"] + truth["stance"]
    np.testing.assert_array_equal(truth["sentiment"], np.clip(s, -3, 3))
    w, v, f = (np.abs(truth[k]) for k in ("literal", "voice", "face"))
    assert set(truth["dominant"]) == {"text", "audio", "vision"}
    assert (w >= np.maximum(v, f))[truth["dominant"] == "text"].all()


# --- grammar --------------------------------------------------------------------------

GOOD, BAD = 6, -7
PLAIN, NOT = 4, puppets.NEGATORS["not"]
VERY = puppets.INTENSIFIERS["very"]


def test_negation_turns_and_intensifiers_stretch():
    good = compose("one", [(GOOD, PLAIN, PLAIN)])
    assert good == 1.5
    assert compose("one", [(GOOD, VERY, PLAIN)]) == 2.25
    assert compose("one", [(GOOD, puppets.INTENSIFIERS["slightly"], PLAIN)]) == 0.75
    assert compose("one", [(GOOD, PLAIN, NOT)]) == -1.125
    # "not very good" is worse than "not good", although "very good" is better
    assert compose("one", [(GOOD, VERY, NOT)]) == -1.6875
    assert compose("one", [(BAD, PLAIN, NOT)]) == 1.3125


def test_concession_makes_order_matter():
    a, b = (GOOD, PLAIN, PLAIN), (BAD, PLAIN, PLAIN)
    assert compose("but", [a, b]) < 0 < compose("but", [b, a])
    assert compose("although first", [a, b]) == compose("but", [a, b])
    assert compose("although second", [a, b]) > 0
    assert compose("and", [a, b]) == compose("and", [b, a])


def test_generated_sentences_mean_what_the_grammar_says(tables):
    """Parse the raw words back with nothing but the lexicon, and compose again."""
    table = tables["train"]
    forms = list(puppets.FORMS)
    seen = set()
    for i in range(400):
        words = table.words(i)
        clauses = []
        for k, word in enumerate(words):
            if word == "the":
                clauses.append([None, 4, 4])
            elif word in puppets.NEGATORS:
                clauses[-1][2] = puppets.NEGATORS[word]
            elif word in puppets.INTENSIFIERS:
                clauses[-1][1] = puppets.INTENSIFIERS[word]
            elif word in puppets.ADJECTIVES["A"]:
                clauses[-1][0] = puppets.ADJECTIVES["A"][word]
            if word == "although":
                form = "although second" if clauses else "although first"
            elif word in ("but", "and"):
                form = word
            elif k == 0:
                form = "one"
        assert form == forms[table.columns["form"][i]]
        assert compose(form, clauses) == table[i].literal
        seen.add(form)
    assert seen == set(forms)


def test_same_words_in_another_order_have_another_meaning(tables):
    """No bag of words can be right about both of these."""
    first = compose("although first", [(GOOD, PLAIN, PLAIN), (BAD, PLAIN, PLAIN)])
    second = compose("although second", [(BAD, PLAIN, PLAIN), (GOOD, PLAIN, PLAIN)])
    assert first == second < 0  # the main clause counts, wherever it stands
    swapped = compose("although second", [(GOOD, PLAIN, PLAIN), (BAD, PLAIN, PLAIN)])
    assert swapped > 0


def test_literal_law_is_the_law_of_the_generated_words():
    config = PuppetConfig(sizes=(40000, 1, 1))
    w16 = Scripts(config, "train").columns["w16"]
    observed = np.bincount(w16 + 48, minlength=97) / len(w16)
    law = puppets.literal_law(config)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    assert np.abs(observed - law).sum() < 0.06  # about 97 cells of 40,000 draws


def test_valence_bends_in_the_lexicon():
    vectors = puppets.lexicon_vectors(PuppetConfig())
    vocabulary = Scripts(PuppetConfig(), "valid").vocabulary
    words = sorted(puppets.ADJECTIVES["A"], key=puppets.ADJECTIVES["A"].get)
    x = vectors[[vocabulary.index(w) for w in words]]
    v = np.array([puppets.ADJECTIVES["A"][w] for w in words]) / 4
    low, mid, high = x[v < -2].mean(0), x[np.abs(v) < 0.6].mean(0), x[v > 2].mean(0)
    # the middle lies far off the straight line between the ends
    off = mid - (low + high) / 2
    assert np.linalg.norm(off) > 0.5 * np.linalg.norm(high - low)


# --- sarcasm --------------------------------------------------------------------------


def test_sarcasm_is_told_by_voice_and_face_together_and_by_neither_alone():
    config = PuppetConfig(sizes=(20000, 1, 1), synergy=0.3)
    col = Scripts(config, "train").columns
    sarcastic = col["c"] < 0
    lift, late = col["lift"] == 1, col["late_smile"] == 1
    assert sarcastic.mean() == pytest.approx(0.3, abs=0.015)
    np.testing.assert_array_equal(sarcastic, lift & late)
    for cue in (lift, late):  # alone, "sincere" stays the better guess
        assert sarcastic[cue].mean() < 0.5
    assert (lift & ~late).mean() > 0.25 and (late & ~lift).mean() > 0.25
    # nor do the words or the displayed delivery tell
    for name in ("w16", "voice16", "face16", "arousal"):
        assert abs(np.corrcoef(col[name], sarcastic)[0, 1]) < 0.03


def test_sarcasm_turns_words_and_displayed_delivery():
    table = Scripts(PuppetConfig(synergy=1.0, **SMALL), "test")
    script = table[0]
    assert script.sincerity == -1
    total = -(script.literal + script.voice + script.face)
    assert script.sentiment == max(-3, min(3, total))


def test_synergy_changes_nobodys_words():
    plain = Scripts(PuppetConfig(**SMALL), "train")
    mocking = Scripts(PuppetConfig(synergy=0.5, **SMALL), "train")
    assert [plain.text(i) for i in range(50)] == [mocking.text(i) for i in range(50)]
    np.testing.assert_array_equal(plain.columns["voice16"], mocking.columns["voice16"])


# --- scripts as objects ---------------------------------------------------------------


def test_a_script_is_all_that_a_performer_needs(tables):
    table = Scripts(PuppetConfig(synergy=0.5), "valid")
    for i in (0, 3, 100):
        script = table[i]
        assert script.tokens and len(script.token_times) == len(script.tokens)
        assert list(script.token_times) == sorted(script.token_times)
        assert 2.0 <= script.seconds <= 6.0
        events = {e.track: e for e in script.events}
        assert ("late smile" in events) == bool(table.columns["late_smile"][i])
        assert (events["lift"].amount > 0) == bool(table.columns["lift"][i])
        if script.sincerity < 0:
            assert events["late smile"].centre > 0.7 < events["lift"].centre
        for e in script.events:
            assert 0 <= e.centre <= 1


# --- knobs ----------------------------------------------------------------------------


def pooled(ragged):
    return np.stack([ragged[i].mean(0) for i in range(len(ragged))]).astype(float)


def explained(x, y):
    """In-sample r of least squares on an intercept and x."""
    x = np.column_stack([np.ones(len(x)), x])
    return float(np.corrcoef(x @ np.linalg.lstsq(x, y, rcond=None)[0], y)[0, 1])


def test_informativeness_scales_what_a_modality_shows():
    for m, latent in (("text", "literal"), ("audio", "voice"), ("vision", "face")):
        r = []
        for gain in (0.0, 0.5, 1.0):
            train = puppets.load(informativeness={m: gain}, **SMALL).train
            r.append(explained(pooled(train.features[m]), train.truth[latent]))
        # in-sample chance level is sqrt(width / n)
        chance = np.sqrt(train.dims[m] / len(train))
        assert r[0] < 1.5 * chance < r[2] and r[0] < r[1] < r[2]


def test_noise_hides_what_a_modality_shows():
    r = []
    for noise in (1.0, 3.0):
        train = puppets.load(noise={"audio": noise}, **SMALL).train
        r.append(explained(pooled(train.features["audio"]), train.truth["voice"]))
    assert r[0] > r[1] + 0.1


def test_text_above_one_shows_the_composed_valence():
    easy = puppets.load(informativeness={"text": 2.0}, **SMALL).train
    assert explained(pooled(easy.features["text"]), easy.truth["literal"]) > 0.97


def test_redundancy_repeats_the_words_as_a_product_only():
    config = dict(SMALL, defects=0)
    with_echo = puppets.load(redundancy=1.0, **config).train
    without = puppets.load(**config).train
    for m in ("audio", "vision"):
        echo = pooled(with_echo.features[m]) - pooled(without.features[m])
        w = with_echo.truth["literal"]
        assert explained(echo, w) < 0.35
        products = np.stack(
            [
                echo[:, i] * echo[:, j]
                for i, j in itertools.combinations(range(echo.shape[1]), 2)
            ],
            1,
        )
        assert explained(products, w) > 0.99


def test_delivery_scales_voice_and_face():
    loud = Scripts(PuppetConfig(delivery=2.0, **SMALL), "train").columns
    usual = Scripts(PuppetConfig(**SMALL), "train").columns
    ratio = loud["voice16"].std() / usual["voice16"].std()
    assert ratio == pytest.approx(2, abs=0.05)
    mute = Scripts(PuppetConfig(delivery=0, **SMALL), "train").columns
    assert not mute["face16"].any()


def test_conflict_turns_the_emotions_of_a_share_of_speakers():
    table = Scripts(PuppetConfig(conflict=0.5), "train")
    col = table.columns
    odd = col["conflict"] < 0
    assert odd.mean() == pytest.approx(0.5, abs=0.05)
    for speaker in np.unique(col["speaker"]):
        assert len(np.unique(col["conflict"][col["speaker"] == speaker])) == 1
    d = (col["voice16"] + col["face16"]) * col["c"]
    happy = col["emotion"][:, 0]
    assert np.corrcoef(d[odd], happy[odd])[0, 1] < -0.3
    assert np.corrcoef(d[~odd], happy[~odd])[0, 1] > 0.2
    assert (col["display"][~odd] == 1).all()
    assert (col["display"][odd] == -1).mean() == pytest.approx(0.5, abs=0.06)
    calm = Scripts(PuppetConfig(), "train").columns
    assert (calm["conflict"] == 1).all()
    np.testing.assert_array_equal(calm["s16"], col["s16"])  # sentiment is untouched


@pytest.mark.parametrize("count", range(2, 8))
def test_two_to_seven_modalities(count):
    corpus = puppets.load(num_modalities=count, **SMALL)
    assert corpus.modalities == puppets.MODALITIES[:count]
    assert corpus.dims == {m: puppets.WIDTHS[m] for m in corpus.modalities}
    stance = corpus.train.truth["stance"]
    assert len(np.unique(stance)) == 1 + max(0, (count - 3) // 2)


def test_further_modalities_reveal_only_a_product():
    config = PuppetConfig(num_modalities=7, sizes=(2000, 1, 1))
    train = puppets.load(config).train
    stance = train.truth["stance"]
    factor = {}
    for j, m in enumerate(("pose", "gaze", "hands", "heart")):
        x = pooled(train.features[m])
        assert explained(x, train.truth["factors"][:, j]) > 0.8
        assert explained(x, stance) < 0.1
        factor[m] = train.truth["factors"][:, j]
    product = factor["pose"] * factor["gaze"] + factor["hands"] * factor["heart"]
    np.testing.assert_array_equal(stance, product * puppets.STANCE / puppets.LATTICE)


def test_domain_parts_shift_only_what_they_name():
    base = puppets.load(domain="B", domain_parts=(), **SMALL).train

    def shifted(*parts):
        return puppets.load(domain="B", domain_parts=parts, **SMALL).train

    def moved(split, m):
        a, b = pooled(base.features[m]), pooled(split.features[m])
        return np.abs(a.mean(0) - b.mean(0)).max() > 0.15

    lexicon = shifted("lexicon")
    assert moved(lexicon, "text") and not moved(lexicon, "audio")
    assert not set(" ".join(lexicon.raw_text).lower().split()) & {"plot", "awful"}
    np.testing.assert_array_equal(lexicon.truth["literal"], base.truth["literal"])
    for part in ("speaker", "channel"):
        split = shifted(part)
        assert split.raw_text == base.raw_text
        assert moved(split, "audio") and moved(split, "vision")
        assert not moved(split, "text")
        np.testing.assert_array_equal(
            split.labels["sentiment"], base.labels["sentiment"]
        )
    prior = shifted("prior")
    difference = prior.labels["sentiment"].mean() - base.labels["sentiment"].mean()
    assert difference < -0.3
    assert puppets.load(domain="B", **SMALL).card.notes[0].startswith("shift applied")


def test_domains_share_neither_ids_nor_utterances(corpus):
    b = puppets.load(domain="B", domain_parts=())
    assert not set(b.train.ids) & set(corpus.train.ids)
    assert b.train.raw_text != corpus.train.raw_text


def test_recording_defects_are_there_and_known():
    train = puppets.load().train
    truth = train.truth
    padded = np.flatnonzero(truth["defect_trailing"])
    assert 0.06 < len(padded) / 1200 < 0.18
    for i in padded[:20]:
        tail = truth["defect_trailing"][i]
        assert not train.features["audio"][i][-tail:].any()
        assert train.features["audio"][i][-tail - 1].any()
    for i in np.flatnonzero(truth["defect_frozen_from"] >= 0)[:20]:
        frozen = train.features["vision"][i][truth["defect_frozen_from"][i] :]
        assert (frozen == frozen[0]).all()
    clipped = np.flatnonzero(truth["defect_clipped"])
    assert 0.04 < len(clipped) / 1200 < 0.13
    for i in clipped[:20]:
        assert np.abs(train.features["audio"][i]).max() == 1
    clean = puppets.load(defects=0, **SMALL).train.truth
    assert not clean["defect_trailing"].any() and not clean["defect_clipped"].any()


def test_missing_modalities_are_a_knob_of_the_corpus():
    pattern = (("text",), ("audio", "vision"))
    corpus = puppets.load(missing=0.6, missing_patterns=pattern, **SMALL)
    for split in (corpus.train, corpus.test.unseal(RECEIPT)):
        here = {m: r.lengths > 0 for m, r in split.features.items()}
        for m, present in here.items():
            np.testing.assert_array_equal(present, ~split.truth[f"missing_{m}"])
        np.testing.assert_array_equal(here["audio"], here["vision"])
        assert (here["text"] | here["audio"]).all()
        incomplete = ~(here["text"] & here["audio"])
        assert incomplete.mean() == pytest.approx(0.6, abs=0.15)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_modalities": 8}, "2 to 7"),
        ({"synergy": 1.2}, r"\[0, 1\]"),
        ({"domain": "C"}, "Known: A, B"),
        ({"domain_parts": ("lexikon",)}, "Did you mean 'lexicon'"),
        ({"noise": {"audoi": 1}}, "Did you mean 'audio'"),
        ({"informativeness": {"text": -1}}, ">= 0"),
        ({"num_speakers": 2}, "at least 3"),
        ({"sizes": (10, 0, 5)}, "sizes"),
        ({"synergie": 0.3}, "Did you mean 'synergy'"),
    ],
)
def test_impossible_knobs_are_refused_with_the_remedy(knobs, message):
    with pytest.raises((CorpusError, UnknownNameError), match=message):
        puppets.load(**knobs)


def test_loads_by_name_and_reads_its_configuration_back():
    config = PuppetConfig(**EVERYTHING)
    corpus = corpora.load("puppets", **EVERYTHING)
    assert PuppetConfig.from_card(corpus.card) == config
    with pytest.raises(CorpusError, match="only puppets have oracles"):
        PuppetConfig.from_card(replace(corpus.card, name="mosi"))


# --- oracles --------------------------------------------------------------------------


def brute_force(config, table, row, shown):
    """P(label | what is shown) of one sample by going through every hidden world."""
    col = {k: v[row] for k, v in table.columns.items()}
    bells = list(enumerate(puppets.BELL))
    delivery = [
        (int(np.rint(puppets.DELIVERY * config.delivery * (k - 30))), p)
        for k, p in bells
    ]
    law = puppets.literal_law(config)
    words = [(w - 48, p) for w, p in enumerate(law) if p]
    out = np.zeros(31)
    labels = puppets.label_law()
    for c, cues in puppets.cues_of(config).items():
        pc = config.synergy if c < 0 else 1 - config.synergy
        for (lift, late), q in cues.items():
            if "audio" in shown and lift != col["lift"]:
                continue
            if "vision" in shown and late != col["late_smile"]:
                continue
            for w, pw in [(col["w16"], 1)] if "text" in shown else words:
                for v, pv in [(col["voice16"], 1)] if "audio" in shown else delivery:
                    faces = [(col["face16"], 1)] if "vision" in shown else delivery
                    for f, pf in faces:
                        for stance, ps in stances(config, col, shown):
                            s = max(-48, min(48, c * (w + v + f) + stance))
                            out += pc * q * pw * pv * pf * ps * labels[s + 48]
    return out / out.sum()


def stances(config, col, shown):
    if config.num_modalities < 5:
        return [(0, 1.0)]
    if "pose" in shown and "gaze" in shown:
        return [(puppets.STANCE * col["factors"][0] * col["factors"][1], 1.0)]
    return [(puppets.STANCE * a * b, 0.25) for a in (-1, 1) for b in (-1, 1)]


@pytest.mark.parametrize(
    ("knobs", "subsets"),
    [
        (
            {"synergy": 0.3},
            [("text",), ("text", "audio"), ("audio", "vision"), ("text", "vision")],
        ),
        ({"num_modalities": 2, "synergy": 0.4}, [("text",), ("text", "audio")]),
        (
            {"num_modalities": 5, "synergy": 0.1},
            [("text", "audio", "vision"), ("text", "audio", "vision", "pose", "gaze")],
        ),
        ({"domain": "B", "delivery": 0.3}, [("text",), ("audio", "vision")]),
    ],
)
def test_oracle_is_the_exact_conditional_mean(knobs, subsets):
    config = PuppetConfig(sizes=(2, 1, 3), num_speakers=3, **knobs)
    table = Scripts(config, "test")
    for shown in subsets:
        mean = puppets.oracle_predictions(config, "test", shown)
        median = puppets.oracle_predictions(config, "test", shown, loss="mae")
        for row in range(len(table)):
            law = brute_force(config, table, row, shown)
            assert mean[row, 0] == pytest.approx(law @ puppets.LABEL_VALUES, abs=1e-9)
            at = np.searchsorted(law.cumsum(), 0.5 - 1e-9)
            assert median[row, 0] == pytest.approx(puppets.LABEL_VALUES[at])


def test_oracle_is_calibrated_and_more_modalities_never_hurt():
    config = PuppetConfig(sizes=(20000, 1, 1), synergy=0.3)
    y = Scripts(config, "train").labels()["sentiment"].astype(float)
    error = {}
    for size in range(4):
        for shown in itertools.combinations(config.modalities, size):
            best = puppets.oracle_predictions(config, "train", shown)
            assert (y - best).mean() == pytest.approx(0, abs=0.04)
            error[shown] = ((y - best) ** 2).mean()
            if best.std() > 1e-9:  # regression of y on the oracle has slope 1
                slope = np.cov(y[:, 0], best[:, 0])[0, 1] / best.var()
                assert slope == pytest.approx(1, abs=0.05)
    for shown in error:
        for more in error:
            if set(shown) < set(more):
                assert error[more] < error[shown]
    floor = puppets.noise_floor(config, "train", loss="mse")
    assert error[config.modalities] == pytest.approx(floor, rel=0.05)
    assert 0.15 < puppets.noise_floor(config, "train") < 0.3


def test_the_median_oracle_is_what_no_mae_can_beat():
    config = PuppetConfig(sizes=(5000, 1, 1), synergy=0.3)
    y = Scripts(config, "train").labels()["sentiment"]
    mean = puppets.oracle_predictions(config, "train", ("text",))
    median = puppets.oracle_predictions(config, "train", ("text",), loss="mae")
    assert np.abs(y - median).mean() < np.abs(y - mean).mean() - 0.05


def test_oracle_sees_nothing_in_uninformative_or_missing_modalities():
    blind = PuppetConfig(informativeness={"audio": 0.0}, **SMALL)
    np.testing.assert_array_equal(
        puppets.oracle_predictions(blind, "test", ("text", "audio")),
        puppets.oracle_predictions(blind, "test", ("text",)),
    )
    gone = PuppetConfig(missing=1.0, missing_patterns=(("audio",),), **SMALL)
    np.testing.assert_array_equal(
        puppets.oracle_predictions(gone, "test"),
        puppets.oracle_predictions(replace(gone, missing=0.0), "test", ("audio",)),
    )


def test_oracle_predicts_on_a_sealed_split_and_opens_nothing(corpus):
    oracle = puppets.Oracle(PuppetConfig(), ("text",))
    some = corpus.test.select([5, 1, 300])
    expected = puppets.oracle_predictions(corpus, "test", ("text",))
    np.testing.assert_array_equal(oracle(some), expected[[5, 1, 300]])
    assert some.sealed and expected.shape == (600, 1)
    with pytest.raises(CorpusError, match="same corpus"):
        oracle(puppets.load(domain="B").test)
    with pytest.raises(UnknownNameError, match="pose"):
        puppets.oracle_predictions(corpus, "test", ("pose",))


# --- calibration ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab():
    """The benchmark that measures the whole table; here it runs with fewer epochs."""
    path = Path(__file__).parents[1] / "benchmarks" / "puppet_calibration.py"
    spec = importlib.util.spec_from_file_location("puppet_calibration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_calibration_of_frozen_features(lab, seed):
    v = lab.frozen_rows(lab.Data(puppets.load(seed=seed)))
    assert 0.60 <= v["text r"] <= 0.75
    assert 0.20 <= v["audio r"] <= 0.40
    assert 0.20 <= v["vision r"] <= 0.40
    assert v["audio+vision r"] >= max(v["audio r"], v["vision r"]) + 0.05


def test_calibration_of_fusion_and_of_the_domain_shift(lab, corpus):
    data = lab.Data(corpus)
    net, v = lab.fusion_rows(corpus, data, epochs=5)
    assert v["all MAE"] <= v["text MAE"] - 0.10
    assert v["all MAE"] >= v["oracle MAE"] + 0.05
    assert v["text MAE"] >= v["text oracle MAE"] + 0.05
    assert lab.bag_of_words(data)[1] >= v["text MAE"] + 0.05
    shift = lab.domain_rows(corpus, net, epochs=4)
    loss = shift["domain target MAE"] - shift["domain control MAE"]
    assert loss >= 0.15
    assert shift["domain target MAE"] - shift["domain norms MAE"] >= 0.5 * loss


def test_calibration_of_synergy(lab):
    v = lab.synergy_rows(0, epochs=10)
    assert abs(v["synergy additive MAE"] - v["synergy text MAE"]) <= 0.15
    assert v["synergy product MAE"] <= v["synergy additive MAE"] - 0.10
    assert v["synergy product MAE"] >= v["synergy oracle MAE"] + 0.05


def test_calibration_of_conflict(lab):
    v = lab.conflict_rows(0)
    assert v["conflict on cosine"] < -0.03
    assert v["conflict off cosine"] > 0.10


def test_calibration_of_dominance(lab):
    v = lab.dominance_rows(0, epochs=4, modalities=("audio",))
    assert v["dominance audio joint r"] <= v["dominance audio alone r"] - 0.05
