"""Clips as a corpus: what the real processor makes of them, cached, sealed, named."""

import importlib
import json
import math
import os
import re
import resource
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from films import displayed
from test_clips import COLUMNS, broken_files, write

from mmsa_lib import corpora
from mmsa_lib.corpora import media
from mmsa_lib.corpora.clips import Clip, decode, puppet_clips, read_folder
from mmsa_lib.corpora.media import (
    HOP,
    MEAN,
    RATE,
    STD,
    UNIT,
    MediaConfig,
    clip_corpus,
    log_mel,
    patches,
    read_media,
    smart_size,
)
from mmsa_lib.errors import (
    ClipError,
    ConfigError,
    CorpusError,
    SealedError,
    UnknownNameError,
)

SMALL = MediaConfig(frames=4, max_pixels=(3 * UNIT) ** 2)
FEW = MediaConfig(frames=2, max_pixels=(2 * UNIT) ** 2)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- the real processors --------------------------------------------------------------


def torchvision_functions():
    """The two functions of torchvision that Qwen2-VL's video processor calls.

    torchvision is not installed. On uint8 its resize is `F.interpolate`, and its
    normalize subtracts and divides.
    """
    found = types.ModuleType("functional")
    modes = types.SimpleNamespace(BILINEAR="bilinear", BICUBIC="bicubic", LANCZOS="no")

    def resize(image, size, interpolation, antialias):
        flat = image.reshape(-1, *image.shape[-3:])
        flat = torch.nn.functional.interpolate(
            flat, list(size), mode=interpolation, antialias=antialias
        )
        return flat.reshape(*image.shape[:-2], *size)

    def normalize(image, mean, std, inplace=False):
        mean, std = (torch.as_tensor(v)[:, None, None] for v in (mean, std))
        return (image - mean) / std

    found.InterpolationMode = modes
    found.resize, found.normalize = resize, normalize
    return found


def real_video_processor(patch):
    """transformers' own video processor of Qwen2.5-Omni, as an object to call.

    Everything but torchvision's two functions is the code of the library.
    `patch` is pytest's MonkeyPatch.
    """
    above = None
    for name in ("torchvision", "transforms", "v2", "functional"):
        part = (
            torchvision_functions() if name == "functional" else types.ModuleType(name)
        )
        path = name if above is None else f"{above.__name__}.{name}"
        part.__name__ = path
        patch.setitem(sys.modules, path, part)
        if above is not None:
            setattr(above, name, part)
        above = part
    name = "transformers.models.qwen2_vl.video_processing_qwen2_vl"
    patch.setitem(sys.modules, name, None)  # so that it is gone afterwards
    del sys.modules[name]
    original = importlib.import_module(name).Qwen2VLVideoProcessor
    backend = importlib.import_module("transformers.image_processing_backends")
    patch.setattr(backend, "tvF", above, raising=False)
    from transformers.image_utils import SizeDict

    class Real(original):
        def __init__(self):
            pass

        def __call__(self, videos, size, **_):
            """videos: frames (n, 3, H, W) uint8 of each; size: limits in pixels."""
            return self._preprocess(
                [torch.as_tensor(np.asarray(v)) for v in videos],
                do_resize=True,
                size=SizeDict(**dict(size)),
                resample=above.InterpolationMode.BICUBIC,
                do_rescale=True,
                rescale_factor=1 / 255,
                do_normalize=True,
                image_mean=tuple(self.image_mean),
                image_std=tuple(self.image_std),
                patch_size=self.patch_size,
                temporal_patch_size=self.temporal_patch_size,
                merge_size=self.merge_size,
                cap_pixels_per_frame=False,
            )

    return Real()


def limits(config):
    return {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}


def as_videos(frames):
    return [torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()]


def standardised(rows):
    shift, scale = media._standardisation()
    return (rows.astype(np.float32) - shift) / scale


@pytest.fixture(scope="module")
def real():
    with pytest.MonkeyPatch.context() as patch:
        yield real_video_processor(patch)


