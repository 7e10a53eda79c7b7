"""Synthetic lesions, BraTS files written by the test, and the U-shaped net."""

import gzip
import pickle
import struct

import h5py
import nibabel
import numpy as np
import pytest
import torch

from mmsa_lib import corpora
from mmsa_lib.corpora import lesions, store
from mmsa_lib.errors import CorpusError, SealedError, UnknownNameError
from mmsa_lib.nets.segmentation import SegmentationNet
from mmsa_lib.tasks import pixels

CORPUS = lesions.load(sizes=(40, 8, 8), side=16)
PINNED = "ef7b0371dfcecab2ce5c272fd4a4a22670c008a18b541bd789dcd5c67a421b6a"


def pictures(split, m):
    return np.stack([split.features[m][i][:, 0] for i in range(len(split))])


def test_each_channel_shows_its_region_and_nothing_else():
    codes = CORPUS.train.labels["lesion"]
    for m, (region, contrast, _) in lesions.SHOWS.items():
        x = pictures(CORPUS.train, m)
        inside = np.isin(codes, lesions.REGIONS[region])
        assert abs(x[inside].mean() - x[~inside].mean() - contrast) < 0.25
        for other in lesions.REGIONS.values():
            # parts of the lesion that the channel does not tell apart
            for part in (inside, ~inside & (codes > 0)):
                a, b = part & np.isin(codes, other), part & ~np.isin(codes, other)
                if a.sum() > 50 and b.sum() > 50:
                    assert abs(x[a].mean() - x[b].mean()) < 0.2


def test_the_world_belongs_to_its_seed_and_regions_are_nested():
    again = lesions.load(sizes=(40, 8, 8), side=16)
    other = lesions.load(sizes=(40, 8, 8), side=16, seed=1)
    assert again.fingerprint == CORPUS.fingerprint != other.fingerprint
    codes = CORPUS.train.labels["lesion"]
    assert set(np.unique(codes)) == {0, 1, 2, 3}
    assert ((codes == 3).any(1) & (codes == 2).any(1)).mean() > 0.9


def test_it_is_a_corpus_by_name_like_the_others(tmp_path):
    corpus = corpora.load("lesions", sizes=(40, 8, 8), side=16)
    assert corpus.fingerprint == CORPUS.fingerprint == PINNED
    assert corpus.modalities == lesions.CHANNELS
    assert corpus.dims == dict.fromkeys(lesions.CHANNELS, 1)
    assert set(corpus.train.features["t1"].lengths) == {16 * 16}
    with pytest.raises(SealedError):
        _ = corpus.test.labels
    # its card counts pixels; every pixel has a code
    for name, split in corpus.splits.items():
        counts = corpus.card.splits[name]["lesion"]["counts"]
        assert set(counts) == {0, 1, 2, 3}
        assert sum(counts.values()) == 16 * 16 * len(split)
    again = corpora.load("lesions", **corpus.card.options)
    assert again.fingerprint == corpus.fingerprint
    assert corpora.prepare("lesions") is None  # nothing to fetch
    stored = store.open_store(store.write(corpus, tmp_path / "lesions"))
    assert stored.fingerprint == corpus.fingerprint


def test_options_that_cannot_be_are_refused():
    with pytest.raises(UnknownNameError, match=r"option of lesions 'sied'.*'side'"):
        corpora.load("lesions", sied=16)
    for options in ({"sizes": (4, 2)}, {"sizes": (4, 0, 2)}, {"side": 0}):
        with pytest.raises(CorpusError, match="sizes must be three numbers >= 1"):
            corpora.load("lesions", **options)


# ---------------------------------------------------------------- files


def write_nifti(path, volume, slope=1.0, intercept=0.0, order="<"):
    kinds = {"u1": 2, "i2": 4, "f4": 16}
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    dims = (3, *volume.shape, 1, 1, 1, 1)
    struct.pack_into(f"{order}8h", header, 40, *dims)
    struct.pack_into(f"{order}h", header, 70, kinds[volume.dtype.str[1:]])
    struct.pack_into(f"{order}3f", header, 108, 352.0, slope, intercept)
    header[344:348] = b"n+1\0"
    body = volume.astype(volume.dtype.newbyteorder(order)).tobytes(order="F")
    path.write_bytes(gzip.compress(bytes(header) + body))


