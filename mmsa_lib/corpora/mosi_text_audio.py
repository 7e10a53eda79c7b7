"""CMU-MOSI with text and audio, built from small public files at pinned commits.

2199 opinion segments of 93 videos, sentiment in [-3, 3], standard folds. Text is the
last hidden state of a frozen encoder over the lower-cased transcript; audio is one
vector of 73 openSMILE statistics a segment; there is no vision.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from mmsa_lib.corpora import store
from mmsa_lib.corpora.download import fetch, require_terms
from mmsa_lib.corpora.pickles import load_npz
from mmsa_lib.corpora.schema import Card, Corpus, Ragged, Split, make_corpus
from mmsa_lib.errors import CorpusError, check_device
from mmsa_lib.files import sha256_of

NAME = "mosi-text-audio"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TOKENS = 50  # including the special tokens
SIZES = {"train": 1284, "valid": 229, "test": 686}
TERMS = """\
CMU-MOSI (Zadeh et al., 2016) is a corpus of opinion videos from YouTube, for research
only. The people in it can be identified: do not publish transcripts, features or
recordings, and do not try to find the speakers. The labels are those of the CMU
MultimodalSDK; transcripts and audio features are the public copies of
declare-lab/multimodal-deep-learning. No open licence covers any of these copies."""

_DECLARE = (
    "https://raw.githubusercontent.com/declare-lab/multimodal-deep-learning/"
    "111b401d867c14a1dcd930fd2b2ab58a5eca3f70/bc-LSTM/data/"
)
_LABELS = (
    "https://raw.githubusercontent.com/worldreboot/audio-text-sentiment-analysis/"
    "40df4d8e7ed1b120e2a36286d96b3b6968e00b13/cmumosi/"
)
SOURCES = {  # file: (folder of its URL, sha256)
    "transcripts.csv": (
        _DECLARE,
        "e7689e6d70720addd2a6b316419d245a68839c32b014ff426c406063ee777466",
    ),
    "text_train.csv": (
        _DECLARE,
        "73770b6302ad0f7a51f4eddcae6788efde4d0b6802e09f78249d5b538d1c1d67",
    ),
    "text_test.csv": (
        _DECLARE,
        "f3b735070bf07ceff7a6ef6c8f4c32757e988de484e35bd6d38b2aecef851a59",
    ),
    "audio_train0.csv": (
        _DECLARE + "audio/",
        "5435398a54664e7b00304587dc59ae84a438852be033c2a2fba779588624a2a1",
    ),
    "audio_test0.csv": (
        _DECLARE + "audio/",
        "ddd17eeefd3d951d51d4e2ef8a0d132652d8161e1886f71eb7262b7a14bffff6",
    ),
    "CMU_MOSI_Opinion_Labels.csd": (
        _LABELS,
        "aef5f4617cdb067cc7606bb798eb6452c3de45f0f21cb3427be33c4d8c7fe852",
    ),
}

# The standard folds of the CMU MultimodalSDK, as video ids.
_FOLD_LISTS = {
    "train": """
        2iD-tVS8NPw 8d-gEyoeBzc Qr1Ca94K55A Ci-AH39fi3Y 8qrpnFRGt2A Bfr499ggo-0
        QN9ZIUWUXsY 9T9Hf74oK10 7JsX8y1ysxY 1iG0909rllw Oz06ZWiO20M BioHAh1qJAQ
        9c67fiY0wGQ Iu2PFX3z_1s Nzq88NnDkEk Clx4VXItLTE 9J25DZhivz8 Af8D0E4ZXaw
        TvyZBvOMOTc W8NXH0Djyww 8OtFthrtaJM 0h-zjBukYpk Vj1wYRQjB-o GWuJjcEuzt8
        BI97DNYfe5I PZ-lDQFboO8 1DmNV9C1hbY OQvJTdtJ2H4 I5y0__X72p0 9qR7uwkblbs
        G6GlGvlkxAQ 6_0THN4chvY Njd1F0vZSm4 BvYR0L6f2Ig 03bSnISJMiM Dg_0XKD0Mf4
        5W7Z1C_fDaE VbQk4H8hgr0 G-xst2euQUc MLal-t_vJPM BXuRRbG0Ugk LSi-o-IrDMs
        Jkswaaud0hk 2WGyTLYerpo 6Egk_28TtTM Sqr0AcuoNnk POKffnXeBds 73jzhE8R1TQ
        OtBXNcAL_lE HEsqda8_d0Q VCslbP0mgZI IumbAb8q2dM
    """,
    "valid": """
        WKA5OygbEKI c5xsKMxpXnc atnd_PF-Lbs bvLlb-M3UXU bOL9jKpeJRs _dI--eQ6qVU
        ZAIRrfG22O0 X3j2zQgwYgE aiEXnCPZubE ZUXBRvtny7o
    """,
    "test": """
        tmZoasNr4rU zhpQhgha_KU lXPQBPVc5Cw iiK8YX8oH1E tStelxIAHjw nzpVDcQ0ywM
        etzxEpPuc6I cW1FSBF59ik d6hH302o4v8 k5Y_838nuGo pLTX3ipuDJI jUzDDGyPkXU
        f_pcplsH_V0 yvsjCA6Y5Fc nbWiPyCm4g0 rnaNMUZpvvg wMbj6ajWbic cM3Yna7AavY
        yDtzw_Y-7RU vyB00TXsimI dq3Nf_lMPnE phBUpBr1hSo d3_k5Xpfmik v0zCBqDeKcE
        tIrG4oNLFzE fvVhgmXxadc ob23OKe5a9Q cXypl4FnoZo vvZ4IcEtiZc f9O3YtZ2VfI
        c7UH_rxdZv4
    """,
}
FOLDS = {name: videos.split() for name, videos in _FOLD_LISTS.items()}


def prepare(
    data_dir: str | Path,
    accept_terms: bool = False,
    *,
    encoder: str = ENCODER,
    text_features: str | Path | None = None,
    base_url: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> Path:
    """Download what is missing, build the store, return its folder.

    `encoder` is any Hugging Face encoder, by name or local folder. `text_features` is
    a .npz with `id` (n,), `text_lengths` (n,) and `text_features` (sum of lengths, D)
    to be used instead. `base_url` (or the variable MMSA_MOSI_URL) is a folder that
    serves all source files, in place of their public homes. What was built before is
    used again. Raises `DownloadError` or `CorpusError`; a store there stays as it was.
    """
    home = Path(data_dir) / NAME
    folder = home / _variant(encoder, text_features)
    if (folder / "card.json").is_file():
        store.open_store(folder)
        return folder
    if text_features is not None:
        text_features = _existing(text_features)
    sources = download(home / "sources", accept_terms, base_url)
    segments = read_segments(sources)
    if text_features is not None:
        text = read_text_features(text_features, segments.ids)
        made_by = {"text_features_sha256": sha256_of(text_features)}
        how = f"precomputed token vectors of {Path(text_features).name}"
    else:
        text, made_by = encode(segments.text, encoder, batch_size, device)
        how = f"last hidden state of {made_by['encoder']}"
    half = ["text"] if text.values.dtype == np.float16 else []
    return store.write(_build(segments, text, made_by, how), folder, float16=half)


def load(
    data_dir: str | Path,
    *,
    encoder: str | None = None,
    text_features: str | Path | None = None,
) -> Corpus:
    """Open what `prepare` built.

    Without options: the default encoder's store, or else the only one that was built.
    """
    home = Path(data_dir) / NAME
    folder = home / _variant(encoder or ENCODER, text_features)
    if (folder / "card.json").is_file():
        return store.open_store(folder)
    built = sorted(p.parent for p in home.glob("*/card.json"))
    if encoder is None and text_features is None and len(built) == 1:
        return store.open_store(built[0])
    given = {"encoder": encoder, "text_features": text_features}
    options = "".join(
        f" -p {k} {shlex.quote(str(v))}" for k, v in given.items() if v is not None
    )
    there = "; there is text by " + ", ".join(p.name for p in built) if built else ""
    raise CorpusError(
        f"{NAME} with text by {folder.name} is not in {home}{there}. Get it with\n\n"
        f"    mmsa-book data get {NAME} --accept-terms{options}\n\n"
        "(about 6 MB; research use only, the command without --accept-terms shows the "
        "terms), choose another text with the option encoder or text_features, or say "
        "where the data is: data_dir, --data-dir or MMSA_DATA."
    )


def download(
    folder: Path, accept_terms: bool = False, base_url: str | None = None
) -> Path:
    """Fetch and verify the six source files; the terms are shown if any is missing."""
    folder = Path(folder)
    base_url = base_url or os.environ.get("MMSA_MOSI_URL")
    missing = [
        name
        for name, (_, sha256) in SOURCES.items()
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256
    ]
    if missing:
        require_terms(NAME, TERMS, accept_terms)
    for name in missing:
        home, sha256 = SOURCES[name]
        if base_url:
            home = base_url.rstrip("/") + "/"
        fetch(home + name, sha256, folder / name)
    return folder


@dataclass
class Segments:
    """The segments sorted by video and number; audio is unscaled."""

    ids: list[str]  # "<video>_<number from 1>"
    text: list[str]
    sentiment: np.ndarray  # (n, 1)
    interval: np.ndarray  # (n, 2) seconds in the video
    audio: np.ndarray  # (n, 73)


def leaking_text(folder: str | Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The text columns that no loader here uses, for the audit of the corpora chapter.

    Segment ids, vectors (n, 100) of a network that was trained with sentiment labels,
    and whether it was trained on the segment (n,).
    """
    folder = Path(folder)
    parts = [_numbers(folder / f"text_{s}.csv") for s in ("train", "test")]
    rows = np.concatenate(parts)
    with (folder / "transcripts.csv").open(encoding="utf-8", newline="") as file:
        names = [row[0] for row in csv.reader(file)]
    ids = [names[int(k)] for k in rows[:, 0]]
    return ids, rows[:, 1:].astype(np.float32), np.arange(len(rows)) < len(parts[0])


