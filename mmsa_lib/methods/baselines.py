"""Predictors every model must beat: constants, and ridge on time-pooled features.

Built in the chapter "A backbone and its baselines". All of them go through
`training.select`, so that even their one setting is chosen by validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmsa_lib.corpora.schema import Corpus, Split

Predictor = Callable[[Split], np.ndarray]  # split -> (n, k)
ALPHAS = tuple(10.0 ** (k / 2) for k in range(-2, 10))


def pooled(split: Split, modalities: Sequence[str] | None = None) -> np.ndarray:
    """Mean over real steps of each modality, side by side: (n, sum of widths).

    A modality that a sample lacks gives NaN in its columns, for an imputer to fill.
    """
    columns = []
    for m in modalities or split.modalities:
        ragged = split.only([m]).features[m]
        rows = np.full((len(split), ragged.width), np.nan, dtype=np.float32)
        for i in np.flatnonzero(ragged.lengths):
            rows[i] = ragged[i].mean(0)
        columns.append(rows)
    return np.concatenate(columns, axis=1)


def constant(value: float) -> Predictor:
    """Predict the same sentiment for everyone."""
    return lambda split: np.full((len(split), 1), value, dtype=np.float32)


def constants(corpus: Corpus, label: str = "sentiment") -> dict[str, Predictor]:
    """The training mean and median: the floor of every regression table."""
    truth = corpus.train.labels[label]
    return {
        "training mean": constant(float(truth.mean())),
        "training median": constant(float(np.median(truth))),
    }


def ridges(
    corpus: Corpus,
    modalities: Sequence[str] | None = None,
    *,
    alphas: Iterable[float] = ALPHAS,
    label: str = "sentiment",
) -> dict[str, Predictor]:
    """Ridge on standardised pooled features, one candidate an alpha, fitted on train.

    Missing modalities are filled with the training mean. Give the result to
    `training.select`, which picks alpha by validation MAE.
    """
    x, y = pooled(corpus.train, modalities), corpus.train.labels[label]

    def fitted(alpha: float) -> Predictor:
        steps = (SimpleImputer(keep_empty_features=True), StandardScaler())
        model = make_pipeline(*steps, Ridge(alpha=alpha)).fit(x, y)
        return lambda split: model.predict(pooled(split, modalities)).reshape(-1, 1)

    return {f"alpha={alpha:g}": fitted(alpha) for alpha in alphas}
