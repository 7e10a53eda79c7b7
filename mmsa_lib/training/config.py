"""How to train: one frozen dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mmsa_lib.errors import TrainingError, check_device, unknown


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Defaults are what the papers on small fusion models share.

    epochs            most epochs to run
    batch_size        samples a step and process (before accumulation)
    lr, weight_decay  of `optimiser`: "adam", "adamw" or "sgd" (momentum 0.9)
    group_lr          own rate of the parameters whose name starts with a key, such as
                      {"regressor": 1e-3}; the longest key counts, the rest has `lr`
    schedule          "constant", "plateau" (x0.1 after 10 flat epochs) or "cosine"
                      (per step, after a linear `warmup` fraction of all steps)
    clip              largest gradient norm, None for no clipping
    patience          epochs without a better validation loss before stopping
    accumulate        batches a step
    eval_batch_size   samples a batch without gradients (validation, prediction)
    bucketed          samples of similar length share a batch: less padding
    precision         "no", "bf16" or "fp16"
    device            "auto", "cpu" or "cuda"
    seed              of initialisation, order and dropout
    checkpoint        folder for resumable state; training continues from it if it is
                      there; written each epoch and every `checkpoint_steps` steps
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-3
    group_lr: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    optimiser: str = "adam"
    schedule: str = "constant"
    warmup: float = 0.0
    clip: float | None = 0.8
    patience: int | None = None
    accumulate: int = 1
    eval_batch_size: int = 256
    bucketed: bool = False
    precision: str = "no"
    device: str = "auto"
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_steps: int | None = None

    def __post_init__(self):
        for name, known in (
            ("optimiser", ("adam", "adamw", "sgd")),
            ("schedule", ("constant", "plateau", "cosine")),
            ("precision", ("no", "bf16", "fp16")),
        ):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        check_device(self.device)
        if ":" in self.device:
            raise TrainingError(
                f'device={self.device!r}: give "cuda", and choose the GPU with '
                "CUDA_VISIBLE_DEVICES"
            )
        for name in ("epochs", "batch_size", "accumulate", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1: {getattr(self, name)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise TrainingError(
                'device="cuda" was asked for but no GPU is visible. Use device="auto", '
                "or install a CUDA build of torch (see README, GPU path)."
            )
