"""A tiny corpus and model, so that tests of the machinery do not wait."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mmsa_lib.corpora.schema import Card, Corpus, Ragged, Split, make_corpus
from mmsa_lib.training import TrainConfig, fit


def toy_corpus(n=(48, 16, 16), seed=0, widths=None) -> Corpus:
    """Sentiment is the mean of the first text channel plus half an audio channel."""
    widths = widths or {"text": 6, "audio": 4}
    rng = np.random.default_rng(seed)
    splits = {}
    for name, size in zip(("train", "valid", "test"), n, strict=True):
        features, signal = {}, np.zeros(size)
        for k, (m, width) in enumerate(widths.items()):
            lengths = rng.integers(1, 7, size)
            sequences = [rng.normal(size=(t, width)) for t in lengths]
            signal += np.array([s[:, 0].mean() for s in sequences]) / (k + 1)
            features[m] = Ragged.from_list(sequences)
        labels = {"sentiment": np.clip(signal, -3, 3)}
        ids = [f"{name}-{i}" for i in range(size)]
        text = [f"utterance {i}" for i in ids]
        splits[name] = Split(name, ids, features, labels, raw_text=text)
    card = Card("toy", "a toy", "tests", "none", synthetic=True)
    return make_corpus(card, splits)


TOY = toy_corpus()


@dataclass
class ToyOutput:
    predictions: dict


class ToyModel(nn.Module):
    """Masked mean of each modality, one hidden layer with dropout."""

    def __init__(self, dims, dropout=0.1):
        super().__init__()
        self.inputs = nn.ModuleDict({m: nn.Linear(d, 8) for m, d in dims.items()})
        self.drop = nn.Dropout(dropout)
        self.regressor = nn.Linear(8 * len(dims), 1)

    def forward(self, batch):
        parts = []
        for m, layer in self.inputs.items():
            keep = batch.mask[m][..., None].to(batch.features[m].dtype)
            total = (layer(batch.features[m]) * keep).sum(1)
            parts.append(total / keep.sum(1).clamp_min(1))
        z = self.drop(torch.relu(torch.cat(parts, -1)))
        return ToyOutput({"sentiment": self.regressor(z)})


def train_toy(seed):
    """A `ToyModel` after two epochs on `TOY`, frozen."""
    config = TrainConfig(epochs=2, batch_size=16, device="cpu", seed=seed)
    return fit(lambda: ToyModel(TOY.dims), TOY, config)