def read_segments(folder: str | Path) -> Segments:
    """Merge transcripts, labels and audio of the six source files."""
    folder = Path(folder)
    with (folder / "transcripts.csv").open(encoding="utf-8", newline="") as file:
        transcripts = [(row[0], row[1]) for row in csv.reader(file)]
    # Row numbers in column 0 say which transcript an audio row belongs to. The other
    # columns of these files are text features that leak labels of the test split.
    rows = np.concatenate(
        [_numbers(folder / f"text_{s}.csv", usecols=0) for s in ("train", "test")]
    ).astype(int)
    vectors = np.concatenate(
        [_numbers(folder / f"audio_{s}0.csv") for s in ("train", "test")]
    )[:, :-1]  # the last column is a binary label
    if sorted(rows) != list(range(len(transcripts))) or len(vectors) != len(rows):
        raise CorpusError(
            f"{folder}: {len(transcripts)} transcripts, {len(rows)} row numbers and "
            f"{len(vectors)} audio rows do not belong together"
        )
    audio = np.empty(vectors.shape, dtype=np.float32)
    audio[rows] = vectors

    def place(k: int) -> tuple[str, int]:
        video, number = transcripts[k][0].rsplit("_", 1)
        return video, int(number)

    order = sorted(range(len(transcripts)), key=place)
    sentiment, interval = _read_labels(
        folder / "CMU_MOSI_Opinion_Labels.csd", [place(k) for k in order]
    )
    return Segments(
        ids=[transcripts[k][0] for k in order],
        text=[transcripts[k][1] for k in order],
        sentiment=sentiment,
        interval=interval,
        audio=audio[order],
    )


