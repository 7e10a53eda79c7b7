"""The real corpora on the real files (private: skipped where they are absent)."""

import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import command
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from mmsa_lib import corpora
from mmsa_lib.corpora import mosei_video, mosi_text_audio, store
from mmsa_lib.corpora.schema import Receipt
from mmsa_lib.errors import (
    CorpusError,
    DownloadError,
    SealedError,
    UnknownNameError,
)

RECEIPT = Receipt("corpus", "artefact", "mae", 1.0, candidates=1)
FOLDS = ("train", "valid", "test")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        self.server.asked.append(self.path)


@pytest.fixture(scope="module")
def mosi_dir(shared_dir):
    folder = shared_dir / "data" / "cmu_mosi"
    if not (folder / "mosi_text_audio.npz").is_file():
        pytest.skip(f"no CMU-MOSI files in {folder}")
    return folder


@pytest.fixture(scope="module")
def mosi_server(mosi_dir):
    handler = partial(Quiet, directory=mosi_dir / "sources")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def reference(mosi_dir):
    with np.load(mosi_dir / "mosi_text_audio.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def mosi(tmp_path_factory, mosi_dir, mosi_server):
    """(data folder, corpus) built from the served files and precomputed text."""
    data = tmp_path_factory.mktemp("data")
    features = mosi_dir / "mosi_text_audio.npz"
    corpora.prepare(
        "mosi-text-audio", data, True, text_features=features, base_url=mosi_server.url
    )
    return data, corpora.load("mosi-text-audio", data)


# ------------------------------------------------------------------- the registry


def test_names_descriptions_and_unknown_names(tmp_path):
    real = ["mosi-text-audio", "mosei-video"]
    assert corpora.names() == ["puppets", *real, "lesions", "puppet-clips", "clips"]
    for name in corpora.names():
        assert "options:" in corpora.describe(name)
    with pytest.raises(UnknownNameError, match=r"'mossi-text-audio'.*Did you mean"):
        corpora.load("mossi-text-audio")
    with pytest.raises(UnknownNameError, match=r"option of mosi-text-audio.*encoder"):
        corpora.load("mosi-text-audio", tmp_path, encodr="x")
    with pytest.raises(UnknownNameError, match="option of mosei-video"):
        corpora.prepare("mosei-video", tmp_path, encoder="x")
    with pytest.raises(UnknownNameError, match=r"option of puppet-clips.*frames"):
        corpora.load("puppet-clips", frame=2)


def test_names_are_known_without_loading_torch():
    program = (
        "import sys; from mmsa_lib import corpora; corpora.describe('puppets'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        cwd=Path(corpora.__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("name", ["mosi-text-audio", "mosei-video"])
def test_absent_data_names_the_command_that_gets_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MMSA_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match=f"mmsa-book data get {name}") as caught:
        corpora.load(name)
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


def test_terms_come_before_any_download(tmp_path, capsys):
    with pytest.raises(DownloadError, match=r"(?s)research\s+only.*--accept-terms"):
        corpora.prepare(
            "mosi-text-audio", tmp_path, base_url="http://127.0.0.1:9/nobody"
        )
    assert command("data", "get", "mosi-text-audio", "--data-dir", tmp_path) == 1
    assert "nothing was downloaded" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert command("data", "list") == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in corpora.names())
    assert command("data", "get", "lesions") == 0
    assert "lesions is generated when it is loaded" in capsys.readouterr().out


def test_sources_point_at_pinned_commits():
    for name, (home, sha256) in mosi_text_audio.SOURCES.items():
        assert home.startswith("https://raw.githubusercontent.com/"), name
        commit = home.split("/")[5]
        assert len(commit) == 40 and len(sha256) == 64, name
    videos = [v for fold in mosi_text_audio.FOLDS.values() for v in fold]
    assert len(videos) == len(set(videos)) == 93
    assert [len(mosi_text_audio.FOLDS[f]) for f in FOLDS] == [52, 10, 31]


# ------------------------------------------------------------------- mosi-text-audio


