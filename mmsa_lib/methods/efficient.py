"""Efficient tuning under a frozen backbone: what Wander is compared with.

Each builder takes a `LateFusion` and one size, and returns a model in which the head
and a few new parameters train: a bottleneck adapter, LoRA (through peft), prompts,
LMF-style and concatenating fusion; and the ends of the scale, a linear probe, the head
alone and everything. `size_for` finds the size at which a builder trains as many
parameters as another method. All but prompts and probe start as the backbone itself.

Used in the chapter "Wander".
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsa_lib.errors import ConfigError
from mmsa_lib.methods.adapted import Adapted, Hidden, head_width
from mmsa_lib.nets import LateFusion, count_parameters, thaw

Build = Callable[[LateFusion, int], nn.Module]


def head_only(base: LateFusion, cached: bool = False) -> Adapted:
    """Only the head trains: a merging layer and a residual ReLU network."""
    return Adapted(base, cached=cached)


class _Linear(nn.Module):
    """One linear map of the read-outs z (B, M d), in the place of the head."""

    def __init__(self, base: LateFusion):
        super().__init__()
        self.outputs = dict(base.config.outputs)
        self.out = nn.Linear(head_width(base), sum(self.outputs.values()))
        self.out.to(base.head.out.weight)  # its dtype and device

    def forward(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts = self.out(z).split(list(self.outputs.values()), dim=-1)  # (B, o) each
        return dict(zip(self.outputs, parts, strict=True)), z


def linear_probe(base: LateFusion, cached: bool = False) -> Adapted:
    """A fresh linear map of the frozen read-outs; the head is left out."""
    model = Adapted(base, cached=cached)
    model.base.head = _Linear(base)
    return model


def full(base: LateFusion) -> LateFusion:
    """Full fine-tuning: a copy in which everything trains, dropout included."""
    return thaw(copy.deepcopy(base)).train()


# ---------------------------------------------------------------- before the head


class LMF(nn.Module):
    """z + W_o sum_k prod_m W_m^(k) [z_m; 1]: low-rank fusion of one vector per modality
    (arXiv 1806.00064), of `rank` terms and width `size`. W_o starts at zero.

    It multiplies read-outs, not tokens: that is the difference to Wander.
    """

    def __init__(self, base: LateFusion, size: int, rank: int = 4):
        super().__init__()
        self.rows, d = base.pool, base.config.width
        M = len(base.modalities)
        factors = torch.randn(M, rank, d + 1, size) / math.sqrt(d + 1)
        self.factors = nn.Parameter(factors)
        self.out = _zero(nn.Linear(size, M * d))

    def forward(self, hidden: Hidden, masks: Hidden) -> Tensor:
        z = self.rows(hidden, masks)  # (B, M d)
        z_m = z.unflatten(1, (len(self.factors), -1))  # (B, M, d)
        z_m = F.pad(z_m, (0, 1), value=1.0)  # (B, M, d + 1)
        factors = torch.einsum("bmd,mkdh->mbkh", z_m, self.factors)
        # (M, B, rank, size): product over M, sum over terms -> (B, size)
        fused = factors.prod(0).sum(1) / math.sqrt(self.factors.shape[1])
        return z + self.out(fused)  # (B, M d)


class Concat(nn.Module):
    """z + W_2 GELU(W_1 z) on all read-outs side by side: as many parameters as the
    others, without a product of modalities. W_2 starts at zero.
    """

    def __init__(self, base: LateFusion, size: int):
        super().__init__()
        self.rows, wide = base.pool, head_width(base)
        self.inner, self.outer = nn.Linear(wide, size), _zero(nn.Linear(size, wide))

    def forward(self, hidden: Hidden, masks: Hidden) -> Tensor:
        z = self.rows(hidden, masks)  # (B, M d)
        return z + self.outer(F.gelu(self.inner(z)))


def lmf(base: LateFusion, size: int, cached: bool = False) -> Adapted:
    """LMF-style fusion of the frozen read-outs."""
    return Adapted(base, LMF(base, size), cached=cached)


def concat(base: LateFusion, size: int, cached: bool = False) -> Adapted:
    """A small network on the frozen read-outs side by side."""
    return Adapted(base, Concat(base, size), cached=cached)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ---------------------------------------------------------------- inside the encoders


class _Bottleneck(nn.Module):
    """An encoder layer, then x + W_up GELU(W_down x). W_up starts at zero."""

    def __init__(self, layer: nn.Module, width: int, size: int):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(width, size), _zero(nn.Linear(size, width))

    def forward(self, *args, **kwargs) -> Tensor:
        x = self.layer(*args, **kwargs)  # (B, T, d), or (B, 1, d) of one row
        return x + self.up(F.gelu(self.down(x)))


class _Prompted(nn.Module):
    """An encoder that reads `size` learned steps after the real ones.

    After, so that the first row, which late fusion reads, stays the first real step. A
    sample that lacks the modality gets no prompts either.
    """

    def __init__(self, encoder: nn.Module, width: int, size: int):
        super().__init__()
        self.encoder = encoder
        self.prompts = nn.Parameter(torch.randn(size, width) / math.sqrt(width))

    def forward(self, x: Tensor, mask: Tensor, read: str = "all") -> Tensor:
        T, n = x.shape[1], len(self.prompts)
        x = torch.cat([x, self.prompts.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        # x is (B, T + n, d) now
        some = mask.any(1, keepdim=True).expand(-1, n)  # (B, n)
        h = self.encoder(x, torch.cat([mask, some], dim=1), read=read)
        return h[:, :T] if read == "all" else h


def bottleneck(base: LateFusion, size: int) -> Adapted:
    """An adapter of width `size` after every layer of every encoder."""
    model = Adapted(base)
    for encoder in model.base.encoders.values():
        encoder.layers = nn.ModuleList(
            _Bottleneck(layer, base.config.width, size) for layer in encoder.layers
        )
    return model


def prompts(base: LateFusion, size: int) -> Adapted:
    """`size` learned steps per modality, read by its frozen encoder."""
    model = Adapted(base)
    encoders = model.base.encoders
    for m, encoder in encoders.items():
        encoders[m] = _Prompted(encoder, base.config.width, size)
    return model


def lora(base: LateFusion, size: int) -> Adapted:
    """LoRA of rank `size` on the attention of every layer: W + 2 B A, with B = 0.

    Our layers use their weights without calling the modules that hold them, so peft's
    layer is told to show W + 2 B A as its weight.
    """
    for name in ("bitsandbytes", "kernels"):  # peft looks for GPU kernels, and says so
        logging.getLogger(name).setLevel(logging.ERROR)
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    class Shown(Linear):
        @property
        def weight(self) -> Tensor:
            return self.get_base_layer().weight + self.get_delta_weight("default")

    model = Adapted(base)
    config = LoraConfig(
        r=size, lora_alpha=2 * size, target_modules=r"encoders\..*\.(qkv|out)"
    )
    config._register_custom_module({nn.Linear: Shown})
    inject_adapter_in_model(config, model.base)
    thaw(model.base.head)  # peft has frozen it
    return model


# ---------------------------------------------------------------- equal parameters


def size_for(build: Build, base: LateFusion, parameters: int) -> int:
    """The size at which `build(base, size)` trains closest to `parameters`.

    The count is affine in the size for all of the above. Raises `ConfigError` where
    even size 1 trains more than twice as many.
    """
    one, two = (count_parameters(build(base, k))[0] for k in (1, 2))
    size = max(round(1 + (parameters - one) / (two - one)), 1)
    if size == 1 and one > 2 * parameters:
        raise ConfigError(
            f"{getattr(build, '__name__', 'this method')} trains at least {one} "
            f"parameters; {parameters} cannot be matched"
        )
    return size
