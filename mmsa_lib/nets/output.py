"""What every model returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Output:
    """predictions[label] (B, k); `pooled` (B, d_z) before the head; `last` (B, D') the
    input of the final linear layer; `hidden[m]` (B, T_m, D) encoder outputs, zero where
    `mask[m]` (B, T_m) is False. `hidden` is filled where a model computes it anyway
    (middle fusion) or was called with ``hidden=True``.
    """

    predictions: dict[str, Tensor]
    pooled: Tensor
    last: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)
    mask: dict[str, Tensor] = field(default_factory=dict)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(trainable, total) number of parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
