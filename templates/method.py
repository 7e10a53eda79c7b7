"""Gated sum: one vector per modality, weighed by gates that the sample decides.

A template for a method of your own (the page "Add a method"): copy this file to
``mmsa_lib/methods/<name>.py`` and replace what it computes. With x_m (B, T_m, d_m):

    h_m = mean_t GELU(W_m x_m)            (B, D)     over real steps
    g   = softmax_m(w^T h_m)              (B, M)     over modalities that are there
    z   = sum_m g_m h_m                   (B, D)

Source: say here which paper, which equations, and what is a decision of yours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsa_lib import tasks
from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import ConfigError, unknown
from mmsa_lib.nets import Head, Output
from mmsa_lib.nets.fusion import masked_mean, real_steps
from mmsa_lib.tasks import Task

MODES = ("paper",)  # add "official" where code was released


@dataclass(frozen=True)
class GatedConfig:
    """The paper's settings as defaults.

    width     D, of the vectors that are summed
    dropout   in the head
    mode      "paper"; there is no released code
    """

    width: int = 16
    dropout: float = 0.1
    mode: str = "paper"

    def __post_init__(self):
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        if self.width < 1:
            raise ConfigError(f"width must be at least 1: {self.width}")


class Gated(nn.Module):
    """The gated sum of any number of modalities.

    dims      modality -> width d_m, as ``corpus.dims``
    outputs   label -> number of outputs
    """

    def __init__(
        self, dims: Mapping[str, int], outputs: dict[str, int], config: GatedConfig
    ):
        super().__init__()
        self.dims, D = dict(dims), config.width
        self.maps = nn.ModuleDict({m: nn.Linear(d, D) for m, d in dims.items()})
        self.gate = nn.Linear(D, 1)
        self.head = Head(D, outputs, config.dropout)

    def forward(self, batch: Batch) -> Output:
        """Raises `UnknownNameError` or `CorpusError` where the batch does not fit."""
        masks = real_steps(batch, self.dims)  # (B, T_m), False where missing
        h = torch.stack(
            [self.read(m, batch, masks[m]) for m in self.dims], 1
        )  # (B,M,D)
        there = torch.stack([masks[m].any(1) for m in self.dims], 1)  # (B, M)
        score = self.gate(h)[..., 0].masked_fill(~there, -torch.inf)  # (B, M)
        gates = score.softmax(1)
        z = (gates[..., None] * h).sum(1)  # (B, D)
        predictions, last = self.head(z)
        return Output(predictions, z, last, extras={"gates": gates})

    def read(self, m: str, batch: Batch, mask: Tensor) -> Tensor:
        """h_m (B, D) of x_m (B, T_m, d_m); whatever stands in padding is not read."""
        x = batch.features[m].to(self.gate.weight.dtype)
        x = x.masked_fill(~mask[..., None], 0.0)
        return masked_mean(F.gelu(self.maps[m](x)), mask)  # (B, T_m, D) -> (B, D)


def build(
    dims: Mapping[str, int],
    of: Task | Sequence[Task] = tasks.SENTIMENT,
    config: GatedConfig | None = None,
) -> Gated:
    """The method as the registry calls it: a model for these widths and tasks."""
    return Gated(dims, tasks.outputs(tasks.several(of)), config or GatedConfig())
