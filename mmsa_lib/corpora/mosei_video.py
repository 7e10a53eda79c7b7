"""922 CMU-MOSEI videos with one vector a video and modality, read from a given .npz.

Not a downloadable benchmark: whole-video means of public features with labels averaged
over segments. It is small, real, and its audio and vision carry signal.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np

from mmsa_lib.corpora.download import disk_remedy
from mmsa_lib.corpora.pickles import load_npz
from mmsa_lib.corpora.schema import (
    SPLITS,
    Card,
    Corpus,
    Ragged,
    Split,
    clean_nonfinite,
    make_corpus,
)
from mmsa_lib.errors import CorpusError
from mmsa_lib.files import replacing

NAME = "mosei-video"
FILE = "mosei_video_trimodal.npz"
MODALITIES = ("text", "audio", "vision")
TARGET = "label_mean_7class_sentiment"
TERMS = """\
CMU-MOSEI (Zadeh et al., 2018) is a corpus of opinion videos from YouTube, for research
only. No open licence covers the features of its public copies: do not publish them."""


def prepare(
    data_dir: str | Path, accept_terms: bool = False, *, path: str | Path | None = None
) -> Path:
    """Check the file and, when it is given by `path`, copy it to where `load` looks.

    Nothing is downloaded, so no terms are asked for. Raises `CorpusError`.
    """
    target = Path(data_dir) / FILE
    load(data_dir, path=path)
    if path is not None and Path(path).resolve() != target.resolve():
        try:
            with replacing(target) as part:
                shutil.copyfile(path, part)
        except OSError as error:
            raise CorpusError(
                f"could not write {target}: {disk_remedy(error, target)}"
            ) from error
    return target


def load(data_dir: str | Path, *, path: str | Path | None = None) -> Corpus:
    """Read the videos of the standard folds: 635 / 86 / 180; 21 belong to none.

    One step a modality: text 768, audio 40, vision 35; label `sentiment` (n, 1). Audio
    holds -inf (a logarithm of silence), set to 0 and counted on the card.
    """
    path = Path(path) if path is not None else Path(data_dir) / FILE
    arrays = _read(path)
    fold = arrays["std_fold"]
    _check_folds(path, fold)
    used = fold != "none"
    features, replaced = {}, {}
    for m in MODALITIES:
        values, _ = clean_nonfinite(arrays[m].astype(np.float32))
        replaced[m] = int((~np.isfinite(arrays[m][used])).sum())
        n = len(values)
        features[m] = Ragged(values, np.arange(n), np.ones(n, dtype=int))
    whole = Split(
        "all",
        [str(i) for i in arrays["video_id"]],
        features,
        {"sentiment": arrays[TARGET].astype(np.float32)},
    )
    card = Card(
        name=NAME,
        description=(
            "CMU-MOSEI, one vector a whole video: text BERT-base, audio mean COVAREP, "
            "vision mean OpenFace 2; target: mean sentiment over the video's segments"
        ),
        source=(
            "JugalGajjar/Multimodal-Sentiment-Analysis-with-MOSEI-Dataset at commit "
            "997fc161, with the official labels and standard folds"
        ),
        terms=TERMS,
        synthetic=False,
        options={"nonfinite_set_to_0": replaced, "unused": int((~used).sum())},
        notes=[
            "Whole videos, not segments: no published MOSEI table is comparable.",
            f"{int((~used).sum())} videos belong to no standard fold and were dropped.",
            "Values that were not finite were set to 0: "
            + ", ".join(f"{m} {count}" for m, count in replaced.items()),
        ],
    )
    splits = {name: whole.select(fold == name)._with(name=name) for name in SPLITS}
    return make_corpus(card, splits)


def _check_folds(path: Path, fold: np.ndarray) -> None:
    known = (*SPLITS, "none")
    found, counts = np.unique(fold, return_counts=True)
    pairs = zip(found.tolist(), counts, strict=True)
    other = [f"{name!r} ({count})" for name, count in pairs if name not in known]
    if other:
        raise CorpusError(
            f"'std_fold' in {path} has folds that are not known (and videos in each): "
            f"{', '.join(other)}. Known: {', '.join(known)}."
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise CorpusError(
            f"{NAME} is read from a file that is not there: {path}. It has no public "
            f"download; put {FILE} there, or run\n\n    mmsa-book data get {NAME} "
            f"-p path FILE\n\nor pass path=FILE. ({os.strerror(errno.ENOENT)})"
        )
    wanted = ("video_id", *MODALITIES, TARGET, "std_fold")
    arrays = load_npz(path, wanted, f"the file that {NAME} is read from")
    n = len(arrays["video_id"])
    for name, array in arrays.items():
        shape = (n, array.shape[1]) if name in MODALITIES and array.ndim == 2 else (n,)
        kind = "f" if name in (*MODALITIES, TARGET) else "U"
        if array.shape != shape or (name in MODALITIES and array.ndim != 2):
            raise CorpusError(
                f"{name!r} in {path} has shape {array.shape}, expected "
                f"({n}, {'D' if name in MODALITIES else ''}) for {n} video ids"
            )
        if array.dtype.kind != kind:
            raise CorpusError(
                f"{name!r} in {path} has dtype {array.dtype}, expected "
                f"{'floats' if kind == 'f' else 'strings'}"
            )
    return arrays