def test_mosi_equals_the_reference_file(mosi, reference):
    _, corpus = mosi
    assert {k: len(s) for k, s in corpus.splits.items()} == mosi_text_audio.SIZES
    starts = np.cumsum(reference["text_lengths"]) - reference["text_lengths"]
    for fold in FOLDS:
        split = corpus[fold].unseal(RECEIPT)
        rows = np.flatnonzero(reference["split"] == fold)
        assert list(split.ids) == reference["id"][rows].tolist()
        assert list(split.raw_text) == reference["raw_text"][rows].tolist()
        np.testing.assert_array_equal(
            split.labels["sentiment"][:, 0], reference["label"][rows]
        )
        np.testing.assert_array_equal(
            split.truth["interval"], reference["interval"][rows]
        )
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(
                split.features["audio"][i], reference["audio"][row][None]
            )
            tokens = slice(starts[row], starts[row] + reference["text_lengths"][row])
            np.testing.assert_array_equal(
                split.features["text"][i], reference["text_features"][tokens]
            )
    assert corpus.dims == {"text": 384, "audio": 73}


def test_mosi_labels_have_the_published_facts(mosi):
    """Means, spreads, bins and signs of each fold."""
    _, corpus = mosi
    published = {
        "train": (0.234, 1.509, [24, 199, 227, 248, 227, 313, 46], (552, 53, 679)),
        "valid": (0.310, 1.649, [10, 30, 32, 49, 39, 50, 19], (92, 13, 124)),
        "test": (-0.317, 1.588, [46, 156, 145, 106, 113, 100, 20], (379, 30, 277)),
    }
    for fold, (mean, sd, counts, signs) in published.items():
        y = corpus[fold].unseal(RECEIPT).labels["sentiment"][:, 0]
        assert abs(y.mean() - mean) < 6e-4 and abs(y.std() - sd) < 6e-4
        facts = corpus.card.splits[fold]["sentiment"]
        assert facts["histogram_-3_to_3"] == counts
        assert ((y < 0).sum(), (y == 0).sum(), (y > 0).sum()) == signs
    with pytest.raises(SealedError):
        _ = corpus.test.labels


def test_mosi_card_says_how_it_was_made(mosi):
    data, corpus = mosi
    assert not corpus.card.synthetic
    assert "research" in corpus.card.terms
    assert len(corpus.card.options["text_features_sha256"]) == 64
    assert "precomputed" in corpus.card.description
    text = (next(data.rglob("card.json"))).read_text()
    assert str(data) not in text  # no path of this machine


def test_mosi_is_built_once_and_found_again(
    mosi, mosi_dir, mosi_server, monkeypatch, capsys
):
    data, corpus = mosi
    asked = len(mosi_server.asked)
    features = str(mosi_dir / "mosi_text_audio.npz")
    monkeypatch.setenv("MMSA_MOSI_URL", mosi_server.url)
    get = ["data", "get", "mosi-text-audio", "--accept-terms", "--data-dir", data]
    assert command(*get, "-p", "text_features", features) == 0
    assert "mosi-text-audio is in" in capsys.readouterr().out
    assert len(mosi_server.asked) == asked == 6
    again = corpora.load("mosi-text-audio", data, text_features=features)
    assert again.fingerprint == corpus.fingerprint
    with pytest.raises(CorpusError, match=r"-p encoder other/bert.*") as caught:
        corpora.load("mosi-text-audio", data, encoder="other/bert")
    assert "there is text by precomputed-" in str(caught.value)


