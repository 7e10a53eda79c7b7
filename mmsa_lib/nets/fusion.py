"""Late, early and middle fusion, MulT, and a pooled baseline: one `Batch` in, one
`Output` out, for any number of modalities.

Specification: `backbones.md`, section 3. In ``mode="paper"`` (the default) padding is
masked and a modality that a sample lacks contributes nothing; ``mode="official"`` does
what the released programs do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsa_lib.corpora.schema import Batch
from mmsa_lib.errors import ConfigError, CorpusError, unknown
from mmsa_lib.nets.encoder import MODES, Dropout, Encoder
from mmsa_lib.nets.ops import dropout, linear
from mmsa_lib.nets.output import Output

# the dropout rates of the released scripts, by method
RATES = {
    "casp": Dropout(attention=0.1, relu=0.1, embedding=0.25, residual=0.1, output=0.0),
    "cggm": Dropout(attention=0.15, relu=0.15, embedding=0.2, residual=0.1, output=0.1),
    "mplmm": Dropout(attention=0.1, relu=0.1, embedding=0.25, residual=0.1, output=0.1),
    "wander": Dropout(
        attention=0.2, relu=0.2, embedding=0.15, residual=0.2, output=0.1
    ),
}

READOUTS = ("first", "last", "mean")


@dataclass(frozen=True)
class FusionConfig:
    """What a fusion model is built from.

    dims      modality name -> feature width; their order is the order of fusion
    width     D, a multiple of `heads`
    layers    L of the unimodal (late, middle), joint (early) or cross encoders (MulT);
              middle fusion adds L - 2 joint layers, MulT max(L, 3) memory layers
    outputs   label name -> number of outputs (classes: one logit each)
    dropout   rates; None takes those of the model's paper
    readout   "first", "last" or "mean" over real steps; None takes the model's own
    causal    no attention to later steps (released MPLMM: True)
    """

    dims: dict[str, int]
    width: int = 40
    layers: int = 5
    heads: int = 8
    outputs: dict[str, int] = field(default_factory=lambda: {"sentiment": 1})
    dropout: Dropout | None = None
    mode: str = "paper"
    readout: str | None = None
    causal: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        if self.readout is not None and self.readout not in READOUTS:
            raise unknown("readout", self.readout, READOUTS)
        for what, sizes in (("dims", self.dims), ("outputs", self.outputs)):
            if not sizes or any(n < 1 for n in sizes.values()):
                raise ConfigError(f"{what} needs at least one positive size: {sizes}")
        if isinstance(self.dropout, dict):  # read back from a record
            object.__setattr__(self, "dropout", Dropout(**self.dropout))


class Head(nn.Module):
    """Residual head W_o(z + W_b drop(ReLU(W_a z))); with `merge` inputs, W_0 first:
    z = ReLU(W_0 z).
    """

    def __init__(self, width: int, outputs: dict[str, int], p: float, merge: int = 0):
        super().__init__()
        self.outputs, self.p = dict(outputs), p
        self.merge = nn.Linear(merge, width) if merge else None
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.out = nn.Linear(width, sum(outputs.values()))

    def forward(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """z (B, D') -> (predictions, input of the last layer (B, D'))."""
        if self.merge is not None:
            z = F.relu(self.merge(z))
        last = z + self.outer(dropout(F.relu(self.inner(z)), self.p, self.training))
        parts = self.out(last).split(list(self.outputs.values()), dim=-1)
        return dict(zip(self.outputs, parts, strict=True)), last


class _Fusion(nn.Module):
    """What the Transformer models share: projections, and reading a `Batch`.

    A model is ``head(pool(hidden, masks))`` over hidden states H_m (B, T_m, D_h), and
    that is where adapters on a frozen backbone come in (`methods.adapted`).
    """

    rates = RATES["casp"]  # of the paper that the model comes from
    readout = "first"

    def __init__(self, config: FusionConfig, bias: bool = True):
        super().__init__()
        self.config = config
        self.modalities = tuple(config.dims)
        self.rates = config.dropout or self.rates
        self.readout = config.readout or self.readout
        self.projections = nn.ModuleDict(
            {m: nn.Linear(d, config.width, bias) for m, d in config.dims.items()}
        )

    def _encoder(self, width: int, layers: int) -> Encoder:
        c = self.config
        return Encoder(width, layers, c.heads, self.rates, c.mode, c.causal)

    def embed(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Project the features: E_m (B, T_m, D) and masks (B, T_m), by modality.

        Raises `UnknownNameError` or `CorpusError` where the batch is not what the
        model was built for, or a sample has no modality at all.
        """
        masks = real_steps(batch, self.config.dims, require=self.config.mode == "paper")
        embedded = {}
        for m, layer in self.projections.items():
            x = self._prepare(m, batch.features[m].to(self.dtype))
            if isinstance(layer, nn.Linear):
                x = linear(x, layer.weight, layer.bias)
            embedded[m] = x
        return embedded, masks

    def _prepare(self, modality: str, x: Tensor) -> Tensor:
        """What a model does to raw features before their projection: nothing."""
        return x

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and so of hidden states."""
        return self.head.out.weight.dtype

    @property
    def hidden_width(self) -> int:
        """D_h, the width of every H_m."""
        return self.config.width

    def pool(self, hidden: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
        """What the head receives of hidden states: read-outs in a row, (B, M D_h)."""
        read = [self._read_out(hidden[m], masks[m]) for m in self.modalities]
        return torch.cat(read, 1)

    def streams(self, batch: Batch) -> tuple[dict, dict, nn.ModuleDict]:
        """Sequences x_m (B, T_m, D_h) and masks before the encoders that make H_m of
        them, and these encoders, by modality. Raises `ConfigError` where there is none
        for each modality.
        """
        embedded, masks = self.embed(batch)
        if not hasattr(self, "encoders"):
            raise ConfigError(
                f"{type(self).__name__} has no encoder for each modality: adapters "
                "inside encoders need LateFusion, MiddleFusion or MulT"
            )
        return embedded, masks, self.encoders

    def _read(self, encoder: Encoder, x: Tensor, mask: Tensor, rows: bool):
        """Encode; returns the read-out (B, D), and all rows where they are computed."""
        if rows or self.readout == "mean":
            h = encoder(x, mask)
            return self._read_out(h, mask), h
        return encoder(x, mask, read=self.readout), None

    def _read_each(self, encoders: nn.ModuleDict, x: dict, masks: dict, rows: bool):
        """`_read` by modality: read-outs side by side, and {m: rows} if asked for."""
        read = {m: self._read(e, x[m], masks[m], rows) for m, e in encoders.items()}
        hidden = {m: h for m, (_, h) in read.items()} if rows else {}
        return torch.cat([z for z, _ in read.values()], 1), hidden

    def _read_out(self, h: Tensor, mask: Tensor) -> Tensor:
        """The read-out of encoder outputs (B, T, D) -> (B, D)."""
        if self.config.mode == "official":
            mask = torch.ones_like(mask)
        if self.readout == "mean":
            return masked_mean(h, mask)
        steps = torch.arange(mask.shape[1], device=mask.device)
        far = mask.shape[1] if self.readout == "first" else -1
        steps = torch.where(mask, steps, far)
        row = steps.amin(1) if self.readout == "first" else steps.amax(1)
        row = row.clamp(0, mask.shape[1] - 1)
        return h[torch.arange(len(h), device=h.device), row]

    def _output(self, z: Tensor, hidden: dict, masks: dict) -> Output:
        predictions, last = self.head(z)
        return Output(predictions, z, last, hidden, masks)


class LateFusion(_Fusion):
    """One encoder a modality; read-outs side by side (CASP, base of Wander)."""

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        self.encoders = nn.ModuleDict(
            {m: self._encoder(config.width, config.layers) for m in self.modalities}
        )
        merge = len(self.modalities) * config.width
        self.head = Head(config.width, config.outputs, self.rates.output, merge)

    def forward(self, batch: Batch, hidden: bool = False) -> Output:
        """`pooled` is [H_t[0]; H_a[0]; ...] (B, M D), zeros for a missing modality."""
        embedded, masks = self.embed(batch)
        z, rows = self._read_each(self.encoders, embedded, masks, hidden)
        return self._output(z, rows, masks)


class EarlyFusion(_Fusion):
    """One encoder over all steps of all modalities in a row (CASP)."""

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        self.fusion = self._encoder(config.width, config.layers)
        self.head = Head(config.width, config.outputs, self.rates.output)

    def pool(self, hidden: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
        """The read-out (B, D) of all steps in a row."""
        return self._read_out(*_joined(self.modalities, hidden, masks))

    def forward(self, batch: Batch, hidden: bool = False) -> Output:
        """`hidden` are the joint encoder's outputs, cut by modality again."""
        embedded, masks = self.embed(batch)
        x, mask = _joined(self.modalities, embedded, masks)  # (B, sum T_m, D)
        if self.config.mode == "paper" and not hidden:
            x, mask = compact(x, mask)
        z, h = self._read(self.fusion, x, mask, hidden)
        rows = {}
        if hidden:
            lengths = [masks[m].shape[1] for m in self.modalities]
            rows = dict(zip(self.modalities, h.split(lengths, 1), strict=True))
        return self._output(z, rows, masks)


