"""What gradient modulation is compared with: OGM-GE and modality dropout.

Both are rules for `training.fit`. Used in the chapter "CGGM: when one modality
dominates".
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import ConfigError
from mmsa_lib.methods.cggm import CGGMConfig, GradientModulator
from mmsa_lib.training import Rule


class OGMGE(GradientModulator):
    """On-the-fly gradient modulation with generalisation enhancement, for M modalities.

    The original compares two modalities by their confidence in the true class. Here the
    confidence of a sample is exp(-loss) of its auxiliary classifier, which for classes
    is the probability of the true one and for regression exp(-|error|); r_m is the mean
    confidence of m over the mean of the others. A modality ahead (r_m > 1) is slowed
    down by 1 - tanh(alpha r_m), the others are left alone. Generalisation enhancement
    adds to each scaled weight matrix noise as large as its scaled gradient's spread.
    """

    def __init__(self, alpha: float = 0.3, enhance: bool = True, **options):
        config = options.pop("config", None) or CGGMConfig()
        super().__init__(replace(config, direction=False), **options)
        self.alpha, self.enhance = alpha, enhance

    def _decide(self, p: Tensor, truth: Tensor, weight: Tensor) -> None:
        confidence = (-self.task.loss(p, truth)).exp() * weight
        sums = (confidence.double().sum(1, keepdim=True), weight.double().sum(1, True))
        self._count(sums)
        mean = (self._sums[0] / self._sums[1].clamp(min=1e-12))[:, 0]
        others = (mean.sum() - mean) / (len(mean) - 1)
        ratio = mean / others.clamp(min=1e-12)
        self._b = torch.where(ratio > 1, 1 - torch.tanh(self.alpha * ratio), 1.0)
        self._scale = self._b

    def _modulate(self, parameters: list[nn.Parameter], c: Tensor) -> None:
        super()._modulate(parameters, c)
        if self.enhance:
            for p in parameters:
                if p.ndim > 1:
                    p.grad += torch.randn_like(p.grad) * p.grad.std()


class ModalityDropout(Rule):
    """In training, each sample loses each modality with probability `p`, never all.

    A sample that would lose every modality keeps all of them.
    """

    def __init__(self, p: float = 0.2):
        if not 0 <= p < 1:
            raise ConfigError(f"a probability of dropping is in [0, 1): {p}")
        self.p = p

    def batch(self, batch: Batch, epoch: int) -> Batch:
        there = torch.stack(list(batch.available.values()))  # (M, B)
        kept = there & (torch.rand(there.shape, device=there.device) >= self.p)
        kept = torch.where(kept.any(0), kept, there)
        available = dict(zip(batch.available, kept, strict=True))
        mask = {m: k & available[m][:, None] for m, k in batch.mask.items()}
        return replace(batch, available=available, mask=mask)
