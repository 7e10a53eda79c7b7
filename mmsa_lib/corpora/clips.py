"""Raw clips: folders in MMSA-FET's layout, and the puppets' clip form.

A folder holds `label.csv` (video_id, clip_id, text, label, label_T, label_A, label_V,
annotation, mode) and `Raw/<video_id>/<clip_id>.mp4`. Reading the folder opens no clip;
`decode` turns one clip into frames and sound, and `check` finds those it cannot.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np

from mmsa_lib.corpora.decoding import LONGEST, Media, decode
from mmsa_lib.errors import ClipError

__all__ = [
    "Clip",
    "Media",
    "check",
    "decode",
    "puppet_card",
    "puppet_clips",
    "puppet_folder",
    "read_folder",
]

MODES = ("train", "valid", "test")
REQUIRED = ("video_id", "clip_id", "text", "label", "mode")
UNIMODAL = {"label_T": "text", "label_A": "audio", "label_V": "vision"}
SHOWN = 20  # faults named in one message


@dataclass(frozen=True)
class Clip:
    """One labelled clip of a folder; decoded only by `decode`.

    `labels` holds the unimodal labels (label_T, label_A, label_V) by modality, where
    the folder has them. Words, tracks, cues and truth are known for puppets only.
    """

    id: str  # <video_id>$_$<clip_id>, as MMSA-FET writes it
    path: Path
    text: str
    sentiment: float  # in [-3, 3]
    split: str  # "train", "valid" or "test"
    video_id: str
    clip_id: str
    annotation: str = ""
    labels: dict[str, float] = field(default_factory=dict)
    words: list[tuple[str, float, float]] = field(default_factory=list)  # start, end, s
    times: np.ndarray | None = field(default=None, compare=False)  # (T,) seconds
    # what text, audio and vision say at each time, in label points, (T,) each
    tracks: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    # "lift" of the pitch and "smile" at each time, 0 to 1, (T,) each
    cues: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    truth: dict = field(default_factory=dict, compare=False)


# --- folders --------------------------------------------------------------------------


def read_folder(
    folder: str | Path, problems: dict[str, str] | None = None
) -> list[Clip]:
    """The clips of a folder in MMSA-FET's layout, in the order of its `label.csv`.

    Raises `ClipError` that names all faulty rows at once: an id that occurs twice, a
    label that is no number in [-3, 3], an unknown mode, a clip file that is not there.
    If you give a dictionary as `problems`, faulty rows are skipped and entered there,
    id: reason. A missing `label.csv` or column is always an error.
    """
    folder = Path(folder)
    table = folder / "label.csv"
    if not table.is_file():
        raise ClipError(
            f"no {table}: a clip folder in MMSA-FET's layout holds label.csv (columns "
            f"{', '.join(REQUIRED)}, ...) and Raw/<video_id>/<clip_id>.mp4"
        )
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or ()
    except UnicodeDecodeError as error:
        raise ClipError(
            f"{table} is not UTF-8 ({error.reason} at byte {error.start}): save it "
            "again with that encoding"
        ) from None
    missing = [c for c in REQUIRED if c not in columns]
    if missing:
        raise ClipError(
            f"{table} lacks the columns {', '.join(missing)}; found "
            f"{', '.join(columns) or 'an empty file'}"
        )
    clips: dict[str, Clip] = {}
    faults: dict[str, str] = {}
    for line, row in rows:
        key = f"{row['video_id']}$_${row['clip_id']}"
        made = _clip(folder, key, row)
        if key in clips:
            made = f"occurs a second time in line {line}"
            key = f"{key} (line {line})"
        if isinstance(made, str):
            faults[key] = made
        else:
            clips[key] = made
    if problems is not None:
        problems |= faults
    elif faults:
        raise ClipError(
            f"{table} has {len(faults)} faulty rows of {len(rows)}:\n"
            f"{_listing(faults)}\nCorrect them, or give read_folder a dictionary as "
            "`problems` to skip them."
        )
    return list(clips.values())


def _clip(folder: Path, key: str, row: dict) -> Clip | str:
    """The clip of one row, or what is wrong with the row."""
    values = {}
    for column in ("label", *UNIMODAL):
        text = (row.get(column) or "").strip()
        if not text and column != "label":
            continue  # MOSI and MOSEI have no unimodal labels
        try:
            values[column] = float(text)
        except ValueError:
            return f"{column} is {text!r}, expected a number in [-3, 3]"
        if not -3 <= values[column] <= 3:  # NaN fails too
            return f"{column} is {text}, expected a number in [-3, 3]"
    if row["mode"] not in MODES:
        return f"mode is {row['mode']!r}, expected {', '.join(MODES)}"
    path = folder / "Raw" / row["video_id"] / f"{row['clip_id']}.mp4"
    if not path.is_file():
        return f"there is no file {path}"
    return Clip(
        id=key,
        path=path,
        text=row["text"],
        sentiment=values.pop("label"),
        split=row["mode"],
        video_id=row["video_id"],
        clip_id=row["clip_id"],
        annotation=row.get("annotation") or "",
        labels={UNIMODAL[c]: v for c, v in values.items()},
    )


def _listing(problems: dict[str, str]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in problems.items()]
    more = len(lines) - SHOWN
    return "\n".join(lines[:SHOWN] + ([f"  and {more} more"] if more > 0 else []))


def puppet_folder() -> Path:
    """Where the puppets' clips lie in the package, with their `card.json`."""
    return Path(str(resources.files("mmsa_lib.corpora") / "puppet_clips"))


def puppet_card() -> dict:
    """What the puppets' clips are, how they were made, and their sha256."""
    return json.loads((puppet_folder() / "card.json").read_text("utf-8"))


def puppet_clips() -> list[Clip]:
    """The puppets' clips with word times, latent tracks and truth.

    ``truth`` is the script's: speaker, domain, literal, sincerity (-1 is sarcasm),
    voice, face, arousal, sentiment, emotions, events, conflict (see `puppets.Script`).
    """
    folder = puppet_folder()
    entries = json.loads((folder / "scripts.json").read_text("utf-8"))
    clips = []
    for clip in read_folder(folder):
        entry = entries[f"{clip.video_id}_{clip.clip_id}"]
        tracks, cues = (
            {k: np.array(v) for k, v in entry[kind].items()}
            for kind in ("tracks", "cues")
        )
        extra = {
            "words": [tuple(word) for word in entry["words"]],
            "times": np.arange(len(tracks["text"])) * entry["step_seconds"],
            "tracks": tracks,
            "cues": cues,
            "truth": entry["truth"],
        }
        clips.append(Clip(**(vars(clip) | extra)))
    return clips


def check(
    clips: Iterable[Clip], longest: float = LONGEST
) -> tuple[list[Clip], dict[str, str]]:
    """Decode every clip once: those that can be used, and for the others id: reason."""
    good, problems = [], {}
    for clip in clips:
        try:
            decode(clip.path, frames=1, longest=longest)
        except ClipError as error:
            problems[clip.id] = str(error)
        else:
            good.append(clip)
    return good, problems
