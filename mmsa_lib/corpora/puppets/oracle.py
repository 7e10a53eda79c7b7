"""Oracles: the best that anybody could predict, and what annotators' noise costs.

All contributions to the true sentiment lie on a lattice, so every conditional law of
the label is a finite sum: nothing here is estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmsa_lib.corpora.puppets.grammar import literal_law
from mmsa_lib.corpora.puppets.latents import Scripts, ratings_of
from mmsa_lib.corpora.puppets.world import (
    ANNOTATORS,
    BELL,
    DELIVERY,
    MODALITIES,
    STANCE,
    PuppetConfig,
    cues_of,
    stance_pairs,
)
from mmsa_lib.corpora.schema import Corpus, Split
from mmsa_lib.errors import CorpusError, unknown

LABEL_VALUES = (np.arange(31) - 15) / 5


@lru_cache(maxsize=1)
def label_law() -> np.ndarray:
    """P(label | s16), (97, 31): rows s16 = -48..48, columns labels -3, -2.8, ..., 3."""
    s16 = np.arange(-48, 49)
    bell = np.arange(-30, 31)
    written = ratings_of(s16[:, None], bell[None, :]) + 3
    law = np.zeros((97, 31))
    for row in range(97):
        one = np.bincount(written[row], BELL, minlength=7)
        total = one
        for _ in range(ANNOTATORS - 1):
            total = np.convolve(total, one)
        law[row] = total
    return law


def oracle_predictions(
    world: Corpus | PuppetConfig,
    split: str,
    modalities: Sequence[str] | None = None,
    *,
    loss: str = "mse",
) -> np.ndarray:
    """Best predictions of the sentiment label from some modalities' latents, (n, 1).

    As if the latents that `modalities` (default: all) show were read perfectly: the
    exact conditional mean of the label over the latents they do not show
    (``loss="mse"``), or its conditional median, which is what no predictor can beat in
    MAE (``loss="mae"``). An empty tuple gives the best constant. A modality with
    informativeness 0, or missing from a sample, shows nothing.

    The oracle generates the world again from its configuration: it is no learner, so
    it needs no receipt, and it hands out predictions only.
    """
    law = oracle_law(world, split, modalities)
    if loss == "mse":
        return (law * LABEL_VALUES).sum(1, keepdims=True)
    if loss != "mae":
        raise unknown("loss", loss, ("mse", "mae"))
    return _median(law)[:, None]


def oracle_law(
    world: Corpus | PuppetConfig, split: str, modalities: Sequence[str] | None = None
) -> np.ndarray:
    """P(label | what `modalities` show) over LABEL_VALUES, (n, 31)."""
    config = _config_of(world)
    table = Scripts(config, split)
    asked = config.modalities if modalities is None else tuple(modalities)
    for m in asked:
        if m not in config.modalities:
            raise unknown("modality", m, config.modalities)
    asked = [m for m in asked if config.informativeness.get(m, 1.0) > 0]
    shown = np.zeros((len(table), len(MODALITIES)), dtype=bool)
    for m in asked:
        shown[:, MODALITIES.index(m)] = True
    for m, gone in table.missing().items():
        shown[gone, MODALITIES.index(m)] = False
    out = np.zeros((len(table), len(LABEL_VALUES)))
    for pattern in np.unique(shown, axis=0):
        rows = np.flatnonzero((shown == pattern).all(1))
        out[rows] = _law_of_pattern(config, table, rows, pattern)
    return out


def noise_floor(world: Corpus | PuppetConfig, split: str, *, loss: str = "mae"):
    """Expected loss of the label around its best prediction from the true sentiment.

    What the annotators' disagreement alone costs: mean absolute error around the
    median (``loss="mae"``) or mean squared error around the mean (``"mse"``).
    """
    table = Scripts(_config_of(world), split)
    law = label_law()[table.columns["s16"] + 48]
    if loss == "mae":
        gap = np.abs(LABEL_VALUES - _median(law)[:, None])
    elif loss == "mse":
        gap = (LABEL_VALUES - (law * LABEL_VALUES).sum(1, keepdims=True)) ** 2
    else:
        raise unknown("loss", loss, ("mse", "mae"))
    return float((law * gap).sum(1).mean())


@dataclass(frozen=True)
class Oracle:
    """`oracle_predictions` as a predictor: ``oracle(split)`` is (n, 1)."""

    config: PuppetConfig
    modalities: tuple[str, ...]
    loss: str = "mse"

    def __call__(self, split: Split) -> np.ndarray:
        table_ids = Scripts(self.config, split.name).ids
        row = {i: k for k, i in enumerate(table_ids)}
        best = oracle_predictions(
            self.config, split.name, self.modalities, loss=self.loss
        )
        try:
            return best[[row[i] for i in split.ids]]
        except KeyError as error:
            raise CorpusError(
                f"id {error.args[0]!r} is not in the {split.name!r} split of this "
                "puppet world: give the oracle the configuration of the same corpus"
            ) from None


def _config_of(world: Corpus | PuppetConfig) -> PuppetConfig:
    return (
        world if isinstance(world, PuppetConfig) else PuppetConfig.from_card(world.card)
    )


def _median(law: np.ndarray) -> np.ndarray:
    """Smallest value with at least half of the probability at or below it, (n,)."""
    return LABEL_VALUES[(law.cumsum(1) >= 0.5 - 1e-12).argmax(1)]


def _delivery_law(config: PuppetConfig) -> tuple[np.ndarray, np.ndarray]:
    """Values (sixteenths) and probabilities of what the voice, or the face, adds."""
    values = np.rint(DELIVERY * config.delivery * np.arange(-30, 31)).astype(np.int64)
    return values, BELL


def _law_of_pattern(config, table, rows, pattern) -> np.ndarray:
    """Label law of samples that all show the same modalities, (len(rows), 31)."""
    col = {k: v[rows] for k, v in table.columns.items()}
    known, hidden = _lattice_part(config, col, pattern)
    stance, unseen = _stance(config, col, pattern)
    p = _sincerity(config, col, pattern)
    labels = label_law()
    out = np.zeros((len(rows), len(LABEL_VALUES)))
    situations, where = np.unique(
        np.stack([known, stance], axis=1), axis=0, return_inverse=True
    )
    where = where.ravel()
    u = np.array(list(hidden))
    pu = np.array(list(hidden.values()))
    for k, c in enumerate((-1, 1)):
        laws = np.zeros((len(situations), len(LABEL_VALUES)))
        for g, pg in unseen.items():
            s16 = c * (situations[:, :1] + u) + situations[:, 1:] + g
            at = np.clip(s16, -48, 48) + 48
            for i in range(len(situations)):
                weight = np.bincount(at[i], pu, minlength=97)
                laws[i] += pg * (weight[:, None] * labels).sum(0)
        out += p[:, k : k + 1] * laws[where]
    return out


def _lattice_part(config, col, pattern) -> tuple[np.ndarray, dict[int, float]]:
    """What enters as c * (known + hidden): known (n,), and the law of hidden."""
    text, audio, vision = pattern[:3]
    echo = config.redundancy > 0  # then voice and face show the words' valence too
    w_shown = text or (echo and (audio or vision))
    known = np.zeros(len(col["s16"]), dtype=np.int64)
    hidden: dict[int, float] = {0: 1.0}
    delivery = _delivery_law(config)
    literal = (np.arange(-48, 49), literal_law(config))
    for seen, name, law in (
        (w_shown, "w16", literal),
        (audio, "voice16", delivery),
        (vision, "face16", delivery),
    ):
        if seen:
            known += col[name]
        else:
            hidden = _plus(hidden, law)
    return known, hidden


def _stance(config, col, pattern) -> tuple[np.ndarray, dict[int, float]]:
    """The stance of further modalities: what is known (n,), and the law of the rest."""
    stance = np.zeros(len(col["s16"]), dtype=np.int64)
    unseen: dict[int, float] = {0: 1.0}
    for j in stance_pairs(config):
        if pattern[3 + j] and pattern[4 + j]:
            stance += STANCE * col["factors"][:, j] * col["factors"][:, j + 1]
        else:
            coin = (np.array([-STANCE, STANCE]), np.array([0.5, 0.5]))
            unseen = _plus(unseen, coin)
    return stance, unseen


def _sincerity(config, col, pattern) -> np.ndarray:
    """P(c = -1), P(c = 1) given the cues that are shown, (n, 2)."""
    _, audio, vision = pattern[:3]
    n = len(col["s16"])
    p = np.zeros((n, 2))
    for k, c in enumerate((-1, 1)):
        prior = config.synergy if c < 0 else 1 - config.synergy
        for (lift, late), q in cues_of(config)[c].items():
            fits = np.ones(n, dtype=bool)
            if audio:
                fits &= col["lift"] == lift
            if vision:
                fits &= col["late_smile"] == late
            p[:, k] += prior * q * fits
    return p / p.sum(1, keepdims=True)


def _plus(law: dict[int, float], other) -> dict[int, float]:
    """Law of the sum of two independent lattice variables."""
    values, probabilities = other
    out: dict[int, float] = {}
    for x, p in law.items():
        for y, q in zip(values.tolist(), probabilities.tolist(), strict=True):
            if q:
                out[x + y] = out.get(x + y, 0.0) + p * q
    return out
