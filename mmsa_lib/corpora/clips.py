"""Raw clips: folders in MMSA-FET's layout, and the puppets' clip form.

A folder holds `label.csv` (video_id, clip_id, text, label, label_T, label_A, label_V,
annotation, mode) and `Raw/<video_id>/<clip_id>.mp4`. Reading the folder opens no clip;
`decode` turns one clip into frames and sound, and `check` finds those it cannot.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np

from mmsa_lib.corpora import apart
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
    folder: str | Path,
    problems: dict[str, str] | None = None,
    *,
    labelled: bool = True,
) -> list[Clip]:
    """The clips of a folder in MMSA-FET's layout, in the order of its `label.csv`.

    Raises `ClipError` that names all faulty rows at once: too few or too many fields,
    an id that occurs twice or would leave the folder, a label that is no number in
    [-3, 3], an unknown mode, a clip file that is not there. If you give a dictionary as
    `problems`, faulty rows are skipped and entered there, id or line: reason. A
    `label.csv` that is missing, holds no row, lacks a column or has a quote that is
    never closed is always an error.

    labelled    if not, labels and modes are not read and need not be there: the clips
                have the sentiment NaN and no split
    """
    folder = Path(folder)
    table = folder / "label.csv"
    columns, rows = _rows(table)
    wanted = REQUIRED if labelled else REQUIRED[:3]
    missing = [c for c in wanted if c not in columns]
    if missing:
        raise ClipError(
            f"{table} lacks the columns {', '.join(missing)}; found "
            f"{', '.join(columns) or 'an empty file'}"
        )
    twice = sorted({c for c in columns if c and columns.count(c) > 1})
    if twice:
        raise ClipError(f"{table} has the columns {', '.join(twice)} more than once")
    if not rows:
        raise ClipError(f"{table} holds no clip: there is nothing below its header")
    clips: dict[str, Clip] = {}
    faults: dict[str, str] = {}
    for line, fields, text in rows:
        row = dict(zip(columns, fields, strict=False))
        swallowed = _swallowed(folder, columns, row, text)
        if swallowed:
            raise ClipError(
                f"{table}, line {line}: a quote opens there that is not closed before "
                f"the row of line {line + swallowed}. Close it, or write a quote that "
                'belongs to the text twice ("")'
            )
        fault = _fault_of_fields(columns, fields) or _fault_of_name(row)
        if fault:
            faults[f"line {line}"] = f"line {line} {fault}"
            continue
        key = f"{row['video_id']}$_${row['clip_id']}"
        made = _clip(folder, key, row, labelled)
        if key in clips:
            made = f"occurs a second time in line {line}"
        if isinstance(made, str):
            while key in clips or key in faults:
                key = f"{key} (line {line})"
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


def _rows(table: Path) -> tuple[list[str], list[tuple[int, list[str], str]]]:
    """The header, and of each row its first line's number, its fields and its text."""
    if not table.is_file():
        raise ClipError(
            f"no {table}: a clip folder in MMSA-FET's layout holds label.csv (columns "
            f"{', '.join(REQUIRED)}, ...) and Raw/<video_id>/<clip_id>.mp4"
        )
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClipError(
            f"{table} is not UTF-8 ({error.reason} at byte {error.start}): save it "
            "again with that encoding"
        ) from None
    except OSError as error:
        raise ClipError(f"{table} cannot be read: {error.strerror}") from error
    lines = io.StringIO(text, newline="").readlines()
    found: list[tuple[int, list[str], str]] = []
    reader = csv.reader(lines, strict=True)
    limit = csv.field_size_limit(len(text) + 1)  # a long transcript is one all the same
    try:
        begin = 0
        for fields in reader:
            if fields:
                body = "".join(lines[begin : reader.line_num])
                found.append((begin + 1, fields, body))
            begin = reader.line_num
    except csv.Error as error:
        raise ClipError(
            f"{table}, line {begin + 1}: a quote that opens there is never closed, or "
            f"text follows the closing one ({error}). Put the whole text in quotes, "
            'and write a quote that belongs to it twice ("")'
        ) from None
    finally:
        csv.field_size_limit(limit)
    columns = found[0][1] if found else []
    return columns, found[1:]


