"""Wander: a low-rank sequence adapter for two to seven modalities (arXiv 2412.08979).

Frozen encoders give H_m (B, T_m, d). The adapter multiplies all modalities token by
token, with a fusion tensor that is never built: CP over modalities, each factor split
into a token part U_m (T_m, T_o) and a feature part V_m (r, d),

    Z_m = GELU(H_m W_m + b_m) * K_m                                    (B, T_m, r)
    F   = sum_p sum_q  prod_m  U_m^(p)T Z_m V_m^(q)                    (B, T_o, d)
    out = residual + gate * F / sqrt(R_t R_d)

Built in the chapter "Wander"; equations and decisions: specification `wander.md`. The
authors' repository was not available to us: `mode="official"` is what two public hand
copies of it do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsa_lib.errors import ConfigError, unknown
from mmsa_lib.methods.adapted import Adapted, Hidden, depth_of, head_width
from mmsa_lib.nets.encoder import MODES
from mmsa_lib.nets.fusion import masked_mean

PLACES = ("head", "layers")
_CHOICES = {
    "cp": ("separable", "tied"),
    "residual": ("prefix", "mean"),
    "readout": ("mean", "first"),
    "place": PLACES,
    "mode": MODES,
}


@dataclass(frozen=True)
class WanderConfig:
    """What an adapter is built from. The sizes are the MOSI defaults of the public
    copies; the paper's own are unknown. The other defaults are decisions of ours.

    rank          r, width of the bottleneck
    token_rank    R_t, number of token factors per modality
    feature_rank  R_d, number of feature factors per modality
    out_tokens    T_o, length of the fused sequence
    max_len       T_m, the longest sequence; one number, or one per modality
    cp            "separable": all R_t R_d pairs (p, q); "tied": p = q, R_t = R_d terms
    append_one    a constant channel in Z_m, so that F holds lower-order terms too
    normalize     divide Z_m by its root mean square (no gradient through it)
    gate_init     0: the adapter starts as its residual
    residual      "prefix": the first T_o steps of the first modality that a sample has;
                  "mean": the mean over its modalities of their mean steps, repeated
    readout       "mean" over the residual's real steps, or the "first" one
    place         "head": once, before the head; "layers": after every encoder layer
    mode          "official": product of sums, T_o = r, zero U, row 0, no masks
    """

    rank: int = 16
    token_rank: int = 12
    feature_rank: int = 8
    out_tokens: int = 16
    max_len: int | Mapping[str, int] = 50
    cp: str = "separable"
    append_one: bool = False
    normalize: bool = True
    gate_init: float = 0.0
    residual: str = "prefix"
    readout: str = "mean"
    place: str = "head"
    mode: str = "paper"

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        for name in ("rank", "token_rank", "feature_rank", "out_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1: {getattr(self, name)}")
        if self.cp == "tied" and self.token_rank != self.feature_rank:
            raise ConfigError(
                "tied CP pairs token factor k with feature factor k, so token_rank and "
                f"feature_rank must be equal: {self.token_rank} and {self.feature_rank}"
            )
        if self.mode == "official" and self.out_tokens != self.rank:
            raise ConfigError(
                "the copies have as many output tokens as the rank: give "
                f"out_tokens={self.rank}, or use mode='paper'"
            )

    def length(self, modality: str) -> int:
        """T_m of one modality."""
        if not isinstance(self.max_len, Mapping):
            return self.max_len
        if modality not in self.max_len:
            raise unknown("modality in max_len", modality, self.max_len)
        return self.max_len[modality]


class Wander(nn.Module):
    """The adapter: {m: H_m (B, T_m, d)} and masks -> fused sequence (B, T_o, d).

    modalities   their order decides the reference of the residual: the first one
    width        d of every H_m
    Parameters: M(dr + r) + M R_d r d + R_t T_o sum T_m + 1; `append_one` adds M R_d d.
    """

    def __init__(self, modalities, width: int, config: WanderConfig | None = None):
        super().__init__()
        self.config = c = config or WanderConfig()
        self.modalities, self.width = tuple(modalities), width
        if not self.modalities:
            raise ConfigError("an adapter needs at least one modality")
        rows = c.rank + c.append_one
        self.down = nn.ModuleDict({m: nn.Linear(width, c.rank) for m in modalities})
        self.V = nn.ParameterDict(
            {
                m: torch.randn(c.feature_rank, rows, width) / math.sqrt(rows)
                for m in modalities
            }
        )
        self.U = nn.ParameterDict()
        for m in modalities:
            U = torch.randn(c.token_rank, c.length(m), c.out_tokens)
            self.U[m] = U / math.sqrt(c.length(m))
        self.gate = nn.Parameter(torch.tensor(float(c.gate_init)))

    def forward(self, hidden: Hidden, masks: Hidden) -> tuple[Tensor, Tensor]:
        """residual + gate * fused (B, T_o, d), and its mask (B, T_o): which output
        steps stand on a real step of the residual.
        """
        residual, mask = self.residual(hidden, masks)
        return residual + self.gate * self.fuse(hidden, masks), mask

    def fuse(self, hidden: Hidden, masks: Hidden) -> Tensor:
        """F / sqrt(R_t R_d), (B, T_o, d): the boxed equation. No outer product is ever
        there; time and memory grow linearly with the number of modalities. Raises
        `ConfigError` where real steps are beyond `max_len`.
        """
        c = self.config
        tied = c.cp == "tied"
        product = None
        for m in self.modalities:
            z, U = self.project(m, hidden[m], masks[m])
            # tokens first: T_m >= r on sequences, so that is the shorter contraction
            if tied:
                x = torch.einsum("btr,kts->bksr", z, U)  # (B, R, T_o, r)
                factor = torch.einsum("bksr,kre->bkse", x, self.V[m])
            else:
                x = torch.einsum("btr,pts->bpsr", z, U)  # (B, R_t, T_o, r)
                factor = torch.einsum("bpsr,qre->bpqse", x, self.V[m])
            # (B, R_t, R_d, T_o, d), tied (B, R, T_o, d)
            product = factor if product is None else product * factor
        terms = c.token_rank if tied else c.token_rank * c.feature_rank
        # terms side by side, added up: (B, T_o, d)
        return product.flatten(1, -3).sum(1) / math.sqrt(terms)

    def project(self, m: str, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Z_m (B, T, r or r + 1), zero where masked, and U_m cut to as many steps."""
        c, U = self.config, self.U[m]
        h, mask = _cut(m, h, mask, U.shape[1])
        keep = mask[..., None]  # (B, T, 1)
        h = h.masked_fill(~keep, 0.0)  # whatever stands in padding, even NaN
        z = F.gelu(self.down[m](h)) * keep.to(h.dtype)  # (B, T, r)
        if c.normalize:
            z = z / _rms(z.detach(), mask)
        if c.append_one:
            z = torch.cat([z, keep.to(z.dtype)], dim=-1)  # (B, T, r + 1)
        return z, U[:, : h.shape[1]]  # (R_t, T, T_o)

    def residual(self, hidden: Hidden, masks: Hidden) -> tuple[Tensor, Tensor]:
        """What the fused sequence is added to, (B, T_o, d), and its mask (B, T_o)."""
        c = self.config
        some = {m: masks[m].any(1) for m in self.modalities}  # (B,) each
        if c.residual == "mean":
            means = [masked_mean(hidden[m], masks[m]) for m in self.modalities]
            count = torch.stack(list(some.values())).sum(0)  # (B,)
            mean = torch.stack(means).sum(0) / count.clamp(min=1)[:, None]  # (B, d)
            mask = (count > 0)[:, None].expand(-1, c.out_tokens)
            return mean[:, None].expand(-1, c.out_tokens, -1), mask
        out = mask = None
        for m in self.modalities:
            h, k = _prefix(hidden[m], masks[m], c.out_tokens)  # (B, T_o, d), (B, T_o)
            if out is None:
                out, mask, found = h, k, some[m]
                continue
            take = ~found & some[m]  # this sample has none of the modalities before
            out = torch.where(take[:, None, None], h, out)
            mask = torch.where(take[:, None], k, mask)
            found = found | take
        return out, mask

    def read(self, hidden: Hidden, masks: Hidden) -> Tensor:
        """c (B, d), the read-out of the fused sequence; `ConfigError` as in `fuse`."""
        out, mask = self(hidden, masks)  # (B, T_o, d), (B, T_o)
        if self.config.readout == "first":
            return out[:, 0]
        return masked_mean(out, mask)  # (B, T_o, d) -> (B, d)