def case(seed, shape=(20, 24, 5)):
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[6:12, 8:14, 3] = 2  # slice 3 has the largest tumour
    label[8:10, 9:12, 3] = 4
    label[8:10, 9:12, 2] = 1
    image = rng.integers(1, 200, (4, *shape)).astype(np.int16)
    return image, label


def test_brats_nifti_and_h5_give_the_same_corpus(tmp_path):
    for number in range(5):
        image, label = case(number)
        folder = tmp_path / "nifti" / f"case-{number}"
        folder.mkdir(parents=True)
        for channel, volume in zip(lesions.CHANNELS, image, strict=True):
            write_nifti(folder / f"x_{channel}.nii.gz", volume)
        write_nifti(folder / "x_seg.nii.gz", label)
        (tmp_path / "h5").mkdir(exist_ok=True)
        with h5py.File(tmp_path / "h5" / f"case-{number}.h5", "w") as file:
            file["image"], file["label"] = image, label
    nifti = lesions.brats(tmp_path / "nifti", side=8, crop=16)
    h5 = lesions.brats(tmp_path / "h5", side=8, crop=16)
    assert nifti.fingerprint == h5.fingerprint
    assert {k: len(s) for k, s in nifti.splits.items()} == {
        "train": 3, "valid": 1, "test": 1,
    }  # fmt: skip
    assert nifti.modalities == lesions.CHANNELS
    # by hand: slice 3, middle 16 x 16, pixel centres every second row and column
    image, label = case(0)
    middle = label[2:18, 4:20, 3]
    expected = np.where(middle == 4, 3, middle)[1::2, 1::2]
    np.testing.assert_array_equal(nifti.train.labels["lesion"][0], expected.ravel())
    volume = image[0].astype(float)
    scored = ((volume - volume.mean()) / volume.std())[2:18, 4:20, 3]
    pooled = scored.reshape(8, 2, 8, 2).mean((1, 3))
    found = nifti.train.features["t1"][0][:, 0]
    np.testing.assert_allclose(found, pooled.ravel(), atol=1e-5)


VOLUME = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (0.5, 1.0, VOLUME * 0.5 + 1),
        (2.0, -3.0, VOLUME * 2.0 - 3),
        (0.0, 7.0, VOLUME),  # the standard: a slope of 0 is no scaling
        (np.nan, 0.0, VOLUME),
        (np.nan, np.nan, VOLUME),
    ],
)
def test_nifti_scaling_and_byte_order(tmp_path, order, slope, intercept, expected):
    write_nifti(tmp_path / "a.nii.gz", VOLUME, slope, intercept, order)
    read = lesions.read_nifti(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read, expected)
    assert read.dtype == np.float64


def test_nifti_files_that_nibabel_writes(tmp_path):
    volume = VOLUME[..., None] / np.float32(7)  # a last axis of one volume
    image = nibabel.Nifti1Image(volume, np.eye(4))
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(image, tmp_path / name)
        np.testing.assert_array_equal(
            lesions.read_nifti(tmp_path / name), volume[..., 0].astype(float)
        )
    with pytest.raises(CorpusError, match=r"absent\.nii is no readable.*No such file"):
        lesions.read_nifti(tmp_path / "absent.nii")


