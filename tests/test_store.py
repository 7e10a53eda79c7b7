"""The store: what goes in comes out, in one piece or not at all, in little memory."""

import errno
import json
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mmsa_lib.corpora import store
from mmsa_lib.corpora.schema import (
    Card,
    Ragged,
    Receipt,
    Split,
    fingerprint,
    make_corpus,
)
from mmsa_lib.errors import CorpusError, SealedError, UnknownNameError

RECEIPT = Receipt("corpus", "artefact", "mae", 1.0, candidates=3)


def corpus(seed=0, n=7, scale=1.0):
    rng = np.random.default_rng(seed)
    splits = {}
    for name in ("train", "valid", "test"):
        lengths = rng.integers(0, 6, n)
        features = {
            "text": [scale * rng.normal(size=(t, 5)) for t in lengths],
            "audio": [rng.normal(size=(1, 3)) for _ in range(n)],
        }
        splits[name] = Split(
            name,
            [f"{name}_{i}" for i in range(n)],
            {m: Ragged.from_list(x) for m, x in features.items()},
            {"sentiment": rng.uniform(-3, 3, n), "kind": rng.integers(0, 4, n)},
            raw_text=[f"grüße {i} 🎭" * (i % 3) for i in range(n)],
            truth={
                "flag": rng.random(n) < 0.5,
                "latent": rng.normal(size=(n, 2)),
                "form": np.array(["plain", "höflich"])[rng.integers(0, 2, n)],
            },
        )
    card = Card("toy", "a toy", "tests", "none", True, notes=["a note"])
    return make_corpus(card, splits)


def assert_same(a, b):
    for name in a.splits:
        x, y = a[name].unseal(RECEIPT), b[name].unseal(RECEIPT)
        assert list(x.ids) == list(y.ids) and list(x.raw_text) == list(y.raw_text)
        for m in x.features:
            for i in range(len(x)):
                np.testing.assert_array_equal(x.features[m][i], y.features[m][i])
                assert y.features[m][i].dtype == np.float32
        for kind in ("labels", "truth"):
            assert list(getattr(x, kind)) == list(getattr(y, kind))
            for k, value in getattr(x, kind).items():
                other = getattr(y, kind)[k]
                np.testing.assert_array_equal(value, other)
                assert value.dtype.kind == other.dtype.kind


def test_round_trip_keeps_everything_and_seals_test(tmp_path):
    original = corpus()
    assert store.write(original, tmp_path / "s") == tmp_path / "s"
    opened = store.open_store(tmp_path / "s")
    assert_same(original, opened)
    assert opened.name == "toy" and opened.card.notes == ["a note"]
    assert opened.fingerprint == original.fingerprint
    assert store.verify(tmp_path / "s") == fingerprint(original.splits)
    assert opened.modalities == ("text", "audio")
    with pytest.raises(SealedError):
        _ = opened.test.labels
    assert opened.train.batch([3, 1]).features["text"].shape[-1] == 5
    assert sorted(p.suffix for p in (tmp_path / "s").iterdir()) == [
        ".json", ".safetensors",
    ]  # fmt: skip


def test_data_file_is_a_valid_safetensors_file(tmp_path):
    original = corpus()
    store.write(original, tmp_path)
    (path,) = tmp_path.glob("data-*.safetensors")
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["fingerprint"] == original.fingerprint
        text = file.get_tensor("valid/features/text")
        offsets = file.get_tensor("valid/offsets/text")
    assert text.dtype == np.float32
    for i in range(7):
        np.testing.assert_array_equal(
            text[offsets[i] : offsets[i + 1]], original.valid.features["text"][i]
        )


def test_float16_halves_one_modality_and_its_fingerprint_is_of_what_is_stored(tmp_path):
    original = corpus()
    store.write(original, tmp_path, float16=["text"])
    opened = store.open_store(tmp_path)
    assert opened.train.features["text"].values.dtype == np.float16
    assert opened.train.features["audio"].values.dtype == np.float32
    assert opened.card.modalities["text"]["stored_as"] == "float16"
    x = original.train.features["text"][4]
    np.testing.assert_array_equal(
        opened.train.features["text"][4], x.astype(np.float16).astype(np.float32)
    )
    assert opened.fingerprint != original.fingerprint
    assert store.verify(tmp_path) == opened.fingerprint
    with pytest.raises(UnknownNameError, match="vision"):
        store.write(original, tmp_path, float16=["vision"])
    with pytest.raises(CorpusError, match="beyond float16"):
        store.write(corpus(scale=1e6), tmp_path / "big", float16=["text"])
    assert not (tmp_path / "big").exists()