class MiddleFusion(_Fusion):
    """One encoder a modality, then L - 2 joint layers over all their outputs (CGGM)."""

    rates = RATES["cggm"]

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        if config.layers < 3:
            raise ConfigError(
                f"middle fusion has layers - 2 joint layers; layers={config.layers} "
                "leaves none, use at least 3"
            )
        self.encoders = nn.ModuleDict(
            {m: self._encoder(config.width, config.layers) for m in self.modalities}
        )
        self.fusion = self._encoder(config.width, config.layers - 2)
        self.head = Head(config.width, config.outputs, self.rates.output)

    def pool(self, hidden: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
        """Read-out z (B, D) of the joint encoder over [H_t; H_a; ...]."""
        x, mask = _joined(self.modalities, hidden, masks)  # (B, sum T_m, D)
        if self.config.mode == "paper":
            x, mask = compact(x, mask)
        return self._read(self.fusion, x, mask, rows=False)[0]

    def forward(self, batch: Batch, hidden: bool = True) -> Output:
        """`hidden` are the outputs of the encoders, which are computed anyway."""
        embedded, masks = self.embed(batch)
        rows = {m: e(embedded[m], masks[m]) for m, e in self.encoders.items()}
        return self._output(self.pool(rows, masks), rows, masks)


class MulT(_Fusion):
    """A cross encoder for every ordered pair of modalities, then a memory encoder a
    modality over its pairs side by side; last rows to the head (MPLMM's backbone).
    """

    rates = RATES["mplmm"]
    readout = "last"

    def __init__(self, config: FusionConfig):
        super().__init__(config, bias=False)
        if len(self.modalities) < 2:
            raise ConfigError(
                f"MulT needs at least two modalities, found {list(self.modalities)}"
            )
        if config.mode == "official":  # released MulT skips a projection of equal width
            for m, d in config.dims.items():
                if d == config.width:
                    self.projections[m] = nn.Identity()
        pairs = {m: [k for k in self.modalities if k != m] for m in self.modalities}
        self.cross = nn.ModuleDict(
            {
                m: nn.ModuleDict(
                    {k: self._encoder(config.width, config.layers) for k in others}
                )
                for m, others in pairs.items()
            }
        )
        wide = (len(self.modalities) - 1) * config.width
        self.memory = nn.ModuleDict(
            {m: self._encoder(wide, max(config.layers, 3)) for m in self.modalities}
        )
        self.head = Head(len(self.modalities) * wide, config.outputs, self.rates.output)

    @property
    def hidden_width(self) -> int:
        return (len(self.modalities) - 1) * self.config.width

    def streams(self, batch: Batch) -> tuple[dict, dict, nn.ModuleDict]:
        """h_m (B, T_m, (M-1) D) after the cross stage; memory encoders make H_m."""
        embedded, masks = self.embed(batch)
        return self.attend(embedded, masks), masks, self.memory

    def _prepare(self, modality: str, x: Tensor) -> Tensor:
        """Text is dropped out before its projection."""
        p = self.rates.embedding if modality == "text" else 0.0
        return dropout(x, p, self.training)

    def attend(
        self, embedded: dict[str, Tensor], masks: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Cross stage: E_m (B, T_m, D) -> h_m (B, T_m, (M-1) D), by modality."""
        return {
            m: torch.cat(
                [
                    encoder(embedded[m], masks[m], embedded[k], masks[k])
                    for k, encoder in encoders.items()
                ],
                dim=-1,
            )
            for m, encoders in self.cross.items()
        }

    def remember(
        self, crossed: dict[str, Tensor], masks: dict[str, Tensor], hidden: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Memory stage: h_m -> z (B, M (M-1) D), and memory outputs if `hidden`.

        Steps (prompts) may have been appended to h_m and its mask in between.
        """
        return self._read_each(self.memory, crossed, masks, hidden)

    def forward(self, batch: Batch, hidden: bool = False) -> Output:
        """`hidden` are memory encoder outputs (B, T_m, (M-1) D)."""
        embedded, masks = self.embed(batch)
        z, rows = self.remember(self.attend(embedded, masks), masks, hidden)
        return self._output(z, rows, masks)


class PooledFusion(_Fusion):
    """Masked mean beside attention pooling of each modality, then a small head [ours].

    No encoder: what a frozen feature stack gives on its own. Each step becomes
    h = GELU(W LN(x)); a modality is pooled to [mean_t h; sum_t a_t h], a = softmax over
    real steps of w^T h; z = GELU(W_0 [all of them]).
    """

    rates = Dropout(relu=0.3, output=0.3)

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        if config.mode != "paper" or config.readout or config.causal:
            raise ConfigError(
                "PooledFusion pools over all real steps; it has no official mode, "
                "readout or causal mask"
            )
        D, dims = config.width, config.dims
        self.norms = nn.ModuleDict({m: nn.LayerNorm(d) for m, d in dims.items()})
        self.scores = nn.ModuleDict({m: nn.Linear(D, 1) for m in dims})
        self.merge = nn.Linear(2 * len(dims) * D, D)
        self.head = Head(D, config.outputs, self.rates.output)

    def _prepare(self, modality: str, x: Tensor) -> Tensor:
        return self.norms[modality](x)

    def forward(self, batch: Batch) -> Output:
        """`pooled` is z (B, D); `hidden` are the steps h that were pooled."""
        embedded, masks = self.embed(batch)
        pooled, hidden = [], {}
        for m, x in embedded.items():
            mask = masks[m]
            h = dropout(F.gelu(x), self.rates.relu, self.training)
            hidden[m] = h = h * mask[..., None].to(h.dtype)
            score = self.scores[m](h)[..., 0]
            score = score.masked_fill(~mask, torch.finfo(h.dtype).min / 4)
            pooled += [
                masked_mean(h, mask),
                torch.einsum("bt,btd->bd", score.softmax(1), h),
            ]
        z = F.gelu(self.merge(torch.cat(pooled, 1)))
        z = dropout(z, self.rates.relu, self.training)
        return self._output(z, hidden, masks)


# ---------------------------------------------------------------- masks and pooling


def _joined(modalities, x: dict[str, Tensor], masks: dict[str, Tensor]):
    """All steps of all modalities in a row: (B, sum T_m, D), (B, sum T_m)."""
    row = torch.cat([x[m] for m in modalities], 1)
    return row, torch.cat([masks[m] for m in modalities], 1)


def real_steps(
    batch: Batch, dims: dict[str, int], require: bool = True
) -> dict[str, Tensor]:
    """Masks (B, T_m) of the steps that may be used: real, of an available modality.

    dims      modality -> width that the model was built with
    require   raise if a sample has no real step in any modality
    Raises `UnknownNameError` or `CorpusError` for other modalities, shapes or widths.
    """
    for m in dims:
        if m not in batch.features:
            raise unknown("modality", m, batch.features)
    extra = [m for m in batch.features if m not in dims]
    if extra:
        raise CorpusError(
            f"the batch holds {', '.join(extra)}, which the model was not built for "
            f"(it takes {', '.join(dims)}). Select modalities with corpus.only([...])."
        )
    masks = {}
    for m, d in dims.items():
        x, mask = batch.features[m], batch.mask[m]
        if x.ndim != 3 or x.shape[-1] != d:
            raise CorpusError(
                f"features of {m!r} are {tuple(x.shape)}; the model was built for "
                f"(batch, steps, {d}). Build FusionConfig with dims=corpus.dims."
            )
        if mask.shape != x.shape[:2]:
            raise CorpusError(
                f"mask of {m!r} is {tuple(mask.shape)}, its features {tuple(x.shape)}"
            )
        masks[m] = mask & batch.available[m][:, None]
    if require:
        some = torch.stack([mask.any(1) for mask in masks.values()]).any(0)
        if not some.all():
            lost = [batch.ids[i] for i in (~some).nonzero().flatten().tolist()]
            shown = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
            raise CorpusError(
                f"every modality is missing for {len(lost)} samples ({shown}): there "
                "is nothing to predict from. Leave them out, or keep one modality."
            )
    return masks


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over real steps: x (B, T, D), mask (B, T) -> (B, D); zero without any."""
    weights = mask.to(x.dtype)
    total = torch.einsum("btd,bt->bd", x, weights)
    return total / weights.sum(1, keepdim=True).clamp(min=1)


def compact(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move real steps to the front, in order, and cut the padding that all share.

    Changes no result in paper mode, where positions count real steps. On a GPU, where
    the new length would have to be waited for, nothing is moved.
    """
    if mask.device.type != "cpu" or mask.all():
        return x, mask
    T = max(int(mask.sum(1).max()), 1)
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :T]
    rows = order + torch.arange(len(x))[:, None] * x.shape[1]
    packed = x.flatten(0, 1).index_select(0, rows.flatten())
    return packed.view(len(x), T, -1), mask.gather(1, order)


def modality_modules(model: nn.Module, projections: bool = True) -> dict[str, list]:
    """The modules that serve one modality alone, by modality: projection (unless left
    out), unimodal encoder or, in MulT, cross and memory encoders that it queries; in
    the pooled model, norm and score.
    """
    names = ["encoders", "cross", "memory", "norms", "scores"]
    names += ["projections"] * projections
    parts = [getattr(model, n) for n in names if hasattr(model, n)]
    return {m: [part[m] for part in parts] for m in model.modalities}
