"""What a model is trained to say and how that is judged: a task has a home here.

A `Task` holds the label's name and width, the loss and its derivative, what the numbers
of a model mean, the report under every convention, and the metric that decides. The
loop (`training`), the records (`runs`), gradient modulation (`methods.cggm`) and the
chapters all take it from here. Several at once are trained by `joint`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmsa_lib import metrics
from mmsa_lib.corpora.schema import EMOTIONS, Batch, Corpus
from mmsa_lib.errors import ConfigError, TrainingError, unknown

Loss = Callable[[object, Batch], Tensor]  # (Output, Batch) -> scalar


@dataclass(frozen=True)
class Task:
    """One label of a corpus. N samples (a picture has B H W of them), o outputs.

    label      name in ``batch.labels`` and ``output.predictions``
    outputs    o, how many numbers a model gives for it
    loss       predictions (..., N, o), truth -> a loss for each sample (..., N)
    slope      the same arguments -> derivative of that loss at the outputs (..., N, o)
    mean_loss  predictions and truth of a batch -> scalar: the mean of `loss`, fused
    answer     raw outputs (n, o) as arrays -> what `report` reads: values, the class's
               number, or probabilities
    report     truth, answers -> {metric: value}, every convention
    metric     the key of `report` that decides between models
    progress   the metric that CGGM follows over batches (`methods.cggm.METRICS`)
    stored     do run records keep an answer for each sample?
    """

    label: str
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    mean_loss: Callable[[Tensor, Tensor], Tensor]
    report: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    metric: str
    progress: str
    answer: Callable[[np.ndarray], np.ndarray] = np.asarray
    stored: bool = True

    @property
    def higher_is_better(self) -> bool:
        """The direction of `metric`."""
        return metrics.describe(self.metric).higher_is_better

    def objective(self, output, batch: Batch) -> Tensor:
        """The scalar that training minimises; nothing is broadcast.

        Raises `UnknownNameError` for a label that model or batch lack, and
        `TrainingError` for shapes that do not belong together.
        """
        return self.mean_loss(*self.pair(output, batch))

    def pair(self, output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions in float32 and their truth, shapes checked."""
        if self.label not in output.predictions:
            raise unknown("prediction", self.label, output.predictions)
        if self.label not in batch.labels:
            raise unknown("label", self.label, batch.labels)
        prediction = output.predictions[self.label].float()
        truth = batch.labels[self.label]
        if prediction.ndim == 4:  # a picture: logits (B, o, H, W), labels (B, H W)
            expected = (len(prediction), *prediction.shape[2:])
            if truth.numel() == math.prod(expected):
                truth = truth.long().view(expected)
        else:
            values = truth.is_floating_point()
            expected = prediction.shape if values else prediction.shape[:1]
        if tuple(truth.shape) != tuple(expected):
            raise TrainingError(
                f"prediction of {self.label!r} is {tuple(prediction.shape)} but its "
                f"label is {tuple(truth.shape)}; unequal shapes would broadcast to a "
                "wrong loss"
            )
        return prediction, truth

    def scores(self, truth: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        """`report` of raw outputs (n, o); a metric that is undefined is NaN."""
        truth, outputs = _columns(truth), _columns(outputs)
        with warnings.catch_warnings():
            # a constant predictor has no correlation: the report says so with NaN
            warnings.filterwarnings("ignore", "correlation is undefined")
            return self.report(truth, self.answer(outputs))

    def score(self, truth: np.ndarray, outputs: np.ndarray) -> float:
        """The deciding metric of raw outputs (n, o)."""
        return self.scores(truth, outputs)[self.metric]

    def better(self, a: float, b: float) -> bool:
        """Is score `a` better than score `b`? NaN is better than nothing."""
        return a > b if self.higher_is_better else a < b


def _columns(x: np.ndarray) -> np.ndarray:
    """(n, 1) as (n,), everything else as it is."""
    x = np.asarray(x)
    return x[:, 0] if x.ndim == 2 and x.shape[1] == 1 else x


# ---------------------------------------------------------------- losses by sample


def _l1(p: Tensor, y: Tensor) -> Tensor:
    return (p - y).abs().mean(-1)


def _l1_slope(p: Tensor, y: Tensor) -> Tensor:
    return (p - y).sign() / p.shape[-1]


def _l1_mean(p: Tensor, y: Tensor) -> Tensor:
    return (p - y).abs().mean()


def _cross_entropy(p: Tensor, y: Tensor) -> Tensor:
    y = y.expand(p.shape[:-1])[..., None]
    return p.logsumexp(-1) - p.gather(-1, y)[..., 0]


def _cross_entropy_slope(p: Tensor, y: Tensor) -> Tensor:
    return p.softmax(-1) - F.one_hot(y, p.shape[-1])


def _presence(p: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    weight = None if weight is None else weight.to(p)
    present = (y > 0).to(p).expand(p.shape)
    losses = F.binary_cross_entropy_with_logits(
        p, present, pos_weight=weight, reduction="none"
    )
    return losses.mean(-1)


def _presence_slope(p: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    present = (y > 0).to(p)
    weight = 1.0 if weight is None else weight.to(p)
    q = p.sigmoid()
    return (q * (1 - present) - weight * (1 - q) * present) / p.shape[-1]


# ---------------------------------------------------------------- the tasks


def sentiment(label: str = "sentiment", metric: str = "mae") -> Task:
    """A value in [-3, 3], (n, 1): mean absolute error, every convention reported."""
    if metric not in metrics.SENTIMENT:
        raise unknown("metric", metric, metrics.SENTIMENT)
    return Task(
        label, 1, _l1, _l1_slope, _l1_mean, metrics.sentiment_report, metric, "sign"
    )


def classes(label: str, number: int, metric: str = "acc") -> Task:
    """One class of `number`, labels (n,): cross-entropy, the likeliest class counts."""
    if number < 2:
        raise ConfigError(f"{label!r} needs at least 2 classes, found {number}")
    return Task(
        label,
        number,
        _cross_entropy,
        _cross_entropy_slope,
        F.cross_entropy,
        metrics.classification_report,
        metric,
        "accuracy",
        answer=_likeliest,
    )


def emotions(
    names: Sequence[str] = EMOTIONS,
    label: str = "emotions",
    weight: np.ndarray | None = None,
    metric: str = "wa_mean",
) -> Task:
    """Which emotions are present, intensities (n, k): a yes or no for each.

    weight   (k,) of the present ones in the loss, see `metrics.positive_weight`; from
             the training split only
    The report has balanced and plain accuracy and weighted F1 of each emotion.
    """
    names = tuple(names)
    w = None if weight is None else torch.as_tensor(np.asarray(weight)).float()
    loss = partial(_presence, weight=w)
    return Task(
        label,
        len(names),
        loss,
        partial(_presence_slope, weight=w),
        lambda p, y: loss(p, y).mean(),
        partial(metrics.emotion_report, names=names),
        metric,
        "sign",  # of the logit: present or not
        answer=_probability,
    )


def pixels(label: str = "lesion", number: int = 4, metric: str = "dice_mean") -> Task:
    """A class for each pixel: logits (B, number, H, W), labels (B, H W)."""
    return replace(
        classes(label, number, metric),
        report=_pixel_report,
        progress="dice",
        stored=False,
    )


def _likeliest(outputs: np.ndarray) -> np.ndarray:
    return np.asarray(outputs).argmax(1)


def _probability(outputs: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(outputs, dtype=np.float64)))


def _pixel_report(truth: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    truth = np.asarray(truth).astype(int)
    return metrics.segmentation_report(truth, answers.reshape(truth.shape))


SENTIMENT = sentiment()


# ---------------------------------------------------------------- of a corpus, several


def of_corpus(corpus: Corpus, label: str | None = None) -> Task:
    """The task that a corpus has labels for: sentiment if it is there, else classes.

    label   another one, by name. Raises `UnknownNameError` naming those there are.
    """
    labels = corpus.train.labels
    if label is None:
        label = "sentiment" if "sentiment" in labels else None
        label = label or next((k for k, v in labels.items() if v.ndim == 1), None)
        if label is None:
            raise unknown("task for labels", ", ".join(labels), ("sentiment", "class"))
    if label not in labels:
        raise unknown("label", label, labels)
    values = labels[label]
    if values.ndim == 1:
        return classes(label, int(values.max()) + 1)
    if values.shape[1] == 1:
        return sentiment(label)
    if values.shape[1] == len(EMOTIONS):
        return emotions(label=label)
    raise ConfigError(
        f"{label!r} has {values.shape[1]} columns; name the task yourself: "
        "tasks.emotions(names) or tasks.pixels(...)"
    )


def outputs(tasks: Iterable[Task]) -> dict[str, int]:
    """{label: width} for `nets.FusionConfig(outputs=...)`."""
    return {t.label: t.outputs for t in several(tasks)}


def several(tasks: Task | Iterable[Task]) -> tuple[Task, ...]:
    """One task or many as a tuple; `ConfigError` if two are about the same label."""
    found = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    names = [t.label for t in found]
    if not found or len(set(names)) < len(names):
        raise ConfigError(f"tasks need different labels, and one at least: {names}")
    return found


def joint(tasks: Iterable[Task], weights: Mapping[str, float] | None = None) -> Loss:
    """The weighted sum of the objectives of several tasks, a loss for `training.fit`.

    weights   label -> weight, 1 where it is not named
    """
    tasks = several(tasks)
    weights = dict(weights or {})
    for name, w in weights.items():
        if name not in outputs(tasks):
            raise unknown("task", name, outputs(tasks))
        if not (math.isfinite(w) and w >= 0):
            raise ConfigError(f"the weight of {name!r} must be at least 0: {w}")

    def loss(output, batch: Batch) -> Tensor:
        parts = [weights.get(t.label, 1.0) * t.objective(output, batch) for t in tasks]
        return torch.stack(parts).sum()

    return loss