def test_frame_sizes_equal_the_librarys():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(0)
    some = np.exp(rng.uniform(np.log(4), np.log(4000), (3000, 2))).astype(int)
    sides = [*some.tolist(), (200, 1), (1, 200), (28, 28), (14, 14), (13, 40), (42, 42)]
    for config in (MediaConfig(), SMALL, FEW, MediaConfig(max_pixels=768 * UNIT**2)):
        refused = 0
        for height, width in sides:
            if max(height, width) / min(height, width) > 200:
                refused += 1
                with pytest.raises(ClipError, match=f"{width} x {height}"):
                    smart_size(height, width, config)
                with pytest.raises(ValueError, match="aspect ratio"):
                    smart_resize(height, width)
                continue
            expected = smart_resize(
                height,
                width,
                UNIT,
                min_pixels=config.min_pixels,
                max_pixels=config.max_pixels,
            )
            assert smart_size(height, width, config) == expected
        assert refused > 10


def naive_patches(frames):
    """(n, H, W, 3) -> rows, by loops: n even, sides multiples of 28."""
    n, height, width, _ = frames.shape
    rows = []
    for t in range(0, n, 2):
        for top in range(0, height, 28):
            for left in range(0, width, 28):
                for y in (top, top + 14):
                    for x in (left, left + 14):
                        block = frames[t : t + 2, y : y + 14, x : x + 14]
                        rows.append(
                            [block[:, :, :, colour].ravel() for colour in range(3)]
                        )
    return np.array(rows).reshape(len(rows), -1)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
def test_patches_equal_a_naive_patchify(n):
    frames = noise(n, 56, 84, 3)
    rows, grid = patches(frames, SMALL)
    assert rows.dtype == np.uint8 and grid.dtype == np.int64
    assert grid.tolist() == [math.ceil(n / 2), 4, 6]
    whole = np.concatenate([frames, frames[-1:]])[: 2 * math.ceil(n / 2)]
    assert (rows == naive_patches(whole)).all()


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((16, 112, 112), SMALL),  # puppets
        ((16, 360, 640), MediaConfig()),  # MOSI
        ((5, 640, 360), MediaConfig()),  # portrait, odd
        ((1, 30, 900), MediaConfig()),  # one frame, a strip
        ((2, 20, 20), MediaConfig()),  # grows
        ((3, 56, 84), SMALL),  # stays
    ],
    ids=["puppets", "mosi", "portrait", "strip", "grows", "stays"],
)
def test_values_equal_the_real_video_processors(real, shape, config):
    frames = noise(*shape, 3)
    expected = real(as_videos(frames), size=limits(config))
    rows, grid = patches(frames, config)
    assert grid.tolist() == expected["video_grid_thw"][0].tolist()
    assert grid.prod() == len(rows)
    found = standardised(rows)
    assert found.dtype == np.float32
    assert np.abs(found - expected["pixel_values_videos"].numpy()).max() <= 2.4e-7


def test_values_equal_the_image_processors_without_torchvision():
    """The library's PIL path, whole and unchanged: an image is a clip of one frame."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    image = noise(84, 56, 3)
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    expected = processor(image, return_tensors="np")
    rows, grid = patches(image[None], SMALL)
    assert grid.tolist() == expected["image_grid_thw"][0].tolist()
    assert np.abs(standardised(rows) - expected["pixel_values"]).max() <= 4.8e-7


def test_resizing_is_bicubic_with_antialiasing():
    """Beside Pillow's, written by other people: off by one step of 255 at most."""
    from PIL import Image

    frames = np.stack([decode(c.path, 1).frames[0] for c in puppet_clips()[:2]])
    config = MediaConfig(max_pixels=(3 * UNIT) ** 2)
    height, width = smart_size(*frames.shape[1:3], config)
    assert (height, width) != frames.shape[1:3]
    rows, _ = patches(frames, config)
    resized = [
        np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC))
        for f in frames
    ]
    off = rows.astype(int) - naive_patches(np.stack(resized))
    assert np.abs(off).max() <= 1


def test_constants_are_the_librarys():
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert tuple(OPENAI_CLIP_MEAN) == MEAN and tuple(OPENAI_CLIP_STD) == STD


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 399, 1600, 16000, 70001])
def test_log_mel_equals_the_real_extractor(samples):
    """As Qwen2_5OmniProcessor calls it: padded to the maximum, with its mask."""
    from transformers import WhisperFeatureExtractor

    rng = np.random.default_rng(samples)
    audio = (0.1 * rng.normal(size=samples)).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=128, sampling_rate=RATE)
    expected = extractor(
        audio,
        sampling_rate=RATE,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="np",
    )
    valid = expected["attention_mask"][0].astype(bool)
    found = log_mel(audio)
    assert found.shape == (valid.sum(), 128) == (math.ceil(samples / HOP), 128)
    assert np.abs(found - expected["input_features"][0][:, valid].T).max() < 1e-5


