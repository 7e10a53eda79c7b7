"""The seal on the test split: `select` freezes a predictor, `evaluate` opens it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from mmsa_lib import metrics
from mmsa_lib.corpora.schema import Corpus, Receipt, Split
from mmsa_lib.errors import SealedError, TrainingError, unknown
from mmsa_lib.nets.trained import save, weights_sha256
from mmsa_lib.tasks import SENTIMENT, Task


@dataclass
class Predictions:
    """Aligned truth and prediction of one split: what metrics are computed from."""

    ids: list[str]
    truth: np.ndarray  # (n,) or (n, k)
    prediction: np.ndarray  # same shape as truth (class labels: (n, classes))
    split: str
    corpus: str


@dataclass
class Frozen:
    """A predictor that validation has chosen; the only key to a test split.

    predict      split -> (n, k) array
    receipt      which corpus, which artefact, by which value it was chosen
    selection    the rule in words
    history      one dict an epoch: epoch, train, valid, seconds
    """

    predict: Callable[[Split, str], np.ndarray]
    receipt: Receipt
    selection: str
    trainable: int = 0
    total: int = 0
    history: list[dict] = field(default_factory=list)
    best_epoch: int | None = None
    module: nn.Module | None = None
    chosen: str | None = None

    def facts(self) -> dict:
        """What a run record keeps of the selection."""
        facts = {}
        if self.receipt.value is not None:
            facts["validation"] = round(self.receipt.value, 6)
        if self.chosen is not None:
            facts["chosen"] = self.chosen
        if self.history:
            facts["best_epoch"] = self.best_epoch
            facts["epochs"] = len(self.history)
            for key in ("train", "valid"):
                if key in self.history[0]:
                    facts[f"{key}_curve"] = [round(row[key], 5) for row in self.history]
        return facts

    def save(self, path: Path) -> Path:
        """Write the trained part as safetensors; `nets.trained.load` puts it back."""
        if self.module is None:
            raise TrainingError("only a trained module has weights to save")
        return save(self.module, path)


def check_samples(corpus: Corpus, names: Sequence[str]) -> None:
    """Raise `TrainingError` naming a split without samples."""
    for name in names:
        if not len(corpus[name]):
            raise TrainingError(f"the {name} split of {corpus.name} has no samples")


def select(
    candidates: Mapping[str, Callable[[Split], np.ndarray]],
    corpus: Corpus,
    task: Task = SENTIMENT,
) -> Frozen:
    """Choose among fitted predictors by the task's metric on validation; freeze it.

    candidates: name -> function of a split giving (n, o) outputs. Ties go to the first;
    a metric that is undefined is worse than any. A single candidate is allowed: nothing
    is chosen, and the receipt says so. Raises `TrainingError` naming a candidate whose
    outputs are not finite or of another shape.
    """
    if not candidates:
        raise TrainingError("there is no candidate to select from")
    check_samples(corpus, ("valid",))
    truth = corpus.valid.labels[task.label]
    scores, found = {}, {}
    for name, predictor in candidates.items():
        found[name] = _checked(predictor(corpus.valid), task, truth, name)
        scores[name] = task.score(truth, found[name])
    sign = 1 if task.higher_is_better else -1

    def merit(name: str) -> float:
        return -math.inf if math.isnan(scores[name]) else sign * scores[name]

    best = max(scores, key=merit)
    metric = f"validation {metrics.describe(task.metric).name}"
    predictor = candidates[best]
    receipt = Receipt(
        corpus=corpus.fingerprint,
        artefact=hashlib.sha256(found[best].tobytes()).hexdigest(),
        metric=metric,
        value=scores[best],
        candidates=len(candidates),
    )
    end = "highest" if task.higher_is_better else "lowest"
    return Frozen(
        predict=lambda split, _label: np.asarray(predictor(split)),
        receipt=receipt,
        selection=f"{end} {metric} of {len(candidates)} candidates",
        chosen=best,
    )


def _checked(outputs, task: Task, truth: np.ndarray, name: str) -> np.ndarray:
    """Outputs of a candidate as float64, of the task's shape and finite."""
    outputs = np.asarray(outputs, dtype=np.float64)
    expected = truth.shape if truth.ndim > 1 else (len(truth), task.outputs)
    if outputs.shape != expected:
        raise TrainingError(
            f"{name!r} predicts shape {outputs.shape}, the labels are {truth.shape}; "
            f"expected {expected}"
        )
    _check_finite(outputs, repr(name), "validation")
    return outputs


def _check_finite(outputs: np.ndarray, who: str, split: str) -> None:
    bad = int((~np.isfinite(outputs)).sum())
    if bad:
        raise TrainingError(
            f"{who} gives {bad} of {outputs.size} {split} predictions that are NaN or "
            "infinite. Mend it, or leave it out of what is compared."
        )


def evaluate(
    frozen: Frozen, corpus: Corpus, split: str = "test", *, task: Task = SENTIMENT
) -> Predictions:
    """Predict one split with a frozen predictor; the way to test metrics.

    Raises `SealedError` when `frozen` is not a `Frozen`, or when the weights of its
    module changed after validation froze them, and `TrainingError` when it predicts
    NaN or infinity, or for other samples than the split has.
    """
    if not isinstance(frozen, Frozen):
        raise SealedError(
            f"evaluate needs a Frozen from training.fit or training.select, found "
            f"{type(frozen).__name__}: select by validation before you test"
        )
    if (
        frozen.module is not None
        and weights_sha256(frozen.module) != frozen.receipt.artefact
    ):
        raise SealedError(
            "the weights changed after validation had frozen them; train again with "
            "training.fit, or select among the variants with training.select"
        )
    part = corpus[split]
    prediction = np.asarray(frozen.predict(part, task.label))
    who = "the trained model" if frozen.chosen is None else repr(frozen.chosen)
    if prediction.shape[:1] != (len(part),):
        raise TrainingError(
            f"{who} predicts shape {prediction.shape} for {len(part)} samples of "
            f"{split!r}"
        )
    _check_finite(prediction, who, split)
    part = part.unseal(frozen.receipt) if part.sealed else part
    if task.label not in part.labels:
        raise unknown("label", task.label, part.labels)
    truth = part.labels[task.label]
    if truth.ndim == 2 and truth.shape[1] == 1:
        truth, prediction = truth[:, 0], prediction[:, 0]
    return Predictions(list(part.ids), truth, prediction, split, corpus.fingerprint)
