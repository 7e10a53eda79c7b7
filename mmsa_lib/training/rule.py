"""Hooks of a method around the steps of training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch


class Rule:
    """Hooks around a step, for methods that change batches or gradients or add losses.

    Every hook may be left out. A rule with state implements `state_dict` and
    `load_state_dict` (tensors and plain values), so that a killed run resumes exactly.
    """

    def setup(self, model: nn.Module, device: torch.device) -> None:
        """Called once, after the model is on its device."""

    def batch(self, batch: Batch, epoch: int) -> Batch:
        """Return the batch to train on, such as one with modalities taken away.

        Called after the random stream of the step was seeded.
        """
        return batch

    def loss(self, output, batch: Batch, loss: Tensor) -> Tensor:
        """Return the loss to differentiate, with this rule's terms added."""
        return loss

    def after_backward(self, model: nn.Module) -> None:
        """Gradients of the whole step are there, unscaled and not yet clipped."""

    def after_step(self, model: nn.Module) -> None:
        """Called after the optimiser step."""

    def epoch_end(self, model: nn.Module, row: dict) -> None:
        """Look at the model; add the rule's numbers to the history row of the epoch."""

    def teardown(self, model: nn.Module) -> None:
        """Called once after training, or when it fails: take every hook off again."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        pass