def encode(
    texts: list[str],
    encoder: str = ENCODER,
    batch_size: int = 64,
    device: str | None = None,
) -> tuple[Ragged, dict]:
    """Last hidden state of every token of the lower-cased texts, and the provenance.

    At most 50 tokens a text, special tokens included; float32 (tokens, width).
    """
    from transformers import AutoModel, AutoTokenizer

    device = device or "auto"
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModel.from_pretrained(encoder).to(device).eval()
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"the text encoder {encoder!r} could not be loaded: {error}\nConnect to "
            "the Hugging Face hub, or give a local folder with its files (encoder=...)"
            ", or precomputed vectors (text_features=FILE.npz)."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lowered = [text.lower() for text in texts]
    by_length = sorted(range(len(texts)), key=lambda i: len(lowered[i]))
    vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
    # disable=None: silent where stderr is no terminal
    for start in tqdm(range(0, len(texts), batch_size), desc="encode", disable=None):
        some = by_length[start : start + batch_size]
        tokens = tokenizer(
            [lowered[i] for i in some],
            truncation=True,
            max_length=MAX_TOKENS,
            padding=True,
            return_tensors="pt",
        ).to(device)
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state.float().cpu().numpy()
        mask = tokens["attention_mask"].bool().cpu().numpy()
        for row, i in enumerate(some):
            vectors[i] = hidden[row, mask[row]]
    name, sha256 = _identity(encoder)
    made_by = {
        "encoder": name,
        "encoder_revision": getattr(model.config, "_commit_hash", None) or sha256,
        "max_tokens": MAX_TOKENS,
        "text_sha256": hashlib.sha256("\0".join(lowered).encode()).hexdigest(),
    }
    return Ragged.from_list(vectors), made_by


