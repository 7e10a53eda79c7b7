"""Clips as a corpus: what an omni-modal model reads of raw video, sound and words.

Each clip becomes log-mel frames (T, 128), patches of its resized frames (n, 1176) and
its transcript. What is computed from a clip is cached in one file, named by the content
of the clip and the settings, so a clip is decoded once whatever happens to its folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache as once
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmsa_lib.corpora import clips as clip_files
from mmsa_lib.corpora.apart import decode, kept
from mmsa_lib.corpora.clips import Clip
from mmsa_lib.corpora.decoding import LONGEST, Media, open_regular
from mmsa_lib.corpora.download import disk_remedy
from mmsa_lib.corpora.schema import (
    Card,
    Corpus,
    Ragged,
    Split,
    _modality_facts,
    _split_facts,
)
from mmsa_lib.errors import ClipError, ConfigError, CorpusError
from mmsa_lib.files import printable, write_atomic

VERSION = "2"  # of the preprocessing: part of the key of every cached file
RATE = 16000  # samples a second, as the audio tower of Qwen2.5-Omni expects
HOP = 160  # samples a log-mel frame
PATCH, TIME, MERGE = 14, 2, 2  # pixels of a patch, frames of one, patches a token side
UNIT = PATCH * MERGE  # a frame's sides are multiples of this
WIDTH = 3 * TIME * PATCH * PATCH
# of the pictures that CLIP's vision tower was trained on; Qwen's towers use the same
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TERMS = "The clips are yours: their owners' terms apply."


@dataclass(frozen=True)
class MediaConfig:
    """How a clip is read.

    frames      at most so many, evenly spaced in time; even (two frames make a patch)
    max_pixels  of one resized frame; `min_pixels` likewise. The aspect ratio is kept
                as far as sides that are multiples of 28 allow.
    longest     seconds; a longer clip is refused
    """

    frames: int = 16
    max_pixels: int = 128 * UNIT * UNIT
    min_pixels: int = 4 * UNIT * UNIT
    longest: float = LONGEST

    def __post_init__(self):
        if self.frames < TIME or self.frames % TIME:
            raise ConfigError(f"frames must be even and positive, found {self.frames}")
        if not UNIT * UNIT <= self.min_pixels <= self.max_pixels:
            raise ConfigError(
                f"needed {UNIT * UNIT} <= min_pixels <= max_pixels, found "
                f"{self.min_pixels} and {self.max_pixels}"
            )


# --- video ----------------------------------------------------------------------------


def smart_size(height: int, width: int, config: MediaConfig) -> tuple[int, int]:
    """Size of a resized frame: multiples of 28, area within the limits, same aspect.

    The rule of Qwen2-VL's processors. Raises `ClipError` for a frame more than 200
    times as long as wide.
    """
    if max(height, width) > 200 * min(height, width):
        raise ClipError(f"frames of {width} x {height} pixels are too elongated")
    size = [round(side / UNIT) * UNIT for side in (height, width)]
    if math.prod(size) > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        size = [
            max(UNIT, math.floor(side / shrink / UNIT) * UNIT)
            for side in (height, width)
        ]
    elif math.prod(size) < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        size = [math.ceil(side * grow / UNIT) * UNIT for side in (height, width)]
    return size[0], size[1]


def patches(frames: np.ndarray, config: MediaConfig) -> tuple[np.ndarray, np.ndarray]:
    """Frames (n, H, W, 3) uint8 -> patches (t*h*w, 1176) uint8 and the grid (t, h, w).

    A row holds one patch of two frames: channel, frame, row, column; four rows that
    the vision tower merges into one token lie side by side. An odd last frame is
    repeated. Bicubic with antialiasing on whole numbers, as torchvision resizes uint8.
    """
    height, width = smart_size(*frames.shape[1:3], config)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if (height, width) != tuple(frames.shape[1:3]):
        x = torch.nn.functional.interpolate(
            x, (height, width), mode="bicubic", antialias=True
        )
    if len(x) % TIME:
        x = torch.cat([x, x[-1:]])
    grid = (len(x) // TIME, height // PATCH, width // PATCH)
    t, h, w = grid
    x = x.view(t, TIME, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * h * w, WIDTH).numpy(), np.array(grid, np.int64)


def _standardisation() -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale that turn uint8 patches into what the vision tower reads."""
    shift, scale = (
        np.repeat(np.float32(255) * np.float32(values), WIDTH // 3)
        for values in (MEAN, STD)
    )
    return shift, scale


# --- sound ----------------------------------------------------------------------------


@once
def _whisper():
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=128, sampling_rate=RATE)


def log_mel(audio: np.ndarray) -> np.ndarray:
    """Sound (samples,) at 16 kHz -> Whisper's log-mel frames (T, 128), 100 a second.

    Equal to the frames that Whisper's extractor gives for a sound padded with silence,
    as Qwen2.5-Omni's processor calls it, without the padding.
    """
    steps = math.ceil(len(audio) / HOP)
    features = _whisper()(
        audio,
        sampling_rate=RATE,
        padding="max_length",
        max_length=(steps + 4) * HOP,  # silence for the windows of the last frames
        return_tensors="np",
    )["input_features"][0]
    return np.ascontiguousarray(features.T[:steps])


