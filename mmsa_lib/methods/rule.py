"""What a method may do around a step of `training.fit`, which calls these hooks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch


class Rule:
    """Hooks around a step, for methods that change gradients or add loss terms.

    Every hook may be left out. A rule with state implements `state_dict` and
    `load_state_dict` (tensors and plain values), so that a killed run resumes exactly.
    """

    def setup(self, model: nn.Module, device: torch.device) -> None:
        """Called once, after the model is on its device."""

    def loss(self, output, batch: Batch, loss: Tensor) -> Tensor:
        """Return the loss to differentiate, with this rule's terms added."""
        return loss

    def after_backward(self, model: nn.Module) -> None:
        """Gradients of the whole step are there, unscaled and not yet clipped."""

    def after_step(self, model: nn.Module) -> None:
        """Called after the optimiser step."""

    def epoch_end(self, row: dict) -> None:
        """Add this rule's numbers to the history row of the epoch."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        pass