def test_settings_are_checked():
    for frames in (0, 1, 3, -2):
        with pytest.raises(ConfigError, match=f"even and positive, found {frames}"):
            MediaConfig(frames=frames)
    with pytest.raises(ConfigError, match="784 <= min_pixels <= max_pixels, found"):
        MediaConfig(max_pixels=UNIT * UNIT)
    with pytest.raises(ConfigError, match="min_pixels"):
        MediaConfig(min_pixels=10)


# --- one clip -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"n": 1, "seconds": 0.1}, [1, 6, 6]),
        ({"n": 5, "size": (112, 56)}, [2, 8, 4]),
        ({"n": 3, "size": (56, 112)}, [2, 4, 8]),
    ],
    ids=["one frame", "portrait, odd", "landscape"],
)
def test_unusual_clips_are_read(tmp_path, options, grid):
    options = {"size": (84, 84)} | options
    found = decode(write(tmp_path / "a.mp4", **options), SMALL.frames)
    arrays = read_media(found, SMALL)
    assert arrays["grid"].tolist() == grid
    assert arrays["vision"].shape == (math.prod(grid), 1176)
    assert len(arrays["audio"]) == math.ceil(len(found.audio) / HOP)
    spacing = np.diff(found.frame_times)
    between = spacing.mean() if len(spacing) else found.seconds
    assert arrays["pace"].shape == (1,)
    assert arrays["pace"][0] == pytest.approx(2 * between)


def test_pace_is_the_librarys_seconds_per_grid():
    """Two frames make a patch: at 2 a second, one pair begins each second."""
    found = decode(puppet_clips()[0].path, 4)
    found = replace(found, frame_times=np.arange(4) / 2)
    assert read_media(found, SMALL)["pace"] == pytest.approx([2 / 2.0])


# --- a corpus -------------------------------------------------------------------------