def test_views_are_stored_as_they_look(tmp_path):
    view = corpus().only(["audio"]).standardised(["audio"])
    store.write(view, tmp_path)
    opened = store.open_store(tmp_path)
    assert_same(view, opened)
    assert list(opened.card.modalities) == ["audio"]
    assert store.verify(tmp_path) == opened.fingerprint != view.fingerprint


def test_writing_from_a_mapped_file_and_from_a_store(tmp_path):
    original = corpus()
    values = np.asarray(original.train.features["text"].values)
    np.save(tmp_path / "values.npy", values)
    mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
    features = dict(original.train.features)
    text = features["text"]
    features["text"] = Ragged(mapped, text.starts, text.lengths)
    original.splits["train"] = original.train._with(features=features)
    store.write(original, tmp_path / "a")
    store.write(store.open_store(tmp_path / "a"), tmp_path / "b")
    assert_same(corpus(), store.open_store(tmp_path / "b"))


def test_a_new_store_replaces_the_old_and_open_readers_keep_theirs(tmp_path):
    store.write(corpus(seed=1), tmp_path)
    reader = store.open_store(tmp_path)
    store.write(corpus(seed=2), tmp_path)
    assert_same(store.open_store(tmp_path), corpus(seed=2))
    assert_same(reader, corpus(seed=1))
    assert len(list(tmp_path.glob("data-*"))) == 1
    store.write(corpus(seed=2), tmp_path)  # the same again
    assert store.verify(tmp_path) == corpus(seed=2).fingerprint


# ------------------------------------------------------------------- disk failures


