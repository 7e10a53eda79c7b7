"""One training loop, one evaluator, and the seal on the test split.

`fit` trains a model and freezes the epoch that validation prefers; `select` does the
same for predictors that are not trained by gradients. Both return a `Frozen`, the only
thing that `evaluate` accepts for the test split. The loop runs on Accelerate: CPU, one
GPU, mixed precision, accumulation and several processes are configuration.
"""

from mmsa_lib.training.batches import EpochBatches, seed_everything
from mmsa_lib.training.config import TrainConfig
from mmsa_lib.training.frozen import Frozen, Predictions, evaluate, select
from mmsa_lib.training.loop import fit
from mmsa_lib.training.rule import Rule

__all__ = [
    "EpochBatches",
    "Frozen",
    "Predictions",
    "Rule",
    "TrainConfig",
    "evaluate",
    "fit",
    "seed_everything",
    "select",
]