def folder_of(path, *clips):
    """A folder in MMSA-FET's layout; each clip is (id, text, label, mode, source)."""
    raw = path / "Raw" / "v"
    raw.mkdir(parents=True, exist_ok=True)
    rows = [COLUMNS]
    for name, text, label, mode, source in clips:
        rows.append(f"v,{name},{text},{label},,,,,{mode}")
        if source is not None:
            shutil.copy(source, raw / f"{name}.mp4")
    (path / "label.csv").write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two short clips of different length and size."""
    folder = tmp_path_factory.mktemp("sources")
    return (
        write(folder / "one.mp4", n=6, size=(56, 84)),
        write(folder / "two.mp4", n=4, size=(84, 56), seconds=0.6),
    )


def three(path, sources):
    one, two = sources
    return folder_of(
        path,
        ("1", "very good", 2.4, "train", one),
        ("2", "bad", -1, "valid", two),
        ("3", "so so", 0, "test", one),
    )


def equal(left, right):
    """The same samples in the same splits, to the last bit."""
    assert list(left.splits) == list(right.splits)
    for name, split in left.splits.items():
        other = right[name]
        assert split.ids == other.ids and split.raw_text == other.raw_text
        assert split.dims == other.dims
        for k, values in split._labels.items():
            assert (values == other._labels[k]).all()
        for k, values in split.extras.items():
            assert (values == other.extras[k]).all()
        for m, ragged in split.features.items():
            assert (ragged.lengths == other.features[m].lengths).all()
            for i in range(len(split)):
                assert (ragged[i] == other.features[m][i]).all()
    return True


@pytest.fixture
def decoded(monkeypatch):
    """Names of the clips that were decoded since."""
    seen = []

    def counted(path, *rest):
        seen.append(path.stem)
        return decode(path, *rest)

    monkeypatch.setattr(media, "decode", counted)
    return seen


def test_corpus_holds_what_each_clip_gives(tmp_path, sources):
    folder = three(tmp_path, sources)
    found = clip_corpus(folder, SMALL)
    assert found.modalities == ("audio", "vision") and found.dims["vision"] == 1176
    assert [len(found[s]) for s in ("train", "valid", "test")] == [1, 1, 1]
    for clip in read_folder(folder):
        split = found[clip.split]
        arrays = read_media(decode(clip.path, SMALL.frames), SMALL)
        assert split.ids == [clip.id] and split.raw_text == [clip.text]
        assert split._labels["sentiment"].tolist() == [[np.float32(clip.sentiment)]]
        assert set(split._labels) == {"sentiment"}
        assert (split.features["audio"][0] == arrays["audio"]).all()
        vision = split.features["vision"][0]
        assert (vision == standardised(arrays["vision"])).all()
        assert (split.extras["grid"][0] == arrays["grid"]).all()
        assert (split.extras["pace"][0] == arrays["pace"]).all()
    card = found.card.as_dict()
    assert not card["synthetic"] and card["options"]["frames"] == SMALL.frames
    assert card["modalities"]["vision"]["width"] == 1176
    assert card["splits"]["train"]["size"] == 1


def test_test_split_is_sealed(tmp_path, sources):
    found = clip_corpus(three(tmp_path, sources), FEW)
    with pytest.raises(SealedError):
        _ = found.test.labels
    assert found.test.batch([0]).labels == {}
    assert found.train.batch([0]).labels["sentiment"].shape == (1, 1)


def test_extras_travel_with_the_samples(tmp_path, sources):
    one, two = sources
    clips = [(str(k), "x", 0, "train", (one, two)[k % 2]) for k in range(4)]
    split = clip_corpus(folder_of(tmp_path, *clips), SMALL).train
    grids = split.extras["grid"]
    assert grids[0].tolist() != grids[1].tolist()
    batch = split.select([3, 0]).only(["vision"]).batch([0, 1]).to("cpu")
    assert batch.ids == ["v$_$3", "v$_$0"] and batch.modalities == ("vision",)
    assert batch.extras["grid"].tolist() == [grids[1].tolist(), grids[0].tolist()]
    assert batch.extras["pace"].shape == (2, 1)
    counts = batch.mask["vision"].sum(1)
    assert counts.tolist() == batch.extras["grid"].prod(1).tolist()
    gone = split.without({"vision": np.array([True, False, False, False])})
    assert gone.batch([0, 1]).available["vision"].tolist() == [False, True]
    whole = split.without({"vision": np.ones(4, bool)}).batch([0, 1])
    assert whole.features["vision"].shape == (2, 1, 1176)
    assert not whole.mask["vision"].any() and not whole.features["vision"].any()


def test_what_the_cache_gives_equals_memory(tmp_path, sources):
    folder = three(tmp_path / "clips", sources)
    kept = clip_corpus(folder, SMALL)
    fresh = clip_corpus(folder, SMALL, cache=tmp_path / "cache")
    again = clip_corpus(folder, SMALL, cache=str(tmp_path / "cache"))
    assert equal(kept, fresh) and equal(kept, again)
    assert kept.fingerprint == fresh.fingerprint == again.fingerprint
    rows = again.train.select([0, 0]).without({"audio": np.array([True, False])})
    batch, whole = rows.batch([0, 1]), kept.train.batch([0])
    assert batch.available["audio"].tolist() == [False, True]
    assert (batch.features["audio"][1] == whole.features["audio"][0]).all()
    assert (batch.features["vision"][0] == whole.features["vision"][0]).all()


def test_cache_knows_clips_by_content(tmp_path, sources, decoded):
    one, two = sources
    cache = tmp_path / "cache"

    def read(*clips, config=SMALL, name="clips"):
        decoded.clear()
        clip_corpus(folder_of(tmp_path / name, *clips), config, cache=cache)
        return sorted(decoded)

    assert read(("1", "x", 0, "train", one), ("2", "y", 1, "train", two)) == ["1", "2"]
    assert read(("1", "x", 0, "train", one), ("2", "y", 1, "train", two)) == []
    # another name, text, label, split or folder: the same file of the cache
    assert read(("9", "z", 2, "valid", one), name="moved") == []
    assert len(list(cache.iterdir())) == 2
    # another content under the old name
    changed = write(tmp_path / "new.mp4", n=5)
    assert read(("1", "x", 0, "train", changed)) == ["1"]
    for config in (FEW, replace(SMALL, frames=2), replace(SMALL, max_pixels=56 * 84)):
        assert read(("1", "x", 0, "train", one), config=config) == ["1"]
        assert read(("1", "x", 0, "train", one), config=config) == []
    assert not list(cache.glob("*.part"))


def test_another_version_of_the_preprocessing_misses(tmp_path, sources, monkeypatch):
    before = media._key(sources[0], SMALL)
    monkeypatch.setattr(media, "VERSION", media.VERSION + "x")
    assert media._key(sources[0], SMALL) != before


@pytest.mark.parametrize("left", [0, 7, 100, -1], ids=["empty", "7", "100", "one less"])
def test_a_cache_file_cut_short_is_made_again(tmp_path, sources, decoded, left):
    folder = three(tmp_path / "clips", sources)
    cache = tmp_path / "cache"
    whole = clip_corpus(folder, SMALL, cache=cache)
    files = sorted(cache.iterdir())
    before = [f.read_bytes() for f in files]
    files[0].write_bytes(before[0][:left])
    decoded.clear()
    assert equal(clip_corpus(folder, SMALL, cache=cache), whole)
    assert decoded
    assert [f.read_bytes() for f in sorted(cache.iterdir())] == before


def test_disk_full(tmp_path, sources):
    folder = three(tmp_path / "clips", sources)
    cache = tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(
            CorpusError, match=r"could not write .*cache.*free"
        ) as error:
            clip_corpus(folder, SMALL, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value)
    assert not list(cache.iterdir())
    assert equal(clip_corpus(folder, SMALL, cache=cache), clip_corpus(folder, SMALL))


def test_cache_folder_that_cannot_be_written(tmp_path, sources, monkeypatch):
    folder = three(tmp_path / "clips", sources)
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(
            CorpusError, match="could not write the clip cache"
        ) as error:
            clip_corpus(folder, FEW, cache=place)
        assert "choose another data folder" in str(error.value)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(media.os, "replace", refuse)
    with pytest.raises(CorpusError, match=r"Permission denied.*writable"):
        clip_corpus(folder, FEW, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


# --- clips that cannot be used --------------------------------------------------------


def test_unusable_clips_are_named_at_once_and_skipped_only_if_asked(tmp_path):
    raw = tmp_path / "Raw" / "v"
    raw.mkdir(parents=True)
    reasons = broken_files(raw)
    (raw / "whole.mp4").unlink()
    reasons["long"] = r"longer than longest=5 s"
    rows = [f"v,{name},x,0,,,,Neutral,train" for name in reasons]
    rows += ["v,far,x,4,,,,,train", "v,gone,x,1,,,,,train"]
    shutil.copy(raw / "good.mp4", raw / "far.mp4")
    (tmp_path / "label.csv").write_text("\n".join([COLUMNS, *rows]))
    reasons |= {"far": "label is 4", "gone": "there is no file"}
    config = MediaConfig(frames=2, longest=5)
    with pytest.raises(ClipError) as error:
        clip_corpus(tmp_path, config)
    message = str(error.value)
    assert f"{len(reasons) - 1} of the clip folder" in message
    lines = {line.partition(":")[0].strip(): line for line in message.splitlines()}
    problems = {}
    found = clip_corpus(tmp_path, config, problems=problems)
    assert found.train.ids == ["v$_$good"]
    assert set(problems) == {f"v$_${k}" for k in reasons if k != "good"}
    for name, reason in reasons.items():
        if name != "good":
            assert re.search(reason, lines[f"v$_${name}"])
            assert re.search(reason, problems[f"v$_${name}"])


class Odd(BaseException):
    """As Rust's panics: no `Exception`."""


