"""The generative twin of the readout: the same model, taught to write the score.

After arXiv 2606.05713 (specification: the chapter "Generative against discriminative").
The backbone and its LoRA are those of `methods.readout`; what differs is that the score
is written as text and read back by a parser. Trained by `training.fit` with
`token_loss`.

In the order of the chapter: writing a label, reading an answer, the twin and its loss.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from dataclasses import replace as altered

import numpy as np
import torch
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch, Split
from mmsa_lib.errors import ConfigError, unknown
from mmsa_lib.methods.readout import (
    HIGHEST,
    LOWEST,
    ReadoutConfig,
    Scaler,
    attach_lora,
)
from mmsa_lib.nets.omni import Thinker, answer_loss


def spell(score: float) -> str:
    """The one format of a label as text: sign, digit, point, digit, such as +1.6.

    Clips to [-3, 3]. Raises `ConfigError` for NaN.
    """
    if math.isnan(score):
        raise ConfigError("a label is NaN: there is nothing to write")
    return f"{max(LOWEST, min(HIGHEST, float(score))):+.1f}".replace("-0.0", "+0.0")


_DASHES = r"+\-\u2212\u2010-\u2015\u00b1"
# a number that is not a piece of a longer word or number: 1.1.1 is none. What could be
# its sign is taken along, even where it stands apart or is a word.
_NUMBER = re.compile(
    rf"(?<![\w.,{_DASHES}])((?:[{_DASHES}]|\bminus\b|\bnegative\b)\s*)?"
    r"(\d+(?:[.,]\d+)?|[.,]\d+)(?!\w|[.,]\d)",
    re.IGNORECASE,
)


def parse_score(text: str) -> float | None:
    """The first number in an answer, or None. Never clips and never guesses.

    A comma or a point may separate the decimals; words for numbers do not count. A
    number whose sign is in doubt ("- 1.2", "minus 1.2") makes the answer unparsable.
    """
    found = _NUMBER.search(text)
    if found is None or found[1] not in (None, "+", "-", "\u2212"):
        return None
    number = float(found[2].replace(",", "."))
    return -number if found[1] in ("-", "\u2212") else number


@dataclass(frozen=True)
class Answers:
    """What a model wrote, and what could be read from it.

    ids, texts  one a sample; `values` (n,) has NaN where nothing could be read
    """

    ids: list[str]
    texts: list[str]
    values: np.ndarray

    @property
    def unparsable(self) -> float:
        """Share of answers without a number."""
        return float(np.isnan(self.values).mean())

    @property
    def out_of_range(self) -> float:
        """Share of answers whose number lies outside [-3, 3]."""
        with np.errstate(invalid="ignore"):
            return float((np.abs(self.values) > HIGHEST).mean())

    def scores(self, otherwise: float) -> np.ndarray:
        """Scores (n, 1): numbers clipped to the range, `otherwise` where none is."""
        values = np.where(np.isnan(self.values), otherwise, self.values)
        return values.clip(LOWEST, HIGHEST)[:, None]


@dataclass
class Spoken:
    """Token cross-entropy (B,) of the written labels; no predictions in training."""

    tokens: Tensor
    predictions: dict[str, Tensor] = field(default_factory=dict)


class Generative(nn.Module):
    """The twin: the same adapted Thinker, taught to write the label.

    Calling it on a labelled batch gives the cross-entropy of the written labels;
    `answer` lets it write.
    """

    def __init__(self, body: Thinker, config: ReadoutConfig | None = None, labels=None):
        super().__init__()
        self.config = config or ReadoutConfig()
        self.body = body
        self.scaler = Scaler(labels)

    def forward(self, batch: Batch) -> Spoken:
        labels = batch.labels["sentiment"].flatten().tolist()  # (B, 1) -> B numbers
        told = [spell(y) for y in labels]
        return Spoken(answer_loss(self.body, batch, told))  # (B,)

    @torch.inference_mode()
    def answer(self, split: Split, batch_size: int = 8) -> Answers:
        """Let the model write a score for every sample of a split."""
        self.eval()
        texts: list[str] = []
        for batch in split.batches(batch_size):
            texts += self.body.say(batch.to(self.body.device))
        values = [parse_score(t) for t in texts]
        found = np.array([math.nan if v is None else v for v in values])
        return Answers(list(split.ids), texts, found)

    def predict(self, split: Split, label: str = "sentiment") -> np.ndarray:
        """Scores (n, 1); what cannot be read counts as the mean training label."""
        if label != "sentiment":
            raise unknown("label", label, ("sentiment",))
        return self.answer(split).scores(float(self.scaler.mean))


def token_loss(output: Spoken, batch: Batch) -> Tensor:
    """The loss of the twin for `training.fit`: mean cross-entropy of written labels."""
    return output.tokens.mean()


def generative(
    thinker: Thinker, config: ReadoutConfig | None = None, labels=None
) -> Generative:
    """The same LoRA on a loaded Thinker, to be trained on written labels."""
    config = config or ReadoutConfig()
    thinker.model = attach_lora(thinker.model, config)
    return Generative(thinker, config, labels)


def writing(frozen):
    """The frozen twin that `training.fit` chose, predicting by what it writes."""
    module = frozen.module
    return altered(frozen, predict=lambda split, label: module.predict(split, label))
