"""A frozen backbone with something small that trains: what adapters attach to.

`Adapted` holds a frozen copy of a fusion model whose head trains, and calls whatever a
method puts between the frozen hidden states H_m (B, T_m, D_h) and the head, or after
the layers of the encoders. `encode` computes hidden states that never change once.
Used by Wander and what it is compared with (`methods.efficient`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch, Corpus, Ragged
from mmsa_lib.errors import ConfigError
from mmsa_lib.nets import (
    EarlyFusion,
    LateFusion,
    MiddleFusion,
    MulT,
    Output,
    freeze,
    thaw,
)
from mmsa_lib.nets.fusion import real_steps

Hidden = dict[str, Tensor]  # by modality: H_m (B, T_m, D_h), or masks (B, T_m) bool
BACKBONES = (LateFusion, EarlyFusion, MiddleFusion, MulT)


class Adapted(nn.Module):
    """A frozen backbone with a head that trains and something before it.

    base     `LateFusion`, `EarlyFusion`, `MiddleFusion` or `MulT`; copied, so that
             several models may share one
    before   (hidden, masks) -> z (B, D_z), what the head receives; None: `base.pool`
    layers   adapters (such as `Wander`) after every encoder layer; each has `gate` and
             `fuse` and adds its gated sequence to the first steps of every modality
    cached   the batches hold hidden states already (see `encode`): the encoders, which
             never change, need not run again
    The backbone is frozen (`nets.freeze`): eval mode, no gradient. Its head trains.
    """

    def __init__(
        self,
        base: nn.Module,
        before: Callable[[Hidden, Hidden], Tensor] | None = None,
        layers: list[nn.Module] | None = None,
        cached: bool = False,
    ):
        super().__init__()
        if not isinstance(base, BACKBONES):
            known = ", ".join(kind.__name__ for kind in BACKBONES)
            raise ConfigError(f"adapters attach to {known}, not {type(base).__name__}")
        if layers is not None and len(layers) != depth_of(base):
            raise ConfigError(
                f"{len(layers)} adapters for {depth_of(base)} encoder layers"
            )
        if cached and layers is not None:
            raise ConfigError(
                "adapters inside the encoders change the hidden states, which can then "
                "not be computed in advance: use cached=False"
            )
        self.base = freeze(copy.deepcopy(base))
        thaw(self.base.head)
        self.before = before
        self.layers = None if layers is None else nn.ModuleList(layers)
        self.cached = cached

    def forward(self, batch: Batch) -> Output:
        """Raises `UnknownNameError` or `CorpusError` as the backbone does."""
        base = self.base
        if self.cached:
            dims = dict.fromkeys(base.modalities, base.hidden_width)
            hidden, masks = batch.features, real_steps(batch, dims)
            hidden = {m: h.to(base.dtype) for m, h in hidden.items()}
        elif self.layers is not None:
            hidden, masks = self._layer_by_layer(batch)
        elif self.before is None:
            return base(batch)
        else:
            with torch.no_grad():
                output = base(batch, hidden=True)  # H_m (B, T_m, D_h)
            hidden, masks = output.hidden, output.mask
        z = (self.before or base.pool)(hidden, masks)  # (B, D_z)
        predictions, last = base.head(z)  # {label: (B, o)}, (B, D')
        return Output(predictions, z, last, hidden, masks)

    def _layer_by_layer(self, batch: Batch) -> tuple[Hidden, Hidden]:
        # by modality: (B, T_m, D_h), (B, T_m), its encoder
        streams, masks, encoders = self.base.streams(batch)
        x, keys = {}, {}
        for m, encoder in encoders.items():
            x[m], keys[m] = encoder.begin(streams[m], masks[m])
        for i, adapter in enumerate(self.layers):
            x = {m: e.layers[i](x[m], keys[m]) for m, e in encoders.items()}
            fused = adapter.gate * adapter.fuse(x, masks)  # (B, T_o, D_h)
            x = {m: _add_to_prefix(h, fused, masks[m]) for m, h in x.items()}
        return {m: e.end(x[m], masks[m]) for m, e in encoders.items()}, masks


def depth_of(base: nn.Module) -> int:
    """Layers of the encoders that make a backbone's hidden states.

    Raises `ConfigError` where there is no encoder for each modality (early fusion).
    """
    encoders = getattr(base, "memory", None) or getattr(base, "encoders", None)
    if encoders is None:
        raise ConfigError(
            f"{type(base).__name__} has no encoder for each modality: adapters inside "
            'encoders need LateFusion, MiddleFusion or MulT (or place="head")'
        )
    return len(next(iter(encoders.values())).layers)


def head_width(base: nn.Module) -> int:
    """D_z, the width of what the head receives."""
    head = base.head
    return (head.inner if head.merge is None else head.merge).in_features


def _add_to_prefix(h: Tensor, fused: Tensor, mask: Tensor) -> Tensor:
    """Add fused (B, T_o, d) to the first real steps of h (B, T, d)."""
    T = h.shape[1]
    fused = F.pad(fused[:, :T], (0, 0, 0, max(T - fused.shape[1], 0)))  # (B, T, d)
    return h + fused * mask[..., None].to(h.dtype)


# ---------------------------------------------------------------- hidden states


@torch.no_grad()
def encode(base: nn.Module, corpus: Corpus, batch_size: int = 256) -> Corpus:
    """The corpus with the frozen backbone's H_m (T, d) in place of its features.

    What never changes is computed once. The test split stays sealed.
    """
    training = base.training
    base.eval()
    device = next(base.parameters()).device

    def encoded(split):
        rows = {m: [] for m in base.modalities}
        for batch in split.batches(batch_size):
            output = base(batch.to(device), hidden=True)
            for m, h in output.hidden.items():
                mask = output.mask[m]
                steps = h[mask].float().cpu().split(mask.sum(1).tolist())
                rows[m] += [x.numpy() for x in steps]
        return split._with(features={m: Ragged.from_list(x) for m, x in rows.items()})

    out = corpus._map(encoded)
    base.train(training)
    return out


def longest(corpus: Corpus) -> dict[str, int]:
    """T_m: the longest sequence of each modality over all splits, for `max_len`."""
    splits = corpus.splits.values()
    return {
        m: max(int(s.features[m].lengths.max(initial=1)) for s in splits)
        for m in corpus.modalities
    }