ODD = [
    RuntimeError("fault"),
    ValueError("fault"),
    MemoryError(),
    OSError("no number"),
    RecursionError("deep"),
    StopIteration(),
    GeneratorExit(),
    AssertionError(),
    KeyError("x"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "fault"),
    Odd("panic"),
    CorpusError("one clip's"),
]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("error", ODD, ids=lambda e: type(e).__name__)
def test_whatever_one_clip_raises_costs_that_clip(
    tmp_path, sources, monkeypatch, error, cached
):
    def fails(media_of_clip, config):
        if media_of_clip.frames.shape[1] == 84:  # the second source
            raise error
        return read_media(media_of_clip, config)

    monkeypatch.setattr(media, "read_media", fails)
    one, two = sources
    clips = [
        Clip(str(k), (one, two)[k == 2], "x", 0.5, "train", "v", str(k))
        for k in range(5)
    ]
    problems = {}
    place = tmp_path / "cache" if cached else None
    found = clip_corpus(clips, SMALL, cache=place, problems=problems)
    assert found.train.ids == ["0", "1", "3", "4"] and list(problems) == ["2"]
    assert str(two) in problems["2"]
    with pytest.raises(ClipError, match="1 of a list of clips"):
        clip_corpus(clips, SMALL, cache=place)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_stops_a_reading_stops_it(sources, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(media, "read_media", fails)
    with pytest.raises(error):
        clip_corpus([Clip("a", sources[0], "x", 0.5, "train", "v", "a")], SMALL)


def test_rotated_films_are_upright_in_corpus_and_cache(tmp_path):
    """What a cache holds of before this was heeded has another key."""
    plain = write(tmp_path / "plain.mp4", n=6, size=(56, 84))
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(plain.read_bytes())
    displayed(turned, 0, 1, -1, 0)
    clips = [Clip(p.stem, p, "x", 0.0, "train", "v", p.stem) for p in (plain, turned)]
    kept = clip_corpus(clips, SMALL)
    for _ in range(2):
        assert equal(clip_corpus(clips, SMALL, cache=tmp_path / "cache"), kept)
    grids = kept.train.extras["grid"]
    assert (
        grids[0, 1:].tolist() == grids[1, :0:-1].tolist() and grids[0, 1] < grids[0, 2]
    )
    assert media.VERSION != "1"


def test_a_folder_whose_name_is_no_text_is_recorded(tmp_path, sources):
    folder = tmp_path / os.fsdecode(b"caf\xe9\n")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    found = clip_corpus(three(folder, sources), FEW)
    assert found.card.source == r"the clip folder caf\udce9\n"
    json.dumps(found.card.as_dict(), ensure_ascii=False).encode()


def test_problems_of_a_list_of_clips(tmp_path, sources):
    clip = Clip("a", sources[0], "text", 0.5, "train", "v", "a")
    gone = replace(clip, id="gone", path=tmp_path / "gone.mp4")
    folder = replace(clip, id="folder", path=tmp_path)
    with pytest.raises(ClipError, match=r"(?s)2 of a list of clips.*gone:.*folder:"):
        clip_corpus([clip, gone, folder], FEW)
    problems = {}
    assert clip_corpus([gone, clip], FEW, problems=problems).train.ids == ["a"]
    assert "gone.mp4" in problems["gone"]
    with pytest.raises(ClipError, match="holds no clip that can be used"):
        clip_corpus([gone], FEW, problems={})
    with pytest.raises(ClipError, match="no clip"):
        clip_corpus([], FEW)
    with pytest.raises(ClipError, match="occur twice: a"):
        clip_corpus([clip, replace(clip, split="test")], FEW)
    with pytest.raises(CorpusError, match="NaN"):
        clip_corpus([replace(clip, sentiment=math.nan)], FEW)


def test_unimodal_labels_are_there_if_all_clips_have_them(sources):
    clip = Clip("a", sources[0], "x", 0.5, "train", "v", "a", labels={"text": -1.0})
    both = replace(clip, id="b", labels={"text": 2.0, "audio": 1.0})
    assert set(clip_corpus([clip, both], FEW).train.labels) == {"sentiment", "text"}
    labels = clip_corpus([clip, both], FEW).train.labels["text"]
    assert labels.tolist() == [[-1.0], [2.0]]


def test_fingerprint_changes_with_anything(tmp_path, sources):
    one, two = sources
    base = ("1", "good", 1, "train", one), ("2", "bad", -1, "test", two)

    def print_of(*clips, config=FEW, cache=None):
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        folder = folder_of(tmp_path / "f", *clips)
        return clip_corpus(folder, config, cache=cache).fingerprint

    same = print_of(*base)
    assert print_of(*base) == same
    assert print_of(*base, cache=tmp_path / "cache") == same
    assert print_of(*base[::-1]) == same  # rows of the table in another order
    others = [
        print_of(("1", "good", 1, "train", two), base[1]),
        print_of(("1", "good!", 1, "train", one), base[1]),
        print_of(("1", "good", 1.2, "train", one), base[1]),
        print_of(("1", "good", 1, "valid", one), base[1]),
        print_of(("7", "good", 1, "train", one), base[1]),
        print_of(base[0]),
        print_of(*base, config=replace(FEW, frames=4)),
    ]
    assert len({same, *others}) == 1 + len(others)


# --- by name --------------------------------------------------------------------------


def test_puppet_clips_by_name():
    found = corpora.load("puppet-clips", frames=2, max_pixels=(2 * UNIT) ** 2)
    shipped = puppet_clips()
    assert sum(len(s) for s in found.splits.values()) == len(shipped)
    assert found.name == "puppet-clips" and found.card.synthetic
    assert set(found.train.labels) == {"sentiment", "text", "audio", "vision"}
    text = dict(zip(found.train.ids, found.train.raw_text, strict=True))
    assert text == {c.id: c.text for c in shipped if c.split == "train"}
    assert (found.train.extras["grid"] == [1, 4, 4]).all()
    assert found.test.sealed and not found.valid.sealed
    with pytest.raises(UnknownNameError, match="colour"):
        corpora.load("puppet-clips", colour=1)
    assert corpora.prepare("puppet-clips") is None


def test_clips_by_name(tmp_path, sources):
    three(tmp_path / "clips", sources)
    found = corpora.load("clips", tmp_path, frames=4, max_pixels=(3 * UNIT) ** 2)
    assert equal(found, clip_corpus(tmp_path / "clips", SMALL))
    assert len(list((tmp_path / "clip-cache").iterdir())) == 2
    assert corpora.prepare("clips", tmp_path) == tmp_path / "clips"
    elsewhere = corpora.load("clips", tmp_path, folder=tmp_path / "clips", frames=2)
    assert elsewhere.train.extras["grid"][0, 0] == 1
    with pytest.raises(UnknownNameError, match="frame_count"):
        corpora.load("clips", tmp_path, frame_count=2)
    assert "owners" in corpora.terms("clips")


def test_clips_by_name_say_what_is_wrong(tmp_path, sources):
    with pytest.raises(ClipError, match=r"no .*label\.csv.*Raw/<video_id>"):
        corpora.load("clips", tmp_path)
    with pytest.raises(CorpusError, match=r"no clips in .*put a folder in MMSA-FET"):
        corpora.prepare("clips", tmp_path)
    folder = three(tmp_path / "clips", sources)
    (folder / "Raw" / "v" / "2.mp4").write_bytes(b"no video")
    with pytest.raises(ClipError, match=r"(?s)1 of .*v\$_\$2: .*broken.*`problems`"):
        corpora.load("clips", tmp_path)
    found = corpora.load("clips", tmp_path, skip_unusable=True)
    assert list(found.splits) == ["train", "test"]
    (note,) = found.card.notes
    assert note.startswith("left out: v$_$2: ") and "broken" in note


def test_real_clips_of_mosi(shared_dir, tmp_path):
    folder = shared_dir / "data" / "cmu_mosi" / "clips"
    if not folder.is_dir():
        pytest.skip(f"no CMU-MOSI clips at {folder}")
    config = MediaConfig(frames=2, max_pixels=(4 * UNIT) ** 2)
    found = clip_corpus(folder, config, cache=tmp_path)
    assert sum(len(s) for s in found.splits.values()) == 77
    for split in found.splits.values():
        grid = split.extras["grid"]
        assert (grid.prod(1) == split.features["vision"].lengths).all()
        assert (grid[:, 1] * grid[:, 2] >= 4 * UNIT**2 // 14**2).all()
        assert (grid[:, 1] * grid[:, 2] * 14**2 <= config.max_pixels).all()
        assert all(text.strip() for text in split.raw_text)
        batch = split.batch(np.arange(min(len(split), 4)))
        assert torch.isfinite(batch.features["audio"]).all()
        assert batch.features["vision"].std() > 0.3