def _cut(m: str, h: Tensor, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Drop padding beyond the longest sequence; `ConfigError` if real steps are there.

    (On a GPU this looks at the mask, and waits, only if there is something to drop.)
    """
    if h.shape[1] <= longest:
        return h, mask
    if mask[:, longest:].any():
        T = int(mask.sum(1).max())
        raise ConfigError(
            f"a sample has {T} real steps of {m!r}, the adapter was built for at most "
            f"{longest}. Build it with max_len={{{m!r}: {T}}} or more, or cut the "
            "sequence."
        )
    return h[:, :longest], mask[:, :longest]


def _rms(z: Tensor, mask: Tensor) -> Tensor:
    """Root mean square of each sample's real steps, (B, 1, 1) in the dtype of z."""
    count = mask.sum(1).clamp(min=1) * z.shape[-1]
    mean = z.float().square().sum((1, 2)) / count
    return mean.sqrt().clamp(min=1e-6)[:, None, None].to(z.dtype)


def _prefix(h: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The first `steps` steps, zero where masked; shorter sequences are filled up."""
    h, mask = h[:, :steps], mask[:, :steps]
    h = h.masked_fill(~mask[..., None], 0.0)
    more = steps - h.shape[1]
    return F.pad(h, (0, 0, 0, more)), F.pad(mask, (0, more))


# ---------------------------------------------------------------- the public copies


class OfficialWander(nn.Module):
    """What the public copies compute, for study: a product of sums, without masks.

        out = prod_m (sum_p U_m^(p))^T GELU(H_m W_m + b_m) (sum_q V_m^(q))
              + [H_1 ||_T H_2 ||_T ...] cut to its first r steps;  the head reads row 0

    U starts at zero, as in the copies: every gradient of the adapter then contains
    another modality's zero factor and stays exactly zero, so only the head trains.
    """

    def __init__(self, modalities, width: int, config: WanderConfig | None = None):
        super().__init__()
        self.config = c = config or WanderConfig(mode="official")
        self.modalities, self.width = tuple(modalities), width
        if not c.out_tokens == c.rank:
            raise ConfigError(f"the copies have {c.rank} output tokens, as many as r")
        self.down = nn.ModuleDict({m: nn.Linear(width, c.rank) for m in modalities})
        self.V = nn.ParameterDict(
            {
                m: nn.init.xavier_normal_(torch.empty(c.feature_rank, c.rank, width))
                for m in modalities
            }
        )
        self.U = nn.ParameterDict(
            {m: torch.zeros(c.token_rank, c.length(m), c.rank) for m in modalities}
        )
        if len(self.modalities) > 1:
            warnings.warn(
                "Wander(mode='official') is for study: with its zero factors no "
                "parameter of the adapter ever gets a gradient, only the head trains. "
                "Use mode='paper' to train an adapter.",
                stacklevel=2,
            )

    def forward(self, hidden: Hidden, masks: Hidden | None = None):
        """(B, r, d), and a mask that hides nothing; `masks` are ignored."""
        product = None
        for m in self.modalities:
            h, U = hidden[m], self.U[m]
            if h.shape[1] != U.shape[1]:
                raise ConfigError(
                    f"{m!r} has {h.shape[1]} steps; the copies take exactly "
                    f"{U.shape[1]}. Pad the batch, or use mode='paper'."
                )
            # (r, T) @ (B, T, r) @ (r, d) -> (B, r, d)
            factor = U.sum(0).T @ F.gelu(self.down[m](h)) @ self.V[m].sum(0)
            product = factor if product is None else product * factor
        joined = torch.cat([hidden[m] for m in self.modalities], dim=1)  # in time
        out = product + joined[:, : self.config.rank]
        return out, torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)

    def read(self, hidden: Hidden, masks: Hidden | None = None) -> Tensor:
        """Row 0, (B, d); `ConfigError` unless every sequence has exactly T_m steps."""
        return self(hidden)[0][:, 0]


def from_copy(adapter: OfficialWander, state: Mapping[str, Tensor]) -> OfficialWander:
    """Load weights under the copies' names (`factor_t_list.0`, ...); returns it."""
    ours = {}
    for i, m in enumerate(adapter.modalities):
        ours[f"U.{m}"] = state[f"factor_t_list.{i}"]
        ours[f"V.{m}"] = state[f"factor_dim_list.{i}"]
        for part in ("weight", "bias"):
            ours[f"down.{m}.{part}"] = state[f"down.{i}.{part}"]
    adapter.load_state_dict(ours)
    return adapter


# ---------------------------------------------------------------- on a frozen backbone


class _Repeat(nn.Module):
    """c (B, d) of an adapter, repeated to fit the pre-trained head: M times in late
    fusion, whose head takes the read-outs of M modalities side by side.
    """

    def __init__(self, adapter: Wander | OfficialWander, times: int):
        super().__init__()
        self.adapter, self.times = adapter, times

    def forward(self, hidden: Hidden, masks: Hidden) -> Tensor:
        return self.adapter.read(hidden, masks).repeat(1, self.times)  # (B, D_z)


def attach(
    base: nn.Module, config: WanderConfig | None = None, cached: bool = False
) -> Adapted:
    """A frozen copy of `base` with a Wander adapter; only adapter and head train.

    base   `LateFusion`, `EarlyFusion`, `MiddleFusion` or `MulT`
    """
    config = config or WanderConfig()
    names, width = base.modalities, base.hidden_width
    times = head_width(base) // width
    if config.mode == "official":
        if config.place != "head":
            raise ConfigError("the copies place the adapter once, before the head")
        adapter = OfficialWander(names, width, config)
        return Adapted(base, _Repeat(adapter, times), cached=cached)

    def build():
        return Wander(names, width, config)

    if config.place == "layers":
        layers = [build() for _ in range(depth_of(base))]
        return Adapted(base, layers=layers, cached=cached)
    return Adapted(base, _Repeat(build(), times), cached=cached)
