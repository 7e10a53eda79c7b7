"""Encoders and fusion models. All take a `Batch` and return an `Output`."""

from mmsa_lib.nets.encoder import Dropout, Encoder, EncoderLayer
from mmsa_lib.nets.fusion import (
    CASP,
    CGGM,
    MPLMM,
    WANDER,
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
from mmsa_lib.nets.output import Output, count_parameters

__all__ = [
    "CASP",
    "CGGM",
    "MPLMM",
    "WANDER",
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
    "from_official",
    "modality_modules",
]