# --- one clip -------------------------------------------------------------------------


def read_media(media: Media, config: MediaConfig) -> dict[str, np.ndarray]:
    """What a model needs of a decoded clip.

    audio   (T, 128) float32    vision  (n, 1176) uint8
    grid    (3,) int64, patches in time, height and width, t*h*w = n
    pace    (1,) float32, seconds from one pair of frames to the next
    """
    vision, grid = patches(media.frames, config)
    times = media.frame_times
    spacing = np.diff(times).mean() if len(times) > 1 else media.seconds
    return {
        "audio": log_mel(media.audio),
        "vision": np.ascontiguousarray(vision),
        "grid": grid,
        "pace": np.array([TIME * spacing], np.float32),
    }


def why_not(path: str | Path, error: BaseException) -> str:
    """What an error says of the clip at `path`, with its name."""
    if isinstance(error, ClipError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{path}: it takes more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return f"{path}: cannot be read: {error.strerror}"
    return f"{path}: {type(error).__name__}: {error}"


def _key(path: Path, config: MediaConfig) -> str:
    """Content address of what `read_media` makes of a clip file."""
    with open_regular(path) as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    settings = sorted(asdict(config).items())
    return hashlib.sha256(f"{VERSION} {content} {settings}".encode()).hexdigest()


def _read(path: Path, config: MediaConfig, cache: Path | None, key: str):
    """From the cache if it is there, else decoded and entered; a `_Cached` or arrays"""

    def made():
        return read_media(decode(path, config.frames, RATE, config.longest), config)

    if cache is None:
        return made()
    file = cache / f"{key}.safetensors"
    # absent, or cut short by a full disk: make it
    with contextlib.suppress(SafetensorError, OSError):
        return _facts(file)
    _write(made(), file)
    return _facts(file)


class _CacheError(CorpusError):
    """The cache is at fault, not the clip."""


def _write(arrays: dict[str, np.ndarray], file: Path) -> None:
    """Whole or not at all. Raises `_CacheError`."""
    try:
        write_atomic(file, save(arrays))
    except OSError as error:
        raise _CacheError(
            f"could not write the clip cache {file}: {disk_remedy(error, file)}"
        ) from error


@dataclass(frozen=True)
class _Cached:
    """Sizes of one cached clip; its arrays stay in the file."""

    file: Path
    audio: int
    vision: int
    grid: np.ndarray
    pace: np.ndarray


def _facts(file: Path) -> _Cached:
    with safe_open(file, "np") as body:
        rows = {m: body.get_slice(m).get_shape()[0] for m in ("audio", "vision")}
        return _Cached(file, **rows, grid=body.get_tensor("grid"),
                       pace=body.get_tensor("pace"))  # fmt: skip


class _Rows:
    """Rows of one modality over many cached clips, one clip read at a time."""

    ndim = 2

    def __init__(self, entries: Sequence[_Cached], name: str, width: int):
        self.entries, self.name = entries, name
        lengths = [getattr(e, name) for e in entries]
        self.starts = np.cumsum([0, *lengths])
        self.shape = (int(self.starts[-1]), width)

    def __getitem__(self, rows: slice) -> np.ndarray:
        if rows.start == rows.stop:
            return np.zeros((0, self.shape[1]), np.float32)
        k = int(np.searchsorted(self.starts, rows.start, side="right")) - 1
        with safe_open(self.entries[k].file, "np") as body:
            first = rows.start - self.starts[k]
            return body.get_slice(self.name)[first : rows.stop - self.starts[k]]


# --- the corpus -----------------------------------------------------------------------


def clip_corpus(
    clips: Iterable[Clip] | str | Path,
    config: MediaConfig | None = None,
    *,
    cache: str | Path | None = None,
    problems: dict[str, str] | None = None,
    name: str = "clips",
    card: dict | None = None,
) -> Corpus:
    """Clips, or a folder of them in MMSA-FET's layout, as a corpus; `test` is sealed.

    Modalities are audio (log-mel frames) and vision (patches); the transcripts are the
    raw text, and the extras grid and pace place the patches (`read_media`). Label
    "sentiment", and text, audio and vision where all clips have unimodal labels.

    cache     folder for what was computed; without one everything is kept in memory
    problems  a dictionary: unusable clips and faulty rows are skipped and entered
              there, id: reason. Without it they raise one `ClipError` that names all.
    """
    config = config or MediaConfig()
    found: dict[str, str] = {}
    if isinstance(clips, str | Path):
        source = f"the clip folder {printable(Path(clips).name)}"
        clips = clip_files.read_folder(clips, problems=found)
    else:
        source = "a list of clips"
    clips = list(clips)
    cache = Path(cache) if cache is not None else None

    def read(clip: Clip):
        try:
            key = _key(clip.path, config)
            return key, _read(clip.path, config, cache, key)
        except (_CacheError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # libraries in Rust raise more than Exception
            return clip.id, why_not(clip.path, error)

    _whisper()  # its lazy import does not bear several threads
    with kept(), ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(read, clips))
    found |= {key: why for key, why in results if isinstance(why, str)}
    if problems is not None:
        problems |= found
    elif found:
        raise ClipError(
            f"{len(found)} of {source} cannot be used:\n{clip_files._listing(found)}\n"
            "Remove or correct them, or give a dictionary as `problems` to skip them."
        )
    usable = [
        (clip, key, entry)
        for clip, (key, entry) in zip(clips, results, strict=True)
        if not isinstance(entry, str)
    ]
    splits = {
        split: _split(split, rows)
        for split in clip_files.MODES
        if (rows := [u for u in usable if u[0].split == split])
    }
    if not splits:
        raise ClipError(f"{source} holds no clip that can be used")
    seen = [clip.id for clip, _, _ in usable]
    if len(set(seen)) < len(seen):
        twice = sorted({i for i in seen if seen.count(i) > 1})
        raise ClipError(f"clip ids occur twice: {', '.join(twice[:5])}")
    facts = {
        "description": "Raw clips with transcripts.",
        "source": source,
        "terms": TERMS,
        "synthetic": False,
    }
    return Corpus(
        name,
        Card(
            name=name,
            version=VERSION,
            modalities=_modality_facts(splits),
            splits=_split_facts(splits),
            sha256=_fingerprint(usable),
            options=asdict(config),
            **(facts | (card or {})),
        ),
        splits,
    )


def _split(name: str, rows: list[tuple]) -> Split:
    clips, _, entries = zip(*rows, strict=True)
    shift, scale = _standardisation()
    features = {}
    for m, width in (("audio", 128), ("vision", WIDTH)):
        if isinstance(entries[0], _Cached):
            values = _Rows(entries, m, width)
            lengths = np.diff(values.starts)
            features[m] = Ragged(values, values.starts[:-1], lengths)
        else:
            arrays = [e[m] for e in entries]
            features[m] = Ragged.from_list(arrays, dtype=arrays[0].dtype)
    features["vision"] = features["vision"].standardised(shift, scale)
    labels = {"sentiment": np.array([c.sentiment for c in clips], np.float32)}
    for m in ("text", "audio", "vision"):
        if all(m in c.labels for c in clips):
            labels[m] = np.array([c.labels[m] for c in clips], np.float32)
    extras = {
        k: np.stack([getattr(e, k) if isinstance(e, _Cached) else e[k]
                     for e in entries])
        for k in ("grid", "pace")
    }  # fmt: skip
    return Split(
        name=name,
        ids=[c.id for c in clips],
        features=features,
        labels=labels,
        raw_text=[c.text for c in clips],
        extras=extras,
        sealed=name == "test",
    )


def _fingerprint(usable: list[tuple]) -> str:
    """sha256 over ids, transcripts, labels and content addresses; opens no clip."""
    digest = hashlib.sha256()
    for clip, key, _ in sorted(usable, key=lambda u: u[0].id):
        row = (clip.id, clip.text, clip.sentiment, clip.split, key)
        digest.update(repr((*row, sorted(clip.labels.items()))).encode())
    return digest.hexdigest()


def load(
    data_dir: str | Path | None = None,
    folder: str | Path | None = None,
    frames: int = 16,
    max_pixels: int = MediaConfig.max_pixels,
    skip_unusable: bool = False,
) -> Corpus:
    """A folder of clips in MMSA-FET's layout: `folder`, else ``data_dir/clips``.

    What is computed is cached in ``data_dir/clip-cache``. `skip_unusable` leaves out
    clips that cannot be used and names them in the card's notes; else they are errors.
    """
    data_dir = Path(data_dir or ".")
    folder = Path(folder or data_dir / "clips")
    config = MediaConfig(frames=frames, max_pixels=max_pixels)
    problems: dict[str, str] | None = {} if skip_unusable else None
    corpus = clip_corpus(
        folder, config, cache=data_dir / "clip-cache", problems=problems
    )
    corpus.card.notes += [
        printable(f"left out: {i}: {why}") for i, why in (problems or {}).items()
    ]
    return corpus


def embedded(frames: int = 16, max_pixels: int = (3 * UNIT) ** 2) -> Corpus:
    """The puppets' clips of the package, with frames small enough for a CPU."""
    about = clip_files.puppet_card()
    card = {k: about[k] for k in ("description", "source", "terms", "synthetic")}
    config = MediaConfig(frames=frames, max_pixels=max_pixels)
    return clip_corpus(
        clip_files.puppet_clips(), config, name="puppet-clips", card=card
    )


def prepare(
    data_dir: Path, accept_terms: bool = False, folder: str | Path | None = None
) -> Path:
    """Clips are not downloaded: says where they are expected. Raises `CorpusError`."""
    where = Path(folder or data_dir / "clips")
    if (where / "label.csv").is_file():
        return where
    raise CorpusError(
        f"no clips in {where}: put a folder in MMSA-FET's layout there (label.csv and "
        "Raw/<video_id>/<clip_id>.mp4). Their owners give raw videos on request only."
    )