def test_text_features_are_aligned_by_id(mosi, reference, tmp_path):
    ids = reference["id"].tolist()
    lengths, values = reference["text_lengths"], reference["text_features"]
    bounds = np.cumsum(lengths)[:-1]
    backwards = {
        "id": reference["id"][::-1],
        "text_lengths": lengths[::-1],
        "text_features": np.concatenate(np.split(values[:, :8], bounds)[::-1]),
    }
    path = tmp_path / "f.npz"
    np.savez(path, **backwards)
    got = mosi_text_audio.read_text_features(path, ids)
    np.testing.assert_array_equal(got[0], values[: lengths[0], :8])
    np.testing.assert_array_equal(got[2198], values[-lengths[-1] :, :8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_lengths": None}, "lacks the arrays text_lengths; it has"),
        ({"id": np.array(["a", "c"])}, r"for 1 of 2 segments \(b"),
        ({"id": np.array(["a", "b", "b"])}, "repeats ids"),
        ({"text_lengths": np.array([2, 2])}, r"\(5, 4\).* and 4 steps in all"),
        ({"text_features": np.zeros(5)}, r"\(5,\)"),
        ({"text_features": np.zeros((5, 4), int)}, "expected floats"),
        ({"id": np.array(["a", "b"], dtype=object)}, "object arrays are not opened"),
    ],
)
def test_text_features_of_another_shape_are_refused(tmp_path, change, message):
    arrays = {
        "id": np.array(["a", "b"]),
        "text_lengths": np.array([2, 3]),
        "text_features": np.zeros((5, 4), np.float32),
    } | change
    path = tmp_path / "f.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(CorpusError, match=message):
        mosi_text_audio.read_text_features(path, ["a", "b"])