def header(at, kind, *values):
    """A good file, unpacked, with something else in its header."""

    def change(good):
        data = bytearray(good)
        struct.pack_into(kind, data, at, *values)
        return gzip.compress(data)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda good: b"", "Binary block is wrong size"),
        (lambda good: b"something else", "Binary block is wrong size"),
        (lambda good: b"something else" * 99, "data code"),
        (lambda good: pickle.dumps([1] * 999), "data code"),
        (lambda good: good[:300], "Binary block is wrong size"),
        (lambda good: good[:-8], "ends after 40 of 48 bytes"),
        (lambda good: gzip.compress(good[:-8]), "ends after 40 of 48 bytes"),
        (lambda good: gzip.compress(good)[:-20], "Compressed file ended"),
        (lambda good: gzip.compress(good)[:-8] + bytes(8), "CRC check failed"),
        (lambda good: gzip.compress(good)[:10] + b"\xff" * 60, "invalid block"),
        (header(40, "<8h", 4, 2, 3, 2, 2, 1, 1, 1), "shape is .2, 3, 2, 2."),
        (header(40, "<8h", 2, 6, 4, 1, 1, 1, 1, 1), "shape is .6, 4."),
        (header(40, "<8h", 3, -2, 3, 4, 1, 1, 1, 1), "shape is .-2, 3, 4."),
        (header(40, "<8h", 3, 32000, 32000, 32000, 1, 1, 1, 1), "48 of 65536000000000"),
        (header(70, "<h", 32), "complex64, expected integers or floats"),
        (header(70, "<h", 999), "data code 999"),
        (header(108, "<f", 0.0), "begin at byte 0"),
        (header(108, "<f", np.nan), "NaN"),
        (header(112, "<2f", 0.5, np.nan), "invalid intercept"),
        (header(344, "4s", b"ni1"), "marked b'ni1', expected byte 352"),
    ],
)
def test_damaged_nifti_files_are_named(tmp_path, damage, message):
    write_nifti(tmp_path / "good.nii.gz", VOLUME)
    good = gzip.decompress((tmp_path / "good.nii.gz").read_bytes())
    (tmp_path / "bad.nii.gz").write_bytes(damage(good))
    with pytest.raises(CorpusError, match=rf"(?s)^bad\.nii\.gz is no.*{message}"):
        lesions.read_nifti(tmp_path / "bad.nii.gz")


def test_folders_without_cases_say_what_is_expected(tmp_path):
    with pytest.raises(CorpusError, match=r"holds 0 BraTS cases.*CASE_seg"):
        lesions.brats(tmp_path)
    for number in range(3):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["image"], file["label"] = np.zeros((3, 4, 4, 2)), np.zeros((4, 4, 2))
    with pytest.raises(CorpusError, match=r"expected \(4, H, W, D\)"):
        lesions.brats(tmp_path)
    with pytest.raises(CorpusError, match="does not divide"):
        lesions.brats(tmp_path, side=7)
    (tmp_path / "0.h5").write_text("no HDF5")
    with pytest.raises(CorpusError, match=r"0\.h5 is no readable HDF5 file"):
        lesions.brats(tmp_path)


# ---------------------------------------------------------------- the net


def test_net_gives_a_logit_a_pixel_and_reads_every_channel():
    torch.manual_seed(0)
    net = SegmentationNet(CORPUS.modalities, width=6)
    batch = CORPUS.train.batch([0, 1, 2])
    output = net(batch)
    assert output.predictions["lesion"].shape == (3, 4, 16, 16)
    assert output.last.shape == (3, 6, 16, 16)
    assert all(h.shape == (3, 6, 16, 16) for h in output.hidden.values())
    loss = pixels().objective(output, batch)
    truth = batch.labels["lesion"].long().view(3, 16, 16)
    chosen = output.predictions["lesion"].log_softmax(1).gather(1, truth[:, None])
    torch.testing.assert_close(loss, -chosen.mean())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_missing_channel_says_nothing():
    torch.manual_seed(0)
    net = SegmentationNet(CORPUS.modalities, width=6).eval()
    gone = {"flair": np.array([True, False])}
    part = CORPUS.train.select([0, 1]).without(gone)
    batch = part.batch([0, 1])
    with torch.no_grad():
        before = net(batch)
        batch.features["flair"] = batch.features["flair"].clone()
        batch.features["flair"][0] += 9.0
        after = net(batch)
    assert (before.hidden["flair"][0] == 0).all()
    torch.testing.assert_close(before.predictions, after.predictions)
    with pytest.raises(CorpusError, match="square"):
        net(CORPUS.train._with(features=_cut(CORPUS.train)).batch([0]))


def _cut(split):
    features = {m: r.select(np.arange(len(split))) for m, r in split.features.items()}
    for r in features.values():
        r.lengths = r.lengths - 3
    return features
