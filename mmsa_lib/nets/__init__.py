"""Encoders and fusion models. All take a `Batch` and return an `Output`."""

from mmsa_lib.nets.encoder import Dropout, Encoder, EncoderLayer
from mmsa_lib.nets.fusion import (
    RATES,
    EarlyFusion,
    FusionConfig,
    Head,
    LateFusion,
    MiddleFusion,
    MulT,
    PooledFusion,
    modality_modules,
)
from mmsa_lib.nets.official import from_official
from mmsa_lib.nets.output import Output
from mmsa_lib.nets.trained import count_parameters, freeze, thaw

__all__ = [
    "RATES",
    "Dropout",
    "EarlyFusion",
    "Encoder",
    "EncoderLayer",
    "FusionConfig",
    "Head",
    "LateFusion",
    "MiddleFusion",
    "MulT",
    "Output",
    "PooledFusion",
    "count_parameters",
    "freeze",
    "from_official",
    "modality_modules",
    "thaw",
]