def test_a_file_that_is_no_npz_and_one_that_is_not_there(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    for content in (
        b"not a zip",
        b"PK\x03\x04 cut off",
        (tmp_path / "one.npy").read_bytes(),
    ):
        (tmp_path / "f.npz").write_bytes(content)
        with pytest.raises(CorpusError, match=r"not a \.npz"):
            mosi_text_audio.read_text_features(tmp_path / "f.npz", ["a"])
    with pytest.raises(CorpusError, match="no file of text features"):
        corpora.prepare(
            "mosi-text-audio", tmp_path, True, text_features=tmp_path / "none.npz"
        )


# ------------------------------------------------------------------- the encoder


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """A random two-layer BERT with a word tokenizer, saved as the hub stores one."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hub") / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "movie", "was", "good", "a"]
    tokenizer = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.NFC()  # keeps case: the caller must lower it
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_encode_gives_every_token_whatever_the_batch(tiny_encoder):
    texts = ["THE MOVIE WAS GOOD", "a " * 90, "THE", "the movie was good"]
    together, made_by = mosi_text_audio.encode(texts, str(tiny_encoder), batch_size=4)
    assert together.lengths.tolist() == [6, 50, 3, 6]  # [CLS] and [SEP] included
    assert together.values.dtype == np.float32 and together.width == 16
    np.testing.assert_allclose(together[0], together[3], atol=1e-5)  # lower-cased
    alone, _ = mosi_text_audio.encode(texts, str(tiny_encoder), batch_size=1)
    for i in range(4):  # padding of a batch changes nothing
        np.testing.assert_allclose(together[i], alone[i], atol=1e-5)
    assert made_by["encoder"] == "tiny-bert" and made_by["max_tokens"] == 50
    assert len(made_by["encoder_revision"]) == 64


def test_mosi_with_an_encoder_from_a_local_folder(
    mosi, mosi_server, tiny_encoder, reference
):
    data, precomputed = mosi
    asked = len(mosi_server.asked)
    folder = corpora.prepare("mosi-text-audio", data, encoder=str(tiny_encoder))
    assert len(mosi_server.asked) == asked  # the sources were there, so no terms
    assert folder.name.startswith("tiny-bert-")
    built = (folder / "card.json").stat().st_mtime_ns
    corpora.prepare("mosi-text-audio", data, encoder=str(tiny_encoder))
    assert (folder / "card.json").stat().st_mtime_ns == built  # not encoded again
    corpus = corpora.load("mosi-text-audio", data, encoder=str(tiny_encoder))
    assert corpus.dims == {"text": 16, "audio": 73}
    assert corpus.card.options["encoder"] == "tiny-bert"
    assert str(tiny_encoder) not in (folder / "card.json").read_text()
    assert list(corpus.valid.ids) == list(precomputed.valid.ids)
    some = [0, 7, 228]
    text, _ = mosi_text_audio.encode(
        [corpus.valid.raw_text[i] for i in some], str(tiny_encoder)
    )
    for k, i in enumerate(some):
        np.testing.assert_allclose(corpus.valid.features["text"][i], text[k], atol=1e-5)
    with pytest.raises(CorpusError, match=r"precomputed-.*tiny-bert"):
        corpora.load("mosi-text-audio", data)  # two were built: which one?
    assert store.verify(folder) == corpus.fingerprint


def test_an_encoder_that_is_not_there(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"could not be loaded(?s:.*)text_features"):
        mosi_text_audio.encode(["a"], str(tmp_path / "empty"))


# ------------------------------------------------------------------- mosei-video


def folds_file(path, fold, labels="f4"):
    """30 videos in the form of the file that mosei-video is read from."""
    rng, n = np.random.default_rng(0), len(fold)
    np.savez(
        path,
        std_fold=fold,
        video_id=np.array([f"v{i}" for i in range(n)]),
        text=rng.normal(size=(n, 4)).astype("f4"),
        audio=rng.normal(size=(n, 3)).astype("f4"),
        vision=rng.normal(size=(n, 2)).astype("f4"),
        label_mean_7class_sentiment=rng.uniform(-3, 3, n).astype(labels),
    )
    return path


STD_FOLD = np.array(["train"] * 10 + ["valid"] * 5 + ["test"] * 10 + ["none"] * 5)


@pytest.mark.parametrize(
    ("known", "other", "said"),
    [
        ("train", "Train", r"'Train' \(10\)"),
        ("valid", "dev", r"'dev' \(5\)"),
        ("test", "test ", r"'test ' \(10\)"),
        ("none", "", r"'' \(5\)"),
        ("none", "None", r"'None' \(5\)"),
        ("train", "0", r"'0' \(10\)"),
    ],
)
def test_folds_that_are_not_known_are_named(tmp_path, known, other, said):
    renamed = STD_FOLD.astype("U8")
    renamed[renamed == known] = other
    path = folds_file(tmp_path / "a.npz", renamed)
    with pytest.raises(CorpusError, match=f"{said}. Known: train, valid, test, none"):
        corpora.load("mosei-video", path=path)
    assert len(corpora.load("mosei-video", path=folds_file(path, STD_FOLD)).train) == 10


def test_one_stray_fold_among_many_is_named(tmp_path):
    stray = STD_FOLD.astype("U8")
    stray[3] = "Train"
    with pytest.raises(CorpusError, match=r"'Train' \(1\)\. Known"):
        corpora.load("mosei-video", path=folds_file(tmp_path / "a.npz", stray))


def test_a_fold_without_videos_and_labels_of_integers_are_named(tmp_path):
    path = folds_file(tmp_path / "a.npz", STD_FOLD[STD_FOLD != "valid"])
    with pytest.raises(CorpusError, match="split 'valid' has no samples"):
        corpora.load("mosei-video", path=path)
    path = folds_file(tmp_path / "a.npz", STD_FOLD, "i8")
    with pytest.raises(CorpusError, match="int64, expected floats"):
        corpora.load("mosei-video", path=path)


@pytest.fixture(scope="module")
def mosei_file(shared_dir):
    path = shared_dir / "data" / "cmu_mosei" / mosei_video.FILE
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="module")
def mosei(mosei_file):
    return corpora.load("mosei-video", path=mosei_file)


def test_mosei_counts_dims_and_cleaned_audio(mosei, mosei_file):
    assert {k: len(s) for k, s in mosei.splits.items()} == {
        "train": 635, "valid": 86, "test": 180,
    }  # fmt: skip
    assert mosei.dims == {"text": 768, "audio": 40, "vision": 35}
    file = np.load(mosei_file, allow_pickle=False)
    used = file["std_fold"] != "none"
    infinite = int(np.isneginf(file["audio"][used]).sum())
    assert infinite > 0
    assert mosei.card.options["nonfinite_set_to_0"] == {
        "text": 0, "audio": infinite, "vision": 0,
    }  # fmt: skip
    assert mosei.card.options["unused"] == 21
    assert any("21 videos" in note for note in mosei.card.notes)
    assert any("no published MOSEI table" in note for note in mosei.card.notes)
    row = {v: k for k, v in enumerate(file["video_id"].tolist())}
    for fold in FOLDS:
        split = mosei[fold].unseal(RECEIPT)
        rows = [row[i] for i in split.ids]
        assert set(file["std_fold"][rows]) == {fold}
        np.testing.assert_array_equal(
            split.labels["sentiment"][:, 0], file["label_mean_7class_sentiment"][rows]
        )
        audio = split.batch(np.arange(len(split))).features["audio"][:, 0].numpy()
        raw = file["audio"][rows]
        np.testing.assert_array_equal(audio, np.where(np.isfinite(raw), raw, 0))


def test_mosei_ridge_gives_the_measured_error(mosei):
    """Ridge on all three: MAE .582, r .592; the mean predictor .761 (data README)."""

    def table(split):
        batch = split.batch(np.arange(len(split)))
        return np.concatenate([batch.features[m][:, 0] for m in split.modalities], 1)

    scaler = StandardScaler().fit(table(mosei.train))
    x = {fold: scaler.transform(table(mosei[fold])) for fold in FOLDS}
    y = {f: mosei[f].unseal(RECEIPT).labels["sentiment"][:, 0] for f in FOLDS}

    def error(alpha, fold):
        model = Ridge(alpha=alpha).fit(x["train"], y["train"])
        return np.abs(model.predict(x[fold]) - y[fold]).mean()

    alpha = min((10.0**k for k in range(1, 6)), key=lambda a: error(a, "valid"))
    assert error(alpha, "test") == pytest.approx(0.582, abs=0.02)
    constant = np.abs(y["train"].mean() - y["test"]).mean()
    assert constant == pytest.approx(0.761, abs=0.002)


def test_mosei_is_copied_to_where_load_looks(mosei, mosei_file, tmp_path, capsys):
    get = ["data", "get", "mosei-video", "--data-dir", tmp_path]
    assert command(*get) == 1
    assert "no public download" in capsys.readouterr().err
    assert command(*get, "-p", "path", mosei_file) == 0
    assert corpora.load("mosei-video", tmp_path).fingerprint == mosei.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == [mosei_video.FILE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": None}, "lacks the arrays audio"),
        ({"vision": np.zeros((3, 35), np.float32)}, r"\(3, 35\), expected \(2, D\)"),
        ({"text": np.zeros((2, 1, 768), np.float32)}, r"\(2, 1, 768\)"),
        ({"std_fold": np.array([0, 1])}, "int64, expected strings"),
        ({"std_fold": np.array(["train", None])}, "object arrays are not opened"),
    ],
)
def test_mosei_files_of_another_shape_are_refused(tmp_path, change, message):
    arrays = {
        "video_id": np.array(["a", "b"]),
        "text": np.zeros((2, 768), np.float32),
        "audio": np.zeros((2, 40), np.float32),
        "vision": np.zeros((2, 35), np.float32),
        "label_mean_7class_sentiment": np.zeros(2, np.float32),
        "std_fold": np.array(["train", "test"]),
    } | change
    path = tmp_path / mosei_video.FILE
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(CorpusError, match=message):
        corpora.load("mosei-video", tmp_path)


def test_the_leaking_text_is_read_for_the_audit_only(mosi_dir):
    ids, vectors, trained = mosi_text_audio.leaking_text(mosi_dir / "sources")
    segments = mosi_text_audio.read_segments(mosi_dir / "sources")
    assert sorted(ids) == sorted(segments.ids)
    assert vectors.shape == (2199, 100) and vectors.dtype == np.float32
    assert trained.sum() == 1447
    video = np.array([i.rsplit("_", 1)[0] for i in ids])
    assert not set(video[trained]) & set(video[~trained])
