"""What the released programs do, kept apart: their position rule, their weight names.

`official_positions` is used by `Encoder(mode="official")`. `from_official` copies a
released state dict into our modules, so that both can be compared number by number.
Specification: `backbones.md`, section 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmsa_lib.errors import ConfigError

_INERT = re.compile(r"(^|\.)(version|embed_positions\._float_tensor)$")

_ENCODER = (
    (r"\.self_attn\.in_proj_", ".qkv."),
    (r"\.self_attn\.out_proj\.", ".out."),
    (r"\.layer_norms\.0\.", ".norm_attention."),
    (r"\.layer_norms\.1\.", ".norm_ffn."),
    (r"(^|\.)layer_norm\.", r"\1norm."),
)
_HEAD = (
    (r"^out_layer_proj0\.", "head.merge."),
    (r"^(out_layer_)?proj1\.", "head.inner."),
    (r"^(out_layer_)?proj2\.", "head.outer."),
    (r"^out_layer\.", "head.out."),
)


def official_positions(x: Tensor) -> Tensor:
    """Position numbers (B, T) of x (B, T, D): step t gets t + 1, or 0 if its first
    channel is exactly 0; later steps keep their numbers.
    """
    steps = torch.arange(1, x.shape[1] + 1, device=x.device)
    return torch.where(x[..., 0] != 0, steps, 0)


def from_official(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a released state dict into `model`; returns it.

    model   `Encoder`, or `LateFusion`, `EarlyFusion` (CASP), `MiddleFusion` (CGGM) or
            `MulT` (MPLMM), whose modalities stand in the released order
    Raises `ConfigError` naming weights that are missing, left over or of other shapes.
    """
    names = list(getattr(model, "modalities", ()))
    ours = {_rename(k, names): _squeeze(v) for k, v in state.items() if _weight(k)}
    wanted = model.state_dict()
    problems = [f"missing {k}" for k in wanted if k not in ours]
    problems += [f"not part of the model: {k}" for k in ours if k not in wanted]
    problems += [
        f"{k} is {tuple(v.shape)}, expected {tuple(wanted[k].shape)}"
        for k, v in ours.items()
        if k in wanted and v.shape != wanted[k].shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        raise ConfigError(
            f"these weights do not fit {type(model).__name__} ({shown}). Build it with "
            "the released dims, width, layers and outputs."
        )
    model.load_state_dict(ours)
    return model


def _weight(name: str) -> bool:
    return not _INERT.search(name)


def _squeeze(weight: Tensor) -> Tensor:
    """A convolution of width 1 over time is a linear map of each step."""
    return weight.squeeze(-1) if weight.ndim == 3 else weight


def _rename(name: str, modalities: list[str]) -> str:
    """Official parameter name -> ours, for every model of section 3."""
    by_index = dict(enumerate(modalities))
    by_letter = dict(zip("lav", modalities, strict=False))
    name = re.sub(
        r"^(proj|encoders)\.(\d+)\.",
        lambda m: (
            f"{'projections' if m[1] == 'proj' else 'encoders'}"
            f".{by_index.get(int(m[2]), m[2])}."
        ),
        name,
    )
    name = re.sub(
        r"^proj_([lav])\.", lambda m: f"projections.{by_letter.get(m[1])}.", name
    )
    name = re.sub(
        r"^trans_([lav])_with_([lav])\.",
        lambda m: f"cross.{by_letter.get(m[1])}.{by_letter.get(m[2])}.",
        name,
    )
    name = re.sub(
        r"^trans_([lav])_mem\.", lambda m: f"memory.{by_letter.get(m[1])}.", name
    )
    for pattern, replacement in (*_ENCODER, *_HEAD):
        name = re.sub(pattern, replacement, name)
    return name
