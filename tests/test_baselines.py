"""Constants and ridge: the floor of every table."""

import numpy as np
import pytest
from toy import toy_corpus

from mmsa_lib.errors import UnknownNameError
from mmsa_lib.methods.baselines import constants, pooled, ridges
from mmsa_lib.training import evaluate, select

CORPUS = toy_corpus((200, 50, 50))


def test_pooled_is_the_mean_of_real_steps_only():
    x = pooled(CORPUS.train, ["audio", "text"])
    assert x.shape == (200, 10)
    third = CORPUS.train.features["audio"][3]
    np.testing.assert_allclose(x[3, :4], third.mean(0), rtol=1e-6)


def test_a_missing_modality_is_nan_for_the_imputer_and_predictions_stay_finite():
    gone = np.zeros(50, dtype=bool)
    gone[:7] = True
    part = CORPUS.valid.without({"text": gone})
    x = pooled(part)
    assert np.isnan(x[:7, :6]).all()
    assert np.isfinite(x[7:]).all()
    for predictor in ridges(CORPUS).values():
        assert np.isfinite(predictor(part)).all()


def test_constants_are_those_of_the_training_split():
    truth = CORPUS.train.labels["sentiment"]
    found = constants(CORPUS)
    assert found["training mean"](CORPUS.valid)[0, 0] == pytest.approx(truth.mean())
    median = found["training median"](CORPUS.valid)
    assert median.shape == (50, 1)
    assert median[0, 0] == pytest.approx(np.median(truth))


def test_ridge_beats_the_mean_and_uses_every_modality_it_is_given():
    def mae(modalities):
        frozen = select(ridges(CORPUS, modalities), CORPUS)
        assert frozen.chosen.startswith("alpha=")
        p = evaluate(frozen, CORPUS)
        return np.abs(p.truth - p.prediction).mean()

    mean = evaluate(select(constants(CORPUS), CORPUS), CORPUS)
    floor = np.abs(mean.truth - mean.prediction).mean()
    assert mae(["text", "audio"]) < mae(["text"]) < floor
    with pytest.raises(UnknownNameError, match="vision"):
        ridges(CORPUS, ["vision"])