def read_text_features(path: str | Path, ids: list[str]) -> Ragged:
    """Precomputed token vectors of a .npz, aligned to `ids`."""
    path = _existing(path)
    arrays = load_npz(
        path,
        ("id", "text_lengths", "text_features"),
        "id (n,), text_lengths (n,) and text_features (sum of lengths, D)",
    )
    values, lengths = arrays["text_features"], arrays["text_lengths"]
    found = {i: k for k, i in enumerate(arrays["id"].tolist())}
    missing = [i for i in ids if i not in found]
    if missing or len(found) != len(arrays["id"]):
        raise CorpusError(
            f"{path} has no text features for {len(missing)} of {len(ids)} segments "
            f"({', '.join(missing[:3])} ...) or repeats ids; ids are '<video>_<n>' "
            "with n from 1"
        )
    shapes = {name: array.shape for name, array in arrays.items()}
    if (
        values.ndim != 2
        or values.dtype.kind != "f"
        or lengths.shape != arrays["id"].shape
        or lengths.dtype.kind not in "iu"
        or lengths.min() < 0
        or lengths.sum() != len(values)
    ):
        raise CorpusError(
            f"{path} has arrays of shapes {shapes} and {lengths.sum()} steps in all; "
            "expected floats text_features (sum of lengths, D), integers text_lengths "
            "(n,), id (n,)"
        )
    starts = np.cumsum(lengths) - lengths
    order = [found[i] for i in ids]
    return Ragged(values, starts[order], lengths[order])


def _build(segments: Segments, text: Ragged, made_by: dict, how: str) -> Corpus:
    fold = {video: name for name, videos in FOLDS.items() for video in videos}
    folds = np.array([fold.get(i.rsplit("_", 1)[0], "none") for i in segments.ids])
    sizes = {name: int((folds == name).sum()) for name in FOLDS}
    if sizes != SIZES:
        raise CorpusError(f"the folds give {sizes} segments, expected {SIZES}")
    n = len(segments.ids)
    audio = Ragged(segments.audio, np.arange(n), np.ones(n, dtype=int))
    whole = Split(
        "all",
        segments.ids,
        {"text": text, "audio": audio},
        {"sentiment": segments.sentiment},
        raw_text=segments.text,
        truth={"interval": segments.interval},
    )
    card = Card(
        name=NAME,
        description=(
            "CMU-MOSI opinion segments; text: " + how + " over the lower-cased "
            f"transcript, at most {MAX_TOKENS} tokens; audio: 73 openSMILE statistics "
            "of the whole segment, unscaled"
        ),
        source="; ".join(sorted({home for home, _ in SOURCES.values()})),
        terms=TERMS,
        synthetic=False,
        options=made_by,
        notes=[
            "Labels shift between the standard folds: the training mean is about 0.55 "
            "above the test mean. Quote the training-mean predictor beside any MAE.",
            "No vision. The audio carries almost nothing (one vector a segment): this "
            "corpus cannot decide a multimodal claim.",
            "The utterance-level text and video features of the same repository are "
            "not used: they were trained with labels of the standard test split.",
        ],
    )
    splits = {name: whole.select(folds == name)._with(name=name) for name in FOLDS}
    return make_corpus(card, splits)


def _read_labels(path: Path, places: list[tuple[str, int]]):
    sentiment = np.empty((len(places), 1), dtype=np.float32)
    interval = np.empty((len(places), 2), dtype=np.float32)
    with h5py.File(path) as file:
        videos = file["Opinion Segment Labels/data"]
        for k, (video, number) in enumerate(places):
            # Segments count from 1 in ids, rows from 0 in the file.
            sentiment[k] = videos[video]["features"][number - 1]
            interval[k] = videos[video]["intervals"][number - 1]
    return sentiment, interval


def _numbers(path: Path, **options) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", quotechar='"', **options)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"there is no file of text features at {path}")
    return path


def _variant(encoder: str, text_features: str | Path | None) -> str:
    """The name of a store: what its text was made by."""
    if text_features is not None:
        return f"precomputed-{sha256_of(_existing(text_features))[:12]}"
    name, sha256 = _identity(encoder)
    return name.replace("/", "--") + (f"-{sha256[:12]}" if sha256 else "")


def _identity(encoder: str) -> tuple[str, str | None]:
    """A hub name as it is; of a local folder its name and a hash of its files."""
    folder = Path(encoder)
    if not folder.is_dir():
        return encoder, None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(
            f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode()
        )
    return folder.resolve().name, digest.hexdigest()