def _swallowed(
    folder: Path, columns: list[str], row: dict[str, str], text: str
) -> int | None:
    """Of a row over several lines, which is a row of its own: a quote was not closed.

    Such a line names another clip that is there, or it and the row's first line both
    have all fields with what is right in a label and a mode.
    """
    lines = re.split(r"\r\n|\r|\n", text.rstrip("\r\n"))
    if len(lines) == 1:
        return None
    alone = [_alone(columns, line) for line in lines]
    labelled = {"label", "mode"} <= set(columns)
    for k, other in enumerate(alone):
        if other is None:
            continue
        stranger = _clip_of(other) != _clip_of(row) and _fault_of_name(other) is None
        if stranger and os.path.isfile(_file(folder, other)):
            return max(k, 1)
        if k and labelled and alone[0] and _fits(alone[0], other):
            return k
    return None


def _clip_of(row: dict[str, str]) -> tuple[str | None, str | None]:
    return row.get("video_id"), row.get("clip_id")


def _alone(columns: list[str], line: str) -> dict[str, str] | None:
    """A line as a row, its quotes taken for text; what is too much goes to the text."""
    fields = line.split(",")
    extra = len(fields) - len(columns)
    if extra < 0:
        return None
    at = columns.index("text")
    fields[at : at + extra + 1] = [",".join(fields[at : at + extra + 1])]
    return dict(zip(columns, fields, strict=True))


def _fits(*rows: dict[str, str]) -> bool:
    return all(r["mode"].strip('" ') in MODES and _number(r["label"]) for r in rows)


def _number(text: str) -> bool:
    try:
        return -3 <= float(text.strip('" ')) <= 3
    except ValueError:
        return False


def _file(folder: Path, row: dict[str, str]) -> Path:
    return folder / "Raw" / row["video_id"] / f"{row['clip_id']}.mp4"


def _fault_of_fields(columns: list[str], fields: list[str]) -> str | None:
    if len(fields) != len(columns):
        return (
            f"has {len(fields)} fields, the header {len(columns)}: put a text that "
            "holds commas in quotes"
        )
    return None


def _fault_of_name(row: dict[str, str]) -> str | None:
    """What is wrong with a name that would lead out of its folder, or is none."""
    for column in ("video_id", "clip_id"):
        name = row[column]
        if not name or name in (".", "..") or set(name) & set("/\\\0"):
            return f"has the {column} {name!r}, expected a plain name and no path"
    return None


def _clip(folder: Path, key: str, row: dict, labelled: bool) -> Clip | str:
    """The clip of one row, or what is wrong with the row."""
    values = {}
    for column in ("label", *UNIMODAL) if labelled else ():
        text = (row.get(column) or "").strip()
        if not text and column != "label":
            continue  # MOSI and MOSEI have no unimodal labels
        try:
            values[column] = float(text)
        except ValueError:
            return f"{column} is {text!r}, expected a number in [-3, 3]"
        if not -3 <= values[column] <= 3:  # NaN fails too
            return f"{column} is {text}, expected a number in [-3, 3]"
    if labelled and row["mode"] not in MODES:
        return f"mode is {row['mode']!r}, expected {', '.join(MODES)}"
    path = _file(folder, row)
    if not os.path.isfile(path):
        kind = "regular file" if os.path.exists(path) else "file"
        return f"there is no {kind} {path}"
    return Clip(
        id=key,
        path=path,
        text=row["text"],
        sentiment=values.pop("label", math.nan),
        split=row["mode"] if labelled else "",
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
    with apart.kept():
        for clip in clips:
            try:
                apart.decode(clip.path, frames=1, longest=longest)
            except ClipError as error:
                problems[clip.id] = str(error)
            else:
                good.append(clip)
    return good, problems
