"""Synthetic lesions, BraTS files written by the test, and the U-shaped net."""

import gzip
import struct

import h5py
import numpy as np
import pytest
import torch

from mmsa_lib.corpora import lesions
from mmsa_lib.errors import CorpusError
from mmsa_lib.nets.segmentation import SegmentationNet
from mmsa_lib.tasks import pixels

CORPUS = lesions.load(sizes=(40, 8, 8), side=16)


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


def test_nifti_scaling_byte_order_and_damage(tmp_path):
    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for order in "<>":
        write_nifti(tmp_path / "a.nii.gz", volume, 0.5, 1.0, order)
        read = lesions.read_nifti(tmp_path / "a.nii.gz")
        np.testing.assert_allclose(read, volume * 0.5 + 1)
    whole = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(gzip.decompress(whole)[:-8]))
    with pytest.raises(CorpusError, match="40 of 48 bytes"):
        lesions.read_nifti(tmp_path / "b.nii.gz")
    (tmp_path / "c.nii").write_bytes(b"something else")
    with pytest.raises(CorpusError, match="not a single-file NIfTI"):
        lesions.read_nifti(tmp_path / "c.nii")


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
