"""Score video files with a trained readout: ``predict([clip, ...])``.

The same is offered in a shell by ``mmsa-book predict``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmsa_lib.corpora.apart import kept
from mmsa_lib.corpora.clips import Clip, read_folder
from mmsa_lib.corpora.media import clip_corpus, why_not
from mmsa_lib.errors import ClipError, ConfigError
from mmsa_lib.methods import saving
from mmsa_lib.methods.generative import Generative
from mmsa_lib.methods.readout import HIGHEST, LOWEST
from mmsa_lib.nets import omni


@dataclass(frozen=True)
class Prediction:
    """One clip's score, or why it has none."""

    path: str
    score: float | None
    refused: str | None = None  # the reason, when `score` is None


def predict(
    paths: Sequence[str | Path],
    model: str | Path | None = None,
    *,
    texts: Sequence[str] | None = None,
    backbone: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 4,
) -> list[Prediction]:
    """Score video files with a saved readout; unreadable ones are refused by reason.

    Scores lie in [-3, 3]. A clip that cannot be scored, for whatever reason, costs no
    other its score.

    paths     files, or folders in MMSA-FET's layout: these stand for all their clips,
              with the transcripts of their label.csv, which needs no labels and modes
    model     folder that `saving.save` wrote; default: the tiny readout of the
              package, which has learned from the puppets' clips and knows nothing but
              puppets
    texts     a transcript for each file; without them the model sees and hears only
    backbone  see `saving.load`

    Raises `ConfigError` when the model cannot be loaded, or when there are not as many
    texts as files.
    """
    clips, refused = _clips([Path(p) for p in paths], texts)
    if model is None:
        model = omni.tiny_folder() / "readout"
        if not model.is_dir():
            raise ConfigError(
                "this installation lacks the tiny readout, the default model "
                f"({model}). Name a model: the folder that mmsa-book train or "
                "methods.saving.save wrote."
            )
    reader, media = saving.load(model, backbone=backbone, device=device)
    scores: dict[str, float] = {}
    most = 8 * batch_size  # clips in memory at a time

    def score(some: list[Clip]) -> dict[str, float]:
        return _scores(reader, some, media, batch_size, refused)

    with kept():
        for start in range(0, len(clips), most):
            some = [c for c in clips[start : start + most] if c.id not in refused]
            scores |= _apart(some, score, refused)
    return [Prediction(str(c.path), scores.get(c.id), refused.get(c.id)) for c in clips]


def _clips(paths: list[Path], texts: Sequence[str] | None):
    """The clips of files and folders, ids 0, 1, ...; and those refused already."""
    files = [p for p in paths if not p.is_dir()]
    if texts is not None and len(texts) != len(files):
        raise ConfigError(
            f"{len(files)} files but {len(texts)} transcripts: give one for each file, "
            "an empty one where nothing is known, or none at all"
        )
    words = iter(texts or [""] * len(files))
    found: list[tuple[Path, str, str | None]] = []
    for path in paths:
        if not path.is_dir():
            found.append((path, next(words), None))
            continue
        faults: dict[str, str] = {}
        try:
            clips = read_folder(path, faults, labelled=False)
            found += [(c.path, c.text, None) for c in clips]
        except ClipError as error:
            faults = {"": str(error)}
        found += [(path / row, "", why) for row, why in faults.items()]
    clips = [
        Clip(str(k), path, text, 0.0, "valid", video_id="", clip_id=str(k))
        for k, (path, text, _) in enumerate(found)
    ]
    return clips, {str(k): why for k, (*_, why) in enumerate(found) if why}


def _apart(
    clips: list[Clip],
    score: Callable[[list[Clip]], dict[str, float]],
    refused: dict[str, str],
) -> dict[str, float]:
    """Scores of clips by id; where several fail together, each is tried alone."""
    try:
        return score(clips)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # libraries in Rust raise more than Exception
        if len(clips) == 1:
            refused[clips[0].id] = why_not(clips[0].path, error)
            return {}
    scores: dict[str, float] = {}
    for clip in clips:
        if clip.id not in refused:
            scores |= _apart([clip], score, refused)
    return scores


def _scores(reader, clips: list[Clip], media, batch_size: int, refused: dict):
    """Scores of the readable clips by id; the others enter `refused` with a reason."""
    problems: dict[str, str] = {}
    try:
        split = clip_corpus(clips, media, problems=problems)["valid"]
    except ClipError:
        if len(problems) < len(clips):
            raise
        return {}
    finally:
        refused |= problems
    scores: dict[str, float] = {}
    for clip_id, value, text in _answers(reader, split, batch_size):
        if math.isfinite(value):
            scores[clip_id] = max(LOWEST, min(HIGHEST, value))
        elif text is None:
            refused[clip_id] = f"the model's score is {value}: no number"
        else:
            refused[clip_id] = f"the model wrote {text!r}, which holds no score"
    return scores


def _answers(reader, split, batch_size: int):
    """Id, score and written answer (None from a readout) of each clip."""
    if isinstance(reader, Generative):
        answers = reader.answer(split, batch_size)
        yield from zip(answers.ids, answers.values.tolist(), answers.texts, strict=True)
        return
    with torch.inference_mode():
        for batch in split.batches(batch_size):
            y = reader(batch.to(reader.body.device)).predictions["sentiment"]
            for clip_id, value in zip(batch.ids, y.flatten().tolist(), strict=True):
                yield clip_id, value, None