def test_a_real_size_limit_leaves_the_old_store_untouched(tmp_path):
    resource = pytest.importorskip("resource")
    folder = tmp_path / "s"
    store.write(corpus(seed=1), folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    larger = corpus(seed=2, n=900)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(CorpusError, match="MB free on this disk") as caught:
            store.write(larger, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not write a store" in str(caught.value)
    assert "MMSA_DATA" in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    store.write(larger, folder)  # with space again
    assert store.verify(folder) == larger.fingerprint


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch, step, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store.os, step, fail)
    with pytest.raises(CorpusError, match=os.strerror(code)):
        store.write(corpus(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match=r"could not write.*MMSA_DATA"):
        store.write(corpus(), tmp_path / "file" / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_killed_writer_leaves_the_old_store_and_its_part_is_cleared(
    tmp_path, monkeypatch
):
    store.write(corpus(seed=1), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", lambda *_: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            store.write(corpus(seed=2), tmp_path)
    assert store.verify(tmp_path) == corpus(seed=1).fingerprint
    part = tmp_path / ".123.data.part"
    part.write_bytes(b"left by a killed process")
    os.utime(part, (0, 0))
    store.write(corpus(seed=2), tmp_path)
    assert not part.exists() and len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------- damaged stores


def edit_card(folder, change):
    path = folder / "card.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def rewrite_tensors(folder, change):
    """Change tensors with the safetensors library, and make the card fit the size."""
    (path,) = folder.glob("data-*")
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    edit_card(folder, lambda d: d["data"].update(bytes=path.stat().st_size))


def truncate(folder):
    (path,) = folder.glob("data-*")
    path.write_bytes(path.read_bytes()[:-10])


def scramble_header(folder):
    (path,) = folder.glob("data-*")
    data = bytearray(path.read_bytes())
    data[8:20] = b"not json at "
    path.write_bytes(data)


def swap_card(folder):
    other = store.write(corpus(seed=9), folder / "other")
    mine = json.loads((folder / "card.json").read_text())
    theirs = json.loads((other / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(theirs | {"data": mine["data"]}))


DAMAGES = {
    "truncated": (truncate, "it is truncated or another file"),
    "no data": (lambda f: next(f.glob("data-*")).unlink(), "is missing"),
    "header": (scramble_header, "header of .* is unreadable"),
    "card of another": (swap_card, "describes data with fingerprint"),
    "card no json": (lambda f: (f / "card.json").write_text("{"), "not the JSON"),
    "card key": (
        lambda f: edit_card(f, lambda d: d.pop("splits")),
        "lacks or misuses 'splits'",
    ),
    "size on card": (
        lambda f: edit_card(f, lambda d: d["card"]["splits"]["valid"].update(size=3)),
        "card says 3 samples in 'valid', the data 7",
    ),
    "width on card": (
        lambda f: edit_card(
            f, lambda d: d["card"]["modalities"]["audio"].update(width=9)
        ),
        "'audio': 9",
    ),
    "missing modality key": (
        lambda f: rewrite_tensors(f, lambda t: t.pop("valid/features/audio")),
        r"lists 'valid/features/audio'.*it has .*valid/features/text",
    ),
    "wrong shape": (
        lambda f: rewrite_tensors(
            f, lambda t: t.update({"train/features/text": np.zeros((2, 5), "f4")})
        ),
        "'text' has offsets of shape .* over 2 steps",
    ),
    "wrong rank": (
        lambda f: rewrite_tensors(
            f, lambda t: t.update({"train/features/text": np.zeros(10, "f4")})
        ),
        r"expected \(steps, width\)",
    ),
    "ids": (
        lambda f: rewrite_tensors(
            f, lambda t: t.update({"test/ids": np.full(3, 255, "u1")})
        ),
        "the offsets of 'test/ids' do not fit",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_with_the_remedy(tmp_path, kind):
    store.write(corpus(), tmp_path)
    damage, message = DAMAGES[kind]
    damage(tmp_path)
    with pytest.raises(CorpusError, match=message) as caught:
        store.open_store(tmp_path)
    assert "build it again" in str(caught.value)


def test_changed_values_are_found_by_verify_not_by_open(tmp_path):
    store.write(corpus(), tmp_path)
    rewrite_tensors(tmp_path, lambda t: t["train/features/text"].__setitem__(0, 9.0))
    store.open_store(tmp_path)
    with pytest.raises(CorpusError, match="values were changed"):
        store.verify(tmp_path)


def test_a_card_names_no_file_outside_its_folder(tmp_path):
    for name in ("here", "there"):
        store.write(corpus(), tmp_path / name)
    (data,) = (tmp_path / "there").glob("*.safetensors")
    (own,) = (tmp_path / "here").glob("*.safetensors")
    own.unlink()

    def elsewhere(card):
        card["data"]["file"] = f"../there/{data.name}"

    edit_card(tmp_path / "here", elsewhere)
    with pytest.raises(CorpusError, match="is missing"):
        store.open_store(tmp_path / "here")


def test_no_store_and_another_format(tmp_path):
    with pytest.raises(CorpusError, match="mmsa-book data get NAME"):
        store.open_store(tmp_path / "nowhere")
    store.write(corpus(), tmp_path)
    edit_card(tmp_path, lambda d: d.update(format="mmsa-store 99"))
    with pytest.raises(CorpusError, match=r"'mmsa-store 99'.*build the store again"):
        store.open_store(tmp_path)


# ------------------------------------------------------------------- memory


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_DONTNEED") or not Path("/proc/self/statm").exists(),
    reason="resident memory is read from /proc",
)
def test_reading_a_large_store_keeps_resident_memory_bounded(tmp_path):
    steps, n = 250, 800  # 205 MB in one modality

    class Rows:
        """Values made when asked for: they are never all in memory."""

        ndim, shape = 2, (steps * n, 256)

        def __getitem__(self, rows):
            return np.full((rows.stop - rows.start, 256), rows.start, np.float32)

    def rss():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * mmap.PAGESIZE / 2**20

    ids = [str(i) for i in range(n)]
    ragged = Ragged(Rows(), np.arange(n) * steps, np.full(n, steps))
    train = Split("train", ids, {"text": ragged}, {"sentiment": np.zeros(n)})
    before = rss()
    big = make_corpus(Card("big", "", "", "", True), {"train": train})
    store.write(big, tmp_path)
    opened = store.open_store(tmp_path).train
    most = rss()
    for batch in opened.batches(32):
        assert batch.features["text"].shape == (32, steps, 256)
        most = max(most, rss())
    assert batch.features["text"][-1, 0, 0] == (n - 1) * steps
    assert most - before < 140  # RELEASE_BYTES, a batch and slack; the file is 205
