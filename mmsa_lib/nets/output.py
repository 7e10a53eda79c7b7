"""What every model returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Output:
    """predictions[label] (B, k); `pooled` (B, d_z) before the head; `last` (B, D') the
    input of the final linear layer; `hidden[m]` (B, T_m, D) encoder outputs, zero where
    `mask[m]` (B, T_m) is False. `hidden` is filled where a model computes it anyway
    (middle fusion) or was called with ``hidden=True``. `extras` holds what a method
    shows beside that, such as gates (B, E) or tokens.
    """

    predictions: dict[str, Tensor]
    pooled: Tensor
    last: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)
    mask: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
